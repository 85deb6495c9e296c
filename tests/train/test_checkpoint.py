"""The directory format of checkpoints: whatever happens, the newest that verifies is complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from lowrank.errors import FileFormatError
from lowrank.io.safetensors import load_safetensors, write_safetensors
from lowrank.train.checkpoint import (
    MANIFEST,
    checkpoints,
    newest_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)

from .faults import Files, failing, in_child, last_call


def writers(step: int):
    """Files whose content is a function of the step; one in a folder, as a second adapter's is."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"w{i}": torch.randn(40, 25, generator=generator) for i in range(3)}
    return {
        "optimizer.safetensors": lambda path: write_safetensors(path, tensors),
        "other/adapter.safetensors": lambda path: write_safetensors(path, {"a": tensors["w0"]}),
        "state.json": lambda path: path.write_text(json.dumps({"step": step})) and None,
    }


def write(root: Path, step: int, limit: int | None = 2) -> Path:
    return write_checkpoint(root, step, writers(step), limit)


def is_complete(path: Path, step: int) -> bool:
    """Whether it holds exactly what `writers(step)` writes."""
    generator = torch.Generator().manual_seed(step)
    wanted = [torch.randn(40, 25, generator=generator) for _ in range(3)]
    found = load_safetensors(path / "optimizer.safetensors")
    other = load_safetensors(path / "other" / "adapter.safetensors")
    return (
        verify_checkpoint(path) == step
        and all(torch.equal(found[f"w{i}"], wanted[i]) for i in range(3))
        and torch.equal(other["a"], wanted[0])
        and json.loads((path / "state.json").read_text()) == {"step": step}
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path) -> Path:
    """A run that has two checkpoints."""
    for step in (10, 20):
        write(tmp_path / "run", step)
    return tmp_path / "run"


def test_the_newest_by_its_number_and_those_that_stay(root):
    assert newest_checkpoint(root) == root / "checkpoint-20"
    assert is_complete(root / "checkpoint-20", 20)
    write(root, 100)
    assert names(root) == ["checkpoint-100", "checkpoint-20"]
    os.utime(root / "checkpoint-20", (2**31, 2**31))  # a clock that went wrong
    assert newest_checkpoint(root) == root / "checkpoint-100"
    write(root, 110, limit=1)
    assert names(root) == ["checkpoint-110"]
    write(root, 120, limit=None)
    assert names(root) == ["checkpoint-110", "checkpoint-120"]


def test_nothing_to_go_on_from(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) is None and checkpoints(tmp_path) == []


def test_a_root_that_is_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    write(tmp_path / "link", 30)
    assert is_complete(newest_checkpoint(tmp_path / "link"), 30)
    assert names(root) == ["checkpoint-20", "checkpoint-30"]


def test_killed_at_every_call(root, tmp_path):
    """SIGKILL at each change of a file, half of a write done: the old or the new is complete, and
    the next save leaves nothing behind."""
    number, olds = 0, 0
    while True:
        number += 1
        here = tmp_path / "here"
        shutil.copytree(root, here)

        def save(here=here, number=number):
            with Files(here, last_call(number)):
                write(here, 30)

        status = in_child(save)
        assert status in (0, -signal.SIGKILL)
        newest = newest_checkpoint(here)
        step = int(newest.name.removeprefix("checkpoint-"))
        assert step in ((30,) if status == 0 else (20, 30)) and is_complete(newest, step)
        olds += step == 20
        if status == 0:
            break
        write(here, step + 10)
        assert names(here) == [f"checkpoint-{step}", f"checkpoint-{step + 10}"]
        assert is_complete(here / f"checkpoint-{step + 10}", step + 10)
        shutil.rmtree(here)
    assert number > 25 and olds > 15 and number - olds > 8  # on both sides of the renaming


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails(root, code):
    """From any call on: the error names a file, what was there verifies, the next save is whole."""
    before = names(root)
    with Files(root) as files:
        write(root, 30)
    placed = next(i for i, (call, _) in enumerate(files.seen, 1) if call == "replace")
    shutil.rmtree(root / "checkpoint-30")
    write(root, 20), write(root, 10, limit=None), write(root, 20, limit=None)
    for number in range(1, placed + 1):
        with Files(root, failing(number, code)), pytest.raises(OSError) as caught:
            write(root, 30)
        assert caught.value.errno == code
        assert str(caught.value.filename).startswith(str(root))
        assert ".tmp" not in str(caught.value.filename)
        assert is_complete(newest_checkpoint(root), 20)
        assert [name for name in names(root) if not name.startswith(".")] == before
    write(root, 30)
    assert names(root) == ["checkpoint-20", "checkpoint-30"]


