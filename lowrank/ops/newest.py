"""Attention of the newest position of each text over a cache: for a token, one call a layer.

Turning, caching and attending are nine calls of torch's otherwise, each longer than its arithmetic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch, native

_Strides = ctypes.c_int64 * 6


class Newest:
    """What the newest position of B texts looks at, the same for several layers.

    Made by `over` for one forward, on the terms of the thread that makes it.
    """

    def __init__(self, native_newest: native.Newest, tensors: Sequence[Tensor | None]) -> None:
        self._struct, self._tensors = native_newest, tensors  # whose pointers are in it
        self.address = ctypes.addressof(native_newest)
        s = native_newest
        self._of_keys, self._of_k = (s.B, s.capacity, s.kv_heads, s.D), (s.B, 1, s.kv_heads, s.D)

    @classmethod
    def over(
        cls,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Tensor | None,
        keys: Tensor,
        position: int,
        first: int,
    ) -> Newest | None:
        """For keys [B, capacity, kv_heads, D] of which those from `first` to `position` are seen.

        cos [B or 1, 1, 1, rotary] and sin [B or 1, 1, 1, rotary / 2] are as `layers.rotate` has
        them; mask is bool [B, 1, 1, position + 1 - first]. None where it is not the kernel's to do,
        or somebody has to see what is done.
        """
        given = [t for t in (cos, sin, keys) if t is not None]
        tensors = [*given, *([] if mask is None else [mask])]
        B, capacity, kv_heads, D = keys.shape
        if torch.is_grad_enabled() or not dispatch.is_alone():
            return None
        if isinstance(native.load_cpu(), str) or not all(map(dispatch.is_plain, tensors)):
            return None
        if keys.dtype not in native.DTYPES or any(t.dtype != keys.dtype for t in given):
            return None
        if mask is not None and mask.shape[-1] != position + 1 - first:
            return None
        if any(t.stride(-1) != 1 or t.shape[0] not in (1, B) for t in tensors):
            return None
        at = [None if t is None else t.data_ptr() for t in (cos, sin, mask)]
        apart = [0 if t is None or len(t) == 1 else t.stride(0) for t in (cos, sin, mask)]
        rotary = 0 if cos is None else cos.shape[-1]
        made = native.Newest(
            *at, *apart, B, kv_heads, kv_heads, D, rotary, capacity, position, first, 1, 0
        )
        return cls(made, tensors)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor | None:
        """softmax(scale q keysᵀ) values [B, 1, heads * D]; before, k is turned and cached, and v.

        q is [B, 1, heads, D], k and v are [B, 1, kv_heads, D], keys and values those of a layer.
        With `softcap` c, scores s are c tanh(s / c). None, and nothing done, where these tensors
        are not the kernel's to take.
        """
        dtype, struct = keys.dtype, self._struct
        B, _, heads, D = q.shape
        if not (q.dtype == k.dtype == v.dtype == dtype and self._fit(q, k, v, keys, values)):
            return None
        if not (dispatch.is_plain(q) and dispatch.is_plain(k) and dispatch.is_plain(v)):
            return None
        (q0, _, q1, q2), (k0, _, k1, k2), (v0, _, v1, v2) = q.stride(), k.stride(), v.stride()
        if not q2 == k2 == v2 == 1:
            return None
        struct.heads, struct.scale, struct.softcap = heads, scale, softcap or 0.0
        out = q.new_empty((B, 1, heads * D))
        status = native.load_cpu().lowrank_attend_newest(
            self.address, q.data_ptr(), k.data_ptr(), v.data_ptr(),
            _Strides(q0, q1, k0, k1, v0, v1), native.DTYPES[dtype],
            keys.data_ptr(), values.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "attend_newest")
        return out

    def _fit(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> bool:
        B, heads = q.shape[0], q.shape[2]
        return (
            k.shape == v.shape == self._of_k
            and q.shape == (B, 1, heads, k.shape[3])
            and k.shape[0] == B
            and heads % k.shape[2] == 0
            and all(self.is_over(t, keys.dtype) for t in (keys, values))
        )

    def is_over(self, held: Tensor, dtype: torch.dtype) -> bool:
        """Whether `held` can be a layer's keys or values."""
        return (
            held.shape == self._of_keys
            and held.dtype == dtype
            and held.is_cpu
            and held.is_contiguous()
        )
