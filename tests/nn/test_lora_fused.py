"""LoRALinear as one operator: which bases it takes, dropout, what it keeps, how it composes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank import LoRAConfig, LoRALinear, QuantLinear, quant
from lowrank.ops.reference.philox import kept

K, N, M = 63, 37, 18


def lora_config(r: int = 4, p: float = 0.0) -> LoRAConfig:
    return LoRAConfig(r=r, lora_alpha=6, lora_dropout=p, init_lora_weights=False)


def layer(quantizer: str | None = None, p: float = 0.0, **options) -> LoRALinear:
    return LoRALinear(K, N, config=lora_config(p=p), quantizer=quantizer, **options)


class Calls(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def results(run, one: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y and every gradient."""
    one.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.backward(dy.to(y.dtype))
    gradients = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def written_out(one: LoRALinear, seeds: dict[float, torch.Tensor] | None = None):
    """x -> y as a sum over the active adapters, each p with the mask of its own seed."""

    def run(x: torch.Tensor) -> torch.Tensor:
        y = one.base_layer(x)
        for name in one.active_adapters:
            A, B = one.lora_A[name].weight, one.lora_B[name].weight
            p, z = one.config[name].lora_dropout, x
            if seeds is not None and p > 0:
                rows = torch.arange(x.shape[:-1].numel())
                z = x * kept(rows, K, p, seeds[p]).view(x.shape) / (1 - p)
            y = y + one.scaling[name] * (z.to(A.dtype) @ A.T @ B.T)
        return y

    return run


