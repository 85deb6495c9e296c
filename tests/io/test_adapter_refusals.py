"""Adapter directories that are damaged, of another base or half-written: nothing is used."""

from __future__ import annotations

import copy
import json
import logging
import os
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import ConfigError, FileFormatError, LowrankError, TargetError
from tests.adapters.oracle import tiny_llama
from tests.io.adapters import adapted


@pytest.fixture
def saved(tmp_path):
    """(directory, base) of an adapter on q_proj and v_proj."""
    base = tiny_llama()
    lowrank.save_adapter(adapted(base, target_modules=["q_proj", "v_proj"]), tmp_path / "saved")
    return tmp_path / "saved", base


def assert_refused(model: nn.Module, directory, error=FileFormatError, match: str = "") -> None:
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=match) as caught:
        lowrank.load_adapter(model, directory)
    assert "\n" not in str(caught.value)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (value, flag) in before.items():
        assert torch.equal(after[name], value) and after[name].requires_grad == flag


def rewrite(directory, change) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(KEY), "lacks.*q_proj.lora_B"),
        (lambda t: t.update({KEY.replace("q_", "k_"): t[KEY] + 0}), "no place for.*k_proj.lora_B"),
        (
            lambda t: t.update({KEY: t[KEY][:, :4].contiguous()}),
            r"q_proj.lora_B.*\[24, 4\].*\[24, 8\]",
        ),
        (lambda t: t.update({KEY: t[KEY].t().contiguous()}), r"\[8, 24\].*\[24, 8\]"),
        (lambda t: t.update({KEY: t[KEY].int()}), "floating-point"),
        (lambda t: t.update({KEY[16:]: t.pop(KEY)}), "start with base_model.model."),
        (lambda t: t.clear(), "lacks"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_refused(saved, change, match):
    directory, base = saved
    rewrite(directory, change)
    assert_refused(base, directory, match=match)
    mine = adapted(base, target_modules=["q_proj", "v_proj"])
    assert_refused(mine, directory, match=match)


def test_an_adapter_for_another_base_is_refused(saved):
    directory, _ = saved
    assert_refused(nn.Sequential(nn.Linear(4, 4)), directory, match="another base model")
    assert_refused(tiny_llama(layers=3), directory, match="another base model.*lacks")
    assert_refused(tiny_llama(layers=1), directory, match="another base model.*no place for")


def test_another_name_of_the_base_is_only_said(saved, caplog):
    directory, base = saved
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('path": null', 'path": "someone/llama"'))
    base.name_or_path = "/somewhere/llama"
    lowrank.load_adapter(copy.deepcopy(base), directory)
    assert not caplog.records
    base.name_or_path = "someone/other"
    with caplog.at_level(logging.WARNING, "lowrank"):
        lowrank.load_adapter(base, directory)
    assert "someone/llama" in caplog.text


def test_damaged_weights_are_refused(saved):
    directory, base = saved
    path = directory / "adapter_model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for cut in [
        0,
        1,
        7,
        8,
        9,
        length // 2,
        8 + length,
        9 + length,
        len(whole) // 2,
        len(whole) - 1,
    ]:
        path.write_bytes(whole[:cut])
        assert_refused(base, directory, match="adapter_model.safetensors")
    path.write_bytes(whole.replace(b'"dtype":"F32"', b'"dtype":"F33"', 1))
    assert_refused(base, directory, match="adapter_model.safetensors")
    # a flipped bit in the header is refused, or it changes nothing that is used
    for at in range(8, 8 + length, 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            got = lowrank.load_adapter(copy.deepcopy(base), directory)
        except FileFormatError:
            continue
        path.write_bytes(whole)
        want = lowrank.load_adapter(copy.deepcopy(base), directory).state_dict()
        assert all(torch.equal(v, want[k]) for k, v in got.state_dict().items())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"r": 8}', '{"peft_type": "IA3"}', "\xff\xfe"]
)
def test_damaged_configs_are_refused(saved, text):
    directory, base = saved
    (directory / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert_refused(base, directory, match="adapter_config.json")


@pytest.mark.parametrize(
    "change", [{"use_dora": 3}, {"r": 0}, {"lora_bias": True}, {"init_lora_weights": "lora_ga"}]
)
def test_configs_we_cannot_honour_are_refused(saved, change):
    directory, base = saved
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(base, directory, match=next(iter(change)))


def test_missing_files_and_pickles(saved, tmp_path):
    directory, base = saved
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    assert_refused(base, directory, match="pickle.*safe_serialization")
    (directory / "adapter_model.bin").unlink()
    assert_refused(base, directory, match="no such file")
    (directory / "adapter_config.json").unlink()
    assert_refused(base, directory, match="adapter_config.json: no such file")
    assert_refused(base, tmp_path / "nothing" / "here", match="no such directory")
    assert_refused(base, "not a hub id", match="owner/name")


def test_wrong_requests(saved, tmp_path):
    directory, base = saved
    with pytest.raises(TargetError, match="none: inject or load one first"):
        lowrank.save_adapter(base, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    with pytest.raises(TargetError, match="'other'.*default"):
        lowrank.save_adapter(model, tmp_path / "x", adapter="other")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match="it is a file"):
        lowrank.save_adapter(model, tmp_path / "file")
    lowrank.merge(model)
    assert_refused(model, directory, error=ConfigError, match="unmerge first")
    with pytest.raises(ConfigError, match="save_adapter: expected unmerged"):
        lowrank.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(LowrankError, match="unmerge first"):
        lowrank.load_adapter(model, directory, adapter="new")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failed_save_leaves_an_adapter_that_loads(saved, monkeypatch, call, nth):
    directory, base = saved
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    real, calls = getattr(os, call), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return real(*arguments)

    old = lowrank.load_adapter(copy.deepcopy(base), directory).state_dict()
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(KeyboardInterrupt):
        lowrank.save_adapter(model, directory)
    monkeypatch.undo()
    now = lowrank.load_adapter(copy.deepcopy(base), directory).state_dict()
    new = model.state_dict()
    assert any(all(torch.equal(now[k], state[k]) for k in now) for state in (old, new))
    assert len(os.listdir(directory)) == 3


def test_a_killed_save_leaves_the_old_adapter(saved):
    directory, base = saved
    before = {f: (directory / f).read_bytes() for f in os.listdir(directory)}
    code = f"""
import os, torch, lowrank
from lowrank.io import safetensors
model = torch.nn.ModuleDict({{"q_proj": torch.nn.Linear(4, 4)}})
lowrank.inject(model, lowrank.LoRAConfig(target_modules=["q_proj"]))
os.fsync = lambda _: os.kill(os.getpid(), 9)
lowrank.save_adapter(model, {str(directory)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert all((directory / f).read_bytes() == content for f, content in before.items())
    lowrank.load_adapter(base, directory)


def test_a_long_list_of_names_is_shown_short(tmp_path):
    """As the file of an adapter of another, larger model has it."""
    names = [f"projection_{i}_of_queries" for i in range(96)]
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    config = lowrank.LoRAConfig(r=1, target_modules=names)
    lowrank.save_adapter(lowrank.inject(model, config), tmp_path)
    place = tmp_path / "adapter_config.json"  # which may also have a shorter list
    place.write_text(json.dumps({**json.loads(place.read_text()), "target_modules": names}))
    with pytest.raises(FileFormatError) as caught:
        lowrank.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    assert "matches nothing in the model" in str(caught.value)
    assert len(str(caught.value)) < 700 + len(str(tmp_path))
