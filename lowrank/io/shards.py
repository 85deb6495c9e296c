"""Tensors by name in a directory: one safetensors file, or shards with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError, FileFormatError

from .atomic import write_files
from .json_files import read_json, write_json
from .names import folded, listed
from .pages import Empty, empty_bytes
from .safetensors import Lazy, SafetensorsFile, write_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The tensors of a directory; only headers are read until `read`.

    `shapes` maps each tensor's name to its shape. Raises FileFormatError for what is damaged,
    truncated or pickled.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        self._file_of: dict[str, SafetensorsFile] = {}
        placed = _files(self.path)
        if absent := [filename for filename in placed if not (self.path / filename).is_file()]:
            raise FileFormatError(
                f"{self.path / INDEX}: names files that are not there: {listed(absent)}; "
                "fetch them too"
            )
        for filename, names in placed.items():
            file = SafetensorsFile(self.path / filename)
            if names is not None:
                _check_holds(file, names)
            self._file_of |= dict.fromkeys(names if names is not None else file.entries, file)
        self.shapes = {name: file.entries[name].shape for name, file in self._file_of.items()}

    def read(self, name: str, empty: Empty = empty_bytes) -> Tensor:
        """The tensor, in the dtype of the file and memory from `empty`."""
        return self._file_of[name].read(name, empty)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Those rows of it, and nothing else of the file."""
        return self._file_of[name].read(name, rows=(first, last))

    def blank(self, name: str) -> Tensor:
        """A tensor of that dtype and shape on the meta device."""
        entry = self._file_of[name].entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


class Tensors(Mapping[str, Tensor]):
    """Tensors of these `shapes` by name, each made by `read(name)` when it is taken."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
    ) -> None:
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_shards(
    directory: str | Path,
    tensors: Mapping[str, Tensor | Lazy],
    max_shard_bytes: int,
    others: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write the tensors, and `others` as of `write_files`, into a directory: all or nothing.

    Above `max_shard_bytes` they are split into shards with an index. At most one Lazy tensor is in
    memory. Raises ConfigError if the directory already holds weights.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory}: expected a directory or nothing there; it is a file")
    if old := sorted(path.name for path in directory.glob("*.safetensors*")):
        raise ConfigError(f"{directory}: expected no weights there; found {old[0]}; name a new one")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes: expected at least 1; got {max_shard_bytes}")
    shards: list[dict[str, Tensor | Lazy]] = [{}]
    total = filled = 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + tensor.nbytes, total + tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    writers: dict[str, Callable[[Path], None]] = {
        name: partial(write_safetensors, tensors=shard)
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        writers[INDEX] = partial(write_json, index)
    write_files(directory, {**writers, **(others or {})})


def files_of(index: Mapping[str, Any], path: Path | str) -> dict[str, list[str]]:
    """The `weight_map` of the index at `path` turned round: file -> names of its tensors."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{path}: expected a weight_map of tensor names to files")
    files: dict[str, list[str]] = {}
    for name, filename in weight_map.items():
        if not isinstance(filename, str) or Path(filename).name != filename:
            raise FileFormatError(f"{path}: {name!r}: expected a file name; got {filename!r}")
        files.setdefault(filename, []).append(name)
    return files


def refusal_of_pickles(what: str) -> str:
    """Why a .bin checkpoint is not read, and what to do."""
    return (
        f"{what}: pickled weights run code when they are read; load them with transformers and "
        "save_pretrained(directory), which writes safetensors"
    )


def _check_holds(file: SafetensorsFile, names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in file.entries]:
        raise FileFormatError(
            f"{file.path}: missing tensors: {listed(folded(missing))}; {INDEX} puts them there"
        )


def _files(directory: Path) -> dict[str, list[str]] | dict[str, None]:
    """The files of a directory: for each, the tensors its index promises, or None."""
    if (directory / INDEX).is_file():
        return files_of(read_json(directory / INDEX), directory / INDEX)
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise FileFormatError(refusal_of_pickles(f"{directory}/{pickles[0]}"))
    raise FileFormatError(f"{directory}: expected {SINGLE} or {INDEX}; found neither")
