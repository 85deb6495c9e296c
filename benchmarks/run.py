"""A run: the ceilings, the benchmarks one after another, the ceilings again."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Sequence

import torch

from benchmarks import machine, peers, table
from benchmarks.ceilings import better, ceilings
from benchmarks.errors import MissingInputError
from benchmarks.harness import keep_freed_memory
from benchmarks.settings import Settings, add_rates


def run(names: Sequence[str], settings: Settings) -> dict:
    """Run the benchmarks of these names and print each case when it is done.

    Returns what `--json` writes: machine, run, ceilings, rows, notes, and what was left out. The
    ceilings are measured at the start and after every benchmark, and rows are held to the best.
    """
    torch.manual_seed(0)
    keep_freed_memory()
    notes = machine.unrestricted(settings.isa) if "bitsandbytes" in settings.against else []
    for name in settings.against:
        reason = peers.missing(name)
        if reason is not None:
            notes.append(f"without {name}: {reason}")
    settings.against = [name for name in settings.against if peers.missing(name) is None]
    result: dict = {
        "machine": machine.describe(),
        "run": {
            "date": datetime.date.today().isoformat(),
            "isa": settings.isa,
            "working_set": settings.working_set,
            "seconds": settings.seconds,
        },
        "ceilings": ceilings(settings.working_set),
        "rows": [],
        "left_out": [],
        "notes": notes,
    }
    print(table.header(result), *notes, sep="\n\n", flush=True)
    for name in names:
        try:
            rows = importlib.import_module(f"benchmarks.{name}").run(settings)
        except MissingInputError as error:
            result["left_out"].append(name)
            notes.append(f"{name} was left out: {error}")
            print(f"\n{notes[-1]}", flush=True)
            continue
        result["ceilings"] = better(result["ceilings"], ceilings(settings.working_set))
        add_rates(rows, result["ceilings"])
        result["rows"] += rows
        for case in table.cases(rows):
            print("\n" + table.titled(case), flush=True)
    add_rates(result["rows"], result["ceilings"])
    print("\n" + table.ceilings_line(result["ceilings"]), flush=True)
    return result
