"""The model that a command loads: which, and how it is stored and computed with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lowrank
from lowrank import quant
from lowrank.cli.options import add_config, add_fields, check_types, make, tables_of
from lowrank.errors import ConfigError
from lowrank.quant.registry import Quantizer


@dataclass(kw_only=True)
class Source:
    """A model and its frozen weights.

    model: a Hugging Face directory, a .gguf file, or a name on the Hugging Face hub.
    quantizer: how the frozen linear weights are stored, nf4 for QLoRA; none keeps them in `dtype`.
    block_size: weights that share a scale; the quantizer's own default, 64 for nf4.
    double_quant: quantize the scales too; the quantizer's own default, yes for nf4.
    embeddings: quantize the embedding too, and a head tied to it.
    dtype: what is computed with.
    device: cpu, or cuda, or cuda:1 for the second GPU.
    weights_budget: bytes of weights that may lie on the device; further blocks wait in host memory.
    model_revision: of a model on the hub: a branch, a tag or a commit.
    """

    model: str
    quantizer: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    embeddings: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    weights_budget: int | None = None
    model_revision: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        try:
            here = not torch.empty(0, device=self.device).is_meta
            reason = "it holds no values"
        except (RuntimeError, AssertionError) as error:  # torch's words, the first sentence of them
            here, reason = False, str(error).partition("\n")[0].partition(". ")[0]
        if not here:
            raise ConfigError(f"device: cannot use {self.device!r}: {reason}") from None
        if self.quantizer is None:
            options = self.quantizer_options
            if self.embeddings:
                options["embeddings"] = True
            for field, value in options.items():
                raise ConfigError(
                    f"{field}: belongs to a quantizer; got {value!r} without one: "
                    "pass --quantizer nf4 too"
                )

    @property
    def quantizer_options(self) -> dict[str, int | bool]:
        """What was given for the quantizer; it has defaults of its own."""
        given = {"block_size": self.block_size, "double_quant": self.double_quant}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def load(self, sharded: bool = False) -> nn.Module:
        """The model, its linear weights quantized as they stream in, or as ranks read their own."""
        return lowrank.load_model(
            self.model,
            quantizer=self.make_quantizer(),
            embeddings=self.embeddings,
            dtype=self.torch_dtype,
            device=self.device,
            weights_budget=self.weights_budget,
            sharded=sharded,
            revision=self.model_revision,
        )

    def load_adapter(self, model: nn.Module, adapter: str) -> None:
        """Put an adapter onto the loaded model; its base is made again if training changed it."""
        lowrank.load_adapter(model, adapter, weights=self.open_weights())

    def load_tokenizer(self):
        return lowrank.load_tokenizer(self.model, revision=self.model_revision)

    def open_weights(self) -> Mapping[str, Tensor]:
        """The tensors as the model's files have them, each read when it is taken."""
        return lowrank.open_weights(self.model, revision=self.model_revision)

    def make_quantizer(self) -> Quantizer | None:
        if self.quantizer is None:
            return None
        return quant.get(self.quantizer, **self.quantizer_options)


@dataclass(kw_only=True)
class Run(Source):
    __doc__ = f"""{Source.__doc__}
    data: training examples, JSON lines, CSV or Parquet: text, prompt and completion, or messages.
    eval_data: held-out examples, for the loss before, after and every eval_steps.
    """

    data: str
    eval_data: str | None = None


ELSEWHERE = ", or set it in the TOML file"


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags of a Source, and --config for a file whose table [run] has them."""
    add_config(parser)
    add_fields(parser, Source, "run", "the model: [run] in a TOML file, as run.toml of a training")


def from_args(args: argparse.Namespace) -> Source:
    """The Source of the flags of `add_source`."""
    return source_of(tables_of(args, {"run": Run})["run"])


def source_of(run: Mapping[str, Any]) -> Source:
    """The Source in the fields of a Run."""
    names = {field.name for field in fields(Source)}
    return make(Source, {k: v for k, v in run.items() if k in names}, ELSEWHERE)
