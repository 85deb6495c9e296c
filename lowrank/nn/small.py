"""One adapter beside a few rows: torch's own calls, where asking for the operator costs more."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, float32, is_autocast_enabled, nn
from torch.nn.functional import linear

from lowrank.nn.fusible import is_patched
from lowrank.ops.dispatch import is_named

if TYPE_CHECKING:
    from lowrank.nn.adapted import AdaptedLayer

_ELEMENTS = 1 << 16  # of y; from there on the choice costs less than the parts it chooses among


class AtHand(NamedTuple):
    """What a layer with one active adapter of plain LoRA computes with, found once.

    A model of 32 blocks has 224 such layers, and what they look up is no longer in the caches when
    its turn comes again: each dict that is passed by counts. The layer forgets it when one of its
    attributes is set. Parameters may be replaced: what is kept are the dicts that they are in.
    """

    base: nn.Linear
    base_parameters: dict[str, Tensor | None]
    A_parameters: dict[str, Tensor | None]
    B_parameters: dict[str, Tensor | None]
    scaling: dict[str, float]
    adapter: str
    dropout: nn.Dropout | None
    most: int  # elements of x


def small_product(layer: AdaptedLayer, x: Tensor) -> Tensor | None:
    """y of a linear `layer` with one active adapter of plain LoRA, or None where it is not small.

    It is for float32 on a CPU, where the operator would do the same; not for a compiler to trace.
    """
    at_hand = layer.__dict__["at_hand"]
    if at_hand is None:
        at_hand = layer.__dict__["at_hand"] = _find(layer)
        if at_hand is None:
            return None
    base, base_parameters, A_parameters, B_parameters, scaling, adapter, dropout, most = at_hand
    if x.numel() > most or is_patched(base) or is_named() or is_autocast_enabled("cpu"):
        return None
    if dropout is not None and dropout.training and dropout.p:
        return None
    try:
        y = linear(x, base_parameters["weight"], base_parameters["bias"])
        branch = linear(linear(x, A_parameters["weight"]), B_parameters["weight"])
    except (KeyError, RuntimeError):  # a weight made of others; x that the operator may refuse
        return None
    return y.add_(branch, alpha=scaling[adapter])


def _find(layer: AdaptedLayer) -> AtHand | None:
    base, adapters = layer._modules["base_layer"], layer.active_adapters
    if type(base) is not nn.Linear or len(adapters) != 1:
        return None
    if layer.disabled or layer.merged or layer.rows is not None:
        return None
    (adapter,), weight = adapters, base._parameters.get("weight")
    if layer.config[adapter].method != "lora" or layer.spans[adapter]:
        return None
    A, B, dropout = (part[adapter] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    held = [weight, A._parameters.get("weight"), B._parameters.get("weight")]
    if not all(t is not None and t.is_cpu and t.dtype is float32 for t in held):
        return None
    return AtHand(
        base, base._parameters, A._parameters, B._parameters, layer.scaling, adapter,
        None if isinstance(dropout, nn.Identity) else dropout,
        _ELEMENTS * layer.in_features // layer.out_features,
    )  # fmt: skip
