"""Merge an adapter into its model, as a new model.

  lowrank merge --model DIR --adapter out --output merged --dtype bfloat16

It is written as a Hugging Face directory, which transformers loads. An adapter trained over
quantized weights belongs to those: give --quantizer and its options as in training, and what it
is added to are the dequantized weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lowrank
from lowrank.cli.options import add_fields
from lowrank.cli.source import Source, from_args
from lowrank.io.atomic import new_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter to merge")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write")
    add_fields(parser, Source, "source", "the model")


def run(args: argparse.Namespace) -> int:
    source = from_args(args)
    with new_directory(args.output) as folder:
        model, tokenizer = source.load(), source.load_tokenizer()
        source.load_adapter(model, args.adapter)
        lowrank.merge_and_unload(model, dtype=source.torch_dtype)
        lowrank.save_model(model, folder, source.torch_dtype)
        tokenizer.save(folder)
    print(f"merged {args.adapter} into {source.model}, {source.dtype}: {args.output}")
    return 0
