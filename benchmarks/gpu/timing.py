"""Timing on a CUDA device: events instead of a clock, L2 instead of L3; else as in `harness`.

On a CPU the same code runs by the clock, so that what is measured can be tested without a GPU.
"""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import machine
from benchmarks.ceilings import matmul_key
from benchmarks.harness import Contender, Timing, poisoned, prepare

WARM_UP = 10


def measure(contenders: Sequence[Contender], seconds: float, device: torch.device) -> list[dict]:
    """Time every contender in turn, about `seconds` in all: spread, error, extra memory of each.

    The next call is that of the contender which has had the least time so far, on the next of its
    copies. Its outputs begin as NaN where they are first compared with float64; the last are
    compared too. Raises ContenderError for the first that fails.
    """
    prepared = [
        prepare(contender, partial(_first_calls, device=device)) for contender in contenders
    ]
    times: list[list[float]] = [[] for _ in contenders]
    share, pending = seconds / len(contenders), list(range(len(contenders)))
    while pending:
        which = min(pending, key=lambda i: sum(times[i]))
        contender = contenders[which]
        copy = len(times[which]) % contender.copies
        times[which].append(timed(partial(contender.call, copy), device))
        if sum(times[which]) >= share and len(times[which]) >= 10:
            pending.remove(which)
    timings = []
    for contender, taken, (first, extra) in zip(contenders, times, prepared, strict=True):
        both = (first, contender.error(contender.call(0)))
        worst = math.nan if any(map(math.isnan, both)) else max(both)
        timings.append(Timing(taken, worst, extra, contender.limit).summary())
    return timings


def _first_calls(contender: Contender, device: torch.device) -> tuple[float, int | None]:
    """The error of a call whose outputs began as NaN, and the memory of the first."""
    extra = _extra_memory(partial(contender.call, 0), device)
    for i in range(WARM_UP):
        contender.call(i % contender.copies)
    with poisoned():
        return contender.error(contender.call(0)), extra


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from the start of the first kernel's launch to the end of the last kernel."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) * 1e-3


def graphed(call: Callable[[int], object], copies: int) -> Callable[[int], object]:
    """The same calls as CUDA graphs, one for each copy: without the launches' time on the CPU."""
    call(0)
    torch.cuda.synchronize()
    graphs, outputs = [], []
    for i in range(copies):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(call(i))
        graphs.append(graph)

    def replay(i: int) -> object:
        graphs[i].replay()
        return outputs[i]

    return replay


def ceilings(device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> dict[str, float]:
    """Best rates of a few repeats: copy and read of 2 GiB, and matmuls of random numbers.

    The matmul is that of float32, and of `dtype` beside it; names are as in `benchmarks.ceilings`.
    """
    count, size = int((1 << 30) * scale) // 4096 * 4096, int(8192 * scale**0.5) // 64 * 64
    source = torch.rand(count, device=device).to(dtype)
    target = torch.zeros_like(source)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(timed(call, device) for _ in range(10))

    copied, read = best(lambda: target.copy_(source)), best(source.sum)
    limits = {
        "copy_gbs": 2 * source.nbytes / copied * 1e-9,
        "read_gbs": source.nbytes / read * 1e-9,
    }
    for kind in dict.fromkeys((torch.float32, dtype)):
        left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        rate = 2 * size**3 / best(partial(torch.mm, left, right)) * 1e-12
        limits[matmul_key(kind)] = rate
    return limits


def working_set_bytes(device: torch.device) -> int:
    """What inputs rotate over: four times the L2 cache, 0 where there is none."""
    return (
        4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    )


def describe(device: torch.device) -> dict:
    """The machine as on a CPU, and the device: its clocks and driver as nvidia-smi tells."""
    described = machine.describe()
    if device.type != "cuda":
        return described | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return described | {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "device_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver and clocks": _nvidia_smi(),
    }


def slug(described: dict) -> str:
    """A file name for the device."""
    return re.sub(r"[^a-z0-9]+", "-", described["device"].lower()).strip("-")


def _nvidia_smi() -> str:
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        return ""
    return f"{query}: {asked}"


def _extra_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory during the call above that before it, less its result; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()  # held until it was measured
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device) - before
    del outputs
    return max(0, torch.cuda.max_memory_allocated(device) - before - held)
