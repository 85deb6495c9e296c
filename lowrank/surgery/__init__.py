"""Everything that edits a model: quantize, inject, switch, scale, merge."""

from .combine import combine_adapters as combine_adapters
from .convert import convert_to_lora as convert_to_lora
from .count import count_parameters as count_parameters
from .count import print_trainable_parameters as print_trainable_parameters
from .eva import initialize_eva as initialize_eva
from .extract import extract_adapter as extract_adapter
from .inject import inject as inject
from .lora_plus import lora_plus_groups as lora_plus_groups
from .merge import merge as merge
from .merge import merge_and_unload as merge_and_unload
from .merge import unload as unload
from .merge import unmerge as unmerge
from .merge_quantized import merge_quantized as merge_quantized
from .prepare import prepare_for_kbit_training as prepare_for_kbit_training
from .quantize import quantize as quantize
from .rows import adapter_copies as adapter_copies
from .rows import adapter_rows as adapter_rows
from .switch import delete_adapter as delete_adapter
from .switch import disable_adapters as disable_adapters
from .switch import enable_adapters as enable_adapters
from .switch import scale_adapter as scale_adapter
from .switch import set_adapter as set_adapter
