"""What a report measures, against float64 and transformers."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

import lowrank
from lowrank import quant
from lowrank.report import report
from tests.models.helpers import llama

SCHEMES = {"nf4": "nf4", "narrow": "nf4:block_size=32", "hqq": quant.get("hqq"), "int8": "int8"}


class Network(nn.Module):
    """Three linears of ragged shapes, one of them called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(63, 123)
        self.twice = nn.Linear(123, 123, bias=False)
        self.idle = nn.Linear(5, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.twice(torch.tanh(self.twice(self.drop(torch.relu(self.first(x))))))


def relative(difference, whole) -> float:
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(whole)).item()


def test_errors_equal_float64():
    model = Network()
    x = torch.randn(4, 7, 63)
    compared = report(model, SCHEMES, inputs=x, rows=1000, speed=False)
    with torch.no_grad():
        inner = torch.relu(model.first(x)).flatten(0, 1)
        outer = torch.tanh(model.twice(inner))
    real = {"first": x.flatten(0, 1), "twice": torch.cat((inner, outer))}
    for row in compared.rows:
        scheme = SCHEMES[row.scheme]
        if isinstance(scheme, str):
            name, _, _ = scheme.partition(":")
            scheme = quant.get(name, **({"block_size": 32} if ":" in scheme else {}))
        squares = differences = 0.0
        outputs = []
        for name in ("first", "twice", "idle"):
            w = model.get_submodule(name).weight.detach()
            storage = scheme.quantize(w)
            difference = (scheme.dequantize(storage) - w).double()
            layer = row.layers[name]
            assert layer.error == pytest.approx(relative(difference, w.double()), rel=1e-9)
            assert layer.nbytes == storage.nbytes
            squares += w.double().square().sum().item()
            differences += difference.square().sum().item()
            if name in real:
                X = real[name].double()
                outputs.append(relative(X @ difference.T, X @ w.double().T))
                assert layer.output_error == pytest.approx(outputs[-1], rel=1e-5)
            else:
                assert layer.output_error is None
        assert row.error == pytest.approx(math.sqrt(differences / squares), rel=1e-9)
        assert row.output_error == pytest.approx(
            math.sqrt(sum(e * e for e in outputs) / 2), rel=1e-5
        )
        assert row.bits == 8 * row.nbytes / sum(p.numel() for p in model.parameters() if p.ndim > 1)
        worst = max(row.layers, key=lambda name: row.layers[name].error)
        assert row.worst() == [(worst, row.layers[worst].error)]
        assert row.fused == (row.scheme in ("nf4", "narrow"))
    assert compared.rows[1].options == {"block_size": 32, "double_quant": True}
    assert [row.scheme for row in compared.rows] == list(SCHEMES)
    errors = [row.error for row in compared.measured]
    assert errors == sorted(errors)


def test_activations_are_some_rows_of_every_batch():
    model = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight.detach()
    batches = [torch.randn(2, 10, 8), torch.randn(30, 8)]
    quantizer = quant.get("nf2")
    difference = quantizer.dequantize(quantizer.quantize(weight)) - weight
    (row,) = report(model, {"q": quantizer}, inputs=batches, rows=10, speed=False).rows
    x = torch.cat((batches[0].flatten(0, 1)[::4], batches[1][::6]))
    expected = relative(x @ difference.T, x @ weight.T)
    assert row.layers["0"].output_error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("call", [tuple, dict])
def test_batches_are_arguments_or_named_ones(call):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(6, 4)

        def forward(self, x, y):
            return self.a(input=x) + self.b(y)

    x, y = torch.randn(3, 4), torch.randn(3, 6)
    batch = (x, y) if call is tuple else {"y": y, "x": x}
    (row,) = report(Sum(), ["int4"], inputs=batch, speed=False).rows
    assert all(layer.output_error > 0 for layer in row.layers.values())


