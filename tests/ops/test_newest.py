"""The newest position at once: what torch's own calls give, where nobody has to see them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowrank import ops
from lowrank.ops import reference
from lowrank.ops.newest import Newest
from tests.ops.isas import needs_library

pytestmark = needs_library
CAPACITY = 12


def tensors(generator, B=2, heads=6, kv_heads=2, D=20, rotary=8, dtype=torch.float32):
    """q, k, v, keys, values, cos, sin."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    angle = torch.rand(B, 1, 1, rotary // 2, generator=generator) * 6
    return (
        normal(B, 1, heads, D), normal(B, 1, kv_heads, D), normal(B, 1, kv_heads, D),
        normal(B, CAPACITY, kv_heads, D), normal(B, CAPACITY, kv_heads, D),
        torch.cat([angle.cos()] * 2, -1).to(dtype), angle.sin().to(dtype),
    )  # fmt: skip


def expected(q, k, v, keys, values, cos, sin, mask, position, first, scale):
    """By torch in float64; keys and values with the newest in them."""
    q, k, v, keys, values = (t.double() for t in (q, k, v, keys, values))
    if cos is not None:
        q, k = reference.rotate(q, k, cos.double(), sin.double(), False)
    keys[:, position], values[:, position] = k[:, 0], v[:, 0]
    seen = [t[:, first : position + 1].transpose(1, 2) for t in (keys, values)]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), *seen, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).flatten(2), keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("position, first", [(0, 0), (7, 0), (11, 5)])
@torch.no_grad()
def test_what_torch_gives(generator, dtype, masked, turned, position, first):
    q, k, v, keys, values, cos, sin = tensors(generator, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, position + 1, generator=generator) < 0.6
        mask[..., -1] = True
        mask = mask[..., first:]
    angles = (cos, sin) if turned else (None, None)
    want = expected(q, k, v, keys, values, *angles, mask, position, first, 0.3)
    newest = Newest.over(*angles, mask, keys, position, first)
    y = newest.attend(q, k, v, keys, values, 0.3, None)
    off = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for got, right in zip((y, keys, values), want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=off, atol=off)


@torch.no_grad()
def test_heads_that_lie_apart(generator):
    """As the parts of a fused projection do: side by side, or interleaved by heads."""
    q, k, v, keys, values, cos, sin = tensors(generator, heads=2)
    want = expected(q, k, v, keys, values, cos, sin, None, 4, 0, 0.3)[0]
    newest = Newest.over(cos, sin, None, keys, 4, 0)
    beside = torch.cat([t.flatten(2) for t in (q, k, v)], -1).split(40, -1)
    between = torch.cat([q, k, v], -1)
    for parts in ([t.unflatten(2, (2, 20)) for t in beside], between.chunk(3, -1)):
        y = newest.attend(*parts, keys, values, 0.3, None)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_not_where_somebody_has_to_see_it(generator):
    q, k, v, keys, values, cos, sin = tensors(generator)
    before = keys.clone()
    assert Newest.over(cos, sin, None, keys, 4, 0) is not None
    with torch.enable_grad():
        assert Newest.over(cos, sin, None, keys, 4, 0) is None
    with ops.use_backend("reference"):
        assert Newest.over(cos, sin, None, keys, 4, 0) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert Newest.over(cos, sin, None, keys, 4, 0) is None
    assert Newest.over(cos.double(), sin.double(), None, keys, 4, 0) is None
    assert Newest.over(cos, sin, torch.ones(2, 1, 1, 4, dtype=torch.bool), keys, 4, 0) is None
    assert Newest.over(cos, sin, None, keys.to("meta"), 4, 0) is None
    assert Newest.over(None, None, None, keys.double(), 4, 0) is None
    newest = Newest.over(cos, sin, None, keys, 4, 0)
    for given in (
        (q.double(), k, v), (q[:1], k[:1], v[:1]), (q, k[..., :-1], v), (q[:, :, :5], k, v),
        (q.mT.contiguous().mT, k, v), (q, k, v.to("meta")),
    ):  # fmt: skip
        assert newest.attend(*given, keys, values, 0.3, None) is None
    assert newest.attend(q, k, v, keys[:, :-1], values[:, :-1], 0.3, None) is None
    assert torch.equal(keys, before)
