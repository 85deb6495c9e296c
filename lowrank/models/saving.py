"""A model as the Hugging Face directory that transformers, or `load_model`, reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError, WeightError
from lowrank.io.atomic import write_files
from lowrank.io.safetensors import write_safetensors
from lowrank.models.decoder import Decoder
from lowrank.models.hf import INDEX, SINGLE
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear


def save_model(
    model: Decoder,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and the weights as safetensors, all or nothing; quantized ones dequantized.

    `dtype` None keeps each weight's own. Above `max_shard_bytes` the weights are split into shards
    with an index, and at most one shard is in memory. A tied head is stored once. Raises
    WeightError while adapters are in the model, ConfigError if the directory already holds weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise WeightError(
                f"{name}: expected no adapter; save it with save_adapter, or merge it into "
                "the model with merge_and_unload first"
            )
    directory = Path(directory)
    if old := sorted(path.name for path in directory.glob("*.safetensors*")):
        raise ConfigError(f"{directory}: expected no weights there; found {old[0]}; name a new one")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes: expected at least 1; got {max_shard_bytes}")
    shards: list[dict[str, Callable[[], Tensor]]] = [{}]
    total = filled = 0
    for name, n_bytes, get in _weights(model, dtype):
        if filled and filled + n_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = get
        filled, total = filled + n_bytes, total + n_bytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    writers = {name: partial(_write, shard) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        writers[INDEX] = partial(_write_json, index)
    config = model.config.to_hf(dtype or model.model.norm.weight.dtype)
    write_files(directory, {**writers, "config.json": partial(_write_json, config)})


def _weights(
    model: Decoder, dtype: torch.dtype | None
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """(name, bytes, function that makes the tensor) of every weight in its saved form."""
    for module_name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            kept = dtype or module.weight_dtype
            n_bytes = module.out_features * module.in_features * kept.itemsize
            yield f"{module_name}.weight", n_bytes, partial(module.dequantize, kept)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # the others are QuantLinear's storage
            kept = dtype or parameter.dtype
            yield name, parameter.numel() * kept.itemsize, partial(parameter.detach().to, kept)


def _write(shard: dict[str, Callable[[], Tensor]], path: Path) -> None:
    write_safetensors(path, {name: get() for name, get in shard.items()})


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
