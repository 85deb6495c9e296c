"""From data to tokens in a run: what is cut, refused, kept for the next run, and told apart."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from lowrank.cli.demo import TINY
from lowrank.data import Sampler
from lowrank.errors import ConfigError, DataError
from lowrank.models.loading import load_model
from lowrank.models.tokenizer import load_tokenizer
from lowrank.train import TrainConfig, Trainer
from lowrank.train.dataset import tokenized

from .support import VOCAB, Bytes, Small, examples, plain_loop


class Printed(Bytes):
    """A tokenizer that says what it is, and counts how often it is asked."""

    fingerprint = "bytes"

    def __init__(self):
        super().__init__()
        self.calls = 0

    def encode(self, text, add_special_tokens=False):
        self.calls += 1
        return super().encode(text, add_special_tokens)


def known(**settings) -> Small:
    """A model whose configuration says these numbers."""
    model = Small()
    model.config = SimpleNamespace(**settings)
    return model


def made(path, rows, tokenizer=None, model=None, formatting_func=None, **settings):
    config = TrainConfig(path / "run", **settings)
    return tokenized(
        rows, "training", config, tokenizer or Printed(), model or Small(), formatting_func
    )


ROWS = [{"prompt": f"{n} and {n}:", "completion": f" {2 * n}"} for n in range(30)]


def test_tokens_are_made_once_and_read_from_then_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache, rows = tmp_path / "cache", ROWS[::-1]
    settings = {"token_cache": cache, "max_length": 10}
    first, again = Printed(), Printed()
    tokens = made(tmp_path, rows, first, **settings)
    kept = made(tmp_path, rows, again, **settings)
    assert kept.fingerprint == tokens.fingerprint and kept.labelled == tokens.labelled
    assert [kept.where(i) for i in range(10)] == [f"example {i}" for i in range(20, 30)]
    assert first.calls > 30 and again.calls == 0
    cut = [r.getMessage() for r in caplog.records if "were cut to max_length=10" in r.getMessage()]
    assert len(cut) == 2  # what was left out is said again
    (file,) = cache.iterdir()

    file.write_bytes(file.read_bytes()[:-1])  # damaged: made again, and kept again
    third = Printed()
    assert made(tmp_path, rows, third, **settings).fingerprint == tokens.fingerprint
    assert third.calls == first.calls and "is damaged, and is made again" in caplog.text
    assert made(tmp_path, rows, again, **settings) and again.calls == 0


def test_what_tokens_depend_on_makes_others(tmp_path):
    cache = {"token_cache": tmp_path / "cache"}
    other = Printed()
    other.fingerprint = "others"
    calls = [
        lambda: made(tmp_path, ROWS, **cache),
        lambda: made(tmp_path, ROWS[:-1], **cache),
        lambda: made(tmp_path, ROWS, other, **cache),
        lambda: made(tmp_path, ROWS, max_length=11, **cache),
        lambda: made(tmp_path, ROWS, completion_only_loss=False, **cache),
        lambda: made(tmp_path, ROWS, assistant_only_loss=True, **cache),
        lambda: made(tmp_path, ROWS, model=known(vocab_size=VOCAB), **cache),
        lambda: made(tmp_path, ROWS, model=known(max_position_embeddings=10), **cache),
        lambda: made(tmp_path, ROWS, dataset_text_field="prompt", **cache),
        lambda: made(tmp_path, ROWS, formatting_func=lambda row: row["completion"], **cache),
    ]
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(list((tmp_path / "cache").iterdir())) == count


def test_nothing_is_kept_unasked_of_what_is_quick(tmp_path, monkeypatch):
    """And nothing at all of a tokenizer that cannot be told from another."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "home"))
    made(tmp_path, ROWS)
    made(tmp_path, ROWS, Bytes(), token_cache=tmp_path / "cache")
    made(tmp_path, ROWS, token_cache=None)
    assert list(tmp_path.iterdir()) == []
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    made(tmp_path, ROWS)
    assert [path.suffix for path in (tmp_path / "home").iterdir()] == [".safetensors"]


def test_an_example_longer_than_the_context_is_cut_to_it(tmp_path, caplog):
    rows = [{"text": "a" * 40}, {"text": "bb"}]
    model = known(max_position_embeddings=16, vocab_size=VOCAB)
    data = made(tmp_path, rows, model=model)
    assert data.lengths == [16, 3]
    assert "training data: 1 of 2 examples were cut to max_length=16 tokens" in caplog.text
    assert "the model was trained for 16 tokens, fewer than max_length=1024" in caplog.text
    caplog.clear()
    assert made(tmp_path, rows, model=model, max_length=8).lengths == [8, 3]
    assert "was trained for" not in caplog.text
    made(tmp_path, rows[1:], model=model)
    assert caplog.text.count("cut") == 1


def test_a_tokenizer_with_fewer_tokens_than_the_vocabulary(tmp_path):
    """Embeddings are rounded up to a size that is fast: rows without a token are no error."""
    model = known(vocab_size=VOCAB)
    assert max(Bytes().encode("\xff" * 200)) < VOCAB
    result = Trainer(
        model, TrainConfig(tmp_path / "run", max_steps=2), ROWS, tokenizer=Bytes()
    ).train()
    assert len(result.losses) == 2


