"""Which base an adapter belongs to that started with a part of the weights.

Over any other base a LoftQ, PiSSA or OLoRA adapter computes nonsense of the right shape. So its
file has, in the metadata that PEFT passes over, a number for each layer, Σ cos(n²) W[n, k] cos(k²)
of the base W [N, K] there. Another base gives another number; the same one, made again on another
machine, the same but for a few codes, which is less than `_TOLERANCE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.adapters import initial, lora
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import FileFormatError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.quant_linear import dense_matrix, is_dense_linear
from lowrank.nn.quant_weight import resolve
from lowrank.quant import Quantizer
from lowrank.surgery.start import check_start

from .safetensors import SafetensorsFile

KEY = "lowrank.base"
_TOLERANCE = 1e-3  # of |W|


def metadata_of(layers: Mapping[str, AdaptedLayer]) -> dict[str, str]:
    """What the file of an adapter of these layers says of their bases."""
    numbers = {name: _number(_weight(layer)) for name, layer in layers.items()}
    return {KEY: json.dumps(numbers)}


def read_numbers(path: Path) -> dict[str, float] | None:
    """{layer: number} of an adapter's file, None if PEFT wrote it. Raises FileFormatError."""
    text = SafetensorsFile(path).metadata.get(KEY)
    if text is None:
        return None
    try:
        return {name: float(number) for name, number in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path}: damaged metadata {KEY}: {error}") from error


def is_base_to_be_made(
    path: Path,
    numbers: Mapping[str, float] | None,
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LoRAConfig,
    adapter: str,
    quantizer: str | Quantizer | None,
    weights: Mapping[str, Tensor] | None,
) -> bool:
    """Whether the targets are not yet the base of the adapter in `path`, but can become it.

    Raises FileFormatError if they cannot, as the first and the last of them show, or if nothing is
    given that they could be made of; ConfigError as `inject` does.
    """
    how = f"{path}: init_lora_weights={config.init_lora_weights!r}"
    there = [t.config[adapter] for t in targets.values() if adapter in getattr(t, "config", {})]
    if numbers is not None:
        wrong = next((n for n, t in targets.items() if not _agrees(_weight(t), numbers, n)), None)
    elif config.init_lora_weights not in ("loftq", "pissa", "olora"):
        raise FileFormatError(
            f"{how}: PEFT's fast SVD is another one each time, and the file does not say what base "
            "it left; have PEFT save it with path_initial_model_for_weight_conversion"
        )
    else:  # PEFT starts adapters anew when it loads them
        start = (config.init_lora_weights, config.loftq_config)
        same = there and all((c.init_lora_weights, c.loftq_config) == start for c in there)
        wrong = None if same else next(iter(targets))
    if wrong is None:
        return False
    in_model = config.starts_as_principal_part and all(map(is_dense_linear, targets.values()))
    if there or not (in_model or quantizer is not None or weights is not None):
        raise FileFormatError(
            f"{how}: trained over what this left of the weights; the base of {wrong} is another; "
            "into a new model, load it with weights=lowrank.open_weights(unquantized model)"
        )
    check_start(model, targets, config, quantizer, weights)
    if numbers is not None:
        # one alone agrees with another base by chance, once in some hundred times
        for name in dict.fromkeys((next(iter(targets)), next(reversed(targets)))):
            made = _made(name, targets[name], config, quantizer, weights)
            check_made(path, numbers, name, made)
    return True


def _made(
    name: str,
    module: nn.Module,
    config: LoRAConfig,
    quantizer: str | Quantizer | None,
    weights: Mapping[str, Tensor] | None,
) -> Tensor:
    """What the start of an adapter leaves of a target's weight, [N, K]."""
    if is_dense_linear(module):
        weight, by = dense_matrix(module), None if quantizer is None else resolve(quantizer)
    else:
        assert weights is not None  # as `check_start` found
        weight, by = module.matrix(weights[f"{name}.weight"]), module.quantizer
    s = lora.scaling(config.rank(name), config.alpha(name), config.use_rslora)
    rest = initial.split(config, weight, by, config.rank(name), s)[0]
    return rest.float() if by is None else by.dequantize(rest, torch.float32)


def check_made(
    path: Path, numbers: Mapping[str, float], name: str, made: nn.Module | Tensor
) -> None:
    """FileFormatError unless what was made of the layer `name` is what the adapter belongs to."""
    if not _agrees(made if isinstance(made, Tensor) else _weight(made), numbers, name):
        raise FileFormatError(
            f"{path}: {name}.weight makes another base than it was trained over; expected the same "
            "weights, and the same quantizer and options, if any"
        )


def _weight(module: nn.Module) -> Tensor:
    if isinstance(module, AdaptedLayer):
        return module.matrix(torch.float32).detach()
    return (
        dense_matrix(module).float()
        if is_dense_linear(module)
        else module.dequantize(torch.float32)
    )


def _agrees(weight: Tensor, numbers: Mapping[str, float], name: str) -> bool:
    if name not in numbers:
        return False
    return abs(_number(weight) - numbers[name]) <= _TOLERANCE * weight.norm().item()


def _number(weight: Tensor) -> float:
    counts = (torch.arange(n, dtype=torch.float64, device="cpu") for n in weight.shape)
    left, right = (count.square().cos().to(weight) for count in counts)
    return (left @ weight @ right).item()
