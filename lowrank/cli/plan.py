"""Say how much memory training takes, and whether it fits a card, before anything is loaded.

  lowrank plan --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --card "12 GB"
  lowrank plan --config out/run.toml --card 4090
  lowrank plan --hidden-size 4096 --num-hidden-layers 32 --num-attention-heads 32 --full

Of a model on the hub, config.json alone is fetched. A TOML file of `lowrank train` is taken as it
is, and a flag beats it. The status is 1 if the run does not fit the card.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import lowrank
from lowrank import quant
from lowrank.cli.options import Reader, add_fields, check_types, given_fields, make, read_toml
from lowrank.cli.output import columns, show
from lowrank.cli.train import TABLES
from lowrank.errors import ConfigError
from lowrank.plan import (
    Advice,
    Card,
    MemoryPlan,
    Planner,
    Remedy,
    Settings,
    advise,
    find_card,
)
from lowrank.quant.registry import Quantizer

OK, DOES_NOT_FIT = 0, 1
GIB = 1 << 30
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip


@dataclass(kw_only=True)
class Step:
    """A model, how its weights are stored, and what a step of training is.

    model: a Hugging Face directory, a config.json, a .gguf file, or a name on the Hugging Face hub.
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        vocab_size: numbers in place of a model, of a Llama; of the last ones left out, usual ones.
    quantizer: how the frozen linear weights are stored, nf4 for QLoRA; none keeps them in `dtype`.
    block_size: weights that share a scale; the quantizer's own default, 64 for nf4.
    double_quant: quantize the scales too; the quantizer's own default, yes for nf4.
    embeddings: quantize the embedding too, and a head tied to it.
    dtype: what weights that are not quantized are held in, and what is computed with.
    full: train all parameters, without an adapter.
    per_device_train_batch_size: examples in one forward and backward.
    max_length: tokens of each of them.
    gradient_accumulation_steps: batches whose gradients make one optimizer step.
    gradient_checkpointing: recompute activations in the backward.
    optim: the optimizer, by the names of `lowrank train`.
    device_budget: of a paged optimizer: bytes of its state that may lie on the device.
    device: cpu or cuda.
    devices: how many share weights, gradients and states; each has a batch.
    card: what it is to fit: a card's name, as 4090 or "A100 80GB", or its memory, as "12 GB".
    """

    model: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    vocab_size: int | None = None
    quantizer: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    embeddings: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    full: bool = False
    per_device_train_batch_size: int = 8
    max_length: int = 1024
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool | Literal["selective"] = False
    optim: str = "adamw_torch"
    device_budget: int | None = None
    device: str = "cuda"
    devices: int = 1
    card: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        given = self.numbers
        if (self.model is None) == (not given):
            got = f"--model and --{next(iter(given)).replace('_', '-')}" if given else "neither"
            raise ConfigError(
                f"model: expected --model, or numbers such as --hidden-size; got {got}"
            )
        if self.quantizer is None and self.quantizer_options:
            name, value = next(iter(self.quantizer_options.items()))
            raise ConfigError(f"{name}: belongs to a quantizer; got {value!r} without one")

    @property
    def numbers(self) -> dict[str, int]:
        """The sizes that were given."""
        return {name: n for name in _SIZES if (n := getattr(self, name)) is not None}

    @property
    def quantizer_options(self) -> dict[str, Any]:
        """What was given for the quantizer; it has defaults of its own."""
        given = {"block_size": self.block_size, "double_quant": self.double_quant}
        return {name: value for name, value in given.items() if value is not None}

    def make_quantizer(self) -> Quantizer | None:
        """That of the name and the options."""
        if self.quantizer is None:
            return None
        return quant.get(self.quantizer, **self.quantizer_options)

    def source(self) -> str | Mapping[str, Any]:
        """The model, or the config.json of a Llama of these sizes."""
        if self.model is not None:
            return self.model
        hidden = self.numbers.get("hidden_size", 0)
        # LLaMA's: two thirds of four times, up to a multiple of 256; arXiv:2302.13971
        usual = {"vocab_size": 32000, "intermediate_size": (8 * hidden // 3 + 255) // 256 * 256}
        return usual | self.numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Reader([Path]), metavar="FILE", help="a TOML file of `lowrank train`"
    )
    add_fields(parser, Step, "step", "the model and the step")
    add_fields(parser, lowrank.LoRAConfig, "lora", "LoRAConfig: [lora] in a TOML file")


def run(args: argparse.Namespace) -> int:
    step, lora, notes = _resolve(args)
    told = {
        f.name: vars(step)[f.name] for f in dataclasses.fields(Settings) if f.name in vars(step)
    }
    told |= {"quantizer": step.make_quantizer(), "dtype": getattr(torch, step.dtype)}
    settings = Settings(lora=None if step.full else lora, **told)
    card = None if step.card is None else find_card(step.card)
    planner = Planner.of(step.source())
    plan = planner.plan(settings)
    advice = None if card is None else advise(planner, settings, card)
    show(args, _text(step, plan, card, advice, notes), _values(plan, card, advice))
    return OK if card is None or plan.fits(card) else DOES_NOT_FIT


def _resolve(args: argparse.Namespace) -> tuple[Step, lowrank.LoRAConfig, list[str]]:
    """The file of --config, what of it matters here, the flags over it; and what is to be said."""
    file = read_toml(args.config, TABLES) if args.config else {}
    both = {**file.get("run", {}), **file.get("train", {})}
    known = {field.name for field in dataclasses.fields(Step)}
    if args.config:
        both.setdefault("dtype", "float32")  # as `lowrank train` has it
    flags = given_fields(args, "step")
    if "card" in flags:
        both.pop("device", None)  # of the machine that the file was made on
    if any(name in flags for name in ("model", *_SIZES)):
        both.pop("model", None)
    notes = []
    if both.get("bf16") or both.get("fp16"):
        notes.append("activations count as those of dtype: under autocast there are fewer bytes")
    step = {k: v for k, v in both.items() if k in known} | flags
    lora = file.get("lora", {}) | given_fields(args, "lora")
    return make(Step, step), make(lowrank.LoRAConfig, lora), notes


def _text(
    step: Step, plan: MemoryPlan, card: Card | None, advice: Advice | None, notes: list[str]
) -> str:
    """For people: the components, the largest first, a bar beside each."""
    parts = {name: n for name, n in plan.components.items() if n >= 1 << 20}
    rows = [
        (name, _size(n), "█" * round(30 * n / plan.training)) for name, n in
        sorted(parts.items(), key=lambda part: -part[1])
    ]  # fmt: skip
    rows.append(("together", _size(plan.training), ""))
    share = plan.trainable / plan.parameters
    each = f" on each of {step.devices} devices" if step.devices > 1 else ""
    lines = [
        f"{_many(plan.parameters)} parameters, {_many(plan.trainable)} of them trained "
        f"({share:.2%}); batches of {step.per_device_train_batch_size} x "
        f"{plan.settings.max_length} tokens{each}",
        "",
        columns(rows),
        "",
    ]
    if plan.loading > plan.training:
        lines.append(f"loading takes {_size(plan.loading)}, more than training")
    texts = f"{step.per_device_train_batch_size} texts of {plan.settings.max_length} tokens"
    lines.append(f"writing {texts} takes {_size(plan.writing)}")
    if plan.elsewhere:
        lines.append(f"in host memory or a file: {_size(plan.elsewhere)} of the optimizer")
    if card is not None and advice is not None:
        verdict = "fits" if plan.fits(card) else "does not fit"
        lines.append(f"{_size(plan.peak)}: {verdict} {card.name} with {_size(card.total)}")
        if advice.largest_batch:
            lines.append(
                f"largest batch of {plan.settings.max_length} tokens: {advice.largest_batch}; "
                f"longest {step.per_device_train_batch_size} examples: "
                f"{advice.largest_length} tokens"
            )
        lines += [_remedy(remedy) for remedy in advice.remedies]
        if not plan.fits(card) and not advice.remedies:
            lines.append("no change of settings makes it fit: take a smaller model or more devices")
    return "\n".join([*lines, *notes]).rstrip()


def _remedy(remedy: Remedy) -> str:
    said = " ".join(_flag(name, value) for name, value in remedy.changes.items())
    return f"it fits with {said}: {_size(remedy.plan.peak)} ({remedy.cost})"


def _flag(name: str, value: Any) -> str:
    if isinstance(value, lowrank.LoRAConfig):
        return f"--no-full --r {value.r} --target-modules {value.target_modules}"
    return f"--{name.replace('_', '-')} {str(_word(value)).lower()}"


def _word(value: Any) -> Any:
    """What stands for a setting's value in a file."""
    if isinstance(value, lowrank.LoRAConfig):
        return {"r": value.r, "target_modules": value.target_modules}
    word = getattr(value, "name", value)
    return word if isinstance(word, bool) else str(word)


def _values(plan: MemoryPlan, card: Card | None, advice: Advice | None) -> dict[str, Any]:
    """For machines: bytes."""
    values: dict[str, Any] = {
        "parameters": plan.parameters,
        "trainable": plan.trainable,
        "components": plan.components,
        "training": plan.training,
        "loading": plan.loading,
        "peak": plan.peak,
        "elsewhere": plan.elsewhere,
        "writing": plan.writing,
    }
    if card is not None and advice is not None:
        values |= {
            "card": card.name,
            "card_bytes": card.total,
            "fits": plan.fits(card),
            "largest_batch": advice.largest_batch,
            "largest_length": advice.largest_length,
            "remedies": [
                {"changes": {k: _word(v) for k, v in r.changes.items()}, "cost": r.cost,
                 "peak": r.plan.peak}
                for r in advice.remedies
            ],
        }  # fmt: skip
    return values


def _many(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.2f} million"


def _size(n: int) -> str:
    return f"{n / GIB:.2f} GB" if n >= GIB else f"{n / (1 << 20):.0f} MB"
