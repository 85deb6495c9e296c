"""What a file was written with."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of lowrank, torch and Python, and the system."""
    try:
        own = metadata.version("lowrank-torch")
    except metadata.PackageNotFoundError:
        own = "a source checkout, not installed"
    return {
        "lowrank": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU as the system knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
