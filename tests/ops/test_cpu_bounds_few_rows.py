"""What a token is computed with, between unreadable pages; as test_cpu_bounds.py has the others."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from lowrank.ops import native, reference
from tests.ops.guarded import guarded, unwritten
from tests.ops.isas import ISAS
from tests.ops.test_cpu_bounds import CASES, DTYPES, EPS, call, kernels, random_shape
from tests.ops.weights import dense, random_weight

pytestmark = [pytest.mark.parametrize("isa", ISAS), pytest.mark.usefixtures(kernels.__name__)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_one_x(dtype):
    for _ in range(CASES // 2):
        M, K = random.choice((0, 1, 2, 3, 4, 5, 9, 16)), random_shape()[1]
        x, count = guarded(torch.randn(M, K).to(dtype)), random.randrange(0, 4)
        products, kept_alive, ys, wanted = (native.Product * count)(), [], [], []
        for i in range(count):
            N, _, G = random_shape()
            weight = random_weight(N, K, G, random.random() < 0.5, random.choice((1, max(1, N))))
            w = dense(*weight, K, G).double()
            weight = tuple(None if t is None else guarded(t) for t in weight)
            R = random.choice((0, 1, 8, 16, 37))
            A, B, bias = (guarded(torch.randn(*s)) for s in ((R, K), (N, R), (N,)))
            y = unwritten(M, N, dtype=dtype)
            tensors = [*weight, bias if i % 2 else None, *((A, B) if R else (None, None)), y]
            # of nothing, an address all the same: without A there would be no adapter
            at = [None if t is None else (t.data_ptr() or x.data_ptr() or 4) for t in tensors]
            products[i] = native.Product(*at[:4], weight[3].shape[0], N, G, at[4], *at[5:7], R, 0.5)
            kept_alive.append(tensors)
            ys.append(at[7])
            h, bound_h = x.double() @ A.T.double(), x.double().abs() @ A.T.double().abs()
            exact = x.double() @ w.T + h @ B.T.double() / 2
            bound = x.double().abs() @ w.T.abs() + bound_h @ B.T.double().abs()
            if i % 2:
                exact, bound = exact + bias, bound + bias.abs()
            wanted.append((y, exact, bound))
        call(
            "lowrank_codebook_products", x, native.DTYPES[dtype], M, K,
            ctypes.addressof(products), count, (ctypes.c_void_p * count)(*ys),
            random.choice((1, 2)),
        )  # fmt: skip
        for y, exact, bound in wanted:
            allowed = EPS[dtype] * bound + torch.finfo(dtype).smallest_normal
            assert ((y - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_newest(dtype):
    for _ in range(CASES // 2):
        B, kv_heads, groups = random.randrange(1, 4), random.randrange(1, 4), random.randrange(1, 4)
        D, position = random.choice((1, 2, 8, 16, 19, 64, 80, 128, 131)), random.randrange(0, 40)
        rotary = random.choice((0, D // 2 * 2, D // 4 * 2))
        first, capacity = random.randrange(0, position + 1), position + random.randrange(1, 4)
        heads, n, softcap = kv_heads * groups, position + 1 - first, random.choice((0.0, 3.0))
        q, k, v = (torch.randn(B, 1, h, D).to(dtype) for h in (heads, kv_heads, kv_heads))
        keys, values = (torch.randn(B, capacity, kv_heads, D).to(dtype) for _ in range(2))
        own = random.choice((1, B))
        angle = torch.rand(own, 1, 1, rotary // 2) * 6
        cos, sin = torch.cat([angle.cos()] * 2, -1).to(dtype), angle.sin().to(dtype)
        mask = torch.rand(B, n) < 0.7
        mask[:, -1] = True
        wide = [keys.double(), values.double()]
        turned = q, k
        if rotary:
            turned = reference.rotate(*(t.double() for t in (q, k, cos, sin)), False)
        turned_q, wide[0][:, position] = (t[:, 0].double() for t in turned)
        wide[1][:, position] = v[:, 0].double()
        seen = [t[:, first : position + 1].repeat_interleave(groups, 2) for t in wide]
        scores = torch.einsum("bhd,bthd->bht", turned_q, seen[0]) * 0.3
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        expected = torch.einsum("bht,bthd->bhd", weights, seen[1])
        far = [guarded(t) for t in (q, k, v, keys, values, cos, sin, mask)]
        out = unwritten(B, heads, D, dtype=dtype)
        angles = [t.data_ptr() if rotary else None for t in far[5:7]]
        struct = native.Newest(
            *angles, far[7].data_ptr(), rotary * (own > 1), rotary // 2 * (own > 1), n,
            B, heads, kv_heads, D, rotary, capacity, position, first, 0.3, softcap,
        )  # fmt: skip
        strides = (ctypes.c_int64 * 6)(heads * D, D, kv_heads * D, D, kv_heads * D, D)
        call(
            "lowrank_attend_newest", ctypes.addressof(struct), *far[:3], strides,
            native.DTYPES[dtype], *far[3:5], out, random.choice((1, 2)),
        )  # fmt: skip
        tolerance = {"rtol": 8 * EPS[dtype], "atol": 20 * EPS[dtype]}
        torch.testing.assert_close(out.double(), expected, **tolerance)
        torch.testing.assert_close(far[3].double(), wide[0], **tolerance)
        assert torch.equal(far[4].double(), wide[1])
