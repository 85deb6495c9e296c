"""The operators lora_linear and lora_linear_backward: every backend that is here, and the formula.

The oracle is torch in float64 on the reference's mask of dropout, and autograd through that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank import ops
from lowrank.ops.reference.philox import kept
from tests.adapters.oracle import peft
from tests.ops.isas import needs_library
from tests.ops.weights import dense, random_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Products and sums of float32, and then at most two roundings to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SHAPES = [  # leading dimensions of x, K, N, R
    ((1,), 63, 123, 4),
    ((17,), 64, 64, 16),
    ((2, 9), 123, 63, 5),
    ((40,), 257, 130, 1),
    ((0,), 33, 10, 3),
    ((2, 0, 3), 33, 10, 3),
    ((), 96, 31, 8),
]
# A panel of rows ends within an adapter's rows, on CPUs.
LARGE = ((300,), 4099, 35, 7)


@dataclass
class Case:
    """The arguments of ops.lora_linear, and which adapter each row has."""

    x: Tensor
    weight: tuple[Tensor | None, ...]  # weight, absmax, absmax_scale, codebook
    bias: Tensor | None
    block_size: int
    A: Tensor
    B: Tensor
    scale: float
    ids: Tensor | None
    p: float
    seed: Tensor | None

    def run(self, x=None, bias=None, A=None, B=None) -> Tensor:
        given = (x, bias, A, B)
        own = (self.x, self.bias, self.A, self.B)
        x, bias, A, B = (o if g is None else g for g, o in zip(given, own, strict=True))
        groups = None if self.ids is None else ops.group_rows(self.ids, self.A.shape[0])
        return ops.lora_linear(
            x, *self.weight, bias, self.block_size, A, B, self.scale, groups, self.p, self.seed
        )

    def formula(self, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """The same in float64, row by row of the mask, with every step written out."""
        K = x.shape[-1]
        rows = x.reshape(-1, K)
        M = rows.shape[0]
        y = rows.new_zeros(M, B.shape[1])
        if self.weight[0] is not None:
            w = self.weight[0]
            if self.weight[3] is not None:
                w = dense(*self.weight, K, self.block_size)
            y = rows @ w.double().T
        if bias is not None:
            y = y + bias
        z = rows
        if self.seed is not None:
            z = rows * kept(torch.arange(M), K, self.p, self.seed) / (1 - self.p)
        ids = torch.zeros(M, dtype=torch.long) if self.ids is None else self.ids.long()
        for e in range(A.shape[0]):
            y = y + (ids == e)[:, None].double() * self.scale * (z @ A[e].T @ B[e].T)
        return y.view(*x.shape[:-1], B.shape[1])


def case(
    base: str, dtype: torch.dtype, shape=SHAPES[2], grouped=False, p=0.0, adapters=torch.float32
) -> Case:
    leading, K, N, R = shape
    M = torch.Size(leading).numel()
    E = 4 if grouped else 1
    x = torch.randn(*leading, K).to(dtype)
    weight: tuple[Tensor | None, ...] = (None,) * 4
    block_size = 32
    if base == "dense":
        weight = ((torch.randn(N, K) / K**0.5).to(dtype), None, None, None)
    elif base != "none":
        weight = random_weight(N, K, block_size, base == "double")
    bias = None if base == "none" else torch.randn(N).to(dtype)
    A, B = torch.randn(E, R, K) / K**0.5, torch.randn(E, N, R) / R**0.5
    ids = torch.tensor([2, -1, 0, 3])[torch.randint(4, (M,))] if grouped else None  # 1 has no row
    seed = torch.randint(-(2**62), 2**62, ()) if p else None
    return Case(x, weight, bias, block_size, A.to(adapters), B.to(adapters), 0.7, ids, p, seed)


def gradients(run, case: Case, dtype: torch.dtype | None, dy: Tensor) -> list[Tensor]:
    """y and the gradients in x, bias, A and B of `run` on the case's values, in dtype if given."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for t in (case.x, case.bias, case.A, case.B)
    ]
    y = run(*leaves)
    used = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, used, dy.to(y.dtype))]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and g.isfinite().all()
        error = (g.double() - w).norm() / w.norm().clamp(min=1e-30)
        assert error <= tolerance or not w.any(), f"result {i}: relative error {error:.2e}"
        assert w.any() or not g.any(), f"result {i}: expected zeros"


