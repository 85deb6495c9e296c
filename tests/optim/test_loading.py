"""States that were saved: ours, through files and elsewhere; torch.optim's; bitsandbytes'."""

import copy
import json
import logging

import pytest
import torch

from lowrank.errors import ConfigError, DtypeError, ShapeError
from lowrank.io.safetensors import load_safetensors, save_safetensors
from lowrank.optim import AdamW, AdamW8bit, Lion, Lion8bit
from lowrank.train.state import join, split
from tests.optim.steps import KINDS, copied, gradients, parameters, same, states, stepped

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

ALIGNED = [(20, 512), (3, 256, 2, 1), (5000,), (1, 4099), (7, 7)]  # the last is small
CROSSING = [(90, 100), (17, 16, 15, 3), (1025, 4)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def through_files(state_dict, folder):
    """A state dict as JSON and safetensors."""
    tensors = {}
    text = json.dumps(split(state_dict, "optim", tensors))
    save_safetensors(folder / "optim.safetensors", tensors)
    return join(json.loads(text), load_safetensors(folder / "optim.safetensors"))


def taken(optimizer, count):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(count):
        stepped(optimizer, gradients(params))
    return optimizer


def decoded(state, name):
    """A moment of ours in float32, by bitsandbytes' table."""
    table = bitsandbytes.functional.create_dynamic_map(signed=name == "m")
    codes, scale = state[name], state[f"{name}_scale"]
    rows = codes.reshape(scale.shape[0], -1)
    return (table[rows.long()] * scale.repeat_interleave(256, 1)[:, : rows.shape[1]]).view_as(codes)


def theirs_decoded(state, i):
    quantized = bitsandbytes.functional.QuantState(
        state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256, dtype=torch.float32
    )
    return bitsandbytes.functional.dequantize_blockwise(state[f"state{i}"], quantized)


def test_a_loaded_optimizer_goes_on_to_the_bit(kind, tmp_path):
    params = parameters()
    optimizer = taken(kind(params, lr=1e-2, weight_decay=0.1), 3)
    saved = optimizer.state_dict()
    for again in (saved, copy.deepcopy(saved), through_files(saved, tmp_path)):
        ours, twin = copied(params), copied(params)
        loaded, other = kind(ours, lr=1.0), kind(twin)
        loaded.load_state_dict(again)
        other.load_state_dict(loaded.state_dict())
        assert same(states(loaded), states(optimizer))
        assert loaded.param_groups[0]["lr"] == 1e-2
        for _ in range(3):
            grads = gradients(ours)
            stepped(loaded, grads)
            stepped(other, grads)
        assert all(map(torch.equal, ours, twin)) and same(states(loaded), states(other))
    assert same(states(optimizer), list(saved["state"].values()))  # nothing was shared


def test_another_dtype_has_the_same_states(kind):
    params = parameters()
    optimizer = taken(kind(params), 3)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = kind(copied(params, dtype))
        loaded.load_state_dict(optimizer.state_dict())
        assert same(states(loaded), states(optimizer))
        taken(loaded, 1)


@pytest.mark.gpu
def test_another_device(kind):
    params = parameters()
    optimizer = taken(kind(params), 3)
    on_gpu = [p.detach().cuda().requires_grad_() for p in params]
    loaded, back = kind(on_gpu), kind(copied(params))
    loaded.load_state_dict(optimizer.state_dict())
    assert all(state["m"].is_cuda for state in states(loaded))
    back.load_state_dict(loaded.state_dict())
    assert same(states(back), states(optimizer))


def test_8_bits_from_32_and_back(caplog):
    """Coding is where the error is, and the log says how large; decoding has none."""
    for narrow, wide in ((AdamW8bit, AdamW), (Lion8bit, Lion)):
        params = parameters()
        optimizer = taken(wide(params), 5)
        codes = narrow(copied(params))
        with caplog.at_level(logging.WARNING, "lowrank.optim"):
            codes.load_state_dict(optimizer.state_dict())
        assert "4 of m with a relative error of up to 0.0" in caplog.text
        caplog.clear()
        floats = wide(copied(params))
        floats.load_state_dict(codes.state_dict())
        assert caplog.text == ""
        saved, coded, back = states(optimizer), states(codes), states(floats)
        for exact, code, value in zip(saved, coded, back, strict=True):
            assert value["step"] == 5
            for name in ("m", "v") if narrow is AdamW8bit else ("m",):
                if code[name].dtype == torch.uint8:
                    assert torch.equal(value[name], decoded(code, name))
                error = (value[name] - exact[name]).norm() / exact[name].norm()
                assert error < 0.02


def test_torchs_adamw_goes_on_to_the_bit():
    ours = parameters()
    theirs = copied(ours)
    reference = taken(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True), 3)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    optimizer = AdamW(ours)
    optimizer.load_state_dict(reference.state_dict())
    for _ in range(3):
        grads = gradients(ours)
        stepped(optimizer, grads)
        stepped(reference, grads)
        assert all(map(torch.equal, ours, theirs))


