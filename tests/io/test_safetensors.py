"""safetensors files: whole or refused, old or new, never between."""

from __future__ import annotations

import json
import os
import struct
import weakref
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowrank.errors import DtypeError, FileFormatError
from lowrank.io.atomic import write_files, write_text
from lowrank.io.safetensors import Lazy, SafetensorsFile, load_safetensors, save_safetensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.float64]


def tensors() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.w": (torch.randn(i + 1, 5) * 40).to(d) for i, d in enumerate(DTYPES)}


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name])


def test_round_trip_both_ways_with_the_package(tmp_path):
    want = tensors()
    save_safetensors(tmp_path / "ours.safetensors", want)
    assert_same(load_file(tmp_path / "ours.safetensors"), want)
    assert_same(load_safetensors(tmp_path / "ours.safetensors"), want)
    with safe_open(tmp_path / "ours.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    file = SafetensorsFile(tmp_path / "ours.safetensors")
    assert torch.equal(file.read("layer.2.w"), want["layer.2.w"])
    save_file(want, tmp_path / "theirs.safetensors")
    assert_same(load_safetensors(tmp_path / "theirs.safetensors"), want)


def test_shared_strided_and_empty_tensors(tmp_path):
    base = torch.randn(6, 8)
    want = {"a": base, "b": base, "rows": base[2:4], "t": base.t(), "none": torch.empty(0, 3)}
    save_safetensors(tmp_path / "x.safetensors", want)
    assert_same(load_safetensors(tmp_path / "x.safetensors"), want)


@pytest.mark.parametrize("write", ["tensors", "text"])
def test_no_room_on_the_disk_names_the_file_and_keeps_the_old(tmp_path, write):
    resource = pytest.importorskip("resource", reason="needs a POSIX system: limits a file's size")
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_safetensors(path, tensors())
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk does
    try:
        with pytest.raises(OSError) as caught:
            if write == "text":
                write_text(path, "a" * 20_000)
            else:
                save_safetensors(path, {"big": torch.randn(5_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path) and caught.value.strerror
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, tensors())
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="x.safetensors") as caught:
            load_safetensors(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError):
        load_safetensors(path)


def test_every_flipped_header_bit_is_refused_or_shows(tmp_path):
    path = tmp_path / "x.safetensors"
    want = {"w": torch.randn(3, 4), "v": torch.randn(5)}
    save_safetensors(path, want)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for at in range(8 + length):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                got = load_safetensors(path)
            except FileFormatError as error:
                assert "\n" not in str(error)
                continue
            # what still is a valid file has other names or dtypes, or the same content
            described = [{n: (t.shape, t.dtype) for n, t in x.items()} for x in (got, want)]
            if described[0] == described[1]:
                assert_same(got, want)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2]}},
        {
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        [],
        "text",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(FileFormatError, match="x.safetensors"):
        load_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(60), bytes(64), b"\xff" * 64, b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="not safetensors|damaged safetensors header"):
        load_safetensors(path)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileFormatError, match="no such file"):
            load_safetensors(path)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error, call):
    path, old = tmp_path / "x.safetensors", tensors()
    save_safetensors(path, old)

    def fails(*_):
        raise error

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(type(error)):
        save_safetensors(path, {"w": torch.zeros(3)})
    monkeypatch.undo()
    assert_same(load_safetensors(path), old)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_all_files_or_none(tmp_path):
    write_text(tmp_path / "a", "old a")

    def fails(path):
        path.write_text("half")
        raise RuntimeError("while writing b")

    with pytest.raises(RuntimeError, match="while writing b"):
        write_files(tmp_path, {"a": lambda path: path.write_text("new a"), "b": fails})
    with pytest.raises(RuntimeError, match="while writing b"):
        write_files(tmp_path / "new" / "folder", {"b": fails})
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old a"


def test_files_get_the_usual_permissions(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_one_lazy_tensor_at_a_time_and_each_where_its_dtype_aligns(tmp_path):
    path, alive = tmp_path / "x.safetensors", []

    def make(i, dtype):
        assert not any(ref() is not None for ref in alive)
        tensor = torch.full((3, i), i).to(dtype)
        alive.append(weakref.ref(tensor))
        return tensor

    dtypes = [torch.uint8, torch.float64, torch.bfloat16, torch.bool, torch.float32] * 2
    lazy = {f"{i}.w": Lazy(d, (3, i), partial(make, i, d)) for i, d in enumerate(dtypes)}
    save_safetensors(path, lazy)
    assert_same(
        load_file(path), {f"{i}.w": torch.full((3, i), i).to(d) for i, d in enumerate(dtypes)}
    )
    for entry in SafetensorsFile(path).entries.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(
        DtypeError, match="z: expected a dtype that safetensors has; got torch.complex128"
    ):
        save_safetensors(tmp_path / "x", {"z": torch.zeros(2, dtype=torch.complex128)})
    assert os.listdir(tmp_path) == []
