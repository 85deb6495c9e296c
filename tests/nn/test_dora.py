"""DoRA over dense and quantized bases, against PEFT's layer and against float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank import LoRAConfig, LoRALinear, quant
from tests.adapters.oracle import peft, quiet
from tests.quant.schemes import label, variants

DORA = LoRAConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False)
K, N = 63, 37


def trained(base: nn.Module | None = None, config: LoRAConfig = DORA, **options) -> LoRALinear:
    """A layer whose magnitude is no longer the norms."""
    linear = nn.Linear(K, N) if base is None else base
    layer = LoRALinear.wrap(linear, config, **options)
    train(layer, "default")
    return layer


@torch.no_grad()
def train(layer: LoRALinear, adapter: str) -> None:
    layer.lora_magnitude_vector[adapter].weight.mul_(1 + 0.3 * torch.randn(N))


def base_weight(layer: LoRALinear) -> torch.Tensor:
    base = layer.unmerged_base
    W = base.weight if isinstance(base, nn.Linear) else base.dequantize(torch.float64)
    return W.detach().double()


def formula(layer: LoRALinear, x: torch.Tensor, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """W' = W + Σ s B A + Σ m (W + s B A) / ||W + s B A|| - W, the norms being constants."""
    W = base_weight(layer)
    whole = W
    for a in layer.active_adapters:
        A, B = leaves[f"lora_A.{a}.weight"], leaves[f"lora_B.{a}.weight"]
        V = W + layer.scaling[a] * B @ A
        m = leaves.get(f"lora_magnitude_vector.{a}.weight")
        if m is not None:
            V = m[:, None] * V / V.detach().norm(dim=1, keepdim=True)
        whole = whole + V - W
    return F.linear(x, whole, None if layer.bias is None else layer.bias.double())


