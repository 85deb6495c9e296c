"""Linear layers and their gradients in float64, and how near to them rounding lets a result be.

A result is rounded as it is written, in proportion to its value; the sum behind it is rounded as
it is formed, in proportion to the root of the sum of its terms' squares. The terms may cancel, so
neither is measured by the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor


def linear(x: Tensor, W: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
    """y = x Wᵀ + b, and its gradients in x and, where there is one, b."""
    y, dx = x @ W.T, dy @ W
    return (y, dx) if bias is None else (y + bias, dx, dy.flatten(0, -2).sum(0))


def lora(
    x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, s: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """y = x Wᵀ + b + s x Aᵀ Bᵀ, and its gradients in x, A and B."""
    h, dh = s * x @ A.T, s * dy @ B
    rows = [t.flatten(0, -2) for t in (x, h, dh, dy)]
    y, dx = x @ W.T + bias + h @ B.T, dy @ W + dh @ A
    return y, dx, rows[2].T @ rows[0], rows[3].T @ rows[1]


def assert_near(
    got: Sequence[Tensor],
    exact: Callable,
    arguments: Sequence[Tensor | None],
    tolerance: float,
    rounded: Sequence[Tensor | None] | None = None,
) -> None:
    """Each of `got` is `exact` of the arguments, all of it sums of products, but for rounding.

    Or of `rounded`, the arguments with W in the dtype of x: a CPU made for 16 bits multiplies by
    that, and where W is one number its rounding is the whole result's.
    """
    errors = [_errors(got, exact, given) for given in (arguments, rounded) if given is not None]
    for i, error in enumerate(map(min, zip(*errors, strict=True))):
        assert error <= tolerance, f"result {i}: relative error {error:.2e}"


def _errors(
    got: Sequence[Tensor], exact: Callable, arguments: Sequence[Tensor | None]
) -> Iterator[Tensor]:
    plain = [None if t is None else t.detach().double() for t in arguments]
    values = exact(*plain)
    squares = exact(*(None if t is None else t**2 for t in plain))  # of every term, summed
    for i, (g, value, square) in enumerate(zip(got, values, squares, strict=True)):
        assert g.shape == value.shape and g.isfinite().all(), f"result {i}: {tuple(g.shape)}"
        scale = max(value.norm(), square.sum().sqrt())
        yield (g.double() - value).norm() / scale.clamp(min=1e-300)
