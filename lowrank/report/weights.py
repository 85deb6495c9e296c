"""The weights that schemes are compared on: of a model's linears, or of a file without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import TargetError, WeightError
from lowrank.io.safetensors import SafetensorsFile
from lowrank.io.shards import Shards, Tensors
from lowrank.nn.quant_linear import is_conv1d
from lowrank.nn.quant_weight import quant_weights
from lowrank.quant.blocks import panels
from lowrank.surgery.quantize import SKIP, linear_layers
from lowrank.surgery.targets import check_each_matches, matches

# Tables of vectors by name: word_embeddings, embed_tokens, GPT-2's wte and wpe, T5's shared.
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)\.")


def linears_of(model: nn.Module, skip: list[str]) -> dict[str, nn.Module]:
    """{name: nn.Linear or GPT-2's Conv1D}, those that `lowrank.quantize` quantizes; each once.

    Raises TargetError if there is none, or if an entry of `skip` is no module; ConfigError for a
    merged adapter.
    """
    check_each_matches(model, [name for name in skip if name not in SKIP], "skip")
    found = {name: module for module, name in linear_layers(model, skip).items()}
    if not found:
        held = ", ".join(sorted({m.storage.scheme for m in quant_weights(model).values()}))
        cause = (
            f": it is quantized already, {held}; compare on the model that it was made from"
            if held
            else ""
        )
        raise TargetError(f"report: the model has no dense linear layer outside skip{cause}")
    return found


def matrix_of(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a linear layer; a view."""
    weight = linear.weight.detach()
    return weight.T if is_conv1d(linear) else weight


def weights_of(tensors: Mapping[str, Tensor], skip: list[str]) -> dict[str, str]:
    """{layer: key} of the weights [N, K] named *.weight, outside `skip`. Raises TargetError."""
    shapes = tensors.shapes if isinstance(tensors, Tensors) else tensors
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


class WeightFiles(Tensors):
    """The tensors of a .safetensors file, or of a directory of them.

    Without `embeddings`, what is a table of vectors by its name is left out.
    """

    def __init__(
        self, path: str | Path, embeddings: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        if Path(path).is_dir():
            source = Shards(path)
            shapes = source.shapes
        else:
            source = SafetensorsFile(path)
            shapes = {name: entry.shape for name, entry in source.entries.items()}
        chosen = {n: s for n, s in shapes.items() if embeddings or not _EMBEDDING.search(n)}
        super().__init__(chosen, lambda name: source.read(name).to(device))


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
