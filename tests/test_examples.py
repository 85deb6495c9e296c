"""The programs of docs/examples run, the tiny model standing for the one on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowrank.cli.demo import TINY
from tests.io.conftest import hub as hub

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# in a process of its own, from the local hub: it registers a quantizer, or is about the hub
APART = {"new_quantizer", "qlora"}


def test_there_is_one_of_each():
    assert {path.stem for path in EXAMPLES} == APART | {
        "batch_of_adapters", "home_made_transformer", "trainer", "two_adapters",
    }  # fmt: skip
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"(examples/{path.name})" in page for path in EXAMPLES)


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in APART], ids=lambda path: path.stem
)
def test_it_runs(path, tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / HUB_NAME)
    monkeypatch.chdir(tmp_path)
    exec(compile(path.read_text(encoding="utf-8"), path.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", sorted(APART))
def test_it_runs_on_a_model_of_the_hub(name, hub, tmp_path, monkeypatch):
    run, root, asked = hub
    shutil.copytree(TINY, root / HUB_NAME)
    monkeypatch.chdir(tmp_path)
    program = (ROOT / "docs" / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert run(program, PYTHONPATH=str(ROOT))
    model = HUB_NAME.partition("/")[2]
    assert f"GET {model}/model.safetensors" in asked
