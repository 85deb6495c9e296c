"""What differs between a file and a model: all of it in one line, however much it is."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from lowrank.errors import FileFormatError
from lowrank.io.names import check_names, check_shapes, folded


def unfolded(name: str) -> list[str]:
    """The names that one with ranges stands for."""

    def numbers(text: str) -> list[int]:
        runs = [list(map(int, run.split("-"))) for run in text.split(",")]
        return [n for run in runs for n in range(run[0], run[-1] + 1)]

    parts = re.split(r"\[(.*?)\]", name)
    choices = [numbers(p) if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(map(str, chosen)) for chosen in itertools.product(*choices)]


def test_folded_names_stand_for_all_of_them():
    for _ in range(20):
        every = [
            f"layers.{i}.experts.{j}.{leaf}"
            for i in range(12)
            for j in range(4)
            for leaf in ("w1.weight", "w2.weight", "w1.0.bias", "07.bias")
        ]
        names = random.sample(every, random.randrange(1, len(every)))
        short = folded(names)
        assert sorted(name for one in short for name in unfolded(one)) == sorted(names)
    assert folded(every) == [
        f"layers.[0-11].experts.[0-3].{leaf}"
        for leaf in ("07.bias", "w1.0.bias", "w1.weight", "w2.weight")
    ]
    assert folded(["h.1", "h.2", "h.5", "a", "."]) == [".", "a", "h.[1-2,5]"]
    assert folded([]) == []


def test_all_that_differs_is_said_at_once():
    expected = {f"layers.{i}.{leaf}": (4, 8) for i in range(3) for leaf in ("up", "down")}
    found = {name: (5, 8) if name.endswith("up") else (4, 8) for name in expected}
    found["layers.0.extra"] = found.pop("layers.1.down")
    with pytest.raises(FileFormatError) as caught:
        check_shapes(expected, found, "a/model")
    assert str(caught.value) == (
        "a/model: missing tensors: layers.1.down; unexpected tensors: layers.0.extra; "
        "layers.[0-2].up: expected shape (4, 8); got (5, 8)"
    )
    check_shapes(expected, expected, "a/model")
    check_names([], [], "a/model")


def test_a_line_stays_a_line():
    with pytest.raises(FileFormatError) as caught:
        check_names([f"w\n{chr(97 + i)}" for i in range(20)], ["x" * 10_000], "a")
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and "and 8 more" in said
