"""Low-rank fine-tuning over quantized weights."""

from . import errors as errors
from . import ops as ops
from . import quant as quant
from .nn.quant_linear import QuantLinear as QuantLinear
