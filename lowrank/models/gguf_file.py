"""A GGUF file: its metadata, and its tensors one at a time as float32.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here, in a
tenth of the time and memory that gguf.GGUFReader takes for a vocabulary of 49,152 words; the many
quantized types are expanded by gguf.quants.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank.errors import FileFormatError, MissingPackageError
from lowrank.io.names import plain
from lowrank.io.pages import Empty, empty_bytes

_PANEL_BYTES = 1 << 18  # of a tensor in the file, expanded at once
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; `shape` in torch's order, `kind` a GGMLQuantizationType."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    row_bytes: int


class GGUFFile:
    """The parsed header of a GGUF file, version 2 or 3, little-endian.

    `metadata` maps keys to Python values, `tensors` names to `TensorInfo`. Raises FileFormatError
    if the file is damaged, truncated or of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingPackageError("reading GGUF needs gguf: pip install gguf") from error
        self.path = Path(path)
        self._block_sizes = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
        try:
            with (
                open(self.path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            ):
                self.metadata, self.tensors = self._parse(_Cursor(view))
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot be read: {error.strerror}") from error
        except (struct.error, ValueError, OverflowError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{self.path}: not a whole GGUF file: {error}") from error

    def kind(self, name: str) -> str:
        """How the tensor is stored, as "Q4_1"."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.tensors[name].kind).name

    def read(self, name: str, empty: Empty = empty_bytes) -> Tensor:
        """The tensor as float32 in memory from `empty`, expanded a few rows at a time."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        out = empty(4 * math.prod(info.shape)).view(torch.float32).view(info.shape)
        rows = out.view(-1, info.shape[-1]).numpy()
        panel = max(1, _PANEL_BYTES // info.row_bytes)
        with open(self.path, "rb") as file:
            file.seek(info.offset)
            for start in range(0, len(rows), panel):
                part = rows[start : start + panel]
                raw = file.read(len(part) * info.row_bytes)
                if len(raw) != len(part) * info.row_bytes:
                    raise FileFormatError(f"{self.path}: {name} ends early; the file has changed")
                codes = np.frombuffer(raw, np.uint8).reshape(len(part), info.row_bytes)
                try:
                    with np.errstate(all="ignore"):  # a scale of infinity is the file's own
                        part[:] = dequantize(codes, GGMLQuantizationType(info.kind))
                except NotImplementedError as error:
                    raise FileFormatError(
                        f"{self.path}: {name}: the gguf package cannot decode {self.kind(name)}; "
                        "quantize the model to another type, or get a newer gguf"
                    ) from error
        return out

    def split_experts(self) -> None:
        """Put in place of each tensor [E, N, K] those of its experts: `name[e]`, [N, K]."""
        for name, info in list(self.tensors.items()):
            if len(info.shape) == 3:
                del self.tensors[name]
                for e in range(info.shape[0]):
                    offset = info.offset + e * info.shape[1] * info.row_bytes
                    one = replace(info, shape=info.shape[1:], offset=offset)
                    self.tensors[f"{name}[{e}]"] = one

    def _parse(self, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if cursor.take(4) != b"GGUF":
            raise FileFormatError(f"{self.path}: not a GGUF file; it does not begin with 'GGUF'")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise FileFormatError(
                f"{self.path}: expected GGUF version 2 or 3, little-endian; got {version}"
            )
        n_tensors, n_fields = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {}
        for _ in range(n_fields):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        if metadata.get("split.count", 1) != 1:
            raise FileFormatError(
                f"{self.path}: is a part of a model in {metadata['split.count']} files; make them "
                "one with llama.cpp's llama-gguf-split --merge"
            )
        infos = [self._info(cursor) for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise FileFormatError(f"{self.path}: general.alignment: got {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        tensors = {}
        for name, info in infos:
            placed = TensorInfo(info.shape, info.kind, start + info.offset, info.row_bytes)
            n_bytes = math.prod(info.shape[:-1]) * info.row_bytes
            if placed.offset + n_bytes > cursor.size:
                raise FileFormatError(
                    f"{self.path}: truncated: {plain(name)} needs {placed.offset + n_bytes} bytes, "
                    f"the file has {cursor.size}; fetch it again"
                )
            tensors[name] = placed
        return metadata, tensors

    def _info(self, cursor: _Cursor) -> tuple[str, TensorInfo]:
        name = cursor.string()
        said = f"{self.path}: {plain(name)}"
        n_dims = cursor.scalar("I")
        if n_dims > 4:
            raise FileFormatError(f"{said}: expected at most 4 dimensions; got {n_dims}")
        shape = tuple(cursor.scalar("Q") for _ in range(n_dims))[::-1]
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        if kind not in self._block_sizes:
            raise FileFormatError(f"{said}: unknown tensor type {kind}")
        block, block_bytes = self._block_sizes[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise FileFormatError(
                f"{said}: expected rows of a multiple of {block}; got shape {shape}"
            )
        return name, TensorInfo(shape, kind, offset, shape[-1] // block * block_bytes)


class _Cursor:
    """Reads a GGUF header value by value; every length is checked against what is left."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view, self.size, self.position = view, len(view), 0

    def take(self, n: int) -> bytes:
        if n > self.size - self.position:
            raise ValueError(f"{n} bytes expected at {self.position}, the file has {self.size}")
        self.position += n
        return self.view[self.position - n : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self._code(kind))
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        width = struct.calcsize("<" + self._code(item))
        return list(struct.unpack(f"<{count}{self._code(item)}", self.take(count * width)))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind} before byte {self.position}")
        return _SCALARS[kind]
