"""The weights that schemes are compared on: of a model's linears, or of a file without a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, TargetError, WeightError
from lowrank.io.safetensors import SafetensorsFile
from lowrank.io.shards import Shards
from lowrank.nn.lora_linear import LoRALinear
from lowrank.quant.blocks import panels
from lowrank.surgery.targets import check_each_matches, matches, walk

# Tables of vectors by name: word_embeddings, embed_tokens, GPT-2's wte and wpe, T5's shared.
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)\.")


def linears_of(model: nn.Module, skip: Iterable[str]) -> dict[str, nn.Linear]:
    """{name: nn.Linear} outside `skip`, the bases of adapted ones among them; a shared one once.

    Raises TargetError if there is none, or if an entry of `skip` is no module.
    """
    skip = _names(skip)
    check_each_matches(model, [name for name in skip if name != "lm_head"], "skip")
    found: dict[nn.Linear, str] = {}
    for name, module in walk(model):
        if isinstance(module, LoRALinear):
            module = module.base_layer
        if isinstance(module, nn.Linear) and not matches(name, skip):
            found.setdefault(module, name)
    if not found:
        raise TargetError("report: the model has no nn.Linear outside skip; nothing to compare on")
    return {name: linear for linear, name in found.items()}


def weights_of(tensors: Mapping[str, Tensor], skip: Iterable[str]) -> dict[str, str]:
    """{layer: key} of the weights [N, K] named *.weight, outside `skip`. Raises TargetError."""
    skip = _names(skip)
    shapes = tensors.shapes if isinstance(tensors, WeightFiles) else tensors
    found = {}
    for key, value in shapes.items():
        layer, _, leaf = key.rpartition(".")
        ndim = len(value.shape) if isinstance(value, Tensor) else len(value)
        if leaf == "weight" and ndim == 2 and not matches(layer, skip):
            found[layer] = key
    if not found:
        raise TargetError(
            "report: no matrices named *.weight outside skip; nothing to compare on; "
            f"there are {', '.join(list(shapes)[:3]) or 'no tensors'}"
        )
    return found


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, or of a directory of them, each read when asked for.

    `shapes` maps names to shapes. Without `embeddings`, what is a table of vectors by its name is
    left out.
    """

    def __init__(
        self, path: str | Path, embeddings: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        if Path(path).is_dir():
            shards = Shards(path)
            shapes, self._read = shards.shapes, shards.read
        else:
            file = SafetensorsFile(path)
            shapes, self._read = {k: e.shape for k, e in file.entries.items()}, file.read
        self._device = device
        self.shapes = {
            name: shape
            for name, shape in shapes.items()
            if embeddings or not _EMBEDDING.search(name)
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def squares(name: str, weight: Tensor) -> float:
    """Σ w² in float64. Raises WeightError unless the weight is finite floats [N, K]."""
    if weight.is_meta:
        raise WeightError(f"{name}.weight: expected values; got a tensor on meta: load it first")
    if not weight.is_floating_point() or weight.dim() != 2 or weight.numel() == 0:
        raise WeightError(
            f"{name}.weight: expected floats [N, K] with N, K >= 1; got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    total = 0.0
    for start, stop in panels(*weight.shape, weight.device):
        rows = weight[start:stop].detach()
        if not bool(torch.isfinite(rows).all()):
            raise WeightError(f"{name}.weight: expected finite values; got NaN or inf")
        total += float(rows.double().square().sum())
    return total


def _names(skip: Iterable[str]) -> list[str]:
    if isinstance(skip, str):
        raise ConfigError(f"skip: expected a sequence of names; got the string {skip!r}")
    return list(skip)