def assert_same(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, M // 2, K)


@pytest.fixture
def dy() -> torch.Tensor:
    return torch.randn(2, M // 2, N)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_base_and_every_adapter_of_one_dropout_are_one_call(quantizer, p, x):
    one = layer(quantizer, p)
    one.add_adapter("other", lora_config(3, p))
    one.set_adapter(["default", "other"])
    with Calls() as calls:
        one(x)
    names = [name for name in calls.names if "lowrank" in name]
    assert names == ["lowrank::lora_linear"]
    assert not [name for name in calls.names if "mm" in name or "bernoulli" in name]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Loud(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Rounding:
    """A user's quantizer: two functions."""

    name = "rounding"

    def quantize(self, weight):
        tensors = {"rounded": (weight * 100).round().to(torch.int16)}
        return quant.Storage(self.name, tuple(weight.shape), weight.dtype, tensors)

    def dequantize(self, storage, dtype):
        return storage["rounded"].to(dtype) / 100


def hooked(linear: nn.Module, register: str, hook) -> nn.Module:
    getattr(linear, register)(hook)
    return linear


def patched(linear: nn.Module) -> nn.Module:
    linear.forward = lambda x: F.linear(x, linear.weight) - 3
    return linear


OTHER_BASES = {
    "a subclass": lambda: Loud(K, N),
    "a user's quantizer": lambda: QuantLinear(K, N, quantizer=Rounding()),
    "a forward hook": lambda: hooked(
        nn.Linear(K, N), "register_forward_hook", lambda module, args, y: 2 * y
    ),
    "a pre-hook": lambda: hooked(
        QuantLinear(K, N), "register_forward_pre_hook", lambda module, args: (args[0] + 1,)
    ),
    "a parametrization": lambda: parametrize.register_parametrization(
        nn.Linear(K, N), "weight", Doubled()
    ),
    "a patched forward": lambda: patched(nn.Linear(K, N)),
    "another compute dtype": lambda: QuantLinear(K, N, compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", OTHER_BASES)
def test_any_other_base_is_called_as_it_is(kind, x, dy):
    one = LoRALinear.wrap(OTHER_BASES[kind](), lora_config())
    assert_same(results(one, one, x, dy), results(written_out(one), one, x, dy))


def test_a_backward_hook_of_the_base_is_called(x, dy):
    seen = []
    base = hooked(nn.Linear(K, N), "register_full_backward_hook", lambda *args: seen.append(args))
    one = LoRALinear.wrap(base, lora_config())
    results(one, one, x, dy)
    assert len(seen) == 1


def test_a_base_that_is_trained_after_all(x, dy):
    one = layer()
    one.base_layer.requires_grad_(True)
    got = results(one, one, x, dy)
    assert {"base_layer.weight", "base_layer.bias"} < got.keys()
    assert_same(got, results(written_out(one), one, x, dy))


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_a_trained_bias_under_a_frozen_weight(quantizer, x, dy):
    one = layer(quantizer)
    one.base_layer.bias.requires_grad_(True)
    got = results(one, one, x, dy)
    assert "base_layer.bias" in got
    assert_same(got, results(written_out(one), one, x, dy))


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_each_dropout_has_its_own_mask(quantizer, x, dy, seed):
    one = layer(quantizer, p=0.5)
    for name, r, p in (("second", 3, 0.2), ("third", 2, 0.0), ("fourth", 5, 0.5)):
        one.add_adapter(name, lora_config(r, p))
    one.set_adapter(["default", "second", "third", "fourth"])
    torch.manual_seed(seed)
    got = results(one, one, x, dy)
    torch.manual_seed(seed)
    seeds = {p: torch.randint(2**63 - 1, ()) for p in (0.5, 0.2)}
    assert_same(got, results(written_out(one, seeds), one, x, dy))
    one.eval()
    assert_same(results(one, one, x, dy), results(written_out(one), one, x, dy))


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(quantizer, use_reentrant, x, dy, seed):
    one = layer(quantizer, p=0.5)
    torch.manual_seed(seed)
    want = results(one, one, x, dy)
    torch.manual_seed(seed)
    got = results(lambda x: checkpoint(one, x, use_reentrant=use_reentrant), one, x, dy)
    assert all(torch.equal(got[name], want[name]) for name in want)
    other = results(one, one, x, dy)
    assert not torch.equal(other["y"], want["y"])  # the next step has another mask


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_compiled_whole_with_dropout(quantizer, x, dy, seed):
    one = layer(quantizer, p=0.5)
    one.add_adapter("other", lora_config(3, 0.25))
    one.set_adapter(["default", "other"])
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    results(compiled, one, x, dy)
    torch.manual_seed(seed)
    want = results(one, one, x, dy)
    torch.manual_seed(seed)
    assert_same(results(compiled, one, x, dy), want, 1e-6)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast_and_float64(quantizer, p, x, dy, seed):
    one = layer(quantizer, p)

    def run(x):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            return one(x)

    def plain(x):
        torch.manual_seed(seed)
        return one(x)

    got, want = results(run, one, x, dy), results(plain, one, x, dy)
    assert got["y"].dtype == torch.bfloat16 and got["x"].dtype == torch.float32
    assert got["lora_A.default.weight"].dtype == torch.float32
    assert_same(got, want, 2e-2)
    one.to(torch.float64)
    exact = results(run, one, x.double(), dy.double())
    assert exact["y"].dtype == torch.float64  # which autocast leaves alone
    assert_same(want, exact)


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float64])
def test_adapters_of_another_dtype(adapters, x, dy):
    one = layer("nf4")
    one.lora_A.to(adapters)
    one.lora_B.to(adapters)
    got = results(one, one, x, dy)
    assert got["y"].dtype == torch.float32 and got["lora_A.default.weight"].dtype == adapters
    one.lora_A.to(torch.float32)
    one.lora_B.to(torch.float32)
    assert_same(got, results(one, one, x, dy), 1e-2)


def test_meta_tensors():
    for quantizer in (None, "nf4"):
        one = layer(quantizer, p=0.5, device="meta")
        y = one(torch.empty(2, 5, K, device="meta"))
        assert y.is_meta and y.shape == (2, 5, N)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "both"])
def test_nothing_but_x_and_h_is_kept(quantizer, p, trained, x, dy):
    one = layer(quantizer, p)
    for part in ("lora_A", "lora_B"):
        getattr(one, part).requires_grad_(trained in (part, "both"))
    own = {t.data_ptr() for t in (*one.parameters(), *one.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = one(given)
    assert (given.data_ptr() in sizes) == (trained != "lora_B")
    sizes.pop(given.data_ptr(), None)
    h = 4 * M * one.r["default"] if trained != "lora_A" else 0
    assert sum(sizes.values()) <= h + 8  # and the seed
    y.backward(dy)
    grads = {n for n, p in one.named_parameters() if p.grad is not None}
    parts = ("lora_A", "lora_B") if trained == "both" else (trained,)
    assert grads == {f"{part}.default.weight" for part in parts}
