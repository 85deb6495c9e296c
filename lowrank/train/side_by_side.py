"""Several adapters of one model trained on the same batches: one forward and backward for all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lowrank.data import Batch
from lowrank.errors import TrainingError
from lowrank.io.adapter import save_adapter
from lowrank.surgery import adapter_copies, set_adapter
from lowrank.train.config import TrainConfig
from lowrank.train.evaluation import is_due
from lowrank.train.gradients import check_values, gradient_checkpointing
from lowrank.train.history import History
from lowrank.train.interrupt import Interrupt
from lowrank.train.loss import losses_of_copies, takes_copies
from lowrank.train.progress import Progress, peak_memory
from lowrank.train.record import Record
from lowrank.train.remedies import Remedies
from lowrank.train.run import CONFIG, RESULTS, RunDirectory
from lowrank.train.seeds import set_seed
from lowrank.train.trainer import Trainer
from lowrank.train.update import Update

# settings of which each adapter may have its own; all others are of the batches
OF_AN_ADAPTER = {
    "output_dir", "overwrite_output_dir", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "optim", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "loraplus_lr_ratio", "loraplus_lr_embedding", "max_grad_norm",
    "run_name",
}  # fmt: skip
# settings that this loop knows too; with any other, adapters are trained one after another
OF_THE_BATCHES = {
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "bf16", "gradient_checkpointing", "max_length", "padding_free",
    "packing", "group_by_length", "completion_only_loss", "assistant_only_loss",
    "dataset_text_field", "token_cache", "eval_strategy", "eval_steps", "logging_steps",
    "disable_tqdm", "project", "seed", "data_seed", "save_strategy", "save_steps",
    "save_total_limit",
}  # fmt: skip


def why_not(model: nn.Module, config: TrainConfig) -> str | None:
    """Why adapters cannot be trained side by side with this; None if they can."""
    if not takes_copies(model):
        return f"{type(model).__name__}.loss has no argument `copies`"
    plain = TrainConfig(config.output_dir)
    for setting in dataclasses.fields(config):
        name = setting.name
        if name not in OF_AN_ADAPTER | OF_THE_BATCHES and (
            getattr(config, name) != getattr(plain, name)
        ):
            return f"{name}={getattr(config, name)!r}"
    return None


def batches_of(config: TrainConfig) -> tuple:
    """What configs have in common whose adapters can share batches."""
    return tuple(
        repr(getattr(config, name)) for name in sorted(OF_THE_BATCHES & vars(config).keys())
    )


@dataclass
class Trainee:
    """An adapter of the model, with the Trainer that would train it alone.

    failure: why it was given up, the others going on.
    """

    adapter: str
    trainer: Trainer
    history: History = field(default_factory=History)
    failure: str | None = None
    remedies: Remedies = field(default_factory=Remedies)
    record: Record = field(init=False)  # when its training begins

    @property
    def config(self) -> TrainConfig:
        return self.trainer.config

    @property
    def total_steps(self) -> int:
        return self.trainer.total_steps

    @property
    def eval_loss(self) -> float | None:
        """The held-out loss after the last step, if it came to that."""
        found = self.history.eval_losses
        whole = self.failure is None and found and found[-1][0] == self.trainer.total_steps
        return found[-1][1] if whole else None


class SideBySide:
    """Trains the adapters of `trainees`, whose configs share their batches, to the last step.

    A batch is repeated, once for each adapter; the gradient of the sum of their losses is to each
    adapter that of its own. So each is trained as it would be alone, but for dropout, whose masks
    are others. What is trained is saved as a Trainer saves it, in each config's output_dir, whose
    last part is the adapter's name.
    """

    def __init__(self, model: nn.Module, trainees: Sequence[Trainee], interrupt: Interrupt) -> None:
        self._model, self._all, self._interrupt = model, list(trainees), interrupt
        first = trainees[0].trainer
        self._feed, self._precision = first.feed, first.precision
        self._evaluation = first.evaluation
        self._total_steps, self._config = first.total_steps, first.config
        self._updates: dict[str, Update] = {}
        self._runs: dict[str, RunDirectory] = {}

    def run(self) -> bool:
        """Take all steps, then save; False: interrupted, and what was trained by then is saved."""
        config, was_training = self._config, self._model.training
        progress = Progress(self._total_steps, config.logging_steps, config.disable_tqdm)
        try:
            for trainee in self._all:
                self._begin(trainee, progress)
            set_adapter(self._model, [t.adapter for t in self._all])
            set_seed(config.seed)
            self._model.train()
            with gradient_checkpointing(self._model, config.gradient_checkpointing):
                whole = self._steps(progress)
            progress.close()
            for trainee in self._living():
                trainee.remedies.on_train_end(trainee)
                self._save(trainee, interrupted=not whole)
        finally:
            progress.close()
            for run in self._runs.values():
                run.close()
            self._model.train(was_training)
            self._model.zero_grad(set_to_none=True)
        return whole

    def _begin(self, trainee: Trainee, progress: Progress) -> None:
        """The optimizer, the files and the record of one adapter."""
        trainer, name = trainee.trainer, trainee.adapter
        set_adapter(self._model, name)  # LoRA+ looks for what trains
        self._updates[name] = Update(
            self._model, trainer.parameters, trainer.config, self._total_steps, trainer.ranks
        )
        run = RunDirectory(trainer.config.output_dir)
        run.write_json(CONFIG, trainer.resolved())
        self._runs[name] = run
        trainee.record = Record(
            run, trainee.history, self._total_steps, len(trainer.train_data),
            self._config.logging_steps, True, trainer.device, progress=progress, name=name,
        )  # fmt: skip

    def _living(self) -> list[Trainee]:
        return [trainee for trainee in self._all if trainee.failure is None]

    def _steps(self, progress: Progress) -> bool:
        self._evaluate()
        while (living := self._living()) and not self._interrupt.requested:
            history = living[0].history  # all of them stand at the same step
            if history.steps == self._total_steps:
                return True
            self._step(history.steps, history.samples, progress)
            if is_due(self._config, history, self._total_steps, len(self._feed.data)):
                self._evaluate()
        return not self._interrupt.requested

    def _step(self, step: int, samples: int, progress: Progress) -> None:
        """One optimizer step of each adapter; a signal waits until it is whole."""
        start, living = time.perf_counter(), self._living()
        counts = self._feed.counts(samples)
        losses = self._backward(self._feed.of_step(samples), counts.labelled, living)
        found: dict[str, tuple[float, float, float]] = {}  # loss, norm, rate
        for trainee, loss in zip(living, losses, strict=True):
            update = self._updates[trainee.adapter]
            rate = update.set_rate(step)
            with self._given_up(trainee):
                (value,), norm = update.measure([loss], first=step == 0)
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise TrainingError(
                        f"step {step + 1}: the loss is {value}, the norm of the gradient {norm}: "
                        "lower learning_rate"
                    )
                update.apply()
                found[trainee.adapter] = value, norm, rate
        # each one's share of what all of them took
        seconds = (time.perf_counter() - start) / len(living)
        shown = []
        for trainee in self._living():
            loss_value, norm, rate = found[trainee.adapter]
            trainee.history.add(counts, loss_value, seconds)
            trainee.record.step(counts, loss_value, norm, rate, seconds)
            trainee.remedies.on_step_end(trainee)
            shown.append(f"{trainee.adapter} {loss_value:.4f}")
        tokens = counts.tokens * len(living)
        progress.show(
            step + 1, "loss " + ", ".join(shown), tokens, seconds * len(living), peak_memory()
        )

    def _backward(self, batches: list[Batch], labelled: int, living: list[Trainee]) -> Tensor:
        """Add the gradients of all losses to .grad; returns the losses [adapters]."""
        scale, total = 1.0 / labelled, 0.0
        for batch in batches:
            with self._copies(living):
                losses = self._losses(batch, living) * scale
                losses.sum().backward()
            total = total + losses.detach()
        return total

    def _evaluate(self) -> None:
        """Record the held-out loss of each adapter, if there is no interrupt."""
        if self._evaluation is None:
            return
        living, feed = self._living(), self._evaluation.feed
        totals = torch.zeros(len(living), dtype=torch.float64)
        self._model.eval()
        try:
            with torch.no_grad(), self._copies(living):
                for batch in feed.in_order(self._config.per_device_eval_batch_size):
                    if self._interrupt.requested:
                        return
                    totals += self._losses(batch, living).cpu()
        finally:
            self._model.train()
        for trainee, total in zip(living, totals.tolist(), strict=True):
            loss = total / sum(feed.data.labelled)
            with self._given_up(trainee):
                if not math.isfinite(loss):
                    raise TrainingError(f"the held-out loss is {loss}: look at data and weights")
                found = {"step": trainee.history.steps, "eval_loss": loss}
                trainee.history.evaluations.append(found)
                trainee.record.evaluation()
                trainee.remedies.on_evaluate(trainee)

    def _losses(self, batch: Batch, living: list[Trainee]) -> Tensor:
        """The sums of the losses of `batch`, one for each adapter."""
        with self._precision.autocast():
            return losses_of_copies(self._model, repeated(batch, len(living)), len(living))

    def _copies(self, living: list[Trainee]) -> contextlib.AbstractContextManager[None]:
        return adapter_copies(self._model, [trainee.adapter for trainee in living])

    @contextlib.contextmanager
    def _given_up(self, trainee: Trainee) -> Iterator[None]:
        """What goes wrong for one adapter ends its training alone."""
        try:
            yield
        except TrainingError as error:
            trainee.failure = str(error)
            trainee.record.say(f"given up: {error}")
            for parameter in trainee.trainer.parameters.values():
                parameter.grad = None

    def _save(self, trainee: Trainee, interrupted: bool) -> None:
        name, run = trainee.adapter, self._runs[trainee.adapter]
        if not trainee.history.steps:
            return
        with self._given_up(trainee):
            check_values(trainee.trainer.parameters, trainee.history.steps, trainee.trainer.ranks)
            save_adapter(self._model, run.path.parent, adapter=name)
            tokenizer = trainee.trainer.tokenizer
            if tokenizer is not None and hasattr(tokenizer, "save"):
                tokenizer.save(run.path)
            run.plot()
            parameters = trainee.trainer.parameters.values()
            result = trainee.record.result(parameters, interrupted)
            run.write_json(RESULTS, result.metrics)


def repeated(batch: Batch, copies: int) -> Batch:
    """The batch's rows, so many times one after the other; it counts what one copy has."""
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    tensors = {name: getattr(batch, name) for name in names}
    return replace(
        batch,
        **{k: t.repeat(copies, *[1] * (t.dim() - 1)) for k, t in tensors.items() if t is not None},
    )
