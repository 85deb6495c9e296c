"""A module that adapters train whole: PEFT's modules_to_save."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_linear import QuantLinear


class SavedModule(AdaptedModule):
    """y = copy(x) of the active adapter's own copy, trained from the base on; else y = base(x).

    `modules_to_save[adapter]` is that copy, a dense one where the base is quantized.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.modules_to_save = nn.ModuleDict()

    @property
    def speaking(self) -> nn.Module:
        """The module that answers now."""
        if self.speaker is not None:
            return self.modules_to_save[self.speaker]
        return self.unmerged_base if self.disabled else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.speaking(*args, **kwargs)

    def add_adapter(self, adapter: str, config: LoRAConfig) -> None:
        """Add an inactive adapter, equal to the base."""
        self.check_new(adapter)
        self.modules_to_save[adapter] = dense_copy(self.base_layer).train(self.training)
        self.config[adapter] = config

    def to_file(self, adapter: str) -> dict[str, Tensor]:
        state = self.modules_to_save[adapter].state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def trained(self, adapter: str) -> list[nn.Parameter]:
        return list(self.modules_to_save[adapter].parameters())

    def replaced(self, adapter: str) -> nn.Module:
        """The module of the copy's very parameters: what was tied to them stays so."""
        new = self.modules_to_save[adapter]
        return copy.deepcopy(new, {id(tensor): tensor for tensor in new.parameters()})

    def forget(self, adapter: str) -> None:
        del self.modules_to_save[adapter]

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and "modules_to_save" in self.__dict__.get("_modules", ()):
            return getattr(self.speaking, name)
        return super().__getattr__(name)


@torch.no_grad()
def dense_copy(module: nn.Module) -> nn.Module:
    """A frozen copy of the module whose quantized layers are plain ones."""
    new = copy.deepcopy(module).requires_grad_(False)
    if isinstance(new, QuantLinear | QuantEmbedding):
        return _dense(new)
    for parent in list(new.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, QuantLinear | QuantEmbedding):
                setattr(parent, name, _dense(child))
    return new


def dense_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the state dict of `dense_copy(module)`."""
    if isinstance(module, QuantLinear | QuantEmbedding):
        bias = getattr(module, "bias", None)
        own = {"weight": module.matrix_shape}
        return own if bias is None else own | {"bias": tuple(bias.shape)}
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items() if isinstance(t, Tensor)}
    for name, child in module.named_modules():
        if isinstance(child, QuantLinear | QuantEmbedding):
            shapes = {n: s for n, s in shapes.items() if not n.startswith(f"{name}.")}
            shapes |= {f"{name}.{n}": s for n, s in dense_shapes(child).items()}
    return shapes


def _dense(module: QuantLinear | QuantEmbedding) -> nn.Module:
    weight = module.dequantize(module.storage.dtype)
    if isinstance(module, QuantEmbedding):
        return nn.Embedding.from_pretrained(weight, padding_idx=module.padding_idx)
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias
    return linear
