"""Both sides of the paged benchmark, and when a row is wrong."""

from __future__ import annotations

from benchmarks import paged
from benchmarks.settings import Settings
from benchmarks.table import titled


def test_both_sides_step_alike_within_the_budget():
    told = []
    settings = Settings([], [], [1], {}, 1, 4, 1, tell=told.append)
    rows = paged.compare("two", "AdamW8bit", [(1024, 4096)] * 2, settings)
    assert [row["contender"].split(",")[0] for row in rows] == [
        "lowrank AdamW8bit",
        "lowrank PagedAdamW8bit",
    ]
    assert not any("wrong" in row for row in rows)
    assert all(row["n"] == 2 and row["median_ms"] > 0 for row in rows)
    assert rows[0]["extra_bytes"] > 0.9 * rows[0]["held_bytes"] > 8 * rows[1]["extra_bytes"]
    assert rows[1]["over_bare"] == rows[1]["median_ms"] / rows[0]["median_ms"]
    assert len(told) == 4 and "over bare" in titled(rows)


def test_other_bits_and_too_much_memory_are_wrong():
    answers = [[{"seconds": 1.0, "grown_bytes": grown}] * 3 for grown in (100, 13)]
    ends = [{"digest": "a", "chunk_bytes": 1}, {"digest": "a", "chunk_bytes": 1}]

    def verdict(grown: int, digest: str) -> str | None:
        answers[1][0] = {"seconds": 1.0, "grown_bytes": grown}
        ends[1]["digest"] = digest
        return paged.paged_rows("case", "AdamW", 100, answers, ends)[1].get("wrong")

    answers[1][1:] = [{"seconds": 1.0, "grown_bytes": 0}] * 2
    assert verdict(12, "a") is None
    assert "grew by" in verdict(13, "a")
    assert "to the bit" in verdict(12, "b")
