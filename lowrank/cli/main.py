"""The command `lowrank`: picks the subcommand; makes of a mistake one line and a status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from lowrank.cli import demo, env, eval, generate, merge, plan, quantize, report, sweep, train
from lowrank.errors import ConfigError, LowrankError, MissingPackageError, TrainingError
from lowrank.train.distributed import alike, world_size
from lowrank.train.remedies import is_out_of_memory

COMMANDS = (train, sweep, generate, eval, merge, quantize, plan, report, env, demo)

OK = 0
NO = 1  # the command's own answer: the demo's check failed, the model does not fit
MISTAKE = 2  # in flags, settings, files or data; one line says what to do
OUT_OF_MEMORY = 3
MISSING_PACKAGE = 4
TRAINING_FAILED = 5  # a loss that is not finite, for instance
BUG = 70  # sysexits.h: EX_SOFTWARE
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# seconds; torchrun ends all processes when the first one has ended, if it had time to speak or not
_HEARD = 5.0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors end a command as all of ours do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help tells all)")


class _Stderr(logging.Handler):
    """Progress and warnings of the library as plain lines, on what sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.run(args) -> status` is the one that was chosen, and
    `args.command` its own parser.
    """
    parser = Parser(prog="lowrank", description="Low-rank fine-tuning over quantized weights.")
    parser.add_argument("--version", action="version", version=f"lowrank {lowrank_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary, _, details = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary.strip(),
            # the examples come first: argparse's own usage of a hundred flags would
            usage=f"lowrank {name} [flags]",
            description=f"{summary}\n\n{details}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object, of a mistake its error and status; all else to stderr",
        )
        command.set_defaults(run=module.run, command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its status, one of the constants above."""
    argv = sys.argv[1:] if argv is None else argv
    out, as_json = sys.stdout, "--json" in argv
    try:
        with alike():
            args = _parsed(argv)
        logger = logging.getLogger("lowrank")
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
            logger.addHandler(_Stderr())
        args.out = out
        with contextlib.redirect_stdout(sys.stderr if as_json else out):
            return args.run(args)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return OK
    except (KeyboardInterrupt, Exception) as error:
        status, message = _ending(error)
        if status == BUG:
            traceback.print_exc()
        said = getattr(error, "said", None)  # of several processes, by the first or by this one
        if said is None:
            print(f"lowrank: {message}", file=sys.stderr)
        if as_json and said != "elsewhere":
            print(json.dumps({"error": message.removeprefix("error: "), "status": status}))
        if said == "elsewhere" and status != INTERRUPTED and world_size() > 1:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_HEARD)
        return status


def lowrank_version() -> str:
    """The installed distribution's version."""
    try:
        return version("lowrank-torch")
    except PackageNotFoundError:
        return "(not installed)"


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its arguments; ConfigError for what it does not know."""
    parser = build_parser()
    for word in argv:
        if word != word.encode(errors="replace").decode():
            parser.error(f"expected arguments in UTF-8; got {word!a}")
    args, unknown = parser.parse_known_args([_dashes(word) for word in argv])
    if unknown:
        flags = re.findall(r"--[\w-]+", args.command.format_help())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if near == unknown[:1]:
            hint = f": it goes after {args.command.prog}"
        args.command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if world_size() > 1 and args.run is not train.run:
        raise ConfigError(
            f"{args.command.prog} runs in one process; torchrun has started {world_size()}: "
            "start it without torchrun, which is for lowrank train"
        )
    return args


def _ending(error: BaseException) -> tuple[int, str]:
    """The status of a command that `error` ended, and the line that says so."""
    line = _one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, line or "interrupted; no file is half written"
    if isinstance(error, LowrankError) and is_out_of_memory(error.__cause__):
        return OUT_OF_MEMORY, f"error: {line}"  # with what to change
    if is_out_of_memory(error):
        return OUT_OF_MEMORY, (
            "error: out of memory: try a smaller model, batch, rank or length; torch says: " + line
        )
    statuses = {MissingPackageError: MISSING_PACKAGE, TrainingError: TRAINING_FAILED}
    for kind, status in statuses.items():
        if isinstance(error, kind):
            return status, f"error: {line}"
    if isinstance(error, LowrankError | OSError):
        return MISTAKE, f"error: {line}"
    return BUG, f"error: {line}: a bug in lowrank: report it with what `lowrank env` prints"


def _dashes(word: str) -> str:
    """Let `--learning_rate=1e-3` be `--learning-rate=1e-3`, as it is written in Python."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
