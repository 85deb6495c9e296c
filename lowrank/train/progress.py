"""How a run shows that it works: a bar on a terminal, lines through `logging` elsewhere."""

from __future__ import annotations

import logging
import sys
from collections import deque
from pathlib import Path
from typing import Any

from lowrank.train.schedule import whole_steps

logger = logging.getLogger("lowrank.train")

_RECENT = 20  # steps that speed and time left are taken from
# all of it within 80 columns, the bar in what is left of a wider terminal
_FORMAT = "{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes; 0 where the system does not say."""
    if sys.platform == "linux":
        # not ru_maxrss, which begins with what the parent held when it forked
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """A tqdm bar if stderr is a terminal and tqdm is there; else a log line every `every` steps,
    or that share of `total`.

    `done`: steps that were taken before, by a run that this one goes on with.
    """

    def __init__(self, total: int, every: int | float, disable: bool, done: int = 0) -> None:
        self._total, self._every, self._bar = total, whole_steps(every, total), None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens, seconds
        if disable or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format=_FORMAT)

    def step(self, line: dict[str, Any]) -> None:
        """Show a finished step from its line of metrics.jsonl."""
        memory = line.get("peak_device_memory_bytes", line["peak_memory_bytes"])
        loss, rate, norm = line["loss"], line["learning_rate"], line["grad_norm"]
        if self._bar is not None:
            what = f"loss {loss:.4f} lr {rate:.1e} norm {norm:.2f}"
        else:
            what = f"loss {loss:.4f}, lr {rate:.2e}, grad norm {norm:.3f}"
        self.show(line["step"], what, line["tokens"], line["seconds"], memory)

    def show(self, step: int, what: str, tokens: int, seconds: float, memory: int) -> None:
        """Show `what` of a finished step, its speed, the memory in bytes, and the time left."""
        self._recent.append((tokens, seconds))
        tokens, seconds = (sum(values) for values in zip(*self._recent, strict=True))
        speed, used = tokens / seconds, memory / 2**30
        if self._bar is not None:
            narrow = f"{speed:.0f}" if speed < 9999.5 else f"{speed / 1000:.0f}k"
            self._bar.set_postfix_str(f"{what} {narrow} tok/s {used:.3g} GiB", refresh=False)
            self._bar.update()
        elif step % self._every == 0 or step in (1, self._total):
            left = seconds / len(self._recent) * (self._total - step)
            more = f", {duration(left)} left" if step < self._total else ""
            shown = f"{what}, {speed:.0f} tokens/s, {used:.2f} GiB{more}"
            logger.info("step %d/%d: %s", step, self._total, shown)

    def line(self, text: str, level: int = logging.INFO) -> None:
        """Say something without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            logger.log(level, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
