"""One of several processes of a run in which something goes wrong; test_rank_faults.py starts them.

python -m tests.train.faulty_ranks FOLDER SEED RANK SIZE STORE PARALLEL FAULT
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lowrank.train import Trainer

from .faults import Files, last_call
from .ranks import AtStep, adapted, rows, settings

STEPS, SAVES = 12, 4


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(model: nn.Module, act: Callable[[], None], training: bool = True, at: int = 16):
    """Have the model `act` in the middle of its forward of number `at`, of those that train."""
    calls: list[bool] = []

    def hook(*_) -> None:
        if model.training is training:
            calls.append(True)
            if len(calls) == at:
                act()

    model.model.layers[1].register_forward_pre_hook(hook)


def fail() -> None:
    raise KeyError("of this rank alone")


def no_room() -> None:
    """No file of this process may be longer than a few bytes: a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def room() -> None:
    """As before, for what is said to a file in the end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(
    folder: str, seed: str, rank: str, ranks: str, store: str, parallel: str, fault: str
) -> None:
    out, first, last = Path(folder) / "run", rank == "0", int(rank) == int(ranks) - 1
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks),
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    model = adapted(int(seed), dropout=0.3)
    more: dict = {}
    callbacks = []
    if fault == "killed in a step" and last:
        in_a_step(model, kill)  # of step 8, two forwards a step
    if fault == "the first is killed in a step" and first:
        in_a_step(model, kill)
    if fault == "killed while evaluating" and last:
        in_a_step(model, kill, training=False, at=2)
    if fault == "silent" and last:
        in_a_step(model, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    if fault == "silent":
        more = {"ddp_timeout": 5.0}
    if fault == "fails and lives on" and last:
        in_a_step(model, fail)
    if fault == "disk full" and first:
        callbacks = [AtStep(6, lambda loop: no_room())]
    if fault == "killed in a save" and first:
        number = torch.Generator().manual_seed(int(seed))
        calls = int(torch.randint(1, 30, (), generator=number))
        hooked = Files(out, last_call(calls))
        callbacks = [AtStep(7, lambda loop: hooked.__enter__())]
    config = settings(
        out, int(ranks), max_steps=STEPS, save_strategy="steps", save_steps=SAVES, eval_steps=6,
        resume="auto", parallel=parallel, **{"ddp_timeout": 60.0, **more},
    )  # fmt: skip
    data = rows(int(seed))
    trainer = Trainer(model, config, data, data[:5], callbacks=callbacks)
    try:
        trainer.train()
    except KeyError:
        time.sleep(1000)
    finally:
        room()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
