"""The loss of a language model's head, without all its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.ops import native
from lowrank.ops.reference import labelled_rows

from .matrix_units import multiplies_bfloat16
from .panels import dense_panels, empty
from .refusals import refuse_devices, refuse_dtype

_LOGITS = 1 << 23  # logits held at once: 32 MB of float32


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool
) -> tuple[Tensor, Tensor]:
    """Σ_t (logsumexp_v z[t, v] - z[t, label_t]) with z = x Wᵀ, and its gradient in x.

    Only rows with a label are multiplied. One native pass turns a chunk of logits [m, V] into its
    gradient softmax(z) - onehot(label), in place; then dx = gradient W.
    """
    V = weight.shape[0]
    kept, targets = labelled_rows(labels, V)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
    losses = empty(kept.numel())
    chunk = max(1, min(_LOGITS // V, kept.numel()))
    room = empty(chunk, V)
    for start in range(0, kept.numel(), chunk):
        rows = kept[start : start + chunk]
        inputs, logits = x[rows].float(), room[: rows.numel()]  # [m, H], [m, V]
        for v0, v1, w in dense_panels(weight):
            torch.mm(inputs, w.T, out=logits[:, v0:v1])
        status = native.load_cpu().lowrank_softmax_cross_entropy(
            logits.data_ptr(), targets[start:].data_ptr(), rows.numel(), V,
            losses[start:].data_ptr(), with_dx, torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "linear_cross_entropy")
        if with_dx:
            dx[rows] = _times(logits, weight, dx.dtype)
    return losses.sum(), dx


def _times(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [m, V] of the logits -> gradient W [m, H] in the dtype of x.

    The logits themselves are never bfloat16: torch would round them, and with them the loss.
    """
    if dtype == weight.dtype and multiplies_bfloat16(dtype):
        return gradient.to(dtype) @ weight
    dx = torch.zeros(gradient.shape[0], weight.shape[1], dtype=torch.float32, device="cpu")
    for v0, v1, w in dense_panels(weight):
        dx.addmm_(gradient[:, v0:v1], w)
    return dx.to(dtype)


def _refuse_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool) -> str | None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] == 0 or x.shape[1] != weight.shape[1]:
        return "x and weight are not [T, H] and [V, H]"
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        return "labels are not int64 [T]"
    return refuse_dtype(x.dtype) or refuse_dtype(weight.dtype) or refuse_devices(x, weight, labels)


REFUSALS = {"linear_cross_entropy": _refuse_cross_entropy}
