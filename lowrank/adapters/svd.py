"""The nearest matrix of rank R to a matrix, as the two factors of an adapter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError
from lowrank.ops.checks import check_int, check_number, check_tensors

_OVERSAMPLED = 8  # directions beyond R that the fast form follows, for the last of the R to settle


def checked(weight: Tensor, r: int, num_iter: int, scaling: float) -> Tensor:
    """`weight` [N, K] in float32, or float64 if that is its dtype.

    Raises DtypeError, ShapeError, WeightError for a NaN or inf with its row, ConfigError.
    """
    check_tensors(weight=weight)
    if not weight.is_floating_point():
        raise DtypeError(f"weight: expected the unquantized one, in floats; got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ShapeError(f"weight: expected [N, K] with N, K >= 1; got {list(weight.shape)}")
    check_int("r", r, 1)
    check_int("num_iter", num_iter, 1)
    check_number("scaling", scaling)
    if scaling == 0 or not math.isfinite(scaling):
        raise ConfigError(
            "lora_alpha: expected another than 0, and finite, as the adapter starts with a part of "
            f"the weight; got a scaling of {scaling}"
        )
    weight = weight.detach()
    bad = ~weight.isfinite().all(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise WeightError(f"weight: expected finite values; got NaN or inf in row {row}")
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def factors(
    matrix: Tensor, r: int, scaling: float, floor: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """(A [R, K], B [N, R]) with s·B A = U_R S_R V_Rᵀ, the first R parts of the SVD of `matrix`.

    Both factors take √(S / |s|). With `niter` it is fast and nearly so, by that many power
    iterations on random directions, always the same ones.   Halko et al., arXiv:0909.4061, 4.4.

    Where a singular value is at most `floor`, or there is none since R > min(N, K), the row of A is
    uniform as in a fresh adapter, the same one each time, and the column of B zero: with both zero
    it would never learn.
    """
    N, K = matrix.shape
    tall = N > K
    wide = matrix.double().T if tall else matrix.double()  # [n, k], n <= k
    U = _directions(wide, r) if niter is None else _fast_directions(wide, r, niter)
    rows = U.T @ wide  # S Vᵀ, the largest first
    S = torch.linalg.vector_norm(rows, dim=1)
    found = int((floor < S).sum())
    U, rows, S = U[:, :found], rows[:found], S[:found]
    root = (S / abs(scaling)).sqrt()
    left, right = root * U, (root / S)[:, None] * rows
    A, B = (left.T, right.T) if tall else (right, left)
    return padded(A.to(matrix), (math.copysign(1, scaling) * B).to(matrix), r)


def padded(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] of R = r with the same B A, from such of R <= r.

    What is added of A is uniform, as in a fresh adapter, the same each time, and of B zero.
    """
    (found, K), N = A.shape, B.shape[0]
    bound = 1 / math.sqrt(K)
    whole = A.new_empty(r, K).uniform_(-bound, bound, generator=_generator(A.device))
    whole[:found] = A
    return whole, torch.cat([B, B.new_zeros(N, r - found)], dim=1)


def _directions(wide: Tensor, r: int) -> Tensor:
    """The first R left singular vectors of `wide` [n, k], n <= k, exactly: [n, min(R, n)].

    As eigenvectors of wide wideᵀ. In float64 that costs the large ones no digit that float32 has,
    and less time than the SVD.
    """
    return torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :r]


def _fast_directions(wide: Tensor, r: int, niter: int) -> Tensor:
    n, k = wide.shape
    random = {"generator": _generator(wide.device), "device": wide.device, "dtype": wide.dtype}
    Q = torch.linalg.qr(wide @ torch.randn(k, min(r + _OVERSAMPLED, n), **random)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(wide.T @ Q).Q
        Q = torch.linalg.qr(wide @ Q).Q
    return Q @ _directions(Q.T @ wide, r)


def _generator(device: torch.device) -> torch.Generator:
    """Of the same numbers in every call: what was made of a weight can be made of it again."""
    return torch.Generator(device).manual_seed(0)
