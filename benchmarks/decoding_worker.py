"""One side of the decoding benchmark, in a process of its own that writes when it is told to.

`python -m benchmarks.decoding_worker SIDE DIRECTORY` loads the model, says so, and then answers
each line "[PROMPTS, TOKENS]" on its standard input with a line of JSON: seconds, the ids written
and peak memory. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import reset_peak, status_bytes
from benchmarks.training_data import IGNORED, initialise_adapter
from benchmarks.training_worker import ALPHA, RANK, bitsandbytes_model, peft_config

Ids = Sequence[Sequence[int]]
Write = Callable[[Ids, int], list[list[int]]]  # prompts, how many tokens -> those of each


def lowrank_side(
    directory: Path, quantizer: str | None = "nf4", adapter: bool = False, embeddings: bool = False
) -> Write:
    """`load_model` and `generate`, but for text."""
    import lowrank
    from lowrank.models.generate import generate_ids

    model = lowrank.load_model(str(directory), quantizer=quantizer, embeddings=embeddings)
    if adapter:
        config = lowrank.LoRAConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        initialise_adapter(lowrank.inject(model, config))
    return lambda prompts, count: generate_ids(model, prompts, count)


def dense_side(directory: Path) -> Write:
    """transformers over dense float32 weights."""
    import transformers

    return _generate(
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    )


def bitsandbytes_side(directory: Path, adapter: bool = False) -> Write:
    """transformers + bitsandbytes, and peft, as their documentation has it."""
    model = bitsandbytes_model(directory)
    if adapter:
        import peft

        model = peft.get_peft_model(model, peft_config())
        initialise_adapter(model)
    return _generate(model)


def _generate(model) -> Write:
    """transformers' own loop, prompts padded on the left."""
    model.eval()
    model.generation_config.eos_token_id = None  # all sides write as much
    model.generation_config.pad_token_id = 0

    def write(prompts: Ids, count: int) -> list[list[int]]:
        S = max(map(len, prompts))
        ids = torch.tensor([[0] * (S - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (S - len(p)) + [1] * len(p) for p in prompts])
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False
        )
        return made[:, S:].tolist()

    return write


SIDES: dict[str, Callable[[Path], Write]] = {
    "lowrank": lowrank_side,
    "lowrank, adapter": lambda directory: lowrank_side(directory, adapter=True),
    "lowrank, head in NF4 too": lambda directory: lowrank_side(directory, embeddings=True),
    "lowrank, dense fp32": lambda directory: lowrank_side(directory, quantizer=None),
    "transformers, dense fp32": dense_side,
    "bitsandbytes": bitsandbytes_side,
    "bitsandbytes, peft adapter": lambda directory: bitsandbytes_side(directory, adapter=True),
}


def prompts_of(directory: Path) -> list[list[int]]:
    """What stands in front of the labels in the first batch of `training_data`."""
    batch = json.loads((directory / "batches.json").read_text())[0]
    return [
        [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
        for row in batch
    ]


def main(side: str, directory: Path) -> None:
    """Load, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    base = status_bytes("VmRSS")  # torch is imported, nothing else
    write, prompts = SIDES[side](directory), prompts_of(directory)
    print(json.dumps({"load_peak_bytes": status_bytes("VmHWM") - base}), file=answers)
    reset_peak()
    for line in sys.stdin:
        rows, count = json.loads(line)
        start = time.perf_counter()
        ids = write(prompts[:rows], count)
        took = time.perf_counter() - start
        peak = status_bytes("VmHWM") - base
        print(json.dumps({"seconds": took, "ids": ids, "peak_bytes": peak}), file=answers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
