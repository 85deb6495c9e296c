"""One side of a training step, in a process of its own that works when it is told to.

`python -m benchmarks.training_worker SIDE DIRECTORY` loads the model, says so, and then answers
each line "I" on its standard input with a line of JSON about step I: seconds, loss and peak memory.
Sides take turns in time, and their memory is apart. What libraries print goes to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import reset_peak, status_bytes
from benchmarks.training_data import IGNORED, adapted_elements, initialise_adapter, packed, padded

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
Loss = Callable[[nn.Module, list], Tensor]  # a batch -> mean loss over its labelled tokens
Step = Callable[[int], float]  # what step I does; returns its loss
Side = Callable[[Path], tuple[nn.Module, Callable[[list], Step]]]


def _loop(model: nn.Module, loss: Loss) -> tuple[nn.Module, Callable[[list], Step]]:
    """The loop that is the same for all: forward, backward, torch's fused AdamW."""

    def begin(batches: list) -> Step:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

        def step(index: int) -> float:
            value = loss(model, batches[index])
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.item()

        return step

    return model, begin


def end_to_end(model: nn.Module, batch: list) -> Tensor:
    """lowrank's default: examples end to end, no padding, logits where there are labels."""
    inputs = packed(batch)
    return model.loss(**inputs) / (inputs["labels"] != IGNORED).sum()


def with_padding(model: nn.Module, batch: list) -> Tensor:
    """lowrank with `padding_free=False`: every padded position, logits where there are labels."""
    inputs = padded(batch)
    return model.loss(**inputs) / (inputs["labels"] != IGNORED).sum()


def with_all_logits(model: nn.Module, batch: list) -> Tensor:
    """lowrank doing all that its peers do: every padded position, every logit."""
    inputs = padded(batch)
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    # the labels move, as in transformers: moving the logits would copy 100 MB
    labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )


def as_transformers(model: nn.Module, batch: list) -> Tensor:
    """What a model of transformers does with a padded batch."""
    return model(**padded(batch), use_cache=False).loss


def lowrank_side(directory: Path, loss: Loss = end_to_end, checkpointing: bool | str = False):
    """lowrank: a plain loop over a model of `lowrank.load_model`."""
    import lowrank

    model = lowrank.load_model(str(directory), quantizer="nf4", dtype=torch.float32)
    model.gradient_checkpointing = checkpointing
    config = lowrank.LoRAConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0
    )
    return _loop(lowrank.inject(model, config), loss)


def peft_side(directory: Path, checkpointing: bool = False):
    """transformers + peft + bitsandbytes as their tutorials set them up for QLoRA."""
    model = bitsandbytes_model(directory)
    import peft

    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return _loop(peft.get_peft_model(model, peft_config()), as_transformers)


def dense_side(directory: Path):
    """transformers + peft over the dense float32 weights: LoRA without quantization."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return _loop(peft.get_peft_model(model, peft_config()), as_transformers)


def trl_side(directory: Path):
    """TRL's SFTTrainer over the same quantized model: its own loss, loop and collation."""
    model = bitsandbytes_model(directory)
    import peft

    from benchmarks.training_trl import begin

    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft_config())
    return model, functools.partial(begin, model, directory, LEARNING_RATE)


SIDES: dict[str, Side] = {
    "lowrank": lowrank_side,
    "lowrank, packed": lowrank_side,
    "lowrank, padding computed": functools.partial(lowrank_side, loss=with_padding),
    "lowrank, padding and all logits": functools.partial(lowrank_side, loss=with_all_logits),
    "lowrank, checkpointing": functools.partial(lowrank_side, checkpointing=True),
    "lowrank, selective": functools.partial(lowrank_side, checkpointing="selective"),
    "peft + bitsandbytes": peft_side,
    "peft + bitsandbytes, checkpointing": functools.partial(peft_side, checkpointing=True),
    "trl": trl_side,
    "peft, dense fp32": dense_side,
}
FULL = ("lowrank, packed",)  # those that train on full.json


def bitsandbytes_model(directory: Path) -> nn.Module:
    """transformers' model of the directory in NF4 with double quantization, by bitsandbytes."""
    from benchmarks import peers

    peers.bitsandbytes()
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map="cpu",
    )


def peft_config():
    """LoRA on every linear layer, as on all sides."""
    import peft

    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def main(side: str, directory: Path) -> None:
    """Load, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    base = status_bytes("VmRSS")  # torch is imported, nothing else
    model, begin = SIDES[side](directory)
    model.train()
    layers = initialise_adapter(model)
    batches = "full.json" if side in FULL else "batches.json"
    step = begin(json.loads((directory / batches).read_text()))
    load_peak = status_bytes("VmHWM") - base
    separate = reset_peak()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        json.dumps(
            {
                "layers": layers,
                "trainable": trainable,
                "adapted": adapted_elements(model),
                "load_peak_bytes": load_peak,
            }
        ),
        file=answers,
    )
    for line in sys.stdin:
        start = time.perf_counter()
        loss = step(int(line))
        took = time.perf_counter() - start
        peak = status_bytes("VmHWM") - base
        print(
            json.dumps(
                {
                    "seconds": took,
                    "loss": loss,
                    "peak_bytes": peak,
                    "load_peak_bytes": load_peak if separate else peak,
                }
            ),
            file=answers,
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
