"""Cards by the names that people type."""

from __future__ import annotations

import pytest

from lowrank.errors import ConfigError
from lowrank.plan import find_card
from lowrank.plan.cards import card_names

GIB = 1 << 30


@pytest.mark.parametrize(
    ("said", "name", "gb"),
    [
        ("4090", "RTX 4090", 24),
        ("RTX 4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("rtx-3060", "RTX 3060", 12),
        ("3080 Ti", "RTX 3080 TI", 12),
        ("t4", "T4", 15),
        ("Tesla T4", "T4", 15),
        ("A100", "A100", 40),
        ("A100-SXM4-80GB", "A100 80GB", 80),
        ("a100 40gb", "A100", 40),
        ("H100 80GB", "H100", 80),
        ("l40s", "L40S", 45),
        ("12 GB", "12 GB", 12),
        ("7.5gb", "7.5 GB", 7.5),
        (24, "24 GB", 24),
    ],
)
def test_a_card_by_its_names(said, name, gb):
    card = find_card(said)
    assert card.name == name and card.total / GIB == pytest.approx(gb, abs=0.7)


def test_every_card_is_found_by_its_own_name():
    for name in card_names():
        assert find_card(name).name == name


@pytest.mark.parametrize("said", ["", "4091", "rtx", "-4 GB", "0", 0, -1, float("nan"), True, None])
def test_no_card(said):
    with pytest.raises(ConfigError, match="card: "):
        find_card(said)


def test_a_name_that_is_nearly_one():
    with pytest.raises(ConfigError, match="did you mean RTX 4090|did you mean"):
        find_card("rtx 4900")
