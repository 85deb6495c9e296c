"""Merge an adapter into its model, as a new model.

  lowrank merge --model DIR --adapter out --output merged --dtype bfloat16

It is written as a Hugging Face directory, which transformers loads. An adapter trained over
quantized weights belongs to those: give --quantizer and its options as in training, and what it
is added to are the dequantized weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lowrank
from lowrank.cli.options import add_fields
from lowrank.cli.source import Source, from_args
from lowrank.errors import ConfigError


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


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` that becomes `path` if the block ends well, else is removed."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"output: {path} exists; name a directory that does not, or remove it")
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # another's file may have come into it
                folder.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
