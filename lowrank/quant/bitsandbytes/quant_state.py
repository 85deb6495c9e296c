"""The JSON that describes a 4-bit layer, as the bytes of a uint8 tensor."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import FileFormatError
from lowrank.ops import BLOCK_SIZES
from lowrank.quant.flat import GROUP, TABLES

from .entries import FLOATS, entry

KEYS = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in TABLES}
_LARGEST = torch.finfo(torch.float32).max


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 63  # not a bool


_FIELDS = {
    "quant_type": (lambda v: v in TABLES, "nf4 or fp4, as in its key"),
    "blocksize": (lambda v: _is_size(v) and v in BLOCK_SIZES, "a power of two from 32 to 4096"),
    "dtype": (lambda v: v in FLOATS, "one of " + ", ".join(FLOATS)),
    "shape": (lambda v: len(v) in (2, 3) and all(map(_is_size, v)), "[N, K] or [E, N, K]"),
}
_NESTED_FIELDS = {
    "nested_blocksize": (lambda v: _is_size(v) and v == GROUP, str(GROUP)),
    "nested_dtype": (lambda v: v == "float32", "float32"),
    "nested_offset": (
        lambda v: type(v) in (int, float) and abs(v) <= _LARGEST,
        "a finite float32",
    ),
}


def read(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The checked fields, those of nested scales if there are any. Raises FileFormatError."""
    keys = [key for key in tensors if key in KEYS]
    if len(keys) != 1:
        raise FileFormatError(
            f"{name}weight: expected one of {', '.join(KEYS)} beside it; got {keys or 'none'}"
        )
    key = keys[0]
    raw = bytes(entry(tensors, key, name, (torch.uint8,)).flatten().tolist())
    try:
        state = json.loads(raw)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name}{key}: expected a JSON object; got {error}") from error
    nested = any(field.startswith("nested_") for field in state)
    fields = _FIELDS | _NESTED_FIELDS if nested else _FIELDS
    for field in {**state, **fields}:
        if field not in fields:
            raise FileFormatError(f"{name}{key}: expected {', '.join(fields)}; got {field[:40]!r}")
        _check(state, field, *fields[field], f"{name}{key}")
    if state["quant_type"] != KEYS[key]:
        raise FileFormatError(
            f"{name}{key}: expected quant_type {KEYS[key]!r}; got {state['quant_type']!r}"
        )
    return state


def write(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The key and its tensor, byte for byte as bitsandbytes writes them."""
    text = json.dumps(dict(fields)).encode()
    key = next(key for key, kind in KEYS.items() if kind == fields["quant_type"])
    return {key: torch.tensor(list(text), dtype=torch.uint8, device="cpu")}


def _check(state: dict, field: str, valid, expected: str, where: str) -> None:
    try:
        ok = field in state and valid(state[field])
    except TypeError:  # no len, no hash
        ok = False
    if not ok:
        got = reprlib.repr(state[field]) if field in state else "none"
        raise FileFormatError(f"{where}: expected {field} to be {expected}; got {got}")
