"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import.

What is exact is the reference in float64, and each error is held to the sum of the magnitudes of
its terms: the reference again, of magnitudes alone.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.interpreted_dequantize import random_weight
from tests.ops.interpreted_linear import TOLERANCE

BASES = ("none", "dense", "codes")
# M, N, K, R, E: every tile of rows, ranks in blocks, sums over K and N in parts, E > rows
SHAPES = [
    (1, 9, 63, 3, 1),
    (1, 40, 300, 17, 1),
    (5, 33, 257, 4, 9),
    (17, 300, 123, 16, 1),
    (33, 70, 41, 5, 3),
    (65, 24, 67, 8, 1),
    (67, 50, 40, 33, 3),
    (18, 130, 66, 130, 2),
]
G = 32


class Case(NamedTuple):
    """The arguments of an operator, and what its base stands for: float32, or the base itself."""

    dy: Tensor
    x: Tensor
    base: tuple  # weight, absmax, absmax_scale, codebook
    dense: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    last: tuple  # scale, order, offsets, p, seed

    def to(self, device: str) -> Case:
        """On that device; x and dy with consecutive rows, as a transpose leaves them."""

        def move(t):
            if isinstance(t, tuple):
                return tuple(map(move, t))
            return t.to(device) if isinstance(t, Tensor) else t

        dy, x, *rest = self
        dy, x = (t.to(device).T.contiguous().T for t in (dy, x))
        return Case(dy, x, *map(move, rest))

    def arguments(self) -> tuple:
        return self.x, *self.base, self.bias, G, self.A, self.B, *self.last

    def exact(self, change) -> tuple:
        """As `arguments`, each tensor of numbers after `change`, a function of float64."""
        x, dense, bias, A, B = (
            None if t is None else change(t.double())
            for t in (self.x, self.dense, self.bias, self.A, self.B)
        )
        return x, dense, None, None, None, bias, G, A, B, abs(self.last[0]), *self.last[1:]


def random_case(shape: tuple, base: str, dtype: torch.dtype, p: float, g: torch.Generator) -> Case:
    """Random tensors, x and dy not contiguous, adapters in float32 or in `dtype`."""
    from lowrank import ops
    from lowrank.ops import reference

    M, N, K, R, E = shape
    quantized = random_weight(N, K, G, *torch.randint(2, (2,), generator=g).bool().tolist(), g)
    dense = reference.codebook_dequantize(*quantized, K, G, torch.float32)
    weight: tuple = quantized
    if base != "codes":
        dense = None if base == "none" else dense.to(dtype)
        weight = (dense, None, None, None)
    narrow = torch.randint(2, (1,), generator=g).item()
    A, B = (
        torch.randn(s, generator=g).to(dtype if narrow else torch.float32)
        for s in ((E, R, K), (E, N, R))
    )
    groups: tuple = (None, None)
    if E > 1:  # the last adapter has no rows, and adapter 0 has many
        ids = torch.randint(-1, E - 1, (M,), generator=g)
        groups = ops.group_rows(ids.masked_fill(torch.rand(M, generator=g) < 0.3, 0), E)
    seed = torch.randint(-(2**62), 2**62, (), generator=g) if p else None
    return Case(
        dy=torch.randn(N, M, generator=g).to(dtype).T,
        x=torch.randn(2 * M, 2 * K, generator=g).to(dtype)[::2, 1::2],
        base=weight,
        dense=dense,
        bias=None if base == "none" else torch.randn(N, generator=g).to(dtype),
        A=A,
        B=B,
        last=(0.75, *groups, p, seed),
    )


def check(
    got: Tensor, exact: Tensor, bound: Tensor, tolerance: dict[torch.dtype, float], context: str
) -> None:
    """Within the tolerance of its dtype of `exact`, relative to the terms' magnitudes `bound`."""
    assert got.shape == exact.shape and torch.isfinite(got).all(), context
    error = (got.double() - exact).abs()
    allowed = tolerance[got.dtype] * bound + torch.finfo(got.dtype).smallest_normal
    worst = (error / bound.clamp(min=1e-30)).max() if error.numel() else 0
    assert (error <= allowed).all(), f"{context} {worst}"


def check_case(backend, case: Case, tolerance: dict[torch.dtype, float], context: str) -> tuple:
    """Forward and backward near float64, and the same bits twice; returns what backward takes."""
    from lowrank.ops import reference

    arguments, exact, sizes = case.arguments(), case.exact(lambda t: t), case.exact(torch.abs)
    y, h = backend.lora_linear(*arguments)
    names = ("y", "h")
    for name, got, want, bound in zip(
        names, (y, h), reference.lora_linear(*exact), reference.lora_linear(*sizes), strict=True
    ):
        check(got, want, bound, tolerance, f"{name} {context}")
    for first, second in zip((y, h), backend.lora_linear(*arguments), strict=True):
        assert torch.equal(first, second), context

    rest = (*case.base, *arguments[6:])
    gradients = backend.lora_linear_backward(case.dy, case.x, h, *rest, [True] * 3)
    wants = reference.lora_linear_backward(
        case.dy.double(), exact[0], h.double(), *exact[1:5], *exact[6:], [True] * 3
    )
    bounds = reference.lora_linear_backward(
        case.dy.double().abs(), sizes[0], h.double().abs(), *sizes[1:5], *sizes[6:], [True] * 3
    )
    for name, got, want, bound in zip(("dx", "dA", "dB"), gradients, wants, bounds, strict=True):
        check(got, want, bound, tolerance, f"{name} {context}")
    again = backend.lora_linear_backward(case.dy, case.x, h, *rest, [True] * 3)
    assert all(map(torch.equal, again, gradients)), context
    return h, rest, gradients


