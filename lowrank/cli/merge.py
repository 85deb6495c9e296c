"""Merge an adapter into its model, as a new model.

  lowrank merge --config out/run.toml --adapter out --output merged --data held_out.jsonl
  lowrank merge --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --adapter out \\
    --output merged-bf16 --dtype bfloat16

It is written as a Hugging Face directory, which transformers loads. An adapter trained over
quantized weights belongs to those: give --quantizer and its options as in training, as the
training's run.toml does, and what it is added to are the dequantized weights.

  lowrank merge --config out/run.toml --adapter out --output merged-nf4 --quantized

With --quantized the weights stay quantized, in lowrank's format. What their codes cannot take,
which is most of it, is an adapter of half the rank in the folder residual; shares are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lowrank
from lowrank.cli.measure import HeldOut, table
from lowrank.cli.options import Reader, add_fields, given_fields, make
from lowrank.cli.output import show
from lowrank.cli.source import add_source, from_args
from lowrank.errors import ConfigError
from lowrank.io.atomic import new_directory

RESIDUAL = "residual"  # the folder of the adapter with what quantized weights cannot take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, type=Reader([str]), metavar="DIR", help="the adapter to merge"
    )
    parser.add_argument(
        "--output", required=True, type=Reader([Path]), metavar="DIR", help="where to write"
    )
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="keep quantized weights, with a residual adapter",
    )
    parser.add_argument(
        "--residual-rank",
        type=int,
        metavar="R",
        help="rank of the residual adapter, 0 for none (default: half of the adapter's)",
    )
    add_source(parser)
    add_fields(
        parser,
        HeldOut,
        "held_out",
        "held-out data, measured without the adapter, with it and merged",
    )


def run(args: argparse.Namespace) -> int:
    source = from_args(args)
    if args.residual_rank is not None and not args.quantized:
        raise ConfigError("residual-rank: belongs to --quantized; got it without")
    report = None
    held_out = make(HeldOut, given_fields(args, "held_out"))
    measured = {}
    with new_directory(args.output) as folder:
        model, tokenizer = source.load(), source.load_tokenizer()
        sets = held_out.tokenized(model, tokenizer)
        measured["base"] = held_out.measure(model, sets)
        source.load_adapter(model, args.adapter)
        measured["adapter"] = held_out.measure(model, sets)
        if args.quantized:
            report = lowrank.merge_quantized(model, residual_rank=args.residual_rank)
            if report.residual is not None:
                model.name_or_path = str(args.output)  # the base of that adapter
                lowrank.save_adapter(model, folder / RESIDUAL)
                lowrank.unload(model)
            lowrank.save_model(model, folder, format="lowrank")
        else:
            lowrank.merge_and_unload(model, dtype=source.torch_dtype)
            lowrank.save_model(model, folder, source.torch_dtype)
        tokenizer.save(folder)
        del model  # one of them at a time
        if sets:
            merged = lowrank.load_model(folder, dtype=source.torch_dtype, device=source.device)
            if (folder / RESIDUAL).exists():
                merged.name_or_path = str(args.output)
                lowrank.load_adapter(merged, folder / RESIDUAL)
            measured["merged"] = held_out.measure(merged, sets)
    into = source.quantizer if args.quantized else source.dtype
    text = f"merged {args.adapter} into {source.model}, {into}: {args.output}"
    if sets:
        text = f"{table(measured)}\n{text}"
    if report is not None:
        text = f"{report}\n{text}"
    show(args, text, {"output": args.output, "measured": measured if sets else None})
    return 0
