"""One layer's bitsandbytes 4-bit tensors ↔ Storage, bit for bit. Format: docs of bitsandbytes 0.50.

The keys of a layer are `weight` (the packed bytes, [n, 1], in any dtype), `weight.absmax`,
`weight.quant_map`, with double quantization `weight.nested_absmax` and `weight.nested_quant_map`,
and `weight.quant_state.bitsandbytes__nf4` or `__fp4`: JSON as uint8. Blocks run over the flat
tensor, so they are ours where K is a multiple of the block size; the nibble order is ours too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank.errors import ConfigError, FileFormatError
from lowrank.ops import BLOCK_SIZES

from .codebook import CodebookQuantizer
from .codebooks import NF4 as NF4_TABLE
from .double_quant import expand
from .nf4 import NF4
from .storage import Storage

_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def is_layer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a bitsandbytes 4-bit layer, by names without prefix."""
    return "weight" in tensors and "weight.absmax" in tensors


def read(tensors: Mapping[str, Tensor], name: str = "") -> Storage:
    """The Storage of one layer's `tensors` (keys without the layer's prefix, which is `name`).

    Nested scales become the float32 absmax that bitsandbytes computes with, so the weights are
    equal bit for bit and the Storage is not double-quantized. Raises FileFormatError.
    """
    state, kind = _state(tensors, name)
    N, K = state["shape"]
    block_size = state["blocksize"]
    if block_size not in BLOCK_SIZES:
        raise FileFormatError(
            f"{name}weight: expected a block size from 32 to 4096; got {block_size!r}"
        )
    if K % block_size:
        raise FileFormatError(
            f"{name}weight: bitsandbytes' blocks of {block_size} cross the rows of [N={N}, K={K}]; "
            "expected K to be a multiple; quantize the original weights instead"
        )
    packed = tensors["weight"].contiguous().reshape(-1).view(torch.uint8)
    absmax = _entry(tensors, "weight.absmax", name)
    codebook = _entry(tensors, "weight.quant_map", name).float().reshape(1, -1)
    _check_size(f"{name}weight", packed, N * K // 2)
    _check_size(f"{name}weight.absmax", absmax, N * K // block_size)
    _check_size(f"{name}weight.quant_map", codebook, 16)
    if "nested_blocksize" in state:
        absmax = _nested(absmax, tensors, state, name)
    elif absmax.dtype == torch.uint8:
        raise FileFormatError(
            f"{name}weight.absmax: expected float32 or nested scales; got uint8 alone"
        )
    is_nf4 = codebook[0].tolist() == list(NF4_TABLE)
    return Storage(
        NF4.name if is_nf4 else CodebookQuantizer.name,
        (N, K),
        _DTYPES[state["dtype"]],
        {
            "packed": packed.reshape(N, K // 2),
            "absmax": absmax.float().reshape(N, K // block_size),
            "codebook": codebook.clone(),
        },
        {"block_size": block_size, "double_quant": False},
    )


def write(storage: Storage) -> dict[str, Tensor]:
    """bitsandbytes' tensors of one layer (keys without prefix), with plain float32 absmax.

    ConfigError for what bitsandbytes cannot compute with: another codebook than NF4, or blocks that
    would have to cross rows.
    """
    N, K = storage.shape
    block_size = storage.options["block_size"]
    codebook = storage["codebook"]
    if codebook.tolist() != [list(NF4_TABLE)]:
        raise ConfigError(
            f"scheme: bitsandbytes computes with the table of nf4; got {storage.scheme!r}"
        )
    if K % block_size:
        raise ConfigError(
            f"K: expected a multiple of the block size {block_size} for bitsandbytes; got {K}"
        )
    absmax = storage["absmax"]
    if "absmax_scale" in storage.tensors:
        absmax = expand(absmax, storage["absmax_scale"])
    state = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": str(storage.dtype).removeprefix("torch."),
        "shape": [N, K],
    }
    return {
        "weight": storage["packed"].reshape(-1, 1),
        "weight.absmax": absmax.reshape(-1),
        "weight.quant_map": codebook[0],
        _STATE + "nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"
        ),
    }


def quantizer(storage: Storage) -> CodebookQuantizer:
    """The quantizer that a Storage of `read` belongs to."""
    if storage.scheme == NF4.name:
        return NF4(storage.options["block_size"], double_quant=False)
    return CodebookQuantizer(storage["codebook"], storage.options["block_size"])


def _state(tensors: Mapping[str, Tensor], name: str) -> tuple[dict, str]:
    key = next((k for k in tensors if k.startswith(_STATE)), None)
    if key is None:
        raise FileFormatError(
            f"{name}weight: expected {name}{_STATE}nf4 beside it; got no quant_state"
        )
    try:
        state = json.loads(bytes(tensors[key].tolist()))
        valid = (
            isinstance(state["blocksize"], int)
            and state["dtype"] in _DTYPES
            and len(state["shape"]) == 2
            and all(isinstance(size, int) and size > 0 for size in state["shape"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{name}{key}: expected JSON of a quant state; got {error!r}"
        ) from error
    if not valid:
        raise FileFormatError(
            f"{name}{key}: expected blocksize, dtype and a shape [N, K]; got {state}"
        )
    return state, key.removeprefix(_STATE)


def _nested(absmax: Tensor, tensors: Mapping[str, Tensor], state: dict, name: str) -> Tensor:
    """map[code] * nested_absmax[b // group] + offset in float32: multiply, then add."""
    group, offset = state["nested_blocksize"], state.get("nested_offset")
    table = _entry(tensors, "weight.nested_quant_map", name).float()
    scales = _entry(tensors, "weight.nested_absmax", name).float()
    if not isinstance(group, int) or group < 1 or not isinstance(offset, (int, float)):
        raise FileFormatError(
            f"{name}weight: expected nested_blocksize and nested_offset; got {state}"
        )
    if absmax.dtype != torch.uint8:
        raise FileFormatError(f"{name}weight.absmax: expected uint8 codes; got {absmax.dtype}")
    _check_size(f"{name}weight.nested_quant_map", table, 256)
    _check_size(f"{name}weight.nested_absmax", scales, -(-absmax.numel() // group))
    codes = absmax.reshape(-1)
    per_block = scales.reshape(-1).repeat_interleave(group)[: codes.numel()]
    offset = torch.tensor(offset, dtype=torch.float32, device=table.device)
    return table.reshape(-1)[codes.long()] * per_block + offset


def _entry(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise FileFormatError(f"{name}{key}: expected beside {name}weight; it is missing")
    return tensors[key]


def _check_size(name: str, tensor: Tensor, expected: int) -> None:
    if tensor.numel() != expected:
        raise FileFormatError(f"{name}: expected {expected} elements; got {tensor.numel()}")
