"""Layers of bitsandbytes with one thing about them changed, for hypothesis to choose from."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import torch
from torch import Tensor

from .bnb_layers import STATE, as_bytes, edited, fields

DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float32]
DTYPES += [torch.bfloat16, torch.float16, torch.float64]
JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["nf4", "fp4", "bfloat16", "float16", "float64", 32, 64, 128, 256]),
    st.lists(st.integers(-1, 130), max_size=3), st.just([10**5000]), st.just(10**400),
)  # fmt: skip
ODD_JSON = ["", "{", "[]", "null", "NaN", '"nf4"', "[" * 9000, "\udcff", "{}", "é"]


@st.composite
def damaged(draw, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` changed in one place; the change may be one that means nothing."""
    key = draw(st.sampled_from(sorted(tensors)))
    ways = [left_out, renamed, added, cast, resized, reshaped, flipped, overwritten, on_meta]
    if any(key.startswith(STATE) for key in tensors):
        ways += [field_changed, field_changed, json_replaced]
    return draw(st.sampled_from(ways))(draw, tensors, key)


def left_out(draw, tensors, key):
    return {k: v for k, v in tensors.items() if k != key}


def renamed(draw, tensors, key):
    others = ["weight.absmax", "weight.code", STATE + "nf4", STATE + "fp4", STATE + "int4"]
    other = draw(st.sampled_from([*others, "weight.nested_absmax", "SCB", "weight_format"]))
    return left_out(draw, tensors, key) | {other: tensors[key]}


def added(draw, tensors, key):
    return tensors | renamed(draw, tensors, key)


def cast(draw, tensors, key):
    return tensors | {key: tensors[key].to(draw(st.sampled_from(DTYPES)))}


def resized(draw, tensors, key):
    t = tensors[key]
    parts = [t.flatten()[:-1], t.flatten()[:0], torch.cat([t.flatten(), t.flatten()[:1]])]
    return tensors | {key: draw(st.sampled_from(parts)).clone()}


def reshaped(draw, tensors, key):
    t = tensors[key]
    return tensors | {key: draw(st.sampled_from([t.flatten(), t.reshape(1, -1), t.reshape(-1, 1)]))}


def flipped(draw, tensors, key):
    """One bit of it, which may go unnoticed; but bitsandbytes must then compute the same."""
    data = tensors[key].clone().contiguous()
    raw = data.reshape(-1).view(torch.uint8)
    raw[draw(st.integers(0, raw.numel() - 1))] ^= 1 << draw(st.integers(0, 7))
    return tensors | {key: data}


def overwritten(draw, tensors, key):
    floats = [float("nan"), float("inf"), -1.0, 0.0, 3.0]
    t = tensors[key].clone()
    values = floats if t.is_floating_point() else [0, 1, 2, 3]
    t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(st.sampled_from(values))
    return tensors | {key: t}


def on_meta(draw, tensors, key):
    return tensors | {key: tensors[key].to("meta")}


def field_changed(draw, tensors, key):
    name = draw(st.sampled_from([*fields(tensors), "nested_offset", "nested_dtype", "version"]))
    value = draw(JSON_VALUES)
    try:
        json.dumps(value)
    except ValueError:  # more digits than Python writes
        value = -1
    return edited(tensors, **{name: value})


def json_replaced(draw, tensors, key):
    text = draw(st.sampled_from(ODD_JSON))
    state = next(k for k in tensors if k.startswith(STATE))
    return tensors | {state: as_bytes(text.encode("utf-8", "surrogateescape").decode("latin1"))}
