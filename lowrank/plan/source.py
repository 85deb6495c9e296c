"""The configuration of a model, wherever it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError
from lowrank.io.hub import fetch_files, is_repo_id
from lowrank.io.json_files import read_json
from lowrank.models.config import DecoderConfig
from lowrank.models.gguf import GGUFModel


def read_config(
    model: str | Path | Mapping[str, Any] | DecoderConfig, revision: str | None, token: str | None
) -> DecoderConfig:
    """That of a directory, its config.json, a GGUF file, a hub repository, or numbers by
    config.json's names.

    Numbers without a `model_type` are a Llama's. Of a repository nothing else is fetched.
    """
    if isinstance(model, DecoderConfig):
        return model
    if isinstance(model, Mapping):
        return DecoderConfig.from_hf({"model_type": "llama", **model})
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix == ".gguf" and path.is_file():
        return GGUFModel(path).config
    elif not path.is_file():
        if not isinstance(model, str) or not is_repo_id(model):
            raise ConfigError(
                f"{model}: no such directory, config.json or .gguf file, and no hub repository "
                "'owner/name'"
            )
        path = fetch_files(model, ["config.json"], revision, token) / "config.json"
    try:
        return DecoderConfig.from_hf(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
