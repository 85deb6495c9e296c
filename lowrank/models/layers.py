"""The decoder's norms and activations, by operators that keep only what their gradients need.

Composed from plain tensor operations, norms and gates keep every intermediate product alive and
walk memory twice as often as needed; beside a frozen, quantized matmul that is a visible part of a
step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank import ops
from lowrank.ops import few_rows, reference

_FEW = 1 << 15  # elements; up to there asking for an operator takes longer than two calls

# What `ops.gated` calls the activations of config.json. Three names are GELU by the hyperbolic
# tangent, written down by three people.   Hendrycks & Gimpel, arXiv:1606.08415.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
}


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension, x [..., H].

    Computed in float32; y has x's dtype.   Zhang & Sennrich, arXiv:1910.07467, eq. 4.
    """

    plus_one = False

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = few_rows.rms_norm(x, self.weight, self.eps, self.plus_one)
            if y is not None:
                return y
        return ops.rms_norm(x, self.weight, self.eps, self.plus_one)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class RMSNormPlusOne(RMSNorm):
    """y = x / sqrt(mean(x²) + eps) * (1 + weight): Gemma's."""

    plus_one = True

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)


def activate(activation: str, x: Tensor) -> Tensor:
    """The activation of that name, one of ACTIVATIONS."""
    return reference.ACTIVATIONS[ACTIVATIONS[activation]][0](x)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up.   Shazeer, arXiv:2002.05202, eq. 6."""
    few = gate.dtype == torch.float32 and gate.numel() < _FEW
    # not without gradients alone: what is computed again for one has to have the same bits
    if few and not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return activate(activation, gate).mul_(up)
    return ops.gated(gate, up, ACTIVATIONS[activation])
