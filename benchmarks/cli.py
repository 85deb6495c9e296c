"""The command line of `python -m benchmarks`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import machine, results, shapes, table
from benchmarks.errors import UsageError
from benchmarks.installed import LINEAR_SIDES, PEERS, chosen, chosen_peers, missing

BENCHMARKS = {
    "codebook_quantize": "dense float32 weights to NF4 with double quantization",
    "codebook_dequantize": "NF4 with double quantization back to dense weights",
    "codebook_linear": "forward, and forward with dX, of a linear layer over an NF4 weight",
    "lora_linear": "a linear layer with a LoRA adapter, beside the same one frozen and bare",
    "dora_linear": "the same with a DoRA adapter, whose norms each forward needs anew",
    "linear_cross_entropy": "a language model's head and its loss, forward and dX",
    "adamw8bit": "a step of AdamW with 8-bit moments, over one float32 parameter",
    "paged": "steps of optimizers with a tenth of their state in memory, the rest in a file",
    "training_step": "QLoRA steps of SmolLM2-135M (its GGUF file is named by LOWRANK_SMOLLM2)",
    "decoding": "tokens that SmolLM2-135M writes in a second, one row and four",
    "memory": "peaks of training runs, as lowrank.plan_memory predicts them and as they are",
    "distributed": "a QLoRA step shared by two processes: bytes that travel, bytes that stay",
    "loading": "a bfloat16 checkpoint read and quantized to NF4; a packed state dict loaded",
    "adapters": "inject, forward, merge, load and switch of adapters, beyond their arithmetic",
    "import_time": "what importing adds to `import torch`",
}
USAGE_ERROR, WRONG_RESULT = 2, 1

DESCRIPTION = """\
lowrank beside its installed peers, at the level of operator, layer and training step.

The contenders of a case take turns in one loop. Each call finds its inputs in memory, not in a
cache, and its outputs begin as NaN where correctness is checked. Beside each time stand its spread,
its share of what this machine reached in the same run, its error to float64 and its memory beyond
inputs and outputs. Losses are printed like wins.
"""

EXAMPLES = """\
examples:
  python -m benchmarks                                             everything, 4096x4096
  python -m benchmarks codebook_linear --shapes llama3-8b.gate 1024x4096 --rows 1,16,512
  python -m benchmarks codebook_quantize codebook_dequantize --against bitsandbytes --json
  LOWRANK_SMOLLM2=SmolLM2-135M-Instruct.Q4_1.gguf python -m benchmarks training_step
  python -m benchmarks codebook_linear --isa avx2                  as if the CPU had no AVX-512
  python -m benchmarks --table benchmarks/results/FILE.json --plot linear.png
