"""Sweeps: each adapter as if trained alone, what is compared, and what is left behind."""

from __future__ import annotations

import copy
import json
import logging
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from lowrank.errors import ConfigError
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.train import SweepResult, TrainConfig, Trainer, Trial, sweep
from lowrank.train.sweep import refined

from .support import VOCAB, Bytes, Small, examples


def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(DecoderConfig(VOCAB, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)).to(dtype)


def config(path, **settings) -> TrainConfig:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "eval_steps": 3, "warmup_ratio": 0.2, **settings,
    }  # fmt: skip
    return TrainConfig(path, **settings)


def alone(model, lora, train, rows, held_out):
    """What the adapter comes to by itself: losses, held-out losses, weights."""
    model = copy.deepcopy(model)
    torch.manual_seed(train.seed)
    lowrank.inject(model, lora)
    result = Trainer(model, train, rows, held_out).train()
    return (
        result.losses,
        result.eval_losses,
        load_file(train.output_dir / "adapter_model.safetensors"),
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


GRIDS = {
    "ranks": ({"r": [2, 8, 3]}, {}),
    "rates": ({"r": [4], "learning_rate": [1e-2, 3e-3], "lr_scheduler_type": ["linear"]}, {}),
    "dora": ({"r": [2, 5]}, {"use_dora": True}),
    "targets": ({"r": [3], "target_modules": [["q_proj"], "all-linear", ["down_proj"]]}, {}),
    "plus": ({"r": [2], "loraplus_lr_ratio": [None, 16.0]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_each_adapter_of_a_sweep_is_as_trained_alone(tmp_path, generator, name):
    """Losses, held-out losses and weights, in float64, where rounding is not what is compared."""
    grid, options = GRIDS[name]
    base, rows = decoder(torch.float64), examples(11, generator)
    lora = lowrank.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    model = copy.deepcopy(base)
    train = config(tmp_path / "sweep")
    result = sweep(model, lora, train, rows, rows[:3], grid=grid, refine=False, longer=1)
    assert len(result.trials) == math.prod(len(values) for values in grid.values())
    for trial in result.trials:
        settings = trial.settings
        for_lora = {k: v for k, v in settings.items() if k in ("r", "target_modules")}
        own = {k: v for k, v in settings.items() if k not in for_lora}
        adapter = lowrank.LoRAConfig(
            **{"target_modules": "all-linear", **for_lora, **options}, lora_alpha=2 * settings["r"]
        )
        losses, eval_losses, weights = alone(
            base, adapter, config(tmp_path / "alone" / trial.name, **own), rows, rows[:3]
        )
        assert trial.losses == pytest.approx(losses, rel=1e-9)
        assert [step for step, _ in trial.eval_losses] == [0, 3, 6]
        assert [v for _, v in trial.eval_losses] == pytest.approx([v for _, v in eval_losses])
        assert trial.eval_loss == trial.eval_losses[-1][1]
        found = load_file(trial.output_dir / "adapter_model.safetensors")
        assert found.keys() == weights.keys()
        assert trial.parameters == sum(tensor.numel() for tensor in weights.values())
        for key, weight in weights.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-7)
    before, after = state(base), state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quantizer", ["nf4", "int8"])
def test_over_a_quantized_base(tmp_path, generator, quantizer):
    base = lowrank.quantize(decoder(), quantizer)
    rows = examples(11, generator)
    lora = lowrank.LoRAConfig(target_modules="all-linear")
    grid = {"r": [2, 8]}
    result = sweep(base, lora, config(tmp_path / "sweep"), rows, rows[:3], grid=grid, refine=False)
    assert [(t.stage, t.r, t.steps) for t in result.trials] == [
        ("scan", 2, 6), ("scan", 8, 6), ("longer", result.ranking[0].r, 12),
        ("longer", result.ranking[1].r, 12),
    ]  # fmt: skip
    for trial in result.trials[:2]:
        lora = lowrank.LoRAConfig(r=trial.r, lora_alpha=trial.r, target_modules="all-linear")
        losses, eval_losses, _ = alone(base, lora, config(tmp_path / trial.name), rows, rows[:3])
        assert trial.losses == pytest.approx(losses, rel=1e-5)
        assert [v for _, v in trial.eval_losses] == pytest.approx(
            [v for _, v in eval_losses], rel=1e-5
        )


def test_a_model_of_ones_own_is_padded(tmp_path, generator):
    """Of no class the library knows, with an adapter on its embedding too."""
    base, rows = Small(), examples(11, generator)
    lora = lowrank.LoRAConfig(target_modules=["embed", "head"])
    grid = {"r": [2, 3]}
    result = sweep(base, lora, config(tmp_path / "sweep"), rows, rows[:3], grid=grid, longer=1)
    assert [trial.stage for trial in result.trials] == ["scan"] * 2 + ["refine"] * (
        len(result.trials) - 2
    )
    for trial in result.trials:
        adapter = lowrank.LoRAConfig(
            r=trial.r, lora_alpha=trial.r, target_modules=["embed", "head"]
        )
        losses, _, _ = alone(base, adapter, config(tmp_path / trial.name), rows, rows[:3])
        assert trial.losses == pytest.approx(losses, rel=1e-5)


def small_sweep(path, generator, model=None, grid=None, **settings):
    rows = examples(9, generator)
    options = {k: settings.pop(k) for k in ("side_by_side", "refine", "longer") if k in settings}
    lora = lowrank.LoRAConfig(r=4, target_modules=["head"])
    train = config(path / "sweep", **{"max_steps": 4, "eval_steps": None, **settings})
    grid = {"r": [2, 3, 4]} if grid is None else grid
    options = {"refine": False, "longer": 1, **options}
    return sweep(model or Small(), lora, train, rows, rows[:3], Bytes(), grid=grid, **options)


def test_what_a_sweep_leaves(tmp_path, generator):
    result = small_sweep(tmp_path, generator, refine=True, longer=1.5)
    names = {path.name for path in result.output_dir.iterdir()}
    assert names == {"sweep.md", "sweep.json", "sweep.png", *(t.name for t in result.trials)}
    for trial in result.trials:
        assert {path.name for path in trial.output_dir.iterdir()} == {
            "train_config.json", "metrics.jsonl", "results.json", "loss.png", "README.md",
            "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
        results = json.loads((trial.output_dir / "results.json").read_text())
        assert results["eval_loss_after"] == trial.eval_loss and results["steps"] == trial.steps
        again = lowrank.load_adapter(Small(), trial.output_dir)
        assert again.head.r == {"default": trial.r}
    longer = [trial for trial in result.trials if trial.stage == "longer"]
    assert [trial.steps for trial in longer] == [6, 6] and len({t.name for t in longer}) == 2
    saved = json.loads((result.output_dir / "sweep.json").read_text())
    assert saved["best"] == result.best.name and saved["elbow"] == result.elbow.name
    assert [t["eval_loss"] for t in saved["trials"]] == [t.eval_loss for t in result.trials]
    assert (result.output_dir / "sweep.md").read_text() == f"{result}\n"
    with pytest.raises(ConfigError, match="already holds a sweep"):
        small_sweep(tmp_path, generator)


def test_one_that_diverges_is_given_up_alone(tmp_path, generator):
    base = Small()
    grid = {"r": [2], "learning_rate": [1e-2, 1e38]}
    result = small_sweep(tmp_path, generator, copy.deepcopy(base), grid)
    good, bad = result.trials
    assert "lower learning_rate" in bad.failure and bad.eval_loss is None and bad.steps < 4
    assert not (bad.output_dir / "adapter_model.safetensors").exists()
    assert result.best is good and good.steps == 4
    assert bad.failure in str(result)
    (tmp_path / "again").mkdir()
    generator.manual_seed(generator.initial_seed())
    single = small_sweep(tmp_path / "again", generator, base, {"r": [2]})
    assert single.trials[0].losses == pytest.approx(good.losses, rel=1e-5)


def test_each_says_what_ails_it(tmp_path, generator, caplog):
    grid = {"r": [2], "learning_rate": [1e-9, 1e-8]}
    settings = {"max_steps": 12, "per_device_train_batch_size": 9}
    small_sweep(tmp_path, generator, grid=grid, gradient_accumulation_steps=1, **settings)
    for rate in ("1e-09", "1e-08"):
        line = f"r2-learning_rate-{rate}: underfitting: the training loss hardly moved, "
        assert sum(message.startswith(line) for message in caplog.messages) == 1


class Interrupted(Small):
    """Sends SIGINT in forward number `at`."""

    calls, at = 0, 5

    def forward(self, input_ids):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(input_ids)


@pytest.mark.parametrize("side_by_side", [2, 1])
def test_ctrl_c_keeps_what_is_done(tmp_path, generator, side_by_side):
    result = small_sweep(tmp_path, generator, Interrupted(), side_by_side=side_by_side, longer=2)
    assert result.interrupted and len(result.trials) == side_by_side
    assert all(0 < trial.steps < 4 and trial.eval_loss is None for trial in result.trials)
    for trial in result.trials:
        assert (trial.output_dir / "adapter_model.safetensors").exists()
    assert result.best is result.elbow is None and "No adapter was trained" in str(result)


class Cramped(Small):
    """Has no memory for more than four rows."""

    def forward(self, input_ids):
        if len(input_ids) > 4:
            torch.empty(2**56)
        return super().forward(input_ids)


def test_fewer_at_once_where_memory_runs_out(tmp_path, generator, caplog):
    base = Small()
    settings = {"per_device_eval_batch_size": 1, "side_by_side": 3}
    result = small_sweep(tmp_path, generator, Cramped(), longer=2, **settings)
    assert "out of memory: 1 at once from here on" in caplog.text
    assert [trial.steps for trial in result.trials] == [4, 4, 4, 8, 8]
    with pytest.raises(RuntimeError, match="allocate"):
        (tmp_path / "b").mkdir()
        small_sweep(tmp_path / "b", generator, Cramped(), per_device_train_batch_size=5)
    assert not base.head.__dict__.get("config")


def test_settings_of_the_trainer_alone_are_kept_one_after_another(tmp_path, generator, caplog):
    caplog.set_level(logging.INFO, "lowrank.train")
    settings = {"load_best_model_at_end": True, "eval_steps": 1, "learning_rate": 0.5}
    result = small_sweep(tmp_path, generator, **settings)
    assert "trained one after another: load_best_model_at_end=True" in caplog.text
    for trial in result.trials:
        assert (trial.output_dir / "adapter_model.safetensors").exists()
        results = json.loads((trial.output_dir / "results.json").read_text())
        assert results["best_step"] in (1, 2, 3, 4)
        assert trial.eval_loss == pytest.approx(min(v for step, v in trial.eval_losses if step))


def trial(r: int, loss: float, stage: str = "scan", before: float = 4.0, **settings) -> Trial:
    found = Trial(f"r{r}", stage, {"r": r, **settings}, None, parameters=100 * r, steps=10)
    found.eval_losses, found.losses = [(0, before), (10, loss)], [before, loss]
    found.eval_loss = loss
    return found


def test_best_elbow_and_what_is_tried_next(tmp_path):
    losses = {8: 2.5, 16: 2.008, 32: 2.005, 64: 2.0}
    result = SweepResult(tmp_path, {}, [trial(r, loss) for r, loss in losses.items()])
    assert result.best.r == 64 and result.elbow.r == 16  # 1.98 of 2
    assert refined(result) == [48, 96] and "No larger rank was tried" in str(result)
    result.trials += [trial(48, 1.99), trial(96, 2.5), trial(16, 1.0, "longer")]
    assert (result.best.r, result.elbow.r) == (48, 16) and refined(result) == [40, 56]
    assert [t.r for t in result.ranking] == [48, 64, 32, 16, 8, 96]
    text = str(result)
    assert "Best: r48, 1.9900. Elbow: r16" in text and "Trained longer: r16, 1.0000." in text
    assert "No larger rank" not in text

    mixed = [
        trial(8, 2.0, rate=1),
        trial(4, 2.0, rate=2),
        trial(16, 2.1, rate=1),
        trial(8, 3, rate=2),
    ]
    result = SweepResult(tmp_path, {}, mixed)
    assert result.best is mixed[1], "of equals, the one of fewer parameters"
    assert refined(result) == [3, 6] and result.elbow is mixed[1]
    worse = SweepResult(tmp_path, {}, [trial(8, 5.0), trial(16, 4.5)])
    assert worse.elbow is worse.best is worse.trials[1]


def test_a_sweep_needs_held_out_data(tmp_path, generator):
    with pytest.raises(ConfigError, match="^eval_data: a sweep compares held-out losses; got None"):
        sweep(Small(), lowrank.LoRAConfig(), config(tmp_path), examples(4, generator), None)


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({"rank": [8]}, {}, "fields of LoRAConfig and TrainConfig; got 'rank'"),
        ({"output_dir": ["a"]}, {}, "got 'output_dir'"),
        ({"r": []}, {}, "different values of r"),
        ({"r": 8}, {}, "grid: expected a list of values of r; got 8"),
        ({"target_modules": "head"}, {}, "grid: expected a list of values of target_modules"),
        ({"r": [8, 8]}, {}, "different values of r"),
        ({"r": [8, 0]}, {}, "^r: expected"),
        ({"learning_rate": [-1.0]}, {}, "learning_rate must be"),
        (None, {"side_by_side": 0}, "side_by_side: expected a number of at least 1; got 0"),
        (None, {"longer": 0.5}, "longer: expected"),
    ],
)
def test_what_cannot_be_swept(tmp_path, generator, grid, options, message):
    model = Small()
    with pytest.raises(ConfigError, match=message):
        small_sweep(tmp_path, generator, model, grid, **options)
    assert list(tmp_path.iterdir()) == [] and type(model.head) is torch.nn.Linear


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa"}], ids=str)
def test_adapters_that_change_the_base_are_refused(tmp_path, generator, options):
    lora = lowrank.LoRAConfig(target_modules=["head"], **options)
    rows = examples(9, generator)
    with pytest.raises(ConfigError, match="adapters that leave the base as it is"):
        sweep(Small(), lora, config(tmp_path / "sweep"), rows, rows)
    model = lowrank.inject(Small(), lowrank.LoRAConfig(target_modules=["head"]))
    with pytest.raises(ConfigError, match="a model without adapters: call lowrank.unload"):
        sweep(model, lowrank.LoRAConfig(), config(tmp_path / "sweep"), rows, rows)
