"""The files of a run: configuration, metrics as they come, loss plot, and what was trained."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.errors import ConfigError
from lowrank.io.adapter import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, save_adapter
from lowrank.io.atomic import remove_leftovers, sync, write_files, write_text
from lowrank.io.safetensors import save_safetensors
from lowrank.train.checkpoint import checkpoints, remove_checkpoints
from lowrank.train.lock import check_unlocked
from lowrank.train.plots import run_figure
from lowrank.train.weights import TRAINED, other_trained, trained_adapters

logger = logging.getLogger("lowrank.train")

CONFIG, METRICS, RESULTS = "train_config.json", "metrics.jsonl", "results.json"
PLOT = "loss.png"

# what a run writes under names that a model, an adapter or a project may have there already
_FOREIGN = (CARD_FILE, CONFIG_FILE, "tokenizer.json", "tokenizer_config.json")


def check_output_dir(
    path: str | Path, overwrite: bool = False, resume: str | Path | None = None
) -> None:
    """Raise ConfigError if a run has `path` now, or it is not a directory, or it holds a run or
    files of others' that a run would replace, unless `overwrite`, or `resume` goes on with it.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir must be a directory; {path} is a file: name another")
    check_unlocked(path)
    if not overwrite:
        _check_free(path, resume)


def _check_free(path: Path, resume: str | Path | None) -> None:
    found = [checkpoint.name for checkpoint in checkpoints(path)]
    if resume == "auto" and found:
        return
    if resume is not None and Path(resume).resolve().parent == path.resolve():
        return
    files = (METRICS, WEIGHTS_FILE, TRAINED)
    held = [n for n in files if (path / n).exists() and (path / n).stat().st_size]
    if held == [METRICS] and (resume == "auto" or not _has_steps(path / METRICS)):
        held = []  # a run that ended before its first step or checkpoint: nothing can be lost
    if held + found:
        raise ConfigError(
            f"output_dir {path} already holds a run ({', '.join(held + found[:1])}): name another, "
            'set resume="auto" to go on with it, or overwrite_output_dir to replace it'
        )
    foreign = [name for name in _FOREIGN if (path / name).exists()]
    if foreign:
        raise ConfigError(
            f"output_dir {path} has files that a run would replace ({', '.join(foreign)}): "
            "name another, or set overwrite_output_dir if they may go"
        )


def _has_steps(metrics: Path) -> bool:
    """Whether a step was counted, and not just the held-out loss before the first."""
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        return any(line.strip() and '"step": 0,' not in line for line in lines)


def metrics_lines(directory: str | Path, last: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, as far as step `last`; none where there is no such file.

    A line that is not whole is left out: it was being written when a run was killed.
    """
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (Path(directory) / METRICS).read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and (last is None or line.get("step", 0) <= last):
                    lines.append(line)
    return lines


class RunDirectory:
    """Writes a run's files into `path`; each is whole at every moment, the metrics line by line.

    `lines`: what metrics.jsonl begins with, if this goes on with an earlier run, whose files are
    then kept; without them those of any earlier run go. Whoever makes one has the RunLock.
    """

    def __init__(self, path: str | Path, lines: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            if lines is None:  # else what was saved stays until something newer takes its place
                for name in (CONFIG, RESULTS, PLOT, TRAINED, WEIGHTS_FILE, CONFIG_FILE):
                    (self.path / name).unlink(missing_ok=True)
                remove_checkpoints(checkpoints(self.path))
            # renamed into place: a crash here leaves the old lines or these
            text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines or ())
            write_text(self.path / METRICS, text)
            self._metrics = open(self.path / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"output_dir {path} cannot be written: {error.strerror}") from None

    def log(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is in the file when this returns."""
        try:
            self._metrics.write(json.dumps(values, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / METRICS)) from error

    def sync(self) -> None:
        """Have metrics.jsonl on the disk, where it survives a loss of power."""
        sync(self.path / METRICS)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write `name` whole or not at all."""
        write_text(self.path / name, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def save_model(self, model: nn.Module) -> Path:
        """Save adapters in PEFT's format, other trained tensors by name; returns where they are."""
        for adapter in trained_adapters(model):
            save_adapter(model, self.path, adapter=adapter)
        others = other_trained(model)
        if others:
            save_safetensors(self.path / TRAINED, others)
        return self.path

    def plot(self) -> Path | None:
        """Draw loss.png; without matplotlib say what to install, and go on."""
        try:
            figure = run_figure(metrics_lines(self.path))
        except ImportError:
            logger.warning("no loss plot: it needs matplotlib: pip install 'lowrank-torch[plots]'")
            return None
        write_files(self.path, {PLOT: lambda aside: figure.savefig(aside, format="png", dpi=120)})
        return self.path / PLOT

    def close(self) -> None:
        """No line is to come."""
        with contextlib.suppress(OSError):  # of a line that `log` could not write, and said so
            self._metrics.close()


class UnwrittenDirectory(RunDirectory):
    """The directory of a run on a rank that writes nothing, because the first rank does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def log(self, values: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        pass

    def save_model(self, model: nn.Module) -> Path:
        return self.path

    def plot(self) -> Path | None:
        return None

    def close(self) -> None:
        pass
