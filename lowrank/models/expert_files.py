"""The weights of experts in files: a tensor for each expert and projection, which are rows here.

A parameter [E, N, K] is the rows of such tensors one above the other, expert after expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from lowrank.errors import WeightError
from lowrank.io.safetensors import Lazy
from lowrank.models.families import Family
from lowrank.nn.quant_experts import QuantExperts
from lowrank.quant import Quantizer, Storage, quantizer_of

Shape = tuple[int, ...]


def in_files(
    family: Family, name: str, shape: Shape, found: Collection[str] = ()
) -> dict[str, Shape]:
    """The tensors, and their shapes, that files have for the parameter `name`, in order of rows.

    That is a parameter's own name where there are no experts, or where `found` has it.
    """
    if not family.mixture or name in found:
        return {name: shape}
    mixture, gate, up, down = family.expert_files
    start, part, leaf = name.rpartition(f".{family.names['mlp']}.")
    if not part:
        return {name: shape}
    projections = {"experts.gate_up_proj": (gate, up), "experts.down_proj": (down,)}.get(leaf)
    if projections is None:
        return {f"{start}.{mixture}.{leaf}": shape}
    E, N, K = shape
    rows = (N // len(projections), K)
    return {
        f"{start}.{mixture}.experts.{e}.{projection}.weight": rows
        for e in range(E)
        for projection in projections
    }


class Gathered:
    """Weights of experts of this shape, made of their rows as these come from files.

    A row-local quantizer quantizes each part by itself, so that only codes are ever held; what
    others, or none, need is held as a whole.
    """

    def __init__(
        self,
        shape: Shape,
        quantizer: Quantizer | None,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self._shape, self._quantizer = shape, quantizer
        self._dtype, self._compute_dtype = dtype, compute_dtype
        self._filled, self._parts, self._whole = 0, [], None

    def add(self, rows: Tensor | Storage) -> nn.Parameter | QuantExperts | None:
        """The weights, when the last rows are there; None before.

        All rows may be quantized already, and are alike then: WeightError.
        """
        E, N, K = self._shape
        start = self._filled
        if isinstance(rows, Storage):
            by_parts, first = True, self._parts[0] if self._parts else rows
            if (rows.scheme, rows.options) != (first.scheme, first.options):
                raise WeightError(
                    f"expected all experts in {first.scheme}, {dict(first.options)}; got "
                    f"{rows.scheme}, {dict(rows.options)}"
                )
            self._quantizer = quantizer_of(first)
        else:
            rows = rows.view(-1, K)
            by_parts = getattr(self._quantizer, "row_local", False) and len(rows) > 1
            if by_parts:
                rows = self._quantizer.quantize(rows)
        self._filled += rows.shape[0]
        if by_parts:
            self._parts.append(rows)
        else:
            if self._whole is None:
                dtype = self._dtype if self._quantizer is None else rows.dtype
                self._whole = rows.new_empty(E * N, K, dtype=dtype)
            self._whole[start : self._filled] = rows
        if self._filled < E * N:
            return None
        if self._quantizer is None:
            return nn.Parameter(self._whole.view(self._shape))
        storage = (
            Storage.of_rows(self._parts) if by_parts else self._quantizer.quantize(self._whole)
        )
        storage = replace(storage, dtype=self._dtype)
        return QuantExperts.from_storage(storage, self._quantizer, E, self._compute_dtype)


def write_rows(
    names: Mapping[str, Shape], dtype: torch.dtype, rows: Callable[[int, int], Tensor]
) -> dict[str, Lazy]:
    """The tensors of these names and shapes in turn: rows(start, stop), [stop - start, K]."""
    edges = accumulate((shape[0] for shape in names.values()), initial=0)
    return {
        name: Lazy(dtype, shape, partial(rows, *edge))
        for (name, shape), edge in zip(names.items(), pairwise(edges), strict=True)
    }
