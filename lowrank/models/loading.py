"""A decoder from a directory, the hub or a GGUF file, quantized tensor by tensor as it streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import (
    ConfigError,
    DtypeError,
    FileFormatError,
    LowrankError,
    ShapeError,
    WeightError,
)
from lowrank.io.adapter import load_adapter
from lowrank.io.ahead import read_ahead
from lowrank.io.hub import fetch_model, is_repo_id
from lowrank.io.pages import Reused, empty_bytes
from lowrank.io.quantized import (
    QuantizedTensors,
    join,
    load_layer,
    quantized_modules,
    quantized_twin,
)
from lowrank.io.shards import Shards, Tensors
from lowrank.models.decoder import Decoder
from lowrank.models.expert_files import Gathered, in_files
from lowrank.models.experts import Experts, Router
from lowrank.models.gguf import GGUFModel
from lowrank.models.hf import HFDirectory, open_directory
from lowrank.models.named import Weights, check_layers, check_tensors
from lowrank.models.origin import Origin, origin_of
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_experts import QuantExperts, replace_parameter
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.quant_weight import QuantWeight, resolve
from lowrank.ops.checks import check_float
from lowrank.progress import bar
from lowrank.quant import Quantizer, Storage, bitsandbytes, familiar, quantizer_of
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
    origin = origin_of(source, revision, token)
    weights: Weights = _open(origin, HFDirectory, token)
    source = origin.model
    check_layers(weights, source)
    with torch.device("meta"):
        model = Decoder(weights.config)
    quantized = quantized_modules(weights.shapes)
    _check_quantized(model, weights, quantized, quantizer, source)
    check_tensors(model, weights, quantized, source)
    holders = _holders(model, {*weights.shapes, *quantized})
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

    gathered: dict[str, Gathered] = {}  # experts that are not all there yet

    def make(
        holder: Holder, tensors: dict[str, Tensor]
    ) -> QuantWeight | nn.Parameter | dict[str, Tensor] | None:
        name, module = holder.name, holder.module
        part, rows = holder.packed(quantized), None
        if part is not None and (part != name or isinstance(module, Router)):
            rows = _stored(holder, tensors, part, source)
        if isinstance(module, Router) and rows is not None:
            tensors = {"weight": quantizer_of(rows).dequantize(rows, dtype)}
        if name in quantized and rows is None:
            return _prequantized(holder, tensors, dtype, compute_dtype, source)
        if isinstance(module, Experts):
            if name not in gathered:
                shape = tuple(module.get_parameter(*holder.files).shape)
                by = quantizer if name in to_quantize else None
                gathered[name] = Gathered(shape, by, dtype, compute_dtype)
            rows = next(iter(tensors.values())) if rows is None else rows
            layer = _with_rows(gathered[name], rows, name)
            if layer is not None:
                del gathered[name]
            return layer
        if name in to_quantize:
            return _quantized(holder, tensors, quantizer, dtype, compute_dtype)
        return {leaf: tensor.to(dtype) for leaf, tensor in tensors.items()}

    def put(holder: Holder, tensors: dict[str, Tensor]) -> None:
        name, module = holder.name, holder.module
        layer = make(holder, {leaf: tensor.to(where) for leaf, tensor in tensors.items()})
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

    if sharded and weights_budget is not None:
        raise ConfigError("sharded: expected no weights_budget beside it; leave one out")
    mixed = quantized or weights.config.mixture is not None
    if sharded and (mixed or isinstance(weights, GGUFModel)):
        logger.warning("%s: has no dense safetensors, or experts: every process reads all", source)
        sharded = False
    where = "meta" if sharded else device
    home = where if weights_budget is None else "cpu"  # and what is quantized is so on the device
    read = partial(_read, weights, quantized, to_quantize, Reused(), source)
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
        model.unread = Unread(model, holders, make, read, weights.read_rows, parts, device)
    else:
        read_ahead(bar(f"loading {Path(source).name}", holders), read, put)
    model.tie_weights(compute_dtype)
    model.name_or_path = str(source)
    if weights_budget is not None:
        from lowrank.models.placement import place

        model.placement = place(model, model.body.blocks, torch.device(device), weights_budget)
    if origin.adapter is not None:
        load_adapter(model, origin.adapter, weights=_tensors(origin, token))
    return model.eval()


def open_weights(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> Tensors:
    """The tensors of a directory, a hub repository or a .gguf file by name, each read when taken.

    Their shapes are `.shapes`, of which nothing is read. The directory may be of any model whose
    weights are safetensors, or of an adapter, which stands for its base; see `load_model`. Names
    and shapes are those of the model that `load_model` makes of it, where it makes one.
    """
    return _tensors(origin_of(source, revision, token), token)


def _tensors(origin: Origin, token: str | None) -> Tensors:
    opened = _open(origin, open_directory, token)
    return Tensors(opened.shapes, opened.read)


_Directory = TypeVar("_Directory", bound=Shards)


def _open(
    origin: Origin, directory: Callable[[str | Path], _Directory], token: str | None
) -> _Directory | GGUFModel:
    """Where tensors come from, nothing but headers read yet."""
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


class Holder(NamedTuple):
    """What is read together: the parameters of a module, or rows of the weights of experts.

    `name` is that of the module, or of the weights. `files` are the names of tensors in files by
    those in the module; `shape` is that of the first.
    """

    name: str
    module_name: str
    module: nn.Module
    files: Mapping[str, str]
    shape: tuple[int, ...]

    def packed(self, quantized: Collection[str]) -> str | None:
        """Which of the `quantized` modules of files is this one, or has its weight."""
        if self.name in quantized:
            return self.name
        part = next(iter(self.files.values())).removesuffix(".weight")
        return part if part in quantized else None


def _holders(model: Decoder, found: Collection[str]) -> list[Holder]:
    """All that takes tensors, of which the files have those `found`; a tied head takes none."""
    holders = []
    for name, module in model.named_modules():
        files = {
            leaf: in_files(model.config.family, join(name, leaf), tuple(p.shape), found)
            for leaf, p in module.named_parameters(recurse=False)
        }
        if isinstance(module, Experts):
            for leaf, parts in files.items():
                weights = join(name, leaf)
                holders += [Holder(weights, name, module, {leaf: p}, s) for p, s in parts.items()]
        elif files and not (name == "lm_head" and model.config.tie_word_embeddings):
            shape = next(iter(next(iter(files.values())).values()))
            own = {leaf: p for leaf, (p,) in files.items()}
            holders.append(Holder(name, name, module, own, shape))
    return holders


def _stored(
    holder: Holder, tensors: Mapping[str, Tensor], part: str, source: str | Path
) -> Storage:
    """What a layer of bitsandbytes is that is a part of one of ours."""
    try:
        return bitsandbytes.read(tensors, f"{part}.", holder.shape)
    except LowrankError as error:
        raise type(error)(f"{source}: {error}") from error


def _with_rows(
    experts: Gathered, rows: Tensor | Storage, name: str
) -> nn.Parameter | QuantExperts | None:
    try:
        return experts.add(rows)
    except (WeightError, DtypeError, ShapeError) as error:
        raise type(error)(f"{name}: {error}") from error


def _quantized(
    holder: Holder,
    fill: Mapping[str, Tensor],
    quantizer: Quantizer,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
) -> QuantWeight:
    name, module = holder.name, holder.module
    try:
        # from the file's own precision; `dtype` is what the weight would be, were it dequantized
        storage = replace(quantizer.quantize(fill["weight"]), dtype=dtype)
    except (WeightError, DtypeError) as error:
        raise type(error)(f"{name}.{error}") from error
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.from_storage(storage, quantizer)
    bias = nn.Parameter(fill["bias"].to(dtype)) if "bias" in fill else None
    return QuantLinear.from_storage(storage, quantizer, bias, compute_dtype)


def _prequantized(
    holder: Holder,
    own: dict[str, Tensor],
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    source: str | Path,
) -> QuantWeight:
    """The layer that the files hold quantized, its codes and scales as they are."""
    module = holder.module
    if isinstance(module, Experts):
        layer = QuantExperts(module.get_parameter(*holder.files))
    else:
        layer = quantized_twin(module, holder.name, source)
    if "bias" in own:
        own["bias"] = own["bias"].to(dtype)
    load_layer(layer, own, source, holder.name)
    layer.storage = replace(layer.storage, dtype=dtype)
    if isinstance(layer, QuantLinear | QuantExperts):
        layer.compute_dtype = compute_dtype
    return layer


def _read(
    weights: Weights,
    quantized: Mapping[str, QuantizedTensors],
    to_quantize: Set[str],
    reused: Reused,
    source: str | Path,
    holder: Holder,
) -> dict[str, Tensor]:
    """The tensors of a holder by leaf; a weight that will be quantized in `reused` memory."""
    if (part := holder.packed(quantized)) is not None:
        return {leaf: weights.read(join(part, leaf)) for leaf in quantized[part].names}
    tensors = {}
    for leaf, name in holder.files.items():
        # a bias stays, and so does what is dense, but for rows that are copied
        passes = isinstance(holder.module, Experts) or (
            holder.name in to_quantize and leaf == "weight"
        )
        tensor = tensors[leaf] = weights.read(name, reused.empty if passes else empty_bytes)
        if not tensor.is_floating_point():
            raise FileFormatError(f"{source}: {name}: expected floats; got {tensor.dtype}")
    return tensors


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
