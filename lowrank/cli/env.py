"""Show what is installed here, and which backends run."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from lowrank import ops, quant
from lowrank.ops import native
from lowrank.ops.schema import OPERATORS

# package -> how to get it, where lowrank does without
OPTIONAL = {
    "triton": "pip install triton",
    "tokenizers": "pip install 'lowrank-torch[text]'",
    "jinja2": "pip install 'lowrank-torch[text]'",
    "gguf": "pip install 'lowrank-torch[gguf]'",
    "matplotlib": "pip install 'lowrank-torch[plots]'",
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
}
REQUIRED = ("numpy", "huggingface_hub", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    rows = table()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    return 0


def table() -> list[tuple[str, str]]:
    """(what, value) rows, every value one line."""
    rows = [
        ("lowrank", package_version("lowrank-torch") or "a source checkout, not installed"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("GPU", gpu()),
        ("native CPU kernels", native_cpu()),
        ("native CUDA kernels", native_cuda()),
        ("quantizers", ", ".join(quant.names())),
    ]
    for op in OPERATORS:
        _, *backends = ops.explain(op).splitlines()
        here = [line.split(":")[0].strip() for line in backends if line.endswith(": here")]
        rows.append((op, ", ".join(here)))
    rows += [(name, package_version(name) or "missing: it is required") for name in REQUIRED]
    rows += [
        (name, package_version(name) or f"not here: {remedy}") for name, remedy in OPTIONAL.items()
    ]
    return rows


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(unknown version)" if find_spec(name.replace("-", "_")) else None


def gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def native_cpu() -> str:
    library = native.load_cpu()
    if isinstance(library, str):
        return library
    refused = "".join(f"; {name} refused: {why}" for name, why in native.refused_isas().items())
    return f"{native.isa()}, of {', '.join(native.usable_isas())} that run here{refused}"


def native_cuda() -> str:
    library = native.load_cuda()
    return library if isinstance(library, str) else "here"
