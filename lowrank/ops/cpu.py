"""The operators on a CPU, over the kernels of `csrc/`. Meaning and letters are those of `reference.py`.

Few rows of x are multiplied straight from packed codes. For more, a panel of the weight's rows is
decoded to float32 and given to the BLAS that torch brings, so the dense weight never exists.
16-bit activations are computed in float32: on a CPU without 16-bit matrix units that is many times
faster, and the result is rounded once.

`dispatch` calls `refuse` before an operator: what passes it is what the pointers need.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank.errors import DataError

from . import native
from .reference import IGNORED_LABEL

_DIRECT_M = 16  # rows of x up to which decoding inside the product beats a panel and BLAS
_PANEL = 1 << 20  # weights in a decoded panel: 4 MB of float32
_LOGITS = 1 << 23  # logits held at once: 32 MB of float32


def refuse(op: str, *args) -> str | None:
    """Why the native kernels do not run `op` on these arguments, or None if they do."""
    library = native.load_cpu()
    if isinstance(library, str):
        return library
    return _REFUSALS[op](*args)


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of weight [N, K]; only its rows need to be contiguous."""
    N, K = weight.shape
    packed = torch.empty(N, (K + 31) // 32 * 16, dtype=torch.uint8)
    absmax = torch.empty(N, (K + block_size - 1) // block_size)
    status = native.load_cpu().lowrank_codebook_quantize(
        weight.data_ptr(), native.DTYPES[weight.dtype], N, K, weight.stride(0),
        codebook.data_ptr(), codebook.shape[0], block_size,
        packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_quantize")
    return packed, absmax


def codebook_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in `dtype`."""
    N = packed.shape[0]
    out = torch.empty(N, K, dtype=dtype)
    _dequantize_rows(packed, absmax, absmax_scale, codebook, K, block_size, 0, N, out)
    return out


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """y = x Wᵀ + b for x [..., K]: [..., N] in the dtype of x."""
    N, K = packed.shape[0], x.shape[-1]
    rows = x.reshape(-1, K)  # [M, K]
    if rows.shape[0] <= _DIRECT_M:
        y = _linear_direct(rows.contiguous(), packed, absmax, absmax_scale, codebook, bias, block_size)
        return y.view(*x.shape[:-1], N)
    rows = rows.float()
    y = torch.empty(rows.shape[0], N)
    for n0, n1, w in _panels(packed, absmax, absmax_scale, codebook, K, block_size):
        torch.mm(rows, w.T, out=y[:, n0:n1])
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], N)


def codebook_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Tensor:
    """dx = dy W for dy [..., N]: [..., K] in the dtype of dy."""
    rows = dy.reshape(-1, packed.shape[0]).float()  # [M, N]
    dx = torch.zeros(rows.shape[0], K)
    for n0, n1, w in _panels(packed, absmax, absmax_scale, codebook, K, block_size):
        dx.addmm_(rows[:, n0:n1], w)
    return dx.to(dy.dtype).view(*dy.shape[:-1], K)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool) -> tuple[Tensor, Tensor]:
    """Σ_t (logsumexp_v z[t, v] - z[t, label_t]) with z = x Wᵀ, and its gradient in x.

    Only rows with a label are multiplied. One native pass turns a chunk of logits [m, V] into its
    gradient softmax(z) - onehot(label), in place; then dx = gradient W.
    """
    (kept,) = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
    targets, V = labels[kept], weight.shape[0]
    if kept.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        wrong = targets[(targets < 0) | (targets >= V)][0].item()
        raise DataError(
            f"labels: expected word ids in [0, {V}) or {IGNORED_LABEL} for none; got {wrong}; "
            "was the text encoded with this model's tokenizer?"
        )
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
    losses = torch.empty(kept.numel())
    chunk = min(max(1, _LOGITS // V), kept.numel())
    room = torch.empty(chunk, V)
    for start in range(0, kept.numel(), chunk):
        rows = kept[start : start + chunk]
        inputs, logits = x[rows].float(), room[: rows.numel()]  # [m, H], [m, V]
        for v0, v1, w in _dense_panels(weight):
            torch.mm(inputs, w.T, out=logits[:, v0:v1])
        status = native.load_cpu().lowrank_softmax_cross_entropy(
            logits.data_ptr(), targets[start:].data_ptr(), rows.numel(), V,
            losses[start:].data_ptr(), with_dx, torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "linear_cross_entropy")
        if with_dx:
            gradient = torch.zeros_like(inputs)
            for v0, v1, w in _dense_panels(weight):
                gradient.addmm_(logits[:, v0:v1], w)
            dx[rows] = gradient.to(dx.dtype)
    return losses.sum(), dx


def _linear_direct(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None,
    block_size: int,
) -> Tensor:
    """x [M, K] contiguous -> y [M, N], from packed codes."""
    (M, K), N = x.shape, packed.shape[0]
    y = torch.empty(M, N, dtype=x.dtype)
    if bias is not None:
        bias = bias.float().contiguous()
    status = native.load_cpu().lowrank_codebook_linear(
        x.data_ptr(), native.DTYPES[x.dtype], M,
        packed.data_ptr(), absmax.data_ptr(), _pointer(absmax_scale), codebook.data_ptr(), codebook.shape[0],
        N, K, block_size, _pointer(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_linear")
    return y


def _dequantize_rows(packed, absmax, absmax_scale, codebook, K, block_size, n0, n1, out) -> None:
    """Rows n0 <= n < n1 of the weight into the contiguous `out` [n1 - n0, K]."""
    status = native.load_cpu().lowrank_codebook_dequantize(
        packed.data_ptr(), absmax.data_ptr(), _pointer(absmax_scale), codebook.data_ptr(), codebook.shape[0],
        packed.shape[0], K, block_size, n0, n1,
        out.data_ptr(), native.DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_dequantize")


def _panels(packed, absmax, absmax_scale, codebook, K, block_size) -> Iterator[tuple[int, int, Tensor]]:
    """(n0, n1, w [n1 - n0, K] float32) over all rows of the weight, in one scratch that is reused."""
    N = packed.shape[0]
    height = min(N, max(1, _PANEL // max(1, K)))
    scratch = torch.empty(height, K)
    for n0 in range(0, N, height):
        n1 = min(n0 + height, N)
        w = scratch[: n1 - n0]
        _dequantize_rows(packed, absmax, absmax_scale, codebook, K, block_size, n0, n1, w)
        yield n0, n1, w


def _dense_panels(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The same over a dense weight: itself where it is float32, else cast a panel at a time."""
    V, H = weight.shape
    height = V if weight.dtype == torch.float32 else max(1, _PANEL // max(1, H))
    for v0 in range(0, V, height):
        v1 = min(v0 + height, V)
        yield v0, v1, weight[v0:v1].float()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _refuse_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> str | None:
    if weight.dim() != 2:
        return "the weight is not a matrix"
    if weight.shape[1] > 1 and weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        return "the rows of the weight are not contiguous, or overlap"
    return (
        _refuse_dtype(weight.dtype)
        or _refuse_devices(weight, codebook)
        or _refuse_codebook(codebook, weight.shape[0], block_size)
    )


def _refuse_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, dtype) -> str | None:
    return _refuse_dtype(dtype) or _refuse_weight(packed, absmax, absmax_scale, codebook, K, block_size)


def _refuse_linear(x, packed, absmax, absmax_scale, codebook, bias, block_size) -> str | None:
    reason = _refuse_dtype(x.dtype) or _refuse_devices(x, packed)
    if reason is None and bias is not None and (bias.shape != packed.shape[:1] or bias.device.type != "cpu"):
        reason = "the bias is not [N] on the CPU"
    return reason or _refuse_weight(packed, absmax, absmax_scale, codebook, x.shape[-1], block_size)


def _refuse_linear_dx(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> str | None:
    if dy.shape[-1] != packed.shape[0]:
        return "dy is not [..., N]"
    return (
        _refuse_dtype(dy.dtype)
        or _refuse_devices(dy, packed)
        or _refuse_weight(packed, absmax, absmax_scale, codebook, K, block_size)
    )


def _refuse_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool) -> str | None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] == 0 or labels.shape != x.shape[:1]:
        return "the shapes are not [T, H], [V, H] and [T]"
    if labels.dtype != torch.int64:
        return f"labels are {labels.dtype}, not torch.int64"
    return _refuse_dtype(x.dtype) or _refuse_dtype(weight.dtype) or _refuse_devices(x, weight, labels)


def _refuse_weight(packed, absmax, absmax_scale, codebook, K, block_size) -> str | None:
    reason = _refuse_codebook(codebook, packed.shape[0], block_size)
    if reason is not None:
        return reason
    N = packed.shape[0]
    if packed.dtype != torch.uint8 or packed.shape != (N, (K + 31) // 32 * 16):
        return f"packed is not uint8 [N, {(K + 31) // 32 * 16}]"
    if absmax.shape != (N, (K + block_size - 1) // block_size):
        return "absmax is not [N, ceil(K / block_size)]"
    if absmax.dtype != (torch.float32 if absmax_scale is None else torch.uint8):
        return f"absmax is {absmax.dtype} {'without' if absmax_scale is None else 'with'} absmax_scale"
    scales = () if absmax_scale is None else (absmax_scale,)
    if scales and (absmax_scale.dtype != torch.float32 or absmax_scale.shape != (N, 2)):
        return "absmax_scale is not float32 [N, 2]"
    if not (packed.is_contiguous() and absmax.is_contiguous() and all(s.is_contiguous() for s in scales)):
        return "packed, absmax or absmax_scale is not contiguous"
    return _refuse_devices(packed, absmax, codebook, *scales)


def _refuse_codebook(codebook: Tensor, N: int, block_size: int) -> str | None:
    if codebook.dtype != torch.float32 or codebook.shape not in ((1, 16), (N, 16)):
        return "the codebook is not float32 [1, 16] or [N, 16]"
    if not codebook.is_contiguous():
        return "the codebook is not contiguous"
    if not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        return f"block size {block_size} is not a power of two from 32 to 4096"
    return None


def _refuse_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in native.DTYPES else f"{dtype} is not float32, float16 or bfloat16"


def _refuse_devices(*tensors: Tensor) -> str | None:
    return None if all(t.device.type == "cpu" for t in tensors) else "not all tensors are on the CPU"


_REFUSALS = {
    "codebook_quantize": _refuse_quantize,
    "codebook_dequantize": _refuse_dequantize,
    "codebook_linear": _refuse_linear,
    "codebook_linear_dx": _refuse_linear_dx,
    "linear_cross_entropy": _refuse_cross_entropy,
}
