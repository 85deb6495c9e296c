"""Batches whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Sequence

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

    def among(self, here: Sequence[str]) -> list[str]:
        """Those of the adapters that a layer has, in the order of their first rows."""
        return [a for a in dict.fromkeys(self.adapters) if a is not None and a in here]

    def groups(self, adapters: Sequence[str], each: int, device: torch.device) -> tuple:
        """(order, offsets) of ops.lora_linear for x that has `each` rows for one of the batch.

        Rows of other adapters than these have none.
        """
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

    def parts(self, here: Sequence[str], device: torch.device) -> list[tuple[list[str], Tensor]]:
        """(adapters, row numbers) of each part of the batch, those without adapters first."""
        number: dict[str | None, list[int]] = {None: []}
        for row, adapter in enumerate(self.adapters):
            number.setdefault(adapter if adapter in here else None, []).append(row)
        return [
            ([] if adapter is None else [adapter], torch.tensor(rows, device=device))
            for adapter, rows in number.items()
            if rows
        ]


def stacked(branches: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """A [E, R, K] and B [E, N, R] of E branches (A, B, s): ranks filled up by 0, s part of B."""
    R = max(len(A) for A, _, _ in branches)
    A = torch.stack([_filled(A, (0, 0, 0, R - len(A))) for A, _, _ in branches])
    B = torch.stack([_filled(s * B, (0, R - B.shape[1])) for _, B, s in branches])
    return A, B


def _filled(tensor: Tensor, widths: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(tensor, widths) if any(widths) else tensor
