"""The `quantization_config` of a config.json: which layers the files hold quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank import quant
from lowrank.errors import ConfigError
from lowrank.io.quantized import BITSANDBYTES, LOWRANK, QuantizedTensors
from lowrank.quant import Quantizer

VERSION = 1
_HEADS = ["lm_head"]  # what transformers leaves dense if the config names no modules
_STATE = "weight.quant_state.bitsandbytes__"
_16_BITS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class QuantizationConfig:
    """What a config.json says of the quantized layers of its directory.

    format: as in `io.quantized`. scheme: what quantized them; None: they describe themselves. skip:
    modules that stay dense, as transformers matches them; None: the tensors alone say which.
    compute_dtype: None, or the 16-bit type the layers compute in.
    """

    format: str
    scheme: Quantizer | None = None
    skip: tuple[str, ...] | None = None
    compute_dtype: torch.dtype | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> QuantizationConfig | None:
        """Of a parsed config.json; None if its model is dense. Raises ConfigError."""
        given = raw.get("quantization_config")
        if not given:
            return None
        if not isinstance(given, Mapping):
            raise ConfigError(f"quantization_config: expected an object; got {given!r}")
        loads = [kind for kind in BITSANDBYTES if given.get(f"load_in_{kind}")]
        method = given.get("quant_method", "bitsandbytes" if loads else None)
        if method == LOWRANK:
            _check_version(given.get("version"))
            return cls(LOWRANK)
        if method != "bitsandbytes":
            raise ConfigError(
                "quantization_config: expected quant_method bitsandbytes or lowrank; got "
                f"{method!r}; load the model it was made from, with quantizer= to quantize it"
            )
        if len(loads) != 1:
            raise ConfigError(
                "quantization_config: expected load_in_4bit or load_in_8bit; got "
                f"{'both' if loads else 'neither'}"
            )
        skip = given.get("llm_int8_skip_modules")
        if skip is None:
            skip = _HEADS
        if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
            raise ConfigError(f"llm_int8_skip_modules: expected a list of names; got {skip!r}")
        compute = given.get("bnb_4bit_compute_dtype") if loads == ["4bit"] else None
        # float32 is what transformers writes where nobody chose
        scheme = quant.get("int8") if loads == ["8bit"] else _four_bit(given)
        return cls(BITSANDBYTES[loads[0]], scheme, tuple(skip), _16_BITS.get(str(compute)))

    def check(self, linears: Iterable[str], quantized: Mapping[str, QuantizedTensors]) -> None:
        """That just those of the `linears` that the config says are `quantized`, in its format."""
        if not quantized:
            raise ConfigError(
                f"quantization_config: {self.format}, and no tensor is quantized; take it out of "
                "config.json, or get the weights again"
            )
        for name, tensors in quantized.items():
            if tensors.format != self.format:
                raise ConfigError(
                    f"{name}: expected {self.format} by the quantization_config; got "
                    f"{tensors.format}; get config.json and the weights again"
                )
        for name in linears if self.skip is not None else ():
            if self.skips(name) == (name in quantized):
                found = "quantized" if name in quantized else "dense"
                raise ConfigError(
                    f"{name}: is {found}, which llm_int8_skip_modules={list(self.skip)} of the "
                    "quantization_config says it is not; correct that list"
                )

    def skips(self, name: str) -> bool:
        """Whether transformers leaves the module dense: a start, a regex or an end of its name."""
        for entry in self.skip or ():
            try:
                start = re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name)
            except re.error as error:
                raise ConfigError(
                    f"llm_int8_skip_modules: expected names; got {entry!r} ({error})"
                ) from error
            if start or name.endswith(entry):
                return True
        return False


def _four_bit(given: Mapping[str, Any]) -> Quantizer:
    """nf4 or fp4 by a quantization_config; nested scales are read as what they stand for."""
    kind = given.get("bnb_4bit_quant_type")
    kind = "fp4" if kind is None else kind
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"bnb_4bit_quant_type: expected nf4 or fp4; got {kind!r}")
    return quant.get(kind, double_quant=False)


def lowrank_config() -> dict[str, Any]:
    """What config.json says of a directory that holds our own layers; they describe themselves."""
    return {"quant_method": LOWRANK, "version": VERSION}


def bitsandbytes_config(
    keys: Iterable[str], skip: Iterable[str], compute_dtype: torch.dtype
) -> dict[str, Any]:
    """What transformers is to be told of layers whose tensors have the `keys`; `skip` is dense."""
    states = {key for key in keys if key.startswith(_STATE)}
    types = {key.removeprefix(_STATE) for key in states} | ({"int8"} if "SCB" in keys else set())
    if len(types) != 1:
        raise ConfigError(
            f"format: bitsandbytes takes one scheme for all layers; got {', '.join(sorted(types))}"
        )
    (kind,) = types
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "llm_int8_skip_modules": list(skip),
    }
    if kind == "int8":
        return config
    return config | {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": "weight.nested_absmax" in keys,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
    }


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or version < 1:
        raise ConfigError(f"quantization_config: expected a version; got {version!r}")
    if version > VERSION:
        raise ConfigError(
            f"quantization_config: expected a version up to {VERSION}; got {version}; it needs a "
            "newer lowrank"
        )
