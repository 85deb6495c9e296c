"""The tensors of an adapter by their keys in PEFT's file: what they are, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import FileFormatError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.kinds import kind_of
from lowrank.nn.lora_experts import DenseExperts, LoRAExperts
from lowrank.nn.quant_experts import QuantExperts
from lowrank.nn.saved_module import dense_shapes
from lowrank.surgery.replaced import Replaced
from lowrank.surgery.targets import adapted_modules, named_bases, walk

from .safetensors import load_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

Shapes = dict[str, tuple[int, ...]]


def tensors_of(model: nn.Module, config: LoRAConfig, adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors by key, without the prefix."""
    modules = {n: m for n, m in adapted_modules(model).items() if adapter in m.config}
    targets = [name for name, module in modules.items() if isinstance(module, AdaptedLayer)]
    tensors = {
        f"{place}{key}": tensor
        for name, place in _places(modules).items()
        for key, tensor in modules[name].to_file(adapter).items()
    }
    return {**tensors, **biases(model, targets, config)}


def shapes_of(
    model: nn.Module, config: LoRAConfig, targets: Iterable[str], replaced: Replaced
) -> Shapes:
    """The keys and shapes that an adapter of this config has in a model, there or not yet."""
    modules, shapes = {**named_bases(model), **adapted_modules(model)}, {}
    for name, place in _places({name: modules[name] for name in targets}).items():
        module = modules[name]
        base = module.unmerged_base if isinstance(module, AdaptedLayer) else module
        kind = type(module) if isinstance(module, AdaptedLayer) else kind_of(module)
        for key, shape in kind.file_shapes(base, config, name).items():
            shapes[f"{place}{key}"] = shape
    for name in (*replaced.saved, *replaced.tied_saved):
        for key, shape in dense_shapes(_base(modules[name])).items():
            shapes[f"{name}.{key}"] = shape
    for name, tokens in replaced.rows.items():
        rows = len(tokens), _base(modules[name]).embedding_dim
        shapes[f"{name}.token_adapter.trainable_tokens_delta"] = rows
    return shapes | {n: tuple(p.shape) for n, p in biases(model, targets, config).items()}


def biases(model: nn.Module, targets: Iterable[str], config: LoRAConfig) -> dict[str, nn.Parameter]:
    """The biases an adapter trains, by the names they have once the targets are wrapped."""
    found = {}
    if config.bias == "none":
        return found
    targets = set(targets)
    for name, module in walk(model):
        bias = module._parameters.get("bias")
        if isinstance(module, AdaptedLayer):
            bias = module.bias
        if isinstance(bias, nn.Parameter) and (name in targets or config.bias == "all"):
            wrapped = name in targets or isinstance(module, AdaptedLayer)
            found[f"{name}.base_layer.bias" if wrapped else f"{name}.bias"] = bias
    return found


def base_weights(model: nn.Module, keys: Iterable[str]) -> dict[str, nn.Parameter]:
    """Of the keys of a file, those of whole embeddings and heads of the base, and where they go.

    PEFT writes them beside an adapter on an embedding, and once the vocabulary was resized.
    """
    modules, found = dict(walk(model)), {}
    for key in keys:
        module = modules.get(key.removesuffix(".weight").removesuffix(".base_layer"))
        if module is None or not key.endswith(".weight"):
            continue
        wrapped = isinstance(module, AdaptedLayer | AdaptedModule)
        base = module.unmerged_base if wrapped else module
        weight = base._parameters.get("weight")
        if weight is not None and (isinstance(base, nn.Embedding) or module is _head(model)):
            found[key] = weight
    return found


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's directory by key, without the prefix. Raises FileFormatError."""
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise FileFormatError(
            f"{directory}: adapter_model.bin is a pickle, which can run code; where you trust it, "
            "load it with PEFT and save_pretrained(..., safe_serialization=True) again"
        )
    tensors = load_safetensors(path)
    for name in tensors:
        if not name.startswith(PREFIX):
            raise FileFormatError(f"{path}: expected keys that start with {PREFIX}; got {name}")
    return {name[len(PREFIX) :]: tensor for name, tensor in tensors.items()}


def check_fits(tensors: Mapping[str, Tensor], expected: Shapes, directory: Path) -> None:
    """Raises FileFormatError unless the tensors are those expected, finite and in floats."""
    for what, keys in (
        ("the file lacks", expected.keys() - tensors.keys()),
        ("the model has no place for", tensors.keys() - expected.keys()),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise FileFormatError(f"{directory}: made for another base model: {what} {some}{more}")
    wrong: dict[str, None] = {}  # a line for all the blocks that differ in their number alone
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            alike = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            wrong[f"{alike} is {list(tensors[name].shape)}, the model takes {list(shape)}"] = None
    if wrong:
        raise FileFormatError(f"{directory}: made for another base model: {'; '.join(wrong)}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and expected[name]:  # a count, as norms have, is none
            raise FileFormatError(
                f"{directory}: {name}: expected floating-point weights; got {tensor.dtype}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FileFormatError(
                f"{directory}: {name}: expected finite values; got NaN or inf: a run that diverged?"
            )


def fill(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapter with the tensors of a file, which fit."""
    modules = {n: m for n, m in adapted_modules(model).items() if adapter in m.config}
    for name, place in _places(modules).items():
        keys = modules[name].to_file(adapter)
        modules[name].from_file(adapter, {key: tensors[f"{place}{key}"] for key in keys})


def _places(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """What precedes the keys of each module in a file.

    That is its name; but PEFT wraps the module that parameters are in once for each of them, so the
    last has the module's name, and the one before it is within that one's `base_layer`.
    """
    places = {name: f"{name}." for name in modules}
    weights = [
        n for n, m in modules.items() if isinstance(m, DenseExperts | QuantExperts | LoRAExperts)
    ]
    wraps: dict[str, int] = {}
    for name in reversed(weights):
        parent = name.rpartition(".")[0]
        before = wraps.setdefault(parent, 0)
        places[name] = f"{parent}." * bool(parent) + "base_layer." * before
        wraps[parent] += 1
    return places


def _base(module: nn.Module) -> nn.Module:
    return module.unmerged_base if isinstance(module, AdaptedModule) else module


def _head(model: nn.Module) -> nn.Module | None:
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings()
    return getattr(model, "lm_head", None)
