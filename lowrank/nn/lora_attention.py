"""torch's multi-head attention with low-rank adapters beside its projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.held import replaced
from lowrank.nn.lora_linear import LoRALinear


class LoRAMultiheadAttention(AdaptedLayer):
    """nn.MultiheadAttention with adapters on what makes q, k and v, and on `out_proj`.

    The matrix is `in_proj_weight` [3 d, d], so A [R, d] is one for q, k and v, and B is [3 d, R].
    Where keys or values are of another size, it has blocks for each of the three and A is their
    three side by side, [R, d + kdim + vdim]. `base_layer.out_proj` is a LoRALinear of its own.
    """

    takes_rows = False  # the batch may be second

    def __init__(self, base: nn.MultiheadAttention) -> None:
        base = replaced(base)  # the caller's, if this comes to nothing, is as it was
        base._modules = {**base._modules, "out_proj": LoRALinear.bare(base.out_proj)}
        super().__init__(base)

    def __getattr__(self, name: str) -> object:
        """The encoder layers of torch ask for what the base has: batch_first, in_proj_bias…"""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or "_modules" not in self.__dict__:
                raise
            return getattr(self.base_layer, name)

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig, name: str) -> None:
        super().check(base, config, name)
        kind = nn.MultiheadAttention
        if not isinstance(base, kind) or type(base).forward is not kind.forward:
            raise TargetError(
                f"{name or 'wrap'}: expected nn.MultiheadAttention; got {type(base).__name__}"
            )
        if config.bias != "none":
            raise ConfigError(
                f'bias: expected "none" with an attention, whose biases PEFT has no file for; '
                f"{name or 'the layer'} is one; got {config.bias!r}"
            )

    @classmethod
    def matrix_shape_of(cls, base: nn.Module) -> tuple[int, int]:
        d = base.embed_dim
        return 3 * d, d if base._qkv_same_embed_dim else d + base.kdim + base.vdim

    @classmethod
    def file_shapes(
        cls, base: nn.Module, config: LoRAConfig, name: str = ""
    ) -> dict[str, tuple[int, ...]]:
        own, d = super().file_shapes(base, config, name), base.embed_dim
        out = LoRALinear.file_shapes(nn.Linear(d, d, device="meta"), config, name)
        return {**own, **{f"base_layer.out_proj.{key}": shape for key, shape in out.items()}}

    def add_adapter(self, adapter: str, config: LoRAConfig, name: str = "") -> None:
        super().add_adapter(adapter, config, name)
        self.base_layer.out_proj.add_adapter(adapter, config, name)

    def set_adapter(self, adapters: list[str]) -> None:
        super().set_adapter(adapters)
        self.base_layer.out_proj.set_adapter(adapters)

    @property
    def weight(self) -> Tensor:
        return _weights(self.base_layer)[0]

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = super().factors(adapter)
        base = self.unmerged_base
        if not base._qkv_same_embed_dim:
            A = torch.block_diag(*A.split([base.embed_dim, base.kdim, base.vdim], dim=1))
            B = torch.block_diag(*B.chunk(3))
        return A, B

    def matrix(self, dtype: torch.dtype) -> Tensor:
        weights = [weight.detach().to(dtype) for weight in _weights(self.unmerged_base)]
        return weights[0] if len(weights) == 1 else torch.block_diag(*weights)

    def plain(self, matrix: Tensor) -> nn.Module:
        base = self.unmerged_base
        if base._qkv_same_embed_dim:
            return replaced(base, in_proj_weight=matrix)
        sizes = [base.embed_dim, base.kdim, base.vdim]
        blocks = (rows.split(sizes, dim=1)[i] for i, rows in enumerate(matrix.chunk(3)))
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return replaced(base, **{n: b.contiguous() for n, b in zip(names, blocks, strict=True)})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; `is_causal` only says what `attn_mask` is."""
        base, out = self.base_layer, self.base_layer.out_proj
        idle = self.merged or not self.active_adapters
        out_idle = out.merged or out.disabled or not out.active_adapters
        if (self.disabled and not self.merged or idle and not self.disabled) and out_idle:
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return base(query, key, value, *masks)  # torch's own reads W of out_proj
        if is_causal and attn_mask is None:
            raise ConfigError("attn_mask: expected the mask beside is_causal=True; got None")
        batched = query.dim() == 3
        heads = [
            self._split_heads(x, batched) for x in self._projected(query, key, value)
        ]  # [batch, heads, length, d / heads] each
        mask = _mask(heads[0], key_padding_mask, attn_mask, batched)
        y, weights = self._attended(*heads, mask, need_weights)
        y = out(y.transpose(1, 2).flatten(2))
        y = (y if base.batch_first else y.transpose(0, 1)) if batched else y.squeeze(0)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return y, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [..., d]; from one product where all are made of the same."""
        base = self.unmerged_base if self.disabled else self.base_layer
        if query is key is value and base._qkv_same_embed_dim:
            return self._product(query, base.in_proj_weight, slice(None), None).chunk(3, dim=-1)
        d, weights = base.embed_dim, _weights(base)
        weights = weights[0].chunk(3) if len(weights) == 1 else weights
        return tuple(
            self._product(x, W, slice(i * d, (i + 1) * d), i)
            for i, (x, W) in enumerate(zip((query, key, value), weights, strict=True))
        )

    def _product(self, x: Tensor, W: Tensor, rows: slice, block: int | None) -> Tensor:
        """x Wᵀ + b + Σ s·drop(x) Aᵀ Bᵀ, with `rows` of b and B, and block `block` of the blocks."""
        bias = self.base_layer.in_proj_bias
        bias = None if bias is None else bias[rows]
        y = whole = F.linear(x, W, bias)
        for adapter in [] if self.merged or self.disabled else self.active_adapters:
            (A, B), s, g = self.factors(adapter), self.scaling[adapter], self.gain(adapter)
            z, B = self.dropped(adapter, x), B[rows]
            if block is not None and not self.unmerged_base._qkv_same_embed_dim:
                ranks, start = slice(block * len(A) // 3, (block + 1) * len(A) // 3), 0
                if block:
                    start = self.unmerged_base.embed_dim
                    start += self.unmerged_base.kdim * (block == 2)
                A, B = A[ranks, start : start + W.shape[1]], B[:, ranks]
            if g is not None:
                g = g[rows]
                y, B = y + (g - 1) * F.linear(z, W), g[:, None] * B
            y = (y + s * F.linear(F.linear(z.to(A.dtype), A), B)).to(whole.dtype)
        return y

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            x = x.unsqueeze(0)
        elif not self.base_layer.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.base_layer.num_heads, -1)).transpose(1, 2)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads see [batch, heads, length, d / heads], and with which weights."""
        base, p = self.base_layer, self.base_layer.dropout if self.training else 0.0
        if base.bias_k is not None:
            shape = (len(k), base.num_heads, 1, -1)
            k = torch.cat([k, base.bias_k.view(1, base.num_heads, 1, -1).expand(shape)], dim=2)
            v = torch.cat([v, base.bias_v.view(1, base.num_heads, 1, -1).expand(shape)], dim=2)
        if base.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # what was added is for all
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, p), None
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
        return weights @ v, weights


def _weights(base: nn.MultiheadAttention) -> list[Tensor]:
    if base._qkv_same_embed_dim:
        return [base.in_proj_weight]
    return [base.q_proj_weight, base.k_proj_weight, base.v_proj_weight]


def _mask(
    q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, batched: bool
) -> Tensor | None:
    """What is added to the scores [batch, heads, length, source], or None."""
    mask = None
    if attn_mask is not None:
        mask = _added(attn_mask, q.dtype)
        mask = mask.unflatten(0, q.shape[:2]) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is not None:
        keys = _added(key_padding_mask if batched else key_padding_mask[None], q.dtype)
        mask = keys[:, None, None] if mask is None else mask + keys[:, None, None]
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of bools, True where nothing is to be seen, as one of floats."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