def test_a_directory_that_may_not_be_written():
    """As a user who is not root, whom nothing stops."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, 10)
        os.chmod(root, 0o555)

        def save():
            with pytest.raises(PermissionError, match="checkpoint-20"):
                write(root, 20)

        assert in_child(save, user=65534) == 0
        assert names(root) == ["checkpoint-10"] and is_complete(root / "checkpoint-10", 10)
        os.chmod(root, 0o755)


def test_what_is_synced_before_what(root):
    """Losing power: nothing that is not on the disk is given its name, or replaces what is."""
    with Files(root) as files:
        write(root, 30)
    calls = files.seen
    placed = next(i for i, (call, _) in enumerate(calls) if call == "replace")
    written = {path for call, path in calls if call == "open"}
    assert len(written) == 4  # three files and the manifest
    for path in written:
        last_write = max(i for i, seen in enumerate(calls) if seen == ("write", path))
        assert any(seen == ("fsync", path) for seen in calls[last_write + 1 : placed])
    last = max(i for i, (call, _) in enumerate(calls) if call == "write")
    assert calls[last][1].endswith(MANIFEST)
    folders = {path for call, path in calls[last:placed] if call == "fsync"} - written
    assert len(folders) == 2  # the checkpoint, and the folder in it
    gone = next(i for i, (call, _) in enumerate(calls) if i > placed and call == "replace")
    assert ("fsync", str(root)) in calls[placed + 1 : gone]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(**changes):
    def of(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return of


DAMAGES = {
    "bit flip": ("optimizer.safetensors", flip, "SHA-256 is not that of MANIFEST.json"),
    "bit flip in a folder": ("other/adapter.safetensors", flip, "SHA-256"),
    "truncated": ("state.json", lambda p: p.write_bytes(p.read_bytes()[:-1]), "expected .* bytes"),
    "emptied": ("optimizer.safetensors", lambda p: p.write_bytes(b""), "bytes; got 0"),
    "missing": ("optimizer.safetensors", Path.unlink, "cannot be read: No such file"),
    "a folder": ("state.json", lambda p: (p.unlink(), p.mkdir()), "expected .* bytes|cannot be"),
    "no manifest": (MANIFEST, Path.unlink, "no such file"),
    "a manifest of zeros": (MANIFEST, lambda p: p.write_bytes(bytes(200)), "not JSON"),
    "a manifest of garbage": (MANIFEST, lambda p: p.write_bytes(b"\xff\xfe{"), "not JSON"),
    "a list for a manifest": (MANIFEST, lambda p: p.write_text("[]"), "expected a JSON object"),
    "another format": (MANIFEST, edit(format=2), "expected format 1; got 2"),
    "a manifest without files": (MANIFEST, edit(files=None), "names no step or no files"),
    "a manifest without a step": (MANIFEST, edit(step="12"), "names no step or no files"),
    "files that are none": (MANIFEST, edit(files={"state.json": 3}), "damaged: at 'state.json'"),
    "files of others": (MANIFEST, edit(files={"../x": {}}), "damaged: at '../x'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_passed_over(root, caplog, damage):
    name, spoil, reason = DAMAGES[damage]
    spoil(root / "checkpoint-20" / name)
    with pytest.raises(FileFormatError, match=reason) as caught:
        verify_checkpoint(root / "checkpoint-20")
    assert "\n" not in str(caught.value)
    assert is_complete(newest_checkpoint(root), 10)
    assert "checkpoint-20 is passed over: " + str(caught.value) in caplog.text
    spoil(root / "checkpoint-10" / name)
    with pytest.raises(FileFormatError, match="no checkpoint verifies; of the newest: .*anew"):
        newest_checkpoint(root)


def test_one_that_was_passed_over_gives_way(root):
    """Its step comes again; and one of a later step is older than what is written now."""
    flip(root / "checkpoint-20" / "state.json")
    write(root, 15)
    assert names(root) == ["checkpoint-10", "checkpoint-15"]
    flip(root / "checkpoint-15" / "state.json")
    write(root, 15)
    assert is_complete(root / "checkpoint-15", 15)


def test_what_does_not_read_back_costs_no_older_one(root, monkeypatch):
    def spoiled(handle, *range_):
        flip(Path(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "posix_fadvise", spoiled)
    with pytest.raises(OSError, match="not read back as it was written"):
        write(root, 30)
    assert names(root) == ["checkpoint-10", "checkpoint-20"]
    assert is_complete(newest_checkpoint(root), 20)


def test_one_that_cannot_be_removed_stays(root, monkeypatch, caplog):
    real = os.replace

    def replace(source, target):
        if str(target).endswith(".removed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(root, 30)
    assert "checkpoint-10 cannot be removed: Permission denied" in caplog.text
    assert names(root) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
