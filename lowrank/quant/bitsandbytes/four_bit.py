"""nf4 and fp4 layers: every one is read as flat, and where blocks end with the rows, as rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DtypeError, FileFormatError
from lowrank.ops.adamw8bit import dynamic_map
from lowrank.quant.double_quant import expand
from lowrank.quant.flat import GROUP, QUANT_STORAGES, TABLES, Flat, absmax_of, table
from lowrank.quant.storage import Storage

from . import quant_state
from .entries import FLOATS, describe, entry

_NESTED = ("nested_absmax", "nested_quant_map")
KEYS = {"weight.absmax", "weight.quant_map", *(f"weight.{key}" for key in _NESTED)}
KEYS |= quant_state.KEYS.keys()


def is_layer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of the keys is there that only a 4-bit layer has."""
    return any(key in KEYS for key in tensors)


def read(tensors: Mapping[str, Tensor], name: str) -> Storage:
    """See `bitsandbytes.read`; its shape is as in the file."""
    storage = _read_flat(tensors, name)
    return storage if storage.shape[-1] % storage.options["block_size"] else _as_rows(storage)


def as_flat(storage: Storage) -> Storage:
    """A weight of 4-bit codes in rows as flat, if bitsandbytes has its table and its blocks."""
    N, K = storage.shape
    block_size, codebook = storage.options["block_size"], storage["codebook"].cpu()
    kind = next((kind for kind in TABLES if torch.equal(codebook, table(kind))), None)
    if kind is None:
        raise ConfigError(
            "scheme: expected the table of nf4 or fp4, which bitsandbytes computes with; got "
            f"{storage.scheme!r}; quantize the original weights with one of these"
        )
    if K % block_size:
        raise ConfigError(
            f"K: expected a multiple of the block size {block_size}, as bitsandbytes' blocks run "
            f"on over the ends of rows; got {K}; quantize the original weights with 'flat'"
        )
    absmax = storage["absmax"]
    if "absmax_scale" in storage.tensors:
        absmax = expand(absmax, storage["absmax_scale"])
    tensors = {
        "packed": storage["packed"].flatten(),
        "absmax": absmax.flatten(),
        "codebook": storage["codebook"],
    }
    options = Flat(kind, block_size, double_quant=False).options
    return Storage(Flat.name, (N, K), storage.dtype, tensors, options)


