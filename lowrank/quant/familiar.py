"""The tutorials' words for quantizing: those of transformers' BitsAndBytesConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lowrank.errors import ConfigError

from .registry import Quantizer, get

_FOUR_BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant")


def translate(
    quantizer: str | Quantizer | None,
    compute_dtype: torch.dtype | None,
    skip: Iterable[str],
    words: Mapping[str, Any],
    quantization_config: object | None,
) -> tuple[str | Quantizer | None, torch.dtype | None, Iterable[str]]:
    """(quantizer, compute_dtype, skip), from the tutorials' words if there are any.

    `words`: load_in_4bit, load_in_8bit, bnb_4bit_...; None and False are as good as absent. Their
    defaults are transformers': fp4, scales not quantized again; without a dtype to compute in, it
    is that of x. `quantization_config` is an object or a mapping with those words, and
    llm_int8_skip_modules, which `skip` then has too; llm_int8_threshold changes nothing, as no x is
    quantized here. Raises ConfigError for words that contradict each other, or `quantizer`.
    """
    given = {word: value for word, value in words.items() if value not in (None, False)}
    if quantization_config is not None:
        if given:
            raise ConfigError(
                f"{next(iter(given))}: expected in quantization_config or beside it; got both"
            )
        given, left_out = _of_config(quantization_config)
        skip = [*skip, *left_out]
    if not given and quantization_config is None:
        return quantizer, compute_dtype, skip
    loads = [word for word in ("load_in_4bit", "load_in_8bit") if given.pop(word, False)]
    if len(loads) != 1:
        got = "both" if loads else f"neither, and {', '.join(given)}"
        raise ConfigError(f"load_in_4bit, load_in_8bit: expected one of them; got {got}")
    if quantizer is not None:
        raise ConfigError(f"{loads[0]}: expected no quantizer beside it; got {quantizer!r}")
    if loads == ["load_in_8bit"]:
        if given:
            raise ConfigError(f"{next(iter(given))}: belongs to load_in_4bit; got load_in_8bit")
        return get("int8"), compute_dtype, skip
    kind = given.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("fp4", "nf4"):
        raise ConfigError(f"bnb_4bit_quant_type: expected 'fp4' or 'nf4'; got {kind!r}")
    compute = _dtype(given.get("bnb_4bit_compute_dtype"))
    if None not in (compute, compute_dtype) and compute != compute_dtype:
        raise ConfigError(
            f"bnb_4bit_compute_dtype: expected compute_dtype's, {compute_dtype}; got {compute}"
        )
    double = bool(given.get("bnb_4bit_use_double_quant", False))
    return get(kind, double_quant=double), compute or compute_dtype, skip


def _of_config(config: object) -> tuple[dict[str, Any], list[str]]:
    """The words of a BitsAndBytesConfig, and the modules it leaves as they are."""
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    words = ("load_in_4bit", "load_in_8bit", *_FOUR_BIT)
    if not any(read(word) for word in words[:2]):
        raise ConfigError(
            "quantization_config: expected load_in_4bit or load_in_8bit in it; got "
            f"{type(config).__name__} without; or pass quantizer="
        )
    given = {word: read(word) for word in words if read(word) not in (None, False)}
    if not read("load_in_4bit"):  # its fields are there, at their defaults
        given = {word: value for word, value in given.items() if word not in _FOUR_BIT}
    return given, list(read("llm_int8_skip_modules") or [])


def _dtype(value: Any) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        found = value
    else:
        found = getattr(torch, str(value).removeprefix("torch."), None)
    if value is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"bnb_4bit_compute_dtype: expected a float dtype; got {value!r}")
    return found
