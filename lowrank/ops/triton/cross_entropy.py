"""The loss of a language model's head: products by cuBLAS, one kernel over the logits between."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.kernels import configs
from lowrank.kernels.softmax_cross_entropy import softmax_cross_entropy_kernel
from lowrank.ops.reference import labelled_rows, logits_of, times_weight

from .launch import DOT, on

# The logits held at once. With V = 128256 these are 512 rows of 513 kB. Besides them there are, for
# H = 8192, two of the chunk's dx, of 4 and of 2 bytes, 25 MB: 288 MB in all, and 275 for H = 4096.
_LOGITS_BYTES = 256 << 20
_ROWS = 128  # of a tile of cuBLAS: chunks of many rows are multiples of it

# Probabilities of 1e-5, as a large vocabulary has them, are subnormal in float16.
_SCALES = {torch.float16: 2.0**15}


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool
) -> tuple[Tensor, Tensor]:
    """Σ_t (logsumexp_v z[t, v] - z[t, label_t]) with z = x Wᵀ, and its gradient in x.

    Rows without a label are dropped before the product. A chunk of float32 logits [m, V] becomes
    its gradient softmax(z) - onehot(label) in place, in the dtype of x where W has it too: what
    tensor cores multiply. Then dx = gradient W, summed in float32.
    """
    V = weight.shape[0]
    kept, targets = labelled_rows(labels, V)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
    losses = torch.empty(kept.numel(), dtype=torch.float32, device=x.device)
    dtype = x.dtype if weight.dtype == x.dtype else torch.float32
    scale, config = _SCALES.get(dtype, 1.0), configs.softmax_cross_entropy(V)
    chunk = chunk_rows(V)
    for start in range(0, kept.numel(), chunk):
        span = slice(start, start + chunk)
        rows, logits = kept[span], logits_of(x[kept[span]], weight, torch.float32)  # [m], [m, V]
        gradient = logits.view(dtype)
        with on(x.device):
            softmax_cross_entropy_kernel[(rows.numel(),)](
                logits, targets[span], losses[span], gradient, V, gradient.stride(0), scale,
                GRADIENT=with_dx, **config,
            )  # fmt: skip
        if with_dx:
            product = _times_weight(gradient[:, :V], weight)
            dx.index_copy_(0, rows, product.div_(scale).to(dx.dtype))
            del product
        del logits, gradient  # before the next of their size
    return losses.sum(), dx


def chunk_rows(V: int) -> int:
    """How many rows of V logits are held at once."""
    rows = max(1, _LOGITS_BYTES // (4 * V))
    return rows if rows < _ROWS else rows // _ROWS * _ROWS


def _times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient W in float32; the gradient's rows may be apart."""
    if gradient.is_cuda and gradient.dtype != torch.float32:
        return torch.mm(gradient, weight, out_dtype=torch.float32)
    return times_weight(gradient.float(), weight, torch.float32)


def _refuse_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool) -> str | None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] == 0 or x.shape[1] != weight.shape[1]:
        return "x and weight are not [T, H] and [V, H]"
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        return "labels are not int64 [T]"
    for tensor in (x, weight):
        if tensor.dtype not in DOT:
            return f"{tensor.dtype} is not float32, float16 or bfloat16"
    if not x.device == weight.device == labels.device:
        return "x, weight and labels are not on one device"
    return None


REFUSALS = {"linear_cross_entropy": _refuse_cross_entropy}
