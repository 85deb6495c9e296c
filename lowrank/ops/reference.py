"""What each operator means, in plain PyTorch. Also the fallback where no kernel runs.

Weights are decoded a panel of rows at a time, so no path holds a whole dense weight that the caller
did not ask for. Products are formed in float32 (float64 if the activations are) whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.errors import DataError

from .adamw8bit import BLOCK as ADAMW_BLOCK
from .adamw8bit import ZERO_OF_M, Coefficients, coefficients, dynamic_map, rows_and_columns

IGNORED_LABEL = -100

_PANEL = 1 << 20  # weights decoded at once: 4 MB of float32 stay in the last-level cache
_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}  # logits held at once: 32 MB, 256 MB


def missing() -> None:
    """Nothing: the reference needs only torch."""


def refuse(op: str, *args) -> str | None:
    """The reference runs everything, on every device."""
    return None


def codebook_quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest codes of weight [N, K], each block of G along a row scaled by its largest magnitude.

    absmax[n, b] = max |w[n, k]| over k // G == b; s = w / absmax; code = the number of midpoints
    between neighbours of the sorted codebook that are < s, so a tie goes to the lower neighbour.
    A full block multiplies by the reciprocal and a short last one divides, as bitsandbytes does.
    Returns packed, absmax (float32); NaN and inf show in absmax.   QLoRA, arXiv:2305.14314, §3.
    """
    N, K = weight.shape
    full = K // block_size * block_size  # where the last, short block begins
    entries, order = codebook.sort(dim=-1, stable=True)  # [T, 16]
    is_sorted = torch.equal(entries, codebook)
    mids = (entries[:, :-1] + entries[:, 1:]) / 2  # [T, 15]
    packed = torch.zeros(N, (K + 31) // 32 * 16, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(N, -(-K // block_size), dtype=torch.float32, device=weight.device)
    for rows in _panels(N, K):
        scaled = weight[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        largest = absmax[rows]
        if full:
            blocks = scaled[:, :full].unflatten(1, (-1, block_size))
            largest[:, : full // block_size] = blocks.abs().amax(-1)
            blocks.mul_(largest[:, : full // block_size, None].clamp(min=1e-38).reciprocal())
        if full < K:
            largest[:, -1] = scaled[:, full:].abs().amax(-1)
            scaled[:, full:].div_(largest[:, -1:].clamp(min=1e-38))
        scaled.clamp_(-1, 1)
        table = rows if codebook.shape[0] == N else slice(0, 1)
        codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=weight.device)
        for mid in mids[table].split(1, dim=1):  # [rows or 1, 1]; twice as fast as bucketize
            codes += scaled > mid
        if not is_sorted:
            codes = order[table].expand(len(codes), 16).gather(1, codes.long()).to(torch.uint8)
        packed[rows, : (K + 1) // 2] = codes[:, 0::2] << 4
        packed[rows, : K // 2] |= codes[:, 1::2]
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
    """w[n, k] = codebook[t, code[n, k]] * absmax[n, k // G]  [N, K], rounded once to `dtype`."""
    out = torch.empty(packed.shape[0], K, dtype=dtype, device=packed.device)
    for rows, w in _decode(packed, absmax, absmax_scale, codebook, K, block_size):
        out[rows] = w
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
    K, N = x.shape[-1], packed.shape[0]
    rows_of_x = x.reshape(-1, K).to(_compute_dtype(x))  # [M, K]
    y = rows_of_x.new_empty(rows_of_x.shape[0], N)
    for rows, w in _decode(packed, absmax, absmax_scale, codebook, K, block_size):
        torch.mm(rows_of_x, w.to(y.dtype).T, out=y[:, rows])
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
    rows_of_dy = dy.reshape(-1, packed.shape[0]).to(_compute_dtype(dy))  # [M, N]
    dx = rows_of_dy.new_zeros(rows_of_dy.shape[0], K)
    for rows, w in _decode(packed, absmax, absmax_scale, codebook, K, block_size):
        dx.addmm_(rows_of_dy[:, rows], w.to(dx.dtype))
    return dx.to(dy.dtype).view(*dy.shape[:-1], K)


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
    V, compute_dtype = weight.shape[0], _compute_dtype(x)
    kept, labels = labelled_rows(labels, V)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
    losses = torch.empty(kept.numel(), dtype=compute_dtype, device=x.device)
    chunk = max(1, _LOGITS.get(x.device.type, _LOGITS["cpu"]) // V)
    for start in range(0, kept.numel(), chunk):
        span = slice(start, start + chunk)
        inputs, targets = x[kept[span]], labels[span]  # [m, H], [m]
        logits = _logits(inputs, weight, compute_dtype)  # [m, V]
        target_logits = logits.gather(1, targets[:, None])
        largest = logits.amax(1, keepdim=True)
        # exp(-80) is nothing to a sum >= 1; subnormals would make the product 20 times slower
        exps = logits.sub_(largest).clamp_(min=-80).exp_()
        sums = exps.sum(1, keepdim=True)
        losses[span] = (sums.log() + largest - target_logits)[:, 0]
        if with_dx:
            grad = _times_weight(exps, weight, inputs.dtype).div_(sums).sub_(weight[targets])
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
    """Step number `step` of AdamW in place, moments kept as 8-bit codes of 256 elements a scale.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    in float32, in the order of `adamw8bit.Coefficients`; p moves by m and v before they are coded.
    Codes are the nearest, a tie goes to the one nearer zero, and only 0 is coded as 0 in v: there,
    0 for something small would make m / (sqrt(v) + eps) large.
    arXiv:1711.05101, arXiv:2110.02861; on zero in v, arXiv:2309.01507, §3.
    """
    by = coefficients(lr, beta1, beta2, eps, weight_decay, step)
    for tensors in zip(params, grads, m, m_scale, v, v_scale, strict=True):
        N, C = rows_and_columns(tensors[0].shape)
        if N == 0 or C == 0:
            continue
        for rows in _panels(N, C):
            _adamw8bit_rows(by, C, *(_rows_of(tensor)[rows] for tensor in tensors))


def _logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x Wᵀ accumulated and kept in `dtype`: [m, V]."""
    if _on_tensor_cores(x.dtype, weight):
        return torch.mm(x, weight.T, out_dtype=dtype)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    for rows, w in _cast(weight, dtype):
        torch.mm(x.to(dtype), w.T, out=out[:, rows])
    return out


def _times_weight(exps: Tensor, weight: Tensor, x_dtype: torch.dtype) -> Tensor:
    """e W for e [m, V], accumulated and kept in the dtype of e: [m, H]."""
    if _on_tensor_cores(x_dtype, weight):
        return torch.mm(exps.to(x_dtype), weight, out_dtype=exps.dtype)
    out = exps.new_zeros(exps.shape[0], weight.shape[1])
    for rows, w in _cast(weight, exps.dtype):
        out.addmm_(exps[:, rows], w)
    return out


def _on_tensor_cores(dtype: torch.dtype, weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype == dtype and dtype in (torch.bfloat16, torch.float16)


def _rows_of(tensor: Tensor) -> Tensor:
    """A view of it whose first dimension is the rows of `adamw8bit.rows_and_columns`."""
    return tensor if tensor.dim() > 1 else tensor[None]


def _adamw8bit_rows(
    by: Coefficients,
    C: int,
    p: Tensor,
    grad: Tensor,
    m_codes: Tensor,
    m_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
) -> None:
    """adamw8bit_step of some rows: of p, grad and codes [rows, ...], of scales [rows, blocks]."""
    m_map, v_map = dynamic_map(True).to(p.device), dynamic_map(False).to(p.device)
    g = grad.reshape(-1, C).float()
    m = _in_blocks(m_map[m_codes.reshape(-1, C).int()]) * m_scale[..., None]
    v = _in_blocks(v_map[v_codes.reshape(-1, C).int()]) * v_scale[..., None]
    m = m * by.beta1 + _in_blocks(g * by.rest1)  # [rows, blocks, 256]
    v = v * by.beta2 + _in_blocks(g * g * by.rest2)
    ratio = (m / (v.sqrt() * by.root2 + by.eps)).flatten(1)[:, :C]
    p.copy_((p.reshape(-1, C).float() * by.decay - ratio * by.rate).view(p.shape))

    # -1 is not in the map of m; the scale is such that its least value still is a largest m < 0.
    largest = torch.maximum(m, m * m_map[0].reciprocal()).amax(-1)  # [rows, blocks]
    s, scale = _scaled(m, largest)
    distance = _nearest(m_map[ZERO_OF_M:], s.abs())
    codes = (ZERO_OF_M + torch.where(s.signbit(), -distance, distance)).clamp(min=0)
    m_codes.copy_(codes.flatten(1)[:, :C].reshape(m_codes.shape))
    m_scale.copy_(scale)

    s, scale = _scaled(v, v.amax(-1))
    codes = torch.where(s == 0, 0, 1 + _nearest(v_map[1:], s))
    v_codes.copy_(codes.flatten(1)[:, :C].reshape(v_codes.shape))
    v_scale.copy_(scale)


def _in_blocks(rows: Tensor) -> Tensor:
    """[rows, C] -> [rows, blocks, 256], the last block filled up with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % ADAMW_BLOCK)).unflatten(1, (-1, ADAMW_BLOCK))


def _scaled(values: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """values / scale and the scale, which is 0 where its reciprocal would be infinite."""
    scale = largest.masked_fill(largest < torch.finfo(torch.float32).tiny, 0)
    inverse = torch.where(scale == 0, 0, scale.reciprocal())
    return values * inverse[..., None], scale


def _nearest(entries: Tensor, s: Tensor) -> Tensor:
    """Index of the entry nearest to s, the lower of two: how many exact midpoints are below s."""
    entries = entries.double()
    return torch.bucketize(s.double(), (entries[:-1] + entries[1:]) / 2)


def _cast(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a dense weight in `dtype`: at once if they are, else panel by panel."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    for rows in _panels(*weight.shape):
        yield rows, weight[rows].to(dtype)


def _decode(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Panels of rows of the weight in float32, each [rows, K]."""
    pairs = _pair_table(codebook[0]) if codebook.shape[0] == 1 else None
    full = K // block_size
    for rows in _panels(packed.shape[0], K):
        codes, scales = packed[rows], absmax[rows]
        if absmax_scale is not None:
            step, offset = absmax_scale[rows].split(1, dim=1)  # [rows, 1]
            scales = scales.float() * step + offset  # two roundings: not an fma
        if pairs is not None:
            values = (
                pairs.index_select(0, codes.reshape(-1).int()).view(codes.shape).view(torch.float32)
            )
        else:
            nibbles = torch.stack((codes >> 4, codes & 0xF), dim=-1).flatten(1)
            values = codebook[rows].gather(1, nibbles.long())
        values = values[:, :K]  # the pad of a row is never read as weights
        values[:, : full * block_size].unflatten(1, (full, block_size)).mul_(scales[:, :full, None])
        values[:, full * block_size :].mul_(scales[:, full:])
        yield rows, values


def _pair_table(entries: Tensor) -> Tensor:
    """The two floats that each byte stands for, as one int64: [256].

    One 8-byte lookup a byte is 17 times faster in torch than indexing by nibble (on one core).
    """
    pairs = torch.stack((entries.repeat_interleave(16), entries.repeat(16)), dim=-1)  # [256, 2]
    return pairs.view(torch.int64)[:, 0].contiguous()


def _panels(N: int, K: int) -> Iterator[slice]:
    rows = max(1, _PANEL // K)
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
