"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import."""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Two roundings, of gradient and dx, of 2^-11 each; bfloat16 the interpreter truncates, by 2^-7.
TOLERANCE = {F32: 2e-6, F16: 2**-10 + 2e-6, BF16: 2**-6 + 2e-6}
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (F16, F32)]  # of x and weight
SHAPES = [(1, 1, 2), (33, 17, 63), (9, 24, 4096), (6, 8, 4100), (5, 3, 9001)]


def example(
    T: int, H: int, V: int, dtypes: tuple[torch.dtype, torch.dtype], g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H] with gaps in memory, weight [V, H], labels; half of these are missing."""
    x = torch.randn(T, 2 * H, generator=g).to(dtypes[0])[:, ::2]
    weight = (torch.randn(V, H, generator=g) / H**0.5).to(dtypes[1])
    labels = torch.randint(0, V, (T,), generator=g)
    labels[torch.rand(T, generator=g) < 0.5] = -100
    labels[0] = V - 1
    return x, weight, labels


def exact(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and dx of torch's cross entropy in float64, and the magnitudes that dx is summed of."""
    z = (x.double() @ weight.double().T).requires_grad_()
    loss = F.cross_entropy(z, labels, ignore_index=-100, reduction="sum")
    (dz,) = torch.autograd.grad(loss, z)
    return loss.detach(), dz @ weight.double(), dz.abs() @ weight.double().abs()


def check(loss: Tensor, dx: Tensor, want: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    exact_loss, exact_dx, bound = want
    assert abs(loss.item() - exact_loss.item()) <= 3e-6 * max(1, exact_loss.item())
    error = (dx.double() - exact_dx).abs()
    worst = (error / bound.clamp(min=1e-30)).max().item()
    subnormal = torch.finfo(dx.dtype).smallest_normal
    assert (error <= tolerance * bound + subnormal).all(), worst


def logits_as_product(z: Tensor) -> tuple[Tensor, Tensor]:
    """x, W with x Wᵀ = z exactly, so that dx is the gradient of each logit."""
    return z, torch.eye(z.shape[1], dtype=z.dtype, device=z.device)


def hard_logits(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits [6, 4200] with infinities and NaN, and labels."""
    z = torch.randn(6, 4200, generator=g)
    z[0, ::2] = -torch.inf  # not the label
    z[1, :4199] = -torch.inf  # all but the label
    z[2, 7] = -torch.inf  # the label
    z[3, 9] = torch.inf
    z[4, 11] = torch.nan
    z[5] = -torch.inf
    return z, torch.tensor([1, 4199, 7, 3, 3, 3])


def launched(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses, and each logit's gradient in `dtype` in its place, from the kernel itself."""
    from lowrank.kernels import configs
    from lowrank.kernels.softmax_cross_entropy import softmax_cross_entropy_kernel

    (M, V), gradient = logits.shape, logits.view(dtype)
    losses = torch.empty(M, device=logits.device)
    softmax_cross_entropy_kernel[(M,)](
        logits, labels, losses, gradient, V, gradient.stride(0), 1.0,
        GRADIENT=True, **configs.softmax_cross_entropy(V),
    )  # fmt: skip
    return losses, gradient[:, :V]


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.errors import DataError
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of NaN
    g = torch.Generator().manual_seed(seed)
    run = interpreted.linear_cross_entropy

    for dtypes in DTYPES:
        for T, H, V in SHAPES:
            context = f"{dtypes} {T=} {H=} {V=} {seed=}"
            x, weight, labels = example(T, H, V, dtypes, g)
            assert interpreted.refuse("linear_cross_entropy", x, weight, labels, True) is None
            loss, dx = run(x, weight, labels, True)
            assert dx.dtype == x.dtype and loss.dtype == F32 and loss.shape == (), context
            check(loss, dx, exact(x, weight, labels), TOLERANCE[x.dtype])
            assert (dx[labels < 0] == 0).all(), context
            again = run(x, weight, labels, True)
            assert torch.equal(loss, again[0]) and torch.equal(dx, again[1]), context
            alone, nothing = run(x, weight, labels, False)
            assert torch.equal(alone, loss) and nothing.numel() == 0, context

    for spread in (0.01, 30.0, 1000.0):
        z, labels = torch.randn(7, 4099, generator=g) * spread, torch.arange(7) * 600
        loss, dx = run(*logits_as_product(z), labels, True)
        _, want, _ = exact(*logits_as_product(z), labels)
        assert (dx - want).abs().max() < 5e-7 + 6e-8 * z.abs().max(), f"{spread=} {seed=}"

    # A probability of 2^-17 is below the smallest normal float16, yet keeps its 11 bits.
    z = torch.zeros(1, 1 << 12).half()
    _, dx = run(*logits_as_product(z), torch.tensor([5]), True)
    assert (dx[0, 6:] == 2**-12).all() and dx[0, 5] == torch.tensor(2**-12 - 1).half()

    z, labels = hard_logits(g)
    want = F.cross_entropy(z.double(), labels, reduction="none")
    for dtype in TOLERANCE:
        losses, gradient = launched(z.clone(), labels, dtype)
        torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
        expected = z.double().softmax(1)
        expected[torch.arange(6), labels] -= 1
        torch.testing.assert_close(
            gradient.double(), expected, rtol=TOLERANCE[dtype], atol=1e-7, equal_nan=True
        )

    x, weight, labels = example(6, 8, 30, (F32, F32), g)
    for T in (0, 6):
        loss, dx = run(x[:T], weight, torch.full((T,), -100), True)
        assert loss == 0 and dx.shape == (T, 8) and (dx == 0).all()
    for wrong in (30, -1, -101):
        labels[3] = wrong
        try:
            run(x, weight, labels, True)
        except DataError as error:
            assert f"got {wrong};" in str(error)
        else:
            raise AssertionError(f"label {wrong} was taken")
    assert "float64" in interpreted.refuse("linear_cross_entropy", x.double(), weight, labels, True)
    print("all right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
