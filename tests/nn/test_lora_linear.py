"""LoRALinear over dense and quantized bases, against PEFT's layer and against the formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank import LoRAConfig, LoRALinear, QuantLinear
from lowrank.errors import ConfigError, LowrankError, TargetError
from tests.adapters.oracle import peft

RANDOM = LoRAConfig(r=4, lora_alpha=6, init_lora_weights=False)


def layer(K=63, N=37, quantizer=None, config=RANDOM, **options) -> LoRALinear:
    return LoRALinear(K, N, config=config, quantizer=quantizer, **options)


def formula(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The sum over the active adapters written out, from the base's weight in float32."""
    base = layer.unmerged_base
    W = base.weight if isinstance(base, nn.Linear) else base.dequantize(torch.float32)
    y = x @ W.float().t() + (0 if layer.bias is None else layer.bias.float())
    for name in layer.active_adapters:
        A, B = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
        y = y + layer.scaling[name] * (x @ A.t() @ B.t())
    return y


def gradients(layer: nn.Module, run, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = run(x)
    (y.float() * dy).sum().backward()
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(got: dict, want: dict, rtol: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].float() - want[name].float()).norm() / want[name].float().norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("K", "N", "bias"), [(63, 37, True), (24, 123, False)])
def test_equals_pefts_layer(K, N, bias, use_rslora):
    linear = nn.Linear(K, N, bias)
    options = {"r": 5, "lora_alpha": 7, "use_rslora": use_rslora, "init_lora_weights": False}
    theirs = peft.tuners.lora.Linear(
        copy.deepcopy(linear).requires_grad_(False),
        adapter_name="default",
        config=peft.LoraConfig(**options),
        r=5,
        lora_alpha=7,
    )
    ours = LoRALinear.wrap(linear, LoRAConfig(**options))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert ours.scaling == theirs.scaling
    x, dy = torch.randn(3, 5, K), torch.randn(3, 5, N)
    assert_same(gradients(ours, ours, x, dy), gradients(theirs, theirs, x, dy), 1e-6)
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("rows", [(1,), (4, 9), (2, 3, 20)])
def test_two_adapters_add_up(quantizer, rows):
    one = layer(quantizer=quantizer)
    one.add_adapter("other", LoRAConfig(r=3, lora_alpha=9, init_lora_weights=False))
    x, dy = torch.randn(*rows, 63), torch.randn(*rows, 37)
    for active in (["default"], ["other"], ["default", "other"], []):
        one.set_adapter(active)
        got = gradients(one, one, x, dy)
        assert_same(got, gradients(one, lambda x: formula(one, x), x, dy), 1e-5)
        assert {n.split(".")[1] for n in got if n.startswith("lora_")} == set(active)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_compiled_whole(quantizer):
    one = layer(quantizer=quantizer)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(2, 9, 63), torch.randn(2, 9, 37)
    assert_same(gradients(one, compiled, x, dy), gradients(one, one, x, dy), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), one(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(quantizer, use_reentrant):
    one = layer(quantizer=quantizer)
    x, dy = torch.randn(2, 9, 63), torch.randn(2, 9, 37)
    got = gradients(one, lambda x: checkpoint(one, x, use_reentrant=use_reentrant), x, dy)
    assert_same(got, gradients(one, one, x, dy), 1e-6)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_base_keeps_float32_adapters(quantizer, dtype):
    one = layer(quantizer=quantizer, dtype=dtype)
    assert one.lora_A["default"].weight.dtype == torch.float32
    x, dy = torch.randn(4, 9, 63).to(dtype), torch.randn(4, 9, 37)
    got = gradients(one, one, x, dy)
    assert got["y"].dtype == got["x"].dtype == dtype
    want = gradients(one, lambda x: formula(one, x), x.float(), dy)
    assert_same(got, want, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_autocast(quantizer):
    one = layer(quantizer=quantizer)
    x, dy = torch.randn(4, 9, 63), torch.randn(4, 9, 37)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return one(x)

    got = gradients(one, run, x, dy)
    assert got["y"].dtype == torch.bfloat16
    assert got["lora_A.default.weight"].dtype == torch.float32
    assert_same(got, gradients(one, lambda x: formula(one, x), x, dy), 2e-2)


def test_dropout_is_on_the_adapters_input_alone():
    one = layer(K=4000, N=5, config=LoRAConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    x = torch.ones(1, 4000)
    one.eval()
    torch.testing.assert_close(one(x), formula(one, x), rtol=1e-4, atol=1e-4)
    one.train()
    with torch.no_grad():
        one.lora_B["default"].weight.fill_(1.0)
        one.lora_A["default"].weight.fill_(1 / 4000)
    branch = one(x) - one.base_layer(x)  # s · 2 ranks · mean of dropped ones
    assert branch.min() != 2 * one.scaling["default"]
    torch.testing.assert_close(
        branch / (2 * one.scaling["default"]), torch.ones(1, 5), rtol=0.1, atol=0.1
    )
    x = torch.randn(3, 4000, requires_grad=True)
    one(x).sum().backward()
    touched = x.grad - one.weight.sum(0)
    assert 0.3 < (touched.abs() > 1e-6).float().mean() < 0.7


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_loads_a_plain_linear_as_it_is(quantizer, bias):
    plain = nn.Linear(63, 37, bias)
    one = nn.Sequential(layer(quantizer=quantizer, bias=bias), nn.ReLU())
    adapters = {n: p.clone() for n, p in one.named_parameters() if "lora_" in n}
    one.load_state_dict(nn.Sequential(plain, nn.ReLU()).state_dict(), strict=True)
    want = plain.weight if quantizer is None else QuantLinear.from_linear(plain, "nf4").dequantize()
    got = one[0].weight if quantizer is None else one[0].base_layer.dequantize()
    assert torch.equal(got, want)
    for name, value in adapters.items():
        assert torch.equal(one.get_parameter(name), value)


def test_loads_a_quantized_linear_as_it_is():
    plain = QuantLinear(63, 37)
    one = layer(quantizer="nf4")
    one.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(one.base_layer.dequantize(), plain.dequantize())


def test_plain_keys_that_do_not_fit_are_refused():
    state = nn.Linear(63, 37).state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        layer().load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match="Unexpected key.*scale"):
        layer().load_state_dict({**state, "scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer().load_state_dict(nn.Linear(62, 37).state_dict())


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_back(quantizer, dtype):
    one = layer(quantizer=quantizer, dtype=dtype)
    x = torch.randn(9, 63, dtype=dtype)
    before = copy.deepcopy(one.state_dict())
    y, base = one(x), one.base_layer(x)
    for _ in range(3):
        one.merge()
        assert one.merged and type(one.base_layer) is nn.Linear
        assert one.base_layer.weight.dtype == dtype
        tolerance = (
            {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        )
        torch.testing.assert_close(one(x), y, **tolerance)
        one.disabled = True
        assert torch.equal(one(x), base)
        one.disabled = False
        one.unmerge()
    after = one.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(one(x), y)


def test_the_kept_base_moves_with_the_layer():
    one = layer()
    one.merge()
    one.to(torch.float64)
    one.unmerge()
    assert one.weight.dtype == torch.float64


def test_merged_layers_refuse_changes():
    one = layer()
    one.merge()
    for change in (
        one.merge,
        lambda: one.set_adapter([]),
        lambda: one.delete_adapter("default"),
        lambda: one.scale_adapter("default", 2.0),
        lambda: one.add_adapter("b", RANDOM),
    ):
        with pytest.raises(ConfigError, match="call unmerge first"):
            change()


def test_is_a_drop_in_and_frozen():
    one = LoRALinear(12, 8, config=LoRAConfig(r=2))
    assert (one.in_features, one.out_features) == (12, 8)
    assert one.weight.shape == (8, 12) and one.bias.shape == (8,)
    trainable = {n for n, p in one.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A.default.weight", "lora_B.default.weight"}
    x = torch.randn(3, 12)
    assert torch.equal(one(x), one.base_layer(x))  # B is zero
    assert "active=['default']" in repr(one)


def test_copies_and_meta():
    one = layer()
    x = torch.randn(2, 63)
    assert torch.equal(copy.deepcopy(one)(x), one(x))
    assert layer(device="meta").lora_B["default"].weight.is_meta


@pytest.mark.parametrize("module", [nn.Embedding(3, 4), nn.Conv1d(1, 1, 1), None, layer()])
def test_wraps_linears_only(module):
    with pytest.raises(TargetError, match="expected a (linear )?layer"):
        LoRALinear.wrap(module, RANDOM)


@pytest.mark.parametrize("name", ["", "a.b", "default", "/tmp/a", "a\\b"])
def test_refuses_adapter_names(name):
    one = layer()
    with pytest.raises(LowrankError, match="adapter"):
        one.add_adapter(name, RANDOM)
    assert list(one.lora_A) == ["default"]
