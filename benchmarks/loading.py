"""Loading: a dense checkpoint quantized as it is read, and a packed state dict put into a model.

The checkpoint has layers of Llama-8B's shapes in bfloat16, a shard each, with random weights. Every
side loads it in fresh processes, in turn, from files that the page cache has been told to drop; how
long reading them alone takes stands beside. The state dict has SmolLM2-135M's shapes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.errors import MissingInputError
from benchmarks.harness import spread
from benchmarks.settings import Settings

ROOT = Path(__file__).parent.parent
REPEATS = 3
READING, OURS, PEER = "reading alone", "lowrank", "transformers + bitsandbytes"
SLACK = (
    64 << 20
)  # bytes beside the model and two tensors: the interpreter's own, and the allocator's
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 16384,
    "tie_word_embeddings": False,
}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def run(settings: Settings) -> list[dict]:
    """Two cases. Raises MissingInputError where the disk has no room for the checkpoint."""
    return [*_checkpoint_rows(settings), *_state_dict_rows()]


def _checkpoint_rows(settings: Settings) -> list[dict]:
    sides = [READING, OURS]
    if "bitsandbytes" in settings.against and peers.missing("transformers") is None:
        sides.append(PEER)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings.tell("loading: writing the checkpoint")
        sizes = write_checkpoint(directory, settings.layers)
        answers: dict[str, list[dict]] = {side: [] for side in sides}
        for turn in range(REPEATS):
            for side in sides:
                answer = _load(side, directory)
                answers[side].append(answer)
                settings.tell(f"loading: {turn + 1} of {REPEATS}: {side} {answer['seconds']:.2f} s")
    case = (
        f"{settings.layers} layers of Llama-8B in bfloat16, {sum(sizes) / 1e9:.1f} GB, "
        "to NF4 with double quantization"
    )
    return checkpoint_rows(case, answers, sizes)


def checkpoint_rows(case: str, answers: dict[str, list[dict]], sizes: list[int]) -> list[dict]:
    """A row a side; ours is wrong where its peak is more than the model and two tensors."""
    alone = statistics.median(answer["seconds"] for answer in answers[READING])
    rows = []
    for side, taken in answers.items():
        times = [answer["seconds"] for answer in taken]
        row = {
            "benchmark": "loading",
            "case": case,
            "contender": side,
            "path": "",
            **spread(times),
            "baseline": READING,
            "speed": alone / statistics.median(times),
            "gbs": sum(sizes) / statistics.median(times) * 1e-9,
            "held_bytes": taken[0]["held_bytes"],
        }
        if all(answer["peak_bytes"] is not None for answer in taken):
            row["peak_bytes"] = max(answer["peak_bytes"] for answer in taken)
            row["extra_bytes"] = max(0, row["peak_bytes"] - row["held_bytes"])
            if side == OURS and row["extra_bytes"] > 2 * max(sizes) + SLACK:
                row["wrong"] = (
                    f"{row['extra_bytes'] / 1e6:.0f} MB beside the model, expected at most two "
                    f"tensors of {max(sizes) / 1e6:.0f} MB"
                )
        rows.append(row)
    return rows


def write_checkpoint(directory: Path, layers: int) -> list[int]:
    """A Llama of random weights in bfloat16, a shard a layer; the bytes of its tensors."""
    from lowrank.io.safetensors import save_safetensors
    from lowrank.models.config import DecoderConfig
    from lowrank.models.decoder import Decoder

    fields = LLAMA | {"num_hidden_layers": layers}
    config = DecoderConfig.from_hf({"model_type": "llama", **fields})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(config).named_parameters()}
    sizes = [2 * shape.numel() for shape in shapes.values()]
    free = shutil.disk_usage(directory).free
    if free < 1.1 * sum(sizes):
        raise MissingInputError(
            f"{directory}: {sum(sizes) / 1e9:.1f} GB are to be written, {free / 1e9:.1f} are free; "
            "set TMPDIR, or take fewer --layers"
        )
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "other"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    noise = torch.randn(1 << 22).mul_(0.02).bfloat16()  # the same in all: they take long to draw
    for file, names in shards.items():
        save_safetensors(directory / file, {name: _random(noise, shapes[name]) for name in names})
    placed = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config.to_hf(torch.bfloat16)))
    return sizes


def _random(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape)


def _load(side: str, directory: Path) -> dict:
    worker = [sys.executable, "-m", "benchmarks.loading_worker", side, str(directory)]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading: {side} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _state_dict_rows() -> list[dict]:
    import lowrank
    from lowrank.io.safetensors import load_safetensors, save_safetensors
    from lowrank.models.config import DecoderConfig
    from lowrank.models.decoder import Decoder

    model = Decoder(DecoderConfig.from_hf({"model_type": "llama", **SMOLLM2}))
    lowrank.quantize(model.bfloat16(), "nf4")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        save_safetensors(file, model.state_dict())
        tensors = load_safetensors(file)
        sides = {
            OURS: lambda: model.load_state_dict(tensors),
            "lowrank, the file read too": lambda: model.load_state_dict(load_safetensors(file)),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(REPEATS + 1):
            for side, load in sides.items():
                start = time.perf_counter()
                load()
                if turn:  # the first makes the native library's acquaintance
                    times[side].append(time.perf_counter() - start)
        size = file.stat().st_size
    return [
        {
            "benchmark": "loading",
            "case": f"load_state_dict of SmolLM2-135M in NF4, {size / 1e6:.0f} MB",
            "contender": side,
            "path": "",
            **spread(taken),
            "baseline": OURS,
            "speed": statistics.median(times[OURS]) / statistics.median(taken),
            "gbs": size / statistics.median(taken) * 1e-9,
        }
        for side, taken in times.items()
    ]
