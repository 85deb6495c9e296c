"""The harness: its statistics, its fairness, and that it catches what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness import (
    Contender,
    copies_for,
    extra_memory,
    measure,
    nbytes,
    percentile,
    poisoned,
    relative_error,
    reset_peak,
    spread,
)


def test_percentiles_are_numpys():
    values = torch.rand(int(torch.randint(1, 40, ())), dtype=torch.float64).tolist()
    for q in (0, 10, 37.5, 50, 90, 100):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-12)


def test_spread_is_in_milliseconds():
    values = torch.rand(31, dtype=torch.float64).tolist()
    made = spread(values)
    assert made["n"] == 31
    assert made["median_ms"] == pytest.approx(1e3 * np.median(values))
    assert made["p10_ms"] == pytest.approx(1e3 * np.percentile(values, 10))
    assert made["p90_ms"] == pytest.approx(1e3 * np.percentile(values, 90))


def test_relative_error_is_in_float64():
    exact = torch.randn(63, 123, dtype=torch.float64)
    result = exact.float()
    expected = np.linalg.norm(result.double().numpy() - exact.numpy()) / np.linalg.norm(exact)
    assert relative_error(result, exact) == pytest.approx(float(expected), rel=1e-12)
    assert relative_error(exact, exact) == 0


class Clock:
    """A clock that only its contenders advance."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr("benchmarks.harness.time", self)

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)

    def contender(self, name: str, seconds: float) -> Contender:
        def call(i: int) -> torch.Tensor:
            self.calls.append(name)
            self.now += seconds
            return torch.zeros(1)

        return Contender(name, call, 2, lambda out: 0.0)


def test_each_contender_gets_its_share_of_the_time_all_along(monkeypatch):
    clock = Clock(monkeypatch)
    quick, slow = measure(
        [clock.contender("quick", 0.001), clock.contender("slow", 0.02)], seconds=1.0
    )
    assert quick.seconds == pytest.approx([0.001] * 500, abs=1e-8)
    assert slow.seconds == pytest.approx([0.02] * 25, abs=1e-8)
    half = clock.calls[: len(clock.calls) // 2]
    assert half.count("slow") == pytest.approx(13, abs=3)


def test_equally_fast_contenders_alternate(monkeypatch):
    clock = Clock(monkeypatch)
    measure([clock.contender(name, 0.01) for name in "abc"], seconds=0.9)
    timed = "".join(clock.calls)[-90:]
    assert timed == "abc" * 30


def test_the_slower_a_contender_the_fewer_its_calls(monkeypatch):
    clock = Clock(monkeypatch)
    timings = measure(
        [clock.contender(f"{seconds}", seconds) for seconds in (0.5, 3.0, 30.0)], seconds=0.1
    )
    assert [len(timing.seconds) for timing in timings] == [5, 2, 1]
    assert timings[2].seconds == [30.0]
    assert clock.calls.count("30.0") == 1


def test_inputs_rotate_over_every_copy():
    used: list[int] = []

    def call(i: int) -> torch.Tensor:
        used.append(i)
        return torch.zeros(1)

    measure([Contender("a", call, 3, lambda out: 0.0)], seconds=0.01)
    assert set(used) == {0, 1, 2}
    assert all(one != other for one, other in zip(used[3:], used[4:], strict=False))


def test_an_output_left_partly_unwritten_is_wrong():
    exact = torch.ones(64, dtype=torch.float64)

    def half(i: int) -> torch.Tensor:
        out = torch.empty(64)
        out[:32] = 1
        return out

    def error(out: torch.Tensor) -> float:
        return relative_error(out, exact)

    (timing,) = measure([Contender("half", half, 2, error)], seconds=0.01)
    assert timing.summary()["error"] is None
    assert "NaN" in timing.summary()["wrong"]


def test_an_error_beyond_the_limit_is_wrong_and_one_within_is_not():
    exact = torch.randn(64, dtype=torch.float64)

    def contender(name: str, scale: float) -> Contender:
        return Contender(
            name, lambda i: exact * scale, 2, lambda out: relative_error(out, exact), limit=1e-3
        )

    off, close = measure([contender("off", 1.01), contender("close", 1.00001)], seconds=0.01)
    assert "1.00e-02" in off.summary()["wrong"]
    assert "wrong" not in close.summary()
    assert close.summary()["error"] == pytest.approx(1e-5, rel=1e-6)


def test_poison_ends_with_its_block():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.empty(100).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_extra_memory_is_the_scratch_and_not_the_result():
    if not reset_peak():
        assert extra_memory(lambda: None, lambda: 0) is None
        return
    held: list[torch.Tensor] = []

    def call() -> None:
        scratch = torch.ones(12_000_000)  # 48 MB
        held.append(scratch[:8_000_000] * 2)  # 32 MB

    extra = extra_memory(call, lambda: nbytes(held[0]))
    assert extra == pytest.approx(48e6, rel=0.1)


def test_copies_fill_the_working_set():
    assert copies_for(100, 1000) == 10
    assert copies_for(300, 1000) == 4
    assert copies_for(5000, 1000) == 2
    assert copies_for(1, 10**9) == 10_000
