"""The model is afterwards as it was: values, modules, modes, hooks and random numbers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowrank
from lowrank import quant
from lowrank.io.shards import SINGLE, Shards
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.report import report
from tests.models.helpers import TINY


@pytest.fixture
def model() -> Decoder:
    model = Decoder(DecoderConfig(**{**TINY, "head_dim": 16}))
    lowrank.inject(model, lowrank.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.model.layers[1].eval()  # a mixture of modes
    return model


class Stopped(BaseException):
    """Like KeyboardInterrupt: no scheme's failure."""


class Fails:
    """NF4, until something happens."""

    def __init__(self, when: str, error: BaseException) -> None:
        self.inner, self.when, self.error, self.calls = quant.get("nf4"), when, error, 0

    def _maybe(self, what: str) -> None:
        self.calls += what == self.when
        if self.calls == 5:
            raise self.error

    def quantize(self, weight):
        self._maybe("quantize")
        storage = self.inner.quantize(weight)
        weight.fill_(7)  # what no scheme should do
        return storage

    def dequantize(self, storage, dtype=torch.float32):
        self._maybe("dequantize")
        return self.inner.dequantize(storage, dtype)

    def linear(self, x, storage, bias=None):
        self._maybe("linear")
        return self.inner.linear(x, storage, bias)


def state(model: nn.Module) -> dict:
    return {
        "modules": {name: id(m) for name, m in model.named_modules()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "order": [name for name, _ in model.named_modules()],
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
    }


@pytest.fixture
def hooks(monkeypatch) -> list:
    """The handle of every hook that is set."""
    handles, register = [], nn.Module.register_forward_pre_hook

    def watched(*args, **options):
        handles.append(register(*args, **options))
        return handles[-1]

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", watched)
    return handles


@pytest.mark.parametrize("when", [None, "quantize", "dequantize", "linear"])
@pytest.mark.parametrize("error", [Stopped(), ValueError("no more")], ids=["stop", "error"])
def test_nothing_has_changed(model, hooks, when, error):
    ids = torch.randint(0, 97, (40,))
    before, values = state(model), copy.deepcopy(model.state_dict())
    random, logits = torch.get_rng_state(), model(ids[None])
    torch.set_rng_state(random)
    schemes = {"fails": Fails(when, error), "int8": quant.get("int8")}

    def compare():
        return report(model, schemes, text=ids, window=16, speed=when is None)

    if when and isinstance(error, Stopped):
        with pytest.raises(Stopped):
            compare()
    else:
        first, second = compare().rows
        assert second.loss > 0 and second.failure is None
        assert (first.failure is None) == (when is None)
        assert when is None or "no more" in first.failure
    assert state(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(ids[None]), logits)
    assert all(p.grad is None for p in model.parameters())
    assert len(hooks) == 14 and not any(h.id in h.hooks_dict_ref() for h in hooks)


def test_a_model_that_fails_is_given_back(model, hooks):
    ids, before = torch.randint(0, 97, (40,)), state(model)

    def fail(*_):
        raise RuntimeError("out of order")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        report(model, ["nf4"], text=ids, speed=False)
    handle.remove()
    assert state(model) == before
    assert hooks and not any(h.id in h.hooks_dict_ref() for h in hooks)


def test_adapted_layers_are_quantized_under_their_adapters(model):
    ids = torch.randint(0, 97, (64,))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    (row,) = report(model, ["nf4"], text=ids, window=32, speed=False).rows
    assert "model.layers.0.self_attn.q_proj" in row.layers and len(row.layers) == 14
    quantized = lowrank.quantize(copy.deepcopy(model), "nf4").eval()
    with torch.no_grad():
        logits = [quantized(part[None])[0] for part in ids.split(32)]
    total = sum(
        nn.functional.cross_entropy(out[:-1], part[1:], reduction="sum").item()
        for out, part in zip(logits, ids.split(32), strict=True)
    )
    assert row.loss == pytest.approx(total / 62, rel=1e-6)


class Streamed(Mapping):
    """Weights that are made when asked for, and how many of them live at once."""

    def __init__(self, count: int) -> None:
        self.names = [f"layer{i}.weight" for i in range(count)]
        self.made: list[weakref.ref] = []
        self.most = 0

    def __getitem__(self, name):
        array = np.ones((40, 70), dtype=np.float32)
        array[0] = self.names.index(name)
        self.made.append(weakref.ref(array))
        self.most = max(self.most, sum(ref() is not None for ref in self.made))
        return torch.from_numpy(array)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def test_weights_are_read_one_at_a_time():
    weights = Streamed(9)
    first, second = report(weights, ["nf4", "int8"], speed=False).rows
    assert len(first.layers) == len(second.layers) == 9
    assert weights.most <= 2  # the last, and the one that takes its place


def test_of_files_only_the_matrices_are_read(tmp_path, monkeypatch):
    save_file({"a.weight": torch.randn(8, 64), "norm.weight": torch.ones(64)}, tmp_path / SINGLE)
    taken, read = set(), Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name: taken.add(name) or read(self, name))
    compared = report(lowrank.open_weights(tmp_path), ["nf4"], speed=False)
    assert set(compared.rows[0].layers) == {"a"} and taken == {"a.weight"}


def test_progress_is_for_terminals_and_counts_all(model, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, items, **options):
            self.options, self.count, self.closed = options, 0, False
            bars.append(self)

        def update(self):
            self.count += 1

        def close(self):
            self.closed = True

    monkeypatch.setattr("tqdm.tqdm", Bar)
    report(model, ["nf4", "int8"], text=torch.randint(0, 97, (40,)), window=16, speed=False)
    (bar,) = bars
    assert bar.options["disable"] is None and bar.options["delay"] == 2
    assert bar.closed and bar.count == bar.options["total"] == 2 * (14 + 3) + 3
