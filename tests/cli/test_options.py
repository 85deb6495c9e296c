"""Flags from dataclasses and settings in TOML: every field, every kind of value, there and back."""

import argparse
import dataclasses
import random
import sys
from typing import Literal

import pytest

from lowrank import LoRAConfig
from lowrank.cli.options import add_fields, dump_toml, field_help, given_fields, read_toml
from lowrank.cli.train import Run
from lowrank.errors import ConfigError
from lowrank.train import TrainConfig


@dataclasses.dataclass
class Everything:
    """One of each.

    text: free text,
        and more of it.
    whole, real: numbers.   switch: on or off.

    Not about whole: this.
    """

    text: str
    whole: int = 3
    real: float = 0.5
    switch: bool = True
    maybe: int | None = None
    names: list[str] | str | None = None
    numbers: list[int] | int | None = None
    init: bool | str = True
    choice: Literal["a", "b"] = "a"
    pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: list[int] | dict[str, list[int]] | None = None
    chosen: list[str] | Literal["all", "some"] | str | None = None


def parse(*words: str, config: type = Everything) -> dict:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_fields(parser, config, "x", "settings")
    return given_fields(parser.parse_args(words), "x")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--text hello", {"text": "hello"}),
        ("--whole 12 --real 2", {"whole": 12, "real": 2.0}),
        ("--real 1e-4", {"real": 1e-4}),
        ("--no-switch", {"switch": False}),
        ("--maybe none", {"maybe": None}),
        ("--maybe 7", {"maybe": 7}),
        ("--names q_proj", {"names": ["q_proj"]}),
        ("--names q_proj mlp.up_proj", {"names": ["q_proj", "mlp.up_proj"]}),
        ("--names all-linear", {"names": "all-linear"}),
        (r"--names .*\.[qv]_proj", {"names": r".*\.[qv]_proj"}),
        ("--names none", {"names": None}),
        ("--numbers 1 2", {"numbers": [1, 2]}),
        ("--init false", {"init": False}),
        ("--init gaussian", {"init": "gaussian"}),
        ("--choice b", {"choice": "b"}),
        ("--pattern q_proj=4 v_proj=8", {"pattern": {"q_proj": 4, "v_proj": 8}}),
        ("--rows 4 2", {"rows": [4, 2]}),
        ("--rows a=4 b.c=2 a=7", {"rows": {"a": [4, 7], "b.c": [2]}}),
        ("--chosen some", {"chosen": "some"}),
        ("--chosen one some", {"chosen": ["one", "some"]}),
        ("--chosen other", {"chosen": ["other"]}),
        ("", {}),
    ],
)
def test_words_become_values(words, value):
    assert parse(*words.split()) == value


@pytest.mark.parametrize(
    "words",
    ["--rows a=4 5", "--whole 1.5", "--choice c", "--pattern q", "--numbers x", "--maybe x"],
)
def test_what_is_no_value_is_refused(words):
    with pytest.raises(argparse.ArgumentError):
        parse(*words.split())


def test_help_comes_from_the_docstring():
    assert field_help(Everything) == {
        "text": "free text, and more of it.",
        "whole": "numbers.",
        "real": "numbers.",
        "switch": "on or off.",
    }


def test_other_names_of_a_setting(tmp_path):
    given = parse("--max-seq-length", "77", "--evaluation-strategy", "epoch", config=TrainConfig)
    assert given == {"max_length": 77, "eval_strategy": "epoch"}
    assert parse("--no-activation-checkpointing", config=TrainConfig) == {
        "gradient_checkpointing": False
    }
    file = tmp_path / "run.toml"
    file.write_text("[train]\nmax_seq_length = 77\n")
    assert read_toml(file, {"train": TrainConfig}) == {"train": {"max_length": 77}}
    file.write_text("[train]\nmax_seq_length = 77\nmax_length = 77\n")
    with pytest.raises(ConfigError, match="has max_length under two names: leave one out"):
        read_toml(file, {"train": TrainConfig})


@pytest.mark.parametrize("config", [TrainConfig, LoRAConfig, Run])
def test_every_field_is_a_flag(config):
    parser = argparse.ArgumentParser()
    add_fields(parser, config, "x", "settings")
    text = parser.format_help()
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert set(field_help(config)) == {field.name for field in dataclasses.fields(config)}


def test_toml_round_trip(tmp_path):
    tomllib = (
        pytest.importorskip("tomllib")
        if sys.version_info >= (3, 11)
        else pytest.importorskip("tomli")
    )
    made = Everything(
        text='quo"te \\ back\nline é',
        whole=random.randrange(-(10**9), 10**9),
        real=random.choice([1e-5, 1.0, 2.5e10, random.random()]),
        switch=False,
        names=["a", "b.c"],
        numbers=[1, 2],
        init="gaussian",
        pattern={"q_proj": 4, r".*\.v": 8},
        rows={"a.b": [1, 2]},
        chosen="all",
    )
    text = dump_toml({"train": dataclasses.asdict(made), "x": {}})
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    assert Everything(**tomllib.loads(text)["train"]) == made
    tables = read_toml(path, {"train": Everything, "x": Everything, "absent": Everything})
    assert Everything(**tables["train"]) == made
    assert tables["x"] == tables["absent"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train\n", "not TOML"),
        ("[trian]\n", "unknown key 'trian': did you mean 'train'?"),
        ("[train]\nwhloe = 3\n", "[train] has an unknown key 'whloe': did you mean 'whole'?"),
        ("train = 3\n", "expected [train] to be a table; got 3"),
    ],
)
def test_toml_that_is_wrong(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_toml(path, {"train": Everything})
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_of_a_fused_projection():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_fields(parser, LoRAConfig, "lora", "LoRA")
    words = ["--target-rows", "c_attn=0:64", "c_attn=128:192", "qkv=3:4"]
    given = given_fields(parser.parse_args(words), "lora")
    assert given == {"target_rows": {"c_attn": [(0, 64), (128, 192)], "qkv": [(3, 4)]}}
    assert LoRAConfig(**given).spans("h.0.c_attn") == [(0, 64), (128, 192)]
    for wrong in ("c_attn=0:", "c_attn=0:1:2", "c_attn"):
        with pytest.raises(argparse.ArgumentError, match=f"NAME=START:STOP; got '{wrong}'"):
            parser.parse_args(["--target-rows", wrong])
