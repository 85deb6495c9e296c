"""Settings: those that cannot be are refused by name, and every one is described."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lowrank.cli.options import field_help
from lowrank.errors import ConfigError
from lowrank.train import TrainConfig


@pytest.mark.parametrize(
    "name, value",
    [
        ("output_dir", ""), ("output_dir", 3), ("overwrite_output_dir", 1),
        ("learning_rate", "2e-4"), ("learning_rate", -1.0), ("learning_rate", float("nan")),
        ("lr_scheduler_type", "cosin"), ("lr_scheduler_type", None), ("warmup_ratio", 1.5),
        ("warmup_steps", -1), ("warmup_steps", 2.5), ("num_train_epochs", 0),
        ("num_train_epochs", float("inf")), ("max_steps", 0), ("max_steps", 10.0),
        ("max_steps", -2), ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", True), ("gradient_accumulation_steps", 1.0),
        ("optim", "adam"), ("weight_decay", -0.1), ("adam_beta1", 1.0), ("adam_beta2", -0.5),
        ("adam_epsilon", None), ("max_grad_norm", float("inf")), ("bf16", "true"), ("fp16", 1),
        ("gradient_checkpointing", 0), ("gradient_checkpointing", "full"),
        ("activation_offloading", None), ("max_length", 0), ("padding_free", None),
        ("eval_steps", 0), ("eval_steps", 1.5), ("eval_strategy", "epochs"),
        ("load_best_model_at_end", 1), ("metric_for_best_model", ""),
        ("greater_is_better", 0), ("early_stopping_patience", 0),
        ("early_stopping_threshold", -1.0), ("lr_scheduler_kwargs", 3),
        ("completion_only_loss", "no"), ("logging_steps", 0), ("save_steps", 1.5),
        ("disable_tqdm", 2), ("report_to", "mlflow"), ("project", ""), ("run_name", 3),
        ("label_smoothing_factor", 1.0), ("neftune_noise_alpha", 0),
        ("torch_compile", "yes"), ("torch_compile_backend", ""),
        ("data_seed", "1"), ("auto_find_batch_size", 4), ("full_determinism", 1),
        ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got ") as caught:
        TrainConfig(**{"output_dir": "out", name: value})
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("learning_rates", "did you mean 'learning_rate'\\?"),
        ("max_seq_len", "did you mean 'max_seq_length'\\?"),
        ("tf32", "leave it out"),
    ],
)
def test_a_setting_that_there_is_not_is_refused_by_name(name, hint):
    with pytest.raises(ConfigError, match=f"^TrainConfig has no field '{name}': {hint}$"):
        TrainConfig("out", **{name: 1})


def test_every_setting_is_described():
    """The command line takes its help from these lines."""
    doc = TrainConfig.__doc__
    for name in (field.name for field in dataclasses.fields(TrainConfig)):
        assert f"    {name}: " in doc or f"    {name}, " in doc or f", {name}: " in doc, name


def test_the_table_of_the_docs_has_every_setting():
    """docs/train.md, as `lowrank train --help` has it; a failure shows the lines to paste."""
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    texts = field_help(TrainConfig)
    rows = []
    for field in dataclasses.fields(TrainConfig):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        default = default.replace("'", '"')
        rows.append(f"| `{field.name}` | {default} | {texts[field.name]} |")
    expected = "\n".join(rows)
    assert expected in page, f"docs/train.md: expected under 'Every setting':\n{expected}"


@pytest.mark.parametrize(
    "other, name, value",
    [
        ("evaluation_strategy", "eval_strategy", "epoch"),
        ("max_seq_length", "max_length", 77),
        ("activation_checkpointing", "gradient_checkpointing", True),
    ],
)
def test_a_setting_by_another_name(other, name, value):
    config = TrainConfig("out", **{other: value})
    assert config == TrainConfig("out", **{name: value}) != TrainConfig("out")
    assert config == TrainConfig("out", **{name: value, other: value})
    assert config.to_dict()[name] == value and other not in config.to_dict()
    assert dataclasses.replace(config, seed=3) == TrainConfig("out", seed=3, **{name: value})
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got 'x'"):
        TrainConfig("out", **{other: "x"})
    assert TrainConfig.SPELLINGS[other] == name


def test_two_names_of_a_setting_with_two_values_are_refused():
    with pytest.raises(ConfigError, match="max_seq_length is max_length by another name; got 7 an"):
        TrainConfig("out", max_seq_length=7, max_length=8)


def test_resume_as_transformers_spells_it():
    assert TrainConfig("out", resume_from_checkpoint=True).resume == "auto"
    assert TrainConfig("out", resume_from_checkpoint=False).resume is None
    assert TrainConfig("out", resume=Path("auto")).resume == "auto"
    assert TrainConfig("out", resume_from_checkpoint="a/checkpoint-5").resume == "a/checkpoint-5"


def test_grouping_as_transformers_spells_it():
    assert TrainConfig("out", train_sampling_strategy="group_by_length").group_by_length is True
    assert TrainConfig("out", train_sampling_strategy="random").group_by_length is False
    with pytest.raises(ConfigError, match="^train_sampling_strategy must be one of random, group_"):
        TrainConfig("out", train_sampling_strategy="sequential")


def test_checkpointing_is_never_reentrant():
    for kwargs in (None, {}, {"use_reentrant": False}):
        TrainConfig("out", gradient_checkpointing_kwargs=kwargs)
    for kwargs in ({"use_reentrant": True}, {"reentrant": False}, 1):
        with pytest.raises(ConfigError, match="gradient_checkpointing_kwargs: expected use_reent"):
            TrainConfig("out", gradient_checkpointing_kwargs=kwargs)
