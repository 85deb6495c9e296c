"""lowrank eval, and what merge measures, beside transformers."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from lowrank.train import held_out_loss

from .conftest import write_pairs

transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers")


@pytest.fixture
def text(tmp_path):
    words = ["list", "value", "name", "returns", "the", "function", "object", "é", "of"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.choices(words, k=400)), encoding="utf-8")
    return path


@pytest.fixture
def held_out(tmp_path):
    return write_pairs(tmp_path / "held_out.jsonl", 11)


@pytest.fixture
def adapter(tiny, tmp_path):
    """An adapter of the tiny model in nf4 that is not trained, but does something."""
    model = lowrank.load_model(tiny, "nf4")
    config = lowrank.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lowrank.inject(model, config)
    return lowrank.save_adapter(model, tmp_path / "adapter")


def measured(outcome) -> dict:
    assert outcome.status == 0, outcome
    return json.loads(outcome.out)["measured"]


def loss_of(model: nn.Module, rows: list[tuple[list[int], int]]) -> float:
    """-log p a token, of transformers' logits, of the tokens of each row from a place on."""
    total = count = 0.0
    for ids, first in rows:
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = model(row).logits[0, first - 1 : -1].double()
        total += F.cross_entropy(logits, row[0, first:], reduction="sum").item()
        count += len(ids) - first
    return total / count


def test_perplexity_and_loss_are_those_of_transformers(run, tiny, text, held_out):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    found = measured(
        run("eval", "--model", tiny, "--text", text, "--data", held_out, "--json",
            "--max-length", 50, "--per-device-eval-batch-size", 3)
    )["base"]  # fmt: skip
    expected = loss_of(theirs, [(ids[i : i + 50], 1) for i in range(0, len(ids) - 1, 50)])
    assert found[str(text)]["loss"] == pytest.approx(expected, rel=1e-5)
    assert found[str(text)]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)

    rows = []
    for line in held_out.read_text().splitlines():
        pair = json.loads(line)
        asked, said = (tokenizer(pair[name]).input_ids for name in ("prompt", "completion"))
        rows.append(([*asked, *said, tokenizer.eos_token_id], len(asked)))
    assert found[str(held_out)]["loss"] == pytest.approx(loss_of(theirs, rows), rel=1e-5)
    assert found[str(held_out)]["tokens"] == sum(len(ids) - first for ids, first in rows)

    # windows that overlap, of the first tokens alone
    found = measured(
        run("eval", "--model", tiny, "--text", text, "--tokens", 90, "--max-length", 40,
            "--stride", 25, "--json")
    )["base"][str(text)]  # fmt: skip
    rows = [(ids[:40], 1), (ids[25:65], 15), (ids[50:90], 15)]
    assert found["loss"] == pytest.approx(loss_of(theirs, rows), rel=1e-5)
    assert found["tokens"] == 89


