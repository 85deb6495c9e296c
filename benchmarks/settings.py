"""What a run was asked for, and the rows that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.ceilings import floor_seconds
from benchmarks.harness import Contender, measure


@dataclass
class Settings:
    """Choices of the command line; `tell` shows progress, `notes` go with the results."""

    against: Sequence[str]
    shapes: Sequence[tuple[str, int, int]]
    rows_of_x: Sequence[int]
    seconds: float
    steps: int
    working_set: int
    isa: str | None = None
    notes: list[str] = field(default_factory=list)
    tell: Callable[[str], None] = field(default=print)

    def note(self, text: str) -> None:
        """Show a sentence that belongs to the results, and keep it with them."""
        self.notes.append(text)
        print("\n" + text, flush=True)

    def compare(
        self, benchmark: str, case: str, contenders: Sequence[Contender], baseline: str, memory: str
    ) -> list[dict]:
        """Rows of one case, a contender each, with its speed beside `baseline`.

        `memory` names the ceiling of the case's memory traffic: "copy" or "read".
        """
        summaries = [timing.summary() for timing in measure(contenders, self.seconds)]
        return rows_of(benchmark, case, contenders, summaries, baseline, memory)


def rows_of(
    benchmark: str,
    case: str,
    contenders: Sequence[Contender],
    summaries: Sequence[dict],
    baseline: str,
    memory: str,
) -> list[dict]:
    """What was measured of each contender, with its speed beside `baseline`, or else the first."""
    rows = []
    for contender, summary in zip(contenders, summaries, strict=True):
        row = {"benchmark": benchmark, "case": case, "contender": contender.name, **summary}
        row |= {"path": contender.path, "memory": memory, "dtype": contender.dtype}
        rows.append(row | {"moved": contender.moved, "flops": contender.flops})
    by_name = {row["contender"]: row["median_ms"] for row in rows}
    for row in rows:
        row["baseline"] = baseline if baseline in by_name else rows[0]["contender"]
        row["speed"] = by_name[row["baseline"]] / row["median_ms"]
    return rows


def add_rates(rows: Sequence[dict], limits: dict[str, float]) -> None:
    """Put GB/s, TFLOP/s and floors into the rows that move bytes.

    `floor_ms` is the least time that `limits` allow, `memory_floor_ms` that of the bytes alone.
    """
    for row in rows:
        if "moved" in row:
            moved, flops, memory = row["moved"], row["flops"], row["memory"]
            taken = row["median_ms"] * 1e-3
            row["gbs"] = moved / taken * 1e-9
            row["tflops"] = flops / taken * 1e-12
            floor = floor_seconds(limits, moved, flops, memory, row.get("dtype", "float32"))
            row["floor_ms"] = 1e3 * floor
            row["memory_floor_ms"] = 1e3 * floor_seconds(limits, moved, 0, memory)
