"""A model by its name on the hub, from the command line, through the local server."""

from __future__ import annotations

import json
import shutil

from tests.io.conftest import hub as hub

COMMANDS = """
import json
from lowrank.cli import main
for words in json.loads({words!r}):
    print(main([*words, "--json"]))
"""


def test_a_revision_and_what_the_hub_lacks(hub, tiny):
    run, root, asked = hub
    shutil.copytree(tiny, root / "org" / "tiny")
    words = ["generate", "--model", "org/tiny", "--prompt", "What is", "--max-new-tokens", "3"]
    calls = [
        [*words, "--model-revision", "v1"],
        [*words, "--model-revision", "v9"],
        ["plan", *words[1:3]],
    ]
    calls += [["generate", "--model", "org/absent", "--prompt", "a"]]
    said = run(COMMANDS.format(words=json.dumps(calls)))
    found = list(zip(map(json.loads, said[::2]), map(int, said[1::2]), strict=True))
    assert found[0][1] == 0 and found[0][0]["text"]
    assert found[1] == ({"error": found[1][0]["error"], "status": 2}, 2)
    assert "v9" in found[1][0]["error"] and "revision" in found[1][0]["error"]
    assert found[2][1] == 0 and found[2][0]["parameters"] > 400_000
    assert "org/absent: no such repository" in found[3][0]["error"]
