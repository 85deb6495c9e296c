"""Causal attention over whole rows, over packed examples, and over a key-value cache.

What all layers share (rotary angles, borders of examples, mask) is worked out once per forward,
in a `Plan`; a layer only applies it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import ShapeError
from lowrank.models.config import DecoderConfig, rope_frequencies
from lowrank.models.layers import rotate


class KVCache:
    """Keys and values of the positions so far, preallocated for `capacity` positions.

    Each layer's are [B, capacity, num_key_value_heads, head_dim]; `length` positions are filled.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, S, heads, D] behind the filled part; returns all k, v so far."""
        start, end = self.length, self.length + k.shape[1]
        self.keys[layer][:, start:end] = k
        self.values[layer][:, start:end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]


@dataclass(frozen=True)
class Plan:
    """What every layer of one forward shares.

    Attention is over `lengths` examples laid end to end in one row if given; else under `mask`
    (bool [B, 1, S, total], True where a query may look) if given; else causal or, for the single
    newest position of a cache, over everything.
    """

    cos: Tensor  # [B or 1, S, 1, D]
    sin: Tensor  # [B or 1, S, 1, D / 2]
    lengths: list[int] | None = None
    mask: Tensor | None = None
    causal: bool = True
    cache: KVCache | None = None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: softmax(q kᵀ / sqrt(D)) v, then o_proj.

    x [B, S, H] -> [B, S, H], or [b, t, H] of only those `rows` [b, t] of x [B * S, H] asked for.
    Ainslie et al., arXiv:2305.13245.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        H, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(H, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=bias)

    def forward(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        return self.o_proj(self.attended(x, plan, rows))

    def attended(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        """What o_proj projects: the heads side by side."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), plan.cos, plan.sin)
        k = rotate(self.k_proj(x).view(heads), plan.cos, plan.sin)
        v = self.v_proj(x).view(heads)
        if plan.cache is not None:
            k, v = plan.cache.extend(self.layer, k, v)
        return take(attend(q, k, v, plan).flatten(2), rows)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """The `rows` [b, t] of x [B, S, H] seen as [B * S, H]: [b, t, H]; all of x for None."""
    if rows is None:
        return x
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """Attention of q [B, S, heads, D] to k, v [B, total, kv_heads, D]; shaped as q."""
    if plan.lengths is None:
        return _attend(q, k, v, plan.mask, plan.causal)
    examples = zip(*(t.split(plan.lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([_attend(*qkv, None, True) for qkv in examples], dim=1)


def make_plan(
    config: DecoderConfig,
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """Work out positions, borders and mask for input of `shape` [B, S]; see `Decoder.forward`."""
    B, S = shape
    past = cache.length if cache is not None else 0
    if cache is not None and past + S > cache.capacity:
        raise ShapeError(
            f"cache: {past} + {S} positions exceed its capacity {cache.capacity}; make it larger"
        )
    if attention_mask is not None and attention_mask.shape != (B, past + S):
        raise ShapeError(
            f"attention_mask: expected shape {(B, past + S)}; got {tuple(attention_mask.shape)}"
        )
    if position_ids is not None and position_ids.shape not in ((B, S), (1, S)):
        raise ShapeError(f"position_ids: expected shape {(B, S)}; got {tuple(position_ids.shape)}")

    lengths = mask = None
    if position_ids is None:
        position_ids = _positions(attention_mask, past, S, device)
    elif attention_mask is None and cache is None:
        position_ids = position_ids.expand(B, S)
        lengths = _example_lengths(position_ids)
        if lengths == [S] * B:
            lengths = None  # every row is one example: one call does them all
        else:
            position_ids = position_ids.reshape(1, B * S)
    if attention_mask is not None and not _is_right_padded(attention_mask):
        mask = _mask(attention_mask.bool(), S)
    elif past and S > 1:
        mask = torch.ones(S, past + S, dtype=torch.bool, device=device).tril_(past)
    angle = position_ids.to(device)[..., None].float() * rope_frequencies(config, device)
    cos, sin = angle.cos().to(dtype).unsqueeze(2), angle.sin().to(dtype).unsqueeze(2)
    cos = torch.cat([cos, cos], dim=-1)
    return Plan(cos, sin, lengths, mask, causal=mask is None and not past, cache=cache)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _positions(attention_mask: Tensor | None, past: int, S: int, device: torch.device) -> Tensor:
    """Positions [B or 1, S] that count from each row's first token that is not padding."""
    if attention_mask is None:
        return torch.arange(past, past + S, device=device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, past:]


def _example_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the examples in position_ids [B, S], rows end to end; each row starts one."""
    starts = position_ids == 0
    starts[:, 0] = True
    borders = starts.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(borders, [*borders[1:], starts.numel()], strict=True)]


def _is_right_padded(attention_mask: Tensor) -> bool:
    """Whether padding only follows tokens, so that causality alone hides it from them."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _mask(keep: Tensor, S: int) -> Tensor:
    """Bool mask [B, 1, S, total] of causal attention to the kept positions of `keep` [B, total]."""
    total = keep.shape[1]
    causal = torch.ones(S, total, dtype=torch.bool, device=keep.device).tril_(total - S)
    # a padded query sees nothing, and softmax over nothing is NaN: let it see itself
    itself = torch.eye(total, dtype=torch.bool, device=keep.device)[total - S :]
    return ((causal & keep[:, None, :]) | itself)[:, None]
