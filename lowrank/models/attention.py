"""Causal attention over whole rows, over packed examples, and over a key-value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.models.config import DecoderConfig
from lowrank.models.parts import Part, make_norm, part
from lowrank.models.plan import Plan, causal_mask
from lowrank.nn.together import Together
from lowrank.ops import rotate


class Attention(Part):
    """Grouped-query attention with rotary positions: softmax(q kᵀ / sqrt(D)) v, then projected.

    x [B, S, H] -> [B, S, H], or [b, t, H] of only those `rows` [b, t] of x [B * S, H] asked for.
    `scale` is in the place of 1 / sqrt(D); with `softcap` c, scores s are c tanh(s / c).
    Ainslie et al., arXiv:2305.13245; Gemma 2, arXiv:2408.00118, §2.
    """

    q, k, v, qkv, out = part("q"), part("k"), part("v"), part("qkv"), part("out")
    q_norm, k_norm = part("q_norm"), part("k_norm")

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config)
        H, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        family = config.family
        Q, K = config.num_attention_heads * D, config.num_key_value_heads * D
        self.to_heads, self.to_out = Together(), Together()
        self.layer, self.head_dim, self.widths = layer, D, (Q, K, K)
        self.by_head = family.qkv == "by_head"
        scalar = config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        if family.qkv == "separate":
            self.have(q=nn.Linear(H, Q, bias=bias))
            self.have(k=nn.Linear(H, K, bias=bias), v=nn.Linear(H, K, bias=bias))
        else:
            self.have(qkv=nn.Linear(H, Q + 2 * K, bias=bias))
        self.have(out=nn.Linear(Q, H, bias=bias if family.out_bias is None else family.out_bias))
        if family.qk_norm:
            self.have(q_norm=make_norm(config, D), k_norm=make_norm(config, D))

    def forward(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        return self.projected(self.attended(x, plan, rows))

    def attended(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        """What the last projection projects: the heads side by side."""
        q, k, v = self.heads(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if plan.at_once is not None:
            keys, values = plan.cache.of(self.layer)
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            y = plan.at_once.attend(q, k, v, keys, values, scale, self.softcap)
            if y is not None:
                return take(y, rows)
        if plan.cos is not None:
            q, k = rotate(q, k, plan.cos, plan.sin)
        if plan.cache is not None:
            k, v = plan.cache.extend(self.layer, k, v)
        return take(attend(q, k, v, plan, self.scale, self.softcap).flatten(2), rows)

    def projected(self, attended: Tensor) -> Tensor:
        """What the last projection makes of that."""
        return self.to_out.products(attended, self.out)[0]

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [B, S, its heads, D]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        if self.q is not None:
            q, k, v = self.to_heads.products(x, self.q, self.k, self.v)
            return q.view(shape), k.view(shape), v.view(shape)
        (qkv,) = self.to_heads.products(x, self.qkv)
        if self.by_head:
            return qkv.view(*x.shape[:2], -1, 3 * self.head_dim).chunk(3, dim=-1)
        return tuple(one.view(shape) for one in qkv.split(self.widths, dim=-1))


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """The `rows` [b, t] of x [B, S, H] seen as [B * S, H]: [b, t, H]; all of x for None."""
    if rows is None:
        return x
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of q [B, S, heads, D] to k, v [B, total, kv_heads, D]; shaped as q."""
    if plan.lengths is None:
        if plan.newest:
            k, v = k[:, -plan.newest :], v[:, -plan.newest :]
        return _attend(q, k, v, plan.mask, plan.causal, scale, softcap)
    examples = zip(*(t.split(plan.lengths, dim=1) for t in (q, k, v)), strict=True)
    bands = [plan.bands.get(length) for length in plan.lengths]
    parts = [
        _attend(*qkv, band, band is None, scale, softcap)
        for qkv, band in zip(examples, bands, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if softcap is not None:
        return _softcapped(q, k, v, mask, causal, scale, softcap).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """The same for q [B, heads, S, D] by scores that no fused kernel of torch's has."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = causal_mask(q.shape[-2], k.shape[-2], None, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
