"""A decoder from a directory, the hub or a GGUF file, quantized tensor by tensor as it streams."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError
from lowrank.io.adapter import load_adapter
from lowrank.io.ahead import read_ahead
from lowrank.io.quantized import QuantizedTensors, quantized_modules
from lowrank.models.decoder import Decoder
from lowrank.models.experts import Experts
from lowrank.models.gguf import GGUFModel
from lowrank.models.hf import HFDirectory
from lowrank.models.holders import Holder, holders_of
from lowrank.models.making import Maker
from lowrank.models.named import Weights, check_layers, check_tensors
from lowrank.models.opening import open_origin, tensors_of
from lowrank.models.origin import origin_of
from lowrank.nn.quant_experts import QuantExperts, replace_parameter
from lowrank.nn.quant_weight import resolve
from lowrank.ops.checks import check_float
from lowrank.progress import bar
from lowrank.quant import Quantizer, familiar
from lowrank.surgery.quantize import names_to_skip
from lowrank.surgery.targets import check_each_matches, matches

logger = logging.getLogger("lowrank.models")


def load_model(
    source: str | Path,
    quantizer: str | Quantizer | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    skip: Iterable[str] = ("lm_head",),
    embeddings: bool = False,
    compute_dtype: torch.dtype | None = None,
    weights_budget: int | None = None,
    sharded: bool = False,
    revision: str | None = None,
    token: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str | None = None,
    bnb_4bit_compute_dtype: torch.dtype | str | None = None,
    bnb_4bit_use_double_quant: bool | None = None,
    quantization_config: object | None = None,
) -> Decoder:
    """The model in a Hugging Face directory, a hub repository `owner/name`, or a .gguf file.

    Of a directory or repository with an adapter alone, the base that its config names, and the
    adapter on it, frozen; `revision` is then the adapter's.

    With a `quantizer` every nn.Linear becomes a QuantLinear as its weight is read, but those whose
    name is or ends in one of `skip`; with `embeddings` the embedding too, a QuantEmbedding, whose
    storage a tied head then shares. Everything else is held in `dtype`. What a directory holds
    quantized, by bitsandbytes or by `save_model`, is taken as it is. Memory peaks at the finished
    model and twice the largest tensor. `compute_dtype` is that of QuantLinear.

    With a `weights_budget`, bytes of weights that may lie on the device, the blocks beyond it wait
    in host memory, frozen, and each comes while the one before it computes. A `sharded` model has
    no weights yet: a Trainer of parallel="fsdp", or `lowrank.train.shard`, has each process read
    and quantize rows of its own, where the quantizer is row_local. From `load_in_4bit` on, the
    arguments are the tutorials' words for a quantizer and compute_dtype. Raises ConfigError
    for what is no known model, FileFormatError for damaged files and for tensors that
    are missing, unexpected or misshaped, WeightError for a NaN in what is to be quantized.
    """
    check_float("dtype", dtype)
    words = {
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "bnb_4bit_quant_type": bnb_4bit_quant_type,
        "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
        "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
    }
    quantizer, compute_dtype, skip = familiar.translate(
        quantizer, compute_dtype, names_to_skip(skip), words, quantization_config
    )
    quantizer = None if quantizer is None else resolve(quantizer)
    if embeddings and quantizer is None:
        raise ConfigError("embeddings: belongs to a quantizer; got True without one")
    if sharded and weights_budget is not None:
        raise ConfigError("sharded: expected no weights_budget beside it; leave one out")
    origin = origin_of(source, revision, token)
    weights: Weights = open_origin(origin, HFDirectory, token)
    source = origin.model
    check_layers(weights, source)
    with torch.device("meta"):
        model = Decoder(weights.config)
    quantized = quantized_modules(weights.shapes)
    _check_quantized(model, weights, quantized, quantizer, source)
    check_tensors(model, weights, quantized, source)
    holders = holders_of(model, {*weights.shapes, *quantized})
    own = {holder.name for holder in holders}
    unknown = [s for s in skip if s != "lm_head" and not any(matches(name, [s]) for name in own)]
    check_each_matches(model, unknown, "skip")
    if compute_dtype is None and weights.quantization is not None:
        compute_dtype = weights.quantization.compute_dtype
    kinds = (nn.Linear, Experts, nn.Embedding) if embeddings else (nn.Linear, Experts)
    to_quantize = {
        holder.name
        for holder in holders
        if quantizer is not None and isinstance(holder.module, kinds)
        if not matches(holder.name, skip) and not matches(holder.module_name, skip)
    }
    maker = Maker(weights, quantized, quantizer, to_quantize, dtype, compute_dtype, source)

    def put(holder: Holder, tensors: dict[str, Tensor]) -> None:
        name, module = holder.name, holder.module
        layer = maker.make(holder, {leaf: tensor.to(where) for leaf, tensor in tensors.items()})
        if isinstance(layer, dict):
            for leaf, tensor in layer.items():
                setattr(module, leaf, nn.Parameter(tensor.to(home)))
            return
        if layer is None:
            return
        for tensor in [layer] if isinstance(layer, nn.Parameter) else layer.parameters():
            tensor.data = tensor.data.to(home)
        parent, _, child = name.rpartition(".")
        if isinstance(layer, QuantExperts):
            replace_parameter(module, child, layer)
        else:
            setattr(model.get_submodule(parent), child, layer)

    mixed = quantized or weights.config.mixture is not None
    if sharded and (mixed or isinstance(weights, GGUFModel)):
        logger.warning("%s: has no dense safetensors, or experts: every process reads all", source)
        sharded = False
    where = "meta" if sharded else device
    home = where if weights_budget is None else "cpu"  # and what is quantized is so on the device
    if sharded:
        from lowrank.models.sharded import Unread

        assert isinstance(weights, HFDirectory)
        for holder in holders:
            put(holder, {leaf: weights.blank(name) for leaf, name in holder.files.items()})
        parts = {h.name for h in holders if h.name not in to_quantize}
        parts |= to_quantize if getattr(quantizer, "row_local", False) else set()
        if together := len(to_quantize - parts):
            logger.warning("%d weights are read whole: rows are quantized together", together)
        model.tie_weights(compute_dtype)
        model.unread = Unread(model, holders, maker, weights.read_rows, parts, device)
    else:
        read_ahead(bar(f"loading {Path(source).name}", holders), maker.read, put)
    model.tie_weights(compute_dtype)
    model.name_or_path = str(source)
    if weights_budget is not None:
        from lowrank.models.placement import place

        model.placement = place(model, model.body.blocks, torch.device(device), weights_budget)
    if origin.adapter is not None:
        load_adapter(model, origin.adapter, weights=tensors_of(origin, token))
    return model.eval()


def _check_quantized(
    model: Decoder,
    weights: Weights,
    quantized: Mapping[str, QuantizedTensors],
    quantizer: Quantizer | None,
    source: str | Path,
) -> None:
    config = weights.quantization
    if config is None:
        for name, tensors in quantized.items():
            raise ConfigError(
                f"{source}: {name}: is quantized, {tensors.format}, which config.json does not "
                "say; get the config.json that came with these weights"
            )
        return
    if quantizer is not None:
        raise ConfigError(
            f"quantizer: expected None for {source}, which is quantized already, {config.format}; "
            "leave it out, or load the model that it was made from"
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if model.config.tie_word_embeddings:
        linears.remove("lm_head")
    try:
        config.check(linears, quantized)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
