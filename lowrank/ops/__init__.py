"""The operators, and which backend runs them."""

from . import schema as schema
from .checks import BLOCK_SIZES as BLOCK_SIZES
from .dispatch import explain as explain
from .dispatch import use_backend as use_backend
from .elementwise_functions import gated as gated
from .elementwise_functions import gated_backward as gated_backward
from .elementwise_functions import rms_norm as rms_norm
from .elementwise_functions import rms_norm_backward as rms_norm_backward
from .elementwise_functions import rotate as rotate
from .functions import adamw8bit_state as adamw8bit_state
from .functions import adamw8bit_step as adamw8bit_step
from .functions import codebook_dequantize as codebook_dequantize
from .functions import codebook_linear as codebook_linear
from .functions import codebook_linear_dx as codebook_linear_dx
from .functions import codebook_quantize as codebook_quantize
from .functions import linear_cross_entropy as linear_cross_entropy
from .functions import lion8bit_step as lion8bit_step
from .lora_functions import group_rows as group_rows
from .lora_functions import lora_linear as lora_linear
from .lora_functions import lora_linear_backward as lora_linear_backward