def write(storage: Storage) -> dict[str, Tensor]:
    """The tensors of a flat Storage, in the order in which bitsandbytes has them."""
    options, dtype = storage.options, str(storage.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise DtypeError(
            f"storage: expected the dtype to be one of {', '.join(FLOATS)} for bitsandbytes; got "
            f"{dtype}; dataclasses.replace(storage, dtype=torch.float32) rounds the weights to it"
        )
    packed, quant_storage = storage["packed"], getattr(torch, options["quant_storage"])
    if packed.numel() % quant_storage.itemsize:
        raise ConfigError(
            f"quant_storage: expected a dtype that {packed.numel()} bytes fill, uint8 does; got "
            f"{options['quant_storage']}"
        )
    tensors = {
        "weight": packed.view(quant_storage).view(-1, 1),
        "weight.absmax": storage["absmax"],
        "weight.quant_map": storage["codebook"][0],
    }
    fields = {
        "quant_type": options["quant_type"],
        "blocksize": options["block_size"],
        "dtype": dtype,
        "shape": list(storage.shape),
    }
    if options["double_quant"]:
        tensors |= {f"weight.{key}": storage[key] for key in _NESTED}
        fields |= {
            "nested_blocksize": GROUP,
            "nested_dtype": "float32",
            "nested_offset": storage["nested_offset"].item(),
        }
    return tensors | quant_state.write(fields)


def _read_flat(tensors: Mapping[str, Tensor], name: str) -> Storage:
    state = quant_state.read(tensors, name)
    size = math.prod(state["shape"])
    blocks = -(-size // state["blocksize"])
    weight = entry(tensors, "weight", name, [getattr(torch, dtype) for dtype in QUANT_STORAGES])
    packed = _bytes(weight, f"{name}weight", -(-size // 2))
    _check_table(tensors, name, state["quant_type"])
    held = {"packed": packed, "codebook": table(state["quant_type"], weight.device)}
    is_nested = "nested_offset" in state
    if is_nested:
        held["absmax"] = entry(tensors, "weight.absmax", name, (torch.uint8,), blocks)
        held |= _nested(tensors, name, blocks, state["nested_offset"])
    else:
        scales = entry(tensors, "weight.absmax", name, tuple(FLOATS.values()), blocks)
        held["absmax"] = scales.float()  # as bitsandbytes does
        for key in _NESTED:
            if f"weight.{key}" in tensors:
                raise FileFormatError(
                    f"{name}weight.{key}: expected none, as the quant_state has no nested_offset"
                )
    options = {
        "quant_type": state["quant_type"],
        "quant_storage": str(weight.dtype).removeprefix("torch."),
        "block_size": state["blocksize"],
        "double_quant": is_nested,
    }
    return Storage(Flat.name, tuple(state["shape"]), FLOATS[state["dtype"]], held, options)


def _as_rows(storage: Storage) -> Storage:
    """The same codes, and the float32 scales they are computed with, cut into rows."""
    K, block_size = storage.shape[-1], storage.options["block_size"]
    return Storage(
        storage.options["quant_type"],
        storage.shape,
        storage.dtype,
        {
            "packed": storage["packed"].view(-1, K // 2),
            "absmax": absmax_of(storage).view(-1, K // block_size),
            "codebook": storage["codebook"],
        },
        {"block_size": block_size, "double_quant": False},
    )


def _bytes(weight: Tensor, where: str, size: int) -> Tensor:
    n_bytes = weight.numel() * weight.element_size()
    is_row = weight.shape[:1] == (1,) and weight.numel() > 1  # to bitsandbytes a transposed weight
    if n_bytes != size or is_row:
        hint = "; its bytes were converted" if weight.numel() == size != n_bytes else ""
        raise FileFormatError(
            f"{where}: expected {size} bytes as [n, 1] in any dtype; got {describe(weight)}{hint}"
        )
    return weight.contiguous().flatten().view(torch.uint8)


def _nested(
    tensors: Mapping[str, Tensor], name: str, blocks: int, offset: float
) -> dict[str, Tensor]:
    """What nested scales have beside absmax; bitsandbytes takes the tensors for float32."""
    float32 = (torch.float32,)
    scales = entry(tensors, "weight.nested_absmax", name, float32, -(-blocks // GROUP))
    if bool((scales < 0).any()):
        raise FileFormatError(f"{name}weight.nested_absmax: expected none below 0; got some")
    values = entry(tensors, "weight.nested_quant_map", name, float32, 256)
    # another version's map may be an ulp off, and is used as it is
    if not torch.allclose(values.cpu(), dynamic_map(signed=True), rtol=1e-5, atol=0):
        raise FileFormatError(
            f"{name}weight.nested_quant_map: expected bitsandbytes' signed dynamic map; got others"
        )
    return {
        "nested_absmax": scales,
        "nested_quant_map": values,
        "nested_offset": torch.full((1,), float(offset), device=scales.device, dtype=torch.float32),
    }


def _check_table(tensors: Mapping[str, Tensor], name: str, kind: str) -> None:
    """bitsandbytes computes with the table of `kind`; a copy of it is all that the file holds."""
    values = entry(tensors, "weight.quant_map", name, tuple(FLOATS.values()), 16)
    if not torch.equal(values.cpu(), table(kind)[0].to(values.dtype)):
        raise FileFormatError(f"{name}weight.quant_map: expected the table of {kind}; got another")
