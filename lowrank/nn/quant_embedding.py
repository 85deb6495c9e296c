"""An embedding whose frozen table is quantized, by whichever quantizer decodes rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank import quant
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.quant_weight import QuantWeight, resolve
from lowrank.ops.checks import check_dtype, check_float, check_sizes, check_tensors, value_of
from lowrank.quant import Quantizer, Storage


class QuantEmbedding(QuantWeight):
    """y[..., :] = W[ids[...]] with the table W [N = num_embeddings, K = embedding_dim] quantized.

    Only the rows asked for are decoded, each once. y has the dtype that nn.Embedding would have:
    `dtype`, the table's before quantization until `.to(dtype)` says another. `padding_idx` is kept
    for those who read it; it means the gradient of a table, and this one has none. A scheme that
    decodes a weight as a whole is refused.
    """

    padding_idx: int | None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        quantizer: str | Quantizer = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        padding_idx = _padding(padding_idx, num_embeddings)
        if dtype is not None:
            check_float("dtype", dtype)
        quantizer = resolve(quantizer)
        table = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._hold(quantizer.quantize(table.weight), quantizer, padding_idx)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, quantizer: str | Quantizer) -> QuantEmbedding:
        """The layer with `embedding`'s table quantized.

        Raises ConfigError for max_norm, which would change the table, and for sparse and
        scale_grad_by_freq, which are about its gradient. TargetError: no nn.Embedding.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TargetError(
                f"from_embedding: expected an nn.Embedding; got {type(embedding).__name__}"
            )
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(embedding, option):
                raise ConfigError(
                    f"{option}: expected none, a quantized table is frozen; "
                    f"got {getattr(embedding, option)!r}"
                )
        quantizer = resolve(quantizer)
        layer = cls.from_storage(
            quantizer.quantize(embedding.weight), quantizer, embedding.padding_idx
        )
        return layer.train(embedding.training)

    @classmethod
    def from_storage(
        cls, storage: Storage, quantizer: str | Quantizer, padding_idx: int | None = None
    ) -> QuantEmbedding:
        """The layer that holds an already quantized table [N, K]."""
        layer = cls.__new__(cls)
        layer._hold(storage, quantizer, padding_idx)
        return layer

    def _hold(self, storage, quantizer, padding_idx) -> None:
        super().__init__(storage, quantizer)
        if not quant.decodes_rows(self.quantizer):
            raise ConfigError(
                "quantizer: expected one that is row_local or has dequantize_rows for an "
                f"embedding; got {storage.scheme!r}"
            )
        self.padding_idx = _padding(padding_idx, self.num_embeddings)

    @property
    def num_embeddings(self) -> int:
        """N."""
        return self.matrix_shape[0]

    @property
    def embedding_dim(self) -> int:
        """K."""
        return self.matrix_shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int32 or int64 -> [..., K]. IndexError: an id that has no row."""
        check_tensors(ids=ids)
        check_dtype("ids", ids, (torch.int32, torch.int64))
        if ids.is_meta:
            return ids.new_empty(*ids.shape, self.embedding_dim, dtype=self.dtype)
        unique, place = ids.unique(return_inverse=True)
        rows = quant.gather(self.quantizer, self.storage, unique, self.dtype)
        return F.embedding(place, rows)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{super().extra_repr()}"


def _padding(padding_idx: int | None, N: int) -> int | None:
    """The row that `padding_idx` means; -1 is the last."""
    if padding_idx is None:
        return None
    if not isinstance(padding_idx, int) or not -N <= padding_idx < N:
        raise ConfigError(
            f"padding_idx: expected None, or from {-N} to {N - 1}; got {value_of(padding_idx)}"
        )
    return padding_idx % N
