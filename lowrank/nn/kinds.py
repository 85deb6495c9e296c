"""Which layers can have adapters, and what each becomes."""

from __future__ import annotations

from torch import nn

from lowrank.errors import ConfigError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.lora_attention import LoRAMultiheadAttention
from lowrank.nn.lora_conv import CONVOLUTIONS, LoRAConv
from lowrank.nn.lora_embedding import LoRAEmbedding
from lowrank.nn.lora_experts import DenseExperts, LoRAExperts
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_experts import QuantExperts
from lowrank.nn.quant_linear import QuantLinear, is_conv1d

_KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {
    **dict.fromkeys((nn.Linear, QuantLinear), LoRALinear),
    **dict.fromkeys((nn.Embedding, QuantEmbedding), LoRAEmbedding),
    **dict.fromkeys(CONVOLUTIONS, LoRAConv),
    nn.MultiheadAttention: LoRAMultiheadAttention,
    **dict.fromkeys((DenseExperts, QuantExperts), LoRAExperts),
}


def register_layer(base: type[nn.Module], adapted: type[AdaptedLayer]) -> None:
    """Let `inject` put adapters on layers of class `base`: `adapted.wrap` makes what they become.

    A class that computes x Wᵀ + b and has `in_features`, `out_features`, `weight` [N, K] and `bias`
    needs no other `adapted` than LoRALinear; any other layer, its own subclass of AdaptedLayer.
    """
    for name, value, kind in (("base", base, nn.Module), ("adapted", adapted, AdaptedLayer)):
        if not isinstance(value, type) or not issubclass(value, kind):
            raise ConfigError(f"{name}: expected a subclass of {kind.__name__}; got {value!r}")
    _KINDS[base] = adapted


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """What `module` becomes with an adapter, by the nearest of its classes; None: it cannot."""
    kind = next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), None)
    return LoRALinear if kind is None and is_conv1d(module) else kind
