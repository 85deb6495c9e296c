"""The operators on a CPU, over the kernels of `csrc/`; their meaning is in `reference.py`.

Few rows of x are multiplied straight from packed codes. For more, a panel of the weight's rows is
decoded to float32 and given to the BLAS that torch brings, so the dense weight never exists.
16-bit activations are computed in float32: on a CPU without 16-bit matrix units that is many times
faster, and the result is rounded once.

`dispatch` calls `refuse` before an operator: what passes it is what the pointers need.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from . import adamw8bit, native
from .reference import labelled_rows

_DIRECT_M = 16  # rows of x up to which decoding inside the product beats a panel and BLAS
_PANEL = 1 << 20  # weights decoded at once: 4 MB of float32
_LOGITS = 1 << 23  # logits held at once: 32 MB of float32

_thread = threading.local()

_Weight = tuple[Tensor, Tensor, Tensor | None, Tensor]  # packed, absmax, absmax_scale, codebook


def missing() -> str | None:
    """Why the native kernels cannot run here at all, or None if they can."""
    library = native.load_cpu()
    return library if isinstance(library, str) else None


def refuse(op: str, *args) -> str | None:
    """Why the native kernels do not run `op` on these arguments, or None if they do."""
    return missing() or _REFUSALS[op](*args)


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of weight [N, K]; only its rows need to be contiguous."""
    N, K = weight.shape
    packed = _empty(N, (K + 31) // 32 * 16, dtype=torch.uint8)
    absmax = _empty(N, (K + block_size - 1) // block_size)
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
    out = _empty(N, K, dtype=dtype)
    _dequantize_rows((packed, absmax, absmax_scale, codebook), K, block_size, 0, N, out)
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
    weight, N, K = (packed, absmax, absmax_scale, codebook), packed.shape[0], x.shape[-1]
    if rows_of(x) <= _DIRECT_M:
        return linear_from_packed("lowrank_codebook_linear", x, weight, bias, block_size)
    rows = x.reshape(-1, K).float()  # [M, K]
    y = _empty(rows.shape[0], N)
    # For each panel BLAS rearranges x anew: the larger x is, the fewer panels.
    size = min(max(_PANEL, 2 * rows.numel()), 4 * _PANEL)
    for n0, n1, w in _panels(weight, K, block_size, size):
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
    weight = (packed, absmax, absmax_scale, codebook)
    rows = dy.reshape(-1, packed.shape[0]).float()  # [M, N]
    dx = _empty(rows.shape[0], K)
    for n0, n1, w in _panels(weight, K, block_size, _PANEL):
        dx.addmm_(rows[:, n0:n1], w, beta=0 if n0 == 0 else 1)
    return dx.to(dy.dtype).view(*dy.shape[:-1], K)


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
    losses = _empty(kept.numel())
    chunk = max(1, min(_LOGITS // V, kept.numel()))
    room = _empty(chunk, V)
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


def adamw8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    m_scale: list[Tensor],
    v: list[Tensor],
    v_scale: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step number `step` of AdamW in place; all tensors in one call of the library."""
    dense = [g.contiguous() for g in grads]  # held until the library returns
    tensors = (native.Adamw8bitTensor * len(params))(
        *(
            (
                p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), m_scale.data_ptr(),
                v_scale.data_ptr(), *adamw8bit.rows_and_columns(p.shape), native.DTYPES[p.dtype],
            )
            for p, g, m, m_scale, v, v_scale in zip(
                params, dense, m, m_scale, v, v_scale, strict=True
            )
        )
    )  # fmt: skip
    by = native.Adamw8bitCoefficients(
        *adamw8bit.coefficients(lr, beta1, beta2, eps, weight_decay, step)
    )
    status = native.load_cpu().lowrank_adamw8bit_step(
        ctypes.addressof(tensors), len(params), adamw8bit.dynamic_map(True).data_ptr(),
        adamw8bit.dynamic_map(False).data_ptr(), ctypes.addressof(by), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "adamw8bit_step")
    # Written through pointers: autograd must hear of it from us.
    torch.autograd.graph.increment_version((*params, *m, *m_scale, *v, *v_scale))


def linear_from_packed(
    kernel: str, x: Tensor, weight: _Weight, bias: Tensor | None, block_size: int
) -> Tensor:
    """x [..., K] -> y [..., N] by the C function of this name, straight from packed codes."""
    K, N = x.shape[-1], weight[0].shape[0]
    x = x.contiguous()
    y = _empty(*x.shape[:-1], N, dtype=x.dtype)
    if bias is not None:
        bias = bias.float().contiguous()
    status = getattr(native.load_cpu(), kernel)(
        x.data_ptr(), native.DTYPES[x.dtype], rows_of(x), *_pointers(weight), N, K, block_size,
        None if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, kernel)
    return y


def rows_of(x: Tensor) -> int:
    """M of x [..., K]."""
    return x.shape[:-1].numel()


def _dequantize_rows(
    weight: _Weight, K: int, block_size: int, n0: int, n1: int, out: Tensor
) -> None:
    """Rows n0 <= n < n1 of the weight into the contiguous `out` [n1 - n0, K]."""
    status = native.load_cpu().lowrank_codebook_dequantize(
        *_pointers(weight), weight[0].shape[0], K, block_size, n0, n1,
        out.data_ptr(), native.DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_dequantize")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of this dtype on the CPU, whatever default dtype and device the caller has set."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _pointers(weight: _Weight) -> tuple[int, int, int | None, int, int]:
    """The tensors of a weight and the number of its codebooks, as the C functions take them."""
    packed, absmax, scale, codebook = weight
    scale_ptr = None if scale is None else scale.data_ptr()
    return packed.data_ptr(), absmax.data_ptr(), scale_ptr, codebook.data_ptr(), codebook.shape[0]


def _panels(
    weight: _Weight, K: int, block_size: int, size: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(n0, n1, w [n1 - n0, K] float32) over all rows, `size` weights at once, in one scratch."""
    N = weight[0].shape[0]
    height = min(N, max(1, size // K))
    scratch = _scratch(height, K)
    for n0 in range(0, N, height):
        n1 = min(n0 + height, N)
        w = scratch[: n1 - n0]
        _dequantize_rows(weight, K, block_size, n0, n1, w)
        yield n0, n1, w


def _scratch(rows: int, columns: int) -> Tensor:
    """This thread's float32 scratch, at most 16 MB but for longer rows, kept from call to call.

    A forward keeps its outputs, so fresh memory would lie elsewhere in every layer, and be cold.
    """
    buffer = getattr(_thread, "scratch", None)
    if buffer is None or buffer.numel() < rows * columns:
        buffer = _thread.scratch = _empty(rows * columns)
    return buffer[: rows * columns].view(rows, columns)


def _dense_panels(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The same of a dense weight [V, H]: itself where it is float32, else cast panel by panel."""
    V, H = weight.shape
    if weight.dtype == torch.float32:
        yield 0, V, weight
        return
    height = min(V, max(1, _PANEL // max(1, H)))
    scratch = _scratch(height, H)
    for v0 in range(0, V, height):
        v1 = min(v0 + height, V)
        yield v0, v1, scratch[: v1 - v0].copy_(weight[v0:v1])


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
    weight = (packed, absmax, absmax_scale, codebook)
    return _refuse_dtype(dtype) or _refuse_weight(weight, K, block_size)


def _refuse_linear(x, packed, absmax, absmax_scale, codebook, bias, block_size) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    if x.dim() == 0:
        return "x is not [..., K]"
    if bias is not None and (bias.shape != packed.shape[:1] or bias.device.type != "cpu"):
        return "the bias is not [N] on the CPU"
    return (
        _refuse_dtype(x.dtype)
        or _refuse_devices(x)
        or _refuse_weight(weight, x.shape[-1], block_size)
    )


def _refuse_linear_dx(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> str | None:
    weight = (packed, absmax, absmax_scale, codebook)
    if dy.dim() == 0 or dy.shape[-1] != packed.shape[0]:
        return "dy is not [..., N]"
    return _refuse_dtype(dy.dtype) or _refuse_devices(dy) or _refuse_weight(weight, K, block_size)


def _refuse_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, with_dx: bool) -> str | None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] == 0 or x.shape[1] != weight.shape[1]:
        return "x and weight are not [T, H] and [V, H]"
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        return "labels are not int64 [T]"
    return (
        _refuse_dtype(x.dtype) or _refuse_dtype(weight.dtype) or _refuse_devices(x, weight, labels)
    )


def _refuse_adamw8bit(params, grads, m, m_scale, v, v_scale, *numbers) -> str | None:
    if len({len(tensors) for tensors in (params, grads, m, m_scale, v, v_scale)}) > 1:
        return "the lists are not of one length"
    for p, g, *state in zip(params, grads, m, v, m_scale, v_scale, strict=True):
        shape, scale_shape = p.shape, adamw8bit.scale_shape(p.shape)
        if g.shape != shape or g.dtype != p.dtype:
            return "a gradient has not the shape and dtype of its parameter"
        if any(t.shape != shape or t.dtype != torch.uint8 for t in state[:2]):
            return "the codes of a moment are not uint8 in the shape of the parameter"
        if any(t.shape != scale_shape or t.dtype != torch.float32 for t in state[2:]):
            return f"the scales of a moment are not float32 {list(scale_shape)}"
        if not (p.is_contiguous() and all(t.is_contiguous() for t in state)):
            return "a parameter or its state is not contiguous"
        reason = _refuse_dtype(p.dtype) or _refuse_devices(p, g, *state)
        if reason is not None:
            return reason
    return None


def _refuse_weight(weight: _Weight, K: int, block_size: int) -> str | None:
    packed, absmax, scale, codebook = weight
    if packed.dim() != 2 or K < 1:
        return "the weight is not [N, K] with K >= 1"
    N = packed.shape[0]
    reason = _refuse_codebook(codebook, N, block_size)
    if reason is not None:
        return reason
    if packed.dtype != torch.uint8 or packed.shape[1] != (K + 31) // 32 * 16:
        return f"packed is not uint8 [N, {(K + 31) // 32 * 16}]"
    expected = torch.float32 if scale is None else torch.uint8
    if absmax.dtype != expected or absmax.shape != (N, (K + block_size - 1) // block_size):
        return f"absmax is not {expected} [N, ceil(K / block_size)]"
    if scale is not None:
        if scale.dtype != torch.float32 or scale.shape != (N, 2) or not scale.is_contiguous():
            return "absmax_scale is not contiguous float32 [N, 2]"
        if scale.device.type != "cpu":
            return "absmax_scale is not on the CPU"
    if not (packed.is_contiguous() and absmax.is_contiguous()):
        return "packed or absmax is not contiguous"
    return _refuse_devices(packed, absmax, codebook)


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
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return None
    return "not all tensors are on the CPU"


_REFUSALS = {
    "codebook_quantize": _refuse_quantize,
    "codebook_dequantize": _refuse_dequantize,
    "codebook_linear": _refuse_linear,
    "codebook_linear_dx": _refuse_linear_dx,
    "linear_cross_entropy": _refuse_cross_entropy,
    "adamw8bit_step": _refuse_adamw8bit,
}
