"""Optimizers whose states lie in pages: on the device within a budget, else in RAM or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.optim.base import Params, RuleOptimizer
from lowrank.optim.budget import Budget
from lowrank.optim.layout import Part
from lowrank.optim.ledger import Ledger
from lowrank.optim.pages import PageStore, chunk_bytes
from lowrank.optim.resident import MIN_8BIT_SIZE
from lowrank.optim.rules import ADAMW, ADAMW_8BIT, LION, LION_8BIT, Rule
from lowrank.optim.shards import local, sharded, share
from lowrank.optim.tiers import check_page_dir

Limit = int | Budget | None

_copied = Lock()  # a copy that goes back has the pieces of others as they were


class Paged(RuleOptimizer):
    """An optimizer of the bits of its resident twin, whatever the budgets; see PagedAdamW8bit."""

    loads_to = "cpu"

    def __init__(
        self,
        params: Params,
        device_budget: Limit,
        host_budget: Limit,
        page_dir: str | Path | None,
        **options: Any,
    ) -> None:
        self._device_budget, self._host_budget = _budget(device_budget), _budget(host_budget)
        chunk_bytes(self._device_budget, self._host_budget)
        if page_dir is not None:
            check_page_dir(page_dir)
        self._page_dir = page_dir
        self._ledgers: dict[torch.device, Ledger] = {}
        super().__init__(params, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient; `closure`, if given, computes those and returns the loss."""
        loss = super().step(closure)
        for ledger in self._ledgers.values():
            ledger.store.settle()
        return loss

    def evict(self) -> int:
        """Move all states off the devices but for what one step needs at a time; bytes freed.

        For who ran out of memory: where this is not 0, `torch.cuda.empty_cache()` and another try
        may do. States come back by and by, if the budget and what is free allow.
        """
        return sum(ledger.store.relieve(None) for ledger in self._ledgers.values())

    def advance(
        self, rule: Rule, params: Sequence[Tensor], step: int, numbers: Mapping[str, Any]
    ) -> None:
        ledger = self._ledger(params[0].device)
        for other in self._ledgers.values():
            if other is not ledger and any(local(p) in other for p in params):
                raise ConfigError(
                    f"params: expected them where they were at the first step; got them on "
                    f"{params[0].device}: save state_dict() before moving, and load it after"
                )
        grads = {local(p): local(p.grad) for p in params if local(p).numel()}

        def use(parts: list[Part], states: dict[str, list[Tensor]]) -> None:
            _step(rule, parts, grads, states, step, numbers)

        ledger.walk(rule, list(grads), use)

    def state_dict(self) -> dict[str, Any]:
        """As the resident twin's, with tensors on the host that are copies of what is in pages."""
        saved: dict[str, Any] = super().state_dict()
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        named = dict(zip(params, ids, strict=True))
        for ledger in self._ledgers.values():
            here = {
                local(p): p for p in named if local(p) in ledger and "step" in self.state.get(p, {})
            }
            for mine, states in ledger.read(list(here)).items():
                p = here[mine]
                saved["state"][named[p]] = self.state[p] | self._wide(p, states)
        for p in named:  # a process without rows of one has states of none
            if not local(p).numel() and "step" in self.state.get(p, {}):
                saved["state"][named[p]] = self.state[p] | self._wide(p, {})
        return saved

    def _wide(self, p: Tensor, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states of all of p, of which those of this process's rows are known."""
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        rule, host = self.rule_of(p, group), torch.device("cpu")
        own = rule.states(local(p))
        return {
            name: sharded(states[name] if name in states else own[name].make(host), state.shape, p)
            for name, state in rule.states(p).items()
        }

    def keep(self, states: Mapping[Tensor, tuple[Rule, Mapping[str, Tensor]]]) -> None:
        self._ledgers.clear()
        by_device: dict[torch.device, dict[Tensor, Any]] = {}
        for p, wanted in states.items():
            rule, tensors = wanted
            if local(p).numel():
                parts = {name: share(tensor, p) for name, tensor in tensors.items()}
                by_device.setdefault(p.device, {})[local(p)] = rule, parts
        for device, some in by_device.items():
            self._ledger(device).write(some)

    def __getstate__(self) -> NoReturn:
        raise ConfigError(
            "a paged optimizer cannot be copied or pickled: make another, and let it load the "
            "state_dict() of this one"
        )

    def _ledger(self, device: torch.device) -> Ledger:
        if device not in self._ledgers:
            budgets = self._device_budget, self._host_budget
            self._ledgers[device] = Ledger(PageStore(device, *budgets, self._page_dir))
        return self._ledgers[device]


class PagedAdamW(Paged):
    """AdamW with float32 moments in pages; `PagedAdamW8bit` says how."""

    rule = ADAMW

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        device_budget: Limit = None,
        host_budget: Limit = None,
        page_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            device_budget,
            host_budget,
            page_dir,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )


class PagedAdamW8bit(Paged):
    """AdamW8bit with its moments in pages, to the bit.

    `device_budget`: bytes of states on the device of the parameters, those included that pass
    through at a step. `host_budget`: bytes of the others in page-locked RAM; what is left goes to
    a file without a name in `page_dir` (TMPDIR or /var/tmp). On a CPU both mean the same memory,
    and the smaller counts. Each is a number, or a `Budget` that several optimizers share; None
    sets no limit: states are on the device until its memory is short.
    """

    rule = ADAMW_8BIT

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
        *,
        device_budget: Limit = None,
        host_budget: Limit = None,
        page_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            device_budget,
            host_budget,
            page_dir,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
        )


class PagedLion(Paged):
    """Lion with its float32 moment in pages; `PagedAdamW8bit` says how."""

    rule = LION

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        device_budget: Limit = None,
        host_budget: Limit = None,
        page_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            device_budget,
            host_budget,
            page_dir,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
        )


class PagedLion8bit(Paged):
    """Lion8bit with its moment in pages; `PagedAdamW8bit` says how."""

    rule = LION_8BIT

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        min_8bit_size: int = MIN_8BIT_SIZE,
        *,
        device_budget: Limit = None,
        host_budget: Limit = None,
        page_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            device_budget,
            host_budget,
            page_dir,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
        )


def _budget(limit: Limit) -> Budget:
    return limit if isinstance(limit, Budget) else Budget(limit)


def _step(
    rule: Rule,
    parts: Sequence[Part],
    grads_of: Mapping[Tensor, Tensor],
    states: Mapping[str, Sequence[Tensor]],
    step: int,
    numbers: Mapping[str, Any],
) -> None:
    """Step parts of parameters. What is cut into pieces is contiguous, or a copy that goes back."""
    cut = {part.p for part in parts if part.piece is not None}
    with nullcontext() if all(p.is_contiguous() for p in cut) else _copied:
        dense = {p: p.contiguous() for p in cut}
        params = [part.of(dense.get(part.p, part.p)) for part in parts]
        grads = []
        for part in parts:
            grad = grads_of[part.p]
            grads.append(part.of(grad.contiguous() if part.p in cut else grad))
        rule.step(params, grads, states, step=step, **numbers)
        for p, copy in dense.items():
            if copy is not p:
                p.copy_(copy)
