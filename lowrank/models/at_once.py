"""The blocks of a decoder for the newest position of each text, in one call of the kernel.

A token of a small model is some hundred products of 20 us each; asked for one by one from Python,
what surrounds them takes three times as long as they do. What the call computes is what the modules
say, from their own parts: it is made of what `Block`, `Attention` and `MLP` hold, and made again
when any of it changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor, nn

from lowrank.models.attention import Attention
from lowrank.models.blocks import MLP, Block, SandwichBlock
from lowrank.models.cache import KVCache
from lowrank.models.layers import ACTIVATIONS, RMSNorm, RMSNormPlusOne
from lowrank.models.plan import Plan
from lowrank.nn.watched import NotTheKernels, Watched
from lowrank.ops import native, whole_blocks
from lowrank.ops.few_rows import MOST_ROWS, has_to_be_seen


class AtOnce:
    """Runs blocks at once where they are the kernel's: gated MLPs, RMS norms, products in codes.

    A copy, pickled or not, has asked nothing yet.
    """

    def __init__(self) -> None:
        self._found: _Found | None = None

    def __reduce__(self) -> tuple:
        return AtOnce, ()

    def run(
        self, blocks: nn.ModuleList, h: Tensor, plans: Sequence[Plan], cache: KVCache | None
    ) -> Tensor | None:
        """What the last block gives of h [B, 1, H]; None, and nothing done, where they are not."""
        if cache is None or h.shape[1] != 1 or any(plan.at_once is None for plan in plans):
            return None
        found = self._found
        if found is None or not found.is_of(blocks):
            found = self._found = _Found(blocks)
        return None if found.blocks is None else found.run(h, plans, cache)


class _Found(Watched):
    """What is known of blocks: their structs, or None where one of them is not the kernel's."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self._all = dict(blocks._modules)
        self.blocks: ctypes.Array[whole_blocks.Block] | None = None
        try:
            self._children(blocks)
            made = [self._block(block) for block in blocks]
        except NotTheKernels:
            return
        self._kinds = [block.kind for block in blocks]
        self.blocks = (whole_blocks.Block * len(made))(*made)

    def is_of(self, blocks: nn.ModuleList) -> bool:
        return len(blocks) == len(self._all) and self.is_unchanged()

    def run(self, h: Tensor, plans: Sequence[Plan], cache: KVCache) -> Tensor | None:
        B, _, H = h.shape
        if H != self._H or not 0 < B <= MOST_ROWS or not self.takes(h):
            return None
        x = h.clone()  # whoever hooked the embedding may have kept h
        newest = [plans[kind].at_once for kind in self._kinds]
        done = whole_blocks.run(self.blocks, newest, cache.keys, cache.values, x)
        return x if done else None

    def _block(self, block: nn.Module) -> whole_blocks.Block:
        block = self._of(block, Block, SandwichBlock)
        attention, mlp = self._of(block.attention, Attention), self._of(block.mlp, MLP)
        activation = whole_blocks.ACTIVATIONS.get(ACTIVATIONS[mlp.activation])
        inner = [mlp.gate_up] if mlp.gate is None else [mlp.gate, mlp.up]
        heads = [attention.q, attention.k, attention.v]
        if attention.qkv is not None:
            heads = [attention.qkv]
        if activation is None or attention.by_head:
            raise NotTheKernels
        for module, name in ((attention, "scale"), (attention, "softcap"), (mlp, "activation")):
            self.see(vars(module), name, getattr(module, name))
        out_norms = None, None
        if type(block) is SandwichBlock:
            out_norms = block.attention_out_norm, block.mlp_out_norm
        H, D = block.attention_norm.weight.numel(), attention.head_dim
        self._H, (Q, _, _) = H, attention.widths
        norms = [
            self._norm(norm, size)
            for norm, size in (
                (block.attention_norm, H),
                (attention.q_norm, D),
                (attention.k_norm, D),
                (out_norms[0], H),
                (block.mlp_norm, H),
                (out_norms[1], H),
            )
        ]
        to_heads, to_inner = self._products(heads, H), self._products(inner, H)
        I = to_inner[0].N // (1 if len(inner) == 2 else 2)  # noqa: E741
        (out,), (down,) = self._products([attention.out], Q), self._products([mlp.down], I)
        scale = D**-0.5 if attention.scale is None else attention.scale
        return whole_blocks.Block(
            *norms, tuple(to_heads), out, tuple(to_inner), down, len(heads), len(inner), Q // D,
            scale, attention.softcap or 0.0, activation,
        )  # fmt: skip

    def _of(self, module: nn.Module, *kinds: type) -> nn.Module:
        """The module, of one of these kinds."""
        if type(module) not in kinds:
            raise NotTheKernels
        self._children(module)
        return module

    def _children(self, module: nn.Module) -> None:
        self.watch(module)
        for name, child in module._modules.items():
            self.see(module._modules, name, child)

    def _norm(self, norm: nn.Module | None, size: int) -> whole_blocks.Norm:
        if norm is None:
            return whole_blocks.Norm()
        if type(norm) not in (RMSNorm, RMSNormPlusOne):
            raise NotTheKernels
        self.watch(norm)
        self.see(vars(norm), "eps", norm.eps)
        weight = self.hold(norm._parameters, "weight")
        if weight is None or weight.shape != (size,) or weight.dtype not in native.DTYPES:
            raise NotTheKernels
        if has_to_be_seen(weight):
            raise NotTheKernels
        return whole_blocks.Norm(
            weight.data_ptr(), native.DTYPES[weight.dtype], norm.plus_one, norm.eps
        )

    def _products(self, layers: list[nn.Module], K: int) -> list[native.Product]:
        found = [self.product(layer) for layer in layers]
        if any(layer.K != K for _, layer in found):
            raise NotTheKernels
        return [product for product, _ in found]
