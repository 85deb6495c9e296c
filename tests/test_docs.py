"""Every example of README.md and docs/ runs: python blocks, and the commands of bash blocks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lowrank.cli import main
from lowrank.cli.demo import TINY

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader sits: the tiny model stands for the one on the hub, and there is some data."""
    shutil.copytree(TINY, tmp_path / HUB_NAME)
    pairs = [{"prompt": f"What is {n}?\n", "completion": "A number."} for n in range(12)]
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "text.txt").write_text("A function returns the values of a list. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, folder, capsys):
    names: dict = {"__name__": "__main__"}
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
        elif language == "toml":
            (folder / "run.toml").write_text(block)
        elif language == "bash":
            for line in block.splitlines():
                program, *words = shlex.split(line)
                assert program == "lowrank"
                assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_first_screen():
    """One sentence, an example of at most 12 lines, two commands, a table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert blocks[0][0] == "python" and len(blocks[0][1].splitlines()) <= 12
    assert re.findall(r"^make \w+", blocks[1][1], re.MULTILINE) == ["make demo", "make test"]
    assert text.index("|---|") < text.index("## ")
