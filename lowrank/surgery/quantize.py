"""Quantize the weights of any model."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from lowrank import quant
from lowrank.errors import ConfigError, LowrankError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_experts import QuantExperts, is_transposed, replace_parameter
from lowrank.nn.quant_linear import QuantLinear, is_conv1d
from lowrank.nn.quant_weight import QuantWeight, resolve
from lowrank.quant import Quantizer, familiar

from .inject import replace_modules
from .targets import check_each_matches, check_model, matches, walk

# Heads and routers: small, and what an error in them costs is large.
SKIP = ("lm_head", "gate", "router", "router.layer", "router.classifier", "shared_expert_gate")


def quantize(
    model: nn.Module,
    quantizer: str | Quantizer | None = None,
    double_quant: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    skip: Iterable[str] = SKIP,
    embeddings: bool = False,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str | None = None,
    bnb_4bit_compute_dtype: torch.dtype | str | None = None,
    bnb_4bit_use_double_quant: bool | None = None,
    quantization_config: object | None = None,
) -> nn.Module:
    """Replace every linear layer by a QuantLinear, in place, but those in `skip`.

    Linear are nn.Linear, GPT-2's Conv1D, and the 3-D parameters [E, N, K] of a module whose class
    is called ...Experts, as fused mixtures of experts have them: each becomes a QuantExperts.
    `skip` holds names or suffixes of modules and of such parameters.

    With `embeddings`, every nn.Embedding becomes a QuantEmbedding, and a linear layer tied to one,
    in `skip` or not, shares its storage. `quantizer` None means nf4; `double_quant` belongs to one
    given by name, and None to that scheme's own default. The rest are the tutorials' words for a
    quantizer and compute_dtype, and quantization_config an object with them (`quant.familiar`).

    Returns the model. Raises ConfigError for what cannot be quantized and WeightError at a NaN or
    inf, naming it; the model is then as it was.
    """
    check_model(model)
    words = {
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "bnb_4bit_quant_type": bnb_4bit_quant_type,
        "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
        "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
    }
    skip = names_to_skip(skip)
    quantizer, compute_dtype, skip = familiar.translate(
        quantizer, compute_dtype, skip, words, quantization_config
    )
    quantizer = "nf4" if quantizer is None else quantizer
    if double_quant is None:
        quantizer = resolve(quantizer)
    elif isinstance(quantizer, str):
        quantizer = quant.get(quantizer, double_quant=double_quant)
    else:
        raise ConfigError(
            "double_quant: expected None beside a quantizer object, which has its own options"
        )
    experts = _experts(model)
    named = [s for s in skip if s not in SKIP and not any(matches(n, [s]) for n in experts)]
    check_each_matches(model, named, "skip")

    tables = _embeddings(model, skip) if embeddings else {}
    linears = linear_layers(model, skip, {id(table.weight) for table in tables})
    experts = {n: at for n, at in experts.items() if not matches(n, skip)}
    experts = {n: at for n, at in experts.items() if not matches(n.rpartition(".")[0], skip)}
    if not linears and not experts and not tables:
        raise TargetError("quantize: the model has no linear layer outside skip; nothing to do")
    _refuse_tied_to_dense(model, tables, linears)
    new = _replacements({**tables, **linears}, quantizer, compute_dtype)
    weights = {
        name: _expert_weights(name, module, leaf, quantizer, compute_dtype)
        for name, (module, leaf) in experts.items()
    }
    replace_modules(model, new)
    for name, (module, leaf) in experts.items():
        replace_parameter(module, leaf, weights[name])
    return model


def names_to_skip(skip: Iterable[str]) -> list[str]:
    """The names as a list. Raises ConfigError for what is none, such as a single string."""
    if isinstance(skip, str):
        raise ConfigError(f"skip: expected a sequence of names; got the string {skip!r}")
    names = list(skip) if isinstance(skip, Iterable) else [skip]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"skip: expected a sequence of names; got {skip!r}")
    return names


def linear_layers(
    model: nn.Module, skip: list[str], tied: Collection[int] = ()
) -> dict[nn.Module, str]:
    """The linear layers outside `skip`, and their names; those whose weight's id is in `tied` too.

    Those that adapters are on are their bases. Raises ConfigError for a merged adapter.
    """
    linears: dict[nn.Module, str] = {}
    for name, module in walk(model):
        if isinstance(module, AdaptedLayer):
            if module.merged:
                raise ConfigError(
                    f"{name}: expected an unmerged layer; an adapter is merged: call unmerge first"
                )
            module = module.base_layer
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and (
            id(module.weight) in tied or not matches(name, skip)
        ):
            linears.setdefault(module, name)
    return linears


def _embeddings(model: nn.Module, skip: list[str]) -> dict[nn.Module, str]:
    tables: dict[nn.Module, str] = {}
    for name, module in walk(model):
        if isinstance(module, nn.Embedding) and not matches(name, skip):
            if type(module) is not nn.Embedding:
                raise ConfigError(
                    f"{name}: expected an nn.Embedding; got {type(module).__name__}, which may do "
                    f"more; add {name!r} to skip"
                )
            tables.setdefault(module, name)
    return tables


def _experts(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The 3-D weights of experts by name: the module, and the parameter's name in it."""
    return {
        f"{name}.{leaf}" if name else leaf: (module, leaf)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        for leaf, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and weight.is_floating_point()
    }


def _refuse_tied_to_dense(
    model: nn.Module, tables: dict[nn.Module, str], linears: dict[nn.Module, str]
) -> None:
    dense = {
        id(m.weight): n for n, m in walk(model) if isinstance(m, nn.Embedding) and m not in tables
    }
    for linear, name in linears.items():
        if id(linear.weight) in dense:
            raise ConfigError(
                f"{name}.weight: is also {dense[id(linear.weight)]}.weight; add {name!r} to skip, "
                "or quantize both with embeddings=True"
            )


def _replacements(
    modules: dict[nn.Module, str], quantizer: Quantizer, compute_dtype: torch.dtype | None
) -> dict[nn.Module, QuantWeight]:
    """A quantized module for each; those that share a weight share its storage."""
    new: dict[nn.Module, QuantWeight] = {}
    held: dict[tuple[int, bool], QuantWeight] = {}  # by the weight, and whether it is transposed
    for module, name in modules.items():
        key = id(module.weight), is_conv1d(module)
        if key not in held:
            new[module] = held[key] = _quantized(name, module, quantizer, compute_dtype)
        else:
            new[module] = QuantLinear.from_tied(held[key], module.bias, compute_dtype)
            new[module].train(module.training)
            new[module].fan_in_fan_out = key[1]
    return new


def _quantized(
    name: str, module: nn.Module, quantizer: Quantizer, compute_dtype: torch.dtype | None
) -> QuantWeight:
    try:
        if isinstance(module, nn.Embedding):
            return QuantEmbedding.from_embedding(module, quantizer)
        return QuantLinear.from_linear(module, quantizer, compute_dtype)
    except LowrankError as error:
        raise type(error)(f"{name}: {error}") from error


def _expert_weights(
    name: str,
    module: nn.Module,
    leaf: str,
    quantizer: Quantizer,
    compute_dtype: torch.dtype | None,
) -> QuantExperts:
    weight: Tensor = getattr(module, leaf)
    try:
        made = QuantExperts(weight, quantizer, is_transposed(module), compute_dtype)
    except LowrankError as error:
        raise type(error)(f"{name}: {error}") from error
    return made.train(module.training)
