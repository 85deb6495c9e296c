"""The trainer: all that can be known of a run before its first step, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.data.examples import Formatting
from lowrank.data.segments import Tokenizer
from lowrank.errors import ConfigError, TrainingError
from lowrank.io.versions import processor, versions
from lowrank.optim.shards import is_sharded
from lowrank.optim.tiers import check_page_dir
from lowrank.train.agreement import check_alike, check_weights
from lowrank.train.best import Best, check_metric
from lowrank.train.callbacks import Callback, Callbacks, listed
from lowrank.train.config import TrainConfig
from lowrank.train.dataset import Data, padding_token, take_template, template_kept, tokenized
from lowrank.train.distributed import Ranks
from lowrank.train.evaluation import ComputeMetrics, Evaluation, check_evaluated
from lowrank.train.feed import feed_of
from lowrank.train.gradients import (
    check_checkpointing,
    check_values,
    gradient_checkpointing,
    trainable_parameters,
)
from lowrank.train.history import History
from lowrank.train.identity import frozen_hash, outline
from lowrank.train.interrupt import Interrupt
from lowrank.train.lock import RunLock
from lowrank.train.loop import Loop
from lowrank.train.loss import backend_of, batch_loss, compiled, packs
from lowrank.train.neftune import input_embedding, neftune
from lowrank.train.offload import offloaded
from lowrank.train.packing import check_packing, log_packing
from lowrank.train.precision import Precision, check_master_weights
from lowrank.train.record import Record, TrainResult
from lowrank.train.remedies import Remedies, is_out_of_memory, out_of_memory
from lowrank.train.resume import Resumed, find_resumed
from lowrank.train.run import CONFIG, RESULTS, RunDirectory, UnwrittenDirectory, check_output_dir
from lowrank.train.saving import Saver
from lowrank.train.seeds import deterministic, set_seed
from lowrank.train.sharding import compile_blocks, gathered, shard
from lowrank.train.trackers import Trackers, check_installed, tracker_names
from lowrank.train.update import Update
from lowrank.train.weights import shared_tensors

logger = logging.getLogger("lowrank.train")


class Trainer:
    """Trains the parameters of `model` that require a gradient, on next-token prediction.

    `train_data` and `eval_data`: a path, a sequence of dicts (see `lowrank.data.load_examples`), or
    what `lowrank.data.tokenize_all` returned; formatting_func(row) returns the text, or the fields
    of an example, that a row stands for. The model is called as `lowrank.train.loss` says,
    `callbacks` as `lowrank.train.Callback` does; compute_metrics(model) returns {name: number} for
    each evaluation. processing_class is the tokenizer by its other name. Where torch.distributed is
    initialised, all its processes make the same Trainer, and each takes its share of every step.

    Raises ConfigError or DataError for all that can be known before the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_data: Data,
        eval_data: Data | None = None,
        tokenizer: Tokenizer | None = None,
        callbacks: Iterable[Callback] = (),
        compute_metrics: ComputeMetrics | None = None,
        processing_class: Tokenizer | None = None,
        formatting_func: Formatting | None = None,
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise ConfigError(f"config: expected a TrainConfig; got {config!r:.80}")
        self.ranks = Ranks(config.parallel, config.ddp_timeout)
        self.tokenizer = processing_class if tokenizer is None else tokenizer
        # outside: what fails may be another rank
        with template_kept(self.tokenizer), self.ranks.together():
            if self.ranks.first:
                check_output_dir(config.output_dir, config.overwrite_output_dir, config.resume)
            check_checkpointing(model, config.gradient_checkpointing)
            if tokenizer is not None and processing_class is not None:
                raise ConfigError("tokenizer and processing_class are one setting: leave one out")
            check_installed(tracker_names(config.report_to))
            if config.page_dir is not None:
                check_page_dir(config.page_dir)
            self.model, self.config = model, config
            if config.chat_template_path is not None:
                take_template(self.tokenizer, config.chat_template_path)
            self.callbacks = listed(callbacks)
            self.parameters = trainable_parameters(model)
            if config.fp16:
                check_master_weights(self.parameters)
            self.device = next(iter(self.parameters.values())).device
            made = (config, self.tokenizer, model, formatting_func)
            self.train_data = tokenized(train_data, "training", *made)
            self.eval_data = None if eval_data is None else tokenized(eval_data, "held-out", *made)
            self._end_to_end = packs(model) and (config.padding_free or config.packing)
            if config.packing and not self._end_to_end:
                check_packing(model, self.train_data)
            self._batch_loss = batch_loss(model, config.label_smoothing_factor)
            compiles = config.torch_compile or bool(config.torch_compile_backend)
            if compiles and not self._sharded:
                self._batch_loss = compiled(self._batch_loss, config.torch_compile_backend)
            if config.activation_offloading:
                self._batch_loss = offloaded(self._batch_loss, model, self.device)
            if config.neftune_noise_alpha is not None:
                input_embedding(model)
            self.precision = Precision(config, self.device)
            pad = padding_token(self.tokenizer, model)
            feed = partial(feed_of, config, self.device, self.ranks, self._end_to_end, pad)
            self.feed = feed(self.train_data, config.per_device_train_batch_size)
            if config.packing:
                log_packing(self.feed.sampler)
            self.total_steps = config.max_steps
            if config.max_steps < 0:
                self.total_steps = math.ceil(
                    config.num_train_epochs * self.feed.sampler.steps_per_epoch
                )
            self.evaluation = None
            if self.eval_data is not None:
                self.evaluation = Evaluation(
                    model,
                    batch_loss(model),
                    feed(self.eval_data, config.per_device_eval_batch_size),
                    self.precision,
                    compute_metrics,
                    config.auto_find_batch_size,
                    self.ranks,
                )
            check_evaluated(config, self.eval_data, compute_metrics)
            if self._judges and compute_metrics is None:
                check_metric(config, ["eval_loss"])
            several = self.ranks.size > 1 or self._sharded
            if several:
                rows = self.feed.sampler.rows_per_epoch
                check_alike(self.ranks, rows, self._outline, model, config)
            if self._sharded and getattr(model, "unread", None) is not None:
                self._cut(compiles)
            if several:
                check_weights(self.ranks, self._identity, model)
            if self._sharded:
                self._cut(compiles)
            else:
                self.ranks.send(shared_tensors(model))
            self._resumed()

    def train(self) -> TrainResult:
        """Run all steps, evaluating before and after; save; return losses and metrics.

        Ctrl-C ends the run after the last whole step: what was trained by then is saved, and the
        result says `interrupted`. A loss or gradient that is not finite is a TrainingError, and
        nothing is saved.
        """
        with contextlib.ExitStack() as held:
            with self.ranks.together():
                run, resumed = self._begin(held)
            with self.ranks.bound():
                result = self._train(run, resumed)
                self.ranks.exchange()  # on every rank the files are there when this returns
                return result

    def _begin(self, held: contextlib.ExitStack) -> tuple[RunDirectory, Resumed | None]:
        """The files of the run, locked till `held` is closed, and the run it goes on with."""
        directory = Path(self.config.output_dir)
        if self.ranks.first:
            held.enter_context(contextlib.closing(RunLock(directory)))
        resumed = self._resumed()
        if not self.ranks.first:
            return UnwrittenDirectory(directory), resumed
        lines = None
        if resumed is not None:
            lines = resumed.metrics()
            resumed.rewind(directory)
        run = held.enter_context(contextlib.closing(RunDirectory(directory, lines)))
        return run, resumed

    def evaluate(self) -> float:
        """Mean loss per labelled token of eval_data, in eval mode."""
        if self.evaluation is None:
            raise ConfigError("evaluate() needs held-out data; got none: pass Trainer(eval_data=)")
        found = self.evaluation.metrics()
        assert found is not None
        return found["eval_loss"]

    def _train(self, run: RunDirectory, resumed: Resumed | None) -> TrainResult:
        """Run and save, and leave the model as it was but for what was trained."""
        set_seed(self.config.seed + self.ranks.rank)  # dropout is each rank's own
        was_training = self.model.training
        try:
            run.write_json(CONFIG, self.resolved())
            with Interrupt() as interrupt, deterministic(self.config.full_determinism):
                self.model.train()
                with gradient_checkpointing(self.model, self.config.gradient_checkpointing):
                    result = self._run(run, resumed, interrupt)
                self._save(run, result)
        finally:
            self.model.train(was_training)
            self.model.zero_grad(set_to_none=True)
        return result

    def _run(self, run: RunDirectory, resumed: Resumed | None, interrupt: Interrupt) -> TrainResult:
        """Put the parts of the run together, and run it."""
        config, history = self.config, History() if resumed is None else resumed.history
        quiet, examples = config.disable_tqdm or not self.ranks.first, len(self.train_data)
        trackers = Trackers(
            tracker_names(config.report_to) if self.ranks.first else [],
            run.path,
            config.project,
            config.run_name or run.path.resolve().name,
            self.resolved(),
        )
        record = Record(
            run, history, self.total_steps, examples, config.logging_steps, quiet, self.device,
            trackers,
        )  # fmt: skip
        best = Best(self.parameters, config, history) if self._judges else None
        saver = None if config.save_strategy == "no" else Saver(run, lambda: self._identity)
        loop = Loop(
            config=config,
            model=self.model,
            batch_loss=self._batch_loss,
            feed=self.feed,
            precision=self.precision,
            update=Update(self.model, self.parameters, config, self.total_steps, self.ranks),
            history=history,
            record=record,
            interrupt=interrupt,
            callbacks=Callbacks([Remedies(), *self.callbacks]),
            total_steps=self.total_steps,
            ranks=self.ranks,
            evaluation=self.evaluation,
            best=best,
            saver=saver,
            resumed=resumed,
        )
        noise = config.neftune_noise_alpha
        try:
            with neftune(self.model, loop.batch_loss, noise) as loop.batch_loss:
                loop.run()
        except BaseException as error:
            if saver is not None:
                saver.close()
            record.close(failed=True)
            if is_out_of_memory(error):
                step, remedies = history.steps + 1, out_of_memory(config, self.model)
                raise TrainingError(f"out of memory in step {step}: {remedies}") from error
            raise
        record.close()
        saved_step = history.best_step if config.load_best_model_at_end else None
        return record.result(self.parameters.values(), interrupt.requested, saved_step)

    @property
    def _sharded(self) -> bool:
        """Whether every rank has a part of the model only."""
        return self.config.parallel == "fsdp"

    def _cut(self, compiles: bool) -> None:
        """Leave each rank its part of the model, if it has all; adapters are the first rank's."""
        if any(map(is_sharded, self.model.parameters())):
            return
        self.ranks.send(shared_tensors(self.model))
        shard(self.model, self.config.cpu_offload, self.ranks.group)
        if compiles:
            compile_blocks(self.model, backend_of(self.config.torch_compile_backend))
        self.parameters = trainable_parameters(self.model)

    @property
    def _judges(self) -> bool:
        """Whether evaluations are compared with one another."""
        return self.config.load_best_model_at_end or bool(self.config.early_stopping_patience)

    @cached_property
    def _outline(self) -> dict[str, Any]:
        data = (self.train_data, self.eval_data)
        return outline(self.model, self.config, *data, self.ranks.size)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a run that goes on with this one must agree in."""
        return {**self._outline, "model": {"frozen weights": frozen_hash(self.model)}}

    def _resumed(self) -> Resumed | None:
        return find_resumed(self.config, self.ranks, lambda: self._identity, self.total_steps)

    def _save(self, run: RunDirectory, result: TrainResult) -> None:
        """Save what was trained, the tokenizer, the plot and the results; say where they lie."""
        steps = f"{len(result.losses)} of {self.total_steps} steps"
        if not result.losses:
            logger.warning("interrupted after %s: nothing was trained, nothing is saved", steps)
            return
        check_values(self.parameters, len(result.losses), self.ranks)
        with gathered(self.model, self.ranks.first):
            saved = run.save_model(self.model)
        if self.tokenizer is not None and hasattr(self.tokenizer, "save"):
            self.tokenizer.save(run.path)
        run.plot()
        run.write_json(RESULTS, result.metrics)
        if result.interrupted:
            logger.warning("interrupted after %s: their outcome is saved in %s", steps, saved)
        else:
            logger.info("%s done: saved in %s", steps, saved)

    def resolved(self) -> dict[str, Any]:
        """The configuration as it is run, with what it is run on."""
        return {
            "train": self.config.to_dict(),
            "total_steps": self.total_steps,
            "train_examples": len(self.train_data),
            "eval_examples": 0 if self.eval_data is None else len(self.eval_data),
            "train_examples_cut": self.train_data.truncated,
            "train_examples_dropped": self.train_data.dropped,
            "train_data_sha256": self.train_data.fingerprint,
            "eval_data_sha256": self.eval_data.fingerprint if self.eval_data is not None else None,
            "padding_free": self._end_to_end,
            "model": type(self.model).__name__,
            "trainable_parameters": sum(p.numel() for p in self.parameters.values()),
            "device": str(self.device),
            "processes": self.ranks.size,
            "processor": processor(self.device),
            "versions": versions(),
        }
