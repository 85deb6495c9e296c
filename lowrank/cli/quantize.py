"""Quantize a model, as a new directory that loads as it is.

  lowrank quantize --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --output nf4
  lowrank quantize --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 \\
    --format bitsandbytes --output for-transformers

Train, generate and merge then take the directory as --model, without --quantizer. The format
lowrank holds any scheme; bitsandbytes holds nf4, fp4 and int8, for transformers too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import lowrank
from lowrank.cli.options import Reader
from lowrank.cli.output import show
from lowrank.cli.source import Source, add_source, from_args
from lowrank.errors import ConfigError
from lowrank.io.atomic import new_directory
from lowrank.io.quantized import quantized_modules
from lowrank.models.saving import to_bitsandbytes
from lowrank.nn.quant_weight import quant_weights
from lowrank.surgery.targets import matches

FORMATS = ("lowrank", "bitsandbytes")
DENSE = ["lm_head", "embed_tokens"]  # what loading leaves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Reader([Path]), metavar="DIR", help="where to write"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="lowrank", help="of the files (default: lowrank)"
    )
    add_source(parser)


def run(args: argparse.Namespace) -> int:
    source = from_args(args)
    if source.quantizer is None:
        raise ConfigError("quantizer: expected a scheme; got none: pass --quantizer nf4")
    with new_directory(args.output) as folder:
        if args.format == "bitsandbytes":
            _check_bitsandbytes(source)
        model, tokenizer = source.load(), source.load_tokenizer()
        lowrank.save_model(model, folder, format=args.format)
        tokenizer.save(folder)
        written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = _sizes(model)
    layers = "{layers} layers of {weights} weights at {bits:.2f} bits".format_map(found)
    text = (
        f"{layers}: {_size(found['quantized_bytes'])}; "
        f"{found['others']} other parameters: {_size(found['other_bytes'])}\n"
        f"{source.model} in {source.quantizer}, {_size(written)}: {args.output}"
    )
    show(args, text, {**found, "file_bytes": written, "output": args.output})
    return 0


def _check_bitsandbytes(source: Source) -> None:
    """Refuse what the format cannot hold before all is quantized: by one row of each layer."""
    if source.embeddings:
        raise ConfigError(
            "model.embed_tokens: expected a linear layer, as bitsandbytes quantizes; got "
            "--embeddings; leave it out, or pass --format lowrank"
        )
    shapes, quantizer = source.open_weights().shapes, source.make_quantizer()
    if quantized_modules(shapes):
        return  # loading refuses it
    for key, shape in shapes.items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "weight" and len(shape) == 2 and not matches(layer, DENSE):
            to_bitsandbytes(layer, quantizer.quantize(torch.linspace(-1, 1, shape[1])[None]))


def _sizes(model: nn.Module) -> dict[str, float]:
    """What a quantized model holds; others: the parameters that are not quantized."""
    storages = [module.storage for module in quant_weights(model).values()]
    count = sum(torch.Size(storage.shape).numel() for storage in storages)
    held = sum(storage.nbytes for storage in storages)
    dense = [p for p in model.parameters() if p.is_floating_point()]
    return {
        "layers": len(storages),
        "weights": count,
        "bits": 8 * held / count,
        "quantized_bytes": held,
        "others": sum(p.numel() for p in dense),
        "other_bytes": sum(p.nbytes for p in dense),
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
