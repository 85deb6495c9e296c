"""The weighted sum of several adapters of one matrix, as two factors again.

A term (A [R, K], B [N, R], s, w) stands for w·ΔW = w·s·B A. What is pruned to `density` of its
elements is each factor where the pruned terms are summed, which costs no exactness; and ΔW itself
where signs are elected, and in the methods named `_svd`: then the sum is of any rank, and the
nearest one of the rank asked for is taken.

TIES: Yadav et al., arXiv:2306.01708.   DARE: Yu et al., arXiv:2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import svd

Term = tuple[Tensor, Tensor, float, float]

_FACTORS_PRUNED = ("magnitude_prune", "dare_linear")
_SIGNS_ELECTED = ("ties", "ties_svd", "dare_ties", "dare_ties_svd")
_PRODUCTS_PRUNED = (*_SIGNS_ELECTED, "magnitude_prune_svd", "dare_linear_svd")

WITH_DENSITY = (*_FACTORS_PRUNED, *_PRODUCTS_PRUNED)
WITH_RANK = ("svd", *_PRODUCTS_PRUNED)
METHODS = ("linear", "cat", "svd", *WITH_DENSITY)
SIGN_METHODS = ("total", "frequency")


def combine(
    terms: Sequence[Term],
    method: str,
    rank: int,
    density: float,
    sign_method: str,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(A [R', K], B [N, R']) of the combined adapter, whose s is 1.

    R' is the sum of all R, but in "linear" at most min(N, K); WITH_RANK, it is `rank` or what less
    is enough. `generator` is a CPU's, so that DARE's choice is the same on every device.
    """
    N, K, total = terms[0][1].shape[0], terms[0][0].shape[1], sum(len(A) for A, *_ in terms)
    if method in _PRODUCTS_PRUNED:
        deltas = [_pruned(s * (B @ A), method, density, generator) for A, B, s, _ in terms]
        weighted = torch.stack([w * d for (*_, w), d in zip(terms, deltas, strict=True)])
        if method in _SIGNS_ELECTED:
            elected = _elected(torch.stack(deltas), sign_method)
            merged = (weighted * elected).sum(0) / elected.sum(0).clamp(min=1)
        else:
            merged = weighted.sum(0)
        return _nearest(merged, min(rank, N, K))
    if method in _FACTORS_PRUNED:
        terms = [(*(_pruned(t, method, density, generator) for t in (A, B)), s, w)
                 for A, B, s, w in terms]  # fmt: skip
    A = torch.cat([abs(w * s) ** 0.5 * A for A, _, s, w in terms])
    B = torch.cat([_signed_root(w * s) * B for _, B, s, w in terms], dim=1)
    if method == "svd":
        return _compressed(A, B, min(rank, total, N, K))
    if method == "linear" and total > min(N, K):
        return _compressed(A, B, min(N, K))
    return A, B


def _signed_root(c: float) -> float:
    return abs(c) ** 0.5 if c >= 0 else -(abs(c) ** 0.5)


def _pruned(values: Tensor, method: str, density: float, generator: torch.Generator) -> Tensor:
    """DARE keeps each element by chance and makes up for the rest; else the largest are kept."""
    if method.startswith("dare"):
        chances = torch.full(values.shape, density, device="cpu")
        return values * torch.bernoulli(chances, generator=generator).to(values) / density
    kept = max(1, int(density * values.numel()))
    largest = values.abs().flatten().topk(kept).indices
    mask = torch.zeros_like(values).flatten().index_fill_(0, largest, 1)
    return values * mask.view_as(values)


def _elected(deltas: Tensor, sign_method: str) -> Tensor:
    """1 where an element of `deltas` [adapters, N, K] has the sign that its place elects, else 0.

    "total": the sign of the sum; "frequency": that of most of them; a tie elects plus.
    """
    ballots = deltas if sign_method == "total" else deltas.sign()
    elected = torch.where(ballots.sum(0) >= 0, 1.0, -1.0)
    return (deltas.sign() == elected).to(deltas)


def _compressed(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest B A of this rank, by the SVD of a matrix no larger than R x R."""
    left, core = torch.linalg.qr(B.double())
    right, coax = torch.linalg.qr(A.double().T)
    small_A, small_B = _nearest(core @ coax.T, rank)
    return (small_A @ right.T).to(A), (left @ small_B).to(B)


def _nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    floor = torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(matrix))
    return svd.factors(matrix, rank, 1.0, floor)
