"""What a report refuses, in one line and before it begins; what fails by itself and is a row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowrank
from lowrank import quant
from lowrank.errors import ConfigError, DataError, ShapeError, TargetError, WeightError
from lowrank.report import report
from lowrank.report.schemes import parse, resolve
from lowrank.report.weights import WeightFiles


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 8))


class Words:
    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return [len(word) for word in text.split()]


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 32), nn.Linear(32, 20)

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize(
    ("schemes", "match"),
    [
        ("nf4", "schemes: expected a sequence of names; got the string 'nf4'"),
        ([], "schemes: expected at least one; got none"),
        ([3], r"schemes: expected names; got 3; pass \{label: quantizer\}"),
        ([quant.get("nf4")], "schemes: expected names; got <.*NF4"),
        (["nf4", "nf4"], "schemes: expected each once; got 'nf4' twice"),
        ({"mine": 3}, "schemes: mine: expected a name or an object with quantize.*; got 3"),
        ({"mine": type(quant.get("nf4"))}, "schemes: mine: expected a name or an object"),
        (["nf5"], "quantizer: expected one of af4, .*; got 'nf5'"),
        (["codebook"], "quantizer 'codebook': .*codebook"),
        (["nf4:"], "scheme 'nf4:': expected name:option=value,.*; got ''"),
        (["nf4:block_size"], "got 'block_size'"),
        (["nf4:block_size="], "got 'block_size='"),
        (["nf4:block_size=32,block_size=64"], "each option once; got 'block_size=64'"),
        (["nf4:size=32"], "quantizer 'nf4': expected its own options.*; got 'size'"),
        (["nf4:block_size=33"], "block_size: expected a power of two from 32 to 4096; got 33"),
        (["nf4:double_quant=1"], "double_quant: expected True or False; got 1"),
    ],
)
def test_schemes(schemes, match):
    with pytest.raises(ConfigError, match=match) as error:
        report(linear(), schemes)
    assert "\n" not in str(error.value)


def test_schemes_as_they_are_written():
    assert parse("nf4:block_size=128,double_quant=false").options == {
        "block_size": 128,
        "double_quant": False,
    }
    assert parse("fitted:per=row,double_quant=True").options["per"] == "row"
    every = resolve(None)
    assert set(quant.names()) >= set(every) >= {"nf4", "fp4", "int4", "hqq", "int8"}
    assert "codebook" not in every and "none" not in every


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rows": 0}, "rows: expected at least 1; got 0"),
        ({"tokens": 1}, "tokens: expected at least 2; got 1"),
        ({"window": 1}, "window: expected at least 2; got 1"),
        ({"window": 2.5}, "window: expected at least 2; got 2.5"),
        ({"rows": True}, "rows: expected at least 1; got True"),
        ({"window": "8"}, "window: expected at least 2; got '8'"),
        ({"stride": True}, "stride: expected from 1 to the window of 512; got True"),
        ({"seed": "1"}, "seed: expected a whole number of 64 bits; got '1'"),
        ({"seed": 1 << 64}, "seed: expected a whole number of 64 bits; got 18446744073709551616"),
        ({"stride": 0}, "stride: expected from 1 to the window of 512; got 0"),
        ({"window": 8, "stride": 9}, "stride: expected from 1 to the window of 8; got 9"),
        ({"skip": "0"}, "skip: expected a sequence of names; got the string '0'"),
        ({"text": "two words"}, "tokenizer: expected one beside a text"),
        ({"text": "two words", "tokenizer": 3}, "tokenizer: expected one with encode.*; got int"),
    ],
)
def test_options(options, match):
    with pytest.raises(ConfigError, match=match):
        report(linear(), ["nf4"], **options)


@pytest.mark.parametrize("text", ["", "word", [], [1], torch.tensor(3), torch.rand(9), [[1, 2]]])
def test_texts_of_which_nothing_can_be_predicted(text):
    with pytest.raises(DataError, match="text: expected at least two tokens, one to predict; got"):
        report(Language(), ["nf4"], text=text, tokenizer=Words())


@pytest.mark.parametrize("text", [["two", "words"], {"a": 1}, [[1], [2, 3]]])
def test_texts_that_are_none(text):
    with pytest.raises(DataError, match="text: expected a string or token ids; got a "):
        report(Language(), ["nf4"], text=text)


@pytest.mark.parametrize(
    ("ids", "match"),
    [([1, 2, 20], "text: expected token ids from 0 to 19; got 1 to 20"), ([1, -2], "got -2 to 1")],
)
def test_ids_outside_the_vocabulary(ids, match):
    model = Language()
    model.config = type("Config", (), {"vocab_size": 20})()
    with pytest.raises(DataError, match=match):
        report(model, ["nf4"], text=ids)
    assert report(model, ["nf4"], text=[0, 19], speed=False).about["predicted"] == 1


def test_a_text_shorter_than_a_window_is_one_window():
    model = Language()
    compared = report(model, ["nf4"], text="a bbb cc dddd", tokenizer=Words(), speed=False)
    ids = torch.tensor([1, 3, 2, 4])
    expected = nn.functional.cross_entropy(model(ids[:-1]), ids[1:])
    assert compared.about["predicted"] == 3
    assert compared.loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_window_beyond_the_models_positions():
    model = Language()
    model.config = type("Config", (), {"max_position_embeddings": 16})()
    with pytest.raises(ConfigError, match="window: expected at most the model's 16 positions"):
        report(model, ["nf4"], text=[1, 2, 3], window=17)
    compared = report(model, ["nf4"], text=[1, 2, 3] * 9, speed=False)
    assert compared.about["options"]["window"] == 16 and compared.about["predicted"] == 25


def test_a_model_that_returns_no_logits():
    with pytest.raises(ShapeError, match=r"must return logits \[B, S, V\].*; got \[1, 3, 32\]"):
        report(
            nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 32), Halves()), text=[1, 2, 3, 4, 5, 6]
        )


class Halves(nn.Module):
    def forward(self, x):
        return x[:, : x.shape[1] // 2]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1)), "the model has no dense linear layer outside skip"),
        (nn.Sequential(nn.Embedding(9, 4)), "the model has no dense linear layer outside skip"),
        ({"lm_head.weight": torch.zeros(4, 4)}, "no matrices named .*; there are lm_head.weight"),
        ({}, "there are no tensors"),
    ],
)
def test_models_without_linears(model, match):
    with pytest.raises(TargetError, match=match):
        report(model, ["nf4"])
    with pytest.raises(TargetError, match="skip: 'nowhere'"):
        report(linear(), ["nf4"], skip=["nowhere"])


def test_a_model_that_is_quantized_already():
    with pytest.raises(TargetError, match="outside skip: it is quantized already, nf4; compare on"):
        report(lowrank.quantize(linear(), "nf4"), ["int8"])


@pytest.mark.parametrize("model", [None, "model.safetensors", torch.randn(4, 4)])
def test_what_is_no_model(model):
    with pytest.raises(ConfigError, match="model: expected an nn.Module or a mapping of tensors"):
        report(model, ["nf4"])


def test_a_merged_adapter():
    model = lowrank.inject(linear(), lowrank.LoRAConfig(r=2, target_modules=["0"]))
    lowrank.merge(model)
    with pytest.raises(ConfigError, match="0: expected an unmerged layer; an adapter is"):
        report(model, ["nf4"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value):
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 300))
    model[1].weight.data[299, 3] = value
    with pytest.raises(WeightError, match=r"1.weight: expected finite values; got NaN or inf"):
        report(model, ["nf4"])


def test_weights_that_are_not_there():
    with torch.device("meta"):
        model = linear()
    with pytest.raises(WeightError, match=r"0.weight: expected values; got a tensor on meta"):
        report(model, ["nf4"])
    with pytest.raises(WeightError, match=r"a.weight: expected floats .*; got torch.int8 \[2, 2\]"):
        report({"a.weight": torch.zeros(2, 2, dtype=torch.int8)}, ["nf4"])


@pytest.mark.parametrize("inputs", [{"text": [1, 2, 3]}, {"inputs": torch.zeros(1, 2)}])
def test_tensors_alone_cannot_be_run(inputs):
    with pytest.raises(ConfigError, match="text, inputs: expected a model to run them through"):
        report({"a.weight": torch.zeros(2, 2)}, ["nf4"], **inputs)


def test_no_batches():
    with pytest.raises(DataError, match="inputs: expected a batch, or a list of batches; got an"):
        report(linear(), ["nf4"], inputs=[])


class Odd:
    """A scheme with one thing wrong."""

    def __init__(self, what: str) -> None:
        self.what = what

    def quantize(self, weight):
        if self.what == "raises":
            raise ZeroDivisionError("over\n  two lines")
        if self.what == "silent":
            raise NotImplementedError
        return quant.Storage("odd", tuple(weight.shape), weight.dtype, {"w": weight})

    def dequantize(self, storage, dtype=torch.float32):
        w = storage["w"].to(dtype)
        return {"shape": w.T, "nan": w * math.nan}.get(self.what, w)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raises", "0: over two lines"),
        ("silent", "0: NotImplementedError"),
        ("shape", r"0: expected weights of [8, 32] back; got [32, 8]"),
        ("nan", "0: expected finite weights back; got NaN or inf"),
    ],
)
def test_a_scheme_that_fails_is_a_row_and_the_others_go_on(what, reason):
    schemes = {"odd": Odd(what), "nf4": "nf4"}
    compared = report(linear(), schemes, speed=False)
    odd, nf4 = compared.rows
    assert odd.failure == reason and nf4.failure is None and nf4.error > 0
    assert f"`odd` failed: {reason}" in str(compared)
    assert compared.to_dict()["schemes"][0] == {"scheme": "odd", "options": {}, "failure": reason}


def test_magnitudes_beyond_a_scheme_are_its_failure():
    model = linear()
    model[0].weight.data[3, 5] = 70000
    int8, nf4 = report(model, ["int8", "nf4"], speed=False).rows
    assert "65520" in int8.failure and "row 3" in int8.failure and nf4.failure is None


def test_files_of_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="a.safetensors"):
        WeightFiles(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="expected model.safetensors or"):
        WeightFiles(tmp_path)
