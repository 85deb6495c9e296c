"""One model and one list of batches for all sides of a training step.

The model is SmolLM2-135M-Instruct from a GGUF file (its weights have gone through Q4_1), converted
once by transformers to a directory of float32 safetensors that every side then loads. The examples
are E2E pairs, "meaning representation -> sentence", cut at 128 tokens; the loss is on the sentence
alone.

As a script, `python -m benchmarks.training_data GGUF E2E DIRECTORY STEPS` writes them into
DIRECTORY.
"""

from __future__ import annotations

import gzip
import json
import logging
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

BATCH, POSITIONS = 4, 128
IGNORED = -100


def write(gguf: Path, pairs: Path, directory: Path, steps: int) -> None:
    """Write the model and batches.json: steps x 4 x {"input_ids", "labels"}, unpadded, labels
    unshifted. And full.json: steps x {...} as many as together have 4 x 128 tokens or few less.
    """
    logging.disable(logging.WARNING)
    import safetensors.torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = {"gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, **source, dtype=torch.float32
    )
    config = model.config
    del config.quantization_config  # "gguf": transformers would refuse to save what it expanded
    config.save_pretrained(directory)
    tensors = {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters()
    }
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
    tokenizer.save_pretrained(directory)

    with gzip.open(pairs, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = random.Random(0).sample(rows, steps * BATCH)
    examples = [_example(row, tokenizer) for row in chosen]
    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    (directory / "batches.json").write_text(json.dumps(batches))
    others = iter(random.Random(1).sample(rows, len(rows)))
    full = [_full(_example(row, tokenizer) for row in others) for _ in range(steps)]
    (directory / "full.json").write_text(json.dumps(full))


def _example(row: dict, tokenizer) -> dict[str, list[int]]:
    prompt = tokenizer(f"{row['mr']} ->", add_special_tokens=False)["input_ids"]
    completion = tokenizer(f" {row['ref']}", add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    labels = [IGNORED] * len(prompt) + completion
    return {"input_ids": (prompt + completion)[:POSITIONS], "labels": labels[:POSITIONS]}


def _full(examples: Iterator[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """As many of the next examples as fit into the positions of a batch."""
    batch: list[dict[str, list[int]]] = []
    for example in examples:
        if real_tokens([*batch, example]) > BATCH * POSITIONS:
            break
        batch.append(example)
    return batch


def padded(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch as [4, 128]: input_ids, attention_mask, labels, padded on the right."""
    ids = torch.zeros(len(batch), POSITIONS, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(batch):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch laid end to end as [1, total]: input_ids, labels, position_ids that restart at 0."""
    ids, labels, positions = [], [], []
    for example in batch:
        ids += example["input_ids"]
        labels += [IGNORED, *example["labels"][1:]]  # nothing predicts an example's first token
        positions += range(len(example["input_ids"]))
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def real_tokens(batch: list[dict[str, list[int]]]) -> int:
    """Positions that hold a token."""
    return sum(len(example["input_ids"]) for example in batch)


def padding_share(batches: list[list[dict[str, list[int]]]]) -> float:
    """Share of the [4, 128] positions that hold none."""
    return 1 - sum(map(real_tokens, batches)) / (len(batches) * BATCH * POSITIONS)


def labelled_tokens(batch: list[dict[str, list[int]]]) -> int:
    """Tokens that the loss is about: an example's first is predicted by nothing."""
    return sum(label != IGNORED for example in batch for label in example["labels"][1:])


def adapted_elements(model: nn.Module) -> int:
    """Σ N·K over the linears that have an adapter."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    pairs = [(name, name.replace(".lora_A.", ".lora_B.")) for name in shapes if ".lora_A." in name]
    return sum(shapes[B][0] * shapes[A][1] for A, B in pairs)


@torch.no_grad()
def initialise_adapter(model: nn.Module) -> int:
    """Give every lora_A the same values on every side, by its layer's name; lora_B zeros. Returns
    their count.
    """
    count = 0
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            layer = name[name.index("layers.") :]
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
            count += 1
        elif ".lora_B." in name:
            parameter.zero_()
    return count


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
