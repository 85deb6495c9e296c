"""Modules that an adapter trains whole, and rows of embeddings: found in a model, and put there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.saved_module import SavedModule
from lowrank.nn.token_rows import TiedRows, TokenRows, check_tokens

from .targets import matches, nothing, walk
from .tied import EMBEDDINGS, tied_modules, twins_of

# What transformers calls the fresh heads of its models, which PEFT trains whole for these tasks.
_TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


@dataclass
class Replaced:
    """What an adapter replaces, by names: modules, rows of embeddings, and what is tied to those.

    tied_saved: {module: the one of `saved` whose weight it shares}; tied_rows the same of `rows`.
    """

    saved: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    tied_saved: dict[str, str] = field(default_factory=dict)
    tied_rows: dict[str, str] = field(default_factory=dict)


def with_task_heads(config: LoRAConfig) -> LoRAConfig:
    """The config with the heads of its task_type among modules_to_save, as PEFT has them."""
    heads = _TASK_HEADS.get(config.task_type or "", [])
    missing = [head for head in heads if head not in (config.modules_to_save or [])]
    if not missing:
        return config
    return replace(config, modules_to_save=[*(config.modules_to_save or []), *missing])


def find_replaced(model: nn.Module, config: LoRAConfig, targets: list[str]) -> Replaced:
    """What an adapter of this config, on these `targets`, replaces.

    Raises TargetError for names that match nothing or another kind of module, ConfigError for what
    has adapters of another kind, and for tokens that an embedding does not have.
    """
    if config.modules_to_save is None and config.trainable_token_indices is None:
        return Replaced()
    modules: dict[nn.Module, str] = {}
    for name, module in walk(model):
        modules.setdefault(module, name)
    named = {name: module for module, name in modules.items()}
    groups = tied_modules(model)
    found = Replaced(saved=_saved(named, config), rows=_rows(model, named, config))
    for name in list(found.saved) if config.ensure_weight_tying else []:
        for twin in twins_of(name, groups):
            if twin in found.saved:
                found.saved.remove(twin)
            found.tied_saved[twin] = name
    for name in list(found.rows):
        for twin in twins_of(name, groups):
            if found.rows.pop(twin, found.rows[name]) != found.rows[name]:
                raise ConfigError(
                    f"trainable_token_indices: expected the same tokens for {name} and {twin}, "
                    "whose weights are one"
                )
            found.tied_rows[twin] = name
    _check(named, found, targets)
    return found


def add_replaced(
    model: nn.Module, found: Replaced, config: LoRAConfig, adapter: str
) -> dict[nn.Module, AdaptedModule]:
    """Add the adapter to what has such adapters; what comes in the place of what has none yet."""
    named, new = dict(walk(model)), {}

    def holder(name: str, kind: type[AdaptedModule], *rest: nn.Module) -> AdaptedModule:
        module = named[name]
        if isinstance(module, AdaptedModule):
            return module
        if module not in new:
            new[module] = kind(module, *rest)
        return new[module]

    for name in found.saved:
        holder(name, SavedModule).add_adapter(adapter, config)
    for twin, name in found.tied_saved.items():
        held = holder(twin, SavedModule)
        held.add_adapter(adapter, config)
        first = holder(name, SavedModule).modules_to_save[adapter]
        held.modules_to_save[adapter].weight = first.weight
    for name, tokens in found.rows.items():
        holder(name, TokenRows).add_adapter(adapter, config, tokens)
    for twin, name in found.tied_rows.items():
        holder(twin, TiedRows, holder(name, TokenRows)).add_adapter(adapter, config)
    return new


def _saved(named: dict[str, nn.Module], config: LoRAConfig) -> list[str]:
    for entry in config.modules_to_save or []:
        implied = entry in _TASK_HEADS.get(config.task_type or "", [])
        if not implied and not any(matches(name, [entry]) for name in named):
            what = f"modules_to_save: {entry!r}"
            raise TargetError(nothing(what, [entry], list(named), "modules"))
    found: list[str] = []
    for name in named:
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and matches(name, config.modules_to_save or []):
            found.append(name)
    return found


def _rows(
    model: nn.Module, named: dict[str, nn.Module], config: LoRAConfig
) -> dict[str, list[int]]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if isinstance(wanted, list):
        return {_input_embedding(model, named): wanted}
    rows = {}
    for entry, tokens in wanted.items():
        names = [name for name in named if matches(name, [entry])]
        if not names:
            what = f"trainable_token_indices: {entry!r}"
            raise TargetError(nothing(what, [entry], list(named), "modules"))
        rows.update(dict.fromkeys(names, tokens))
    return rows


def _input_embedding(model: nn.Module, named: dict[str, nn.Module]) -> str:
    """The embedding of the tokens: what the model says it is, or the one that there is."""
    tables = [n for n, m in named.items() if isinstance(_base(m), EMBEDDINGS)]
    if hasattr(model, "get_input_embeddings"):
        module = model.get_input_embeddings()
        said = [name for name, other in named.items() if other is module]
        if said:
            return said[0]
    tables = [name for name in tables if matches(name, ["embed_tokens"])] or tables
    if len(tables) != 1:
        raise TargetError(
            "trainable_token_indices: expected a dict by the embedding's name, as the model has "
            f"{len(tables)} of them{': ' * bool(tables)}{', '.join(tables[:3])}"
        )
    return tables[0]


def _base(module: nn.Module) -> nn.Module:
    return module.unmerged_base if isinstance(module, AdaptedModule) else module


def _check(named: dict[str, nn.Module], found: Replaced, targets: list[str]) -> None:
    """Raises ConfigError unless every module can have the adapter that is meant for it."""
    saved, rows = [*found.saved, *found.tied_saved], [*found.rows, *found.tied_rows]
    for name in rows:
        if name in saved:
            raise ConfigError(
                f"{name}: expected in modules_to_save or in trainable_token_indices; got in both"
            )
        if name in targets:
            how = f", as it is tied to {found.tied_rows[name]}" if name in found.tied_rows else ""
            raise ConfigError(
                f"{name}: is in trainable_token_indices{how}, and a target; add it to "
                "exclude_modules"
            )
    for name, kind in (
        *((name, SavedModule) for name in saved),
        *((name, TokenRows) for name in found.rows),
        *((name, TiedRows) for name in found.tied_rows),
    ):
        module = named[name]
        inside = [type(m) for m in module.modules() if isinstance(m, AdaptedLayer | AdaptedModule)]
        if inside and not isinstance(module, kind):
            raise ConfigError(
                f"{name}: has adapters of another kind already, {inside[0].__name__}; merge or "
                "delete those first"
            )
    for name, tokens in found.rows.items():
        if not isinstance(_base(named[name]), EMBEDDINGS):
            raise TargetError(
                f"trainable_token_indices: expected {name} to be an embedding; got "
                f"{type(_base(named[name])).__name__}"
            )
        check_tokens(name, _base(named[name]), tokens)
