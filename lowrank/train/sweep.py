"""A grid of settings over one frozen base: ranks scanned, refined, the best trained longer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.adapters.config import LoRAConfig
from lowrank.data.segments import Tokenizer
from lowrank.errors import ConfigError, TrainingError
from lowrank.surgery import delete_adapter, inject, set_adapter, unload
from lowrank.surgery.targets import adapted_modules
from lowrank.train.config import TrainConfig
from lowrank.train.dataset import Data
from lowrank.train.distributed import world_size
from lowrank.train.interrupt import Interrupt
from lowrank.train.lock import RunLock
from lowrank.train.remedies import is_out_of_memory
from lowrank.train.run import check_output_dir
from lowrank.train.side_by_side import SideBySide, Trainee, batches_of, why_not
from lowrank.train.sweep_result import DATA, SweepResult, Trial, trial_name
from lowrank.train.trainer import Trainer

logger = logging.getLogger("lowrank.train")

RANKS = (8, 16, 32, 64)
_LORA = {field.name for field in dataclasses.fields(LoRAConfig)}
_TRAIN = {field.name for field in dataclasses.fields(TrainConfig)}
_FIXED = ("output_dir", "overwrite_output_dir", "max_length", "resume")  # tokenized once
_TOP = 2  # trained longer


def sweep(
    model: nn.Module,
    lora: LoRAConfig,
    config: TrainConfig,
    train_data: Data,
    eval_data: Data,
    tokenizer: Tokenizer | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    side_by_side: int = 4,
    refine: bool = True,
    longer: float = 2.0,
) -> SweepResult:
    """Train an adapter for every combination of `grid`, and compare their held-out losses.

    model: without adapters, quantized or not; it stays in memory once, and comes out as it was.
    grid: {field of LoRAConfig or TrainConfig: values}; None: {"r": [8, 16, 32, 64]}. lora_alpha
    keeps its proportion to r unless it is in the grid itself.
    side_by_side: adapters that are trained at the same time, if they can share batches; fewer if
    memory runs out.
    refine: try the ranks halfway between the best one and its neighbours too.
    longer: train the best two again, with so many times the steps; 1: not.
    Files go to config.output_dir: a directory for each adapter, and sweep.md, .json and .png.
    """
    grid = {"r": RANKS} if grid is None else grid
    if eval_data is None:
        raise ConfigError("eval_data: a sweep compares held-out losses; got None: pass some")
    _check(model, lora, config, grid, side_by_side, longer)
    grid = {name: list(values) for name, values in grid.items()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    runner = _Runner(model, lora, config, (train_data, eval_data), tokenizer, side_by_side)
    result = SweepResult(Path(config.output_dir), grid)
    try:
        with contextlib.closing(RunLock(result.output_dir)), Interrupt() as interrupt:
            combinations = itertools.product(*grid.values())
            scan = [dict(zip(grid, values, strict=True)) for values in combinations]
            whole = runner.run(result, "scan", scan, interrupt)
            if whole and refine and "r" in grid and result.best is not None:
                between = [{**result.best.settings, "r": r} for r in refined(result)]
                whole = runner.run(result, "refine", between, interrupt)
            if whole and longer > 1 and result.best is not None:
                top = [trial.settings for trial in result.ranking[:_TOP]]
                whole = runner.run(result, "longer", top, interrupt, longer)
            result.interrupted = not whole
    finally:
        if adapted_modules(model):
            unload(model)
        for parameter, flag in before:
            parameter.requires_grad_(flag)
    result.save()
    return result


def refined(result: SweepResult) -> list[int]:
    """The ranks halfway, in powers of two, between the best trial's and those beside it.

    Beyond the end of what was tried, half a step further. 16 of 8, 16, 32: 12 and 24.
    """
    best = result.best
    assert best is not None
    others = {k: v for k, v in best.settings.items() if k != "r"}
    tried = sorted({t.r for t in result.trials if others.items() <= t.settings.items()})
    at = tried.index(best.r)
    below = tried[at - 1] if at else best.r // 2
    above = tried[at + 1] if at + 1 < len(tried) else 2 * best.r
    between = {round((low + high) / 2) for low, high in ((below, best.r), (best.r, above))}
    return sorted(r for r in between - set(tried) if r > 0)


class _Runner:
    """Trains trials over the model, as many at a time as share batches and fit."""

    def __init__(
        self,
        model: nn.Module,
        lora: LoRAConfig,
        config: TrainConfig,
        data: tuple[Data, Data],
        tokenizer: Tokenizer | None,
        side_by_side: int,
    ) -> None:
        self._model, self._lora, self._config = model, lora, config
        self._data, self._tokenizer = data, tokenizer
        self._at_once = side_by_side

    def run(
        self,
        result: SweepResult,
        stage: str,
        settings: Iterable[Mapping[str, Any]],
        interrupt: Interrupt,
        longer: float = 1.0,
    ) -> bool:
        """Add a trial to `result` for each of the settings; False: interrupted before the last."""
        groups: dict[tuple, list[tuple[Trial, LoRAConfig, TrainConfig]]] = {}
        for chosen in settings:
            made = self._made(stage, chosen, longer)
            groups.setdefault(batches_of(made[2]), []).append(made)
        for group in groups.values():
            reason = why_not(self._model, group[0][2])
            if reason is not None and len(group) > 1:
                logger.info("trained one after another: %s", reason)
            while group:
                taken = group[: 1 if reason is not None else self._at_once]
                if not self._train(taken, interrupt):
                    continue  # fewer at once
                result.trials += [trial for trial, _, _ in taken]
                del group[: len(taken)]
                if interrupt.requested:
                    return False
        return True

    def _made(
        self, stage: str, chosen: Mapping[str, Any], longer: float
    ) -> tuple[Trial, LoRAConfig, TrainConfig]:
        """A trial that is still to be trained, and its two configs."""
        r = chosen.get("r", self._lora.r)
        for_lora = {"r": r, "lora_alpha": r * self._lora.lora_alpha / self._lora.r}
        for_lora |= {name: value for name, value in chosen.items() if name in _LORA}
        for_train = {name: value for name, value in chosen.items() if name in _TRAIN}
        for_train["save_strategy"] = "no"  # a trial that is lost is short
        if longer > 1 and self._config.max_steps > 0:
            for_train["max_steps"] = round(self._config.max_steps * longer)
        elif longer > 1:
            for_train["num_train_epochs"] = self._config.num_train_epochs * longer
        name = trial_name({"r": r, **chosen}, stage)
        path = Path(self._config.output_dir) / name
        trial = Trial(name, stage, {"r": r, **chosen}, path)
        return (
            trial,
            replace(self._lora, **for_lora),
            replace(self._config, output_dir=path, **for_train),
        )

    def _train(
        self, group: list[tuple[Trial, LoRAConfig, TrainConfig]], interrupt: Interrupt
    ) -> bool:
        """Train the trials of a group and fill in what they came to; False: it did not fit."""
        trainees: list[Trainee] = []
        alone = why_not(self._model, group[0][2]) is not None
        try:
            for trial, lora, config in group:
                torch.manual_seed(config.seed)  # each starts as it would alone
                # a Trainer saves "default" into the directory itself
                adapter = "default" if alone else trial.name
                inject(self._model, lora, adapter=adapter)
                set_adapter(self._model, adapter)
                trainer = Trainer(self._model, config, *self._data, tokenizer=self._tokenizer)
                self._data = trainer.train_data, trainer.eval_data  # tokenized once
                trainees.append(Trainee(adapter, trainer))
            if alone:
                self._alone(group[0][0], trainees[0].trainer, interrupt)
                return True
            SideBySide(self._model, trainees, interrupt).run()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(group) == 1:
                raise
            self._at_once = len(group) // 2
            logger.warning("out of memory: %d at once from here on", self._at_once)
            for _, _, config in group:
                config.overwrite_output_dir = True  # what they began is begun again
            return False
        finally:
            for adapter in {a for m in adapted_modules(self._model).values() for a in m.config}:
                delete_adapter(self._model, adapter)
        for (trial, _, _), t in zip(group, trainees, strict=True):
            done, trial.failure = t.history, t.failure
            trial.fill(t.trainer, done.losses, done.eval_losses, done.seconds, t.eval_loss)
        return True

    def _alone(self, trial: Trial, trainer: Trainer, interrupt: Interrupt) -> None:
        """Train one adapter by its own Trainer, which knows every setting."""
        try:
            result = trainer.train()
        except TrainingError as error:
            if is_out_of_memory(error.__cause__ or error):
                raise
            trial.failure = str(error)
            trial.fill(trainer, [], [], 0.0, None)
            return
        kept = None if result.interrupted else result.metrics.get("eval_loss_after")
        seconds = result.metrics["train_seconds"]
        trial.fill(trainer, result.losses, result.eval_losses, seconds, kept)
        interrupt.requested |= result.interrupted


def _check(
    model: nn.Module,
    lora: LoRAConfig,
    config: TrainConfig,
    grid: Mapping[str, Sequence[Any]],
    side_by_side: int,
    longer: float,
) -> None:
    """Raise ConfigError for what cannot be swept, before anything is trained or written."""
    if world_size() > 1:
        raise ConfigError(
            f"a sweep trains in one process; got {world_size()}: start it without torchrun"
        )
    for name, values in grid.items():
        if name not in _LORA | _TRAIN or name in _FIXED:
            raise ConfigError(f"grid: expected fields of LoRAConfig and TrainConfig; got {name!r}")
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ConfigError(f"grid: expected a list of values of {name}; got {values!r}")
        if not values or len(values) > len({repr(value) for value in values}):
            raise ConfigError(f"grid: expected different values of {name}; got {list(values)!r}")
        for value in values:
            replace(lora if name in _LORA else config, **{name: value})
    for name, value, least in (("side_by_side", side_by_side, 1), ("longer", longer, 1)):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (least <= value < math.inf)
        ):
            raise ConfigError(f"{name}: expected a number of at least {least}; got {value!r}")
    if any(layer.config for layer in adapted_modules(model).values()):
        raise ConfigError("sweep: expected a model without adapters: call lowrank.unload first")
    if lora.bias != "none" or lora.starts_from_weight or lora.init_lora_weights == "eva":
        raise ConfigError(
            "sweep: expected adapters that leave the base as it is, with nothing but the seed to "
            f"start from; got bias={lora.bias!r}, init_lora_weights={lora.init_lora_weights!r}"
        )
    if config.resume is not None:
        raise ConfigError("resume: a sweep begins anew; take the settings that it lacks as a grid")
    check_output_dir(config.output_dir, config.overwrite_output_dir)
    if (Path(config.output_dir) / DATA).exists() and not config.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {config.output_dir} already holds a sweep ({DATA}): name another, or set "
            "overwrite_output_dir to replace it"
        )
