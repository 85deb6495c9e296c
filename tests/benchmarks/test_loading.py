"""The checkpoint that is loaded, what each side makes of it, and when a row is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import loading, loading_worker
from benchmarks.errors import MissingInputError
from lowrank.nn.quant_linear import QuantLinear

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": False}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LLAMA", SIZES)
    return tmp_path, loading.write_checkpoint(tmp_path, layers=3)


def test_the_checkpoint_is_a_sharded_llama_in_bfloat16(checkpoint):
    directory, sizes = checkpoint
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert shards == [*(f"model-{i}.safetensors" for i in range(3)), "model-other.safetensors"]
    tensors = [t for shard in shards for t in load_file(directory / shard).values()]
    assert sorted(t.nbytes for t in tensors) == sorted(sizes) and len(tensors) == 3 * 9 + 3
    assert {t.dtype for t in tensors} == {torch.bfloat16}


def test_every_side_loads_the_same_weights(checkpoint):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    directory, _ = checkpoint
    loading_worker.drop_from_page_cache(directory)
    assert loading_worker.reading(directory)() is None
    ours = loading_worker.lowrank_nf4(directory)()
    theirs = loading_worker.bitsandbytes_nf4(directory)()
    layers = {name: m for name, m in ours.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 3 * 7
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).weight
        packed = layer.storage["packed"]
        if layer.in_features % 64 == 0:
            assert torch.equal(packed.flatten(), weight.data.flatten()), name
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    expected = sum(p.numel() * p.element_size() for p in ours.parameters())
    assert expected <= loading_worker.held_bytes(ours) < expected + 100_000
    assert loading_worker.held_bytes(theirs) > 0 == loading_worker.held_bytes(None)


def test_a_checkpoint_larger_than_the_disk_is_left_out(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MissingInputError, match=r"1.1 GB are to be written, 1.0 are free"):
        loading.write_checkpoint(tmp_path, layers=2)
    assert not list(tmp_path.iterdir())


def test_more_memory_than_two_tensors_is_wrong():
    two, few = 2 * (500 << 20), 10 << 20

    def answers(extra):
        answer = {"seconds": 2.0, "peak_bytes": (1 << 30) + extra, "held_bytes": 1 << 30}
        alone = {"seconds": 1.0, "peak_bytes": 1, "held_bytes": 0}
        return {loading.READING: [alone] * 3, loading.OURS: [answer] * 3}

    for extra, wrong in ((two + few, False), (two + loading.SLACK + few, True)):
        alone, ours = loading.checkpoint_rows("case", answers(extra), [500 << 20, 3])
        assert ours["speed"] == 0.5 and alone["speed"] == 1
        assert ours["extra_bytes"] == extra and ("wrong" in ours) == wrong
