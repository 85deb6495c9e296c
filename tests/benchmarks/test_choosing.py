"""docs/choosing.md's measurements are the committed results; what --json writes of a sweep."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import choosing, results

PAGE = Path(__file__).resolve().parents[2] / "docs" / "choosing.md"
MADE = results.RESULTS / "choosing"


def rows(file: str, case: str) -> dict[str, dict]:
    """A case's trials by the value that was tried, as the page spells it; losses are means over
    the seeds.
    """
    trials: dict[str, list[dict]] = {}
    for row in json.loads((MADE / f"{file}.json").read_text())["rows"]:
        if row["case"] == case:
            trials.setdefault(number(*row["settings"].values()), []).append(row)
    means = ("train_loss", "eval_loss")
    return {
        value: found[0] | {key: statistics.mean(row[key] for row in found) for key in means}
        for value, found in trials.items()
    }


def number(value: str | float) -> str:
    """A value without its spelling: "1e-4" and 0.0001 are one."""
    try:
        return str(float(value))
    except ValueError:
        return str(value)


def page_table(head: str) -> list[list[str]]:
    """Cells of the table whose first line begins with `head`, without the line of dashes."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(head)]
    end = next(i for i in range(start, len(lines) + 1) if not lines[i : i + 1] or not lines[i])
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start:end]]
    return [table[0], *table[2:]]


def losses(found: dict[str, dict], key: str) -> dict[str, str]:
    return {value: f"{row[key]:.3f}" for value, row in found.items()}


@pytest.mark.parametrize(
    ("head", "file", "case"),
    [
        ("| r, SmolLM2", "SmolLM2-135M-Instruct-nf4", "rank"),
        ("| alpha, r = 16", "stories260K", "alpha"),
        ("| learning rate | 1e-4", "stories260K", "learning_rate"),
        ("| dropout, 64 examples", "stories260K-5e-3", "dropout, 64 examples"),
    ],
)
def test_tables_with_a_column_for_each_value(head, file, case):
    (_, *values), *lines = page_table(head)
    found = rows(file, case)
    assert [number(value) for value in values] == list(found)
    assert lines[-1][0] == "held-out loss"
    for name, *cells in lines:
        key = {"training loss": "train_loss", "held-out loss": "eval_loss"}[name]
        assert cells == list(losses(found, key).values())


def test_the_table_of_ranks():
    slow, fast = rows("stories260K", "rank"), rows("stories260K-5e-3", "rank")
    _, *lines = page_table("| r | parameters |")
    assert [number(line[0]) for line in lines] == list(slow) == list(fast)
    for value, (_, parameters, *cells) in zip(slow, lines, strict=True):
        assert parameters == f"{slow[value]['parameters']:,}"
        shown = slow[value]["train_loss"], slow[value]["eval_loss"], fast[value]["eval_loss"]
        assert cells == [f"{loss:.3f}" for loss in shown]


def test_the_table_of_modules():
    found, rank_4 = rows("stories260K", "modules"), rows("stories260K", "rank")["4.0"]
    _, *lines = page_table("| `target_modules` |")
    assert [re.findall("`(.*)`", line[0])[0] for line in lines[:-1]] == list(found)
    assert lines[-1][0] == "`all-linear`, r = 4"
    for row, (_, *cells) in zip([*found.values(), rank_4], lines, strict=True):
        assert cells == [f"{row['parameters']:,}", f"{row['eval_loss']:.3f}"]


def test_what_the_page_says_of_seeds():
    """How far a seed is from the mean, and that each has the order of the tables, but for what the
    text names.
    """
    unsettled = {("stories260K-5e-3", "rank"): "32.0", ("stories260K", "learning_rate"): "0.01"}
    for file in ("stories260K", "stories260K-5e-3"):
        found = json.loads((MADE / f"{file}.json").read_text())["rows"]
        for case in {row["case"] for row in found}:
            trials = [row for row in found if row["case"] == case]
            mean = rows(file, case)
            far = max(
                abs(row["eval_loss"] - mean[number(*row["settings"].values())]["eval_loss"])
                for row in trials
            )
            assert far < (0.14 if case.startswith("dropout") else 0.04)
            for seed in (1, 2, 3):
                own = {
                    number(*row["settings"].values()): row["eval_loss"]
                    for row in trials
                    if row["seed"] == seed
                }
                own.pop(unsettled.get((file, case), ""), None)
                order = sorted(own, key=lambda value: mean[value]["eval_loss"])
                assert order == sorted(own, key=own.__getitem__), (file, case, seed)


def test_losses_before_training():
    text = PAGE.read_text(encoding="utf-8")
    for file in MADE.glob("*.json"):
        before = {f"{row['before']:.3f}" for row in json.loads(file.read_text())["rows"]}
        assert len(before) == 1 and re.search(rf"\b{before.pop()}\s+before\s+training", text)


def test_what_is_said_of_a_sweep(tmp_path):
    """Losses of the last steps alone; a trial that failed has none and says why."""
    case = choosing.Case("a case, of it", {"r": [4, 8]})
    done = {"settings": {"r": 4, "lora_alpha": 8}, "parameters": 7, "failure": None}
    done |= {"losses": [9.0, *[1.5] * 20], "eval_losses": [[0, 3.0], [21, 2.0]], "eval_loss": 2.0}
    failed = done | {"settings": {"r": 8}, "eval_losses": [], "eval_loss": None, "failure": "nan"}
    for seed, loss in ((1, 2.0), (2, 1.0)):
        folder = tmp_path / "a-case-of-it" / str(seed)
        folder.mkdir(parents=True)
        trials = {"trials": [done | {"eval_loss": loss}, failed]}
        (folder / "sweep.json").write_text(json.dumps(trials))
    found = choosing.trials(tmp_path, case)
    assert [(row["seed"], row["settings"]["r"]) for row in found] == [
        (1, 4),
        (1, 8),
        (2, 4),
        (2, 8),
    ]
    assert [row["train_loss"] for row in found] == [1.5, None, 1.5, None]
    assert found[0]["before"] == 3.0 and found[0]["settings"] == {"r": 4}
    lines = list(choosing.table(case.name, found))
    assert lines[0] == "\na case, of it: 2 seeds"
    assert lines[-2:] == ["| 4 | 1.5000 | 1.5000 | 1.0000 to 2.0000 |", "| 8 | – | – | nan |"]
