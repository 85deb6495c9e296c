"""How much memory loading and saving take, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lowrank
from tests.models.helpers import llama

pytest.importorskip("transformers", reason="the oracle; pip install transformers")
pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's /proc"
)

# allocator and file buffers, beside a model of 241 MB
SLACK_MB = 8
SIZE = dict(vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
LARGEST_MB = 4 * 4000 * 1024 / 2**20

# VmHWM, since ru_maxrss begins with what the parent held when it forked
PEAK = """
import sys, torch, lowrank
from lowrank import quant
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
quant.get("nf4").quantize(torch.randn(64, 64))           # whatever is imported on first use
before = peak()
LOAD
loaded = peak() - before
held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
if len(sys.argv) > 3:
    lowrank.save_model(model, sys.argv[3], format=sys.argv[4])
print(loaded, peak() - before, held)
"""
LOAD = "model = lowrank.load_model(sys.argv[1], quantizer=sys.argv[2] or None)"
ON_META = """
from lowrank.models.decoder import Decoder
from lowrank.models.hf import HFDirectory
with torch.device("meta"):
    model = Decoder(HFDirectory(sys.argv[1]).config)
lowrank.load_quantized(model, sys.argv[1])
"""


def peaks(*words, load=LOAD):
    """(peak of loading, peak of that and saving, what the model holds), in MB."""
    script = PEAK.replace("LOAD", load)
    out = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], check=True, capture_output=True, text=True
    )
    return tuple(map(float, out.stdout.split()))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    llama(**SIZE, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def file_mb(directory):
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 2**20


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The quantized model in both formats, one of them in shards."""
    folder, model = tmp_path_factory.mktemp("packed"), lowrank.load_model(dense, "nf4")
    lowrank.save_model(model, folder / "lowrank", format="lowrank")
    lowrank.save_model(model, folder / "bnb", format="bitsandbytes", max_shard_bytes=10**7)
    return folder


@pytest.mark.parametrize("format", ["dense", "bitsandbytes"])
def test_neither_loading_nor_saving_holds_the_full_model(dense, tmp_path, format):
    """Loading peaks at the packed model and two tensors, and saving it again at no more."""
    loaded, saved, held = peaks(dense, "nf4", tmp_path / "out", format)
    assert file_mb(dense) > 200 and held < 60
    assert held < loaded < held + 2 * LARGEST_MB + SLACK_MB < file_mb(dense) / 1.8
    assert saved < held + 2 * LARGEST_MB + SLACK_MB


def test_experts_are_never_dense_together(tmp_path):
    """Those of a layer would be 32 MB and 16 MB; one projection of one expert is 2 MB."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_local_experts=8,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    loaded, saved, held = peaks(tmp_path / "dense", "nf4", tmp_path / "out", "dense")
    assert file_mb(tmp_path / "dense") > 100 and held < 20
    assert held < loaded < held + 2 * 2 + SLACK_MB and saved < held + 2 * 2 + SLACK_MB


@pytest.mark.parametrize(
    ("name", "load"),
    [("lowrank", LOAD), ("bnb", LOAD), ("lowrank", ON_META)],
    ids=str.split("ours bitsandbytes meta"),
)
def test_a_quantized_directory_is_in_memory_once(packed, name, load):
    loaded, _, held = peaks(packed / name, "", load=load)
    assert held < loaded < held + SLACK_MB
    assert held < 60 and file_mb(packed / name) < 1.02 * held


@pytest.mark.slow
def test_smollm2_in_four_bits(smollm2, tmp_path):
    """Two thirds of what it holds are the table of its embedding, in float32."""
    table = 4 * 49152 * 576 / 2**20
    loaded, saved, held = peaks(smollm2, "nf4", tmp_path / "out", "lowrank")
    assert 160 < held < 165 and held < loaded < held + 2 * table
    assert saved < held + 2 * table
    assert file_mb(tmp_path / "out") < 1.02 * held
    loaded, _, again = peaks(tmp_path / "out", "")
    assert again == held < loaded < held + SLACK_MB
