"""What a run trains, to files and back: adapters in PEFT's format, all else under its own name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import FileFormatError
from lowrank.io.adapter import adapter_writers, load_adapter
from lowrank.io.safetensors import load_safetensors, write_safetensors
from lowrank.nn.adapted import AdaptedLayer
from lowrank.surgery.targets import adapted_modules

TRAINED, BUFFERS = "trained.safetensors", "buffers.safetensors"


def trained_adapters(model: nn.Module) -> dict[str, set[int]]:
    """The adapters of which something is trained, in order of appearance, with the ids of all of
    their tensors: some methods freeze a part of theirs.
    """
    found: dict[str, set[int]] = {}
    trained = set()
    for layer in adapted_modules(model).values():
        for adapter in layer.config:
            own = isinstance(layer, AdaptedLayer)
            tensors = list(layer.tensors(adapter).values() if own else layer.trained(adapter))
            found.setdefault(adapter, set()).update(map(id, tensors))
            if any(p.requires_grad for p in tensors):
                trained.add(adapter)
    return {adapter: ids for adapter, ids in found.items() if adapter in trained}


def other_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained and of no adapter, by name."""
    of_adapters = set().union(*trained_adapters(model).values())
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in of_adapters
    }


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict has, by name: a forward in training may change them."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def shared_tensors(model: nn.Module) -> list[Tensor]:
    """What ranks that train together must begin with, and what training then changes."""
    adapters = set().union(*trained_adapters(model).values())
    trained = [p for p in model.parameters() if p.requires_grad or id(p) in adapters]
    return [*trained, *kept_buffers(model).values()]


def weight_writers(model: nn.Module) -> dict[str, Callable[[Path], None]]:
    """What writes each file of all that training has changed, as it is now."""
    writers = {}
    for adapter in trained_adapters(model):
        folder = "" if adapter == "default" else f"{adapter}/"
        for name, write in adapter_writers(model, adapter, copied=True).items():
            writers[folder + name] = write
    for name, tensors in ((TRAINED, other_trained(model)), (BUFFERS, kept_buffers(model))):
        if tensors:
            writers[name] = _writer({key: _copied(tensor) for key, tensor in tensors.items()})
    return writers


@torch.no_grad()
def load_weights(model: nn.Module, directory: Path) -> None:
    """Read what `weight_writers` wrote into a model of the same make.

    Raises FileFormatError, with the model as it was, if it holds other tensors.
    """
    wanted = ((TRAINED, other_trained(model)), (BUFFERS, kept_buffers(model)))
    read = []
    for name, places in wanted:
        found = load_safetensors(directory / name) if places else {}
        shapes, here = ({k: t.shape for k, t in of.items()} for of in (found, places))
        if shapes != here:
            raise FileFormatError(
                f"{directory / name}: expected {_shown(here)}; got {_shown(shapes)}"
            )
        read += [(places[key], tensor) for key, tensor in found.items()]
    for adapter in trained_adapters(model):
        load_adapter(model, directory / ("" if adapter == "default" else adapter), adapter)
    for place, tensor in read:
        place.copy_(tensor)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, tensors)


def _shown(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())[:5])
