"""Show what is installed here, which backends run, and why others do not.

  lowrank env

For each operator: the backend that runs it on arguments which none refuses. Paste it all into a bug
report.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from lowrank import quant
from lowrank.cli.output import columns, show
from lowrank.io.versions import processor
from lowrank.ops import dispatch, native
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
    about, operators = versions_and_devices(), backends()
    chosen = [
        [op, *found["chosen"].values(), ", ".join(found["others"])]
        for op, found in operators.items()
    ]
    head = ["operator", *(f"on {device}" for device in devices()), "if asked for by name"]
    refused = [["backend", "why it refuses", "operators"], *refusals(operators)]
    text = "\n\n".join(map(columns, (about.items(), [head, *chosen], refused)))
    show(args, text, {**about, "operators": operators})
    return 0


def versions_and_devices() -> dict[str, str]:
    """What is here, every value one line."""
    found = {
        "lowrank": package_version("lowrank-torch") or "a source checkout, not installed",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CPU": processor(torch.device("cpu")),
        "GPU": gpu(),
        "native CPU kernels": native_cpu(),
        "native CUDA kernels": native_cuda(),
        "quantizers": ", ".join(quant.names()),
    }
    found |= {name: package_version(name) or "missing: it is required" for name in REQUIRED}
    for name, remedy in OPTIONAL.items():
        found[name] = package_version(name) or f"not here: {remedy}"
    return found


def backends() -> dict[str, dict[str, Any]]:
    """{operator: the backend chosen on each device, others that run it here, why the rest do not}.

    Chosen on arguments that it takes; `lowrank.ops.explain` tells of given ones.
    """
    found = {}
    for op in OPERATORS:
        chosen = {device: dispatch.preferred(op, device) for device in devices()}
        standing = dispatch.standing(op)
        found[op] = {
            "chosen": chosen,
            "others": [n for n, why in standing.items() if not (why or n in chosen.values())],
            "refused": {name: why for name, why in standing.items() if why},
        }
    return found


def devices() -> list[str]:
    """torch's names of the kinds of device that are here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def refusals(operators: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each backend and reason, with the operators that it holds for."""
    said: dict[tuple[str, str], list[str]] = {}
    for op, found in operators.items():
        for name, reason in found["refused"].items():
            reason = "has none of these" if reason == f"has no {op}" else reason
            said.setdefault((name, reason), []).append(op)
    return [
        [name, reason, "all" if len(names) == len(operators) else ", ".join(names)]
        for (name, reason), names in said.items()
    ]


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
