"""Which bytes of which chunk hold the states of which part of a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.optim.rules import Piece, Rule, State, next_piece

ALIGNMENT = 64  # bytes: of every state in a chunk
LEAST = 1 / 8  # of a chunk: what is left of one is not filled up with smaller pieces


class Place(NamedTuple):
    """Where a part's share of one state is."""

    byte: int  # in the chunk
    first: int  # element of the parameter's flat state
    state: State

    def view(self, memory: Tensor) -> Tensor:
        """It as it lies in the chunk's memory."""
        nbytes = math.prod(self.state.shape) * self.state.dtype.itemsize
        return memory.narrow(0, self.byte, nbytes).view(self.state.dtype).view(self.state.shape)

    def share(self, whole: Tensor) -> Tensor:
        """It in the parameter's state, a contiguous one: a view of the same shape."""
        elements = math.prod(self.state.shape)
        return whole.view(-1).narrow(0, self.first, elements).view(self.state.shape)


class Part(NamedTuple):
    """A parameter, or a piece of it, and the places of its states."""

    p: Tensor
    piece: Piece | None  # None: the whole parameter
    places: Mapping[str, Place]

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the parameter, or of its gradient: a view of what is contiguous."""
        return tensor if self.piece is None else self.piece.of(tensor)


class Chunk(NamedTuple):
    """The parts whose states one chunk holds, and its bytes."""

    parts: list[Part]
    size: int

    def fill(self, memory: Tensor) -> None:
        """Give all states what they are before the first step."""
        memory.zero_()
        for part in self.parts:
            for place in part.places.values():
                if place.state.fill:
                    place.view(memory).fill_(place.state.fill)


def plan(rule: Rule, params: Iterable[Tensor], chunk_bytes: int) -> list[Chunk]:
    """The states of these parameters by that rule in as few chunks as may be.

    A parameter that does not fit what is left of a chunk is in pieces; in its flat states, theirs
    follow one another in the order of the plan.
    """
    chunks: list[Chunk] = []
    parts: list[Part] = []
    size = 0
    for p in params:
        first: dict[str, int] = {}
        start = 0
        while start < p.numel():
            piece = _piece(rule, p, start, chunk_bytes - size, chunk_bytes)
            if piece is None:
                chunks.append(Chunk(parts, size))
                parts, size = [], 0
                piece = _piece(rule, p, start, chunk_bytes, chunk_bytes)
                assert piece is not None
            elements = piece.rows * piece.columns
            whole = elements == p.numel()
            states = rule.states(p if whole else _like(p, (piece.rows, piece.columns)))
            places = {}
            for name, state in states.items():
                places[name] = Place(size, first.get(name, 0), state)
                size += _bytes({name: state})
                first[name] = places[name].first + math.prod(state.shape)
            parts.append(Part(p, None if whole else piece, places))
            start += elements
    return [*chunks, Chunk(parts, size)] if parts else chunks


def _piece(rule: Rule, p: Tensor, start: int, left: int, chunk_bytes: int) -> Piece | None:
    """What of p, from `start` on, `left` bytes have room for; None: begin another chunk."""
    states = rule.states(p)
    exact = sum(math.prod(state.shape) * state.dtype.itemsize for state in states.values())
    most, ever = (
        (room - ALIGNMENT * len(states)) * p.numel() // exact for room in (left, chunk_bytes)
    )
    columns = rule.layout(p.shape)[1]
    if p.numel() - start > most and (left < chunk_bytes * LEAST or most < columns <= ever):
        return None  # too little for a piece, or a row would be cut that need not be
    return next_piece(rule, p.shape, start, most)


def _like(p: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=p.dtype, device="meta")


def _bytes(states: Mapping[str, State]) -> int:
    exact = (math.prod(state.shape) * state.dtype.itemsize for state in states.values())
    return sum(-(-n // ALIGNMENT) * ALIGNMENT for n in exact)
