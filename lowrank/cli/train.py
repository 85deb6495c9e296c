"""Fine-tune a model on your own examples.

  lowrank train --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --data train.jsonl \\
    --eval-data held_out.jsonl --r 16 --target-modules all-linear --output-dir out
  lowrank train --config out/run.toml --learning-rate 1e-4 --output-dir out2

A TOML file has the tables [run], [train] and [lora]; a flag beats it. The settings a run was made
with are written into its output directory as run.toml, which --config takes.

On several processes, each with a share of every step: torchrun --nproc-per-node 2 -m lowrank train,
and the same flags.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank.cli.options import add_config, add_fields, dump_toml, make, tables_of
from lowrank.cli.output import show
from lowrank.cli.source import ELSEWHERE, Run
from lowrank.data import TokenizedExamples, collate, load_examples
from lowrank.io.atomic import write_text
from lowrank.train import PRESETS, TrainConfig, Trainer, preset, process_group
from lowrank.train.dataset import tokenized
from lowrank.train.distributed import Ranks, alike
from lowrank.train.run import check_output_dir

RESOLVED = "run.toml"


TABLES = {"run": Run, "train": TrainConfig, "lora": lowrank.LoRAConfig}


def add_arguments(parser: argparse.ArgumentParser, tables: Mapping[str, type] = TABLES) -> None:
    add_config(parser)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings to begin with, which the file and the flags beat: "
        + "; ".join(f"{name}: {found.about}" for name, found in PRESETS.items()),
    )
    for name, config in tables.items():
        add_fields(parser, config, name, f"{config.__name__}: [{name}] in a TOML file")


def run(args: argparse.Namespace) -> int:
    with alike():
        source, config, lora = resolve(args)
    with process_group(source.device, config.ddp_timeout) as device:
        ranks = Ranks(config.parallel, config.ddp_timeout)
        with ranks.together():
            made = prepared(dataclasses.replace(source, device=device), config, lora, ranks.first)
        trainer = Trainer(*made)
        output = Path(config.output_dir)
        if ranks.first:
            tables = {"run": source, "train": config, "lora": lora}
            text = dump_toml({name: dataclasses.asdict(table) for name, table in tables.items()})
            write_text(output / RESOLVED, text)
        result = trainer.train()
    if result.interrupted:
        done = f"{len(result.losses)} of {trainer.total_steps} steps"
        line = f"interrupted after {done}; --resume auto goes on; see {output}"
        raise ranks.known(KeyboardInterrupt(line))
    if ranks.first:
        show(args, report(result), {"output_dir": result.output_dir, **result.metrics})
    return 0


def prepared(
    source: Run, config: TrainConfig, lora: lowrank.LoRAConfig, talks: bool
) -> tuple[Any, ...]:
    """What the Trainer takes: model with adapter, settings, examples and tokenizer."""
    if talks:
        check_output_dir(config.output_dir, config.overwrite_output_dir, config.resume)
    field = config.dataset_text_field
    train_data: Any = load_examples(source.data, field)
    eval_data = None if source.eval_data is None else load_examples(source.eval_data, field)

    # adapters that begin with what the weights are need them
    begin_alone = not (lora.starts_from_weight or lora.use_dora or lora.init_lora_weights == "eva")
    model = source.load(sharded=config.parallel == "fsdp" and begin_alone)
    tokenizer = source.load_tokenizer()
    torch.manual_seed(config.seed)  # of the adapter's first values; the Trainer seeds the rest
    weights = source.open_weights() if lora.starts_from_weight else None
    lowrank.inject(model, lora, weights=weights)
    if talks:
        lowrank.print_trainable_parameters(model)
    if lora.init_lora_weights == "eva":
        train_data = tokenized(train_data, "training", config, tokenizer, model)
        lowrank.initialize_eva(model, padded(train_data, config.per_device_train_batch_size, model))
    return model, config, train_data, eval_data, tokenizer


def padded(data: TokenizedExamples, size: int, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """All examples once, `size` at a time, as `initialize_eva` takes them."""
    device = next(model.parameters()).device
    for start in range(0, len(data), size):
        rows = [[i] for i in range(start, min(start + size, len(data)))]
        batch = collate(data, rows, end_to_end=False).to(device)
        names = ("input_ids", "attention_mask", "labels")
        yield {name: getattr(batch, name) for name in names}


def resolve(args: argparse.Namespace, kinds: Mapping[str, type] = TABLES) -> tuple[Any, ...]:
    """The dataclasses of `kinds`: the preset, the file of --config over it, the flags over both."""
    tables = tables_of(args, kinds)
    if args.preset is not None:
        chosen = preset(args.preset).at_rank(tables["lora"].get("r"))
        tables["train"] = {**chosen.train, **tables["train"]}
        tables["lora"] = {**chosen.lora, **tables["lora"]}
    return tuple(make(config, tables[name], ELSEWHERE) for name, config in kinds.items())


def report(result: Any) -> str:
    """What a run came to, in a few lines."""
    lines = [
        f"loss {result.losses[0]:.4f} → {result.losses[-1]:.4f} over {len(result.losses)} steps"
    ]
    if len(result.eval_losses) > 1:
        (_, before), (_, last) = result.eval_losses[0], result.eval_losses[-1]
        after = result.metrics.get("eval_loss_after", last)  # of what is saved
        lines.append(f"held-out loss {before:.4f} → {after:.4f}")
    return "\n".join([*lines, f"saved in {result.output_dir}"])
