"""Models with quantized layers as files: their state dict as it is, in one safetensors or shards.

A quantized module of ours describes itself in its `_extra_state`, so nothing but the tensors is
needed to read it. Layers of bitsandbytes are told by the names of their tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import FileFormatError, LowrankError
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_linear import QuantLinear, is_conv1d
from lowrank.nn.quant_weight import QuantWeight
from lowrank.surgery.inject import replace_modules
from lowrank.surgery.targets import check_model

from .names import check_names, check_shapes
from .shards import Shards, write_shards

LOWRANK = "lowrank"
BITSANDBYTES = {"4bit": "bitsandbytes 4-bit", "8bit": "bitsandbytes 8-bit"}
_DESCRIPTION = "_extra_state"
# the name that only a quantized module has among its tensors -> its format
_MARKS = {
    _DESCRIPTION: LOWRANK,
    "weight.absmax": BITSANDBYTES["4bit"],
    "SCB": BITSANDBYTES["8bit"],
}


def save_quantized(
    model: nn.Module, directory: str | Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a model's state dict as it is, codes and all, for `load_quantized`: all or nothing.

    A tensor that has several names, a tied one, is stored under the first. Above `max_shard_bytes`
    there are shards and an index. Raises ConfigError if the directory already holds weights.
    """
    check_model(model)
    write_shards(directory, state_tensors(model), max_shard_bytes)


def load_quantized(
    model: nn.Module, directory: str | Path, device: torch.device | str = "cpu"
) -> nn.Module:
    """Read what `save_quantized` wrote into a model of the same modules, in place; returns it.

    What the files hold quantized takes the place of the model's layer, be that a linear one or a
    quantized one of any scheme. Tensors stream in, each to where the model's is, or to `device`
    where that is on the meta device: such a model takes no memory but its new tensors. Raises
    FileFormatError for what is damaged, missing, unexpected, misshaped, of an unknown scheme or a
    newer version; the model is then as it was.
    """
    check_model(model)
    files = Shards(directory)
    quantized = quantized_modules(files.shapes)
    modules = dict(model.named_modules(remove_duplicate=False))
    if "" in quantized:
        raise FileFormatError(
            f"{directory}: expected a model of several modules; got one layer; load it with "
            "layer.load_state_dict(load_safetensors(file))"
        )
    twins = {name: quantized_twin(modules.get(name), name, directory) for name in quantized}
    replaced = {modules[name] for name in quantized}
    kept = {name for name, module in modules.items() if module not in replaced}
    dense = _dense(model, files, quantized, kept)
    layers = {}
    for name, twin in twins.items():
        there = next(modules[name].parameters()).device
        there = device if there.type == "meta" else there
        own = {n: files.read(join(name, n)).to(there) for n in quantized[name].names}
        load_layer(twin, own, directory, name)
        layers[modules[name]] = twin
        for tied in _tied(model, modules[name]).values():
            compute_dtype = getattr(tied, "compute_dtype", None)
            layers[tied] = QuantLinear.from_tied(twin, tied.bias, compute_dtype)
    replace_modules(model, layers)
    for name, (old, names) in dense.items():
        _fill(model, names, old, files.read(name), device)
    return model


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; of the names of one tensor only the first, with its description."""
    seen: set[int] = set()
    owners: set[str] = set()  # of codes that are stored under this name
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise FileFormatError(
                f"{name}: expected a tensor in the state dict; got {type(tensor).__name__}"
            )
        owner, _, leaf = name.rpartition(".")
        # a description is made afresh for each name
        if owner in owners if leaf == _DESCRIPTION else id(tensor) not in seen:
            tensors[name] = tensor.detach()
            owners |= set() if tensor.is_floating_point() else {owner}
        seen.add(id(tensor))
    return tensors


@dataclass(frozen=True)
class QuantizedTensors:
    """The tensors of one quantized module: their names in the module, and their format."""

    format: str
    names: list[str] = field(default_factory=list)


def quantized_modules(names: Iterable[str]) -> dict[str, QuantizedTensors]:
    """The quantized modules by name, as the names in a state dict tell them."""
    names, found = list(names), {}
    for name in names:
        for mark, kind in _MARKS.items():
            if name == mark or name.endswith(f".{mark}"):
                found[name.removesuffix(mark).removesuffix(".")] = QuantizedTensors(kind)
    for name in names:
        owner = name
        while owner and owner not in found:
            owner = owner.rpartition(".")[0]
        if owner in found:
            found[owner].names.append(name[len(owner) :].removeprefix("."))
    return found


def quantized_twin(module: nn.Module | None, name: str, source: str | Path) -> QuantWeight:
    """A module like this one on the meta device, and quantized; `load_layer` fills it."""
    blank = copy.deepcopy(module).to("meta") if module is not None else None
    if isinstance(blank, QuantWeight):
        return blank
    if type(blank) is nn.Embedding:
        return QuantEmbedding.from_embedding(blank, "nf4")
    if isinstance(blank, nn.Linear) or is_conv1d(blank):
        return QuantLinear.from_linear(blank, "nf4")
    raise FileFormatError(
        f"{source}: {name}: is quantized; expected a linear layer or an embedding of this name; "
        f"got {'none' if blank is None else type(blank).__name__}; lowrank.quantize makes one of "
        "a parameter of experts"
    )


def load_layer(
    twin: QuantWeight, tensors: Mapping[str, Tensor], source: str | Path, name: str
) -> None:
    """Give a layer on the meta device these very tensors: all it takes, and none left."""
    try:
        outcome = twin.load_state_dict(tensors, strict=False, assign=True)
    except LowrankError as error:
        raise type(error)(f"{source}: {join(name, str(error))}") from error
    except RuntimeError as error:  # torch's, a line for each tensor
        raise FileFormatError(f"{source}: {name}: {' '.join(str(error).split())}") from error
    names = ([join(name, n) for n in keys] for keys in outcome)
    check_names(*names, source)


def join(module: str, tensor: str) -> str:
    """The name in a state dict of a module's own tensor."""
    return f"{module}.{tensor}" if module else tensor