def check_each_alone(backend, case: Case, h: Tensor, rest: tuple, gradients: tuple) -> None:
    """What is not needed comes back empty, and what is needed is the same without it."""
    nothing = case.x.new_empty(0)
    for i in range(3):
        needs = [i == j for j in range(3)]
        x, kept_h = (case.x if needs[1] else nothing), (h if needs[2] else nothing)
        alone = backend.lora_linear_backward(case.dy, x, kept_h, *rest, needs)
        assert torch.equal(alone[i], gradients[i]), f"gradient {i} alone"
        assert [t.numel() for j, t in enumerate(alone) if j != i] == [0, 0]


def check_masks(backend, g: torch.Generator, device: str) -> None:
    """What is dropped of h, dx and dA is what the reference drops, in every tile."""
    from lowrank.ops.reference.philox import kept

    seed = torch.randint(-(2**62), 2**62, (), generator=g).to(device)
    nothing, base, last = torch.empty(0, device=device), (None,) * 4, (1.0, None, None, 0.4, seed)
    for M, K in itertools.product((20, 70), (33, 130)):
        dtype = torch.float32 if M == 20 else torch.float16  # of other tiles
        want = kept(torch.arange(M, device=device), K, 0.4, seed)
        ones = torch.ones(M, K, dtype=dtype, device=device)
        A, B = torch.eye(K, device=device)[None], torch.ones(1, 2, K, device=device)
        _, h = backend.lora_linear(ones, *base, None, G, A, B, *last)
        assert torch.equal(h != 0, want), f"h {M=} {K=} {dtype}"
        A, B = torch.ones(1, 3, K, device=device), torch.ones(1, 2, 3, device=device)
        dy = ones[:, :2].contiguous()
        dx, _, _ = backend.lora_linear_backward(
            dy, nothing, nothing, *base, G, A, B, *last, [True, False, False]
        )
        assert torch.equal(dx != 0, want), f"dx {M=} {K=} {dtype}"
        _, dA, _ = backend.lora_linear_backward(
            dy, ones, nothing, *base, G, A, B, *last, [False, True, False]
        )
        sums = 2 / (1 - 0.4) * want.sum(0)
        torch.testing.assert_close(dA, sums.expand(1, 3, K).float())


def check_distant_masks(g: torch.Generator, device: str) -> None:
    """Rows whose counters have more than 32 bits, and every order of p."""
    import triton

    from lowrank.ops.reference.philox import kept, threshold
    from tests.ops.mask_kernel import mask_kernel

    K, seed = 83, torch.randint(-(2**62), 2**62, (), generator=g).to(device)
    rows = torch.tensor([3, 2**30, 2**34 + 5, 2**40], device=device)
    for p, width in itertools.product((1e-12, 0.25, 0.5, 0.75, 1 - 1e-12), (16, 64)):
        out = torch.empty(4, K, dtype=torch.int8, device=device)
        mask_kernel[(triton.cdiv(K, width),)](rows, seed, out, K, threshold(p) - 2**31, width)
        assert torch.equal(out.bool(), kept(rows, K, p, seed)), f"{p=} {width=} {seed=}"


def check_rows_without_an_adapter(backend, g: torch.Generator, device: str) -> None:
    """Their h is 0; what is not finite in them, or in an adapter of no rows, stays there."""
    from lowrank import ops

    M, N, K, R, E = 19, 20, 36, 4, 3
    case = random_case((M, N, K, R, E), "dense", torch.float32, 0.0, g).to(device)
    ids = torch.tensor([-1, 0, 2] * M)[:M].to(device)
    groups = ops.group_rows(ids, E)
    x, dy, A = case.x.clone(), case.dy.clone(), case.A.clone()
    x[ids < 0], dy[ids < 0], A[1] = float("nan"), float("inf"), float("nan")
    rest = (A, case.B, 0.75, *groups, 0.0, None)
    y, h = backend.lora_linear(x, *case.base, case.bias, G, *rest)
    assert (h[ids < 0] == 0).all() and torch.isfinite(y[ids >= 0]).all()
    dx, dA, dB = backend.lora_linear_backward(dy, x, h, *case.base, G, *rest, [True] * 3)
    assert torch.isfinite(dx[ids >= 0]).all() and (dA[1] == 0).all() and (dB[1] == 0).all()
    assert torch.isfinite(dA).all() and torch.isfinite(dB).all()


def check_no_rows(backend, g: torch.Generator, device: str) -> None:
    case = random_case((0, 6, 8, 2, 1), "codes", torch.float32, 0.5, g).to(device)
    y, h = backend.lora_linear(*case.arguments())
    assert y.shape == (0, 6) and h.shape == (0, 2)
    rest = (*case.base, *case.arguments()[6:])
    dx, dA, dB = backend.lora_linear_backward(case.dy, case.x, h, *rest, [True] * 3)
    assert dx.shape == (0, 8) and (dA == 0).all() and (dB == 0).all()


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of NaN
    g = torch.Generator().manual_seed(seed)
    check_masks(interpreted, g, "cpu")
    check_distant_masks(g, "cpu")
    check_rows_without_an_adapter(interpreted, g, "cpu")
    check_no_rows(interpreted, g, "cpu")
    cases = list(itertools.product(SHAPES, BASES))
    for i, (shape, base) in enumerate(cases):
        dtype, p = list(TOLERANCE)[i // 2 % 3], (0.0, 0.3)[i % 2]
        case = random_case(shape, base, dtype, p, g)
        context = f"M, N, K, R, E = {shape} {base} {dtype} {p=} A {case.A.dtype} {seed=}"
        assert interpreted.refuse("lora_linear", case.x) is None
        made = check_case(interpreted, case, TOLERANCE, context)
        if i % 5 == 0:
            check_each_alone(interpreted, case, *made)
    print(f"{len(cases)} cases right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
