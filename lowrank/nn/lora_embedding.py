"""An embedding with low-rank adapters beside its table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters import Method, get
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.held import replaced
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.quant import dequantize_rows

_ROWS = 4096  # of the table, decoded or cast at a time


class LoRAEmbedding(AdaptedLayer):
    """y = e·(T[ids] + Σ s·A[:, ids]ᵀ Bᵀ) over the active adapters, with the table T [V, d] frozen.

    The matrix is Tᵀ: N = d, K = V, A [R, V], B [d, R]. Only the columns of A asked for are read. As
    in PEFT, A starts at zero and B normal, and e is the table's `embed_scale`, as Gemma has one.

    The base's `padding_idx` and `scale_grad_by_freq` are about the gradient of A; it is dense, even
    where the table's would be `sparse`. `lora_dropout` is not for ids: there is none, as in PEFT.
    """

    def __init__(self, base: nn.Embedding | QuantEmbedding) -> None:
        super().__init__(base)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx = base.padding_idx

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig, name: str) -> None:
        super().check(base, config, name)
        kinds, name = (nn.Embedding, QuantEmbedding), name or "wrap"
        known = isinstance(base, kinds) and type(base).forward in [k.forward for k in kinds]
        if not known and not (isinstance(base, nn.Embedding) and hasattr(base, "embed_scale")):
            raise TargetError(
                f"{name}: expected nn.Embedding, QuantEmbedding, or one with `embed_scale`; got "
                f"{type(base).__name__}, which computes something else"
            )
        if getattr(base, "max_norm", None) is not None:
            raise ConfigError(
                f"{name}.max_norm: expected None, it would change the frozen table; "
                f"got {base.max_norm!r}"
            )

    @classmethod
    def matrix_shape_of(cls, base: nn.Module) -> tuple[int, int]:
        return base.embedding_dim, base.num_embeddings

    @classmethod
    def file_key(cls, part: str, method: Method) -> str:
        renamed = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return renamed.get(part, super().file_key(part, method))

    def products(self, rows: Tensor) -> Tensor:
        parts = zip(rows.split(_ROWS, dim=1), self._some_words(rows.dtype), strict=True)
        return sum(columns @ table for columns, table in parts)

    def squares(self, dtype: torch.dtype) -> Tensor:
        return sum(table.square().sum(0) for table in self._some_words(dtype))

    def _some_words(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The table in parts [_ROWS, d]."""
        base = self.unmerged_base
        for start in range(0, self.num_embeddings, _ROWS):
            stop = min(start + _ROWS, self.num_embeddings)
            if isinstance(base, QuantEmbedding):
                yield dequantize_rows(base.quantizer, base.storage, start, stop, dtype)
            else:
                yield base.weight.detach()[start:stop].to(dtype)

    @torch.no_grad()
    def init_(self, tensors: dict[str, Tensor], config: LoRAConfig) -> None:
        super().init_(tensors, config)
        frozen = getattr(get(config.method), "frozen", ())  # a zero that is frozen stays one
        if {"lora_A", "lora_B"} <= tensors.keys() and "lora_A" not in frozen:
            start = nn.init.normal_ if config.init_lora_weights is False else nn.init.zeros_
            start(tensors["lora_A"])
            nn.init.normal_(tensors["lora_B"])

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = self.unmerged_base
        by_frequency = getattr(base, "scale_grad_by_freq", False)
        rows = F.embedding(x, A.T, self.padding_idx, scale_grad_by_freq=by_frequency)
        return F.linear(rows, B) * getattr(base, "embed_scale", 1.0)

    def dropped(self, adapter: str, x: Tensor) -> Tensor:
        return x

    def matrix(self, dtype: torch.dtype) -> Tensor:
        base = self.unmerged_base
        table = base.weight.to(dtype) if isinstance(base, nn.Embedding) else base.dequantize(dtype)
        return table.T

    def plain(self, matrix: Tensor) -> nn.Module:
        base, table = self.unmerged_base, matrix.T.contiguous()
        if isinstance(base, nn.Embedding):
            return replaced(base, weight=table)
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        plain.weight = nn.Parameter(table, requires_grad=False)
        return plain

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"
