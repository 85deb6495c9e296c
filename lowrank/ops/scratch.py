"""One buffer for each device and stream that dense weights pass through on their way to BLAS.

It grows to the largest weight seen and stays: layer after layer is decoded to the same addresses,
which the GPU's cache then holds in part, and the peak of a step has one dense weight in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_buffers: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


@contextmanager
def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Room for a tensor of this shape, to be filled and read on the current stream in the block.

    A stream runs what it is given in order, so the next block may write while the GPU still has to
    read for this one; the lock keeps two threads from interleaving what they give to one stream.
    A CUDA graph keeps its addresses, so what is captured into one has memory of its own.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _lock:
        buffer = _buffers.get((device, stream))
        if buffer is None or buffer.numel() < size:
            _buffers.pop((device, stream), None)  # freed before the larger one is asked for
            buffer = None
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            _buffers[device, stream] = buffer
        yield buffer[:size].view(dtype).view(shape)
