"""EVA: adapters that start with the directions in which their inputs vary.   arXiv:2410.07170."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ROWS = 1024  # of inputs that are decomposed at once


class Components:
    """The first principal components of rows that come some at a time.

    What is kept of all rows so far is S V [R, K] of their SVD about their mean, the mean and the
    sum of squares about it. Ross et al., Incremental Learning for Robust Visual Tracking, 2008.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._rows = 0
        self._spread, self._mean, self._squares = torch.empty(0), torch.empty(0), 0.0

    def update(self, x: Tensor) -> None:
        """Take more rows [M, K]."""
        for rows in x.double().split(_ROWS):
            M, mean = rows.shape[0], rows.mean(0)
            rows = rows - mean
            if self._rows:
                share = self._rows * M / (self._rows + M)
                between = share**0.5 * (self._mean - mean)
                mean = (self._rows * self._mean + M * mean) / (self._rows + M)
                rows = torch.cat([rows, between[None]])
            self._squares += rows.square().sum().item()
            if self._rows:
                rows = torch.cat([self._spread, rows])
            self._rows, self._mean = self._rows + M, mean
            directions = torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)
            self._spread = directions[:, : self.count].T @ rows

    @property
    def singular_values(self) -> Tensor:
        """S [R], the largest first."""
        return self._spread.norm(dim=1)

    @property
    def vectors(self) -> Tensor:
        """V [R, K], of length 1, the largest element of each positive."""
        largest = self._spread.gather(1, self._spread.abs().argmax(1, keepdim=True))
        return torch.nn.functional.normalize(self._spread, dim=1) * largest.sign()

    @property
    def explained(self) -> Tensor:
        """The share [R] of the variance of the rows that is along each of them."""
        return self.singular_values.square() / max(self._squares, torch.finfo(torch.double).tiny)


def distribute(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """The rank of each layer: as many of the `budget` largest shares of variance as are its own."""
    names = [name for name, shares in explained.items() for _ in shares]
    order = torch.cat(list(explained.values())).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(explained, 0)
    for i in order[:budget].tolist():
        ranks[names[i]] += 1
    return ranks
