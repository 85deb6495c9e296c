"""Continue a prompt, or answer it.

lowrank generate --model DIR --adapter out --prompt "Once upon a time"
lowrank generate --model DIR --chat --prompt "What is the capital of Japan?"
cat prompt.txt | lowrank generate --model DIR
"""

from __future__ import annotations

import argparse
import sys

import lowrank
from lowrank.cli.options import Reader, add_fields
from lowrank.cli.output import show
from lowrank.cli.source import Source, from_args
from lowrank.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Reader([str]), metavar="DIR", help="an adapter to load onto the model"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to continue (default: standard input)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt as a user's turn, through the chat template",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens to write at most (default: 128)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="sample from the N likeliest tokens only"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="sample from the likeliest tokens that make up X"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    add_fields(parser, Source, "source", "the model")


def run(args: argparse.Namespace) -> int:
    source = from_args(args)
    prompt = _standard_input() if args.prompt is None else args.prompt
    if not prompt:
        raise DataError(
            "prompt: expected some text; got none: pass --prompt, or write to standard input"
        )
    model, tokenizer = source.load(), source.load_tokenizer()
    if args.adapter is not None:
        source.load_adapter(model, args.adapter)
    text = lowrank.generate(
        model,
        tokenizer,
        [{"role": "user", "content": prompt}] if args.chat else prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    show(args, text, {"prompt": prompt, "text": text})
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompt: expected standard input in {error.encoding}; {error.reason} at byte "
            f"{error.start}"
        ) from None
