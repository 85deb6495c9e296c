"""JSON files: an object, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.errors import FileFormatError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FileFormatError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file") from error
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object; got {type(value).__name__}")
    return value


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write straight to `path`, indented, with a last newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
