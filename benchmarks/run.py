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
    here = [name for name in settings.against if peers.missing(name) is None]
    absent = [name for name in settings.against if name not in here]
    settings.against = here
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
        "notes": settings.notes,
    }
    print(table.header(result), flush=True)
    for name in absent:
        settings.note(f"without {name}: {peers.missing(name)}")
    if "bitsandbytes" in here and settings.isa is not None:
        settings.note(machine.unrestricted(settings.isa))
    for name in names:
        try:
            rows = importlib.import_module(f"benchmarks.{name}").run(settings)
        except MissingInputError as error:
            result["left_out"].append(name)
            settings.note(f"{name} was left out: {error}")
            continue
        result["ceilings"] = better(result["ceilings"], ceilings(settings.working_set))
        add_rates(rows, result["ceilings"])
        result["rows"] += rows
        for case in table.cases(rows):
            print("\n" + table.titled(case), flush=True)
    add_rates(result["rows"], result["ceilings"])
    print("\n" + table.ceilings_line(result["ceilings"]), flush=True)
    return result
