"""A Hugging Face model directory: config.json, and safetensors read one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.config import DecoderConfig
from lowrank.models.pages import empty_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class HFDirectory:
    """The config and the tensors of a directory; only headers are read until `read`.

    `shapes` maps each tensor's name to its shape. Raises FileFormatError for what is damaged,
    truncated or pickled, and ConfigError for a model the decoder cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._file_of: dict[str, SafetensorsFile] = {}
        for filename, names in weight_files(self.path).items():
            file = SafetensorsFile(self.path / filename)
            for name in names if names is not None else file.entries:
                if name not in file.entries:
                    raise FileFormatError(
                        f"{self.path / filename}: {name} missing; {INDEX} puts it there"
                    )
                self._file_of[name] = file
        self.shapes = {name: file.entries[name].shape for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype of the file and memory of its own."""
        return self._file_of[name].read(name)


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: bytes [start, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """The checked header of a safetensors file, and its tensors one at a time.

    Tensors are read, not mapped: a mapped file would count as memory of the process page by page,
    and change under a live model if it were overwritten.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileFormatError(f"{self.path}: no such file; fetch it again")
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise FileFormatError(f"{self.path}: truncated or not safetensors; fetch it again")
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                self.entries = {name: _entry(8 + length, **raw) for name, raw in header.items()}
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                raise FileFormatError(
                    f"{self.path}: damaged safetensors header: {error}"
                ) from error
        end = 8 + length
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if entry.start != end:
                raise FileFormatError(
                    f"{self.path}: {name} begins at {entry.start}; expected {end}"
                )
            end = entry.end
        if end != size:
            raise FileFormatError(f"{self.path}: expected {end} bytes; got {size}; fetch it again")

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype of the file."""
        entry = self.entries[name]
        raw = empty_bytes(entry.end - entry.start)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            view, filled = memoryview(raw.numpy()), 0
            while filled < len(view) and (n := file.readinto(view[filled:])):
                filled += n
        if filled != len(view):
            raise FileFormatError(f"{self.path}: {name} ends early; the file has changed")
        return raw.view(entry.dtype).view(entry.shape)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FileFormatError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object; got {type(value).__name__}")
    return value


def read_config(directory: Path) -> DecoderConfig:
    """The decoder's config; generation_config.json's end tokens, being the fuller list, win."""
    raw = read_json(directory / "config.json")
    if raw.get("quantization_config"):
        raise ConfigError(
            f"{directory}: its weights are already quantized; load the unquantized checkpoint, "
            "with quantizer= to quantize it"
        )
    place = directory / "config.json"
    try:
        config = DecoderConfig.from_hf(raw)
        place = directory / "generation_config.json"
        eos = read_json(place).get("eos_token_id") if place.is_file() else None
        if eos is None:
            return config
        return replace(config, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def weight_files(directory: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a directory: for each, the tensors its index promises, or None."""
    if (directory / INDEX).is_file():
        return shards(read_json(directory / INDEX), directory / INDEX)
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise FileFormatError(refusal_of_pickles(f"{directory}/{pickles[0]}"))
    raise FileFormatError(f"{directory}: expected {SINGLE} or {INDEX}; found neither")


def shards(index: Mapping[str, Any], path: Path | str) -> dict[str, list[str] | None]:
    """An index's `weight_map` turned round: file -> names of its tensors."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{path}: expected a weight_map of tensor names to files")
    files: dict[str, list[str] | None] = {}
    for name, filename in weight_map.items():
        if not isinstance(filename, str) or Path(filename).name != filename:
            raise FileFormatError(f"{path}: {name}: expected a file name; got {filename!r}")
        names = files.setdefault(filename, [])
        assert names is not None
        names.append(name)
    return files


def refusal_of_pickles(what: str) -> str:
    """Why a .bin checkpoint is not read, and what to do."""
    return (
        f"{what}: pickled weights run code when they are read; load them with transformers and "
        "save_pretrained(directory), which writes safetensors"
    )


def _entry(offset: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(_DTYPES)}")
    start, end = data_offsets
    n_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    sizes = (*shape, start, end)
    if not all(isinstance(n, int) and n >= 0 for n in sizes) or end - start != n_bytes:
        raise ValueError(f"{dtype} {shape} does not fill bytes {data_offsets}")
    return Entry(_DTYPES[dtype], tuple(shape), offset + start, offset + end)
