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
    absent = {name: reason for name in settings.against if (reason := peers.missing(name))}
    here = settings.against = [name for name in settings.against if name not in absent]
    dtypes = list(settings.dtypes.values())
    settings.ceilings = ceilings(settings.working_set, dtypes)
    result: dict = {
        "machine": machine.describe(),
        "run": {
            "date": datetime.date.today().isoformat(),
            "isa": settings.isa,
            "working_set": settings.working_set,
            "seconds": settings.seconds,
            "dtypes": list(settings.dtypes),
        },
        "ceilings": settings.ceilings,
        "rows": [],
        "missing": absent,
        "left_out": [],
        "notes": settings.notes,
    }
    print(table.header(result), flush=True)
    for name, reason in absent.items():
        settings.note(f"without {name}: {reason}")
    if settings.isa is not None:
        for name in here:
            if name in machine.UNRESTRICTED:
                settings.note(machine.UNRESTRICTED[name].format(isa=settings.isa))
    for name in names:
        try:
            rows = importlib.import_module(f"benchmarks.{name}").run(settings)
        except MissingInputError as error:
            result["left_out"].append(name)
            settings.note(f"{name} was left out: {error}")
            continue
        result["rows"] += rows
        add_rates(rows, settings.ceilings)
        for case in table.cases([row for row in rows if "moved" not in row]):
            print("\n" + table.titled(case), flush=True)  # the others are printed when measured
        now = ceilings(settings.working_set, dtypes, repeats=3)
        settings.ceilings |= better(settings.ceilings, now)
    add_rates(result["rows"], result["ceilings"])
    print("\n" + table.ceilings_line(result["ceilings"]), flush=True)
    return result
