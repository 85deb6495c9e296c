"""The loss of a language model's head, without all its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import DataError

from .panels import cast, compute_dtype

IGNORED_LABEL = -100

_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}  # logits held at once: 32 MB, 256 MB


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool
) -> tuple[Tensor, Tensor]:
    """loss = Σ_t (logsumexp_v z[t, v] - z[t, label_t]) with z = x Wᵀ; x [T, H], frozen W [V, H].

    Rows labelled -100 are dropped before the product. With e = exp(z - max z),
        d loss / dx[t] = (e[t] W) / Σ_v e[t, v] - W[label_t],
    formed here, a chunk of rows at a time, while e is at hand: the logits are never held for the
    backward, and a frozen W needs no dW. Returns loss (float32) and dx ([T, H], or [0] without
    `with_dx`).   Chunking as in Liger Kernel, arXiv:2410.10989, §3.2.
    """
    V, dtype = weight.shape[0], compute_dtype(x)
    kept, labels = labelled_rows(labels, V)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
    losses = torch.empty(kept.numel(), dtype=dtype, device=x.device)
    chunk = max(1, _LOGITS.get(x.device.type, _LOGITS["cpu"]) // V)
    for start in range(0, kept.numel(), chunk):
        span = slice(start, start + chunk)
        inputs, targets = x[kept[span]], labels[span]  # [m, H], [m]
        logits = logits_of(inputs, weight, dtype)  # [m, V]
        target_logits = logits.gather(1, targets[:, None])
        largest = logits.amax(1, keepdim=True)
        # exp(-80) is nothing to a sum >= 1; subnormals would make the product 20 times slower
        exps = logits.sub_(largest).clamp_(min=-80).exp_()
        sums = exps.sum(1, keepdim=True)
        losses[span] = (sums.log() + largest - target_logits)[:, 0]
        if with_dx:
            grad = times_weight(exps, weight, inputs.dtype).div_(sums).sub_(weight[targets])
            dx[kept[span]] = grad.to(x.dtype)
    return losses.sum(), dx


def labelled_rows(labels: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """(rows that have a label, their labels); DataError if one is not a word of the V there are."""
    (rows,) = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
    labels = labels[rows]
    if rows.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < V:
        wrong = labels[(labels < 0) | (labels >= V)][0].item()
        raise DataError(
            f"labels: expected word ids in [0, {V}) or {IGNORED_LABEL} for none; got {wrong}; "
            "was the text encoded with this model's tokenizer?"
        )
    return rows, labels


def logits_of(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x Wᵀ accumulated and kept in `dtype`: [m, V]."""
    if _on_tensor_cores(x.dtype, weight):
        return torch.mm(x, weight.T, out_dtype=dtype)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    for rows, w in cast(weight, dtype):
        torch.mm(x.to(dtype), w.T, out=out[:, rows])
    return out


def times_weight(exps: Tensor, weight: Tensor, x_dtype: torch.dtype) -> Tensor:
    """e W for e [m, V], accumulated and kept in the dtype of e: [m, H]."""
    if _on_tensor_cores(x_dtype, weight):
        return torch.mm(exps.to(x_dtype), weight, out_dtype=exps.dtype)
    out = exps.new_zeros(exps.shape[0], weight.shape[1])
    for rows, w in cast(weight, exps.dtype):
        out.addmm_(exps[:, rows], w)
    return out


def _on_tensor_cores(dtype: torch.dtype, weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype == dtype and dtype in (torch.bfloat16, torch.float16)
