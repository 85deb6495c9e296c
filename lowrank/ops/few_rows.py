"""codebook_linear of a few rows of x on a CPU, over a weight that was looked at once; and norms.

A row of x and a layer of a small model take 20 us, and asking whether the kernel can have them
takes as long again: a model asks 200 times for each token that it writes, and for each prompt that
it reads. What there is to ask of a weight stays as it is while its tensors are the same ones, in
the same place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import dispatch, native
from .cpu import refuse
from .cpu.codebook import is_decoded_once

MOST_ROWS = 16  # rows of x: up to there every CPU multiplies straight from codes
_NAMES = ("packed", "absmax", "absmax_scale", "codebook")

Held = Mapping[str, Tensor | None]


class FewRows:
    """x Wᵀ + b for the weight [N, K] that is held under the names of `codebook_linear`.

    Made by `over`, and to be used as long as `is_of` says that it is of what is held.
    """

    def __init__(self, held: Held, N: int, K: int, block_size: int) -> None:
        self.held, self.K = {name: held.get(name) for name in _NAMES}, K
        self._tensors = tuple(self.held.values())
        self._pointers = tuple(map(_pointer, self._tensors))
        self._shape, codebook = self._tensors[0].shape, self._tensors[3]
        self._N = N
        self.sizes = (codebook.shape[0], N, K, block_size)

    @property
    def weight(self) -> tuple[int | None, ...]:
        """As a native.Product begins: pointers, rows of the codebook, N, block size."""
        rows, N, _, block_size = self.sizes
        return (*self._pointers, rows, N, block_size)

    @classmethod
    def over(
        cls,
        held: Held,
        operands: tuple[Tensor, Tensor, Tensor | None, Tensor],
        K: int,
        block_size: int,
    ) -> FewRows | None:
        """None where the kernel refuses the operands, or they are not what is held.

        Floats may be held as their bits.
        """
        x = torch.empty(1, K, device="cpu")
        if refuse("codebook_linear", x, *operands, None, block_size) is not None:
            return None
        tensors = [held.get(name) for name in _NAMES]
        if [_pointer(t) for t in tensors] != [_pointer(t) for t in operands]:
            return None
        if not all(t is None or dispatch.is_plain(t) for t in tensors):
            return None
        return cls(held, operands[0].shape[0], K, block_size)

    def is_of(self, held: Held) -> bool:
        """Whether what is held is the weight still."""
        for name, tensor, pointer in zip(_NAMES, self._tensors, self._pointers, strict=True):
            if held.get(name) is not tensor or _pointer(tensor) != pointer:
                return False
        return self._tensors[0].shape == self._shape

    def takes(self, bias: Tensor) -> bool:
        """Whether the kernel can be given this bias."""
        return bias.dtype == torch.float32 and bias.shape == (self._N,) and _is_readable(bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """y [..., N] in the dtype of x [..., K]; `bias` is float32.

        None where x has more rows than the kernel takes at once, and where anybody but the kernel
        has to see the call.
        """
        K, code = self.K, native.DTYPES.get(x.dtype)
        if code is None or x.shape[-1:] != (K,) or not x.numel():
            return None
        if x.numel() > MOST_ROWS * K and not is_decoded_once(x, self._N):
            return None
        if has_to_be_seen(x):
            return None
        if bias is not None and not (x.dtype == torch.float32 and self.takes(bias)):
            return None
        at, b = x.data_ptr(), _pointer(bias)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(x, bias):
            return None
        y = x.new_empty((*x.shape[:-1], self._N))
        status = native.load_cpu().lowrank_codebook_linear(
            at, code, x.numel() // K, *self._pointers, *self.sizes, b, y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "codebook_linear")
        return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor | None:
    """`ops.rms_norm` of x [..., H], in half of the time that asking takes there.

    None where a gradient may be asked for, or somebody has to see the call.
    """
    H, code, of_weight = weight.numel(), *map(native.DTYPES.get, (x.dtype, weight.dtype))
    if torch.is_grad_enabled() or code is None or of_weight is None:
        return None
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or not x.numel():
        return None
    if has_to_be_seen(x, weight):
        return None
    library, M = native.load_cpu(), x.numel() // H
    if isinstance(library, str):
        return None
    y, rstd = torch.empty_like(x), x.new_empty(M, dtype=torch.float32)
    status = library.lowrank_rms_norm(
        x.data_ptr(), code, M, H, weight.data_ptr(), of_weight, plus_one, eps, y.data_ptr(),
        rstd.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "rms_norm")
    return y


def has_to_be_seen(*tensors: Tensor) -> bool:
    """Whether a kernel may not be given the pointers of these tensors past all who could ask."""
    return not (dispatch.is_alone() and all(map(_is_readable, tensors)))


def _is_readable(tensor: Tensor) -> bool:
    plain = dispatch.is_plain(tensor) and tensor.is_contiguous()
    return plain and tensor.data_ptr() % tensor.itemsize == 0


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
