"""A model as the Hugging Face directory that transformers, or `load_model`, reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from lowrank.errors import WeightError
from lowrank.io.json_files import write_json
from lowrank.io.safetensors import Lazy
from lowrank.io.shards import write_shards
from lowrank.models.decoder import Decoder
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
    with an index; one dequantized weight at a time is in memory. A tied head is stored once. Raises
    WeightError while adapters are in the model, ConfigError if the directory already holds weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            raise WeightError(
                f"{name}: expected no adapter; save it with save_adapter, or merge it into "
                "the model with merge_and_unload first"
            )
    config = model.config.to_hf(dtype or model.model.norm.weight.dtype)
    others = {"config.json": partial(write_json, config)}
    write_shards(directory, dict(_weights(model, dtype)), max_shard_bytes, others)


def _weights(model: Decoder, dtype: torch.dtype | None) -> Iterator[tuple[str, Lazy]]:
    for module_name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            kept = dtype or module.weight_dtype
            shape = (module.out_features, module.in_features)
            yield f"{module_name}.weight", Lazy(kept, shape, partial(module.dequantize, kept))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # the others are QuantLinear's storage
            kept = dtype or parameter.dtype
            make = partial(parameter.detach().to, kept)
            yield name, Lazy(kept, tuple(parameter.shape), make)