@pytest.fixture(
    params=["reference", *(pytest.param(b, marks=needs_library) for b in ("cpu", "cpu_int16"))]
)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def check(made: Case, backend: str, dy: Tensor | None = None) -> None:
    """The results of this backend and those of the formula."""
    shape = (*made.x.shape[:-1], made.B.shape[1])
    dy = torch.randn(shape).to(made.x.dtype) if dy is None else dy
    got = gradients(made.run, made, None, dy)
    want = gradients(made.formula, made, torch.float64, dy)
    leaves = [t for t in (made.x, made.bias, made.A, made.B) if t is not None]
    assert [g.dtype for g in got] == [made.x.dtype, *(t.dtype for t in leaves)]
    adapters = TOLERANCE[made.A.dtype]
    tolerance = max(TOLERANCE[made.x.dtype], adapters)
    if backend == "cpu_int16" and made.weight[3] is not None:
        tolerance += 2e-4
    assert_close(got, want, tolerance)


@pytest.mark.parametrize(
    ("grouped", "p"), [(False, 0.0), (False, 0.3), (True, 0.0), (True, 0.3)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["none", "dense", "plain", "double"])
def test_equals_the_formula(backend, base, dtype, grouped, p):
    for shape in SHAPES:
        check(case(base, dtype, shape, grouped, p), backend)


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_rows_of_several_panels(backend, grouped):
    check(case("double", torch.bfloat16, LARGE, grouped, 0.2), backend)
    check(case("dense", torch.float32, LARGE, grouped, 0.0), backend)


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
def test_many_rows_of_a_small_weight(backend, grouped):
    check(case("double", torch.float32, ((3, 135), 63, 70, 5), grouped, 0.2), backend)


@pytest.mark.parametrize("base", ["none", "dense", "plain"])
@pytest.mark.parametrize("ids", [None, [2, -1, 0, 0, 2]], ids=["one", "grouped"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_in_float64(base, ids, p):
    made = case(base, torch.float64, ((5,), 7, 6, 2), ids is not None, p, torch.float64)
    made = replace(made, ids=None if ids is None else torch.tensor(ids))
    leaves = tuple(t for t in (made.x, made.A, made.B, made.bias) if t is not None)
    for leaf in leaves:
        leaf.requires_grad_()

    def run(x, A, B, bias=None):
        return made.run(x, bias, A, B)

    assert torch.autograd.gradcheck(run, leaves)
    check(made, "reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_16_bits(backend, dtype):
    check(case("double", dtype, grouped=True, p=0.3, adapters=dtype), backend)


@pytest.mark.parametrize("base", ["none", "dense", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_every_kind(backend, base, dtype):
    leading, K, N, _ = SHAPES[2]
    for grouped, p in ((False, 0.0), (True, 0.3)):
        made = case(base, dtype, grouped=grouped, p=p)
        columns = torch.randn(K, *leading).to(dtype).movedim(0, -1)
        every_other = torch.randn(*leading, 2 * K).to(dtype)[..., ::2]
        far_rows = torch.randn(*leading, K + 5).to(dtype)[..., :K]
        alike = torch.randn(K).to(dtype).expand(*leading, K)
        for x in (columns, every_other, far_rows, alike):
            check(replace(made, x=x), backend)
        check(made, backend, torch.randn(N, *leading).to(dtype).movedim(0, -1))
        check(made, backend, torch.ones((), dtype=dtype).expand(*leading, N))
        check(replace(made, A=made.A.mT.contiguous().mT, B=made.B.mT.contiguous().mT), backend)


def test_an_adapter_for_every_order_of_rows(backend):
    """Rows that lie together, apart, backwards, all of one adapter, and of none."""
    made = case("dense", torch.float32, grouped=True, p=0.3)
    M = len(made.ids)
    shuffled = torch.arange(M) % 4
    for ids in (
        torch.arange(M) // 5,
        torch.arange(M).flip(0) // 5,
        shuffled,
        torch.full((M,), 3),
        torch.full((M,), -1),
        torch.where(shuffled == 2, -1, shuffled),
    ):
        check(replace(made, ids=ids), backend)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_what_is_not_needed_is_not_formed(backend, needs):
    made = case("plain", torch.float32, grouped=True, p=0.3)
    leaves = [t.clone().requires_grad_() for t in (made.x, made.A, made.B)]
    x, A, B = leaves
    dy = torch.randn(*x.shape[:-1], B.shape[1])
    want = torch.autograd.grad(made.run(x=x, A=A, B=B), leaves, dy)
    h = torch.ops.lowrank.lora_linear(
        made.x, *made.weight, None, 32, made.A, made.B, made.scale,
        *ops.group_rows(made.ids, 4), made.p, made.seed,
    )[1]  # fmt: skip
    nothing = made.x.new_empty(0)
    got = ops.lora_linear_backward(
        dy, made.x if needs[1] else nothing, h if needs[2] else nothing, *made.weight, 32,
        made.A, made.B, made.scale, ops.group_rows(made.ids, 4), made.p, made.seed, needs,
    )  # fmt: skip
    for g, w, need in zip(got, want, needs, strict=True):
        assert torch.equal(g, w) if need else g.shape == (0,)


def test_the_same_bits_on_every_run(backend):
    made = case("double", torch.float32, ((300,), 130, 35, 7), grouped=True, p=0.3)
    dy = torch.randn(300, 35)
    first, second = (gradients(made.run, made, None, dy) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_autocast_does_not_reach_inside(backend):
    made = case("dense", torch.float32, grouped=True)
    want = made.run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.run(), want)


def test_one_graph_for_every_batch_size_and_grouping():
    made = case("double", torch.float32, grouped=True, p=0.3)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(Case.run, fullgraph=True, dynamic=True, backend=counting)
    for M in (6, 9, 33):
        ids = torch.randint(-1, 4, (M,))
        batch = replace(made, x=torch.randn(M, made.x.shape[-1]), ids=ids)
        torch.testing.assert_close(compiled(batch), batch.run())
    assert len(graphs) == 1


def test_equals_a_mixed_batch_of_peft(backend):
    """peft's adapter_names: an adapter for each sequence, of ranks and scales of their own."""
    K, N, T = 31, 43, 5
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    ranks, alphas = {"a": 3, "b": 8, "c": 1}, {"a": 6, "b": 4, "c": 9}
    theirs = peft.tuners.lora.Linear(
        linear, "a", config=peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False),
        r=3, lora_alpha=6,
    )  # fmt: skip
    for name in ("b", "c"):
        config = peft.LoraConfig(r=ranks[name], lora_alpha=alphas[name], init_lora_weights=False)
        theirs.update_layer(name, ranks[name], alphas[name], config=config)
    names = ["b", "__base__", "a", "b", "a", "__base__"]  # nobody has c
    x, dy = torch.randn(len(names), T, K, requires_grad=True), torch.randn(len(names), T, N)
    factors = [theirs.lora_A[n].weight for n in ranks] + [theirs.lora_B[n].weight for n in ranks]
    for factor in factors:
        factor.requires_grad_()
    want_y = theirs(x, adapter_names=names)
    want = torch.autograd.grad(want_y, (x, *factors), dy, allow_unused=True)

    widest = max(ranks.values())
    A = torch.stack(
        [F.pad(theirs.lora_A[n].weight, (0, 0, 0, widest - r)) for n, r in ranks.items()]
    )
    B = torch.stack(
        [
            theirs.scaling[n] * F.pad(theirs.lora_B[n].weight, (0, widest - r))
            for n, r in ranks.items()
        ]
    )
    ids = torch.tensor([list(ranks).index(n) if n in ranks else -1 for n in names])
    groups = ops.group_rows(ids.repeat_interleave(T), len(ranks))
    y = ops.lora_linear(
        x, linear.weight, None, None, None, linear.bias, 64, A, B, 1.0, groups
    )  # fmt: skip
    got = torch.autograd.grad(y, (x, *factors), dy)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-4, atol=1e-4)


def test_group_rows_is_a_stable_sort():
    for dtype in (torch.int64, torch.int32):
        for M in (0, 1, 200):
            ids = torch.randint(-1, 5, (M,), dtype=dtype)
            order, offsets = ops.group_rows(ids, 7)
            assert order.dtype == offsets.dtype == torch.int32
            naive = [[m for m in range(M) if ids[m] == e] for e in range(-1, 7)]
            assert order.tolist() == sum(naive, [])
            ends = torch.tensor([len(rows) for rows in naive]).cumsum(0)
            assert offsets.tolist() == ends.tolist()
