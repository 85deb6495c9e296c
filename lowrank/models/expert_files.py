"""The weights of experts in files: a tensor for each expert and projection, which are rows here.

A parameter [E, N, K] is the rows of such tensors one above the other, expert after expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lowrank.errors import FileFormatError
from lowrank.io.pages import Empty, empty_bytes
from lowrank.io.safetensors import Lazy
from lowrank.models.families import Family

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


def read_rows(
    read: Callable[[str, Empty], Tensor],
    names: Sequence[str],
    shape: Shape,
    empty: Empty = empty_bytes,
) -> Tensor:
    """The tensor of this shape that the rows of those of the names make, all of one size.

    Each is read to where it belongs, in memory from `empty`. FileFormatError: dtypes differ.
    """
    if len(names) == 1:
        return read(names[0], empty)
    memory: list[Tensor] = []

    def place(i: int, n_bytes: int) -> Tensor:
        if not memory:
            memory.append(empty(n_bytes * len(names)))
        return memory[0][i * n_bytes : (i + 1) * n_bytes]

    dtypes = [read(name, partial(place, i)).dtype for i, name in enumerate(names)]
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype != dtypes[0]:
            raise FileFormatError(f"{name}: expected {dtypes[0]} as of {names[0]}; got {dtype}")
    return memory[0].view(dtypes[0]).view(shape)


def write_rows(
    names: Mapping[str, Shape], dtype: torch.dtype, rows: Callable[[int, int], Tensor]
) -> dict[str, Lazy]:
    """The tensors of these names and shapes in turn: rows(start, stop), [stop - start, K]."""
    edges = accumulate((shape[0] for shape in names.values()), initial=0)
    return {
        name: Lazy(dtype, shape, partial(rows, *edge))
        for (name, shape), edge in zip(names.items(), pairwise(edges), strict=True)
    }
