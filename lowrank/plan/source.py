"""The configuration of a model, wherever it is written, and how its weights are stored there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.io.hub import fetch_files, is_repo_id
from lowrank.io.json_files import read_json
from lowrank.io.quantized import LOWRANK, join, quantized_modules
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.expert_files import in_files
from lowrank.models.experts import Experts
from lowrank.models.gguf import GGUFModel
from lowrank.models.hf import open_directory
from lowrank.models.quantization_config import QuantizationConfig
from lowrank.quant import Quantizer, quantizer_of
from lowrank.quant.description import read_description

_NUMBERS = {"model_type": "llama", "max_position_embeddings": 1 << 20}  # of any length


class Stored(NamedTuple):
    """What is quantized already: by which scheme, None if that is not said; what of linear layers
    and experts is not, and whether the embedding is.
    """

    quantizer: Quantizer | None
    skip: tuple[str, ...] = ()
    embeddings: bool = False


def read_config(
    model: str | Path | Mapping[str, Any] | DecoderConfig, revision: str | None, token: str | None
) -> tuple[DecoderConfig, Stored | None]:
    """That of a directory, its config.json, a GGUF file, a hub repository, or numbers by
    config.json's names; and what is quantized there, None if nothing.

    Numbers without a `model_type` are a Llama's. Of a repository nothing else is fetched; of a
    directory, its files tell what of it is quantized.
    """
    if isinstance(model, DecoderConfig):
        return model, None
    if isinstance(model, Mapping):
        return _parsed(model if "model_type" in model else {**_NUMBERS, **model})
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix == ".gguf" and path.is_file():
        return GGUFModel(path).config, None
    elif not path.is_file():
        if not isinstance(model, str) or not is_repo_id(model):
            raise ConfigError(
                f"{model}: no such directory, config.json or .gguf file, and no hub repository "
                "'owner/name'"
            )
        path = fetch_files(model, ["config.json"], revision, token) / "config.json"
    try:
        config, stored = _parsed(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if stored is not None and Path(model).is_dir():
        stored = _of_files(Path(model), config, stored.quantizer)
    return config, stored


def _parsed(raw: Mapping[str, Any]) -> tuple[DecoderConfig, Stored | None]:
    config, quantization = DecoderConfig.from_hf(raw), QuantizationConfig.from_hf(raw)
    if quantization is None:
        return config, None
    if quantization.format == LOWRANK:
        return config, Stored(None)
    skip = (name for name in _weights(config) if quantization.skips(name))
    return config, Stored(quantization.scheme, tuple(skip))


def _of_files(directory: Path, config: DecoderConfig, scheme: Quantizer | None) -> Stored:
    """What there is; the first of the quantized layers says by which scheme, if nothing else."""
    files = open_directory(directory)
    quantized, weights = quantized_modules(files.shapes), _weights(config)
    first = next((name for name in weights if name in quantized), None)
    there = {
        name
        for name, shape in weights.items()
        for part in in_files(config.family, name, shape, quantized)
        if part.removesuffix(".weight") in quantized
    }
    if scheme is None and first is not None:
        own = {name: files.read(join(first, name)) for name in quantized[first].names}
        described = read_description(own.pop("_extra_state"), first)
        scheme = quantizer_of(described.storage(own, f"{first}."))
    skip = tuple(name for name in weights if name not in there)
    return Stored(scheme, skip, config.family.path("body", "embedding") in quantized)


def _weights(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The linear layers, and the weights of experts, with their shapes."""
    with torch.device("meta"):
        model = Decoder(config)
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = tuple(module.weight.shape)
        elif isinstance(module, Experts):
            found |= {join(name, leaf): tuple(p.shape) for leaf, p in module.named_parameters()}
    return found
