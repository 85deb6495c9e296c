"""Put adapters beside the linear layers of any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lowrank.adapters import checks
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError, WeightError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.kinds import kind_of
from lowrank.nn.lora_experts import DenseExperts
from lowrank.nn.quant_experts import replace_parameter, restore_parameter
from lowrank.nn.quant_linear import QuantLinear, is_dense_linear
from lowrank.quant import Quantizer

from .parameters import find_parameters
from .replaced import add_replaced, find_replaced, with_task_heads
from .start import check_alone, check_start
from .targets import (
    CONDENSE_FROM,
    adapted_modules,
    check_each_matches,
    check_model,
    condense,
    find_targets,
    matches,
    named_bases,
    named_modules,
    wanted_targets,
)
from .tied import tie_adapters, with_twins

_log = logging.getLogger(__name__)


def inject(
    model: nn.Module,
    config: LoRAConfig,
    adapter: str = "default",
    quantizer: str | Quantizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Give every layer that `config` targets a fresh adapter, in place, and freeze the rest.

    The first adapter is active; a further one stays idle and frozen until `set_adapter`, and
    what trains already goes on training. Targets that are not quantized yet are, by `quantizer`.

    With init_lora_weights "loftq", "pissa" or "olora" the adapters start with a part of the
    weights, and the base is what they leave. `weights` has the original ones of targets that are
    quantized already, by their names in the model's unquantized state dict; each is taken when its
    turn comes, so that a mapping such as `open_weights` makes need not hold them.

    Returns the model. Raises TargetError for targets that match nothing, ConfigError for a name
    already taken, WeightError for a NaN; the model is then as it was. Only where `weights` fails
    on second reading, some layers have started from it and others afresh, each of them whole.
    """
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"config: expected a LoRAConfig; got {type(config).__name__}")
    names, config = resolve(model, config)
    modules = named_bases(model)
    _warn_of_rank({name: modules[name] for name in names}, config)
    check_start(model, {name: modules[name] for name in names}, config, quantizer, weights)
    attach(model, names, config, adapter, quantizer=quantizer, weights=weights)
    return model


def resolve(model: nn.Module, config: LoRAConfig) -> tuple[list[str], LoRAConfig]:
    """The names of the layers that `config` means in this model, and the config as it is saved."""
    check_model(model)
    check_each_matches(model, config.target_modules, "target_modules")
    check_each_matches(model, config.exclude_modules, "exclude_modules")
    config = with_task_heads(config)
    found = find_targets(model, config)
    names = with_twins(model, found, config)
    for field in ("rank_pattern", "alpha_pattern", "target_rows"):
        for key in getattr(config, field):
            if not any(checks.pattern_matches(key, name) for name in names):
                raise TargetError(f"{field}: {key!r} matches none of the {len(names)} targets")
    targets = wanted_targets(model, config)
    strategy = checks.strategy(targets)
    if len(names) > len(found) and strategy is None:  # the twins by name
        found = found if isinstance(targets, str) else targets
        targets = [*found, *(name for name in names if not matches(name, found))]
    if strategy is not None:  # all-linear as PEFT saves it
        parameters = find_parameters(model, config.target_parameters or [])
        layers = [name for name in names if name not in parameters]
        targets = condense(model, layers, CONDENSE_FROM if strategy == "all-linear" else 0)
    origin = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return names, replace(config, target_modules=targets, base_model_name_or_path=origin)


def _warn_of_rank(targets: Mapping[str, nn.Module], config: LoRAConfig) -> None:
    """Log a warning for ranks that no change of the weight can have."""
    beyond = []
    for name, module in targets.items():
        adapted = isinstance(module, AdaptedLayer)
        kind = type(module) if adapted else kind_of(module)
        smaller = min(kind.matrix_shape_of(module.unmerged_base if adapted else module))
        if config.rank(name) > smaller:
            beyond.append(f"{name} (r={config.rank(name)} of at most {smaller})")
    if beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        _log.warning("r: more than min(N, K), which learns no more: %s%s", beyond[0], more)


