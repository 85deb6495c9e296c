"""The keys and values of the positions so far, as far back as a layer can still look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.models.config import DecoderConfig


class KVCache:
    """Keys and values of the positions so far, preallocated for `capacity` positions.

    Each layer's are [B, places, num_key_value_heads, head_dim]; `length` positions have been given.
    A layer that sees all has a place for each. One that sees a window has an eighth more than those
    of the window, which go back to the front where they come to the end.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._windows = [kind.window for kind in config.kinds]
        self._kinds = [config.kind_of(layer) for layer in range(config.num_hidden_layers)]
        self._places = [_places(window, capacity) for window in self._windows]
        self._starts = [0] * len(self._windows)  # the position that is in a kind's first place
        of_position = (config.num_key_value_heads, config.head_dim)

        def empty(kind: int) -> Tensor:
            shape = (batch_size, self._places[kind], *of_position)
            return torch.empty(shape, dtype=dtype, device=device)

        self.keys = [empty(kind) for kind in self._kinds]
        self.values = [empty(kind) for kind in self._kinds]
        self.capacity = capacity
        self.length = 0

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, places, heads, D]."""
        return self.keys[layer], self.values[layer]

    def of_kind(self, kind: int) -> Tensor:
        """The keys of the first layer of a kind."""
        return self.keys[self._kinds.index(kind)]

    def held(self, kind: int) -> int:
        """How many of the positions so far, the last ones, layers of a kind have still."""
        return self.length - self._starts[kind]

    def make_room(self, S: int) -> None:
        """Before S more: where they find no place, what they do not look at has to go."""
        for kind, window in enumerate(self._windows):
            held = self.held(kind)
            if window is None or held + S <= self._places[kind]:
                continue
            kept = min(held, window - 1)
            for layer, its_kind in enumerate(self._kinds):
                if its_kind == kind:
                    for t in self.of(layer):
                        t[:, :kept] = t[:, held - kept : held].clone()  # the two may overlap
            self._starts[kind] = self.length - kept

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, S, heads, D] behind what is held; returns all of it.

        Of more than there are places for, the last ones are held that another position will see.
        """
        kind = self._kinds[layer]
        held, S = self.held(kind), k.shape[1]
        if held + S <= self._places[kind]:
            for t, new in zip(self.of(layer), (k, v), strict=True):
                t[:, held : held + S] = new
            return self.keys[layer][:, : held + S], self.values[layer][:, : held + S]
        kept = self._windows[kind] - 1
        both = []
        for t, new in zip(self.of(layer), (k, v), strict=True):
            both.append(torch.cat([t[:, :held], new], dim=1) if held else new)
            t[:, :kept] = both[-1][:, held + S - kept :]
        return both[0], both[1]

    def advance(self, S: int) -> None:
        """After S more, once every layer has them."""
        for kind, window in enumerate(self._windows):
            if self.held(kind) + S > self._places[kind]:
                self._starts[kind] = self.length + S - (window - 1)
        self.length += S

    def keep(self, rows: Sequence[int]) -> None:
        """Of the texts, go on with those at `rows`, in that order."""
        places = [i for i, row in enumerate(rows) if row != i]
        moved = [rows[i] for i in places]
        for layer, kind in enumerate(self._kinds):
            held = self.held(kind)
            for t in self.of(layer) if moved else ():
                t[places, :held] = t[moved, :held]
            self.keys[layer] = self.keys[layer][: len(rows)]
            self.values[layer] = self.values[layer][: len(rows)]


def _places(window: int | None, capacity: int) -> int:
    if window is None:
        return capacity
    return min(capacity, window + max(1, window // 8))
