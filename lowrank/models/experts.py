"""A mixture of experts in place of an MLP: each token goes to the few that its router chooses.

Tokens are sorted by expert, so that every expert's are rows side by side: one grouped product does
them all, whether the weights [E, N, K] are dense, quantized, or have adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank import ops
from lowrank.models.layers import ACTIVATIONS, gated
from lowrank.models.mixture_config import MixtureConfig
from lowrank.nn.grouped import grouped_mm


class Router(nn.Module):
    """Which experts a token goes to, and the share each has in the sum: the largest probabilities.

    x [T, H] -> shares [T, k] and experts [T, k], largest first, and the probabilities [T, E] of
    all; floats are float32. With `normalised` the shares of a token add up to 1.
    Shazeer et al., arXiv:1701.06538, §2.1.
    """

    def __init__(self, hidden_size: int, config: MixtureConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.top_k, self.normalised = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        shares, experts = probabilities.topk(self.top_k, dim=-1)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares, experts, probabilities

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, top_k={self.top_k}, normalised={self.normalised}"


class Experts(nn.Module):
    """E gated MLPs in two parameters, gate and up of an expert above one another.

    x [M, H] are sorted by expert: rows offs[e - 1] to offs[e] are expert e's. Each comes out
    multiplied by its share.
    """

    def __init__(self, hidden_size: int, activation: str, config: MixtureConfig) -> None:
        super().__init__()
        E, H, I = config.num_experts, hidden_size, config.moe_intermediate_size  # noqa: E741
        self.activation = activation
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))

    def activated(self, x: Tensor, shares: Tensor, offs: Tensor) -> Tensor:
        """What the last projection projects, [M, I]."""
        gate_up = grouped_mm(x, self.gate_up_proj.transpose(-2, -1), offs=offs)
        return _SharedGated.apply(self.activation, gate_up, shares)

    def down(self, x: Tensor, offs: Tensor) -> Tensor:
        """The last projection, x [M, I] -> [M, H]."""
        return grouped_mm(x, self.down_proj.transpose(-2, -1), offs=offs)


class Mixture(nn.Module):
    """Σ over a token's experts e of share_e · MLP_e(x), x [..., H]; named as in transformers.

    Jiang et al., arXiv:2401.04088, eq. 1.
    """

    def __init__(self, hidden_size: int, activation: str, config: MixtureConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, activation, config)

    def forward(self, x: Tensor) -> Tensor:
        way, z = self._activated(x)
        return self._collected(way, z)

    def parts(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What makes of x what the last projection projects, and what makes y of that."""
        way: _Way

        def activated(x: Tensor) -> Tensor:
            nonlocal way
            way, z = self._activated(x)
            return z

        return activated, lambda z: self._collected(way, z)

    def _activated(self, x: Tensor) -> tuple[_Way, Tensor]:
        rows = x.flatten(0, -2)  # [T, H]
        shares, experts, _ = self.gate(rows)
        k, E = experts.shape[-1], len(self.gate.weight)
        sorted_experts, order = experts.flatten().sort(stable=True)  # [T k]
        offs = torch.searchsorted(sorted_experts, torch.arange(E, device=x.device), right=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)
        way = _Way(order // k, place, offs.cpu(), x.shape)
        y = _Spread.apply(rows, way.of, place)
        return way, self.experts.activated(y, shares.flatten()[order], way.offs)

    def _collected(self, way: _Way, z: Tensor) -> Tensor:
        T = way.shape[:-1].numel()
        return _Collect.apply(self.experts.down(z, way.offs), way.of, way.place, T).view(way.shape)


class _Way(NamedTuple):
    """How tokens went: the token of each row, the row of each token and choice, ends of experts."""

    of: Tensor  # [T k]
    place: Tensor  # [T k], the inverse of the order in which rows were sorted
    offs: Tensor  # [E], on the CPU
    shape: torch.Size  # of x


Routed = list[tuple[Tensor, Tensor, Tensor]]  # what each router of a forward gave


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[Routed]:
    """Within it, what the routers give is gathered in the list, in order of layers."""
    found: Routed = []
    routers = (module for module in model.modules() if isinstance(module, Router))
    hooks = [
        router.register_forward_hook(lambda _module, _x, given: found.append(given))
        for router in routers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def imbalance(routed: Routed, counts: Tensor, copies: int = 1) -> Tensor:
    """E Σ_e f_e P_e, which is least, k, where all E experts are chosen alike: float32 [copies].

    f_e is the number of times e is chosen for a token, P_e its mean probability, both over the
    tokens of all layers for which counts [T] is 1 and not 0; one for each of `copies` of a batch.
    Fedus et al., arXiv:2101.03961, eq. 4 to 6.
    """
    chosen, probable = [], []
    for _, experts, probabilities in routed:
        ones = torch.zeros_like(probabilities).scatter_(1, experts, 1.0)
        for sums, each in ((chosen, ones), (probable, probabilities)):
            sums.append((each * counts[:, None]).unflatten(0, (copies, -1)).sum(1))
    tokens = len(routed) * counts.view(copies, -1).sum(1, keepdim=True)
    f, P = (torch.stack(sums).sum(0) / tokens for sums in (chosen, probable))  # [copies, E]
    return f.shape[1] * (f * P).sum(1)


class _Spread(torch.autograd.Function):
    """Row i of the result is row of[i] of x; back, a sum in a fixed order, which index_add's is not
    on a GPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, of: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.T = len(x)
        return x.index_select(0, of)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _sum(dy, place, ctx.T), None, None


class _Collect(torch.autograd.Function):
    """The transpose of `_Spread`: y [T k, H] -> the sum of each token's k rows, [T, H]."""

    @staticmethod
    def forward(ctx, y: Tensor, of: Tensor, place: Tensor, T: int) -> Tensor:
        ctx.save_for_backward(of)
        return _sum(y, place, T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (of,) = ctx.saved_tensors
        return dy.index_select(0, of), None, None, None


def _sum(y: Tensor, place: Tensor, T: int) -> Tensor:
    return y.index_select(0, place).view(T, -1, y.shape[-1]).sum(1)


class _SharedGated(torch.autograd.Function):
    """act(gate) * up * share, gate_up [M, 2 I] and shares [M], keeping only these two.

    A share counts before the last product as after it, where all of that would have to be kept.
    """

    @staticmethod
    def forward(ctx, activation: str, gate_up: Tensor, shares: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate_up, shares)
        gate, up = gate_up.chunk(2, dim=-1)
        return gated(activation, gate, up).mul_(shares[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, shares = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        name = ACTIVATIONS[ctx.activation]
        dshares = ops.gated(gate, up, name).mul_(dy).sum(-1, dtype=shares.dtype)
        dy = dy * shares[:, None].to(dy.dtype)
        return None, torch.cat(ops.gated_backward(dy, gate, up, name), dim=-1), dshares
