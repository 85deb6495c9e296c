"""TRL's SFTTrainer, one step at a time.

Its own loop runs in a thread, and waits before each step until it is told to go on. It gets the
token ids that everybody gets, in their order; how it collates them, and what it measures beside
the loss, is its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from torch import nn

from benchmarks.training_data import BATCH


def begin(
    model: nn.Module, directory: Path, learning_rate: float, batches: list
) -> Callable[[int], float]:
    """What runs the next step of an SFTTrainer and returns its loss."""
    import datasets
    import transformers
    import trl
    from torch.utils.data import SequentialSampler

    going, done = threading.Semaphore(0), threading.Semaphore(0)
    losses: list[float] = []
    failed: list[BaseException] = []

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            going.acquire()

        def on_step_end(self, args, state, control, **_):
            done.release()

    class Trainer(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    args = trl.SFTConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=len(batches),
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,  # as torch.optim.AdamW has it
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list([row for batch in batches for row in batch]),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
        callbacks=[InTurn()],
    )

    def run() -> None:
        try:
            trainer.train()
        except BaseException as error:  # for whoever waits
            failed.append(error)
            done.release()

    threading.Thread(target=run, daemon=True).start()

    def step(index: int) -> float:
        going.release()
        done.acquire()
        if failed:
            raise failed[0]
        assert len(losses) == index + 1, "steps come one after another"
        return losses[index]

    return step
