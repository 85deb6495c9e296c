"""Where the tensors of a model come from: opened, nothing but headers read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lowrank.errors import ConfigError
from lowrank.io.hub import fetch_model, is_repo_id
from lowrank.io.shards import Shards, Tensors
from lowrank.models.gguf import GGUFModel
from lowrank.models.hf import open_directory
from lowrank.models.origin import Origin, origin_of


def open_weights(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> Tensors:
    """The tensors of a directory, a hub repository or a .gguf file by name, each read when taken.

    Their shapes are `.shapes`, of which nothing is read. The directory may be of any model whose
    weights are safetensors, or of an adapter, which stands for its base; see `load_model`. Names
    and shapes are those of the model that `load_model` makes of it, where it makes one.
    """
    return tensors_of(origin_of(source, revision, token), token)


def tensors_of(origin: Origin, token: str | None) -> Tensors:
    opened = open_origin(origin, open_directory, token)
    return Tensors(opened.shapes, opened.read)


_Directory = TypeVar("_Directory", bound=Shards)


def open_origin(
    origin: Origin, directory: Callable[[str | Path], _Directory], token: str | None
) -> _Directory | GGUFModel:
    """What `directory` makes of the directory, fetched if it is a repository; or the GGUF file."""
    source, path = origin.model, Path(origin.model)
    if path.is_dir():
        return directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{source}: expected a directory or a .gguf file; pass its directory")
        return GGUFModel(path)
    if isinstance(source, str) and path.suffix != ".gguf" and is_repo_id(source):
        return directory(fetch_model(source, origin.revision, token))
    error = f"{source}: no such directory or .gguf file, and no hub repository 'owner/name'"
    if origin.adapter is not None:
        error = (
            f"{origin.adapter}: its base, {error}; load the base from where it is, and put the "
            "adapter onto it with lowrank.load_adapter(model, path)"
        )
    raise ConfigError(error)
