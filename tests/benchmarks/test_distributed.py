"""What the benchmark of several processes counts, and when a row is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from benchmarks import distributed
from benchmarks.distributed_worker import Sent
from benchmarks.table import titled

ANSWER = {
    "seconds": [9.0, 2.0, 4.0],
    "losses": [9.0, 8.0],
    "sent": {},
    "held": {"blocks": 1000, "rest": 500, "adapters": 100},
    "state": 200,
}


def test_rows():
    half = copy.deepcopy(ANSWER) | {"sent": {"all-gather": 3e6}}
    half["held"]["blocks"] = 510
    wrong, peer = half | {"losses": [9.0, 8.1]}, half | {"losses": [9.0, 8.2]}
    answers = {"lowrank, one process": ANSWER, "lowrank, FSDP2": half}
    rows = distributed.rows_of("case", {**answers, "lowrank, DDP": wrong, "other, FSDP2": peer})
    assert [row["median_ms"] for row in rows] == [3000.0] * 4
    assert [row["block_share"] for row in rows] == [1.0, 0.51, 0.51, 0.51]
    assert ["wrong" in row for row in rows] == [False, False, True, False]
    text = titled(rows)
    assert "WRONG: lowrank, DDP: losses [9.0, 8.1]" in text and "0.510" in text
    assert "all-gather" in text and "reduce-scatter" not in text


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_are_counted(alone):
    """As if there were four: of 400 bytes a ring passes three quarters on, or twice that."""
    sent, whole, part = Sent(4), torch.zeros(100), torch.zeros(25)
    with sent:
        dist.all_reduce(whole)
        dist.broadcast(part, 0)
    assert sent.bytes == {"all-reduce": 600.0, "broadcast": 100}
    sent = Sent(4)
    with sent:
        dist.all_gather([torch.empty(100)], whole)
        dist.reduce_scatter(torch.empty(100), [whole])
    assert sent.bytes == {"all-gather": 300.0, "reduce-scatter": 300.0}
    with Sent(2), pytest.raises(RuntimeError, match="not counted: barrier"):
        dist.barrier()
