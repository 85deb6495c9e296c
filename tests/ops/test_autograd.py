"""What torch asks of a differentiable operator, of every one of ours, on each backend.

A table of operators; each property is one test over the table.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lowrank import ops
from lowrank.errors import ConfigError
from lowrank.ops import cpu
from tests.ops.isas import using_threads
from tests.ops.weights import random_weight

N, K, V, E, R = 9, 70, 23, 3, 4
COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


class Case(NamedTuple):
    """`make(M, dtype)` gives a function and the tensors in which it is differentiable."""

    make: Callable[[int, torch.dtype], tuple[Callable, tuple[Tensor, ...]]]
    twice: bool  # whether a second derivative is promised


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def linear(M: int, dtype: torch.dtype):
    weight = random_weight(N, K, 32, double_quant=True)
    f = lambda x, bias: ops.codebook_linear(x, *weight, bias, 32)  # noqa: E731
    return f, (leaf(M, K, dtype=dtype), leaf(N, dtype=dtype))


def linear_dx(M: int, dtype: torch.dtype):
    weight = random_weight(N, K, 32, tables=N)
    return lambda dy: ops.codebook_linear_dx(dy, *weight, K, 32), (leaf(M, N, dtype=dtype),)


def cross_entropy(M: int, dtype: torch.dtype):
    head, labels = torch.randn(V, K, dtype=dtype), torch.arange(1000) % V
    labels[::3] = -100
    f = lambda x: ops.linear_cross_entropy(x, head, labels[: x.shape[0]])  # noqa: E731
    return f, (leaf(M, K, dtype=dtype),)


def lora(M: int, dtype: torch.dtype):
    weight = random_weight(N, K, 32, double_quant=True)

    def f(x, bias, A, B):
        return ops.lora_linear(x, *weight, bias, 32, A, B, 0.5)

    adapters = leaf(1, R, K, dtype=dtype), leaf(1, N, R, dtype=dtype)
    return f, (leaf(M, K, dtype=dtype), leaf(N, dtype=dtype), *adapters)


def lora_grouped(M: int, dtype: torch.dtype):
    """Several adapters and none, a dense base, dropout."""
    dense, seed, ids = torch.randn(N, K, dtype=dtype), torch.tensor(7), torch.arange(1000) % 4 - 1

    def f(x, A, B):
        groups = ops.group_rows(ids[: x.shape[0]], E)
        return ops.lora_linear(
            x, dense, None, None, None, None, 64, A, B, 0.5, groups, 0.25, seed
        )  # fmt: skip

    return f, (leaf(M, K, dtype=dtype), leaf(E, R, K, dtype=dtype), leaf(E, N, R, dtype=dtype))


def norm(M: int, dtype: torch.dtype):
    f = lambda x, w: ops.rms_norm(x, w, 1e-5, plus_one=True)  # noqa: E731
    return f, (leaf(M, K, dtype=dtype), leaf(K, dtype=dtype))


def turn(M: int, dtype: torch.dtype):
    """Keys that are the same in every row."""
    angle = torch.randn(1000, 1, 6)
    cos, sin = torch.cat([angle.cos(), angle.cos()], -1).to(dtype), angle.sin().to(dtype)

    def f(q, k):
        rows = q.shape[0]
        turned = ops.rotate(q[None], k.expand(1, rows, 2, 14), cos[None, :rows], sin[None, :rows])
        return torch.cat(turned, dim=2)

    return f, (leaf(M, 4, 14, dtype=dtype), leaf(2, 14, dtype=dtype))


def gate(M: int, dtype: torch.dtype):
    f = lambda g, u: ops.gated(g, u.expand(g.shape), "silu")  # noqa: E731
    return f, (leaf(M, K, dtype=dtype), leaf(K, dtype=dtype))


def gelu_gate(M: int, dtype: torch.dtype):
    """The halves of one tensor."""
    return lambda x: ops.gated(*x.chunk(2, -1), "gelu_tanh"), (leaf(M, 2 * K, dtype=dtype),)


CASES = {
    "codebook_linear": Case(linear, True),
    "codebook_linear_dx": Case(linear_dx, True),
    "linear_cross_entropy": Case(cross_entropy, False),
    "lora_linear": Case(lora, False),
    "lora_linear, grouped": Case(lora_grouped, False),
    "rms_norm": Case(norm, False),
    "rotate": Case(turn, True),
    "gated": Case(gate, False),
    "gated, of halves": Case(gelu_gate, False),
}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu" and (why := cpu.missing()):
        pytest.skip(why)
    with ops.use_backend(request.param):
        yield


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def run(f: Callable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The result, and the gradient of a fixed weighting of it in each input."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = f(*inputs)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if y.dim() else None
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def equal(got, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_every_differentiable_operator_is_in_the_table():
    differentiable = {n for n, op in ops.schema.OPERATORS.items() if op.backward is not None}
    constant = {"codebook_quantize", "codebook_dequantize", "lora_linear_backward"}
    constant |= {"rms_norm_backward", "gated_backward"}
    assert {name.partition(",")[0] for name in CASES} == differentiable - constant


def test_gradients_are_those_of_finite_differences(case):
    f, inputs = case.make(5, torch.float64)
    assert gradcheck(f, inputs, fast_mode=True)
    if case.twice:
        assert gradgradcheck(f, inputs, fast_mode=True)


def test_a_second_derivative_that_is_not_promised_is_an_error(backend, case):
    if case.twice:
        return
    f, inputs = case.make(5, torch.float32)
    y = f(*inputs)
    grads = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.sum() for g in grads).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its rules for it
def test_a_derivative_in_forward_mode_is_an_error_and_not_zero(case):
    f, inputs = case.make(5, torch.float32)
    plain = tuple(t.detach() for t in inputs)
    with pytest.raises(ConfigError, match="expected no tangents; got one of forward-mode"):
        torch.func.jvp(f, plain, plain)
    with forward_ad.dual_level():
        f(*plain)  # none here
        for i, t in enumerate(plain):
            dual = forward_ad.make_dual(t, t)
            with pytest.raises(ConfigError, match="expected no tangents"):
                f(*plain[:i], dual, *plain[i + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_every_run_and_with_two_threads(backend, case, dtype):
    f, inputs = case.make(40, dtype)
    results = []
    for count in (1, 1, 2):
        with using_threads(count):
            results.append(run(f, inputs))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_under_non_reentrant_checkpointing(backend, case):
    f, inputs = case.make(20, torch.float32)
    recomputed = run(lambda *inputs: checkpoint(f, *inputs, use_reentrant=False), inputs)
    assert equal(recomputed, run(f, inputs))


def test_autocast_changes_nothing(backend, case):
    f, inputs = case.make(20, torch.float32)
    expected = run(f, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(run(f, inputs), expected)


def test_gradients_accumulate_and_inputs_stay(backend, case):
    f, inputs = case.make(5, torch.float32)
    before = copy.deepcopy([t.detach() for t in inputs])
    once = torch.autograd.grad(f(*inputs).sum(), inputs)
    for _ in range(2):
        f(*inputs).sum().backward()
    for t, was, g in zip(inputs, before, once, strict=True):
        assert torch.equal(t.detach(), was)
        torch.testing.assert_close(t.grad, 2 * g)


def test_only_the_gradients_that_are_asked_for(backend, case):
    f, inputs = case.make(5, torch.float32)
    everything = run(f, inputs)
    for i, wanted in enumerate(inputs):
        some = [t.detach().requires_grad_(t is wanted) for t in inputs]
        y = f(*some)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape) if y.dim() else None
        (g,) = torch.autograd.grad(y, some[i], dy)
        torch.testing.assert_close(g, everything[1 + i], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_is_eager_and_keeps_its_graph_when_M_changes(case):
    f, inputs = case.make(5, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=COMPILER)
    # Once for 5 rows, and once more for any number of them.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for M in (5, 8, 33, 64):
            sized = (torch.randn(M, *inputs[0].shape[1:]), *inputs[1:])
            for got, expected in zip(run(compiled, sized), run(f, sized), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_exported_is_eager(case):
    f, inputs = case.make(5, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return f(*inputs)

    plain = tuple(t.detach() for t in inputs)
    rows = torch.export.Dim("rows", min=2, max=64)
    dims = ({0: rows}, *(None for _ in plain[1:]))
    program = torch.export.export(Module(), plain, dynamic_shapes=(dims,))
    for M in (5, 17):
        sized = (torch.randn(M, *plain[0].shape[1:]), *plain[1:])
        torch.testing.assert_close(program.module()(*sized), f(*sized))


def test_vmap_is_the_loop_or_says_that_it_is_not_there(case):
    f, inputs = case.make(5, torch.float32)
    plain = [t.detach() for t in inputs]
    several = torch.randn(3, *plain[0].shape)
    looped = torch.stack([f(x, *plain[1:]) for x in several])
    try:
        mapped = torch.vmap(lambda x: f(x, *plain[1:]))(several)
    except (RuntimeError, NotImplementedError) as error:
        assert "vmap" in str(error) or "Batching rule" in str(error)
        return
    torch.testing.assert_close(mapped, looped)
