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
    """Where the tensors of a layer with one active adapter lie, found once.

    A model of 32 blocks has 224 such layers, and finding them takes as long as computing with them.
    Parameters may be replaced: what is kept are the dicts that they are in.
    """

    adapter: str
    base: nn.Linear
    base_parameters: dict[str, Tensor | None]
    A_parameters: dict[str, Tensor | None]
    B_parameters: dict[str, Tensor | None]
    dropout: nn.Dropout


def small_product(layer: AdaptedLayer, x: Tensor) -> Tensor | None:
    """y of a linear `layer` with one active adapter of plain LoRA, or None where it is not small.

    It is for float32 on a CPU, where the operator would do the same; not for a compiler to trace.
    """
    state = layer.__dict__
    names, at_hand = state["active_adapters"], state["at_hand"]
    if len(names) != 1 or state["disabled"] or state.get("_aside") or state["rows"] is not None:
        return None
    base = state["_modules"]["base_layer"]
    if at_hand is None or at_hand[0] is not names[0] or at_hand[1] is not base:
        at_hand = state["at_hand"] = _find(layer)
        if at_hand is None:
            return None
    adapter, _, base_parameters, A_parameters, B_parameters, dropout = at_hand
    weight = base_parameters.get("weight")
    A, B = A_parameters.get("weight"), B_parameters.get("weight")
    if weight is None or A is None or B is None or is_patched(base):
        return None  # one of them is made of others, each time that it is asked for
    if not float32 is x.dtype is weight.dtype is A.dtype is B.dtype or not x.is_cpu:
        return None
    (N, K), shape = weight.shape, x.shape
    if x.numel() * N > _ELEMENTS * K or not shape or shape[-1] != K or weight.requires_grad:
        return None
    if dropout.training and dropout.p or is_named() or is_autocast_enabled("cpu"):
        return None
    rows = x if len(shape) == 2 else x.reshape(-1, K)
    y = linear(rows, weight, base_parameters["bias"])
    y.addmm_(linear(rows, A), B.mT, alpha=state["scaling"][adapter])
    if rows is x:
        return y
    return y.view(shape[0], shape[1], N) if len(shape) == 3 else y.view(*shape[:-1], N)


def _find(layer: AdaptedLayer) -> AtHand | None:
    (adapter,), base = layer.active_adapters, layer.base_layer
    plain = layer.config[adapter].method == "lora" and not layer.spans[adapter]
    if type(base) is not nn.Linear or not plain:
        return None
    A, B, dropout = (part[adapter] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    return AtHand(adapter, base, base._parameters, A._parameters, B._parameters, dropout)
