"""Try ranks, or any grid of settings, over one frozen model in memory.

  lowrank sweep --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --data train.jsonl \\
    --eval-data held_out.jsonl --target-modules all-linear --output-dir sweep
  lowrank sweep --config out/run.toml --ranks 8 16 --grid learning_rate=1e-4,2e-4 \\
    --output-dir sweep2

Adapters that share batches are trained side by side. What comes out: a table, sweep.md; a plot,
sweep.png; the elbow, the smallest rank that is good enough; and every adapter. lora_alpha keeps its
proportion to r. The flags and the TOML file are those of `lowrank train`, with a table [sweep].
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from lowrank.cli import train
from lowrank.cli.options import Reader, check_types
from lowrank.cli.output import show
from lowrank.data import load_examples
from lowrank.errors import ConfigError
from lowrank.train import sweep
from lowrank.train.run import check_output_dir
from lowrank.train.sweep import RANKS


@dataclass(kw_only=True)
class Sweep:
    """What is tried.

    ranks: the ranks of the scan.
    grid: fields of LoRAConfig and TrainConfig with their values: learning_rate=1e-4,2e-4.
    side_by_side: adapters trained at the same time, where they share batches and fit in memory.
    refine: try the ranks halfway between the best one and those beside it, too.
    longer: train the best two again with so many times the steps; 1 does not.
    """

    ranks: list[int] = field(default_factory=lambda: list(RANKS))
    grid: list[str] = field(default_factory=list)
    side_by_side: int = 4
    refine: bool = True
    longer: float = 2.0

    @property
    def values(self) -> dict[str, list[Any]]:
        """{field: values}, the ranks first."""
        tried: dict[str, list[Any]] = {}
        for part in self.grid:
            name, equals, words = part.partition("=")
            if not equals or "" in words.split(","):
                raise ConfigError(f"grid: expected FIELD=VALUE,VALUE; got {part!r}")
            read = Reader([int, float, True, False, None, str])
            name = name.replace("-", "_")
            if name in tried:
                raise ConfigError(f"grid: expected {name} once; got {part!r} too")
            tried[name] = [read(word) for word in words.split(",")]
        return {"r": list(self.ranks), **tried}

    def __post_init__(self) -> None:
        check_types(self)


KINDS = {**train.TABLES, "sweep": Sweep}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser, KINDS)


def run(args: argparse.Namespace) -> int:
    settings, config, lora, tried = train.resolve(args, KINDS)
    if settings.eval_data is None:
        raise ConfigError("eval_data is needed: a sweep compares held-out losses: pass --eval-data")
    grid = tried.values
    check_output_dir(config.output_dir, config.overwrite_output_dir)
    data = [
        load_examples(path, config.dataset_text_field)
        for path in (settings.data, settings.eval_data)
    ]
    result = sweep(
        settings.load(),
        lora,
        config,
        *data,
        settings.load_tokenizer(),
        grid=grid,
        side_by_side=tried.side_by_side,
        refine=tried.refine,
        longer=tried.longer,
    )
    show(args, f"{result}\n\nsaved in {result.output_dir}", result.to_dict())
    if result.interrupted:
        raise KeyboardInterrupt(f"interrupted; see {result.output_dir}")
    return 0
