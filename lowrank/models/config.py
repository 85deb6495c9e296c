"""What a decoder is made of: the fields of a Hugging Face `config.json`, checked and named once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.models.checks import check_positive, check_size, is_integer
from lowrank.models.families import (
    FAMILIES,
    Family,
    Raw,
    find_family,
    has_rotation,
)
from lowrank.models.layers import ACTIVATIONS
from lowrank.models.mixture_config import MixtureConfig
from lowrank.models.rope import LENGTH_MATTERS, check_scaling, frequencies

MODEL_TYPES = tuple(FAMILIES)
_MAX_LAYERS = 10**4  # a damaged number would fill memory with what is known of each layer
SLIDING, FULL = "sliding_attention", "full_attention"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_COMMON = (
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_POSITIVE = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "initializer_range",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
# of these, null in a config.json says "none", where its absence means the family's default
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

# what each layer may be
_EACH_LAYER: dict[str, tuple[Any, Any]] = {"layer_types": (SLIDING, FULL), "no_rope_layers": (0, 1)}


class LayerKind(NamedTuple):
    """What one layer's attention sees: the last `window` positions, turned or not, by which theta.

    `local` layers turn by `rope_local_base_freq`.
    """

    window: int | None
    rotated: bool
    local: bool


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of any family; fields are named as in Hugging Face's `config.json` of a Llama.

    `rope_scaling` is None, or {"rope_type": one of `rope.NEEDS`, ...} with that type's numbers.
    `eos_token_id` may be several: any of them ends a generation. `rms_norm_eps` is that of the
    norms, whatever their kind. `layer_types` are "sliding_attention" and "full_attention"; None:
    with a `sliding_window` all slide.
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
    hidden_act: str = "silu"
    partial_rotary_factor: float = 1.0
    rope_local_base_freq: float | None = None
    no_rope_layers: tuple[int, ...] | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_parallel_residual: bool = True
    mixture: MixtureConfig | None = None

    def __post_init__(self) -> None:
        family = self.family
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            check_size(name, getattr(self, name))
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_parallel_residual"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false; got {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            if not all(i is None or is_integer(i) for i in ids):
                raise ConfigError(f"{name}: expected a token id or none; got {value!r}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act: expected one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}"
            )
        by_head = family.qkv == "by_head" or family.learned_positions
        heads = self.num_attention_heads
        if heads % self.num_key_value_heads or by_head and heads != self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: expected {'' if by_head else 'a divisor of '}"
                f"num_attention_heads={heads}; got {self.num_key_value_heads}"
            )
        self._check_positions()
        self._check_layers()

    def _check_positions(self) -> None:
        if self.partial_rotary_factor > 1:
            raise ConfigError(
                f"partial_rotary_factor: expected at most 1; got {self.partial_rotary_factor}"
            )
        if self.rotary_dim % 2 or not self.rotary_dim:
            of = f"head_dim={self.head_dim} x {self.partial_rotary_factor}"
            of = f"{self.head_dim}" if self.partial_rotary_factor == 1 else of
            raise ConfigError(f"head_dim: rotary pairs need an even number; got {of}")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling, self.rotary_dim, self.rope_theta)

    def _check_layers(self) -> None:
        if (self.mixture is not None) != bool(self.family.mixture):
            raise ConfigError(
                f"mixture: expected {'a MixtureConfig' if self.family.mixture else 'none'} of a "
                f"{self.model_type} model; got {self.mixture!r}"
            )
        for name in _EACH_LAYER:
            if getattr(self, name) is not None:
                _check_each_layer(name, getattr(self, name), self.num_hidden_layers)
        if self.sliding_window is None and SLIDING in (self.layer_types or ()):
            raise ConfigError(
                "sliding_window: expected a number of positions, as layer_types has "
                f"{SLIDING!r}; got none"
            )

    @cached_property
    def family(self) -> Family:
        """The row of `model_type` in the table of families."""
        return find_family(self.model_type)

    @cached_property
    def rotary_dim(self) -> int:
        """How many of head_dim numbers are turned by their position."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def length_matters(self) -> bool:
        """Whether positions are turned by how many there are in all."""
        return self.rope_scaling is not None and self.rope_scaling["rope_type"] in LENGTH_MATTERS

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers there are, in order of appearance."""
        return tuple(dict.fromkeys(self._kind(i) for i in range(self.num_hidden_layers)))

    def kind_of(self, layer: int) -> int:
        """Which of `kinds` a layer is."""
        return self.kinds.index(self._kind(layer))

    def _kind(self, layer: int) -> LayerKind:
        slides = self.layer_types is None or self.layer_types[layer] == SLIDING
        rotated = self.no_rope_layers is None or self.no_rope_layers[layer] == 1
        return LayerKind(
            window=self.sliding_window if slides else None,
            rotated=rotated and not self.family.learned_positions,
            local=slides and self.rope_local_base_freq is not None,
        )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """Read a parsed `config.json`, with `rope_theta` and `rope_scaling` or `rope_parameters`.

        Raises ConfigError for another model type, activation or rope type, and for a missing size.
        """
        model_type = raw.get("model_type")
        family = find_family(model_type)
        for name, value in family.must.items():
            if raw.get(name) is not None and raw[name] is not value:
                raise ConfigError(
                    f"{name}: expected {value}, as the {model_type} models that are known; "
                    f"got {raw[name]!r}"
                )
        fields = dict(family.defaults)
        for name in (*_COMMON, *family.reads):
            word = family.words.get(name, name)
            if raw.get(word) is not None or (word in raw and name in _NULLABLE):
                fields[name] = raw[word]
        fields |= _sizes(raw, family)
        heads = fields["num_attention_heads"]
        fields.setdefault("num_key_value_heads", heads)
        if not fields.get("head_dim"):
            fields["head_dim"] = fields["hidden_size"] // heads
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        fields |= {**_rope(raw, family), **_layers(raw, family, fields)}
        mixture = MixtureConfig.from_hf(raw, family)
        return cls(**fields, model_type=model_type, mixture=mixture)

    def to_hf(self, dtype: torch.dtype) -> dict[str, Any]:
        """The `config.json` that transformers reads, for weights of `dtype`; undoes `from_hf`."""
        family = self.family
        raw: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        rope = () if family.learned_positions else ("rope_theta", "rope_scaling")
        for name in (*_COMMON, *rope, *family.reads):
            value = getattr(self, name)
            value = dict(value) if isinstance(value, Mapping) else value
            raw[family.words.get(name, name)] = list(value) if isinstance(value, tuple) else value
        if self.mixture is not None:
            raw |= self.mixture.to_hf(family)
        if (original := (self.rope_scaling or {}).get("original_max_position_embeddings")) and (
            self.rope_scaling["rope_type"] == "longrope"
        ):
            raw["original_max_position_embeddings"] = original  # where Phi-3 has it
        if family.window_is_optional:
            raw["use_sliding_window"] = self.sliding_window is not None
            # what transformers reads that knows no layer_types yet
            kinds = [*(self.layer_types or ()), SLIDING]
            raw["max_window_layers"] = kinds.index(SLIDING)
        return raw

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a generation; empty if the config names none."""
        eos = self.eos_token_id
        return frozenset(eos if isinstance(eos, tuple) else (eos,)) - {None}


