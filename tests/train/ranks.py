"""Runs of several processes: cases whose outcomes test_distributed.py looks at afterwards.

python -m tests.train.ranks FOLDER SEED RANK SIZE CASE ...
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank.data import epoch_order
from lowrank.io.safetensors import write_safetensors
from lowrank.optim.shards import whole
from lowrank.train import Callback, TrainConfig, Trainer

from .support import VOCAB, Small, examples
from .test_decoder_training import decoder

STEPS = 20


def rows(seed: int, count: int = 17) -> list[dict]:
    """Steps of eight examples: the last of an epoch of 17 has one, and one rank then none."""
    return examples(count, torch.Generator().manual_seed(seed))


def adapted(seed: int, of_rank: int = 0, dropout: float = 0.0, method: str = "lora") -> nn.Module:
    """A tiny decoder in NF4; its adapter begins with other values on each rank."""
    torch.manual_seed(seed)
    model = lowrank.quantize(decoder(), "nf4")
    torch.manual_seed(seed + of_rank)
    config = lowrank.LoRAConfig(
        r=4, target_modules="all-linear", lora_dropout=dropout, method=method
    )
    return lowrank.inject(model, config)


def settings(folder: Path, ranks: int, **more) -> TrainConfig:
    """Steps of eight examples, over however many ranks."""
    values = {
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // ranks,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "adam_epsilon": 1e-4,  # above the rounding of a gradient, which is else a step of its own
        "save_strategy": "no",
        **more,
    }
    return TrainConfig(folder, **values)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, config: TrainConfig, *arguments, **options) -> dict:
    """Train; what every rank can tell of it."""
    result = Trainer(model, config, *arguments, **options).train()
    return {
        "losses": result.losses,
        "eval_losses": result.eval_losses,
        "interrupted": result.interrupted,
        "trained": trained(model),
    }


class Case:
    """What a case is given: its folder, the seed of its input, this rank and how many there are."""

    def __init__(
        self, folder: Path, seed: int, rank: int = 0, ranks: int = 1, parallel: str | None = None
    ) -> None:
        self.folder, self.seed, self.rank, self.ranks = folder, seed, rank, ranks
        self.parallel = parallel

    def settings(self, name: str = "run", **more) -> TrainConfig:
        return settings(self.folder / name, self.ranks, parallel=self.parallel, **more)


class Sent(TorchDispatchMode):
    """Counts the bytes of what goes to the other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = [t for arg in args for t in _tensors(arg)]
            self.bytes[name] = self.bytes.get(name, 0) + sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def equal(case: Case) -> dict:
    """Quantized, accumulated, clipped, evaluated; the last step of each epoch has one example."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("lowrank")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    sent = Sent()
    model = adapted(case.seed, case.rank)
    with sent:
        found = train(model, case.settings(eval_steps=5), rows(case.seed), rows(case.seed + 1, 5))
    logger.removeHandler(handler)
    return {**found, "heard": heard, "sent": sent.bytes}


def gradient(case: Case) -> dict:
    """One step of plain gradient descent at rate 1: what changes is the gradient."""
    torch.manual_seed(case.seed)
    model = Small()
    config = case.settings(
        max_steps=1, optim="sgd", learning_rate=1.0, warmup_ratio=0.0, max_grad_norm=0.0,
        weight_decay=0.0,
    )  # fmt: skip
    return train(model, config, rows(case.seed))


def frozen_a(case: Case) -> dict:
    """LoRA-FA: A is random and frozen, and not the same on the ranks before the run."""
    model = adapted(case.seed, case.rank, method="lora_fa")
    found = train(model, case.settings(max_steps=4), rows(case.seed))
    tensors = {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}
    return {**found, "trained": {**found["trained"], **tensors}}


def best(case: Case) -> dict:
    """The metric differs between the ranks; that of the first counts, on all."""
    found: list[float] = []

    def metric(model: nn.Module) -> dict[str, float]:
        found.append([0.1, 0.3, 0.2, 0.2, 0.1][len(found)] + 5 * len(found) * case.rank)
        return {"score": found[-1]}

    config = case.settings(
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        early_stopping_patience=2,
    )
    model = adapted(case.seed, case.rank)
    return train(model, config, rows(case.seed), rows(case.seed + 1, 5), compute_metrics=metric)


def spoken() -> list[dict]:
    """Shakespeare, a letter a token, as the vocabulary of stories260K has them."""
    data = Path(os.environ["LOWRANK_TEST_DATA"])
    parts = (data / "tinyshakespeare.txt").read_text()[:20_000].split("\n\n")
    return [{"input_ids": [1, *(3 + byte for byte in part[:100].encode())]} for part in parts]


def real(case: Case, model: nn.Module, data: list[dict], **more) -> dict:
    """A real model in NF4 on real text, of as many lengths as there are."""
    torch.manual_seed(case.seed)
    lowrank.inject(model, lowrank.LoRAConfig(r=8, target_modules="all-linear"))
    return train(model, case.settings(**{"learning_rate": 1e-3, **more}), data, data[:9])


def stories(case: Case, **more) -> dict:
    """stories260K, by default for 20 steps of the usual kind."""
    data = Path(os.environ["LOWRANK_TEST_DATA"])
    model = lowrank.load_model(data / "stories260K", quantizer="nf4")
    return real(case, model, spoken(), **more)


def stories_checkpointed(case: Case) -> dict:
    return stories(case, gradient_checkpointing=True)


def stories_selective(case: Case) -> dict:
    return stories(case, gradient_checkpointing="selective")


def stories_bf16(case: Case) -> dict:
    """One step of plain gradient descent: what is computed from its result is rounded anew."""
    more = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "warmup_ratio": 0.0}
    return {**stories(case, bf16=True, **more), "eval_losses": []}


def smollm2(case: Case) -> dict:
    """SmolLM2-135M, for a few steps; the letters are numbers of tokens like others."""
    model = lowrank.load_model(os.environ["LOWRANK_SMOLLM2"], quantizer="nf4")
    data = [{"input_ids": row["input_ids"][:20]} for row in spoken()]
    return real(case, model, data, max_steps=3)


class AtStep(Callback):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable) -> None:
        self.step, self.act = step, act

    def on_step_end(self, loop) -> None:
        if loop.history.steps == self.step:
            self.act(loop)


def terminated(case: Case) -> dict:
    """The last rank is sent SIGTERM in step 3."""
    ends = AtStep(3, lambda loop: os.kill(os.getpid(), signal.SIGTERM))
    callbacks = [ends] if case.rank == case.ranks - 1 else []
    config = case.settings(save_strategy="steps")
    return train(adapted(case.seed), config, rows(case.seed), callbacks=callbacks)


def stopped(case: Case) -> dict:
    """The last rank wants to stop."""
    callbacks = [AtStep(3, lambda loop: loop.stop())] if case.rank == case.ranks - 1 else []
    return train(adapted(case.seed), case.settings(), rows(case.seed), callbacks=callbacks)


def resumed(case: Case) -> dict:
    """With dropout: ten steps, and the same again from the checkpoint of step 5."""
    model = adapted(case.seed, dropout=0.3)
    config = case.settings("whole", max_steps=10, save_strategy="steps", save_steps=5)
    whole = train(model, config, rows(case.seed))
    model = adapted(case.seed + 1, dropout=0.3)
    model.load_state_dict(adapted(case.seed, dropout=0.3).state_dict())
    checkpoint = case.folder / "whole" / "checkpoint-5"
    config = case.settings("again", max_steps=10, resume=checkpoint)
    again = train(model, config, rows(case.seed))
    return {
        "trained": {
            **{f"whole {name}": p for name, p in whole["trained"].items()},
            **{f"again {name}": p for name, p in again["trained"].items()},
        },
        "losses": [whole["losses"], again["losses"]],
    }


CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}


def half(case: Case) -> dict:
    """Six steps of twelve, for others to go on with."""
    name = f"half-{case.ranks}"
    config = case.settings(name, max_steps=6, save_strategy="steps", **CONSTANT)
    return train(adapted(case.seed), config, rows(case.seed))


def other_half(case: Case) -> dict:
    """The rest of what one process began or, in one process, of what two began."""
    began = case.folder.parent / "half" / f"half-{3 - case.ranks}"
    config = case.settings(max_steps=12, resume=began, **CONSTANT)
    return train(adapted(case.seed), config, rows(case.seed))


class NotANumber(Small):
    """Has no loss for the last word."""

    def forward(self, input_ids):
        return super().forward(input_ids) / (input_ids != VOCAB - 1).all()


def not_finite(case: Case) -> dict:
    """One example of the first epoch's second step has no loss; one rank alone has it."""
    torch.manual_seed(case.seed)
    data = [{"input_ids": [2 + i, 3, 4]} for i in range(16)]
    data[epoch_order(16, case.seed, 0)[9]] = {"input_ids": [VOCAB - 1, 5]}
    config = case.settings(max_steps=4, seed=case.seed)
    return {"said": error_of(lambda: train(NotANumber(), config, data))}


