"""What a run took place on, and the restriction of everybody to one instruction set or thread
count.

Nothing here imports torch at the top: threads and instruction sets are chosen by environment
variables that must be set before torch and its peers are loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.errors import UsageError

ISA_VARIABLES = {
    "avx2": {
        "LOWRANK_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
UNRESTRICTED = {
    "bitsandbytes": "bitsandbytes has no switch for its instruction set: its C++ still uses what "
    "the CPU has beyond {isa}. Only its AVX-512 bf16 inference path is kept off, as it is on a CPU "
    "without that.",
    "compile": "torch.compile writes its vectors for {isa}, but its C++ compiler may use what the "
    "CPU has beyond (-march=native).",
}  # what the restriction to an instruction set does not reach
FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "unsloth",
    "liger-kernel",
)
LARGEST_L3 = 256 << 20  # a cloud guest is shown the whole socket's L3, of which it has a share


def restrict(threads: int | None, isa: str | None) -> None:
    """Set the variables that limit torch, MKL, oneDNN and lowrank, in this process and its
    children.

    Raises UsageError when torch is loaded already and an instruction set is asked for.
    """
    if isa is not None:
        if "torch" in sys.modules and os.environ.get("LOWRANK_ISA") != isa:
            raise UsageError(
                f"--isa {isa}: torch is loaded already; run it in a process of its own"
            )
        os.environ.update(ISA_VARIABLES[isa])
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)


def describe() -> dict:
    """The machine and the software: model, cores, flags, caches, memory, versions, commit."""
    import torch

    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{_cpuinfo('cpu family')}/{_cpuinfo('model')}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in cpu_flags()],
        "l3_bytes": l3_bytes(),
        "memory_bytes": memory("MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)
        },
        "commit": commit(),
    }


def cpu_flags() -> set[str]:
    """The CPU's feature flags as Linux names them; empty elsewhere."""
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def l3_bytes() -> int:
    """Size of the last-level cache shown to this machine, 0 when unknown."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=0)


def memory(field: str) -> int:
    """A line of /proc/meminfo in bytes (MemTotal, MemAvailable); 0 where there is none."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def working_set_bytes() -> int:
    """Bytes that each contender's inputs rotate over: 4 x min(L3, 256 MB), at most a
    sixteenth of free memory.
    """
    wanted = 4 * min(l3_bytes() or 64 << 20, LARGEST_L3)
    available = memory("MemAvailable")
    return min(wanted, available // 16) if available else wanted


def commit() -> str:
    """The checkout's commit, with + when files differ from it; empty outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def slug(described: dict, isa: str | None) -> str:
    """A file name for the machine: its CPU, threads and instruction set."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", described["cpu"].lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "cpu"
    level = isa or described["torch_cpu_capability"].lower()
    return f"{name}-{described['threads']}t-{level}"


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
