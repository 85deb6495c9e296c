"""Whose states are where: parameters of one device, and the chunks of its store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank.optim.layout import Chunk, Part, plan
from lowrank.optim.pages import PageStore
from lowrank.optim.rings import Visit
from lowrank.optim.rules import Rule

States = dict[str, Tensor]
Use = Callable[[list[Part], dict[str, list[Tensor]]], None]


class Ledger:
    """The states of parameters in the chunks of a store, laid out when they are first wanted."""

    def __init__(self, store: PageStore) -> None:
        self.store = store
        self._chunks: list[Chunk] = []
        self._where: dict[Tensor, list[int]] = {}
        self._rules: dict[Tensor, Rule] = {}
        self._views: dict[int, list[tuple[Part, States]]] = {}

    def __contains__(self, p: Tensor) -> bool:
        return p in self._where

    def walk(self, rule: Rule, params: Sequence[Tensor], use: Use) -> None:
        """Give `use` parts of these parameters and their states, until it had all of them once.

        It may change the states. Several threads may be in it at once, with other parts.
        """
        self._lay_out(rule, params)
        wanted = set(params)

        def visited(visits: list[Visit]) -> None:
            parts: list[Part] = []
            states: dict[str, list[Tensor]] = {}
            for visit in visits:
                if visit.blank:
                    self._chunks[visit.chunk].fill(visit.memory)
                for part, views in self._viewed(visit):
                    if part.p in wanted:
                        parts.append(part)
                        for name, view in views.items():
                            states.setdefault(name, []).append(view)
            use(parts, states)

        numbers = dict.fromkeys(number for p in params for number in self._where[p])
        self.store.walk(list(numbers), visited)

    def _viewed(self, visit: Visit) -> list[tuple[Part, States]]:
        """The parts of a chunk and their states; made once where memory stays what it is."""
        viewed = self._views.get(visit.chunk) if visit.stays else None
        if viewed is None:
            viewed = [
                (part, {name: place.view(visit.memory) for name, place in part.places.items()})
                for part in self._chunks[visit.chunk].parts
            ]
        if visit.stays:
            self._views[visit.chunk] = viewed
        return viewed

    def read(self, params: Sequence[Tensor]) -> dict[Tensor, States]:
        """Copies of the states of these parameters, in the host's memory."""
        host = torch.device("cpu")
        made: dict[Tensor, States] = {}
        for p in params:
            made[p] = {name: s.make(host) for name, s in self._rules[p].states(p).items()}
        numbers = dict.fromkeys(number for p in params for number in self._where[p])
        for number in numbers:
            content = self.store.read(number)
            for part in self._chunks[number].parts:
                if content is not None and part.p in made:
                    for name, place in part.places.items():
                        place.share(made[part.p][name]).copy_(place.view(content))
        return made

    def write(self, states: Mapping[Tensor, tuple[Rule, Mapping[str, Tensor]]]) -> None:
        """Make these, of parameters that had none here, their states."""
        alike: dict[Rule, list[Tensor]] = {}
        for p, (rule, _) in states.items():
            alike.setdefault(rule, []).append(p)
        for rule, params in alike.items():
            self._lay_out(rule, params)
        for number, chunk in enumerate(self._chunks):
            content = torch.empty(chunk.size, dtype=torch.uint8, device="cpu")
            chunk.fill(content)
            for part in chunk.parts:
                tensors = states[part.p][1]
                for name, place in part.places.items():
                    place.view(content).copy_(place.share(tensors[name].contiguous()))
            self.store.write(number, content)

    def _lay_out(self, rule: Rule, params: Sequence[Tensor]) -> None:
        new = [p for p in params if p not in self._where]
        if not new:
            return
        chunks = plan(rule, new, self.store.chunk_bytes)
        numbers = self.store.add([chunk.size for chunk in chunks])
        self._chunks += chunks
        for p in new:
            self._where[p], self._rules[p] = [], rule
        for number, chunk in zip(numbers, chunks, strict=True):
            for part in chunk.parts:
                if number not in self._where[part.p][-1:]:
                    self._where[part.p].append(number)
