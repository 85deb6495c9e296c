"""An optimizer over parameters with gradients, in a process that steps when it is told to.

`python -m benchmarks.paged_worker RULE BUDGET DIRECTORY` reads the shapes of the parameters as a
line of JSON, and then answers each line "step" with a line of JSON: seconds, and the growth of the
peak memory; "end" with the bytes of a chunk and a digest of the parameters. BUDGET 0: resident.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import sys
import time

import torch

from benchmarks.harness import reset_peak, status_bytes

LR = 1e-3


def main(rule: str, budget: int, directory: str) -> None:
    """Answer until the input ends."""
    from lowrank import optim
    from lowrank.optim.budget import Budget
    from lowrank.optim.pages import chunk_bytes

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if not budget:
            return getattr(optim, rule)(params, lr=LR)
        paged = getattr(optim, f"Paged{rule}")
        return paged(params, lr=LR, host_budget=budget, page_dir=directory)

    sizes = json.loads(sys.stdin.readline())
    # the code of a step, threads and all; enough to be paged
    make(_parameters([(1024, 1 + max(1 << 20, budget) // 1024)])).step()
    params = _parameters(sizes)
    optimizer = make(params)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed would hide what is taken
    reset_peak()
    before = status_bytes("VmRSS")
    _answer({})
    for line in sys.stdin:
        if line == "end\n":
            break
        start = time.perf_counter()
        optimizer.step()
        took = time.perf_counter() - start
        _answer({"seconds": took, "grown_bytes": status_bytes("VmHWM") - before})
    digest = hashlib.sha256()
    for p in params:
        digest.update(p.detach().numpy().data)
    _answer({"chunk_bytes": chunk_bytes(Budget(budget or None)), "digest": digest.hexdigest()})


def _parameters(sizes: list[list[int]] | list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(*size) * 0.02) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def _answer(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
