"""--json: one object on standard output, whatever happens; and what the statuses mean."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank

from .conftest import write_pairs


def answer(outcome, status: int = 0) -> dict:
    """The object, which is all of standard output."""
    assert outcome.status == status, outcome
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out)


def test_a_run_from_training_to_merging(run, tiny, data, tmp_path):
    folder, model = tmp_path / "out", ("--model", tiny, "--quantizer", "nf4", "--json")
    held_out = write_pairs(tmp_path / "eval.jsonl", 8)
    found = answer(
        run("train", *model, "--data", data, "--eval-data", held_out, "--output-dir", folder,
            "--max-steps", 3, "--target-modules", "all-linear")
    )  # fmt: skip
    assert found == {
        "output_dir": str(folder), **json.loads((folder / "results.json").read_text())
    }  # fmt: skip

    prompt = "What is 3 plus 4?\n"
    words = ("--adapter", folder, "--prompt", prompt, "--max-new-tokens", 6)
    plain = run("generate", *model[:-1], *words)
    assert answer(run("generate", *model, *words))["text"] + "\n" == plain.out

    merged = answer(run("merge", *model, "--adapter", folder, "--output", tmp_path / "merged"))
    assert merged["output"] == str(tmp_path / "merged")
    assert lowrank.load_model(merged["output"])
    found = answer(run("quantize", *model, "--output", tmp_path / "nf4"))
    layers = [m for m in lowrank.load_model(tmp_path / "nf4").modules()
              if isinstance(m, lowrank.QuantLinear)]  # fmt: skip
    assert found["layers"] == len(layers)
    assert found["quantized_bytes"] == sum(layer.storage.nbytes for layer in layers)
    sizes = [path.stat().st_size for path in (tmp_path / "nf4").glob("*.safetensors")]
    assert found["file_bytes"] == sum(sizes)


def test_what_is_compared(run, tiny, data, tmp_path):
    held_out = write_pairs(tmp_path / "eval.jsonl", 8)
    found = answer(
        run("sweep", "--model", tiny, "--data", data, "--eval-data", held_out, "--ranks", 2, 4,
            "--max-steps", 2, "--no-refine", "--longer", 1, "--output-dir", tmp_path / "s",
            "--json")
    )  # fmt: skip
    assert found == json.loads((tmp_path / "s" / "sweep.json").read_text())
    words = ("--model", tiny, "--schemes", "nf4", "--no-speed", "--output", tmp_path / "r")
    found = answer(run("report", *words, "--json"))
    assert found == json.loads((tmp_path / "r" / "report.json").read_text())


@pytest.mark.parametrize("words", [["env", "--jso"], ["trian"], [], ["generate"]])
def test_a_mistake_is_an_object_too(run, words):
    outcome = run(*words, "--json")
    found = answer(outcome, status=2)
    assert found["status"] == 2 and outcome.err == f"lowrank: error: {found['error']}\n"


def test_a_loss_that_is_not_finite_has_a_status_of_its_own(run, tiny, data, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    words = ("--model", copy, "--data", data, "--output-dir", tmp_path / "out", "--json")
    assert "the loss is nan" in answer(run("train", *words), status=5)["error"]


def without_room() -> Exception:
    """As the Trainer ends a run, with what to change."""
    error = lowrank.errors.TrainingError("out of memory in step 2: try less")
    error.__cause__ = MemoryError("no room")
    return error


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (without_room(), 3, "out of memory in step 2: try less"),
        (torch.OutOfMemoryError("no room"), 3, "out of memory"),
        (lowrank.errors.MissingPackageError("pip install it"), 4, "pip install it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("odd"), 70, "a bug in lowrank: report it with what `lowrank env`"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_command_has_its_status(run, tiny, monkeypatch, error, status, says):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("lowrank.load_model", fails)
    outcome = run("generate", "--model", tiny, "--prompt", "a", "--json")
    found = answer(outcome, status)
    assert says in found["error"] and found["status"] == status
    assert found["error"].count("out of memory") <= 1
    assert ("Traceback" in outcome.err) is (status == 70)