PAIRS = [
    (AdamW8bit, bitsandbytes.optim.AdamW8bit),
    (AdamW8bit, bitsandbytes.optim.PagedAdamW8bit),
    (Lion8bit, bitsandbytes.optim.Lion8bit),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1].__name__)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_blocks_of_rows_load_exactly(pair, tmp_path, caplog):
    params = [torch.randn(shape).requires_grad_() for shape in ALIGNED]
    theirs = taken(pair[1](params, lr=1e-3, weight_decay=0.0), 4)
    ours = copied(params)
    optimizer = pair[0](ours)
    with caplog.at_level(logging.WARNING, "lowrank.optim"):
        optimizer.load_state_dict(theirs.state_dict())
    assert caplog.text == ""
    for p, q in zip(ours, params, strict=True):
        own, its = optimizer.state[p], theirs.state[q]
        assert own["step"] == its["step"] == 4
        for i, name in enumerate(("m", "v") if pair[0] is AdamW8bit else ("m",), 1):
            if its[f"state{i}"].dtype == torch.uint8:
                assert torch.equal(own[name], its[f"state{i}"])
                assert torch.equal(own[f"{name}_scale"].flatten(), its[f"absmax{i}"])
                assert torch.equal(decoded(own, name), theirs_decoded(its, i))
            else:
                assert p.numel() < 4096 and torch.equal(own[name], its[f"state{i}"])
    grads = gradients(ours)
    stepped(optimizer, grads)
    stepped(theirs, grads)
    for p, q in zip(ours, params, strict=True):
        # one place of theirs: v coded as 0 beside m that is not, and any of Lion's m near 0
        off = (p - q).abs() > 1e-6
        assert off.float().mean() < 0.01


@pytest.mark.parametrize("pair", PAIRS[::2], ids=lambda pair: pair[1].__name__)
def test_bitsandbytes_blocks_across_rows_are_coded_anew(pair, caplog):
    params = [torch.randn(shape).requires_grad_() for shape in CROSSING]
    theirs = taken(pair[1](params, lr=1e-3), 4)
    ours = copied(params)
    optimizer = pair[0](ours)
    with caplog.at_level(logging.WARNING, "lowrank.optim"):
        optimizer.load_state_dict(theirs.state_dict())
    assert f"{len(CROSSING)} of m with a relative error of up to 0.0" in caplog.text
    for p, q in zip(ours, params, strict=True):
        for i, name in enumerate(("m", "v") if pair[0] is AdamW8bit else ("m",), 1):
            exact, coded = theirs_decoded(theirs.state[q], i), decoded(optimizer.state[p], name)
            assert (coded - exact).norm() < 0.02 * exact.norm()
            assert torch.equal(coded == 0, exact == 0) or name == "m"


@pytest.mark.parametrize("theirs", ["AdamW32bit", "PagedAdamW32bit", "Lion32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_32_bits_load_exactly(theirs):
    params = [torch.randn(shape).requires_grad_() for shape in CROSSING]
    saved = taken(getattr(bitsandbytes.optim, theirs)(params, lr=1e-3), 3)
    ours = copied(params)
    optimizer = (Lion if "Lion" in theirs else AdamW)(ours)
    optimizer.load_state_dict(saved.state_dict())
    for p, q in zip(ours, params, strict=True):
        assert torch.equal(optimizer.state[p]["m"], saved.state[q]["state1"])
        assert optimizer.state[p]["step"] == 3


def test_another_table_of_codes_is_decoded_by_it(caplog):
    """As of a bitsandbytes of other bits: its values are kept, not its codes."""
    p = torch.randn(16, 256).requires_grad_()
    saved = taken(bitsandbytes.optim.Lion8bit([p]), 1).state_dict()
    (state,) = (s["__bnb_optimizer_quant_state__"] for s in saved["state"].values())
    state["qmap1"] = state["qmap1"].sign() * state["qmap1"].abs().sqrt()
    optimizer = Lion8bit(copied([p]))
    with caplog.at_level(logging.WARNING, "lowrank.optim"):
        optimizer.load_state_dict(saved)
    (own,) = states(optimizer)
    exact = theirs_decoded(state, 1)
    assert (decoded(own, "m") - exact).norm() < 0.02 * exact.norm()
    assert "1 of m" in caplog.text


def spoilt(saved, **changed):
    saved = copy.deepcopy(saved)
    saved["state"][0] |= changed
    return saved


def test_what_does_not_fit_is_refused_whole():
    params = [torch.randn(20, 300).requires_grad_(), torch.randn(7).requires_grad_()]
    optimizer = taken(AdamW8bit(params, lr=1e-2), 2)
    saved, before = copy.deepcopy(optimizer.state_dict()), states(optimizer)
    other = copy.deepcopy(saved)
    other["state"][2] = other["state"].pop(1)
    without = copy.deepcopy(saved)
    del without["state"][0]["v"]
    fewer = copy.deepcopy(saved)
    fewer["param_groups"][0]["params"] = [0]
    for error, message, bad in (
        (ConfigError, r"groups of \[2\] parameters; got \[1\]", fewer),
        (ConfigError, r"states of 2 parameters; got one of 2", other),
        (ConfigError, r"state 0: expected one of v, exp_avg_sq, state2; got", without),
        (ShapeError, r"state 0: m: expected \[20, 300\]", spoilt(saved, m=torch.zeros(300, 20))),
        (ShapeError, r"state 0: m_scale: expected 40", spoilt(saved, m_scale=torch.zeros(20))),
        (
            DtypeError,
            r"state 0: m: expected floats or uint8",
            spoilt(saved, m=torch.ones(20, 300).int()),
        ),
        (ConfigError, r"^lr: expected", {**saved, "param_groups": [{"params": [0, 1], "lr": -1}]}),
        (
            ConfigError,
            r"no amsgrad",
            {**saved, "param_groups": [{"params": [0, 1], "amsgrad": True}]},
        ),
    ):
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(bad)
        assert same(states(optimizer), before) and optimizer.param_groups[0]["lr"] == 1e-2
    optimizer.load_state_dict(saved)


def test_an_optimizer_that_has_not_stepped_has_no_state(kind):
    params = parameters()
    optimizer = taken(kind(params), 1)
    optimizer.load_state_dict(kind(copied(params)).state_dict())
    assert states(optimizer) == []
    taken(optimizer, 1)
    assert all(state["step"] == 1 for state in states(optimizer))
