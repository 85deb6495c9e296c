"""Who can be compared with, and who of them is here.

Nothing here imports torch: the command line reads it before threads and instruction sets are set.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence

from benchmarks.errors import UsageError

PEERS = {
    "torch": "dense layers, cross entropy over all logits, fused AdamW",
    "dequantize": "our dequantization into a new tensor, then torch's matmul",
    "compile": "the reference's equations in plain torch, through torch.compile",
    "bitsandbytes": "its NF4 layer, functions and 8-bit AdamW",
    "torchao": "its NF4 tensor and 8-bit AdamW",
    "peft": "its LoRA layers over dense and bitsandbytes bases",
    "trl": "its SFTTrainer",
    "unsloth": "its LoRA and dequantization kernels (CUDA)",
    "liger": "its fused linear and cross entropy (CUDA)",
}
LINEAR_SIDES = ("lowrank", "torch", "dequantize", "compile", "bitsandbytes", "torchao")
BITSANDBYTES = (0, 50, 2)  # the first with fused 4-bit products for more than one row
_MODULES = {"liger": "liger_kernel"}
_ONLY_CUDA = ("unsloth", "liger")
_INSTALL = {
    "bitsandbytes": "pip install 'bitsandbytes>=0.50.2'",
    "torchao": "pip install torchao",
    "peft": "pip install peft",
    "trl": "pip install trl",
    "unsloth": "pip install unsloth",
    "liger": "pip install --no-deps liger-kernel",
}


def missing(name: str, device_type: str = "cpu") -> str | None:
    """Why the peer cannot take part on such a device, or None. Imports nothing."""
    if name in ("torch", "dequantize"):
        return None
    if name == "compile":
        return _no_compiler(device_type)
    if name in _ONLY_CUDA and device_type != "cuda":
        return "it runs on CUDA devices only"
    module = _MODULES.get(name, name)
    remedy = _INSTALL.get(name, f"pip install {name}")
    if importlib.util.find_spec(module) is None:
        return f"{name} is not installed: {remedy}"
    if name == "bitsandbytes":
        version = importlib.metadata.version(name)
        if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < BITSANDBYTES:
            return f"{name} {version} is too old to compare with: {remedy}"
    return None


def chosen(kind: str, wanted: Sequence[str], known: Iterable[str]) -> list[str]:
    """The wanted names, each once. Raises UsageError where one is not known."""
    known = list(known)
    for name in wanted:
        if name not in known:
            raise UsageError(f"{kind}: expected some of {', '.join(known)}; got {name!r}")
    return list(dict.fromkeys(wanted))


def chosen_peers(text: str) -> list[str]:
    """--against: names parted by commas, or "none". Raises UsageError."""
    return [] if text == "none" else chosen("peer", text.split(","), PEERS)


def _no_compiler(device_type: str) -> str | None:
    if device_type == "cuda":
        absent = importlib.util.find_spec("triton") is None
        return "torch.compile needs Triton: pip install triton" if absent else None
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler} is not here"
    return None
