"""One side of a training step, in a process of its own that works when it is told to.

`python -m benchmarks.training_worker SIDE DIRECTORY` loads the model, says so, and then answers
each line "I" on its standard input with a line of JSON about step I: seconds, loss and peak memory.
Sides take turns in time, and their memory is apart. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import reset_peak, status_bytes
from benchmarks.training_data import IGNORED, adapted_elements, initialise_adapter, packed, padded

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
Loss = Callable[[list], torch.Tensor]  # a batch -> mean loss over its labelled tokens


def lowrank_packed(directory: Path) -> tuple[torch.nn.Module, Loss]:
    """lowrank's default: examples end to end, no padding, logits where there are labels."""
    model = _lowrank_model(directory)

    def loss(batch: list) -> torch.Tensor:
        inputs = packed(batch)
        return model.loss(**inputs) / (inputs["labels"] != IGNORED).sum()

    return model, loss


def lowrank_padded(directory: Path) -> tuple[torch.nn.Module, Loss]:
    """lowrank with `padding_free=False`: every padded position, logits where there are labels."""
    model = _lowrank_model(directory)

    def loss(batch: list) -> torch.Tensor:
        inputs = padded(batch)
        return model.loss(**inputs) / (inputs["labels"] != IGNORED).sum()

    return model, loss


def lowrank_all_logits(directory: Path) -> tuple[torch.nn.Module, Loss]:
    """lowrank doing all that its peers do: every padded position, every logit."""
    model = _lowrank_model(directory)

    def loss(batch: list) -> torch.Tensor:
        inputs = padded(batch)
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        # the labels move, as in transformers: moving the logits would copy 100 MB
        labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )

    return model, loss


def peft_bitsandbytes(directory: Path) -> tuple[torch.nn.Module, Loss]:
    """transformers + peft + bitsandbytes as their tutorials set them up for QLoRA."""
    from benchmarks import peers

    peers.bitsandbytes()
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
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
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return _peft(model)


def peft_dense(directory: Path) -> tuple[torch.nn.Module, Loss]:
    """transformers + peft over the dense float32 weights: LoRA without quantization."""
    import transformers

    return _peft(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


SIDES = {
    "lowrank": lowrank_packed,
    "lowrank, padding computed": lowrank_padded,
    "lowrank, padding and all logits": lowrank_all_logits,
    "peft + bitsandbytes": peft_bitsandbytes,
    "peft, dense fp32": peft_dense,
}


def _lowrank_model(directory: Path) -> torch.nn.Module:
    import lowrank

    model = lowrank.load_model(str(directory), quantizer="nf4", dtype=torch.float32)
    return lowrank.inject(
        model,
        lowrank.LoRAConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0),
    )


def _peft(model: torch.nn.Module) -> tuple[torch.nn.Module, Loss]:
    import peft

    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
    return model, lambda batch: model(**padded(batch), use_cache=False).loss


def main(side: str, directory: Path) -> None:
    """Load, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    base = status_bytes("VmRSS")  # torch is imported, nothing else
    model, loss = SIDES[side](directory)
    model.train()
    layers = initialise_adapter(model)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, fused=True
    )
    batches = json.loads((directory / "batches.json").read_text())
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
        value = loss(batches[int(line)])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        took = time.perf_counter() - start
        peak = status_bytes("VmHWM") - base
        print(
            json.dumps(
                {
                    "seconds": took,
                    "loss": value.item(),
                    "peak_bytes": peak,
                    "load_peak_bytes": load_peak if separate else peak,
                }
            ),
            file=answers,
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
