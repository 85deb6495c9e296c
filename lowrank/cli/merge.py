"""Merge an adapter into its model, as a new model.

  lowrank merge --model DIR --adapter out --output merged --dtype bfloat16

It is written as a Hugging Face directory, which transformers loads. An adapter trained over
quantized weights belongs to those: give --quantizer and its options as in training, and what it
is added to are the dequantized weights.

  lowrank merge --model DIR --quantizer nf4 --adapter out --output merged --quantized

With --quantized the weights stay quantized, in lowrank's format. What their codes cannot take,
which is most of it, is an adapter of half the rank in the folder residual; shares are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lowrank
from lowrank.cli.options import Reader, add_fields
from lowrank.cli.output import show
from lowrank.cli.source import Source, from_args
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
    add_fields(parser, Source, "source", "the model")


def run(args: argparse.Namespace) -> int:
    source = from_args(args)
    if args.residual_rank is not None and not args.quantized:
        raise ConfigError("residual-rank: belongs to --quantized; got it without")
    report = None
    with new_directory(args.output) as folder:
        model, tokenizer = source.load(), source.load_tokenizer()
        source.load_adapter(model, args.adapter)
        if args.quantized:
            report = lowrank.merge_quantized(model, residual_rank=args.residual_rank)
            if report.residual is not None:
                lowrank.save_adapter(model, folder / RESIDUAL)
                lowrank.unload(model)
            lowrank.save_model(model, folder, format="lowrank")
        else:
            lowrank.merge_and_unload(model, dtype=source.torch_dtype)
            lowrank.save_model(model, folder, source.torch_dtype)
        tokenizer.save(folder)
    into = source.quantizer if args.quantized else source.dtype
    text = f"merged {args.adapter} into {source.model}, {into}: {args.output}"
    show(args, text if report is None else f"{report}\n{text}", {"output": args.output})
    return 0
