"""Whole blocks of a decoder between unreadable pages; as test_cpu_bounds.py has the others."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.ops import native, whole_blocks
from tests.ops.guarded import guarded
from tests.ops.isas import ISAS
from tests.ops.test_cpu_bounds import CASES, DTYPES, call, kernels
from tests.ops.weights import dense, random_weight

pytestmark = [pytest.mark.parametrize("isa", ISAS), pytest.mark.usefixtures(kernels.__name__)]
SCALE = 0.02  # of scores: sharp ones would turn on a rounding of 8 bits
# of all roundings on the way, in norms of x
ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Parts:
    """The struct of a random block, and its weights in float64; its memory lives as long."""

    def __init__(self, H: int, heads: int, kv_heads: int, D: int, dtype: torch.dtype) -> None:
        self.heads, self.D, self.dtype, self.held = heads, D, dtype, []
        self.activation = random.choice(("silu", "gelu_tanh"))
        self.softcap, self.joined = random.choice((0.0, 3.0)), random.random() < 0.5
        self.I, Q, KV = random.randrange(1, 70), heads * D, kv_heads * D
        widths = [Q + 2 * KV] if self.joined else [Q, KV, KV]
        self.to_heads = [self.product(N, H) for N in widths]
        inner = [2 * self.I] if self.joined else [self.I] * 2
        self.to_inner = [self.product(N, H) for N in inner]
        self.out, self.down = self.product(H, Q), self.product(H, self.I)
        self.norms = [self.norm(H, True), *(self.norm(D, random.random() < 0.5) for _ in "qk")]
        self.norms += [self.norm(H, random.random() < 0.5), self.norm(H, True)]
        self.norms += [self.norm(H, random.random() < 0.5)]
        self.struct = whole_blocks.Block(
            *(norm for norm, _ in self.norms), tuple(p for p, _ in self.to_heads), self.out[0],
            tuple(p for p, _ in self.to_inner), self.down[0], len(self.to_heads),
            len(self.to_inner), heads, SCALE, self.softcap,
            whole_blocks.ACTIVATIONS[self.activation],
        )  # fmt: skip

    def product(self, N: int, K: int) -> tuple[native.Product, Tensor]:
        G = random.choice((32, 64, 128))
        weight = random_weight(N, K, G, random.random() < 0.5, 1)
        w = dense(*weight, K, G).double()
        far = [None if t is None else guarded(t) for t in weight]
        self.held.append(far)
        at = [None if t is None else t.data_ptr() for t in far]
        return native.Product(*at, 1, N, G, None, None, None, 0, 0.0), w

    def norm(self, size: int, there: bool) -> tuple[whole_blocks.Norm, Tensor | None]:
        if not there:
            return whole_blocks.Norm(), None
        weight = guarded(torch.randn(size).to(self.dtype))
        self.held.append(weight)
        code = native.DTYPES[self.dtype]
        return whole_blocks.Norm(weight.data_ptr(), code, 0, 1e-5), weight.double()

    def normed(self, x: Tensor, at: int) -> Tensor:
        weight = self.norms[at][1]
        return x if weight is None else F.rms_norm(x, weight.shape, weight, 1e-5)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """x [B, H] in float64; keys and values [B, capacity, kv_heads, D] take the newest."""
        B, (kv_heads, D) = len(x), keys.shape[2:]
        widths = [self.heads * D, kv_heads * D, kv_heads * D]
        z = self.normed(x, 0)
        heads = torch.cat([z @ w.T for _, w in self.to_heads], -1).split(widths, -1)
        q, k, v = (t.view(B, -1, D) for t in heads)
        keys[:, position], values[:, position] = self.normed(k, 2), v
        groups = self.heads // kv_heads
        seen = [t[:, : position + 1].repeat_interleave(groups, 2) for t in (keys, values)]
        scores = torch.einsum("bhd,bthd->bht", self.normed(q, 1), seen[0]) * SCALE
        scores = self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores
        attended = torch.einsum("bht,bthd->bhd", scores.softmax(-1), seen[1]).flatten(1)
        x = x + self.normed(attended @ self.out[1].T, 3)
        z = self.normed(x, 4)
        gate, up = torch.cat([z @ w.T for _, w in self.to_inner], -1).split(self.I, -1)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return x + self.normed((gate * up) @ self.down[1].T, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks(dtype):
    for _ in range(CASES // 3):
        B, kv_heads, groups = random.randrange(1, 4), random.randrange(1, 3), random.randrange(1, 3)
        D, H, position = random.choice((2, 8, 19)), random.randrange(1, 90), random.randrange(0, 9)
        capacity = position + random.randrange(1, 3)
        parts = [Parts(H, kv_heads * groups, kv_heads, D, dtype) for _ in range(2)]
        x = torch.randn(B, H).to(dtype)
        caches = [torch.randn(B, capacity, kv_heads, D).to(dtype) for _ in range(4)]
        expected, wide = x.double(), [cache.double() for cache in caches]
        for part, keys, values in zip(parts, wide[::2], wide[1::2], strict=True):
            expected = part.forward(expected, keys, values, position)
        far, *held = (guarded(t) for t in (x, *caches))
        struct = native.Newest(
            None, None, None, 0, 0, 0, B, kv_heads, kv_heads, D, 0, capacity, position, 0, 1.0, 0.0
        )
        pointers = ctypes.c_void_p * 2
        call(
            "lowrank_blocks", (whole_blocks.Block * 2)(*(part.struct for part in parts)), 2,
            pointers(*[ctypes.addressof(struct)] * 2),
            pointers(*(t.data_ptr() for t in held[::2])),
            pointers(*(t.data_ptr() for t in held[1::2])),
            far, native.DTYPES[dtype], H, random.choice((1, 2)),
        )  # fmt: skip
        for got, exact in zip((far, *held), (expected, *wide), strict=True):
            assert (got.double() - exact).norm() <= ERROR[dtype] * exact.norm()
        for got, was in zip(held, caches, strict=True):  # of the cache, the newest place alone
            got[:, position] = was[:, position]
            assert torch.equal(got, was)


def test_refuses_what_is_no_block():
    dtype, H, D = torch.float32, 24, 8
    part, other = Parts(H, 2, 1, D, dtype), Parts(H + 1, 2, 1, D, dtype)
    x, keys, values = guarded(torch.randn(1, H)), torch.zeros(1, 4, 1, D), torch.zeros(1, 4, 1, D)
    before = x.clone()
    struct = native.Newest(None, None, None, 0, 0, 0, 1, 1, 1, D, 0, 4, 2, 0, 1.0, 0.0)
    elsewhere = native.Newest(None, None, None, 0, 0, 0, 1, 2, 2, D, 0, 4, 2, 0, 1.0, 0.0)
    pointers = ctypes.c_void_p * 1

    def status(block: whole_blocks.Block, newest: native.Newest | None = struct, **other) -> int:
        given = {"count": 1, "x": x.data_ptr(), "H": H, "threads": 1, **other}
        return native.load_cpu().lowrank_blocks(
            (whole_blocks.Block * 1)(block), given["count"],
            pointers(None if newest is None else ctypes.addressof(newest)),
            pointers(keys.data_ptr()), pointers(values.data_ptr()), given["x"],
            native.DTYPES[dtype], given["H"], given["threads"],
        )  # fmt: skip

    refused = status(part.struct, count=-1)
    assert refused != 0
    for found in (
        status(other.struct),  # its products are of another width
        status(part.struct, elsewhere),  # more heads of keys than it has rows for
        status(part.struct, None),
        status(part.struct, x=None),
        status(part.struct, H=0),
        status(part.struct, threads=0),
    ):
        assert found == refused
    assert torch.equal(x, before)
    assert status(part.struct, count=0) == 0
    assert torch.equal(x, before)
    assert status(part.struct) == 0
    assert not torch.equal(x, before)
