"""An optimizer of torch's kind around a rule: groups, closures, hooks, state dicts.

Where the states lie is left to those that inherit: `Resident` has them beside the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank.errors import ConfigError, DtypeError
from lowrank.optim.checks import check_number
from lowrank.optim.loading import fitting_states
from lowrank.optim.rules import Rule
from lowrank.optim.shards import is_sharded

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class RuleOptimizer(Optimizer):
    """Steps all parameters of a group that have a gradient by one rule, in as few calls as can be.

    `min_8bit_size`, of each group, says which parameters keep float32 moments: those of fewer
    elements, counting all of a parameter that is sharded. Of a DTensor, as fully_shard makes them,
    each process steps its own rows, and its states are DTensors cut the same way; sharded ones
    that are no matrices keep float32 moments.
    """

    rule: Rule
    loads_to: str | None = None  # where load_state_dict makes states; None: where each parameter is

    # torch keeps its compiler out of these by importing it: a second and 125 MB at every start.
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)

    def __init__(self, params: Params, **options: Any) -> None:
        super().__init__(params, options)

    def advance(
        self, rule: Rule, params: Sequence[Tensor], step: int, numbers: Mapping[str, Any]
    ) -> None:
        """Take that step of these parameters, all on one device, by their gradients."""
        raise NotImplementedError

    def keep(self, states: Mapping[Tensor, tuple[Rule, Mapping[str, Tensor]]]) -> None:
        """Forget the states of all parameters: these, which fit their rules, take their place."""
        raise NotImplementedError

    def rule_of(self, p: Tensor, group: Mapping[str, Any]) -> Rule:
        """The rule, or the one for small tensors."""
        small = self.rule.small
        if small is None:
            return self.rule
        # blocks lie in rows, and only those of a matrix are what it is cut into
        cut = is_sharded(p) and p.ndim != 2
        return small if cut or p.numel() < group["min_8bit_size"] else self.rule

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient; `closure`, if given, computes those and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[int, Rule, int, torch.device], list[Tensor]] = {}
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout != torch.strided:
                        raise DtypeError(
                            f"gradient of a parameter of shape {list(p.shape)}: expected a dense "
                            f"one; got {p.grad.layout}: use an embedding with sparse=False"
                        )
                    step = self.state.get(p, {}).get("step", 0) + 1
                    alike.setdefault((i, self.rule_of(p, group), step, p.device), []).append(p)
        for (i, rule, step, _), params in alike.items():
            numbers = {name: self.param_groups[i][name] for name in self.rule.defaults}
            self.advance(rule, params, step, numbers)
            for p in params:
                self.state[p]["step"] = step
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize these too; what cannot be, or a number out of its range, is refused."""
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)
        group = self.param_groups.pop()
        self.check(group)
        self.param_groups.append(group)

    def check(self, group: Mapping[str, Any]) -> None:
        """ConfigError or DtypeError unless this group can be stepped."""
        for name in (*self.rule.defaults, *(["min_8bit_size"] if self.rule.small else [])):
            check_number(name, group[name])
        for i, p in enumerate(group["params"]):
            wide = self.rule_of(p, group).small is None
            allowed = (*_DTYPES, torch.float64) if wide else _DTYPES
            if p.dtype not in allowed:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise DtypeError(
                    f"params[{i}] of shape {list(p.shape)}: expected {names}; got {p.dtype}"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the groups' numbers and the states, refusing all if one does not fit.

        Of any of our optimizers of the same rule, in 8 or 32 bits; torch.optim's AdamW; those of
        bitsandbytes. A log line says what could not be taken over to the bit. Tensors are copied,
        and cast to no parameter's dtype.
        """
        saved = state_dict["param_groups"]
        sizes = [
            [len(group["params"]) for group in groups] for groups in (self.param_groups, saved)
        ]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"state_dict: expected groups of {sizes[0]} parameters; got {sizes[1]}; "
                "make the optimizer over the parameters that it was saved with"
            )
        groups = [own | its for own, its in zip(self.param_groups, saved, strict=True)]
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = own["params"]
            if group.get("amsgrad") or group.get("maximize"):
                raise ConfigError("state_dict: expected no amsgrad or maximize; got one of them")
            self.check(group)
        ids = chain.from_iterable(group["params"] for group in saved)
        params = [(p, self.rule_of(p, group)) for group in groups for p in group["params"]]
        wanted = dict(zip(ids, params, strict=True))
        states = fitting_states(wanted, state_dict["state"], self.loads_to)
        inspect.unwrap(Optimizer.load_state_dict)(
            self, {**state_dict, "state": {}, "param_groups": groups}
        )
        rules = dict(params)
        for p, (step, _) in states.items():
            self.state[p]["step"] = step
        self.keep({p: (rules[p], tensors) for p, (_, tensors) in states.items()})
