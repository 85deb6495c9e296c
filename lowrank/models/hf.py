"""A Hugging Face model directory: config.json, and the tensors of its safetensors files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowrank.errors import ConfigError
from lowrank.io.json_files import read_json
from lowrank.io.shards import Shards
from lowrank.models.config import DecoderConfig
from lowrank.models.quantization_config import QuantizationConfig


class HFDirectory(Shards):
    """The tensors of a directory, the decoder's `config`, and its `quantization`, None if dense.

    Raises FileFormatError as Shards does, and ConfigError for a model the decoder cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.config, self.quantization = read_config(Path(path))
        super().__init__(path)


def read_config(directory: Path) -> tuple[DecoderConfig, QuantizationConfig | None]:
    """What config.json says; generation_config.json's end tokens, being the fuller list, win."""
    place = directory / "config.json"
    raw = read_json(place)
    try:
        config, quantization = DecoderConfig.from_hf(raw), QuantizationConfig.from_hf(raw)
        place = directory / "generation_config.json"
        eos = read_json(place).get("eos_token_id") if place.is_file() else None
        if eos is not None:
            eos = tuple(eos) if isinstance(eos, list) else eos
            config = replace(config, eos_token_id=eos)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return config, quantization
