"""safetensors files: written whole or not at all, refused whole if anything in them is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.errors import FileFormatError

from .atomic import write_files

if TYPE_CHECKING:  # at run time only where a file is read or written: the kernels need no files
    from safetensors import safe_open


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors to `path`, or leave what is there as it was."""
    path = Path(path)
    write_files(path.parent, {path.name: lambda aside: write_safetensors(aside, tensors, metadata)})


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write straight to `path`, each tensor dense and with its own memory. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor.contiguous()
    try:
        save_file(owned, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # the system's own error is in its text
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextmanager
def open_safetensors(path: str | Path, device: str | torch.device = "cpu") -> Iterator[safe_open]:
    """Open a file to take tensors one by one: keys(), get_tensor(name), get_slice, metadata().

    The header is checked against the file's length first: known dtypes, shapes that fit their byte
    ranges, ranges that cover the file without gap or overlap. Raises FileFormatError otherwise.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file")
    try:
        handle = safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError, UnicodeError, ValueError) as error:
        size = path.stat().st_size
        raise FileFormatError(
            f"{path}: not a whole safetensors file ({error}); it has {size} bytes: get it again"
        ) from error
    with handle:
        yield handle


def load_safetensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of the file by name. Raises FileFormatError if it is damaged or truncated."""
    from safetensors import SafetensorError

    with open_safetensors(path, device) as handle:
        try:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path}: cannot read a tensor ({error})") from error