def test_a_pad_token_that_the_model_does_not_know(tmp_path):
    """Added to the tokenizer alone, as tutorials do: it pads, and is never looked up."""
    tokenizer = Bytes()
    tokenizer.pad_token_id = VOCAB
    rows = [{"text": "a"}, {"text": "a longer text"}]
    losses = []
    for name, model in (("without", Small()), ("with", known(vocab_size=VOCAB))):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        given = Bytes() if name == "without" else tokenizer
        config = TrainConfig(tmp_path / name, max_steps=3)
        losses.append(Trainer(model, config, rows, tokenizer=given).train().losses)
    assert losses[0] == losses[1]


def test_tokens_the_model_does_not_know_are_refused_with_their_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "abc"}\n')
    highest = max(Bytes().encode("abc"))
    with pytest.raises(DataError, match=f"^{path}:2: .* below the model's vocab_size={highest}"):
        made(tmp_path, path, model=known(vocab_size=highest))


def test_an_empty_completion_is_learned_as_an_end_and_said(tmp_path, caplog):
    rows = [*ROWS, {"prompt": "3 and 3:", "completion": ""}]
    data = made(tmp_path, rows)
    assert len(data) == 31 and data.labelled[-1] == 1
    assert data.labels[data.span(30)].tolist()[-1] == Bytes.eos_token_id
    assert "training data: 1 of 31 completions are empty" in caplog.text


def test_lines_that_are_no_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=f"^{path}:2: not UTF-8: "):
        Trainer(Small(), TrainConfig(tmp_path / "run"), path, tokenizer=Bytes())
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_template_that_raises_names_the_conversation(tmp_path):
    class Refuses(Bytes):
        def apply_chat_template(self, messages, add_generation_prompt=False, tools=None):
            if len(messages) > 2:
                raise DataError("messages: the chat template refuses them: too many")
            return " ".join(message["content"] for message in messages)

    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": turn}, {"messages": turn * 2}]))
    with pytest.raises(DataError, match=f"^{path}: item 1: .* refuses them: too many"):
        Trainer(Small(), TrainConfig(tmp_path / "run"), path, tokenizer=Refuses())


def test_the_run_says_what_it_was_trained_on(tmp_path, generator):
    """The same for the same tokens, wherever they come from; another for any change."""
    rows = examples(9, generator)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name, data in {"list": rows, "file": path, "fewer": rows[1:]}.items():
        config = TrainConfig(tmp_path / name, max_steps=1)
        Trainer(Small(), config, data).train()
        found[name] = json.loads((tmp_path / name / "train_config.json").read_text())
    prints = {name: resolved["train_data_sha256"] for name, resolved in found.items()}
    assert prints["list"] == prints["file"] != prints["fewer"]
    assert len(prints["list"]) == 64
    config = TrainConfig(tmp_path / "cut", max_steps=1, max_length=4)
    trainer = Trainer(Small(), config, rows)
    resolved = trainer.resolved()
    assert resolved["train_examples_cut"] == sum(len(row["input_ids"]) > 4 for row in rows)
    assert resolved["train_examples_dropped"] == len(rows) - len(trainer.train_data)


def test_a_data_file_that_has_changed_is_not_gone_on_with(tmp_path, generator):
    """Since the checkpoint was made; what only looks otherwise in the file is no change."""
    rows = examples(9, generator)
    path, out = tmp_path / "data.jsonl", tmp_path / "run"

    def train(rows, **settings):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Trainer(Small(), TrainConfig(out, **settings), path).train()

    train(rows, max_steps=2)
    spaced = [{**row, "id": i} for i, row in enumerate(rows)]
    assert len(train(spaced, max_steps=4, resume="auto").losses) == 4
    kept = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    swapped, shorter = [rows[1], rows[0], *rows[2:]], rows[:-1]
    edited = [*rows[:-1], {"input_ids": [*rows[-1]["input_ids"], 3]}]
    for changed in (swapped, shorter, edited):
        with pytest.raises(ConfigError, match="the training data is not what it was"):
            train(changed, max_steps=6, resume="auto")
    assert kept == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


@pytest.mark.parametrize("way", ["packing", "group_by_length"])
def test_a_run_goes_on_where_the_sampler_was(tmp_path, generator, way):
    """In the middle of an epoch, also where a step takes a number of examples of its own."""
    rows = examples(40, generator)
    start = Alone() if way == "packing" else Small()
    settings = {"per_device_train_batch_size": 2, "max_length": 24, way: True, "max_steps": 12}
    settings["save_total_limit"] = None
    whole, again = copy.deepcopy(start), copy.deepcopy(start)
    first = Trainer(whole, TrainConfig(tmp_path / "a", save_steps=5, **settings), rows).train()
    resume = tmp_path / "a" / "checkpoint-5"
    second = Trainer(again, TrainConfig(tmp_path / "b", resume=resume, **settings), rows).train()
    assert first.losses == second.losses and first.metrics["epochs"] == second.metrics["epochs"]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


