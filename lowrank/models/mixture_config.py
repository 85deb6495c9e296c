"""What a mixture of experts is made of, as a `config.json` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.errors import ConfigError
from lowrank.models.checks import check_positive, check_size, is_integer
from lowrank.models.families import Family, Raw

# transformers writes the second for both families
_COUNTS = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class MixtureConfig:
    """Fields are named as in Qwen3-MoE's `config.json`.

    Layers have a mixture in place of an MLP but for `mlp_only_layers`, and with a
    `decoder_sparse_step` n every n-th alone. With `output_router_logits` the loss has
    `router_aux_loss_coef` times the imbalance of experts beside it.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        for name in (*sizes, "decoder_sparse_step"):
            check_size(name, getattr(self, name))
        for name in ("norm_topk_prob", "output_router_logits"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false; got {getattr(self, name)!r}")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok: expected at most num_experts={self.num_experts}; "
                f"got {self.num_experts_per_tok}"
            )
        if not all(map(is_integer, self.mlp_only_layers)):
            raise ConfigError(f"mlp_only_layers: expected numbers; got {self.mlp_only_layers!r}")
        if self.router_aux_loss_coef != 0:
            check_positive("router_aux_loss_coef", self.router_aux_loss_coef)

    @classmethod
    def from_hf(cls, raw: Raw, family: Family) -> MixtureConfig | None:
        """Of a parsed `config.json`; None for a family without experts. Raises ConfigError."""
        if not family.mixture:
            return None
        if raw.get("router_jitter_noise"):
            raise ConfigError(
                f"router_jitter_noise: expected 0; got {raw['router_jitter_noise']!r}, which only "
                "training has; set it to 0"
            )
        fields: dict[str, Any] = {}
        for name, default in family.mixture.items():
            value = raw.get(family.words.get(name, name))
            fields[name] = default if value is None else value
        counts = {name: raw[name] for name in _COUNTS if raw.get(name) is not None}
        for name, value in counts.items():
            check_size(name, value)
        given = set(counts.values())
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(_COUNTS)}: expected one number; got {given}")
        fields["num_experts"] = (given or {fields["num_experts"]}).pop()
        layers = fields.get("mlp_only_layers", ())
        if not isinstance(layers, list | tuple):
            raise ConfigError(f"mlp_only_layers: expected a list; got {layers!r}")
        return cls(**{**fields, "mlp_only_layers": tuple(layers)})

    def to_hf(self, family: Family) -> Mapping[str, Any]:
        """Its fields in a `config.json`; undoes `from_hf`."""
        values = {name: getattr(self, name) for name in family.mixture}
        return {
            family.words.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    def is_in(self, layer: int) -> bool:
        """Whether that layer has one."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
