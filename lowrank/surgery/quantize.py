"""Quantize the linear layers of any model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lowrank import quant
from lowrank.errors import ConfigError, TargetError, WeightError
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear
from lowrank.quant import Quantizer

from .inject import replace_modules
from .targets import check_each_matches, matches, walk


def quantize(
    model: nn.Module,
    quantizer: str | Quantizer = "nf4",
    double_quant: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    skip: Iterable[str] = ("lm_head",),
) -> nn.Module:
    """Replace every nn.Linear by a QuantLinear, in place, but those in `skip` (names or suffixes).

    `double_quant` belongs to a quantizer given by name; None means that scheme's own default.
    Returns the model. Raises WeightError at a NaN or inf, naming it; the model is then as it was.
    """
    if isinstance(quantizer, str):
        quantizer = quant.get(
            quantizer, **({} if double_quant is None else {"double_quant": double_quant})
        )
    elif double_quant is not None:
        raise ConfigError(
            "double_quant: expected None beside a quantizer object, which has its own options"
        )
    if isinstance(skip, str):
        raise ConfigError(f"skip: expected a sequence of names; got the string {skip!r}")
    skip = list(skip)
    check_each_matches(model, [s for s in skip if s != "lm_head"], "skip")

    linears: dict[nn.Module, str] = {}
    for name, module in walk(model):
        if isinstance(module, LoRALinear):
            if module.merged:
                raise ConfigError(
                    f"quantize: expected unmerged layers; {name} is merged: call unmerge first"
                )
            module = module.base_layer
        if isinstance(module, nn.Linear) and not matches(name, skip):
            linears.setdefault(module, name)
    if not linears:
        raise TargetError("quantize: the model has no nn.Linear outside skip; nothing to do")
    shared = {id(m.weight): n for n, m in walk(model) if isinstance(m, nn.Embedding)}
    for linear, name in linears.items():
        if id(linear.weight) in shared:
            raise ConfigError(
                f"{name}.weight: is also {shared[id(linear.weight)]}.weight; add {name!r} to skip"
            )

    new: dict[nn.Module, nn.Module] = {}
    for linear, name in linears.items():
        try:
            new[linear] = QuantLinear.from_linear(linear, quantizer, compute_dtype=compute_dtype)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error
    replace_modules(model, new)
    return model