class Alone(Small):
    """Of each token only its own embedding: whatever shares a row with it, it does not see."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.head(self.embed(input_ids))


def test_a_template_that_writes_the_date_is_named(tmp_path, caplog):
    tokenizer = Printed()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    tokenizer.apply_chat_template = lambda messages, **_: " ".join(m["content"] for m in messages)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made(tmp_path, [{"messages": turns}], tokenizer)
    assert "the chat template writes today's date" in caplog.text
    caplog.clear()
    made(tmp_path, ROWS, tokenizer)
    assert "date" not in caplog.text


def test_a_template_from_a_file_is_the_tokenizers(tmp_path):
    text = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(text)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for path in (tmp_path, str(tmp_path / "chat_template.jinja")):
        tokenizer = load_tokenizer(TINY)
        assert tokenizer.chat_template != text
        config = TrainConfig(tmp_path / "out", max_steps=1, chat_template_path=path)
        model = load_model(TINY).requires_grad_()
        trainer = Trainer(model, config, [{"messages": turns}], tokenizer=tokenizer)
        assert tokenizer.chat_template == text
        ids = trainer.train_data.ids.tolist()
        assert tokenizer.decode(ids) == "u:a;a:b;"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (None, "expected a Jinja file, or a directory .* got .*t.jinja: No such file"),
        (b"\xff", "t.jinja is not UTF-8"),
        ("directory", "got .*chat_template.jinja: No such file"),
        ("without", "is for a tokenizer; got none: pass tokenizer="),
    ],
)
def test_a_template_that_cannot_be_taken(tmp_path, write, words):
    path = tmp_path / "t.jinja"
    if isinstance(write, bytes):
        path.write_bytes(write)
    elif write == "directory":
        path.mkdir()
    tokenizer = None if write == "without" else Printed()
    config = TrainConfig(tmp_path / "out", max_steps=1, chat_template_path=path)
    with pytest.raises(ConfigError, match=f"^chat_template_path.*{words}"):
        Trainer(Small(), config, ROWS, tokenizer=tokenizer)
    assert not hasattr(tokenizer, "chat_template") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("had", [None, "{{ messages }}", "nothing"])
def test_a_trainer_that_cannot_be_made_leaves_the_tokenizer_as_it_was(tmp_path, had):
    tokenizer = Bytes()
    if had != "nothing":
        tokenizer.chat_template = had
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    config = TrainConfig(tmp_path / "out", max_steps=1, chat_template_path=tmp_path / "t.jinja")
    before = dict(vars(tokenizer))
    for wrong in ([{"text": "a"}, {"text": 3}], tmp_path / "none.jsonl"):
        with pytest.raises(DataError):
            Trainer(Small(), config, ROWS, wrong, tokenizer=tokenizer)
        assert vars(tokenizer) == before
    Trainer(Small(), config, ROWS, tokenizer=tokenizer)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_formatting_func_and_text_field_reach_the_data(tmp_path):
    rows = [{"q": "a?", "a": "b", "body": "cc"}, {"q": "d?", "a": "e", "body": "f"}]
    config = TrainConfig(tmp_path / "a", max_steps=1)
    trainer = Trainer(
        Small(), config, rows, rows, tokenizer=Bytes(), formatting_func=lambda row: row["q"]
    )
    assert trainer.train_data.lengths == trainer.eval_data.lengths == [3, 3]
    config = TrainConfig(tmp_path / "b", max_steps=1, dataset_text_field="body")
    assert Trainer(Small(), config, rows, tokenizer=Bytes()).train_data.lengths == [3, 2]
    with pytest.raises(DataError, match="^example 0: lacks a field to train on"):
        Trainer(Small(), TrainConfig(tmp_path / "c"), rows, tokenizer=Bytes())


def test_grouped_by_length_equals_the_plain_loop(tmp_path, generator, seed):
    rows = examples(23, generator)
    model = Small().double()
    reference = Small().double()
    reference.load_state_dict(model.state_dict())
    config = TrainConfig(
        tmp_path / "run",
        num_train_epochs=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        warmup_ratio=0,
        group_by_length=True,
        seed=seed,
    )
    result = Trainer(model, config, rows).train()
    sampler = Sampler([len(r["input_ids"]) for r in rows], 3, 2, seed, group_by_length=True)
    steps, consumed = [], 0
    while consumed < 2 * len(rows):
        steps.append([rows[i] for batch in sampler.step(consumed) for (i,) in batch])
        consumed += len(steps[-1])
    losses, _ = plain_loop(reference, steps, [1e-2] * len(steps), max_norm=1.0)
    torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "name, value",
    [
        ("packing", 1), ("group_by_length", "yes"), ("assistant_only_loss", "no"),
        ("dataset_text_field", ""), ("dataset_text_field", 3), ("token_cache", ""),
        ("token_cache", 7),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got "):
        TrainConfig("out", **{name: value})
