"""Low-rank fine-tuning over quantized weights."""

from typing import TYPE_CHECKING, Any

from . import adapters as adapters
from . import errors as errors
from . import ops as ops
from . import quant as quant
from .adapters.config import LoRAConfig as LoRAConfig
from .io.adapter import load_adapter as load_adapter
from .io.adapter import push_adapter as push_adapter
from .io.adapter import save_adapter as save_adapter
from .io.hotswap import hotswap_adapter as hotswap_adapter
from .io.quantized import load_quantized as load_quantized
from .io.quantized import save_quantized as save_quantized
from .models.generate import generate as generate
from .models.generate import stream as stream
from .models.loading import load_model as load_model
from .models.opening import open_weights as open_weights
from .models.saving import save_model as save_model
from .models.tokenizer import load_tokenizer as load_tokenizer
from .nn.kinds import register_layer as register_layer
from .nn.lora_linear import LoRALinear as LoRALinear
from .nn.quant_embedding import QuantEmbedding as QuantEmbedding
from .nn.quant_linear import QuantLinear as QuantLinear
from .surgery import adapter_copies as adapter_copies
from .surgery import adapter_rows as adapter_rows
from .surgery import combine_adapters as combine_adapters
from .surgery import convert_to_lora as convert_to_lora
from .surgery import count_parameters as count_parameters
from .surgery import delete_adapter as delete_adapter
from .surgery import disable_adapters as disable_adapters
from .surgery import enable_adapters as enable_adapters
from .surgery import extract_adapter as extract_adapter
from .surgery import initialize_eva as initialize_eva
from .surgery import inject as inject
from .surgery import lora_plus_groups as lora_plus_groups
from .surgery import merge as merge
from .surgery import merge_and_unload as merge_and_unload
from .surgery import merge_quantized as merge_quantized
from .surgery import prepare_for_kbit_training as prepare_for_kbit_training
from .surgery import print_trainable_parameters as print_trainable_parameters
from .surgery import quantize as quantize
from .surgery import scale_adapter as scale_adapter
from .surgery import set_adapter as set_adapter
from .surgery import unload as unload
from .surgery import unmerge as unmerge

if TYPE_CHECKING:
    from .plan import plan_memory as plan_memory


def __getattr__(name: str) -> Any:
    if name == "plan_memory":  # with the optimizers it is a tenth of what this package imports
        from .plan import plan_memory

        return plan_memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
