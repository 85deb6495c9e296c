"""A decoder's blocks: attention and MLP, and the three ways that families put norms around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.models.attention import Attention, take
from lowrank.models.config import DecoderConfig
from lowrank.models.experts import Mixture
from lowrank.models.layers import activate, gated
from lowrank.models.parts import Part, make_norm, part
from lowrank.models.plan import Plan
from lowrank.models.recompute import recompute
from lowrank.nn.fusible import is_patched
from lowrank.nn.together import Together


class MLP(Part):
    """down(act(gate(x)) * up(x)), x [..., H]; or down(act(up(x))) where there is no gate."""

    gate, up, gate_up, down = part("gate"), part("up"), part("gate_up"), part("down")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        H, I, bias = config.hidden_size, config.intermediate_size, config.mlp_bias  # noqa: E741
        self.activation = config.hidden_act
        self.to_inner, self.to_out = Together(), Together()
        if config.family.mlp == "joined":
            self.have(gate_up=nn.Linear(H, 2 * I, bias=bias))
        elif config.family.mlp == "gated":
            self.have(gate=nn.Linear(H, I, bias=bias), up=nn.Linear(H, I, bias=bias))
        else:
            self.have(up=nn.Linear(H, I, bias=bias))
        self.have(down=nn.Linear(I, H, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.projected(self.activated(x))

    def parts(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What makes of x what the last projection projects, and that projection."""
        return self.activated, self.projected

    def projected(self, activated: Tensor) -> Tensor:
        """What the last projection makes of them."""
        return self.to_out.products(activated, self.down)[0]

    def activated(self, x: Tensor) -> Tensor:
        """What the last projection projects, [..., I]."""
        if self.gate is not None:
            return gated(self.activation, *self.to_inner.products(x, self.gate, self.up))
        if self.gate_up is not None:
            (both,) = self.to_inner.products(x, self.gate_up)
            return gated(self.activation, *both.chunk(2, dim=-1))
        return activate(self.activation, *self.to_inner.products(x, self.up))


class Block(Part):
    """x + attention(norm(x)), then x + mlp(norm(x)), x [B, S, H]; or only `rows` [b, t] of it."""

    attention, mlp = part("attention"), part("mlp")
    attention_norm, mlp_norm = part("attention_norm"), part("mlp_norm")

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config)
        self.kind = config.kind_of(layer)
        self.have(attention=Attention(config, layer), mlp=_make_mlp(config, layer))
        self.have(attention_norm=make_norm(config, config.hidden_size))
        if "mlp_norm" in self.names:
            self.have(mlp_norm=make_norm(config, config.hidden_size))

    def forward(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        x = take(x, rows) + self.attention(self.attention_norm(x), plan, rows)
        return x + self.mlp(self.mlp_norm(x))

    def checkpointed(self, x: Tensor, plan: Plan, rows: Tensor | None, selective: bool) -> Tensor:
        """The same, keeping x alone for the backward; `selective`: also the sum in the middle.

        What makes x, or that sum, of it is computed again, but for its last projection.
        """
        kinds = type(self) in _BLOCKS.values(), type(self.attention) is Attention
        known = all(kinds) and type(self.mlp) in (MLP, Mixture)
        own = [self, self.attention, self.mlp]
        if type(self.mlp) is Mixture:
            own.append(self.mlp.gate)
        patched = any(map(is_patched, own))
        if torch.compiler.is_compiling() or not known or patched:
            # calling one of them may be anything else than its parts
            return checkpoint(self, x, plan, rows, use_reentrant=False)
        return self.recomputed(x, plan, rows, selective)

    def recomputed(self, x: Tensor, plan: Plan, rows: Tensor | None, selective: bool) -> Tensor:
        """`checkpointed`, where each part is what its class says."""
        to_last, last = self.mlp.parts()

        def attended(x: Tensor) -> tuple[Tensor]:
            return (self.attention.attended(self.attention_norm(x), plan, rows),)

        def activated(x: Tensor) -> tuple[Tensor]:
            return (to_last(self.mlp_norm(x)),)

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            x = take(x, rows) + self.attention.projected(*attended(x))
            return x, *activated(x)

        if not selective:
            return torch.add(*recompute(both, [self], [last], x))
        within = [self.attention_norm, self.attention]
        x = take(x, rows) + recompute(attended, within, [self.attention.projected], x)[0]
        return x + recompute(activated, [self.mlp_norm, self.mlp], [last], x)[0]


class SandwichBlock(Block):
    """Norms also behind: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): Gemma's."""

    attention_out_norm, mlp_out_norm = part("attention_out_norm"), part("mlp_out_norm")

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.have(attention_out_norm=make_norm(config, config.hidden_size))
        self.have(mlp_out_norm=make_norm(config, config.hidden_size))

    def forward(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        x = take(x, rows) + self._attention(x, plan, rows)
        return x + self._mlp(x)

    def recomputed(self, x: Tensor, plan: Plan, rows: Tensor | None, selective: bool) -> Tensor:
        # the norms behind need what the projections give: these are computed again, too
        if not selective:
            return recompute(
                lambda x: (SandwichBlock.forward(self, x, plan, rows),), [self], [], x
            )[0]
        within = [self.attention_norm, self.attention, self.attention_out_norm]
        x = take(x, rows) + recompute(lambda x: (self._attention(x, plan, rows),), within, [], x)[0]
        within = [self.mlp_norm, self.mlp, self.mlp_out_norm]
        return x + recompute(lambda x: (self._mlp(x),), within, [], x)[0]

    def _attention(self, x: Tensor, plan: Plan, rows: Tensor | None) -> Tensor:
        return self.attention_out_norm(self.attention(self.attention_norm(x), plan, rows))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out_norm(self.mlp(self.mlp_norm(x)))


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(norm(x)), by two norms or by one.   GPT-J, GPT-NeoX, Phi."""

    def forward(self, x: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
        normed = self.attention_norm(x)
        attention = self.attention(normed, plan, rows)
        return take(x, rows) + attention + self.mlp(self._to_mlp(x, normed, rows))

    def recomputed(self, x: Tensor, plan: Plan, rows: Tensor | None, selective: bool) -> Tensor:
        to_last, last = self.mlp.parts()

        def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            normed = self.attention_norm(x)
            attended = self.attention.attended(normed, plan, rows)
            return take(x, rows), attended, to_last(self._to_mlp(x, normed, rows))

        # there is no sum in the middle; dropout draws for `out` after it did for the MLP
        x, attention, mlp = recompute(both, [self], [self.attention.projected, last], x)
        return x + attention + mlp

    def _to_mlp(self, x: Tensor, normed: Tensor, rows: Tensor | None) -> Tensor:
        return take(normed, rows) if self.mlp_norm is None else self.mlp_norm(take(x, rows))


def _make_mlp(config: DecoderConfig, layer: int) -> nn.Module:
    mixture = config.mixture
    if mixture is None or not mixture.is_in(layer):
        return MLP(config)
    return Mixture(config.hidden_size, config.hidden_act, mixture)


def make_block(config: DecoderConfig, layer: int) -> Block:
    """The block of a layer, of the family's kind."""
    kind = config.family.block
    if kind == "parallel" and not config.use_parallel_residual:
        kind = "sequential"
    return _BLOCKS[kind](config, layer)


_BLOCKS = {"sequential": Block, "sandwich": SandwichBlock, "parallel": ParallelBlock}
