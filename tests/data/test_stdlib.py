"""The instruction set that Python brings: true to the docstrings, repeatable, split by module."""

import inspect
import json
import pydoc
import random
import re
import subprocess
import sys
import warnings

import pytest

from lowrank.data import stdlib

# A package that adds a method to a class of the standard library must not add a pair.
DUMP = """
import json, logging, sys
def shout(self):
    \"\"\"Say it so loudly that everybody hears it.\"\"\"
if {patch}:
    logging.Logger.shout = shout
    shout.__module__ = "elsewhere.patches"
from lowrank.data.stdlib import instruction_set
sets = instruction_set()
loaded = [m for m in ("antigravity", "this", "turtle", "idlelib", "test") if m in sys.modules]
sys.stdout.write(json.dumps([*sets, loaded]))
"""


@pytest.fixture(scope="module")
def sets():
    """Made in processes of their own: importing everything would leave its mark on other tests."""
    runs = []
    for seed, patch in (("1", False), ("2", True)):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", DUMP.format(patch=patch)],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)},
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        runs.append(json.loads(done.stdout))
    assert runs[0] == runs[1]
    assert runs[0][2] == []
    return runs[0][:2]


def test_a_few_thousand_pairs_each_once(sets):
    train, held_out = sets
    assert len(train) > 2000
    assert 200 < len(held_out) < len(train) / 3
    both = train + held_out
    assert {tuple(sorted(pair)) for pair in both} == {("completion", "prompt")}
    assert len({pair["prompt"] for pair in both}) == len(both)
    assert len({pair["completion"] for pair in both}) == len(both)
    assert not any(" at 0x" in pair["prompt"] for pair in both)


def qualified_name(pair):
    match = re.match(r"What does ([\w.]+)\((.*)\) do in Python\?\n$", pair["prompt"], re.DOTALL)
    assert match, pair
    return match[1]


def test_no_module_lies_in_both_parts(sets):
    modules = [{qualified_name(pair).partition(".")[0] for pair in part} for part in sets]
    assert not modules[0] & modules[1]
    assert len(modules[1]) > 5


def test_answers_are_what_pydoc_finds(sets):
    for pair in random.sample(sets[0] + sets[1], 60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated modules
            obj = pydoc.locate(qualified_name(pair))
        assert obj is not None, pair
        assert pair["completion"] in " ".join(inspect.getdoc(obj).split())
        names = [p.name for p in inspect.signature(obj).parameters.values()]
        for name in names:
            assert re.search(rf"\b{name}\b", pair["prompt"])


def test_a_signature_at_the_head_of_a_docstring_is_left_out():
    def spam(egg):
        """spam(egg) -> ham

        Turn an egg
        into ham.

        More."""

    assert stdlib.first_paragraph(spam) == "Turn an egg into ham."


def test_the_held_out_share_is_kept():
    names = [f"m{random.getrandbits(64)}.f" for _ in range(4000)]
    share = sum(stdlib.is_held_out(name, 0.25) for name in names) / len(names)
    assert 0.2 < share < 0.3
    assert not any(stdlib.is_held_out(name, 0.0) for name in names)
    assert all(stdlib.is_held_out(name, 1.0) for name in names)