def _dense(
    model: nn.Module, files: Shards, quantized: Mapping[str, QuantizedTensors], kept: set[str]
) -> dict[str, tuple[Tensor, list[str]]]:
    """What the modules that are `kept` take: {its name there: (the model's tensor, its names)}."""
    claimed = {join(module, n) for module, own in quantized.items() for n in own.names}
    places: dict[int, list[str]] = {}
    modules = dict(model.named_modules())
    tied = {other for name in quantized if name in modules for other in _tied(model, modules[name])}
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (owner := name.rpartition(".")[0]) in kept
        and (owner not in tied or name.endswith(".bias"))
    }
    for name, tensor in state.items():
        places.setdefault(id(tensor), []).append(name)
    found = {name: shape for name, shape in files.shapes.items() if name not in claimed}
    chosen = {}
    for names in places.values():  # a tied tensor may be there under any of its names, or several
        there = [name for name in names if name in found]
        chosen[(there or names)[0]] = (state[names[0]], names)
        for name in there[1:]:
            del found[name]
    check_shapes({name: tuple(old.shape) for name, (old, _) in chosen.items()}, found, files.path)
    for name, (old, _) in chosen.items():
        got = files.blank(name).dtype
        if old.is_floating_point() != got.is_floating_point:
            raise FileFormatError(f"{files.path}: {name}: expected {old.dtype}; got {got}")
    return chosen


def _tied(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, by name, that share the weight of another module."""
    own = {id(p) for name, p in module.named_parameters(recurse=False) if name != "bias"}
    return {
        name: other
        for name, other in model.named_modules()
        if other is not module
        and isinstance(other, nn.Linear | QuantLinear)
        and any(id(p) in own for p in other.parameters(recurse=False))
    }


def _fill(
    model: nn.Module, names: list[str], old: Tensor, tensor: Tensor, device: torch.device | str
) -> None:
    """Copy into `old`, or, where that is on the meta device, put one on `device` in its places."""
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(tensor)
        return
    tensor = tensor.to(device)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, tensor)
