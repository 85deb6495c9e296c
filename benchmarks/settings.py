"""What a run was asked for, and the rows that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.ceilings import floor_seconds
from benchmarks.harness import Contender, measure

ROWS_OF_X = (1, 2, 4, 8, 16, 128, 512)


@dataclass
class Settings:
    """Choices of the command line. `limits` are the ceilings measured at the start of the run."""

    against: Sequence[str]
    shapes: Sequence[tuple[str, int, int]]
    limits: dict[str, float]
    working_set: int
    rows_of_x: Sequence[int] = ROWS_OF_X
    seconds: float = 6.0
    steps: int = 20
    tell: Callable[[str], None] = field(default=print)

    def compare(
        self, benchmark: str, case: str, contenders: Sequence[Contender], baseline: str, memory: str
    ) -> list[dict]:
        """Measure the contenders of one case; rows with rates, share of the ceiling and speed
        beside `baseline`.

        `memory` names the ceiling of the case's memory traffic: "copy" or "read".
        """
        rows = []
        for contender, timing in zip(contenders, measure(contenders, self.seconds), strict=True):
            row = {
                "benchmark": benchmark,
                "case": case,
                "contender": contender.name,
                **timing.summary(),
            }
            taken = row["median_ms"] * 1e-3
            row["gbs"] = contender.moved / taken * 1e-9
            row["tflops"] = contender.flops / taken * 1e-12
            row["floor_ms"] = (
                floor_seconds(self.limits, contender.moved, contender.flops, memory) * 1e3
            )
            row["path"] = contender.path
            rows.append(row)
        by_name = {row["contender"]: row["median_ms"] for row in rows}
        for row in rows:
            row["baseline"] = baseline if baseline in by_name else rows[0]["contender"]
            row["speed"] = by_name[row["baseline"]] / row["median_ms"]
        return rows
