"""Timing that can be believed.

`measure` runs contenders A, B, C as A B C A B C ... in one loop, so that a neighbour's noise or a
change of clock speed hits all of them; each call takes the next of its contender's copies of the
inputs, so that no call finds them in a cache; outputs start as NaN when they are first compared
with float64, and are compared again after the last call.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.errors import ContenderError

T = TypeVar("T")
MAX_COPIES = 10_000
MIN_CALLS, MIN_SLOW_CALLS, SLOW_SECONDS = 5, 2, 1.0
ONCE_SECONDS = 4.0  # a contender slower than that is called once, and that is its time
HOPELESS_SECONDS = 20.0
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass
class Contender:
    """One side of a comparison.

    `call(i)` runs on the i-th copy of the inputs and returns the outputs (a tensor or a tuple);
    `error(outputs)` is their distance to float64, relative; `limit` is the largest that counts as
    right (None: any that is finite). `moved` and `flops` are the bytes and floating-point
    operations that the task needs at least, `dtype` that of its result; `path` is what was chosen
    to do it. `bare` names the contender whose time this one's is also compared with: the same
    without what this one adds.
    """

    name: str
    call: Callable[[int], object]
    copies: int
    error: Callable[[object], float]
    limit: float | None = None
    moved: int = 0
    flops: int = 0
    path: str = ""
    dtype: str = "float32"
    bare: str = ""


@dataclass
class Timing:
    """Times of one contender in seconds, its error, and its memory beyond inputs and outputs."""

    seconds: list[float]
    error: float
    extra_bytes: int | None
    limit: float | None = None

    def summary(self) -> dict:
        """Spread, error and extra memory; and "wrong" where the error is too large."""
        made = {**spread(self.seconds), "error": self.error, "extra_bytes": self.extra_bytes}
        if not math.isfinite(self.error):
            made |= {"error": None, "wrong": "the result holds NaN or infinity"}
        elif self.limit is not None and self.error > self.limit:
            made["wrong"] = f"relative error {self.error:.2e}, expected at most {self.limit:.0e}"
        return made


def spread(seconds: Sequence[float]) -> dict:
    """Median, 10th and 90th percentile in milliseconds, and their number."""
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p10_ms": percentile(seconds, 10) * 1e3,
        "p90_ms": percentile(seconds, 90) * 1e3,
        "n": len(seconds),
    }


def measure(contenders: Sequence[Contender], seconds: float) -> list[Timing]:
    """Time every contender in turn, for about `seconds` in all.

    The next call is always that of the contender which has had the least time so far: equally fast
    ones alternate, and a slow one is called less often. Each is called five times at least,
    twice where a call takes longer than a second, and once where it takes longer than four.
    Raises ContenderError for the first that fails.
    """
    prepared = [prepare(contender, _first_calls) for contender in contenders]
    share = seconds / len(contenders)
    least = [MIN_CALLS if took < SLOW_SECONDS else MIN_SLOW_CALLS for took, _, _ in prepared]
    times: list[list[float]] = [[] for _ in contenders]
    spent = [0.0 for _ in contenders]
    last: list[object] = [None] * len(contenders)
    pending = [i for i, (took, _, _) in enumerate(prepared) if took <= ONCE_SECONDS]
    while pending:
        which = min(pending, key=spent.__getitem__)
        contender, last[which] = contenders[which], None
        copy = (len(times[which]) + 2) % contender.copies
        start = time.perf_counter_ns()
        last[which] = contender.call(copy)
        took = (time.perf_counter_ns() - start) * 1e-9
        times[which].append(took)
        spent[which] += took
        if spent[which] >= share and len(times[which]) >= least[which]:
            pending.remove(which)

    timings = []
    for contender, taken, outputs, (first, checked, extra) in zip(
        contenders, times, last, prepared, strict=True
    ):
        if not taken:
            timings.append(Timing([first], checked, extra, contender.limit))
            continue
        errors = (checked, contender.error(outputs))
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        timings.append(Timing(taken, worst, extra, contender.limit))
    return timings


def prepare(contender: Contender, first_calls: Callable[[Contender], T]) -> T:
    """What `first_calls` returns. Raises ContenderError where it fails."""
    try:
        return first_calls(contender)
    except Exception as error:
        raise ContenderError(contender.name, error) from error


def _first_calls(contender: Contender) -> tuple[float, float, int | None]:
    """Seconds of a call, the error of one whose outputs began as NaN, the memory of the first."""
    held: list[object] = []
    start = time.perf_counter()
    extra = extra_memory(lambda: held.append(contender.call(0)), lambda: nbytes(held[0]))
    took = time.perf_counter() - start
    if ONCE_SECONDS < took < HOPELESS_SECONDS:  # was it work, or a package that loads or compiles?
        held.clear()
        start = time.perf_counter()
        held.append(contender.call(1 % contender.copies))
        took = time.perf_counter() - start
    if took > ONCE_SECONDS:
        return took, contender.error(held[0]), extra
    held.clear()
    with poisoned():
        error = contender.error(contender.call(1 % contender.copies))
    start = time.perf_counter()
    contender.call(0)
    return time.perf_counter() - start, error, extra


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """||result - exact|| / ||exact|| in float64."""
    return float(
        torch.linalg.vector_norm(result.double() - exact) / torch.linalg.vector_norm(exact)
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between the two nearest values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def copies_for(call_bytes: int, working_set: int) -> int:
    """How many copies of inputs of `call_bytes` make up the working set; from 2 to 10,000."""
    return min(MAX_COPIES, max(2, math.ceil(working_set / max(call_bytes, 1))))


def nbytes(outputs: object) -> int:
    """Bytes of a tensor, or of all tensors in a tuple."""
    if isinstance(outputs, torch.Tensor):
        return outputs.numel() * outputs.element_size()
    return sum(nbytes(item) for item in outputs) if isinstance(outputs, tuple) else 0


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty gives NaN (or the largest integer): an element never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def extra_memory(call: Callable[[], object], held: Callable[[], int]) -> int | None:
    """Peak resident memory during `call` above that before it, less the `held()` bytes of its
    result.

    From the high-water mark that Linux keeps (VmHWM, reset through /proc/self/clear_refs); None
    where that is not to be had. Memory that malloc kept from earlier calls is given back first.
    """
    gc.collect()
    _libc_call("malloc_trim", 0)
    if not reset_peak():
        call()
        return None
    before = status_bytes("VmRSS")
    call()
    return max(0, status_bytes("VmHWM") - before - held())


def reset_peak() -> bool:
    """Set the process's peak resident memory to the present; False where Linux does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status_bytes("VmHWM") - status_bytes("VmRSS") < 8 << 20


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    return 0


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, for every contender alike.

    glibc maps each large tensor afresh and gives it back at once; the page faults of a 64 MB result
    take longer than a good kernel needs to write it, and would be all that is measured.
    """
    _libc_call("mallopt", _M_MMAP_MAX, 0)
    _libc_call("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def _libc_call(name: str, *args: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)  # musl has neither
        if function is not None:
            function(*args)
