"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank.errors import ConfigError


def write_files(directory: str | Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write files into `directory`: each aside and synced, and when all are, renamed into place.

    `writers`: {name: function that writes the path it is given}. On any error before the renames,
    Ctrl-C included, the directory is as it was. They are renamed in the order given. An OSError
    names the file.
    """
    directory = Path(directory)
    with _made(directory):
        aside: dict[str, Path] = {}
        try:
            for name, write in writers.items():
                handle, path = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
                os.close(handle)
                aside[name] = Path(path)
                try:
                    write(aside[name])
                    os.chmod(path, 0o666 & ~_umask())  # mkstemp's files are private, these are not
                    sync(path)
                except (
                    OSError
                ) as error:  # a full disk: say which file, not what it was called aside
                    raise OSError(error.errno, error.strerror, str(directory / name)) from error
            for name, path in aside.items():
                os.replace(path, directory / name)
            sync(directory)
        finally:
            for path in aside.values():
                with suppress(FileNotFoundError):
                    path.unlink()


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed `write_files` left aside, in a directory that nothing else writes to."""
    for path in directory.glob(".*.????????.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` that becomes `path` if the block ends well, else is removed."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"output: {path} exists; name a directory that does not, or remove it")
    with _made(path.parent):
        try:
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            yield aside
            aside.chmod(0o777 & ~_umask())
            os.replace(aside, path)
        except BaseException as error:
            if isinstance(error, OSError) and isinstance(error.filename, str):
                error.filename = error.filename.replace(str(aside), str(path))
            shutil.rmtree(aside, ignore_errors=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """Write one text file, whole or not at all."""
    path = Path(path)
    write_files(path.parent, {path.name: lambda aside: _write(aside, text)})


def sync(path: str | Path) -> None:
    """Force a file's bytes, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """`folder` is there in the block; what was made for it goes again if that fails."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder}: expected a directory, or to make one: {error.strerror}; name another"
            ) from error
        yield
    except BaseException:
        for parent in made:  # the innermost first
            with suppress(OSError):  # another's file may have come into it
                parent.rmdir()
        raise


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