def short_of_memory(case: Case) -> dict:
    """On the last rank memory does not suffice in step 2, once, and batches are halved there."""
    model, calls = adapted(case.seed), []

    whole = model.loss

    def loss(*arguments, **options):
        calls.append(arguments)
        if case.rank == case.ranks - 1 and len(calls) == 5:
            raise MemoryError
        return whole(*arguments, **options)

    model.loss = loss
    config = case.settings(max_steps=4, auto_find_batch_size=True, eval_steps=2)
    found = train(model, config, rows(case.seed), rows(case.seed + 1, 5))
    return {**found, "calls": len(calls)}


def left(case: Case) -> dict:
    """The last rank raises an error of its own in step 2, and its process lives on."""

    def fail(loop) -> None:
        raise ValueError("mine alone")

    callbacks = [AtStep(2, fail)] if case.rank == case.ranks - 1 else []
    begin = time.monotonic()
    model, config = adapted(case.seed), case.settings()
    said = error_of(lambda: train(model, config, rows(case.seed), callbacks=callbacks))
    dist.barrier()  # of the caller's own group, which is as it was
    return {"said": said, "seconds": time.monotonic() - begin}


def error_of(call: Callable) -> str:
    """What it raises, as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(case: Case) -> dict:
    """What every rank is told when they do not agree; then a run in which they do."""
    said, own = [], case.rank
    model, other = adapted(case.seed), adapted(case.seed + own)
    data = rows(case.seed)
    last = {"input_ids": [5, 6, 7 + own]}
    wrong = [
        (model, {"learning_rate": 1e-3 * (1 + own), "warmup_ratio": 0.1 * own}, data),
        (model, {}, [*data, last]),
        (other, {}, data),
        (model, {}, data[:1]),
        (model, {}, [] if own else data),
    ]
    for i, (of_rank, more, examples_) in enumerate(wrong):
        config = case.settings(f"wrong-{i}", **more)
        said.append(error_of(partial(train, of_rank, config, examples_)))
    return {"said": said, "wrote": [path.name for path in case.folder.glob("wrong-*")]}


# of a module's fixture; those of real models are by themselves
CASES = (
    equal, gradient, frozen_a, best, terminated, stopped, resumed, half, other_half, not_finite,
    short_of_memory, refused, left,
)  # fmt: skip
REAL = (stories, stories_checkpointed, stories_selective, stories_bf16, smollm2)


def main(
    cases: Iterable[Callable], parallel: str | None, folder: str, seed: str, rank: str, ranks: str,
    *names: str,
) -> None:  # fmt: skip
    """Run those of the cases that are named."""
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(ranks),
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    known = {case.__name__: case for case in cases}
    for name in names:
        at = Path(folder) / name
        at.mkdir(exist_ok=True)
        write(at, rank, known[name](Case(at, int(seed), int(rank), int(ranks), parallel)))
    dist.destroy_process_group()


def write(at: Path, rank: str, found: dict) -> None:
    write_safetensors(at / f"{rank}.safetensors", found.pop("trained", {}))
    (at / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main((*CASES, *REAL), None, *sys.argv[1:])
