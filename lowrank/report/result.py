"""What a comparison comes to: numbers by scheme and layer, and the files they are written to."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError
from lowrank.io.atomic import write_files

from .speed import Speed

logger = logging.getLogger("lowrank.report")

TABLE, DATA = "report.md", "report.json"


@dataclass(frozen=True)
class Layer:
    """One weight W [N, K] and what a scheme makes of it, Q.

    error: ‖W - Q‖ / ‖W‖, Frobenius.   output_error: ‖X (W - Q)ᵀ‖ / ‖X Wᵀ‖ on real activations X.
    """

    weights: int
    square: float
    square_error: float
    nbytes: int
    output_error: float | None = None

    @property
    def error(self) -> float:
        return math.sqrt(self.square_error / self.square) if self.square else 0.0


@dataclass(frozen=True)
class Row:
    """A scheme on all layers; of a scheme that fails only its name and `failure`, one line.

    fused: whether y = x Wᵀ is computed from the codes, or else through `dequantize`.
    loss: mean of -log p over the predicted tokens of the text, in nats.
    """

    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    fused: bool = False
    favoured: bool = False
    loss: float | None = None
    speed: Speed | None = None
    failure: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and tables."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def bits(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.nbytes / sum(layer.weights for layer in self.layers.values())

    @property
    def error(self) -> float:
        """Relative RMSE: ‖W - Q‖ / ‖W‖, Frobenius, over the weights of all layers together."""
        square = sum(layer.square for layer in self.layers.values())
        error = sum(layer.square_error for layer in self.layers.values())
        return math.sqrt(error / square) if square else 0.0

    @property
    def output_error(self) -> float | None:
        """Root mean square of the layers' output errors, each layer counting the same."""
        errors = [e.output_error for e in self.layers.values() if e.output_error is not None]
        return math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss)."""
        return None if self.loss is None else perplexity_of(self.loss)

    def worst(self, count: int = 1) -> list[tuple[str, float]]:
        """(layer, error) of the layers with the largest errors."""
        errors = [(name, layer.error) for name, layer in self.layers.items()]
        return sorted(errors, key=lambda pair: -pair[1])[:count]


@dataclass(frozen=True)
class Report:
    """Rows in the order of the schemes; `str(report)` is the table, `report.save(directory)` all.

    about: the model, the options and seed, the machine and versions. loss: of the text, by the
    model as it is. dense_bytes: of the weights before quantization.
    """

    about: Mapping[str, Any]
    rows: list[Row]
    dense_bytes: int
    loss: float | None = None

    def __str__(self) -> str:
        from .table import table

        return table(self)

    @property
    def measured(self) -> list[Row]:
        """The rows of the schemes that did not fail, the least error first."""
        return sorted((row for row in self.rows if row.failure is None), key=lambda row: row.error)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as report.json holds them; what is infinite or not a number is None."""
        rows = []
        for row in self.rows:
            one: dict[str, Any] = {"scheme": row.scheme, "options": dict(row.options)}
            if row.failure is not None:
                rows.append(one | {"failure": row.failure})
                continue
            one |= {"bits": row.bits, "bytes": row.nbytes, "error": row.error}
            one |= {"output_error": row.output_error, "fused": row.fused}
            one |= {"loss": row.loss, "perplexity": row.perplexity, "favoured": row.favoured}
            one["speed"] = None if row.speed is None else asdict(row.speed)
            one["layers"] = {
                name: {"error": layer.error, "output_error": layer.output_error}
                for name, layer in row.layers.items()
            }
            rows.append(one)
        dense = {"bytes": self.dense_bytes, "loss": self.loss}
        dense["perplexity"] = None if self.loss is None else perplexity_of(self.loss)
        return _finite({"about": dict(self.about), "dense": dense, "schemes": rows})

    def save(self, directory: str | Path) -> list[Path]:
        """Write report.md, report.json and, with matplotlib, the plots; all or none of them.

        Returns the paths. Files of these names are replaced. Raises ConfigError, OSError.
        """
        from .plots import plots, write_png
        from .table import page

        directory = check_directory(directory)
        try:
            pictures = plots(self)
        except ImportError:
            pictures = {}
            logger.warning("no plots: they need matplotlib: pip install 'lowrank-torch[plots]'")
        data = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        texts = {DATA: data, TABLE: page(self, list(pictures))}
        write = partial(Path.write_text, encoding="utf-8")
        writers: dict[str, Callable[[Path], Any]] = {
            name: partial(write_png, figure) for name, figure in pictures.items()
        }
        writers |= {name: partial(write, data=text) for name, text in texts.items()}
        write_files(directory, writers)
        return [directory / name for name in reversed(writers)]


def check_directory(path: str | Path) -> Path:
    """The path, if files can be written into it or it can be made. Raises ConfigError."""
    path = Path(path)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"output: expected a directory; {there} is a file: name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {there} cannot be written to: name another directory")
    return path


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    return math.inf if loss > 700 else math.exp(loss)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
