"""A Hugging Face model directory: config.json and the tensors of its safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowrank.errors import ConfigError
from lowrank.io.json_files import read_json
from lowrank.io.shards import Shards
from lowrank.models.config import DecoderConfig


class HFDirectory(Shards):
    """The tensors of a directory and the decoder's `config`.

    Raises FileFormatError as Shards does, and ConfigError for a model the decoder cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.config = read_config(Path(path))
        super().__init__(path)


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
