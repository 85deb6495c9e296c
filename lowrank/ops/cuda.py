"""Launches the CUDA C++ kernels, for where Triton is not: dequantize, and the products over cuBLAS.

The kernels are in `csrc/cuda/`, built where nvcc is. Launches go to torch's current stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.errors import BackendError

from . import native


def missing() -> str | None:
    """Why the CUDA library cannot run here at all, or None if it can."""
    library = native.load_cuda()
    return library if isinstance(library, str) else None


def refuse(op: str, *args) -> str | None:
    """Why the CUDA library will not run `op` on these arguments, or None if it will."""
    device = args[0].device
    if device.type != "cuda":
        return f"runs on CUDA tensors; got one on {device}"
    reason = missing()
    if reason is not None:
        return reason
    dtype = args[-1] if op == "codebook_dequantize" else args[0].dtype
    if dtype not in native.DTYPES:
        return f"{dtype} is not float32, float16 or bfloat16"
    packed = args[0] if op == "codebook_dequantize" else args[1]
    return "packed is not aligned to 4 bytes" if packed.data_ptr() % 4 else None


def codebook_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in `dtype`, double-quantized scales decoded in the same pass."""
    N, device = packed.shape[0], packed.device
    out = torch.empty(N, K, dtype=dtype, device=device)
    packed, absmax, codebook = packed.contiguous(), absmax.contiguous(), codebook.contiguous()
    scale = None if absmax_scale is None else absmax_scale.contiguous()
    library = native.load_cuda()
    with torch.cuda.device(device):
        status = library.lowrank_cuda_codebook_dequantize(
            packed.data_ptr(), absmax.data_ptr(), None if scale is None else scale.data_ptr(),
            codebook.data_ptr(), codebook.shape[0], N, K, block_size,
            out.data_ptr(), native.DTYPES[dtype],
            device.index, torch.cuda.current_stream(device).cuda_stream,
        )  # fmt: skip
    if status:
        raise BackendError(f"codebook_dequantize: {library.lowrank_cuda_message(status).decode()}")
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
    """y = x Wᵀ + b for x [..., K]: [..., N]. W is scratch in the dtype of x, freed on return."""
    K = x.shape[-1]
    w = codebook_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, x.dtype)
    return F.linear(x, w, bias)


def codebook_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> Tensor:
    """dx = dy W for dy [..., N]: [..., K]. W is scratch in the dtype of dy, freed on return."""
    w = codebook_dequantize(packed, absmax, absmax_scale, codebook, K, block_size, dy.dtype)
    return dy @ w
