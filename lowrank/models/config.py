"""What a decoder is made of: the fields of a Hugging Face `config.json`, checked and named once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError

MODEL_TYPES = ("llama",)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL = (
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "bos_token_id",
    "pad_token_id",
)
# the numbers each scaled kind of rotary position needs
_ROPE_TYPES = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family; fields are named as in Hugging Face's `config.json`.

    `rope_scaling` is None, or {"rope_type": "linear" | "llama3", ...} with that type's numbers.
    `eos_token_id` may be several: any of them ends a generation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false; got {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            if not all(i is None or _is_integer(i) for i in ids):
                raise ConfigError(f"{name}: expected a token id or none; got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of num_attention_heads="
                f"{self.num_attention_heads}; got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: rotary pairs need an even number; got {self.head_dim}")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """Read a parsed `config.json`, with `rope_theta` and `rope_scaling` or `rope_parameters`.

        Raises ConfigError for another model type, activation or rope type, and for a missing size.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type: expected one of {', '.join(MODEL_TYPES)}; got {model_type!r}; "
                "build another by its own code and adapt it with lowrank.inject(model, config)"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act: expected 'silu'; got {raw['hidden_act']!r}")
        if missing := [name for name in _SIZES if name not in raw]:
            raise ConfigError(
                f"{', '.join(missing)} missing; expected those of a {model_type} model"
            )
        for name in _SIZES:
            _check_size(name, raw[name])
        heads = raw["num_attention_heads"]
        theta, scaling = _rope(raw)
        eos = raw.get("eos_token_id")
        return cls(
            **{name: raw[name] for name in _SIZES},
            **{name: raw[name] for name in _OPTIONAL if raw.get(name) is not None},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            model_type=model_type,
        )

    def to_hf(self, dtype: torch.dtype) -> dict[str, Any]:
        """The `config.json` that transformers reads, for weights of `dtype`; undoes `from_hf`."""
        eos = self.eos_token_id
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a generation; empty if the config names none."""
        eos = self.eos_token_id
        if eos is None:
            return frozenset()
        return frozenset(eos) if isinstance(eos, tuple) else frozenset((eos,))


def rope_frequencies(config: DecoderConfig, device: torch.device | str) -> Tensor:
    """The angle per position of each rotary pair, float32 [head_dim / 2].

    f[i] = theta^(-2i / D). "linear" divides all by `factor`; "llama3" divides only those with a
    wavelength beyond the original context, and blends in between.
    RoFormer, arXiv:2104.09864, eq. 15; Llama 3, arXiv:2407.21783, §3.4.
    """
    D = config.head_dim
    exponent = torch.arange(0, D, 2, dtype=torch.int64, device=device).float() / D
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    # how many turns the pair makes over the original context: < low slow, > high fast
    turns = context * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) from either spelling of a config.json."""
    if raw.get("sliding_window") is not None:
        raise ConfigError(f"sliding_window: expected none; got {raw['sliding_window']!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling: expected an object or none; got {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    _check_positive("rope_theta", theta)
    # configs of 2023 call it "type"
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return float(theta), {"rope_type": kind, **rope}


def _check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise ConfigError(
            f"rope_type: expected one of default, {', '.join(_ROPE_TYPES)}; got {kind!r}"
        )
    for name in _ROPE_TYPES[kind]:
        _check_positive(f"rope_scaling: {kind} needs {name}", scaling.get(name))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(name: str, value: Any) -> None:
    if not _is_integer(value) or not 0 < value < 2**31:
        raise ConfigError(f"{name}: expected a positive integer; got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if not (_is_integer(value) or isinstance(value, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a positive number; got {value!r}")