def rope_frequencies(
    config: DecoderConfig, local: bool, length: int, device: torch.device | str
) -> tuple[Tensor, float]:
    """The angle per position of each rotary pair, float32 [rotary_dim / 2], and the length factor.

    Of `local` layers or the others, for `length` positions; see `rope.frequencies`.
    """
    theta = config.rope_local_base_freq if local else config.rope_theta
    scaling = None if local else config.rope_scaling
    context = config.max_position_embeddings
    return frequencies(config.rotary_dim, theta, scaling, context, length, device)


def _sizes(raw: Raw, family: Family) -> dict[str, int]:
    words = {name: family.words.get(name, name) for name in _SIZES}
    derived = {"intermediate_size"} if family.mlp_ratio else set()
    if missing := [word for n, word in words.items() if word not in raw and n not in derived]:
        raise ConfigError(
            f"{', '.join(missing)} missing; expected those of a {raw['model_type']} model"
        )
    found: dict[str, int] = {}
    for name, word in words.items():
        found[name] = raw.get(word)
        if found[name] is None and name in derived:
            found[name] = family.mlp_ratio * found["hidden_size"]
        check_size(word, found[name])
    if (layers := found["num_hidden_layers"]) > _MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers: expected at most {_MAX_LAYERS}; got {layers}")
    return found