def exact(layer: LoRALinear, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {
        n: p.detach().double().requires_grad_()
        for n, p in layer.named_parameters()
        if p.requires_grad
    }
    x = x.detach().double().requires_grad_()
    y = formula(layer, x, leaves)
    grads = torch.autograd.grad((y * dy).sum(), [x, *leaves.values()])
    return {"y": y.detach(), "x": grads[0], **dict(zip(leaves, grads[1:], strict=True))}


def found(layer: nn.Module, run, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = run(x)
    (y * dy).sum().backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_same(got: dict, want: dict, rtol: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


def pefts(linear: nn.Linear, **options) -> nn.Module:
    options = {"r": 4, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False, **options}
    with quiet():
        config = peft.LoraConfig(**options, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    return model.base_model.model[0]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_pefts_layer(bias, use_rslora):
    linear = nn.Linear(K, N, bias)
    theirs = pefts(linear, use_rslora=use_rslora)
    ours = LoRALinear.wrap(
        linear,
        LoRAConfig(
            r=4, lora_alpha=6, use_dora=True, use_rslora=use_rslora, init_lora_weights=False
        ),
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    adapters = {n: t for n, t in theirs.state_dict().items() if "base_layer" not in n}
    m = adapters["lora_magnitude_vector.default.weight"]
    m *= 1 + 0.2 * torch.randn(N)
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.randn(3, 5, K), torch.randn(3, 5, N)
    assert_same(found(ours, ours, x, dy), found(theirs, theirs, x, dy), 2e-6)
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=2e-6, atol=2e-6)


def test_dropout_is_pefts():
    linear = nn.Linear(K, N)
    theirs = pefts(linear, lora_dropout=0.4).train()
    ours = LoRALinear.wrap(linear, LoRAConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=0.4))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    x, dy = torch.randn(9, K), torch.randn(9, N)
    results = []
    for layer in (ours.train(), theirs):
        torch.manual_seed(7)
        results.append(found(layer, layer, x, dy))
    assert_same(*results, 2e-6)


@pytest.mark.parametrize("variant", variants(block_size=32), ids=label)
def test_over_every_scheme(variant):
    name, options = variant
    layer = trained(quantizer=quant.get(name, **options))
    x, dy = torch.randn(2, 9, K), torch.randn(2, 9, N)
    want = exact(layer, x, dy)
    assert_same(found(layer, layer, x, dy), want, 3e-6)
    layer.merge()
    torch.testing.assert_close(layer(x).double(), want["y"], rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert_same(found(layer, layer, x, dy), want, 3e-6)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("rows", [(1,), (2, 3, 20)])
def test_several_add_up_each_to_the_same_base(quantizer, rows):
    layer = trained(quantizer=quantizer)
    layer.add_adapter("lora", LoRAConfig(r=3, lora_alpha=9, init_lora_weights=False))
    layer.add_adapter("dora", LoRAConfig(r=2, use_dora=True, init_lora_weights=False))
    train(layer, "dora")
    x, dy = torch.randn(*rows, K), torch.randn(*rows, N)
    for active in (["default", "lora"], ["lora", "dora", "default"], ["dora"], ["lora"], []):
        layer.set_adapter(active)
        want = exact(layer, x, dy)
        assert_same(found(layer, layer, x, dy), want, 3e-6)
        layer.merge()
        torch.testing.assert_close(layer(x).double(), want["y"], rtol=1e-4, atol=1e-5)
        layer.unmerge()


def test_the_order_does_not_count_as_it_does_in_peft():
    linear, x = nn.Linear(K, N), torch.randn(5, K)
    config = peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["0"])
    with quiet():
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
        model.add_adapter("other", config)
    ours = LoRALinear.wrap(linear, LoRAConfig(r=4, use_dora=True))
    ours.add_adapter("other", LoRAConfig(r=4, use_dora=True))
    theirs = model.base_model.model[0]
    ours.load_state_dict(theirs.state_dict())
    outputs = {}
    with torch.no_grad():
        for layer in (ours, theirs):
            for adapter in ("default", "other"):
                m = layer.lora_magnitude_vector[adapter].weight
                m.mul_(torch.linspace(0.5, 1.5, N))
            for order in (("default", "other"), ("other", "default")):
                layer.set_adapter(list(order))
                outputs[layer is ours, order[0]] = layer(x)
    torch.testing.assert_close(outputs[True, "default"], outputs[True, "other"])
    assert (outputs[False, "default"] - outputs[False, "other"]).abs().max() > 1e-3


def test_it_starts_at_the_base():
    linear = nn.Linear(K, N)
    x = torch.randn(5, K)
    for quantizer in (None, "nf4"):
        layer = LoRALinear.wrap(linear, LoRAConfig(use_dora=True), quantizer=quantizer)
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-5, atol=1e-5)


def test_a_base_of_16_bits_and_autocast():
    x, dy = torch.randn(9, K), torch.randn(9, N)
    for base in (nn.Linear(K, N, dtype=torch.bfloat16), nn.Linear(K, N)):
        layer = trained(base)
        want = exact(layer, x.bfloat16(), dy)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
            assert_same(found(layer, layer, x, dy), want, 2e-2)
            norms = layer.norms("default")
        V = base_weight(layer) + layer.scaling["default"] * (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        torch.testing.assert_close(norms.double(), V.norm(dim=1), rtol=1e-6, atol=1e-6)
    half = trained(nn.Linear(K, N, dtype=torch.bfloat16))
    assert half.lora_magnitude_vector["default"].weight.dtype == torch.float32
    got = found(half, half, x.bfloat16(), dy)
    assert_same(got, exact(half, x.bfloat16(), dy), 2e-2)


def test_float64():
    layer = trained(nn.Linear(K, N, dtype=torch.float64))
    x, dy = torch.randn(9, K, dtype=torch.float64), torch.randn(9, N, dtype=torch.float64)
    assert_same(found(layer, layer, x, dy), exact(layer, x, dy), 1e-13)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointing_changes_nothing(p):
    config = LoRAConfig(r=4, use_dora=True, lora_dropout=p, init_lora_weights=False)
    layer = trained(config=config).train()
    x, dy = torch.randn(9, K), torch.randn(9, N)
    torch.manual_seed(3)
    want = found(layer, layer, x, dy)
    torch.manual_seed(3)
    got = found(layer, lambda x: checkpoint(layer, x, use_reentrant=False), x, dy)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_compiled_is_one_graph_and_follows_training(quantizer):
    layer = trained(quantizer=quantizer)
    x, dy = torch.randn(9, K), torch.randn(9, N)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert_same(found(layer, compiled, x, dy), exact(layer, x, dy), 3e-6)
        with torch.no_grad():
            layer.lora_A["default"].weight.add_(0.1)


def without_gradients(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("quantizer", [None, "nf4", "int8"])
def test_norms_follow_whatever_changes(quantizer):
    layer, x = trained(quantizer=quantizer), torch.randn(5, K)

    def check(layer):
        want = formula(layer, x.double(), {n: p.double() for n, p in layer.named_parameters()})
        for y in (without_gradients(layer, x), layer(x), without_gradients(layer, x)):
            torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)

    check(layer)
    other = trained(quantizer=quantizer)
    layer.load_state_dict(other.state_dict())
    check(layer)
    layer.base_layer.load_state_dict(trained(quantizer=quantizer).base_layer.state_dict())
    check(layer)
    if quantizer is None:
        layer.base_layer.weight.data.mul_(2)  # unseen by the version, but not by `.to`
        layer.to(torch.float64).to(torch.float32)
        layer.base_layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    else:
        layer.base_layer.refill(layer.base_layer.quantizer.quantize(torch.randn(N, K)))
    check(layer)
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    check(layer)
    without_gradients(layer, x)
    layer.scale_adapter("default", 0.5)
    check(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        check(twin)
    with torch.inference_mode():
        layer(x)
    found(layer, layer, x, torch.randn(5, N))


def test_an_optimizer_that_writes_unseen_is_followed():
    layer, x = trained(), torch.randn(5, K)
    without_gradients(layer, x)
    layer(x)
    layer.lora_B["default"].weight.data.add_(0.5)
    want = formula(layer, x.double(), {n: p.double() for n, p in layer.named_parameters()})
    torch.testing.assert_close(without_gradients(layer, x).double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_a_plain_weight_brings_its_magnitude_unless_one_is_trained(quantizer):
    fresh = LoRALinear(K, N, config=LoRAConfig(use_dora=True), quantizer=quantizer)
    plain, x = nn.Linear(K, N), torch.randn(5, K)
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), fresh.base_layer(x), rtol=1e-5, atol=1e-5)
    train(fresh, "default")
    m = fresh.lora_magnitude_vector["default"].weight.detach().clone()
    fresh.load_state_dict(nn.Linear(K, N).state_dict())
    assert torch.equal(fresh.lora_magnitude_vector["default"].weight, m)


def test_a_row_of_zeros_stays_one():
    linear = nn.Linear(K, N, bias=False)
    with torch.no_grad():
        linear.weight[5] = 0
    layer = LoRALinear.wrap(linear, LoRAConfig(use_dora=True))
    x, dy = torch.randn(5, K), torch.randn(5, N)
    got = found(layer, layer, x, dy)
    assert all(value.isfinite().all() for value in got.values())
    torch.testing.assert_close(got["y"], linear(x), rtol=1e-5, atol=1e-5)


def test_what_the_base_is_called_with_is_kept():
    layer = trained()
    layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(5, K)
    g = layer.gain("default")
    A, B = layer.factors("default")
    w = 2 * layer.base_layer.forward(x) - layer.bias
    want = g * (w + layer.scaling["default"] * x @ A.T @ B.T) + layer.bias
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_start_from_the_weight_keeps_the_weight(init):
    linear, x = nn.Linear(K, N), torch.randn(5, K)
    config = LoRAConfig(r=4, use_dora=True, init_lora_weights=init)
    layer = LoRALinear.wrap(linear, config, quantizer="none")
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    other = nn.Linear(K, N)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-5)


def test_two_names_of_one_thing():
    assert LoRAConfig(use_dora=True) == LoRAConfig(method="dora")
    assert LoRAConfig(method="dora").to_peft()["use_dora"] is True


def test_deleting_leaves_nothing_behind():
    layer = trained()
    x = torch.randn(5, K)
    layer.delete_adapter("default")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.state_dict().keys() == {"base_layer.weight", "base_layer.bias"}
    layer.add_adapter("default", LoRAConfig())
    layer.set_adapter(["default"])
    assert layer.gain("default") is None
