"""A mixture of experts in place of an MLP: each token goes to the few that its router chooses.

Tokens are sorted by expert, so that every expert's are rows side by side: one grouped product does
them all, whether the weights [E, N, K] are dense, quantized, or have adapters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.nn.grouped import grouped_mm


class Router(nn.Module):
    """Which experts a token goes to, and the share each has in the sum: the largest probabilities.

    x [T, H] -> shares float32 [T, k] and experts [T, k], largest first. With `normalised` the
    shares of a token add up to 1.   Shazeer et al., arXiv:1701.06538, §2.1.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k, self.normalised = top_k, normalised

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, experts = self.probabilities(x).topk(self.top_k, dim=-1)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares, experts

    def probabilities(self, x: Tensor) -> Tensor:
        """Of every expert, float32 [T, E]."""
        return F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, top_k={self.top_k}, normalised={self.normalised}"


class Experts(nn.Module):
    """E gated MLPs in two parameters, gate and up of an expert above one another.

    x [M, H] sorted by expert -> [M, H]; rows offs[e - 1] to offs[e] are expert e's, and each comes
    out multiplied by its share.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        E, H, I = num_experts, hidden_size, intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))

    def forward(self, x: Tensor, shares: Tensor, offs: Tensor) -> Tensor:
        gate_up = grouped_mm(x, self.gate_up_proj.transpose(-2, -1), offs=offs)
        y = _SharedSwiGLU.apply(gate_up, shares)
        return grouped_mm(y, self.down_proj.transpose(-2, -1), offs=offs)


class Mixture(nn.Module):
    """Σ over a token's experts e of share_e · MLP_e(x), x [..., H]; named as in transformers.

    Jiang et al., arXiv:2401.04088, eq. 1.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        normalised: bool,
    ) -> None:
        super().__init__()
        self.gate = Router(hidden_size, num_experts, top_k, normalised)
        self.experts = Experts(hidden_size, intermediate_size, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # [T, H]
        shares, experts = self.gate(rows)
        k, E = experts.shape[-1], len(self.gate.weight)
        sorted_experts, order = experts.flatten().sort(stable=True)  # [T k]
        offs = torch.searchsorted(sorted_experts, torch.arange(E, device=x.device), right=True)
        place = torch.empty_like(order)  # where row i of [T k] went: the inverse of `order`
        place[order] = torch.arange(len(order), device=x.device)
        of = order // k  # the token of each row
        y = self.experts(_Spread.apply(rows, of, place), shares.flatten()[order], offs.cpu())
        return _Collect.apply(y, of, place, len(rows)).view(x.shape)


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


class _SharedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * share, gate_up [M, 2 I] and shares [M], keeping only these two.

    A share counts before the last product as after it, where all of that would have to be kept.
    """

    @staticmethod
    def forward(ctx, gate_up: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, shares)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(shares[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, shares = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        dshares = (silu * up).mul_(dy).sum(-1, dtype=shares.dtype)
        dy = dy * shares[:, None].to(dy.dtype)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return torch.cat([dgate, silu.mul_(dy)], dim=-1), dshares
