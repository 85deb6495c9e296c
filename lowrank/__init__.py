"""Low-rank fine-tuning over quantized weights."""

from . import errors as errors
from . import ops as ops
from . import quant as quant
from .adapters.config import LoRAConfig as LoRAConfig
from .io.adapter import load_adapter as load_adapter
from .io.adapter import save_adapter as save_adapter
from .io.quantized import load_quantized as load_quantized
from .io.quantized import save_quantized as save_quantized
from .models.generate import generate as generate
from .models.loading import load_model as load_model
from .models.saving import save_model as save_model
from .models.tokenizer import load_tokenizer as load_tokenizer
from .nn.lora_linear import LoRALinear as LoRALinear
from .nn.quant_linear import QuantLinear as QuantLinear
from .surgery import count_parameters as count_parameters
from .surgery import delete_adapter as delete_adapter
from .surgery import disable_adapters as disable_adapters
from .surgery import enable_adapters as enable_adapters
from .surgery import inject as inject
from .surgery import merge as merge
from .surgery import merge_and_unload as merge_and_unload
from .surgery import print_trainable_parameters as print_trainable_parameters
from .surgery import quantize as quantize
from .surgery import scale_adapter as scale_adapter
from .surgery import set_adapter as set_adapter
from .surgery import unmerge as unmerge
