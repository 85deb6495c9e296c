"""The command `lowrank`: picks the subcommand; makes of a mistake one line and a status."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from lowrank.cli import demo, env, generate, merge, quantize, report, sweep, train
from lowrank.errors import LowrankError
from lowrank.train.remedies import is_out_of_memory

COMMANDS = (train, sweep, generate, merge, quantize, report, env, demo)

OK, USER_ERROR, INTERRUPTED = 0, 2, 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as all of ours are."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"lowrank: error: {message} ({self.prog} --help tells all)\n")


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
            description=f"{summary}\n\n{details}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1: its own check failed; 2: the user can mend it; 130: Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    for word in argv:
        if word != word.encode(errors="replace").decode():
            parser.error(f"expected arguments in UTF-8; got {word!a}")
    args, unknown = parser.parse_known_args([_dashes(word) for word in argv])
    if unknown:
        flags = re.findall(r"--[\w-]+", args.command.format_usage())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        args.command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    logger = logging.getLogger("lowrank")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
    try:
        return args.run(args)
    except KeyboardInterrupt as stop:
        print(
            f"lowrank: {_one_line(stop) or 'interrupted; no file is half written'}", file=sys.stderr
        )
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (LowrankError, OSError) as error:
        print(f"lowrank: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "lowrank: error: out of memory: try a smaller model, batch, rank or length; "
            f"torch says: {_one_line(error)}",
            file=sys.stderr,
        )
        return USER_ERROR


def lowrank_version() -> str:
    """The installed distribution's version."""
    try:
        return version("lowrank-torch")
    except PackageNotFoundError:
        return "(not installed)"


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