def _rope(raw: Raw, family: Family) -> dict[str, Any]:
    """rope_theta, rope_scaling and what else turns, from either spelling of a config.json."""
    if family.learned_positions:
        return {}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling: expected an object or none; got {rope!r}")
    words, found = family.words, {}
    local = rope.get(SLIDING)
    if FULL in rope:  # Gemma 3's, one for each kind of layer
        rope = rope[FULL] or {}
        if not isinstance(rope, Mapping) or not isinstance(local or {}, Mapping):
            raise ConfigError(f"rope_parameters: expected an object a kind of layer; got {rope!r}")
    rope = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        given = [rope.pop(name, None), raw.get(words.get(name, name)), raw.get(name)]
        value = next((v for v in (*given, family.defaults.get(name)) if v is not None), None)
        if value is not None:
            check_positive(name, value)
            found[name] = float(value)
    if "rope_local_base_freq" in family.reads:
        value = (local or {}).get("rope_theta") or raw.get("rope_local_base_freq") or 10000.0
        check_positive("rope_local_base_freq", value)
        found["rope_local_base_freq"] = float(value)
    # configs of 2023 call it "type"; Phi-3's first ones called longrope "su", and "yarn"
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    if kind in ("su", "yarn") and "short_factor" in rope:
        kind = "longrope"
    if kind == "default":
        return found
    original = "original_max_position_embeddings"
    if kind in ("llama3", "yarn", "longrope"):
        given = rope.get(original) or raw.get("max_position_embeddings")
        rope[original] = (raw.get(original) if kind == "longrope" else None) or given
    return {**found, "rope_scaling": {"rope_type": kind, **rope}}


def _layers(raw: Raw, family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """sliding_window, layer_types and no_rope_layers as they are, or as the family has them."""
    layers = range(fields["num_hidden_layers"])
    found: dict[str, Any] = {}
    for name in ("max_window_layers", "no_rope_layer_interval", "sliding_window_pattern"):
        if raw.get(name) is not None and not is_integer(raw[name]):
            raise ConfigError(f"{name}: expected an integer; got {raw[name]!r}")
    for name in _EACH_LAYER:
        if raw.get(name) is not None and not isinstance(raw[name], list):
            _check_each_layer(name, raw[name], len(layers))  # refuses it, whether it is read or not
        if isinstance(fields.get(name), list):
            found[name] = tuple(fields[name])
            if name == "no_rope_layers":  # of a larger model, it may be
                found[name] = found[name][: len(layers)]
            _check_each_layer(name, found[name], len(layers))
    if "no_rope_layers" in family.reads and fields.get("no_rope_layers") is None:
        found["no_rope_layers"] = tuple(int(has_rotation(raw, i)) for i in layers)
    if family.slides is None:
        if raw.get("sliding_window") is not None:
            raise ConfigError(f"sliding_window: expected none; got {raw['sliding_window']!r}")
    elif family.window_is_optional and raw.get("use_sliding_window") is not True:
        found["sliding_window"] = found["layer_types"] = None
    elif "layer_types" in family.reads and fields.get("layer_types") is None:
        found["layer_types"] = tuple(SLIDING if family.slides(raw, i) else FULL for i in layers)
    if family.window_is_optional and SLIDING not in (found.get("layer_types") or (SLIDING,)):
        found["sliding_window"] = found["layer_types"] = None
    return found


def _check_each_layer(name: str, value: Any, count: int) -> None:
    if not isinstance(value, tuple) or len(value) != count:
        got = f"{len(value)}" if isinstance(value, tuple) else repr(value)
        raise ConfigError(f"{name}: expected a list of {count}, one a layer; got {got}")
    one, other = _EACH_LAYER[name]
    for entry in value:
        if not isinstance(entry, type(one)) or entry not in (one, other):
            raise ConfigError(f"{name}: expected each {one!r} or {other!r}; got {entry!r}")