"""


def parser() -> argparse.ArgumentParser:
    """The options; what they mean is in their help."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)} (default: all)"
    )
    made.add_argument(
        "--list", action="store_true", help="list the benchmarks and the named shapes"
    )
    made.add_argument(
        "--against",
        metavar="PEERS",
        default=",".join(PEERS),
        help=f"comma-separated, of {', '.join(PEERS)}, or none (default: all that are installed)",
    )
    made.add_argument(
        "--shapes",
        metavar="SHAPE",
        nargs="+",
        default=list(shapes.HEADLINE),
        help="names from --list, or NxK (default: %(default)s)",
    )
    made.add_argument(
        "--rows",
        metavar="M,...",
        default="1,2,4,8,16,128,512",
        help="rows of x, 1 to 8192 or more (default: %(default)s)",
    )
    made.add_argument(
        "--dtypes",
        metavar="DTYPE,...",
        default="fp32,bf16",
        help=f"comma-separated, of {', '.join(shapes.DTYPES)} (default: %(default)s)",
    )
    made.add_argument(
        "--heads",
        metavar="HEAD",
        nargs="+",
        default=list(shapes.HEADLINE_HEAD),
        help="of linear_cross_entropy: names from --list, or VxH (default: %(default)s)",
    )
    made.add_argument(
        "--seconds", type=float, default=6.0, help="time for each case (default: %(default)s)"
    )
    made.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    made.add_argument(
        "--layers",
        type=int,
        default=1,
        help="layers of loading's checkpoint, 32 being all of Llama-8B's (default: %(default)s)",
    )
    made.add_argument(
        "--working-set",
        type=float,
        metavar="MB",
        default=None,
        help="what the inputs rotate over (default: 4 x the L3 cache, of which 256 MB count)",
    )
    made.add_argument(
        "--threads", type=int, default=None, help="threads for everybody (default: torch's choice)"
    )
    made.add_argument(
        "--isa",
        choices=sorted(machine.ISA_VARIABLES),
        default=None,
        help="restrict everybody to an instruction set, as far as they let us",
    )
    made.add_argument(
        "--json",
        metavar="PATH",
        nargs="?",
        const="",
        default=None,
        help="write the results there (without PATH: benchmarks/results/<machine>-<date>.json)",
    )
    made.add_argument(
        "--table",
        metavar="FILE",
        default=None,
        help="run nothing; print FILE's results as Markdown",
    )
    made.add_argument(
        "--plot",
        metavar="PNG",
        default=None,
        help="draw codebook_linear's speeds over M (needs matplotlib)",
    )
    made.add_argument(
        "--roofline",
        metavar="PNG",
        default=None,
        help="draw operations per byte against rates, under the ceilings (needs matplotlib)",
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run; 0 when every result was right, 1 when one was wrong, 2 for a mistake in the command.

    A benchmark that was asked for by name and lacks its input is such a mistake.
    """
    options = parser()
    given = options.parse_args(argv)
    if given.list:
        print(_listing())
        return 0
    try:
        if given.table is not None:
            result = results.read(given.table)
            print(table.render(result), end="")
        else:
            result = _run(given)
        if given.plot is not None:
            from benchmarks.plot import plot

            plot(result, Path(given.plot))
        if given.roofline is not None:
            from benchmarks.roofline import draw

            draw(result, Path(given.roofline))
    except UsageError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return USAGE_ERROR
    if any("wrong" in row for row in result["rows"]):
        return WRONG_RESULT
    return USAGE_ERROR if set(given.names) & set(result.get("left_out", ())) else 0


def _run(given: argparse.Namespace) -> dict:
    names = chosen("benchmark", given.names or list(BENCHMARKS), BENCHMARKS)
    against = chosen_peers(given.against)
    wanted_shapes = [shapes.parse(text) for text in given.shapes]
    heads = [shapes.parse(text, shapes.HEADS) for text in given.heads]
    dtypes = shapes.parse_dtypes(given.dtypes)
    rows_of_x = shapes.parse_rows(given.rows)
    if given.seconds <= 0 or given.steps < 3 or (given.threads or 1) < 1 or given.layers < 1:
        raise UsageError("--seconds, --threads and --layers must be positive, --steps at least 3")
    machine.restrict(given.threads, given.isa)

    import torch  # after the restriction

    from benchmarks.run import run
    from benchmarks.settings import Settings

    settings = Settings(
        against,
        wanted_shapes,
        rows_of_x,
        {short: getattr(torch, name) for short, name in dtypes.items()},
        given.seconds,
        given.steps,
        _working_set(given.working_set),
        heads,
        isa=given.isa,
        layers=given.layers,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    result = run(names, settings)
    if given.json is not None:
        name = machine.slug(result["machine"], result["run"]["isa"])
        path = results.write(result, given.json, name)
        print(f"\nwritten: {path}")
    return result


def _working_set(megabytes: float | None) -> int:
    if megabytes is None:
        return machine.working_set_bytes()
    if megabytes <= 0:
        raise UsageError(f"--working-set: expected a positive number of MB; got {megabytes:g}")
    return int(megabytes * 1e6)


def _listing() -> str:
    width = max(len(name) for name in BENCHMARKS) + 2
    sides, working_set = 2 * len(LINEAR_SIDES), machine.working_set_bytes()
    lines = [f"{name:{width}}{about}" for name, about in BENCHMARKS.items()]
    lines += [
        "",
        "shapes, N out features x K in features, and what codebook_linear needs of memory:",
    ]
    for name, (N, K) in shapes.SHAPES.items():
        gigabytes = shapes.layers_bytes(N, K, sides, working_set) / 1e9
        lines.append(f"{name:{width}}{f'{N}x{K}':14}{gigabytes:.0f} GB")
    lines += ["", "heads, V words x H features:"]
    lines += [f"{name:{width}}{V}x{H}" for name, (V, H) in shapes.HEADS.items()]
    lines += ["", "peers (--against):"]
    for name, about in PEERS.items():
        reason = missing(name)
        lines.append(f"{name:{width}}{about}" + (f"; {reason}" if reason else ""))
    return "\n".join(lines)
