"""The command line of `python -m benchmarks.gpu`. Nothing is asked of the machine but torch, Triton
and numpy; every other package takes part where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
from collections.abc import Sequence

import torch

from benchmarks import installed, results, shapes, table
from benchmarks.errors import UsageError
from benchmarks.gpu import timing
from benchmarks.gpu.session import Session

BENCHMARKS = {
    "codebook_quantize": "benchmarks.codebook_quantize",
    "codebook_dequantize": "benchmarks.codebook_dequantize",
    "codebook_linear": "benchmarks.gpu.codebook_linear",
    "lora_linear": "benchmarks.lora_linear",
    "lora_few_rows": "benchmarks.gpu.lora_few_rows",
    "linear_cross_entropy": "benchmarks.linear_cross_entropy",
    "adamw8bit": "benchmarks.adamw8bit",
}
SHAPES = ("llama3-8b.k", "llama3-8b.q", "llama3-8b.down", "llama3-8b.gate", "llama3-70b.down")
ROWS = "1,2,4,8,16,32,64,128,512,2048,4096,8192"
HEADS = ("llama3-8b.head",)
DTYPES = ("bfloat16", "float16", "float32")
USAGE_ERROR, WRONG_RESULT = 2, 1

EXAMPLES = """\
examples:
  python -m benchmarks.gpu --json                                        everything
  python -m benchmarks.gpu codebook_linear --shapes 4096x4096 --rows 1,8,64,4096
  python -m benchmarks --table benchmarks/results/FILE.json --roofline roofline.png
"""


def parser() -> argparse.ArgumentParser:
    """The options; what they mean is in their help."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="The operators on a CUDA device beside their installed peers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)} (default: all)"
    )
    made.add_argument(
        "--against",
        metavar="PEERS",
        default=",".join(installed.PEERS),
        help=f"comma-separated, of {', '.join(installed.PEERS)}, or none (default: all installed)",
    )
    made.add_argument(
        "--shapes",
        metavar="SHAPE",
        nargs="+",
        default=list(SHAPES),
        help="names from `python -m benchmarks --list`, or NxK (default: %(default)s)",
    )
    made.add_argument(
        "--rows", metavar="M,...", default=ROWS, help="rows of x (default: %(default)s)"
    )
    made.add_argument(
        "--heads",
        metavar="HEAD",
        nargs="+",
        default=list(HEADS),
        help="of linear_cross_entropy: names from --list, or VxH (default: %(default)s)",
    )
    made.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of x and of dense sides")
    made.add_argument(
        "--seconds", type=float, default=1.0, help="time for each case (default: %(default)s)"
    )
    made.add_argument(
        "--json",
        metavar="PATH",
        nargs="?",
        const="",
        default=None,
        help="write the results there (without PATH: benchmarks/results/<device>-<date>.json)",
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run; 0 when every result was right, 1 when one was wrong, 2 for a mistake in the command."""
    given = parser().parse_args(argv)
    try:
        names = installed.chosen("benchmark", given.names or list(BENCHMARKS), BENCHMARKS)
        against = installed.chosen_peers(given.against)
        wanted = [shapes.parse(text) for text in given.shapes]
        heads = [shapes.parse(text, shapes.HEADS) for text in given.heads]
        counts = shapes.parse_rows(given.rows)
        if given.seconds <= 0:
            raise UsageError(f"--seconds: expected a positive number; got {given.seconds:g}")
        if not torch.cuda.is_available():
            raise UsageError("no CUDA device is here")
    except UsageError as error:
        print(f"python -m benchmarks.gpu: {error}", file=sys.stderr)
        return USAGE_ERROR
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, given.dtype)
    result = run(names, against, device, wanted, heads, counts, dtype, given.seconds)
    if given.json is not None:
        path = results.write(result, given.json, timing.slug(result["machine"]))
        print(f"\nwritten: {path}")
    return WRONG_RESULT if any("wrong" in row for row in result["rows"]) else 0


def run(
    names: Sequence[str],
    against: Sequence[str],
    device: torch.device,
    wanted: Sequence[tuple[str, int, int]],
    heads: Sequence[tuple[str, int, int]],
    rows_of_x: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
    scale: float = 1.0,
) -> dict:
    """All cases of all shapes, printed as they are done; `scale` shrinks what ceilings move.

    Returns what `--json` writes, of the form that `benchmarks.run.run` returns too.
    """
    torch.manual_seed(0)
    missing = {name: reason for name in against if (reason := installed.missing(name, device.type))}
    short = {long: short for short, long in shapes.DTYPES.items()}
    session = Session(
        against=[name for name in against if name not in missing],
        shapes=wanted,
        rows_of_x=rows_of_x,
        dtypes={short[str(dtype).removeprefix("torch.")]: dtype},
        seconds=seconds,
        steps=0,
        working_set=timing.working_set_bytes(device),
        heads=heads,
        device=device,
        ceilings=timing.ceilings(device, dtype, scale),
    )
    result: dict = {
        "machine": timing.describe(device),
        "run": {
            "date": datetime.date.today().isoformat(),
            "isa": None,
            "dtype": str(dtype).removeprefix("torch."),
            "working_set": session.working_set,
            "seconds": seconds,
        },
        "ceilings": session.ceilings,
        "rows": [],
        "missing": missing,
        "left_out": [],
        "notes": session.notes,
    }
    print(table.header(result), flush=True)
    for name, reason in missing.items():
        session.note(f"without {name}: {reason}")
    for name in names:
        result["rows"] += importlib.import_module(BENCHMARKS[name]).run(session)
    return result
