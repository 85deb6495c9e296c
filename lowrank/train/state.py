"""What training holds beside the weights, as JSON and tensors: nothing that could run code.

A value is a tree of dicts, lists, tuples, numbers, text, None and tensors. `split` gives what JSON
can hold of it, exactly, and the tensors by name for a safetensors file; `join` puts both together.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import FileFormatError, TrainingError
from lowrank.train.distributed import Ranks

# keys of JSON objects that stand for what JSON does not have
_TENSOR, _FLOATS, _FLOAT = "$tensor", "$floats", "$float"
_TUPLE, _PAIRS = "$tuple", "$pairs"
_FEW = 16  # floats that JSON shows; a longer list of them, as of losses, is a tensor


def split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The part of `value` for JSON. Its tensors, detached copies in main memory, go into `tensors`,
    `name`d by where they stand, as in `optimizer//head.weight//exp_avg`.

    Raises TrainingError for a type that would need pickle.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True)
        return {_TENSOR: name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    within = f"{name}//" if name else ""
    if isinstance(value, list) and len(value) > _FEW and all(type(v) is float for v in value):
        tensors[name] = torch.tensor(value, dtype=torch.float64)
        return {_FLOATS: name}
    if isinstance(value, list | tuple):
        parts = [split(v, f"{within}{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {_TUPLE: parts}
    if isinstance(value, Mapping):
        pairs = [(key, split(v, f"{within}{key}", tensors)) for key, v in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {_PAIRS: [[split(key, f"{within}key", tensors), part] for key, part in pairs]}
    raise TrainingError(
        f"{name.replace('//', '.')}: expected numbers, text, lists, dicts or tensors, which a "
        f"checkpoint can hold; got {type(value).__name__}"
    )


def join(part: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` took apart. Raises FileFormatError if a tensor is missing."""
    if isinstance(part, list):
        return [join(p, tensors) for p in part]
    if not isinstance(part, dict):
        return part
    if _TENSOR in part or _FLOATS in part:
        name = part.get(_TENSOR, part.get(_FLOATS))
        if name not in tensors:
            raise FileFormatError(f"the checkpoint has no tensor {name!r}")
        return tensors[name] if _TENSOR in part else tensors[name].tolist()
    if _FLOAT in part:
        return float(part[_FLOAT])
    if _TUPLE in part:
        return tuple(join(p, tensors) for p in part[_TUPLE])
    if _PAIRS in part:
        return {join(key, tensors): join(p, tensors) for key, p in part[_PAIRS]}
    return {key: join(p, tensors) for key, p in part.items()}


def rng_state(devices: Iterable[torch.device]) -> dict[str, Any]:
    """The random numbers to come: of torch, on these GPUs too, `random`, and numpy if used."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": {str(d): torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"},
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
    }
    if "numpy" in sys.modules:
        import numpy as np

        state["numpy"] = _map(np.random.get_state(legacy=False), np.ndarray, torch.from_numpy)
    return state


def rng_states(ranks: Ranks, devices: Iterable[torch.device]) -> list[dict[str, Any]]:
    """The `rng_state` of every rank."""
    import numpy as np

    # as arrays: torch cannot unpickle all that it pickles
    arrays = ranks.exchange(_map(rng_state(devices), Tensor, Tensor.numpy))
    return [_map(state, np.ndarray, torch.from_numpy) for state in arrays]


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Make the random numbers to come those of `rng_state`; of GPUs that are here."""
    torch.set_rng_state(state["torch"])
    for device, numbers in state["cuda"].items():
        if (torch.device(device).index or 0) < torch.cuda.device_count():
            torch.cuda.set_rng_state(numbers, device)
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    if "numpy" in state:
        import numpy as np

        np.random.set_state(_map(state["numpy"], Tensor, Tensor.numpy))


def optimizer_state(optimizer: Any, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """{parameter's name: {name: tensor or number}} of what the optimizer keeps of each.

    By name, so that neither the order nor the grouping of the parameters is part of a file.
    """
    order = _order(optimizer, names)
    return {order[i]: state for i, state in optimizer.state_dict()["state"].items()}


def set_optimizer_state(
    optimizer: Any, names: Mapping[nn.Parameter, str], state: Mapping[str, Any]
) -> None:
    """Give the optimizer what `optimizer_state` had; rates and decay stay those it has."""
    places = {name: i for i, name in enumerate(_order(optimizer, names))}
    groups = optimizer.state_dict()["param_groups"]
    numbered = {places[name]: of_one for name, of_one in state.items()}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _order(optimizer: Any, names: Mapping[nn.Parameter, str]) -> list[str]:
    """The names of the parameters as an optimizer's state_dict numbers them."""
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value`, of nested dicts, with what is of `kind` changed."""
    if isinstance(value, dict):
        return {key: _map(v, kind, change) for key, v in value.items()}
    return change(value) if isinstance(value, kind) else value
