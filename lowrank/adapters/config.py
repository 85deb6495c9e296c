"""The settings of an adapter: PEFT's names, PEFT's defaults, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lowrank.errors import ConfigError

from . import checks
from .peft_keys import from_peft, takes_peft_fields, to_peft
from .registry import get

INITS = (True, False, "gaussian", "orthogonal", "eva", "loftq", "pissa", "olora")
BIASES = ("none", "lora_only", "all")


@takes_peft_fields
@dataclass
class LoRAConfig:
    """What to adapt and how: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with s = lora_alpha / r.

    r: the rank R of each update.
    method: the kind of adapter, by the name it is registered as (`lowrank.adapters.names()`).
    lora_alpha: the numerator of the scale s.
    target_modules: names or suffixes of names; a str is a regex for the whole name
      (`re.fullmatch`), or one of "all-linear" (every linear layer but the output head), "attention"
      (those within attention) and "minimal" (queries and values). None: "minimal", or what PEFT
      takes for the model's family.
    target_parameters: names or ends of names of weights [E, N, K] of experts that are no modules;
      without target_modules, nothing else has adapters.
    target_rows: {name, suffix or regex: [(start, stop)]} for linear layers of which some outputs
      alone are adapted, as q and v of a fused projection; its B has those rows only.
    exclude_modules: the same two rules; wins over target_modules.
    lora_dropout: probability of dropping each element of x on the way to A, in training.
    rank_pattern, alpha_pattern: {name, suffix or regex: value} for layers that differ; the first
      that matches wins.
    modules_to_save: names or suffixes of modules of which the adapter trains a copy, whole; with
      task_type "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" the heads of transformers' models too.
    trainable_token_indices: ids of tokens whose rows of the embedding train, alone of it, or
      {name of an embedding: ids}. A head tied to it follows.
    ensure_weight_tying: what is tied to a target, or to one of modules_to_save, is trained with it,
      as one.
    layers_to_transform: indices of the blocks to adapt, counted in the ModuleList `layers_pattern`
      (None: the first one in the name).
    layers_pattern: names of such a ModuleList.
    task_type, base_model_name_or_path, revision: noted in adapter_config.json.
    inference_mode: inject the adapter frozen; nothing trains.
    use_rslora: s = lora_alpha / sqrt(r).
    use_dora: method="dora", under PEFT's name.
    bias: which of the base's biases train and are saved: none, lora_only (the targets') or all.
    init_lora_weights: True (A uniform, B zero), "gaussian" (A normal, B zero), "orthogonal"
      (neither is zero, B A is), "eva" (as True until `initialize_eva` has seen data), False
      (neither is zero); or a part of the weight, the base being the rest: "pissa" (the principal
      part), "pissa_niter_4" (that by a fast SVD), "olora" (the first part of its QR decomposition);
      or over a weight that is quantized for it, "loftq" (what quantizing loses).
    loftq_config: for loftq and pissa, {"loftq_iter": times that quantizing and SVD alternate (1)};
      the quantizer says how many bits, loftq_bits is for PEFT's eyes.
    eva_config: for eva, what `initialize_eva` asks for: {"rho": 2.0, "tau": 0.99, ...}.

    Raises ConfigError on any value that is out of range or not supported.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | Literal["all-linear", "attention", "minimal"] | str | None = None
    target_parameters: list[str] | None = None
    target_rows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    method: str = "lora"

    def __post_init__(self) -> None:
        checks.rank("r", self.r)
        get(self.method)
        checks.alpha("lora_alpha", self.lora_alpha)
        checks.number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: expected 0 <= p < 1; got {self.lora_dropout!r}")
        for name in ("use_rslora", "use_dora", "ensure_weight_tying", "inference_mode"):
            checks.choice(name, getattr(self, name), (True, False))
        checks.choice("bias", self.bias, BIASES)
        if not checks.is_fast_pissa(self.init_lora_weights):
            checks.choice("init_lora_weights", self.init_lora_weights, INITS)
        self.loftq_config = checks.loftq(self.loftq_config, self.init_lora_weights)
        self.eva_config = checks.eva(self.eva_config, self.init_lora_weights)
        if self.use_dora and self.method not in ("lora", "dora"):
            raise ConfigError(
                f'use_dora: expected False with method={self.method!r}, or method="dora"; got True'
            )
        if self.use_dora or self.method == "dora":  # two names of one thing
            self.use_dora, self.method = True, "dora"
        self.task_type = checks.task(self.task_type)
        self.target_parameters = checks.parameters(self.target_parameters)
        if self.target_parameters and self.target_modules in (None, [], ()):
            self.target_modules = []
        else:
            self.target_modules = checks.names("target_modules", self.target_modules)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        self.modules_to_save = checks.names("modules_to_save", self.modules_to_save or None)
        self.trainable_token_indices = checks.tokens(self.trainable_token_indices)
        self.exclude_modules = checks.names("exclude_modules", self.exclude_modules)
        targets = self.target_modules if isinstance(self.target_modules, list) else []
        if both := [name for name in targets if name in (self.modules_to_save or [])]:
            raise ConfigError(
                f"modules_to_save: expected none of target_modules; got {both[0]!r} in both"
            )
        self.layers_pattern = checks.names("layers_pattern", self.layers_pattern)
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, list) else []:
            checks.regex("layers_pattern", pattern)
        for name in ("base_model_name_or_path", "revision"):
            setattr(self, name, checks.text(name, getattr(self, name)))
        checks.layers(self.layers_to_transform, self.layers_pattern, self.target_modules)
        checks.patterns("target_rows", self.target_rows, checks.spans)
        if self.target_rows and (self.method != "lora" or type(self.init_lora_weights) is str):
            raise ConfigError(
                "target_rows: expected plain LoRA and init_lora_weights=True or False with it; "
                f"got method={self.method!r}, init_lora_weights={self.init_lora_weights!r}"
            )
        checks.patterns("rank_pattern", self.rank_pattern, checks.rank)
        checks.patterns("alpha_pattern", self.alpha_pattern, checks.alpha)

    def spans(self, name: str) -> list[tuple[int, int]]:
        """The outputs of the layer called `name` that are adapted; none are all."""
        return _first_match(self.target_rows, name, [])

    def rank(self, name: str) -> int:
        """R of the layer called `name`."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """alpha of the layer called `name`."""
        return _first_match(self.alpha_pattern, name, self.lora_alpha)

    @property
    def starts_from_weight(self) -> bool:
        """Whether the adapter starts with a part of the weight, and the base with the rest."""
        return self.init_lora_weights == "loftq" or self.starts_as_principal_part

    @property
    def starts_as_principal_part(self) -> bool:
        """Whether that part is among the largest there is: the base alone is no model then."""
        init = self.init_lora_weights
        return init in ("pissa", "olora") or checks.is_fast_pissa(init)

    def with_fresh_start(self) -> LoRAConfig:
        """This config, but for an adapter that does not start from the weight."""
        if not self.starts_from_weight:
            return self
        return replace(self, init_lora_weights=True, loftq_config={})

    def to_peft(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json; an adapter on disk is always for inference."""
        return to_peft(self)

    @classmethod
    def from_peft(cls, content: Mapping[str, Any]) -> LoRAConfig:
        """The config in PEFT's adapter_config.json; unknown keys are ignored, missing ones default.

        Raises ConfigError if the file asks for something that would change what the layers compute.
        """
        return cls(**from_peft(content, [field.name for field in fields(cls)]))


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    for key, value in pattern.items():
        if checks.pattern_matches(key, name):
            return value
    return default
