"""Optimizers with resident state: arithmetic beside torch's and bitsandbytes', and manners."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError
from lowrank.optim import AdamW, AdamW8bit, Lion, Lion8bit
from tests.optim.steps import KINDS, copied, gradients, parameters, same, states, stepped

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

START = """
import sys
import torch
from lowrank import optim
for kind in (optim.AdamW, optim.AdamW8bit, optim.Lion, optim.Lion8bit):
    p = torch.nn.Parameter(torch.randn(80, 80))
    optimizer = kind([p])
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.randn(3))})
    p.grad = torch.randn(80, 80)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print(sorted(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_the_page_says_which_backends_have_a_kernel(name):
    page = Path(__file__).parents[2] / "docs" / "optimizers.md"
    row = next(
        line for line in page.read_text().splitlines() if f"`{name}`, `Paged{name}` |" in line
    )
    op, cells = f"{name.lower()}_step", row.split("|")[2:5]
    found = dict(line.strip().split(": ", 1) for line in ops.explain(op).splitlines()[1:])
    for backend, cell in zip(("cpu", "triton", "cuda"), cells, strict=True):
        assert (found[backend] == f"has no {op}") == (cell.strip() == "torch")


class Calls(TorchDispatchMode):
    """The operators that run while inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", FLOATS)
def test_each_of_fifty_steps_is_as_near_32_bits_as_bitsandbytes_asks(dtype):
    """Its own test: sizes, rate, tolerance; parameters are brought together after every step."""
    start = (torch.randn(32, 1024) * 0.1).to(dtype)
    ours, exact = copied([start]), copied([start], torch.float32)
    optimizer, reference = AdamW8bit(ours, lr=1e-3), torch.optim.AdamW(exact, lr=1e-3)
    for _ in range(50):
        grad = (torch.randn(32, 1024) * 0.01).to(dtype)
        stepped(optimizer, [grad])
        stepped(reference, [grad])
        with torch.no_grad():
            error = (ours[0].float() - exact[0]).abs().mean()
            assert error < (1.7e-4 if dtype == torch.bfloat16 else 6e-5)
            ours[0].copy_(exact[0])
            exact[0].copy_(ours[0])


def test_fifty_steps_end_where_32_bits_do():
    """Left to themselves, in noise alone: within 3 % of the way, as far off as bitsandbytes'."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    start = torch.randn(32, 1024) * 0.1
    ours, theirs, exact = copied([start]), copied([start]), copied([start], torch.float64)
    numbers = {"lr": 1e-3, "weight_decay": 0.01}
    optimizers = [
        AdamW8bit(ours, **numbers),
        bitsandbytes.optim.AdamW8bit(theirs, **numbers),
        torch.optim.AdamW(exact, **numbers),
    ]
    for _ in range(50):
        grad = torch.randn(32, 1024) * 0.01
        for optimizer in optimizers:
            stepped(optimizer, [grad])
    off, its = ((p[0].double() - exact[0]).abs().mean() for p in (ours, theirs))
    assert off < 0.03 * (exact[0] - start).abs().mean()
    assert off < 1.1 * its


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_gradients_move_nothing(kind, dtype):
    params = parameters(dtype)
    before = copied(params)
    optimizer = kind(params, weight_decay=0.0)
    for _ in range(20):
        stepped(optimizer, [torch.zeros_like(p) for p in params])
    assert all(map(torch.equal, params, before))


def test_what_is_not_finite_shows_in_the_parameter(kind):
    for bad in (torch.nan, torch.inf):
        params = parameters()
        optimizer = kind(params)
        grads = gradients(params)
        for grad in grads:
            grad.view(-1)[0] = bad
        stepped(optimizer, grads)
        assert all(p.view(-1)[0].isnan() for p in params)
        assert sum(int(p.isnan().sum()) for p in params) == len(params)


def test_the_same_bits_on_every_run(kind):
    start = parameters()
    all_grads = [gradients(start) for _ in range(5)]
    runs = []
    for _ in range(2):
        params = copied(start)
        optimizer = kind(params)
        for grads in all_grads:
            stepped(optimizer, grads)
        runs.append((params, states(optimizer)))
    assert all(map(torch.equal, runs[0][0], runs[1][0])) and same(runs[0][1], runs[1][1])


def test_small_tensors_keep_float32_moments():
    """As bitsandbytes: below 4096 elements; by default, or as each group says."""
    params = parameters()
    for kind in (AdamW8bit, Lion8bit):
        groups = [{"params": params[:6]}, {"params": params[6:], "min_8bit_size": 150}]
        optimizer = kind(groups)
        stepped(optimizer, gradients(params))
        dtypes = [optimizer.state[p]["m"].dtype for p in params]
        code, wide = torch.uint8, torch.float32
        assert dtypes == [code, code, code, wide, wide, wide, code, code]
        assert optimizer.state[params[7]]["m_scale"].shape == (1, 20)
        assert ("v" in optimizer.state[params[0]]) == (kind is AdamW8bit)


def test_groups_have_numbers_of_their_own(kind):
    params = parameters()
    alone = [copied([p]) for p in params]
    grads = [gradients(params) for _ in range(3)]
    rates = [10.0 ** -(2 + i % 3) for i in range(len(params))]
    groups = [
        {"params": [p], "lr": rate, "weight_decay": 0.1 * (i % 2)}
        for i, (p, rate) in enumerate(zip(params, rates, strict=True))
    ]
    optimizer = kind(groups[:2])
    for group in groups[2:]:
        optimizer.add_param_group(group)
    singles = [
        kind(p, lr=group["lr"], weight_decay=group["weight_decay"])
        for p, group in zip(alone, groups, strict=True)
    ]
    for step in grads:
        stepped(optimizer, step)
        for single, grad in zip(singles, step, strict=True):
            stepped(single, [grad])
    assert all(torch.equal(p, q[0]) for p, q in zip(params, alone, strict=True))


def test_what_has_no_gradient_is_not_touched_and_counts_its_own_steps():
    ours, theirs = parameters(), None
    theirs = copied(ours)
    optimizer = AdamW(ours, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(6):
        for i, grad in enumerate(gradients(ours)):
            without = (i + step) % 3 == 0
            ours[i].grad = None if without else grad.clone()
            theirs[i].grad = None if without else grad
        optimizer.step()
        reference.step()
        assert all(map(torch.equal, ours, theirs))
    counts = [int(reference.state[p]["step"]) for p in theirs]
    assert [optimizer.state[p]["step"] for p in ours] == counts


def test_manners_of_torchs_optimizers(kind):
    """A closure, hooks, a schedule, names, zeroed gradients, a deep copy."""
    layer = torch.nn.Linear(70, 70)
    optimizer = kind(layer.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(1))
    x = torch.randn(5, 70)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(10):
        last = optimizer.step(closure)
    assert last < first and first.requires_grad and len(seen) == 11
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    twin = copy.deepcopy(optimizer)
    pairs = zip(twin.param_groups[0]["params"], layer.parameters(), strict=True)
    for p, q in pairs:
        p.grad = q.grad.clone()
    twin.step()
    optimizer.step()
    assert all(map(torch.equal, twin.param_groups[0]["params"], layer.parameters()))
    assert same(states(twin), states(optimizer))


def test_many_tensors_are_stepped_by_one_call():
    for kind, op in ((AdamW8bit, "adamw8bit_step"), (Lion8bit, "lion8bit_step")):
        params = [torch.randn(16, 300).requires_grad_() for _ in range(50)]
        optimizer = kind(params)
        stepped(optimizer, gradients(params))
        with Calls() as calls:
            stepped(optimizer, gradients(params))
        assert sum(op in name for name in calls.names) == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_step_waits_for_no_device(kind, dtype, monkeypatch):
    """No value of a tensor is asked for: not by .item() and its kin, nor by an operator."""
    params = parameters(dtype)
    optimizer = kind(params)
    stepped(optimizer, gradients(params))
    for p, grad in zip(params, gradients(params), strict=True):
        p.grad = grad

    def asked(*args, **kwargs):
        raise AssertionError("a tensor was asked for its values")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    with Calls() as calls:
        optimizer.step()
    monkeypatch.undo()
    assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]


def test_an_optimizer_starts_without_the_compiler():
    """torch.optim's own import it as they are made: a second, and 125 MB."""
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_wrong_is_named_and_changes_nothing(kind):
    p = torch.randn(70, 70).requires_grad_()
    for name, bad in (
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("eps", -1e-8),
        ("min_8bit_size", None),
    ):
        if name not in kind([p]).defaults:
            continue
        with pytest.raises(ConfigError, match=f"^{name}: expected"):
            kind([p], **{name: bad})
    optimizer = kind([p])
    with pytest.raises(ConfigError, match="^lr: expected"):
        optimizer.add_param_group({"params": [torch.zeros(3)], "lr": -1})
    for bad in (torch.zeros(80, 80, dtype=torch.complex64), torch.zeros(9000, dtype=torch.int32)):
        with pytest.raises(DtypeError, match=r"^params\[0\] of shape .*: expected float32"):
            optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_float64_has_32_bit_optimizers_only():
    p = torch.randn(70, 70, dtype=torch.float64).requires_grad_()
    for kind in (AdamW8bit, Lion8bit):
        with pytest.raises(DtypeError, match="got torch.float64"):
            kind([p])
    for kind in (AdamW, Lion):
        optimizer = kind([p])
        stepped(optimizer, gradients([p]))
        assert optimizer.state[p]["m"].dtype == torch.float64


def test_a_sparse_gradient_is_refused_before_anything_moves(kind):
    table, other = torch.nn.Embedding(90, 80, sparse=True), torch.nn.Linear(80, 80)
    optimizer = kind([*other.parameters(), *table.parameters()])
    before = copied(list(other.parameters()))
    other(table(torch.tensor([3, 5]))).sum().backward()
    with pytest.raises(DtypeError, match=r"of shape \[90, 80\]: expected a dense one"):
        optimizer.step()
    assert all(map(torch.equal, other.parameters(), before)) and states(optimizer) == []
