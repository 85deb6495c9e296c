"""What a run was asked for, and the rows that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks import machine, shapes, table
from benchmarks.ceilings import floor_seconds
from benchmarks.errors import ContenderError
from benchmarks.harness import Contender, measure
from benchmarks.layers import refusal

OURS = "lowrank"  # what the names of our contenders begin with


@dataclass
class Settings:
    """Choices of the command line; `tell` shows progress, `notes` go with the results.

    `against` names the peers that are here; `shapes` are (label, N, K), `heads` (label, V,
    H); `dtypes` are those of x and of what is dense, by their short names; `layers` are those of
    the checkpoint that `loading` makes.
    """

    against: Sequence[str]
    shapes: Sequence[tuple[str, int, int]]
    rows_of_x: Sequence[int]
    dtypes: Mapping[str, torch.dtype]
    seconds: float
    steps: int
    working_set: int
    heads: Sequence[tuple[str, int, int]] = ()
    device: torch.device = torch.device("cpu")
    isa: str | None = None
    layers: int = 1
    notes: list[str] = field(default_factory=list)
    tell: Callable[[str], None] = field(default=print)
    ceilings: dict[str, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Show a sentence that belongs to the results, and keep it with them."""
        self.notes.append(text)
        print("\n" + text, flush=True)

    def fits(self, benchmark: str, label: str, N: int, K: int, sides: int) -> bool:
        """Announce the memory of a comparison of so many layers; False if there is less."""
        needed = shapes.layers_bytes(N, K, sides, self.working_set)
        free = self.free_bytes() or needed
        need = f"{benchmark} {label} needs about {needed / 1e9:.1f} GB of memory"
        if needed > free:
            self.note(f"{need}, {free / 1e9:.1f} GB are free: it was left out")
            return False
        self.tell(need)
        return True

    def free_bytes(self) -> int:
        """Memory of the device that is free, 0 where that is not known."""
        return machine.memory("MemAvailable")

    def measure(self, contenders: Sequence[Contender]) -> list[dict]:
        """Spread, error and extra memory of each. Raises ContenderError."""
        return [timing.summary() for timing in measure(contenders, self.seconds)]

    def sides(self, benchmark: str, label: str, N: int, K: int, known: Sequence[str]) -> list[str]:
        """Which of the known sides compare over a weight [N, K]; who is left out is noted."""
        wanted = [name for name in known if name == OURS or name in self.against]
        reasons = {name: reason for name in wanted if (reason := refusal(name, N, K))}
        for reason in reasons.values():
            self.note(f"{benchmark} {label}: {reason}")
        return [name for name in wanted if name not in reasons]

    def compare(
        self, benchmark: str, case: str, contenders: Sequence[Contender], baseline: str, memory: str
    ) -> list[dict]:
        """Rows of one case, a contender each, with its speed beside `baseline`; they are printed.

        `memory` names the ceiling of the case's memory traffic: "copy" or "read". A peer that
        fails is left out with its error as a note; ours stops the run.
        """
        contenders = list(contenders)
        while True:
            try:
                summaries = self.measure(contenders)
                break
            except ContenderError as error:
                if error.name.startswith(OURS):
                    raise
                self.note(f"{benchmark} {case}: {error}")
                contenders = [side for side in contenders if side.name != error.name]
        rows = rows_of(benchmark, case, contenders, summaries, baseline, memory)
        add_rates(rows, self.ceilings)
        print("\n" + table.titled(rows), flush=True)
        return rows


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
    for row, contender in zip(rows, contenders, strict=True):
        if contender.bare in by_name:
            row["over_bare"] = row["median_ms"] / by_name[contender.bare]
    return rows


def add_rates(rows: Sequence[dict], limits: dict[str, float]) -> None:
    """Put GB/s, TFLOP/s and floors into the rows that move bytes.

    `floor_ms` is the least time that `limits` allow, `memory_floor_ms` that of the bytes alone. A
    training step comes with its TFLOP/s, and is held to the matmul alone.
    """
    for row in rows:
        if "tokens_per_second" in row and "tflops" in row:
            row["floor_ms"] = row["median_ms"] * row["tflops"] / limits["matmul_tflops"]
        if "moved" in row:
            moved, flops, memory = row["moved"], row["flops"], row["memory"]
            taken = row["median_ms"] * 1e-3
            row["gbs"] = moved / taken * 1e-9
            row["tflops"] = flops / taken * 1e-12
            floor = floor_seconds(limits, moved, flops, memory, row.get("dtype", "float32"))
            row["floor_ms"] = 1e3 * floor
            row["memory_floor_ms"] = 1e3 * floor_seconds(limits, moved, 0, memory)
