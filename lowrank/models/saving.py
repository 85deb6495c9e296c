"""A model as the Hugging Face directory that transformers, or `load_model`, reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank import quant
from lowrank.errors import ConfigError, LowrankError, WeightError
from lowrank.io.json_files import write_json
from lowrank.io.quantized import join, state_tensors
from lowrank.io.safetensors import Lazy
from lowrank.io.shards import write_shards
from lowrank.models.decoder import Decoder
from lowrank.models.expert_files import in_files, write_rows
from lowrank.models.hf import to_files
from lowrank.models.quantization_config import bitsandbytes_config, lowrank_config
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.quant_experts import QuantExperts
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.quant_weight import QuantWeight, quant_weights
from lowrank.quant import Storage, bitsandbytes
from lowrank.surgery.targets import check_model

Tensors = dict[str, Tensor | Lazy]


def save_model(
    model: Decoder,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    format: Literal["dense", "lowrank", "bitsandbytes"] = "dense",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and the weights as safetensors, all or nothing; `load_model` reads it.

    What becomes of quantized layers is `format`: "dense" dequantizes them, to `dtype` or else to
    each weight's own; "lowrank" keeps any scheme's tensors as they are, the state dict of the
    model; "bitsandbytes" writes nf4, fp4 and int8 as that does, and transformers reads it.

    Above `max_shard_bytes` there are shards and an index; one tensor at a time is made. A tied head
    is stored once. Raises WeightError while adapters are in the model, ConfigError if the directory
    already holds weights, or for layers that the format does not have.
    """
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            raise WeightError(
                f"{name}: expected no adapter; save it with save_adapter, or merge it into "
                "the model with merge_and_unload first"
            )
    if format not in _FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(_FORMATS)}; got {format!r}")
    if format != "dense":
        if dtype is not None:
            raise ConfigError(f'dtype: belongs to format="dense"; got {dtype} for {format!r}')
        if not any(isinstance(module, QuantWeight) for module in model.modules()):
            raise ConfigError(
                f"format: {format!r} keeps quantized layers, and the model has none; quantize it "
                "first, or leave format out"
            )
    tensors, quantization = _FORMATS[format](model, dtype)
    config = model.config.to_hf(dtype or model.body.norm.weight.dtype)
    if quantization is not None:
        config["quantization_config"] = quantization
    others = {"config.json": partial(write_json, config)}
    kept = () if quantization is None else quant_weights(model)
    tensors = to_files(model.config.family, tensors, kept)
    write_shards(directory, tensors, max_shard_bytes, others)


def to_bitsandbytes(name: str, storage: Storage) -> dict[str, Tensor]:
    """bitsandbytes' tensors of the layer `name`. ConfigError for what it cannot compute with."""
    try:
        return bitsandbytes.write(storage)
    except LowrankError as error:
        raise ConfigError(f'{name}: {error}; format="lowrank" takes any scheme') from error


def _dense(model: Decoder, dtype: torch.dtype | None) -> tuple[Tensors, None]:
    tensors: Tensors = {}
    for name, module in quant_weights(model).items():
        kept = dtype or module.weight_dtype
        if isinstance(module, QuantExperts):
            names = in_files(model.config.family, name, tuple(module.shape))
            rows = partial(quant.dequantize_rows, module.quantizer, module.storage, dtype=kept)
            tensors |= write_rows(names, kept, rows)
        else:
            make = partial(module.dequantize, kept)
            tensors[f"{name}.weight"] = Lazy(kept, module.shape, make)
    return tensors | _floats(model, dtype), None


def _lowrank(model: Decoder, _: None) -> tuple[Tensors, dict[str, Any]]:
    return dict(state_tensors(model)), lowrank_config()


def _bitsandbytes(model: Decoder, _: None) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    keys: set[str] = set()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantWeight)}
    for name, layer in layers.items():
        if not isinstance(layer, QuantLinear):
            raise ConfigError(
                f"{name}: expected a linear layer, as bitsandbytes quantizes; got "
                f'{type(layer).__name__}; format="lowrank" takes it'
            )
        written = to_bitsandbytes(name, layer.storage)
        keys.update(written)
        for key, tensor in written.items():
            make = partial(_bitsandbytes_tensor, layer, key)
            tensors[join(name, key)] = Lazy(tensor.dtype, tuple(tensor.shape), make)
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    compute_dtype = next(iter(layers.values())).compute_dtype or model.body.norm.weight.dtype
    config = bitsandbytes_config(keys, dense, compute_dtype)
    return {**tensors, **_floats(model)}, config


def _bitsandbytes_tensor(layer: QuantLinear, key: str) -> Tensor:
    return bitsandbytes.write(layer.storage)[key]


def _floats(model: Decoder, dtype: torch.dtype | None = None) -> Tensors:
    """Every parameter but the integers of quantized layers, as files have it."""
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parts = in_files(model.config.family, name, tuple(parameter.shape))
            kept = dtype or parameter.dtype
            tensors |= write_rows(parts, kept, partial(_rows, parameter.detach(), kept))
    return tensors


def _rows(tensor: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Of a tensor [..., K], or of a vector, its rows one above the other."""
    return tensor.flatten(0, max(tensor.dim() - 2, 0))[start:stop].to(dtype)


_FORMATS = {"dense": _dense, "lowrank": _lowrank, "bitsandbytes": _bitsandbytes}
