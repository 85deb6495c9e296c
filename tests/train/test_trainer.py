"""The loop against one written out in plain torch, in float64, and where it must stop."""

from __future__ import annotations

import copy
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank.errors import ConfigError, DataError, ShapeError, TrainingError
from lowrank.train import TrainConfig, Trainer

from .support import VOCAB, Bytes, Small, example_loss, examples, metrics_lines, plain_loop, windows


def config(tmp_path, **settings) -> TrainConfig:
    defaults = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return TrainConfig(tmp_path / "run", **{**defaults, **settings})


@pytest.mark.parametrize("batch, accumulation", [(1, 1), (3, 1), (2, 3), (1, 7), (64, 1)])
def test_equals_the_plain_loop(tmp_path, generator, seed, batch, accumulation):
    rows = examples(17, generator)  # no size above divides 17: the last step of an epoch is short
    model = Small().double()
    reference = copy.deepcopy(model)
    settings = config(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.5,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        seed=seed,
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)  # left over from elsewhere
    result = Trainer(model, settings, rows).train()

    steps = windows(rows, seed, 2, batch * accumulation)
    losses, norms = plain_loop(
        reference,
        steps,
        [1e-2] * len(steps),
        max_norm=0.5,
        weight_decay=0.1,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=0)
    found = [line["grad_norm"] for line in metrics_lines(tmp_path / "run")]
    torch.testing.assert_close(found, norms, rtol=1e-8, atol=0)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_accumulation_equals_one_large_batch(tmp_path, generator):
    """4 × batch 1 and batch 4: the same losses, though examples differ in learned tokens."""
    rows = [
        {"input_ids": row["input_ids"] * (i + 1)} for i, row in enumerate(examples(8, generator))
    ]
    small = Small().double()
    large = copy.deepcopy(small)
    one = config(
        tmp_path / "a", max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    four = config(tmp_path / "b", max_steps=6, per_device_train_batch_size=4)
    first, second = Trainer(small, one, rows).train(), Trainer(large, four, rows).train()
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-12, atol=0)
    assert first.losses[0] != first.losses[-1]


@pytest.mark.parametrize("wrap", ["tensor", "logits"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_any_module_that_returns_logits(tmp_path, generator, wrap, with_mask):
    """The mask is passed to a forward that takes it, and marks the real tokens."""
    rows = examples(9, generator)
    seen = []

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def answer(self, input_ids):
            logits = self.inner(input_ids)
            return logits if wrap == "tensor" else SimpleNamespace(logits=logits)

    class Plain(Wrapped):
        def forward(self, input_ids):
            return self.answer(input_ids)

    class Masked(Wrapped):
        def forward(self, input_ids, attention_mask=None):
            seen.append(int(attention_mask.sum()))
            return self.answer(input_ids)

    inner = Small().double()
    reference = copy.deepcopy(inner)
    model = (Masked if with_mask else Plain)(inner)
    settings = config(tmp_path, num_train_epochs=1, per_device_train_batch_size=4)
    result = Trainer(model, settings, rows).train()
    steps = windows(rows, 42, 1, 4)
    losses, _ = plain_loop(reference, steps, [1e-2] * 3, max_norm=1.0)
    torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=0)
    if with_mask:
        assert seen == [sum(len(row["input_ids"]) for row in step) for step in steps]


def test_evaluation_equals_the_mean_over_tokens(tmp_path, generator):
    """Before, every eval_steps and after; without dropout, and without disturbing the training."""
    rows, held_out = examples(8, generator), examples(11, generator)
    model = Small(dropout=0.5).double()
    start = copy.deepcopy(model)
    settings = {"max_steps": 7, "per_device_train_batch_size": 4}

    def mean_loss(model):
        parts = [example_loss(model.eval(), row) for row in held_out]
        return (sum(part for part, _ in parts) / sum(count for _, count in parts)).item()

    quiet = Trainer(copy.deepcopy(model), config(tmp_path / "a", **settings), rows).train()
    evaluated = config(tmp_path / "b", **settings, eval_steps=3, per_device_eval_batch_size=4)
    trainer = Trainer(model, evaluated, rows, held_out)
    before = trainer.evaluate()
    result = trainer.train()
    assert [step for step, _ in result.eval_losses] == [0, 3, 6, 7]
    assert result.losses == quiet.losses
    assert model.training
    assert before == result.metrics["eval_loss_before"] == result.eval_losses[0][1]
    assert before == pytest.approx(mean_loss(start), rel=1e-12)
    assert result.metrics["eval_loss_after"] == pytest.approx(mean_loss(model), rel=1e-12)


def test_same_seed_same_run_bit_for_bit(tmp_path, generator):
    """Dropout and order come from the seed alone, whatever the state of torch's generator."""
    rows = examples(20, generator)
    model = Small(dropout=0.3)
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(runs))
        trained = copy.deepcopy(model)
        settings = config(tmp_path / name, max_steps=9, per_device_train_batch_size=3, seed=seed)
        runs.append((Trainer(trained, settings, rows).train().losses, trained.state_dict()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], value) for name, value in runs[1][1].items())


