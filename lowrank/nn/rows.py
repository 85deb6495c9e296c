"""Batches whose rows have different adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lowrank.errors import ShapeError


class Rows:
    """Which adapter each row of a batch has, None for none; a row is what one index of x[i] gives.

    What is made of it is kept, as a model asks for the same in every layer.
    """

    def __init__(self, adapters: Sequence[str | None]) -> None:
        self.adapters = tuple(adapters)
        self._groups: dict[tuple, tuple[Tensor, Tensor]] = {}

    def check(self, x: Tensor) -> None:
        """Raises ShapeError if the first dimension of `x` is not the batch."""
        if x.dim() == 0 or x.shape[0] != len(self.adapters):
            raise ShapeError(
                f"adapter_rows: expected x [{len(self.adapters)}, ...], a row for each adapter "
                f"given; got {list(x.shape)}, whose first dimension is not the batch"
            )

    def as_batch(self, x: Tensor) -> Tensor:
        """x [..., K] of a linear layer as [rows, ..., K]; raises ShapeError as `check` does."""
        self.check(x)
        return x

    def among(self, here: Sequence[str]) -> list[str]:
        """Those of the adapters that a layer has, in the order of their first rows."""
        return [a for a in dict.fromkeys(self.adapters) if a is not None and a in here]

    def groups(self, adapters: Sequence[str], x: Tensor) -> tuple[Tensor, Tensor]:
        """(order, offsets) of ops.lora_linear for x [..., K]; rows of other adapters have none."""
        each, device = math.prod(self.as_batch(x).shape[1:-1]), x.device
        key = (*adapters, each, device)
        if not torch.compiler.is_compiling() and key in self._groups:
            return self._groups[key]
        number = {adapter: e for e, adapter in enumerate(adapters)}
        ids = [number.get(adapter, -1) for adapter in self.adapters]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        firsts = [sum(i < e for i in ids) for e in range(len(adapters) + 1)]
        within = torch.arange(each, dtype=torch.int32, device=device)
        rows = torch.tensor(order, dtype=torch.int32, device=device)[:, None] * each + within
        offsets = torch.tensor(firsts, dtype=torch.int32, device=device) * each
        groups = rows.flatten(), offsets
        if not torch.compiler.is_compiling():
            self._groups[key] = groups
        return groups

    def parts(self, here: Sequence[str], x: Tensor) -> list[tuple[list[str], Tensor]]:
        """(adapters, row numbers) of each part of x [rows, ...], those without adapters first."""
        self.check(x)
        each = x.shape[0] // len(self.adapters)
        number: dict[str | None, list[int]] = {None: []}
        for i, adapter in enumerate(self.adapters):
            rows = number.setdefault(adapter if adapter in here else None, [])
            rows += range(i * each, (i + 1) * each)
        return [
            ([] if adapter is None else [adapter], torch.tensor(rows, device=x.device))
            for adapter, rows in number.items()
            if rows
        ]


class Copies(Rows):
    """Which adapter each copy of a batch has: x is all of the first copy, then all of the second.

    What comes to a linear layer may have lost the batch's own shape: the tokens of all copies end
    to end, or those alone that are learned, as many of each copy.
    """

    def check(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[0] % len(self.adapters):
            self._refuse(x)

    def as_batch(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or math.prod(x.shape[:-1]) % len(self.adapters):
            self._refuse(x)
        return x.reshape(len(self.adapters), -1, x.shape[-1])

    def _refuse(self, x: Tensor) -> NoReturn:
        raise ShapeError(
            f"adapter_copies: expected as many rows for each of {len(self.adapters)} adapters; "
            f"got {list(x.shape)}, which is no batch repeated so often"
        )


def stacked(branches: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """A [E, R, K] and B [E, N, R] of E branches (A, B, s): ranks filled up by 0, s part of B."""
    R = max(len(A) for A, _, _ in branches)
    A = torch.stack([_filled(A, (0, 0, 0, R - len(A))) for A, _, _ in branches])
    B = torch.stack([_filled(s * B, (0, R - B.shape[1])) for _, B, s in branches])
    return A, B


def _filled(tensor: Tensor, widths: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(tensor, widths) if any(widths) else tensor
