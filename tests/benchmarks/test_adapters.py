"""The benchmark of adapters: its rows, at a size of seconds."""

from __future__ import annotations

import pytest

from benchmarks import adapters
from benchmarks.settings import Settings

pytest.importorskip("peft", reason="needs peft, which is compared with: pip install peft")


def test_a_row_for_each_side_of_each_case(monkeypatch):
    for name, value in (("BLOCKS", 1), ("ADAPTERS", 4), ("REPEATS", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(adapters, name, value)
    rows = adapters.run(Settings(["peft"], [], [], {}, 1.0, 3, 0))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    assert len(cases) == 8 and cases[:2] == ["inject", "merge_and_unload"]
    for case in cases:
        sides = {row["contender"]: row for row in rows if row["case"] == case}
        assert sides.keys() == {"lowrank", "peft"} and sides["lowrank"]["speed"] == 1
