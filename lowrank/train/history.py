"""What a run has been through: all that its later steps depend on and its result tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank.data import Batch


@dataclass
class History:
    """How far a run is; a run that goes on from a checkpoint goes on with this.

    losses: mean loss per labelled token of each optimizer step done.
    eval_losses: (steps done, mean loss per labelled token of the held-out data).
    samples: examples taken so far, which is where the sampler goes on.
    tokens, labelled: how many tokens those had, and how many of them were learned.
    seconds: what the steps alone took.
    """

    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    labelled: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    def add(self, batches: list[Batch], loss: float, seconds: float) -> None:
        """Count a step over `batches`."""
        self.samples += sum(batch.examples for batch in batches)
        self.tokens += sum(batch.tokens for batch in batches)
        self.labelled += sum(batch.labelled for batch in batches)
        self.seconds += seconds
        self.losses.append(loss)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """The history that `to_dict` gave."""
        eval_losses = [(int(step), float(loss)) for step, loss in values["eval_losses"]]
        return cls(**{**values, "eval_losses": eval_losses})
