"""One run of `benchmarks.e2e`, in a process of its own, so that its memory is its own.

`python -m benchmarks.e2e_run SETTINGS` with the JSON of a Run: train SmolLM2-135M on E2E pairs as
the method says, then say on the last line of standard output what it came to, as JSON.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import reset_peak, status_bytes

METHODS = {  # learning rate, quantizer, options of the adapter
    "full": (5e-5, None, None),
    "lora": (2e-4, None, {}),
    "qlora": (2e-4, "nf4", {}),
    "dora": (2e-4, None, {"use_dora": True}),
}
HELD_OUT_SEED = 0  # whatever the run's: all runs are judged alike


@dataclass(frozen=True)
class Run:
    """What a run is made of; equal ones give equal results."""

    method: str
    seed: int
    steps: int
    batch: int
    meanings: int  # that are written out for BLEU
    held_out: int  # pairs for the loss
    gguf: str
    data: str

    def settings(self) -> dict:
        """All but where the inputs lie."""
        return {k: v for k, v in asdict(self).items() if k not in ("gguf", "data")}


def main(run: Run) -> dict:
    """Train, evaluate, write; what it came to."""
    import lowrank
    from lowrank.train import TrainConfig, Trainer

    base = status_bytes("VmRSS")  # torch is imported; what lowrank and its packages take is theirs
    learning_rate, quantizer, adapter = METHODS[run.method]
    model = lowrank.load_model(run.gguf, quantizer=quantizer, dtype=torch.float32)
    tokenizer = lowrank.load_tokenizer(run.gguf)
    torch.manual_seed(run.seed)  # of the adapter's first values
    if adapter is not None:
        model = lowrank.inject(
            model,
            lowrank.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear", **adapter),
        )
    pairs, meanings = held_out(Path(run.data), run.held_out, run.meanings)
    with tempfile.TemporaryDirectory() as name:
        config = TrainConfig(
            output_dir=Path(name) / "run",
            learning_rate=learning_rate,
            max_steps=run.steps,
            per_device_train_batch_size=run.batch,
            max_length=128,
            disable_tqdm=True,
            token_cache=None,
            seed=run.seed,
        )
        rows = training_pairs(Path(run.data), run.steps * run.batch, run.seed)
        reset_peak()
        trainer = Trainer(model, config, rows, pairs, tokenizer)
        result = trainer.train()
        peak = status_bytes("VmHWM") - base
    begin = time.perf_counter()
    written = write(model, tokenizer, list(meanings))
    return {
        **run.settings(),
        "losses": result.losses,
        "loss_before": result.metrics["eval_loss_before"],
        "loss_after": result.metrics["eval_loss_after"],
        "bleu": bleu(written, list(meanings.values())),
        "tokens_per_second": result.metrics["tokens_per_second"],
        "train_seconds": result.metrics["train_seconds"],
        "write_seconds": time.perf_counter() - begin,
        "peak_bytes": peak,
        "trainable": result.metrics["trainable_parameters"],
        "written": dict(zip(list(meanings)[:5], written[:5], strict=True)),
    }


def training_pairs(data: Path, count: int, seed: int) -> list[dict[str, str]]:
    """So many pairs of the training set, drawn by this seed."""
    with gzip.open(data / "e2e_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [_pair(row["mr"], row["ref"]) for row in random.Random(seed).sample(rows, count)]


def held_out(
    data: Path, pairs: int, meanings: int
) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """(pairs for the loss, {meaning: all its sentences}) of the validation set."""
    lines = (data / "e2e_valid.txt").read_text(encoding="utf-8").splitlines()
    rows = [(mr, ref.strip()) for mr, ref in (line.split("||") for line in lines if line)]
    chosen = random.Random(HELD_OUT_SEED)
    sentences: dict[str, list[str]] = {}
    for mr, ref in rows:
        sentences.setdefault(mr, []).append(ref)
    some = chosen.sample(sorted(sentences), meanings)
    return [_pair(*row) for row in chosen.sample(rows, pairs)], {mr: sentences[mr] for mr in some}


def write(model: nn.Module, tokenizer, meanings: list[str], at_once: int = 16) -> list[str]:
    """The sentence that the model takes for likeliest, token by token, for each meaning."""
    import lowrank

    written: list[str] = []
    for start in range(0, len(meanings), at_once):
        prompts = [f"{mr} ->" for mr in meanings[start : start + at_once]]
        written += lowrank.generate(model, tokenizer, prompts, max_new_tokens=80)
    return [" ".join(text.split()) for text in written]


def bleu(written: list[str], sentences: list[list[str]]) -> float:
    """sacrebleu's corpus BLEU, each sentence beside all that people wrote for its meaning."""
    import sacrebleu

    most = max(map(len, sentences))
    references = [[own[i] if i < len(own) else None for own in sentences] for i in range(most)]
    # the data set comes in tokens already
    return sacrebleu.corpus_bleu(written, references, tokenize="none", force=True).score


def _pair(mr: str, ref: str) -> dict[str, str]:
    return {"prompt": f"{mr} ->", "completion": f" {ref}"}


if __name__ == "__main__":
    print(json.dumps(main(Run(**json.loads(sys.argv[1])))))
