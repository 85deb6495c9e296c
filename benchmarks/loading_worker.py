"""One load of a checkpoint in a process of its own: its seconds, its peak, what the model holds.

`python -m benchmarks.loading_worker SIDE DIRECTORY` prints a line of JSON. Libraries are imported
and the files dropped from the page cache before the clock starts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import reset_peak, status_bytes
from benchmarks.loading import OURS, PEER, READING


def reading(directory: Path) -> Callable[[], None]:
    """Every tensor into memory of its own, one after another, and nothing done with it."""
    from lowrank.io.safetensors import SafetensorsFile

    def read() -> None:
        for path in sorted(directory.glob("*.safetensors")):
            file = SafetensorsFile(path)
            for name in file.entries:
                file.read(name)

    return read


def lowrank_nf4(directory: Path) -> Callable[[], nn.Module]:
    """`load_model` with a quantizer."""
    import lowrank

    lowrank.QuantLinear(64, 64)  # loads the native library
    return lambda: lowrank.load_model(directory, quantizer="nf4", dtype=torch.bfloat16)


def bitsandbytes_nf4(directory: Path) -> Callable[[], nn.Module]:
    """`from_pretrained` as its documentation has it for 4 bits."""
    from benchmarks import peers

    bnb = peers.bitsandbytes()
    import transformers

    bnb.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    transformers.logging.set_verbosity_error()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


SIDES = {READING: reading, OURS: lowrank_nf4, PEER: bitsandbytes_nf4}


def held_bytes(model: nn.Module | None) -> int:
    """Bytes of the model's tensors, those of bitsandbytes' quantization states among them."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(kept.values())


def _tensors(model: nn.Module | None) -> Iterator[Tensor]:
    if model is not None:
        yield from model.buffers()
        for parameter in model.parameters():
            yield parameter
            if (state := getattr(parameter, "quant_state", None)) is not None:
                yield from state.as_dict(packed=True).values()


def drop_from_page_cache(directory: Path) -> None:
    """Ask that the next read of these files comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a page that is not yet written stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(side: str, directory: Path) -> None:
    """Load once."""
    load = SIDES[side](directory)
    drop_from_page_cache(directory)
    gc.collect()
    measured, base = reset_peak(), status_bytes("VmRSS")
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    peak = status_bytes("VmHWM") - base if measured else None
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "held_bytes": held_bytes(model)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
