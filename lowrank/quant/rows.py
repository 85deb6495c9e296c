"""Some rows of a quantized weight, decoded without the others."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lowrank.errors import ConfigError

from .blocks import panels
from .registry import Quantizer
from .storage import Storage


def has_row_parts(quantizer: Quantizer) -> bool:
    """Whether `Storage.rows` and `Storage.take` give weights that `quantizer` reads.

    Of a row-local scheme's, and of every codebook's: there only the choice of the table needs all.
    """
    return getattr(quantizer, "row_local", False) or hasattr(quantizer, "codebook_operands")


def decodes_rows(quantizer: Quantizer) -> bool:
    """Whether `dequantize_rows` and `gather` work for this quantizer."""
    return has_row_parts(quantizer) or hasattr(quantizer, "dequantize_rows")


def dequantize_rows(
    quantizer: Quantizer, storage: Storage, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Rows start <= n < stop of the weight, [stop - start, K]. ConfigError: none by itself."""
    if has_row_parts(quantizer):
        return quantizer.dequantize(storage.rows(start, stop), dtype)
    if not decodes_rows(quantizer):
        raise ConfigError(
            f"quantizer: expected a scheme that is row_local or has dequantize_rows; got "
            f"{storage.scheme!r}, which decodes a weight as a whole"
        )
    return quantizer.dequantize_rows(storage, start, stop, dtype)


def gather(quantizer: Quantizer, storage: Storage, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `index` of the weight, [n, K]; index [n] ascends. IndexError: beyond the last row.

    Codes are gathered and then decoded; where the scheme's tensors have no rows, the panels of rows
    that are asked for are decoded, a few MB at a time.
    """
    N, K = storage.shape
    device = index.device
    if not index.numel():
        return torch.empty(0, K, dtype=dtype, device=device)
    if not 0 <= int(index[0]) <= int(index[-1]) < N:
        raise IndexError(f"index: expected 0 to {N - 1}; got {int(index[0])} to {int(index[-1])}")
    if has_row_parts(quantizer):
        return quantizer.dequantize(storage.take(index), dtype)
    out = torch.empty(index.numel(), K, dtype=dtype, device=device)
    parts = list(panels(N, K, device))
    edges = torch.tensor([start for start, _ in parts] + [N], dtype=index.dtype, device=device)
    edges = torch.searchsorted(index, edges).tolist()
    for (start, stop), (first, last) in zip(parts, pairwise(edges), strict=True):
        if first < last:
            rows = dequantize_rows(quantizer, storage, start, stop, dtype)
            torch.index_select(rows, 0, index[first:last] - start, out=out[first:last])
    return out
