"""What a run has been through: all that its later steps depend on and its result tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank.train.feed import Counts


@dataclass
class History:
    """How far a run is; a run that goes on from a checkpoint goes on with this.

    losses: mean loss per labelled token of each optimizer step done.
    evaluations: what each found: "step" (steps done), "eval_loss" (mean loss per labelled token of
        the held-out data), and what compute_metrics returned.
    samples: examples taken so far, which is where the sampler goes on.
    tokens, labelled: how many tokens those had, and how many of them were learned.
    seconds: what the steps alone took.
    batch_size: rows of a batch since memory did not suffice for those of the config.
    best_step, best_metric: of the best evaluation so far, and its metric_for_best_model.
    evaluations_without_gain: those since the metric last improved by early_stopping_threshold.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    labelled: int = 0
    seconds: float = 0.0
    batch_size: int | None = None
    best_step: int | None = None
    best_metric: float | None = None
    evaluations_without_gain: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        """(steps done, held-out loss) of each evaluation."""
        return [(int(found["step"]), found["eval_loss"]) for found in self.evaluations]

    def epoch_is_over(self, examples: int) -> bool:
        """Whether each of so many has been taken equally often."""
        return self.samples % examples == 0

    def add(self, counts: Counts, loss: float, seconds: float) -> None:
        """Count a step."""
        self.samples += counts.examples
        self.tokens += counts.tokens
        self.labelled += counts.labelled
        self.seconds += seconds
        self.losses.append(loss)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """The history that `to_dict` gave."""
        return cls(**values)
