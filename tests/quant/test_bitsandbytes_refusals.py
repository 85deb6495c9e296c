"""A damaged layer of bitsandbytes is refused by the name of what is wrong with it, in one line."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from lowrank import quant
from lowrank.errors import FileFormatError, ShapeError
from lowrank.quant import bitsandbytes as ours

from .bnb_damage import damaged
from .bnb_layers import STATE, F, bnb, dequantized, edited, layer_tensors, same_weights

EXAMPLES = hypothesis.settings(
    max_examples=200, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
LAYERS = [
    (kind, nested, N, K) for kind in ("nf4", "fp4") for nested in (False, True)
    for N, K in ((8, 64), (6, 80), (3, 33))
]  # fmt: skip


SEEDS = st.integers(0, 2**31)  # drawn, so that hypothesis can repeat an example


def int8_layer(N, K):
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    return layer.to("cpu").state_dict()


def read_or_named(found):
    """The storage, or None where what is wrong is told by name in one line."""
    try:
        return ours.read(found, "a.b.")
    except (FileFormatError, ShapeError) as error:
        assert str(error).startswith("a.b.") and "\n" not in str(error) and len(str(error)) < 500


@EXAMPLES
@hypothesis.given(st.data())
def test_what_is_accepted_bitsandbytes_computes_to_the_same_weights(data):
    torch.manual_seed(data.draw(SEEDS))
    kind, nested, N, K = data.draw(st.sampled_from(LAYERS))
    tensors, _ = layer_tensors(torch.randn(N, K), kind, nested)
    found = data.draw(damaged(tensors))
    storage = read_or_named(found)
    if storage is None:
        return
    got = quant.quantizer_of(storage).dequantize(storage, storage.dtype)
    known = {key: t for key, t in found.items() if ours.is_key(key)}
    assert same_weights(got, dequantized(known))


@EXAMPLES
@hypothesis.given(st.data())
def test_so_it_is_with_int8(data):
    torch.manual_seed(data.draw(SEEDS))
    tensors = int8_layer(6, 40)
    found = data.draw(damaged(tensors))
    storage = read_or_named(found)
    if storage is None:
        return
    got = quant.quantizer_of(storage).dequantize(storage)
    assert same_weights(got, F.int8_vectorwise_dequant(found["weight"], found["SCB"].float()))
    assert int(found.get("weight_format", 0)) == 0


def test_each_refusal_says_what_is_wrong():
    tensors, _ = layer_tensors(torch.randn(32, 128))
    plain, _ = layer_tensors(torch.randn(32, 128), nested=False)
    key = STATE + "nf4"
    bad_map = tensors["weight.nested_quant_map"].roll(1)
    cases = {
        r"weight: expected one of .*nf4, .*fp4 beside it; got none": without(tensors, key),
        r"weight: expected one of .*; got \['weight.quant": tensors | {STATE + "fp4": tensors[key]},
        rf"{key}: expected a JSON object; got": tensors | {key: tensors[key][:-3]},
        rf"{key}: expected uint8; got int32 \[": tensors | {key: tensors[key].int()},
        "expected dtype to be one of float32, .*got 'int7'": edited(tensors, dtype="int7"),
        "expected shape to be .N, K. or .*; got .4096": edited(tensors, shape=[4096]),
        "expected blocksize to be .*32 to 4096; got 96": edited(tensors, blocksize=96),
        "expected blocksize to be .*; got none": edited(tensors, blocksize=None),
        "expected nested_blocksize to be 256; got 64": edited(tensors, nested_blocksize=64),
        "expected nested_offset to be a finite .*'x'": edited(tensors, nested_offset="x"),
        "expected nested_offset to be .*; got 1e[+]39": edited(tensors, nested_offset=1e39),
        "expected nested_dtype to be float32; got 'bf": edited(tensors, nested_dtype="bfloat16"),
        "expected quant_type to be nf4 or fp4": edited(tensors, quant_type="int4"),
        "expected quant_type 'nf4'; got 'fp4'": edited(tensors, quant_type="fp4"),
        "expected quant_type, blocksize, .*; got 'version'": edited(tensors, version=2),
        r"weight: expected 4096 bytes as .n, 1.*got uint8 .2048, 1": edited(
            tensors, shape=[64, 128]
        ),
        r"weight: expected .*got uint8 .1, 2048": tensors
        | {"weight": tensors["weight"].view(1, -1)},
        "weight: .*its bytes were converted": tensors | {"weight": tensors["weight"].bfloat16()},
        "weight: missing": without(tensors, "weight"),
        r"weight: expected uint8 or int8 or .*; got int32": tensors
        | {"weight": tensors["weight"].int()},
        r"weight\.absmax: missing": without(tensors, "weight.absmax"),
        r"weight\.absmax: expected shape \[64\]; got": edited_tensor(tensors, "weight.absmax", 1),
        r"weight\.absmax: expected uint8; got": tensors | {"weight.absmax": torch.ones(64)},
        r"weight\.absmax: expected float32 or": plain | {"weight.absmax": torch.ones(64).byte()},
        r"weight\.absmax: expected finite": plain | {"weight.absmax": torch.ones(64) / 0},
        r"nested_absmax: missing": without(tensors, "weight.nested_absmax"),
        r"nested_absmax: expected shape \[1\]": tensors | {"weight.nested_absmax": torch.ones(2)},
        r"nested_absmax: expected float32; got b": tensors
        | {"weight.nested_absmax": torch.ones(1, dtype=torch.bfloat16)},
        r"nested_absmax: expected none below 0": tensors | {"weight.nested_absmax": -torch.ones(1)},
        r"nested_absmax: expected none, as the": plain | {"weight.nested_absmax": torch.ones(1)},
        r"nested_quant_map: expected b.* dynamic map": tensors
        | {"weight.nested_quant_map": bad_map},
        r"quant_map: expected shape \[16\]": tensors | {"weight.quant_map": torch.ones(15)},
        r"quant_map: expected the table of nf4": tensors | {"weight.quant_map": torch.ones(16)},
        r"weight\.code: expected beside weight only": tensors | {"weight.code": torch.ones(1)},
        r"SCB: expected beside weight only": tensors | {"SCB": torch.ones(32)},
        r"weight: expected a dense tensor with values; got uint8 .* on meta": tensors
        | {"weight": tensors["weight"].to("meta")},
    }  # fmt: skip
    int8 = int8_layer(6, 40)
    cases |= {
        "SCB: missing": without(int8, "SCB"),
        r"SCB: expected shape \[6\]": edited_tensor(int8, "SCB", 1),
        "SCB: expected magnitudes": int8 | {"SCB": -int8["SCB"]},
        "SCB: expected finite": int8 | {"SCB": int8["SCB"] / 0},
        "SCB: expected float32 or": int8 | {"SCB": int8["SCB"].int()},
        r"weight: expected int8; got float32 .6, 40": int8 | {"weight": int8["weight"].float()},
        r"weight: expected .N, K.; got int8 .240": int8 | {"weight": int8["weight"].flatten()},
        "weight_format: expected 0, rows; got 2, col_turing": int8
        | {"weight_format": torch.tensor(2, dtype=torch.uint8)},
        "weight_format: expected 0, rows; got 9;": int8 | {"weight_format": torch.tensor(9)},
    }
    for match, found in cases.items():
        with pytest.raises(FileFormatError, match=rf"^a\.b\.(weight\.)?.*{match}"):
            ours.read(found, "a.b.")


def without(tensors, key):
    return {k: v for k, v in tensors.items() if k != key}


def edited_tensor(tensors, key, start):
    return tensors | {key: tensors[key][start:]}
