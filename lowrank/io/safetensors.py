"""safetensors files: written whole or not at all, refused whole if anything in them is wrong.

A file is 8 bytes, the length of the header; the header, JSON of each tensor's dtype, shape and
range of bytes; and the bytes. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lowrank.errors import DtypeError, FileFormatError

from .atomic import write_files
from .names import plain
from .pages import Empty, empty_bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: bytes [start, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """The checked header of a safetensors file, its `metadata`, and its tensors one at a time.

    Tensors are read, not mapped: a mapped file would count as memory of the process page by page,
    and change under a live model if it were overwritten.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileFormatError(f"{self.path}: no such file; fetch it again")
        try:
            size, file = self.path.stat().st_size, open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot be read: {error.strerror}") from error
        with file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise FileFormatError(f"{self.path}: truncated or not safetensors; fetch it again")
            try:
                header = json.loads(file.read(length).decode())
                self.metadata = dict(header.pop("__metadata__", None) or {})
                self.entries = {name: _entry(8 + length, **raw) for name, raw in header.items()}
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                raise FileFormatError(
                    f"{self.path}: damaged safetensors header: {plain(str(error))}"
                ) from error
        end = 8 + length
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if entry.start != end:
                raise FileFormatError(
                    f"{self.path}: {plain(name)} begins at {entry.start}; expected {end}"
                )
            end = entry.end
        if end != size:
            raise FileFormatError(f"{self.path}: expected {end} bytes; got {size}; fetch it again")

    def read(
        self, name: str, empty: Empty = empty_bytes, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """The tensor, or those rows [first, last) of it, in the dtype of the file and memory from
        `empty`.
        """
        entry, start, shape = self.entries[name], 0, self.entries[name].shape
        if rows is not None:
            start, shape = rows[0], (rows[1] - rows[0], *shape[1:])
        row = math.prod(shape[1:]) * entry.dtype.itemsize
        raw = empty(math.prod(shape) * entry.dtype.itemsize)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start + start * row)
            view, filled = memoryview(raw.numpy()), 0
            while filled < len(view) and (n := file.readinto(view[filled:])):
                filled += n
        if filled != len(view):
            raise FileFormatError(f"{self.path}: {name} ends early; the file has changed")
        return raw.view(entry.dtype).view(shape)


@dataclass(frozen=True)
class Lazy:
    """A tensor of known dtype and shape that `make` makes when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_safetensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of the file by name. Raises FileFormatError if it is damaged or truncated."""
    file = SafetensorsFile(path)
    return {name: file.read(name).to(device) for name in file.entries}


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor | Lazy]) -> None:
    """Write the tensors to `path`, or leave what is there as it was."""
    path = Path(path)
    write_files(path.parent, {path.name: lambda aside: write_safetensors(aside, tensors)})


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor | Lazy],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write straight to `path`, one tensor at a time. Raises OSError, and DtypeError for a dtype
    that the format does not have.
    """
    # the widest dtype first: each tensor then begins at a multiple of its own
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise DtypeError(f"{name}: expected a dtype that safetensors has; got {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write_bytes(file, name, tensors[name])


def _write_bytes(file: BinaryIO, name: str, tensor: Tensor | Lazy) -> None:
    made = tensor.make() if isinstance(tensor, Lazy) else tensor
    assert (made.dtype, tuple(made.shape)) == (tensor.dtype, tuple(tensor.shape)), name
    file.write(made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _entry(offset: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(_DTYPES)}")
    start, end = data_offsets
    n_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    sizes = (*shape, start, end)
    if not all(isinstance(n, int) and n >= 0 for n in sizes) or end - start != n_bytes:
        raise ValueError(f"{dtype} {shape} does not fill bytes {data_offsets}")
    return Entry(_DTYPES[dtype], tuple(shape), offset + start, offset + end)
