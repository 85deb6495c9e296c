"""Compare quantizers on a model: error, perplexity, speed and memory of each.

  lowrank report --model HuggingFaceTB/SmolLM2-135M-Instruct \\
    --schemes nf4 int4 nf4:block_size=128 --text text.txt --output report
  lowrank report --model weights.safetensors --output report2

Of what lowrank cannot run, a .safetensors file or a directory of another architecture, the weights
alone are compared. The output directory gets report.md, report.json and two plots.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from lowrank.cli.measure import read_text
from lowrank.cli.options import add_config, add_fields, check_types, make, tables_of
from lowrank.cli.output import show
from lowrank.cli.source import ELSEWHERE, Source
from lowrank.errors import ConfigError
from lowrank.io.json_files import read_json
from lowrank.models.config import MODEL_TYPES
from lowrank.models.gguf_file import GGUFFile
from lowrank.report import report
from lowrank.report.result import check_directory
from lowrank.report.schemes import resolve
from lowrank.report.weights import WeightFiles
from lowrank.surgery.quantize import SKIP


@dataclass(kw_only=True)
class Comparison:
    """What is compared, on what.

    model: a Hugging Face directory, a .gguf or .safetensors file, or a name on the hub.
    schemes: names, or name:option=value,option=value; if none, all that need no options.
    output: where to write; the table is printed in any case.
    text: a file of text for the perplexity, in UTF-8.
    tokens: of the text to read, at most.
    window: tokens that the model sees at once; 512, or its positions if fewer.
    stride: tokens from window to window; the window, so that they lie side by side.
    rows: real activations of each layer for the output error.
    skip: layers to leave out, by name or suffix.
    embeddings: of a file of weights, compare on tables of embeddings too.
    speed: time each scheme.
    dtype: what is computed with.   device: cpu, or cuda, or cuda:1 for the second GPU.
    seed: of the timed inputs, and of schemes that draw random numbers.
    """

    model: str
    schemes: list[str] = field(default_factory=list)
    output: str | None = None
    text: str | None = None
    tokens: int = 4096
    window: int | None = None
    stride: int | None = None
    rows: int = 256
    skip: list[str] = field(default_factory=lambda: list(SKIP))
    embeddings: bool = False
    speed: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        self.source = Source(model=self.model, dtype=self.dtype, device=self.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_fields(parser, Comparison, "report", "the comparison: [report] in a TOML file")


def run(args: argparse.Namespace) -> int:
    settings = make(Comparison, tables_of(args, {"report": Comparison})["report"], ELSEWHERE)
    resolve(settings.schemes or None)  # before anything is loaded
    if settings.output is not None:
        check_directory(settings.output)
    text = None if settings.text is None else read_text(settings.text)
    model = _weights_alone(settings)
    if model is not None and text is not None:
        raise ConfigError(
            f"text: {settings.model} is no model that lowrank runs, its weights alone are "
            "compared: leave --text out, or call lowrank.quant.report with the model"
        )
    tokenizer = None if text is None else settings.source.load_tokenizer()
    same = ("tokens", "window", "stride", "rows", "skip", "speed", "seed")
    compared = report(
        settings.source.load() if model is None else model,
        settings.schemes or None,
        text=text,
        tokenizer=tokenizer,
        name=Path(settings.model).name,
        quantized_before=_quantized_before(settings.model),
        **{name: getattr(settings, name) for name in same},
    )
    text = str(compared)
    if settings.output is not None:
        text += f"\n\nsaved: {', '.join(map(str, compared.save(settings.output)))}"
    show(args, text, compared.to_dict())
    return 0


def _weights_alone(settings: Comparison) -> Mapping[str, Tensor] | None:
    """The tensors, of a .safetensors file or of a directory that holds no decoder of ours."""
    path = Path(settings.model)
    if path.is_dir():
        config = path / "config.json"
        if config.is_file() and read_json(config).get("model_type") in MODEL_TYPES:
            return None
    elif path.suffix != ".safetensors":
        return None
    return WeightFiles(path, settings.embeddings, settings.device)


def _quantized_before(model: str) -> str | None:
    """What most of the weights of a .gguf file are stored as, unless it is floats."""
    path = Path(model)
    if path.suffix != ".gguf" or not path.is_file():
        return None
    file, weights = GGUFFile(path), Counter[str]()
    for name, info in file.tensors.items():
        weights[file.kind(name)] += math.prod(info.shape)
    ((most, _),) = weights.most_common(1)
    return None if most in ("F64", "F32", "F16", "BF16") else most