def attach(
    model: nn.Module,
    names: Iterable[str],
    config: LoRAConfig,
    adapter: str,
    fill: Callable[[str, AdaptedLayer], None] = lambda name, layer: None,
    quantizer: str | Quantizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Add `adapter` to the named layers, each then passed to `fill(name, layer)`; all or none.

    `quantizer` and `weights` are those of `inject`, which `check_start` has found sufficient; what
    starts from `weights` does so in place, one layer after the other, when all have the adapter.
    """
    before = adapted_modules(model).values()
    if any(layer.merged for layer in before):
        raise ConfigError(
            "inject: expected unmerged layers; the adapters are merged: call unmerge first"
        )
    if any(adapter in layer.config for layer in before):
        raise ConfigError(
            f"adapter: {adapter!r} is already in the model; delete it first or choose another name"
        )
    others = {a: c for layer in before for a, c in layer.config.items()}
    check_alone(others | {adapter: config})
    biased = [a for layer in before for a, c in layer.config.items() if c.bias != "none"]
    if biased and config.bias != "none":
        raise ConfigError(
            f'bias: expected "none", adapter {biased[0]!r} trains the biases; got {config.bias!r}'
        )
    is_first = not any(layer.config for layer in before)
    names, modules, fresh = list(names), named_bases(model), config.with_fresh_start()
    quantized = [name for name in names if isinstance(modules[name], QuantLinear)]
    later = quantized if config.starts_from_weight else []
    parameters = (p for m in named_modules(model).values() for p in m._parameters.values())
    flags = [(p, p.requires_grad) for p in parameters if p is not None]
    replaced = find_replaced(model, config, names)
    wrapped: dict[nn.Module, AdaptedLayer | AdaptedModule] = {}
    try:
        for name in names:
            layer = modules[name]
            try:
                if isinstance(layer, AdaptedLayer):
                    layer.add_adapter(adapter, fresh, name)
                else:
                    by = quantizer if is_dense_linear(layer) else None
                    layer = kind_of(layer).wrap(layer, fresh, adapter, name, by)
                    wrapped[modules[name]] = layer
                if name in later:
                    continue
                if config.starts_from_weight:
                    layer.initialise(adapter, config, modules[name].weight)
                fill(name, layer)
            except WeightError as error:
                raise WeightError(f"{name}.{error}") from error
        wrapped |= add_replaced(model, replaced, fresh, adapter)
    except BaseException:
        for layer in before:
            layer.delete_adapter(adapter)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for name in names:
        if modules[name] in wrapped and isinstance(modules[name], DenseExperts):
            parent, _, leaf = name.rpartition(".")
            replace_parameter(model.get_submodule(parent), leaf, wrapped[modules[name]])
    replace_modules(model, wrapped)
    if config.ensure_weight_tying:
        tie_adapters(model, names, adapter)
    for layer in wrapped.values():
        layer.train(model.training)
    active = list(dict.fromkeys(a for layer in before for a in layer.active_adapters))
    for parameter, flag in flags:  # whatever trains beside other adapters goes on training
        parameter.requires_grad_(flag and not is_first)
    activate(model, [adapter] if is_first else active)
    for name in later:  # in place: to keep what was there would be to hold a second model
        layer = wrapped[modules[name]]
        layer.initialise(adapter, config, weights[f"{name}.weight"])
        fill(name, layer)


def activate(model: nn.Module, active: list[str]) -> None:
    """Make `active` the active adapters: they train, with the biases that their configs ask for;
    the biases of an idle adapter do not.
    """
    modules = adapted_modules(model).values()
    for module in modules:
        if isinstance(module, AdaptedModule):
            module.check_active(active)
    biased = [  # of one adapter at most: `attach` refuses a second
        (layer, adapter, config)
        for layer in modules
        if isinstance(layer, AdaptedLayer)
        for adapter, config in layer.config.items()
        if config.bias != "none"
    ]
    if any(config.bias == "all" for *_, config in biased):
        every = [p for name, p in model.named_parameters() if name.split(".")[-1] == "bias"]
    for layer, adapter, config in biased:
        trains = adapter in active and not config.inference_mode
        for bias in every if config.bias == "all" else [layer.bias]:
            if bias is not None:
                bias.requires_grad_(trains)
    for module in modules:  # last: the bias of a copy is the copy's
        module.set_adapter(active)


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new[module] wherever `module` stands in the model."""
    if not new:
        return
    for parent in named_modules(model).values():
        for name, child in list(parent._modules.items()):
            instead = new.get(child)
            if isinstance(instead, DenseExperts):
                restore_parameter(parent, name, instead.weight)
            elif instead is not None and parent is not instead:
                parent._modules[name] = instead
        # torch's encoder has a way for inference that reads its layers' weights and calls no layer
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False