def test_loss_falls_on_text(tmp_path):
    """A task that can be learned is learned, from prompts and completions, with every default."""
    rows = [{"prompt": f"{a} and {b}: ", "completion": f"{b} {a}"} for a in "abcd" for b in "efgh"]
    settings = TrainConfig(tmp_path / "run", max_steps=150, learning_rate=2e-2)
    result = Trainer(Small(32), settings, rows, rows, tokenizer=Bytes()).train()
    assert result.metrics["eval_loss_before"] > 4
    assert result.metrics["eval_loss_after"] < 1
    assert result.metrics["train_loss"] == pytest.approx(sum(result.losses) / 150)


def test_a_tokenizer_by_its_other_name(tmp_path):
    rows = [{"prompt": f"{a}: ", "completion": a} for a in "abcdefgh"]
    names = ("tokenizer", "processing_class")
    model = Small()
    runs = [
        Trainer(copy.deepcopy(model), config(tmp_path / name, max_steps=2), rows, **{name: Bytes()})
        for name in names
    ]
    first, second = (trainer.train() for trainer in runs)
    assert first.losses == second.losses
    with pytest.raises(ConfigError, match="tokenizer and processing_class are one setting"):
        Trainer(model, config(tmp_path), rows, tokenizer=Bytes(), processing_class=Bytes())


def test_metrics_count_real_and_learned_tokens(tmp_path, generator):
    rows = examples(10, generator)
    settings = config(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=4, learning_rate=0.5
    )
    result = Trainer(Small(), settings, rows).train()
    lines = metrics_lines(tmp_path / "run")
    steps = windows(rows, 42, 1, 4)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == result.losses
    assert [line["tokens"] for line in lines] == [
        sum(len(r["input_ids"]) for r in s) for s in steps
    ]
    learned = [sum(label != -100 for r in s for label in r["labels"][1:]) for s in steps]
    assert [line["labelled_tokens"] for line in lines] == learned
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.0]
    metrics = result.metrics
    assert metrics["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert metrics["tokens_per_second"] == pytest.approx(
        metrics["tokens"] / metrics["train_seconds"]
    )
    assert metrics["wall_seconds"] >= metrics["train_seconds"] > 0
    assert metrics["trainable_parameters"] == sum(p.numel() for p in Small().parameters())
    assert metrics["peak_memory_bytes"] > 50 * 2**20
    assert metrics["steps"] == 3 and metrics["epochs"] == 1.0 and metrics["interrupted"] is False


def test_only_what_requires_a_gradient_is_trained(tmp_path, generator):
    model = Small()
    model.embed.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    Trainer(model, config(tmp_path, max_steps=3), examples(8, generator)).train()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if not name.startswith("embed")}
    assert all(p.grad is None for p in model.parameters())


