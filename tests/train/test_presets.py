"""Presets: settings that both configs take, and what overrides them on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowrank
from lowrank.cli.main import build_parser
from lowrank.cli.train import resolve
from lowrank.errors import ConfigError
from lowrank.train import PRESETS, TrainConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_both_configs_take_a_preset(name):
    found = preset(name)
    lora, train = lowrank.LoRAConfig(**found.lora), TrainConfig("out", **found.train)
    assert lora.lora_alpha == 2 * lora.r and train.learning_rate >= 1e-4
    assert found.about


def test_the_names_are_the_issues():
    assert list(PRESETS) == ["quick", "general", "complex", "large-data"]
    with pytest.raises(ConfigError, match="one of quick, general, complex, large-data; got 'slow'"):
        preset("slow")


def test_a_file_beats_a_preset_and_a_flag_beats_both(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[run]\nmodel = "m"\ndata = "d"\n[train]\noutput_dir = "out"\nlearning_rate = 0.5\n'
        "[lora]\nr = 3\n"
    )
    words = ["train", "--config", str(tmp_path / "run.toml"), "--preset", "complex", "--r", "5"]
    _, config, lora = resolve(build_parser().parse_args(words))
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (5, 10, "all-linear")
    assert (config.learning_rate, config.warmup_ratio) == (0.5, 0.1)
    _, _, lora = resolve(build_parser().parse_args([*words, "--lora-alpha", "7"]))
    assert (lora.r, lora.lora_alpha) == (5, 7)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_the_docs_is_what_the_presets_are(name):
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip().strip("`") for cell in row.split("|")[3:-1]]
    found = preset(name)
    lora, train = found.lora, found.train
    wanted = (
        lora["r"], lora["lora_alpha"], lora["target_modules"], lora["lora_dropout"],
        train["learning_rate"], train["num_train_epochs"],
    )  # fmt: skip
    assert [type(w)(cell) for w, cell in zip(wanted, cells, strict=True)] == list(wanted)
