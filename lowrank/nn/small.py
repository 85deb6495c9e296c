"""One adapter beside a few rows: torch's own calls, where asking for the operator costs more."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, float32, is_autocast_enabled, is_grad_enabled, nn
from torch.nn.functional import linear

from lowrank.nn.fusible import is_patched
from lowrank.nn.quant_linear import QuantLinear
from lowrank.ops.dispatch import is_named

if TYPE_CHECKING:
    from lowrank.nn.adapted import AdaptedLayer

_QUANTIZED_ROWS = 16  # of x; more are multiplied with the adapter's in one pass, or by BLAS
_ELEMENTS = 1 << 16  # of y; from there on the choice costs less than the parts it chooses among


class AtHand(NamedTuple):
    """What a layer with one active adapter of plain LoRA computes with, found once.

    A model of 32 blocks has 224 such layers, and what they look up is no longer in the caches when
    its turn comes again: each dict that is passed by counts. The layer forgets it when one of its
    attributes is set. Modules and parameters may be replaced: kept are the dicts that they are in.
    """

    base: nn.Linear | QuantLinear
    base_parameters: dict[str, Tensor | None]
    As: dict[str, nn.Module]
    Bs: dict[str, nn.Module]
    dropouts: dict[str, nn.Module]
    scaling: dict[str, float]
    adapter: str
    most: int  # elements of x


def small_product(at_hand: AtHand, x: Tensor) -> Tensor | None:
    """y of a linear layer with one active adapter of plain LoRA, or None where it is not small.

    It is for float32 on a CPU, where the operator would do the same; over a quantized weight only
    without gradients, whose path is the operator's. Not for a compiler to trace.
    """
    base, base_parameters, As, Bs, dropouts, scaling, adapter, most = at_hand
    if x.numel() > most or is_patched(base) or is_named() or is_autocast_enabled("cpu"):
        return None
    dropout = dropouts[adapter]
    if type(dropout) is not nn.Identity and dropout.training and dropout.p:
        return None
    try:
        # rows: what torch does with more dimensions depends on whether x requires a gradient
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        if type(base) is QuantLinear:
            if is_grad_enabled() or x.dtype is not float32:
                return None
            y = base.forward(rows)
        else:
            y = linear(rows, base_parameters["weight"], base_parameters["bias"])
        branch = linear(
            linear(rows, As[adapter]._parameters["weight"]), Bs[adapter]._parameters["weight"]
        )
    except (KeyError, IndexError, RuntimeError):
        return None  # a weight made of others; x that the operator may refuse
    y.add_(branch, alpha=scaling[adapter])
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])


def at_hand_of(layer: AdaptedLayer) -> AtHand | None:
    """What the layer computes with as it is now, if that is known."""
    state = layer.__dict__
    at_hand = state["at_hand"]
    if at_hand is None or at_hand[0] is not state["_modules"]["base_layer"]:
        at_hand = state["at_hand"] = _find(layer)
    return at_hand


def _find(layer: AdaptedLayer) -> AtHand | None:
    base, adapters = layer._modules["base_layer"], layer.active_adapters
    if type(base) not in (nn.Linear, QuantLinear) or len(adapters) != 1:
        return None
    if layer.disabled or layer.merged or layer.rows is not None:
        return None
    (adapter,), quantized = adapters, type(base) is QuantLinear
    if layer.config[adapter].method != "lora" or layer.spans[adapter]:
        return None
    As, Bs, dropouts = (p._modules for p in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    held = [part[adapter]._parameters.get("weight") for part in (As, Bs)]
    if not quantized:
        held.append(base._parameters.get("weight"))
    if not all(t is not None and t.is_cpu and t.dtype is float32 for t in held):
        return None
    N, K = layer.matrix_shape
    most = _QUANTIZED_ROWS * K if quantized else _ELEMENTS * K // N
    return AtHand(base, base._parameters, As, Bs, dropouts, layer.scaling, adapter, most)
