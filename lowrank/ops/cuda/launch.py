"""What every launch needs: the device, torch's stream, and an error for a status."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import BackendError
from lowrank.ops import native

DEVICE = "cuda"  # the type of the tensors' device
OLDEST_TENSOR_CORES = (8, 0)  # that multiply 16-bit numbers in the shapes used here

Weight = tuple[Tensor, Tensor, Tensor | None, Tensor]  # packed, absmax, absmax_scale, codebook


def launch(function: str, device: torch.device, *arguments) -> None:
    """Call lowrank_cuda_<function>(*arguments, device, stream); BackendError says what failed."""
    library = native.load_cuda()
    status = getattr(library, f"lowrank_cuda_{function}")(*arguments, *place(device))
    if status:
        raise BackendError(f"{function}: {library.lowrank_cuda_message(status).decode()}")


def place(device: torch.device) -> tuple[int, int]:
    """The number of a device and its current stream."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def has_tensor_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= OLDEST_TENSOR_CORES


def contiguous(weight: Weight) -> Weight:
    """The tensors of a weight as the kernels address them; hold them until the launch."""
    packed, absmax, scale, codebook = weight
    scale = None if scale is None else scale.contiguous()
    return packed.contiguous(), absmax.contiguous(), scale, codebook.contiguous()


def pointers(weight: Weight) -> tuple[int, int, int | None, int, int]:
    """The tensors of a weight and the number of its codebooks, as the C functions take them."""
    packed, absmax, scale, codebook = weight
    scale_ptr = None if scale is None else scale.data_ptr()
    return packed.data_ptr(), absmax.data_ptr(), scale_ptr, codebook.data_ptr(), codebook.shape[0]