class Adapted(Small):
    """Small with a low-rank update of its head, B = 0, and everything else frozen."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        low_rank = {"lora_A": torch.randn(4, 16), "lora_B": torch.zeros(VOCAB, 4)}
        self.update = nn.ParameterDict(low_rank)

    def forward(self, input_ids):
        h = self.mix(self.embed(input_ids))[0]
        return self.head(h) + h @ self.update["lora_A"].T @ self.update["lora_B"].T


def test_a_zero_b_is_no_missing_gradient(tmp_path, generator, caplog):
    """The gradient of A is zero while B is zero: neither an error nor a warning."""
    result = Trainer(Adapted(), config(tmp_path, max_steps=2), examples(8, generator)).train()
    assert result.losses[1] != result.losses[0]
    assert "no gradient" not in caplog.text


def test_no_gradient_at_the_first_step_is_an_error(tmp_path, generator):
    class Cut(Small):
        def forward(self, input_ids):
            return super().forward(input_ids) * 0

    with pytest.raises(TrainingError, match=r"step 1: the gradient of all 7 .* zero or missing"):
        Trainer(Cut(), config(tmp_path, max_steps=2), examples(8, generator)).train()


def test_a_layer_without_gradient_is_named(tmp_path, generator, caplog):
    model = Small()
    model.unused = nn.Linear(3, 3)
    with caplog.at_level(logging.WARNING):
        Trainer(model, config(tmp_path, max_steps=2), examples(8, generator)).train()
    assert "2 of 9 trained layers get no gradient: unused.weight, unused.bias" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_named(tmp_path, generator, value):
    class Breaks(Small):
        calls = 0

        def forward(self, input_ids):
            self.calls += 1
            return super().forward(input_ids) * (value if self.calls == 4 else 1.0)

    model = Breaks()
    kept = []
    model.register_forward_pre_hook(lambda *_: kept.append(copy.deepcopy(model.state_dict())))
    with pytest.raises(
        TrainingError,
        match=r"step 4: the loss is nan in the batch of (example \d,? ){6}and 2 more; the "
        "model stays as step 3 left it and nothing is saved: lower learning_rate",
    ):
        Trainer(model, config(tmp_path, max_steps=9), examples(8, generator)).train()
    assert all(torch.equal(value, kept[3][name]) for name, value in model.state_dict().items())
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "trained.safetensors").exists()


def test_the_batch_of_a_loss_that_is_not_finite_is_named_by_file_and_line(tmp_path):
    """Only the batch of the step that it came from; here one of two lines in three batches."""

    class Breaks(Small):
        def forward(self, input_ids):
            broken = (input_ids == 2 + ord("!")).any()
            return super().forward(input_ids) * (float("inf") if broken else 1.0)

    lines = ["one two", "three four", "five!", "six seven", "eight nine", "ten eleven"]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = config(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    message = rf"step [12]: the loss is nan in the batch of {re.escape(str(file))}:3; the model"
    with pytest.raises(TrainingError, match=message):
        Trainer(Breaks(), settings, file, tokenizer=Bytes()).train()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, generator):
    model = Small()
    model.head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="step 1: the norm of the gradient is (inf|nan)"):
        Trainer(model, config(tmp_path, max_steps=2), examples(8, generator)).train()


def test_a_held_out_loss_that_is_not_finite_stops(tmp_path, generator):
    class Overflows(Small):
        def forward(self, input_ids):
            return super().forward(input_ids) * (1.0 if self.training else float("inf"))

    rows = examples(8, generator)
    with pytest.raises(TrainingError, match="step 0: the held-out loss is (nan|inf)"):
        Trainer(Overflows(), config(tmp_path, max_steps=2), rows, rows).train()


def test_a_last_update_that_overflows_saves_nothing(tmp_path, generator):
    settings = config(tmp_path, max_steps=1, learning_rate=1e300)
    with pytest.raises(TrainingError, match="step 1: .* is NaN or inf after it .* learning_rate"):
        Trainer(Small(), settings, examples(8, generator)).train()
    assert not (tmp_path / "run" / "trained.safetensors").exists()


def test_bf16_computes_under_autocast(tmp_path, generator):
    dtypes = set()

    class Watched(Small):
        def forward(self, input_ids):
            logits = super().forward(input_ids)
            dtypes.add(logits.dtype)
            return logits

    rows = examples(8, generator)
    model = Watched()
    exact = Trainer(copy.deepcopy(model), config(tmp_path / "a", max_steps=3), rows, rows).train()
    assert dtypes == {torch.float32}
    dtypes.clear()
    result = Trainer(model, config(tmp_path / "b", max_steps=3, bf16=True), rows, rows).train()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(result.losses, exact.losses, rtol=2e-2, atol=0)


class Switched(Small):
    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, input_ids):
        self.seen.add(self.gradient_checkpointing)
        return super().forward(input_ids)


def test_gradient_checkpointing_is_switched_on_and_back(tmp_path, generator):
    rows = examples(8, generator)
    model = Switched()
    Trainer(model, config(tmp_path, max_steps=2, gradient_checkpointing=True), rows).train()
    assert model.seen == {True} and model.gradient_checkpointing is False
    with pytest.raises(
        ConfigError, match="gradient_checkpointing is on, but Small has no attribute"
    ):
        Trainer(Small(), config(tmp_path / "b", gradient_checkpointing=True), rows)
    with pytest.raises(ConfigError, match="'selective', which Switched cannot do: use true"):
        Trainer(model, config(tmp_path / "c", gradient_checkpointing="selective"), rows)
    with pytest.raises(ConfigError, match="the model is on cpu, so there is nothing to move"):
        Trainer(model, config(tmp_path / "d", activation_offloading=True), rows)


def test_what_cannot_be_trained_is_refused_before_any_file_is_made(tmp_path, generator):
    rows = examples(8, generator)
    frozen = Small().requires_grad_(False)
    with pytest.raises(ConfigError, match="Small has no trainable parameter"):
        Trainer(frozen, config(tmp_path), rows)
    with pytest.raises(DataError, match="need a tokenizer; got None"):
        Trainer(Small(), config(tmp_path), [{"text": "a"}])
    known = Small()
    known.config = SimpleNamespace(vocab_size=VOCAB)  # as models of transformers and ours have
    with pytest.raises(DataError, match=f"example 1: .*vocab_size={VOCAB}; got {VOCAB}"):
        Trainer(known, config(tmp_path), [rows[0], {"input_ids": [2, VOCAB]}])
    with pytest.raises(DataError, match="the data set is empty"):
        Trainer(Small(), config(tmp_path), rows, eval_data=[])
    with pytest.raises(ConfigError, match=r"evaluate\(\) needs held-out data"):
        Trainer(Small(), config(tmp_path), rows).evaluate()
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_returns_no_logits_is_named(tmp_path, generator):
    class Wrong(Small):
        def forward(self, input_ids):
            return super().forward(input_ids)[:, -1]

    with pytest.raises(ShapeError, match=r"must return logits \[B, S, V\]"):
        Trainer(Wrong(), config(tmp_path), examples(8, generator)).train()
