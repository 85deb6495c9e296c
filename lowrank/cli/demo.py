"""Fine-tune a small model, to see that it works.

  lowrank demo --tiny
  lowrank demo --model SmolLM2.gguf

The tiny model has 0.5 million parameters and comes with lowrank; `make demo` fetches the other.
QLoRA: NF4 with double quantization on all linear layers of each block, LoRA of rank 16, loss on the
completion alone. The data are the docstrings of the running Python's own standard library.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank
from lowrank.cli.options import Reader
from lowrank.cli.output import show
from lowrank.cli.source import Source
from lowrank.data.stdlib import instruction_set
from lowrank.errors import ConfigError
from lowrank.train import TrainConfig, Trainer
from lowrank.train.run import METRICS, PLOT, check_output_dir

TINY = Path(__file__).parent / "tiny"
OUTPUT = Path("demo-out")

CHECK_FAILED = 1


@dataclass(frozen=True)
class Budget:
    """How long to train, and on how much to measure."""

    steps: int
    batch: int
    learning_rate: float
    held_out: int
    new_tokens: int = 40


TINY_BUDGET = Budget(steps=150, batch=16, learning_rate=2e-3, held_out=200)
# A step is about 300 tokens: one second or two on two cores, and six minutes are allowed in all.
MODEL_BUDGET = Budget(steps=60, batch=8, learning_rate=1e-3, held_out=64)

YOUR_OWN = """
The same with your own model and data, JSON lines of {{"prompt": ..., "completion": ...}}:

  lowrank train --model {model} --quantizer nf4 \\
    --data train.jsonl --eval-data held_out.jsonl \\
    --r 16 --lora-alpha 32 --target-modules all-linear --output-dir out
  lowrank generate --model {model} --quantizer nf4 --adapter out --prompt ..."""

Example = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tiny",
        action="store_true",
        help="the model that comes with lowrank: under a minute, no download",
    )
    which.add_argument(
        "--model",
        type=Reader([str]),
        metavar="PATH",
        help="a Hugging Face directory, a .gguf file, or a name on the hub",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"optimizer steps (default: {MODEL_BUDGET.steps}, tiny: {TINY_BUDGET.steps})",
    )
    parser.add_argument(
        "--output-dir", type=Reader([Path]), metavar="DIR",
        help=f"refused if it holds a run (default: {OUTPUT}, where an earlier demo is replaced)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    budget = TINY_BUDGET if args.tiny else MODEL_BUDGET
    steps = budget.steps if args.steps is None else args.steps
    if steps < 1:
        raise ConfigError(f"steps: expected at least 1; got {steps}")
    source = Source(
        model=str(TINY) if args.tiny else args.model, quantizer="nf4", double_quant=True
    )
    config = TrainConfig(
        output_dir=args.output_dir or OUTPUT,
        overwrite_output_dir=args.output_dir is None,
        max_steps=steps,
        per_device_train_batch_size=budget.batch,
        learning_rate=budget.learning_rate,
        warmup_ratio=0.05,
        max_length=256,
        eval_steps=max(1, steps // 4),
    )
    check_output_dir(config.output_dir, config.overwrite_output_dir, config.resume)
    train, held_out = instruction_set()
    subset = spread(held_out, budget.held_out)
    shown = spread(subset, 3)
    say("model", f"{source.model}, NF4 with double quantization")
    say("data", f"Python {platform.python_version()}'s standard library, signatures → docstrings")
    say("", f"{len(train)} pairs to train on, {len(held_out)} held out: no module is in both")
    say("budget", f"{steps} steps of {budget.batch} pairs at {budget.learning_rate:g}")
    say("", f"held-out loss over the same {len(subset)} pairs, before and after\n")

    model, tokenizer = source.load(), source.load_tokenizer()
    before = answers(model, tokenizer, shown, budget)
    torch.manual_seed(config.seed)
    lowrank.inject(model, lowrank.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    lowrank.print_trainable_parameters(model)
    result = Trainer(model, config, train, subset, tokenizer=tokenizer).train()
    if result.interrupted:
        done = f"{len(result.losses)} of {steps} steps"
        raise KeyboardInterrupt(f"interrupted after {done}; see {result.output_dir}")
    after = answers(model, tokenizer, shown, budget)

    for example, old, new in zip(shown, before, after, strict=True):
        print(f"\n{example['prompt'].strip()}")
        say("before", old)
        say("after", new)
        say("docstring", example["completion"])
    print()
    (_, loss_before), (_, loss_after) = result.eval_losses[0], result.eval_losses[-1]
    say("held out", f"loss {loss_before:.4f} before, {loss_after:.4f} after")
    say("speed", f"{result.metrics['tokens_per_second']:.0f} tokens/s")
    say("memory", f"{result.metrics['peak_memory_bytes'] / 2**30:.2f} GiB at the peak")
    say("adapter", f"{result.output_dir}")
    say("plot", f"{result.output_dir / PLOT}")
    say("metrics", f"{result.output_dir / METRICS}")
    del model
    if not same_again(source, result.output_dir, shown, after, budget):
        return CHECK_FAILED
    say("time", f"{time.perf_counter() - begin:.0f} s in all")
    values = {"output_dir": result.output_dir, **result.metrics}
    show(args, YOUR_OWN.format(model=source.model), values)
    return 0


def say(what: str, text: str) -> None:
    print(f"{what:10}{text}", flush=True)


def spread(examples: list[Example], count: int) -> list[Example]:
    """`count` of the examples, evenly spaced: always the same ones, and of every part."""
    count = min(count, len(examples))
    return [examples[(2 * i + 1) * len(examples) // (2 * count)] for i in range(count)]


def answers(model: nn.Module, tokenizer: Any, examples: list[Example], budget: Budget) -> list[str]:
    """What the model says to each prompt, greedily, on one line."""
    prompts = [example["prompt"] for example in examples]
    texts = lowrank.generate(model, tokenizer, prompts, max_new_tokens=budget.new_tokens)
    return [" ".join(text.split()) for text in texts]


def same_again(
    source: Source, adapter: Path, examples: list[Example], trained: list[str], budget: Budget
) -> bool:
    """Whether a freshly loaded model with the adapter from disk answers as `trained`; says so."""
    model, tokenizer = source.load(), source.load_tokenizer()
    lowrank.load_adapter(model, adapter)
    found = answers(model, tokenizer, examples, budget)
    if found == trained:
        say("reloaded", "a new model with the adapter from disk gives the same answers")
        return True
    say("FAILED", f"a new model with the adapter from {adapter} gives other answers:")
    for example, was, now in zip(examples, trained, found, strict=True):
        print(f"\n{example['prompt'].strip()}")
        say("trained", was)
        say("reloaded", now)
    return False
