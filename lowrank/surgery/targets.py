"""Which layers a config means: names, suffixes, a regex, or "all-linear", by PEFT's rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowrank.adapters import checks
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.kinds import kind_of
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.token_rows import TiedRows

from .parameters import ends_of_parameters, expert_parameters, find_parameters
from .presets import default_targets, strategy_targets

ADAPTED = (AdaptedLayer, AdaptedModule)
_WHOLE = (nn.Linear, QuantLinear, *ADAPTED)  # walk does not look into these
CONDENSE_FROM = 20  # names, from which PEFT shortens the list
_MOST = 400  # characters of a list that a message shows


def check_model(model: nn.Module) -> None:
    """Raises ConfigError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: expected an nn.Module; got {type(model).__name__}; "
            "lowrank.load_model reads files"
        )


def walk(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of all below `module`; shared modules each time, and never the inside of
    linears and of what has adapters.

    Without the output projection of nn.MultiheadAttention, whose weight is read and which nobody
    calls.
    """
    found = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, NonDynamicallyQuantizableLinear):
                found.append((prefix + name, child))
                if child._modules and not isinstance(child, _WHOLE):
                    visit(child, f"{prefix}{name}.")

    visit(module, "")
    return found


def named_bases(model: nn.Module) -> dict[str, nn.Module]:
    """All that could have adapters by name: modules, and parameters of experts in a base."""
    return {**expert_parameters(named_modules(model)), **dict(walk(model))}


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means it: y = x Wᵀ + b by any class, with adapters or without."""
    kind = type(module) if isinstance(module, AdaptedLayer) else kind_of(module)
    return kind is not None and issubclass(kind, LoRALinear)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """As model.named_modules(), but for the inside of adapters: thirty take no longer than one."""
    check_model(model)
    found: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if module in found:
            return
        found[module] = name
        adapted = module._modules and isinstance(module, ADAPTED)
        for key, child in module._modules.items():
            if child is not None and not (adapted and isinstance(child, nn.ModuleDict)):
                visit(child, f"{name}.{key}" if name else key)

    visit(model, "")
    return {name: module for module, name in found.items()}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers with adapters by name, each once."""
    return {n: m for n, m in named_modules(model).items() if isinstance(m, AdaptedLayer)}


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLayer | AdaptedModule]:
    """Those, and the modules that adapters replace or replace rows of; what is tied comes last."""
    found = {name: m for name, m in named_modules(model).items() if isinstance(m, ADAPTED)}
    return dict(sorted(found.items(), key=lambda item: isinstance(item[1], TiedRows)))


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters in the model, in order of appearance."""
    return list(dict.fromkeys(a for layer in adapted_modules(model).values() for a in layer.config))


def check_adapters(model: nn.Module, adapters: Iterable[str]) -> list[str]:
    """The names as a list. Raises TargetError at the first that no layer of the model has."""
    adapters, known = list(adapters), adapter_names(model)
    for adapter in adapters:
        if adapter not in known:
            there = (
                f"the model has {', '.join(known)}"
                if known
                else "the model has none: inject or load one first"
            )
            raise TargetError(f"adapter {adapter!r}: no layer has it; {there}")
    return adapters


def matches(name: str, wanted: list[str] | str) -> bool:
    """A str is a regex for the whole name; a list holds names, or suffixes from a dot on."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def wanted_targets(model: nn.Module, config: LoRAConfig) -> list[str] | str:
    """target_modules, or what None means for this model."""
    return default_targets(model) if config.target_modules is None else config.target_modules


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the layers that `config` targets, in the model's order, a shared layer once.

    The weights of experts that it targets come last. Raises TargetError if there are none, or if a
    target is a layer that can have no adapters.
    """
    parameters = find_parameters(model, config.target_parameters or [])
    return (_find_modules(model, config) if config.target_modules != [] else []) + parameters


def _find_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    modules = {}  # the first name of each module
    for name, module in walk(model):
        modules.setdefault(module, name)
    wanted = wanted_targets(model, config)
    strategy = checks.strategy(wanted)
    if strategy == "all-linear":
        heads = _output_heads(model)
        chosen = [(n, m) for m, n in modules.items() if is_linear(m) and m not in heads]
    elif strategy is not None:
        named = set(strategy_targets(strategy, _linears(modules)))
        chosen = [(n, m) for m, n in modules.items() if n in named]
    else:
        chosen = [(n, m) for m, n in modules.items() if matches(n, wanted)]
    if not chosen:
        what = f"target_modules={config.target_modules!r}"
        if len(what) > _MOST:  # an adapter's file may name every layer of a large model
            what = f"{what[:_MOST]}…, {len(config.target_modules)} of them,"
        raise TargetError(nothing(what, [] if strategy else wanted, _linears(modules)))
    chosen = [(n, m) for n, m in chosen if _in_layers(n, config)]
    if not chosen:
        raise TargetError(
            f"layers_to_transform={config.layers_to_transform!r}: target_modules={wanted!r} "
            "matches in no such layer; expected indices of layers that the model has"
        )
    if config.exclude_modules is not None:
        chosen = [(n, m) for n, m in chosen if not matches(n, config.exclude_modules)]
        if not chosen:
            raise TargetError(
                f"exclude_modules={config.exclude_modules!r} leaves nothing of what "
                f"target_modules={wanted!r} matches"
            )
    saved = config.modules_to_save or []
    if saved:
        chosen = [(n, m) for n, m in chosen if not any(matches(p, saved) for p in _prefixes(n))]
    if not chosen:
        raise TargetError(
            f"modules_to_save={saved!r} has all of what target_modules={wanted!r} matches"
        )
    for name, module in chosen:
        if not isinstance(module, AdaptedLayer) and kind_of(module) is None:
            raise TargetError(
                f"target {name!r}: expected a layer that can have adapters (a linear one, or see "
                f"lowrank.register_layer); got {type(module).__name__}"
            )
    return [name for name, _ in chosen]


def check_each_matches(model: nn.Module, entries: list[str] | str | None, field: str) -> None:
    """Raises TargetError at the first of a list of names that is no module of the model."""
    if isinstance(entries, list):
        modules = walk(model)
        for entry in entries:
            if not any(matches(name, [entry]) for name, _ in modules):
                linears = [name for name, module in modules if is_linear(module)]
                refusal = nothing(f"{field}: {entry!r}", [entry], linears)
                experts = ends_of_parameters(model) if field == "target_modules" else []
                hint = f"; weights of experts are for target_parameters: {', '.join(experts)}"
                raise TargetError(refusal + (hint if experts else ""))


def condense(model: nn.Module, names: list[str], many: int = 0) -> list[str]:
    """The shortest suffixes that mean these modules and no others, if there are `many` names."""
    if len(names) < many:
        return names
    chosen = set(names)
    others = {s for name, _ in walk(model) if name not in chosen for s in _suffixes(name)}
    # a full name is no one else's, but it may be the end of a longer one
    return list(dict.fromkeys(next((s for s in _suffixes(n) if s not in others), n) for n in names))


def _linears(modules: dict[nn.Module, str]) -> list[str]:
    return [name for module, name in modules.items() if is_linear(module)]


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The layer that makes logits: what the model says it is, and what is called lm_head."""
    heads = {module for name, module in walk(model) if name.split(".")[-1] == "lm_head"}
    if hasattr(model, "get_output_embeddings"):
        heads.add(model.get_output_embeddings())
    return heads


def _in_layers(name: str, config: LoRAConfig) -> bool:
    """Whether `name` lies in one of layers_to_transform; a full name given as target does."""
    layers = config.layers_to_transform
    if layers is None or (
        isinstance(config.target_modules, list) and name in config.target_modules
    ):
        return True
    patterns = (
        [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    )
    for pattern in patterns or [r"[^.]*"]:
        found = re.search(rf"(?:^|\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found.groups()[-1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def nothing(
    what: str, wanted: list[str] | str, names: list[str], kind: str = "linear layers"
) -> str:
    """The message that `wanted` matches nothing, with the nearest of `names`, those of a `kind`."""
    ends = sorted({name.split(".")[-1] for name in names})
    words = [wanted] if isinstance(wanted, str) else wanted
    near = list(
        dict.fromkeys(m for w in words for m in difflib.get_close_matches(w, [*ends, *names], n=3))
    )
    hint = f"nearest: {', '.join(near)}" if near else f"its {kind} are {', '.join(ends) or 'none'}"
    return f"{what} matches nothing in the model; {hint}"


def _suffixes(name: str) -> list[str]:
    """a.b.c -> c, b.c, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _prefixes(name: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
