"""Checkpoints on disk: each a directory that is whole and proven, or that is passed over.

`root/checkpoint-12/` holds the files of step 12 and, written last, MANIFEST.json with the size and
SHA-256 of each. It is written aside, synced, renamed into place, read back, and only then do older
ones go: whenever the process or the machine stops, the newest that verifies is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from lowrank.errors import FileFormatError
from lowrank.io.atomic import new_directory, sync
from lowrank.io.json_files import read_json, write_json

logger = logging.getLogger("lowrank.train")

MANIFEST, FORMAT = "MANIFEST.json", 1
_NAME = re.compile(r"checkpoint-(\d{1,18})")
_CHUNK = 1 << 20

# what each file of a checkpoint, `name` or `folder/name`, is written by, given its path
Writers = Mapping[str, Callable[[Path], None]]


def write_checkpoint(root: Path, step: int, writers: Writers, limit: int | None = None) -> Path:
    """Write `root/checkpoint-step`, prove it, and remove what `limit` leaves no room for.

    Of the older ones the newest `limit` - 1 stay; None: all. One of `step` or later was passed over
    when the run was resumed, and goes. Only one process may do this in `root` at a time. An OSError
    names the file; the older ones are then there still.
    """
    _remove_leftovers(root)
    path = root / f"checkpoint-{step}"
    if path.exists():
        _remove(path)
    with new_directory(path) as aside:
        held = {}
        for name, write in writers.items():
            file = aside / name
            try:
                file.parent.mkdir(exist_ok=True)
                write(file)
                sync(file)
                held[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path / name)) from error
        try:
            write_json({"format": FORMAT, "step": step, "files": held}, aside / MANIFEST)
            for changed in (aside / MANIFEST, *{(aside / name).parent for name in held}, aside):
                sync(changed)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path / MANIFEST)) from error
    sync(root)
    try:
        verify_checkpoint(path, from_disk=True)
    except FileFormatError as error:
        _remove(path)
        raise OSError(None, f"not read back as it was written ({error})", str(path)) from error
    _make_room(root, step, limit)
    return path


def verify_checkpoint(path: Path, from_disk: bool = False) -> int:
    """The step of a checkpoint, every file of which is as written; FileFormatError if one is not.

    from_disk: read what the disk has, not what memory still holds of it.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise FileFormatError(
            f"{path / MANIFEST}: expected format {FORMAT}; got {manifest.get('format')!r}: "
            "another version of lowrank wrote it"
        )
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise FileFormatError(f"{path / MANIFEST}: damaged: it names no step or no files")
    for name, expected in files.items():
        parts = PurePosixPath(name).parts
        if not isinstance(expected, dict) or ".." in parts or name.startswith("/"):
            raise FileFormatError(f"{path / MANIFEST}: damaged: at {name!r}")
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected.get("size"):
                raise FileFormatError(f"{file}: expected {expected.get('size')} bytes; got {size}")
            found = _sha256(file, from_disk)
        except OSError as error:
            raise FileFormatError(f"{file}: cannot be read: {error.strerror}") from error
        if found != expected.get("sha256"):
            raise FileFormatError(f"{file}: damaged: its SHA-256 is not that of {MANIFEST}")
    return step


def checkpoints(root: Path) -> list[Path]:
    """What is named like a checkpoint in `root`, the newest first, damaged or not."""
    try:
        # by the step of the name: clocks and times of files mean nothing
        steps = {path: step_of(path) for path in root.iterdir() if path.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {path: step for path, step in steps.items() if step is not None}
    return sorted(found, key=found.__getitem__, reverse=True)


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; what is passed over is logged with the reason.

    None if there is none at all; FileFormatError if there are some and all are damaged.
    """
    skipped = None
    for path in checkpoints(root):
        try:
            verify_checkpoint(path)
            return path
        except FileFormatError as error:
            logger.warning("%s is passed over: %s", path.name, error)
            skipped = skipped or error
    if skipped is not None:
        raise FileFormatError(
            f"{root}: no checkpoint verifies; of the newest: {skipped}; "
            "start anew with overwrite_output_dir, or in another output_dir"
        )
    return None


def remove_checkpoints(paths: Iterable[Path]) -> None:
    """Remove checkpoints; one whose removal is cut short is none any more."""
    for path in paths:
        _remove(path)


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _make_room(root: Path, step: int, limit: int | None) -> None:
    others = [path for path in checkpoints(root) if path.name != f"checkpoint-{step}"]
    earlier = [path for path in others if (step_of(path) or 0) < step]
    stay = earlier if limit is None else earlier[: limit - 1]
    for path in reversed(others):
        if path not in stay:
            try:
                _remove(path)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", path, error.strerror)


def _remove(path: Path) -> None:
    """Take the name away first: what a kill leaves of the rest looks like no checkpoint."""
    aside = path.with_name(f".{path.name}.removed")
    os.replace(path, aside)
    shutil.rmtree(aside)


def _remove_leftovers(root: Path) -> None:
    """What a killed process left half written or half removed."""
    for path in root.glob(".checkpoint-*"):
        shutil.rmtree(path)


def _sha256(file: Path, from_disk: bool = False) -> str:
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as opened:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