def test_perplexity_equals_transformers(tmp_path):
    oracle = llama(max_position_embeddings=64)
    oracle.save_pretrained(tmp_path)
    model = lowrank.load_model(tmp_path)
    ids = torch.randint(0, 97, (150,))
    quantizer = quant.get("nf4", block_size=32)
    compared = report(
        model, {"nf4": quantizer}, text=ids.tolist(), window=64, stride=24, tokens=140, speed=False
    )

    def expected() -> float:
        """As transformers' guide to perplexity counts: labels of -100 are context alone."""
        total, counted, end = 0.0, 0, 0
        for start in range(0, 140, 24):
            stop = min(start + 64, 140)
            labels = ids[None, start:stop].clone()
            labels[:, : -(stop - end)] = -100
            n = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                total += oracle(ids[None, start:stop], labels=labels).loss.item() * n
            counted, end = counted + n, stop
            if stop == 140:
                break
        assert counted == 139
        return total / counted

    assert compared.about["predicted"] == 139 and compared.about["tokens"] == 140
    assert compared.loss == pytest.approx(expected(), rel=1e-5)
    for name, module in oracle.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            storage = quantizer.quantize(module.weight.detach())
            module.weight.data = quantizer.dequantize(storage)
    (row,) = compared.rows
    assert row.loss == pytest.approx(expected(), rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(row.loss))


def test_a_model_of_transformers_is_measured_as_ours(tmp_path):
    oracle = llama()
    oracle.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (130,))
    ours, theirs = (
        report(m, ["nf4", "int8"], text=ids, window=32, speed=False)
        for m in (lowrank.load_model(tmp_path), oracle)
    )
    assert ours.about["predicted"] == theirs.about["predicted"] == 4 * 31 + 1
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.error == b.error and a.output_error == pytest.approx(b.output_error, rel=1e-4)


def test_gpt2s_transposed_layers():
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=97, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 97, (60,))
    (row,) = report(model, ["nf4"], text=ids, speed=False).rows
    quantizer, total = quant.get("nf4"), 0.0
    for name, layer in row.layers.items():
        module = model.get_submodule(name)
        w = module.weight.detach().T.contiguous()
        q = quantizer.dequantize(quantizer.quantize(w))
        assert layer.error == pytest.approx(relative((q - w).double(), w.double()), rel=1e-9)
        module.weight.data = q.T
    assert len(row.layers) == 4
    with torch.no_grad():
        for part in ids.split(32):
            out = model(part[None]).logits[0]
            total += nn.functional.cross_entropy(out[:-1], part[1:], reduction="sum").item()
    assert row.loss == pytest.approx(total / 58, rel=1e-5)


def test_bfloat16_models():
    model = Network().to(torch.bfloat16)
    compared = report(model, ["nf4", "int8"], inputs=torch.randn(3, 63, dtype=torch.bfloat16))
    for row in compared.rows:
        assert 0 < row.error < 0.2 and 0 < row.output_error < 0.2 and row.failure is None
    assert compared.dense_bytes == 2 * compared.about["weights"]


def test_speed_is_measured_in_bytes_of_the_dense_weights():
    (row,) = report(Network(), ["nf4"]).rows
    assert row.speed.quantize > 0 and row.speed.dequantize > 0
    assert row.speed.linear_1 > 0 and row.speed.linear_many > 0
    (row,) = report(Network(), ["nf4"], speed=False).rows
    assert row.speed is None


def test_tensors_without_a_model():
    tensors = {
        "a.weight": torch.randn(32, 40),
        "norm.weight": torch.randn(40),
        "a.bias": torch.randn(32),
        "head.weight": torch.randn(8, 40),
        "table": torch.randn(8, 40),
    }
    (row,) = report(tensors, ["nf4"], skip=["head"]).rows
    w, quantizer = tensors["a.weight"], quant.get("nf4")
    assert list(row.layers) == ["a"]
    difference = quantizer.dequantize(quantizer.quantize(w)) - w
    assert row.error == pytest.approx(relative(difference.double(), w.double()), rel=1e-9)
    assert row.output_error is None and row.loss is None


def test_zero_weights_have_no_error():
    model = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    compared = report(model, ["nf4", "hqq"], inputs=torch.randn(2, 32), speed=False)
    assert all(row.error == 0 and row.output_error is None for row in compared.rows)


def test_the_same_seed_repeats_a_random_scheme():
    class Noisy:
        def quantize(self, weight):
            noise = torch.randn(weight.shape) * 0.01
            return quant.Storage("noisy", tuple(weight.shape), weight.dtype, {"w": weight + noise})

        def dequantize(self, storage, dtype=torch.float32):
            return storage["w"].to(dtype)

    model = Network()
    a, b, c = (report(model, {"n": Noisy()}, speed=False, seed=s).rows[0].error for s in (1, 1, 2))
    assert a == b != c
