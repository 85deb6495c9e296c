"""How a run shows that it works: a bar on a terminal, lines through `logging` elsewhere."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

logger = logging.getLogger("lowrank.train")


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
    """A tqdm bar if stderr is a terminal and tqdm is there; else a log line every `every` steps."""

    def __init__(self, total: int, every: int, disable: bool) -> None:
        self._total, self._every, self._bar = total, every, None
        if disable or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, desc="training", unit="step", dynamic_ncols=True)

    def step(self, line: dict[str, float]) -> None:
        """Show a finished step from its line of metrics.jsonl."""
        step, speed = line["step"], line["tokens"] / line["seconds"]
        shown = (
            f"loss {line['loss']:.4f}, lr {line['learning_rate']:.2e}, "
            f"grad norm {line['grad_norm']:.3f}, "
            f"{speed:.0f} tokens/s, {line['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update()
        elif step % self._every == 0 or step in (1, self._total):
            logger.info("step %d/%d: %s", step, self._total, shown)

    def line(self, text: str) -> None:
        """Say something without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            logger.info(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
