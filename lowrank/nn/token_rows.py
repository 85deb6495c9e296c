"""Rows of an embedding that adapters train, and the head that is tied to it: PEFT's
trainable_token_indices.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.autocast import linear_dtype
from lowrank.nn.held import Held
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.saved_module import dense_copy


class TokenRows(AdaptedModule):
    """An embedding W [V, K] some of whose rows an adapter replaces: W[tokens] = D [n, K], trained.

    `trainable_tokens_delta[adapter].weight` is D, which is no difference in spite of PEFT's name.
    D starts as the rows it replaces, in float32 if they are of 16 bits or quantized.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.trainable_tokens_delta = nn.ModuleDict()
        self.tokens: dict[str, list[int]] = {}

    @torch.no_grad()
    def add_adapter(self, adapter: str, config: LoRAConfig, tokens: list[int]) -> None:
        """Add an inactive adapter of these rows, equal to the base's."""
        self.check_new(adapter)
        rows = _weight_rows(self.base_layer, tokens)
        self.trainable_tokens_delta[adapter] = Held(rows)
        self._hold(adapter, config, tokens)

    def _hold(self, adapter: str, config: LoRAConfig, tokens: list[int]) -> None:
        self.tokens[adapter], self.config[adapter] = tokens, config
        device = self.trainable_tokens_delta[adapter].weight.device
        ordered, place = torch.tensor(tokens, device=device).sort()
        self.register_buffer(f"ordered_{adapter}", ordered, persistent=False)
        self.register_buffer(f"place_{adapter}", place, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K]."""
        if self.speaker is None:
            return (self.unmerged_base if self.disabled else self.base_layer)(ids)
        return self.embed(ids, self.base_layer, self.speaker)

    def embed(self, ids: Tensor, base: nn.Module, adapter: str) -> Tensor:
        """What `base`, this embedding or one tied to it, says with the adapter's rows."""
        y, D = base(ids), self.trainable_tokens_delta[adapter].weight
        ordered, place = (getattr(self, f"{what}_{adapter}") for what in ("ordered", "place"))
        at = torch.searchsorted(ordered, ids.long()).clamp(max=len(ordered) - 1)
        rows = F.embedding(place[at], D).to(y.dtype)
        scale = getattr(base, "embed_scale", None)  # Gemma's embedding multiplies by it
        if scale is not None:
            rows = rows * (scale.to(rows) if isinstance(scale, Tensor) else scale)
        return torch.where((ordered[at] == ids)[..., None], rows, y)

    def to_file(self, adapter: str) -> dict[str, Tensor]:
        key = "token_adapter.trainable_tokens_delta"
        return {key: self.trainable_tokens_delta[adapter].weight}

    def trained(self, adapter: str) -> list[nn.Parameter]:
        return [self.trainable_tokens_delta[adapter].weight]

    @torch.no_grad()
    def replaced(self, adapter: str) -> nn.Module:
        """A plain embedding with these rows, dense where it was quantized."""
        new = _with_own_weight(self.base_layer)
        D = self.trainable_tokens_delta[adapter].weight
        new.weight[torch.tensor(self.tokens[adapter], device=D.device)] = D.to(new.weight.dtype)
        return new

    def forget(self, adapter: str) -> None:
        for table in (self.trainable_tokens_delta, self.tokens):
            del table[adapter]
        for what in ("ordered", "place"):
            delattr(self, f"{what}_{adapter}")


class TiedRows(AdaptedModule):
    """What is tied to an embedding with `TokenRows`: another embedding, or a linear head.

    Of a head, y[..., tokens] = x Dᵀ + b[tokens]. D is that embedding's, as is the merged weight.
    """

    def __init__(self, base: nn.Module, rows: TokenRows) -> None:
        super().__init__(base)
        self._rows = [rows]  # in a list: D is trained, counted and saved with the embedding

    @property
    def rows(self) -> TokenRows:
        """The embedding with the rows."""
        return self._rows[0]

    def add_adapter(self, adapter: str, config: LoRAConfig) -> None:
        """Follow an adapter of the embedding."""
        self.config[adapter] = config

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., V] of a head; ids [...] -> [..., K] of an embedding."""
        if self.speaker is None:
            return (self.unmerged_base if self.disabled else self.base_layer)(x)
        if isinstance(self.base_layer, nn.Embedding | QuantEmbedding):
            return self.rows.embed(x, self.base_layer, self.speaker)
        y = self.base_layer(x)
        tokens = torch.tensor(self.rows.tokens[self.speaker], device=y.device)
        D, bias = self.rows.trainable_tokens_delta[self.speaker].weight, self.base_layer.bias
        dtype = linear_dtype(x)
        bias = None if bias is None else bias[tokens].to(dtype)
        return y.index_copy(-1, tokens, F.linear(x.to(dtype), D.to(dtype), bias).to(y.dtype))

    def to_file(self, adapter: str) -> dict[str, Tensor]:
        return {}

    def trained(self, adapter: str) -> list[nn.Parameter]:
        return []

    def replaced(self, adapter: str) -> nn.Module:
        """A plain head with the embedding's merged weight; the embedding is merged before it."""
        base, weight = self.base_layer, self.rows.base_layer.weight
        if not isinstance(base, QuantLinear):
            return _with(base, weight)
        new = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        new.weight, new.bias = weight, base.bias
        return new

    def forget(self, adapter: str) -> None:
        pass


def check_tokens(name: str, base: nn.Module, tokens: list[int]) -> None:
    """Raises ConfigError if the embedding called `name` has no such rows."""
    V = base.num_embeddings
    wrong = [token for token in tokens if token >= V]
    if wrong:
        raise ConfigError(
            f"trainable_token_indices: expected ids below {V}, the rows of {name}; got {wrong[0]}"
        )


def _weight_rows(base: nn.Module, tokens: list[int]) -> Tensor:
    """W[tokens] [n, K], in float32 at least."""
    ids = torch.tensor(tokens, device=next(base.parameters()).device)
    weight = base(ids) if isinstance(base, QuantEmbedding) else base.weight[ids]
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _with_own_weight(base: nn.Module) -> Any:
    if isinstance(base, QuantEmbedding):
        return dense_copy(base)
    return _with(base, nn.Parameter(base.weight.detach().clone(), requires_grad=False))


def _with(base: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The same module with this very parameter as its weight."""
    new = copy.copy(base)
    new._parameters = {**base._parameters, "weight": weight}
    return new
