"""What layers of a kind share in one forward, worked out once: angles, borders, masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lowrank.errors import ShapeError
from lowrank.models.cache import KVCache
from lowrank.models.config import DecoderConfig, rope_frequencies
from lowrank.ops.newest import Newest


@dataclass(frozen=True)
class Plan:
    """What layers of a kind share in one forward.

    Attention is over `lengths` examples laid end to end in one row if given, each causal, or under
    the mask that `bands` has for its length; else under `mask` (bool [B, 1, S, total], True where a
    query may look) if given; else causal or, for the single newest position of a cache, over
    everything, or the `newest` keys. Layers that turn nothing have no angles.
    """

    positions: Tensor  # [B or 1, S]
    cos: Tensor | None  # [B or 1, S, 1, rotary_dim]
    sin: Tensor | None  # [B or 1, S, 1, rotary_dim / 2]
    lengths: list[int] | None = None
    bands: Mapping[int, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    causal: bool = True
    newest: int = 0  # all
    cache: KVCache | None = None
    at_once: Newest | None = None  # what attends by itself, where S is 1 and the kernel can


def make_plans(
    config: DecoderConfig,
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Plan]:
    """A plan for each of `config.kinds`, for input of `shape` [B, S]; see `Decoder.forward`."""
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

    lengths = None
    if position_ids is None:
        position_ids = _positions(attention_mask, past, S, device)
    elif attention_mask is None and cache is None:
        position_ids = position_ids.expand(B, S)
        lengths = _example_lengths(position_ids)
        if lengths == [S] * B:
            lengths = None  # every row is one example: one call does them all
        else:
            position_ids = position_ids.reshape(1, B * S)
    position_ids = position_ids.to(device)
    if attention_mask is not None and _is_right_padded(attention_mask):
        attention_mask = None  # causality alone hides what follows
    angles = {
        kind.local: _angles(config, kind.local, position_ids, cache, dtype)
        for kind in config.kinds
        if kind.rotated
    }
    if cache is not None:
        cache.make_room(S)
    plans = []
    for number, kind in enumerate(config.kinds):
        cos, sin = angles[kind.local] if kind.rotated else (None, None)
        plan = partial(Plan, position_ids, cos, sin, cache=cache)
        if lengths is not None:
            plans.append(plan(lengths, _bands(lengths, kind.window, device)))
            continue
        held = cache.held(number) if cache is not None else 0
        of_held = None if attention_mask is None else attention_mask[:, past - held :]
        mask, newest = _mask(of_held, held, S, kind.window, device)
        at_once = None
        if cache is not None and S == 1:
            first = held + 1 - newest if newest else 0
            at_once = Newest.over(cos, sin, mask, cache.of_kind(number), held, first)
        causal = mask is None and not held
        plans.append(plan(mask=mask, causal=causal, newest=newest, at_once=at_once))
    return plans


def _angles(
    config: DecoderConfig,
    local: bool,
    position_ids: Tensor,
    cache: KVCache | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """cos [B or 1, S, 1, rotary_dim] and sin [B or 1, S, 1, rotary_dim / 2] of the positions.

    Where frequencies depend on the length, all that a cache will ever hold is turned alike: by the
    capacity.
    """
    length = 0
    if config.length_matters:
        length = int(position_ids.max()) + 1 if cache is None else cache.capacity
    frequency, factor = rope_frequencies(config, local, length, position_ids.device)
    angle = position_ids[..., None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    cos, sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
    return torch.cat([cos, cos], dim=-1), sin


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


def _mask(
    attention_mask: Tensor | None, past: int, S: int, window: int | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """(mask [S, total] or [B, 1, S, total], or None; how many of the newest keys count, 0 for all).

    attention_mask [B, total] is None if no padding must be hidden.
    """
    total = past + S
    window = window if window is not None and window < total else None
    mask = None
    if attention_mask is not None:
        # a padded query sees nothing, and softmax over nothing is NaN: let it see itself
        itself = torch.ones(S, total, dtype=torch.bool, device=device).tril_(past).triu_(past)
        seen = causal_mask(S, total, window, device) & attention_mask.bool()[:, None, :]
        mask = (seen | itself)[:, None]
    elif S > 1 and (past or window):
        mask = causal_mask(S, total, window, device)
    if S > 1 or window is None:
        return mask, 0
    return None if mask is None else mask[..., -window:], window


def _bands(lengths: list[int], window: int | None, device: torch.device) -> dict[int, Tensor]:
    """The masks [length, length] of the examples that are longer than the window, by length."""
    longer = {length for length in lengths if window is not None and length > window}
    return {length: causal_mask(length, length, window, device) for length in longer}


def causal_mask(S: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [S, total]: the last S positions see those up to theirs, the last `window` of them."""
    seen = torch.ones(S, total, dtype=torch.bool, device=device).tril_(total - S)
    return seen if window is None else seen.triu_(total - S - window + 1)