def test_a_bos_begins_every_window(run, tiny, text, tmp_path):
    """Where the tokenizer begins texts with one, as that of Llama 3 and Gemma does."""
    copy = shutil.copytree(tiny, tmp_path / "copy")
    spec = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    bos = spec["added_tokens"][0]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos["content"], "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            bos["content"]: {
                "id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]
            }
        },
    }  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["bos_token"] = bos["content"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))

    words = ("--text", text, "--max-length", 33, "--json")
    found = measured(run("eval", "--model", copy, *words))["base"][str(text)]
    ids = lowrank.load_tokenizer(tiny).encode(text.read_text(encoding="utf-8"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    rows = [([bos["id"], *ids[i : i + 32]], 1) for i in range(0, len(ids), 32)]
    assert found["loss"] == pytest.approx(loss_of(theirs, rows), rel=1e-4)
    assert found["tokens"] == len(ids)


@pytest.mark.parametrize("state", ["on", "off", "both"])
def test_the_adapter_on_off_and_both(run, tiny, adapter, held_out, state):
    words = ("--model", tiny, "--quantizer", "nf4", "--data", held_out, "--adapter", adapter)
    outcome = run("eval", *words, "--with-adapter", state, "--json")
    found = {name: of[str(held_out)]["loss"] for name, of in measured(outcome).items()}
    tokenizer, model = lowrank.load_tokenizer(tiny), lowrank.load_model(tiny, "nf4")
    data = lowrank.data.tokenize_all(lowrank.data.load_examples(held_out), tokenizer)
    base = held_out_loss(model, data)
    expected = {"base": base, "adapter": held_out_loss(lowrank.load_adapter(model, adapter), data)}
    names = {"on": ["adapter"], "off": ["base"], "both": ["base", "adapter"]}[state]
    assert found == {name: pytest.approx(expected[name], abs=1e-6) for name in names}
    printed = run("eval", *words, "--with-adapter", state).out
    for name in names:
        assert f"{name}" in printed and f"{found[name]:.4f}" in printed


def test_exact_match_is_what_transformers_answers(run, tiny, data, held_out, tmp_path):
    """A model that knows some of the sums, and has been merged."""
    out, merged = tmp_path / "out", tmp_path / "merged"
    words = ("--max-steps", 15, "--learning-rate", 8e-3, "--target-modules", "all-linear")
    trained = run("train", "--model", tiny, "--data", data, "--output-dir", out, *words)
    assert trained.status == 0, trained
    words = ("--adapter", out, "--output", merged, "--data", held_out, "--json")
    losses = measured(run("merge", "--model", tiny, *words))
    assert losses["merged"][str(held_out)]["loss"] == pytest.approx(
        losses["adapter"][str(held_out)]["loss"], abs=1e-4
    )
    assert losses["merged"][str(held_out)]["loss"] < losses["base"][str(held_out)]["loss"]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    right, pairs = 0, [json.loads(line) for line in held_out.read_text().splitlines()]
    for pair in pairs:
        ids = tokenizer(pair["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            written = theirs.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
        right += tokenizer.decode(written, skip_special_tokens=True).strip() == pair["completion"]
    outcome = run("eval", "--model", merged, "--data", held_out, "--exact-match", "--json")
    found = measured(outcome)["base"][str(held_out)]
    assert found["exact_match"] == pytest.approx(right / len(pairs))
    assert found["examples"] == len(pairs)
    outcome = run("eval", "--model", merged, "--data", held_out, "--exact-match")
    assert f"{right / len(pairs):.1%} of 11" in outcome.out
    assert outcome.out.count("expected 'It is") == min(3, len(pairs) - right)


def test_a_trainings_own_settings(run, tiny, data, held_out, tmp_path):
    """With its run.toml, what is measured last is what the training measured last."""
    out = tmp_path / "out"
    outcome = run(
        "train", "--model", tiny, "--quantizer", "nf4", "--data", data, "--eval-data", held_out,
        "--max-length", 12, "--no-completion-only-loss", "--max-steps", 3, "--output-dir", out,
        "--json",
    )  # fmt: skip
    results = json.loads(outcome.out)
    found = measured(run("eval", "--config", out / "run.toml", "--json"))
    for name, key in (("base", "eval_loss_before"), ("adapter", "eval_loss_after")):
        assert found[name][str(held_out)]["loss"] == pytest.approx(results[key], abs=1e-6)
    file = tmp_path / "eval.toml"
    file.write_text(
        f'[run]\nmodel = "{tiny}"\n[eval]\ndata = "{data}"\nwith_adapter = "off"\n[sweep]\nrefine=1'
    )
    assert list(measured(run("eval", "--config", file, "--json"))) == ["base"]


def test_merge_measures_a_quantized_model_with_its_residual(run, tiny, adapter, text, tmp_path):
    words = ("--model", tiny, "--quantizer", "nf4", "--adapter", adapter, "--text", text)
    outcome = run("merge", *words, "--output", tmp_path / "m", "--quantized", "--json")
    found = measured(outcome)["merged"][str(text)]["loss"]
    assert outcome.err == ""
    words = ("--adapter", tmp_path / "m" / "residual", "--text", text, "--json")
    again = run("eval", "--model", tmp_path / "m", *words)
    assert measured(again)["adapter"][str(text)]["loss"] == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "text or data is needed: pass --text or --data"),
        (["--text", "absent.txt"], "absent.txt: No such file"),
        (["--text", "."], "Is a directory"),
        (["--text", "latin.txt"], "latin.txt: expected UTF-8; invalid continuation byte at byte 3"),
        (["--text", "empty.txt"], "expected at least two tokens"),
        (["--text", "short.txt", "--tokens", "1"], "tokens: expected at least 2; got 1"),
        (["--text", "short.txt", "--stride", "0"], "stride: expected at least 1; got 0"),
        (["--text", "short.txt", "--stride", "99999"], "stride: expected 1 to "),
        (["--text", "short.txt", "--max-length", "1"], "max_length"),
        (["--text", "short.txt", "--exact-match"], "exact_match: needs examples with answers"),
        (["--data", "text.jsonl", "--exact-match"], "text.jsonl:1: exact_match needs a prompt"),
        (["--data", "text.jsonl", "--stride", "3"], "stride: belongs to a text"),
        (["--data", "text.jsonl", "--max-new-tokens", "3"], "max_new_tokens: belongs to exact_"),
        (["--data", "text.jsonl", "--with-adapter", "on"], "with_adapter: on needs an adapter"),
        (["--data", "text.jsonl", "--with-adapter", "of"], "--with-adapter: expected on or off"),
        (["--data", "text.jsonl", "--per-device-eval-batch-size", "0"], "per_device_eval_batch"),
        (["--data", "text.jsonl", "--adapter", "absent"], "absent: no such directory"),
        (["--data", "pairs.jsonl", "--exact-match", "--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_mistakes_are_one_line(run, tiny, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words of text")
    (tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n')
    write_pairs(tmp_path / "pairs.jsonl", 2)
    outcome = run("eval", "--model", tiny, *words)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("lowrank: error: ") and outcome.err.count("\n") == 1
    assert says in outcome.err
