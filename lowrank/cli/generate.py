"""Continue prompts, or answer them; a single one is shown as it is written.

  lowrank generate --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Once upon a time"
  lowrank generate --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --adapter out \\
    --chat --prompt "What is 7 + 7?"
  lowrank generate --config out/run.toml --prompt "Once" --prompt "Twice" --stop "." --json
  lowrank generate --config out/run.toml --temperature 0.8 --top-p 0.9 < prompt.txt

With --config and a training's run.toml, the model is that of the training.
"""

from __future__ import annotations

import argparse
import sys

import lowrank
from lowrank.cli.options import Reader
from lowrank.cli.output import show
from lowrank.cli.source import add_source, from_args
from lowrank.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Reader([str]), metavar="DIR", help="an adapter to load onto the model"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to continue; again for each of several, which are written together "
        "(default: standard input)",
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
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1, tokens that are there already become less likely (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; again for each of several",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    add_source(parser)


def run(args: argparse.Namespace) -> int:
    source = from_args(args)
    prompts = [_standard_input()] if args.prompt is None else args.prompt
    for prompt in prompts:
        if not prompt:
            raise DataError(
                "prompt: expected some text; got none: pass --prompt, or write to standard input"
            )
    options = {
        name: getattr(args, name)
        for name in (
            "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed",
        )
    }  # fmt: skip
    model, tokenizer = source.load(), source.load_tokenizer()
    if args.adapter is not None:
        source.load_adapter(model, args.adapter)
    asked = [[{"role": "user", "content": p}] for p in prompts] if args.chat else prompts
    if len(prompts) > 1:
        texts = lowrank.generate(model, tokenizer, asked, **options)
        shown = "\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True))
        show(args, shown, {"prompts": prompts, "texts": texts})
        return 0
    written = ""
    for piece in lowrank.stream(model, tokenizer, asked[0], **options):
        written += piece
        if not args.json:
            print(piece, end="", flush=True, file=args.out)
    show(args, "", {"prompt": prompts[0], "text": written})
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompt: expected standard input in {error.encoding}; {error.reason} at byte "
            f"{error.start}"
        ) from None
