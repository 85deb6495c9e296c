"""One layer of each kind that can have adapters, and what it must compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.kinds import kind_of


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and "view" not in str(func):
                shared = any(
                    isinstance(a, torch.Tensor) and a.data_ptr() == tensor.data_ptr() for a in args
                )
                self.numel = max(self.numel, 0 if shared else tensor.numel())
        return result


@dataclass
class Kind:
    """`make` a base layer and an `x` for it; `weight` is made of a matrix [N, K]."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    weight: Callable[[Tensor], Tensor] = lambda matrix: matrix
    plain: Callable[[nn.Module], nn.Module] = lambda base: base  # what computes with such a weight

    def wrap(self, config: lowrank.LoRAConfig, base: nn.Module | None = None) -> AdaptedLayer:
        base = self.make() if base is None else base
        return kind_of(base).wrap(base, config)

    def formula(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        """The layer with the matrix W + Σ s·B A in its weight's place."""
        matrix = layer.matrix(torch.float64)
        for name in layer.active_adapters:
            A, B = layer.factors(name)
            matrix = matrix + layer.scaling[name] * B.double() @ A.double()
        base = self.plain(layer.unmerged_base)
        state = {name: p.double() for name, p in base.named_parameters() if name != "weight"}
        x = x.double() if x.is_floating_point() else x
        return functional_call(base, {"weight": self.weight(matrix), **state}, (x,))


def ids(words: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(words, (3, 5))


def conv(make: type[nn.Module], C: int, N: int, kernel, size, **options) -> Kind:
    shape = (C, *kernel)
    plain = nn.Identity
    if options.get("groups", 1) > 1:

        def plain(base):
            twin = make(C, N, kernel, **{**options, "groups": 1})
            twin.bias = base.bias
            return twin
    else:

        def plain(base):
            return base

    return Kind(
        lambda: make(C, N, kernel, **options),
        lambda: torch.randn(2, C, *size),
        lambda matrix: matrix.unflatten(1, shape),
        plain,
    )


def table(matrix: Tensor) -> Tensor:
    return matrix.T


KINDS = {
    "linear": Kind(lambda: nn.Linear(13, 7), lambda: torch.randn(2, 3, 13)),
    "gpt2_conv1d": Kind(lambda: Conv1D(7, 13), lambda: torch.randn(2, 3, 13), table),
    "embedding": Kind(lambda: nn.Embedding(11, 6), ids(11), table),
    "scaled_embedding": Kind(
        lambda: Gemma3TextScaledWordEmbedding(11, 6, None, embed_scale=2.5), ids(11), table
    ),
    "conv1d": conv(nn.Conv1d, 4, 6, (3,), (9,), stride=2, padding=1),
    "conv1d_groups": conv(nn.Conv1d, 4, 6, (3,), (9,), groups=2, bias=False),
    "conv2d": conv(nn.Conv2d, 3, 5, (3, 3), (7, 8)),
    "conv2d_dilated": conv(nn.Conv2d, 3, 4, (3, 3), (8, 9), dilation=2, padding=2),
    "conv2d_same": conv(nn.Conv2d, 3, 4, (3, 3), (8, 9), dilation=(2, 1), padding="same"),
    "conv2d_valid": conv(nn.Conv2d, 3, 4, (2, 3), (8, 9), padding="valid", padding_mode="reflect"),
    "conv2d_depthwise": conv(nn.Conv2d, 4, 4, (3, 3), (6, 6), groups=4, padding=1),
    "conv2d_reflect": conv(
        nn.Conv2d, 3, 4, (3, 5), (8, 9), padding="same", padding_mode="reflect", dilation=(1, 2)
    ),
    "conv2d_circular": conv(
        nn.Conv2d, 4, 6, (3, 2), (8, 9), padding=(2, 1), padding_mode="circular", groups=2
    ),
    "conv3d": conv(nn.Conv3d, 2, 3, (2, 3, 2), (4, 5, 6), stride=(1, 2, 1), padding=(0, 1, 1)),
    "conv3d_replicate": conv(
        nn.Conv3d, 2, 4, (2, 3, 2), (4, 5, 6), padding=(2, 1, 0), padding_mode="replicate", groups=2
    ),
}
