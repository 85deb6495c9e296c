"""Files of results: what `--json` writes, and `--table`, `--plot` and `--roofline` read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.errors import UsageError

RESULTS = Path(__file__).parent / "results"
_NEEDED = {"machine", "run", "ceilings", "rows"}


def write(result: dict, path: str, name: str) -> Path:
    """Write to `path`, or to benchmarks/results/<name>-<date>.json where it is empty."""
    target = Path(path) if path else RESULTS / f"{name}-{result['run']['date']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, target)
    return target


def read(path: str) -> dict:
    """What `write` wrote. Raises UsageError."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--table: {path} cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not result.keys() >= _NEEDED:
        raise UsageError(f"--table: {path} holds no results; expected a file written by --json")
    return result
