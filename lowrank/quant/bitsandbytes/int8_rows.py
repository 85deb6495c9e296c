"""LLM.int8 layers: `weight` int8 [N, K], its rows' largest magnitudes `SCB`, `weight_format` 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank.errors import FileFormatError
from lowrank.quant.int8 import Int8
from lowrank.quant.storage import Storage

from .entries import FLOATS, describe, entry

KEYS = {"SCB", "weight_format"}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TILED = {1: "col32", 2: "col_turing", 3: "col_ampere"}  # of GPUs, by versions below 0.45


def is_layer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a weight is there with one of the other keys, or in int8."""
    weight = tensors.get("weight")
    is_int8 = isinstance(weight, Tensor) and weight.dtype == torch.int8
    return weight is not None and (is_int8 or any(key in KEYS for key in tensors))


def read(tensors: Mapping[str, Tensor], name: str) -> Storage:
    """See `bitsandbytes.read`. The dtype is float16, to which the weight was rounded first."""
    weight = entry(tensors, "weight", name, (torch.int8,))
    if weight.dim() != 2 or 0 in weight.shape:
        raise FileFormatError(f"{name}weight: expected [N, K]; got {describe(weight)}")
    scales = entry(tensors, "SCB", name, tuple(FLOATS.values()), weight.shape[0])
    if bool((scales < 0).any()):
        raise FileFormatError(f"{name}SCB: expected magnitudes; got some below 0")
    if "weight_format" in tensors:
        code = entry(tensors, "weight_format", name, _INTEGERS)
        layout = code.item() if code.numel() == 1 else describe(code)
        if layout != 0:
            raise FileFormatError(
                f"{name}weight_format: expected 0, rows; got {layout}"
                f"{', ' + _TILED[layout] if layout in _TILED else ''}; quantize the original weight"
            )
    # bitsandbytes copies SCB of any float dtype into float32 too
    held = {"CB": weight.contiguous(), "SCB": scales.float()}
    return Storage(Int8.name, tuple(weight.shape), torch.float16, held)


def write(storage: Storage) -> dict[str, Tensor]:
    """See `bitsandbytes.write`."""
    rows = torch.tensor(0, dtype=torch.uint8, device="cpu")
    return {"weight": storage["CB"], "SCB": storage["SCB"], "weight_format": rows}
