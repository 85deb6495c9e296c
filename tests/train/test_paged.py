"""A run with a paged optimizer learns what it learns with the resident one, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lowrank.errors import ConfigError
from lowrank.train import TrainConfig, Trainer

from .support import Small, examples

LEAST = 2 * 64 * 1024


def run(folder, rows, optim, steps=4, **options):
    torch.manual_seed(5)
    model = Small(width=300)
    config = TrainConfig(
        folder, max_steps=steps, learning_rate=1e-3, optim=optim, disable_tqdm=True, **options
    )
    result = Trainer(model, config, rows).train()
    return result.losses, model.state_dict()


@pytest.mark.parametrize(
    "paged, resident",
    [
        ("paged_adamw_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "adamw_torch"),
        ("paged_lion_8bit", "lion_8bit"),
        ("paged_lion_32bit", "lion_32bit"),
    ],
)
def test_a_run_is_that_of_the_resident_twin(paged, resident, tmp_path, generator):
    rows = examples(24, generator)
    losses, weights = run(tmp_path / "resident", rows, resident)
    for i, budgets in enumerate(({}, {"host_budget": LEAST, "page_dir": tmp_path})):
        ours, moved = run(tmp_path / f"paged{i}", rows, paged, **budgets)
        assert ours == losses
        assert all(torch.equal(moved[name], weights[name]) for name in weights)


def test_a_run_goes_on_with_another_budget(tmp_path, generator):
    rows = examples(24, generator)
    constant = {"lr_scheduler_type": "constant"}
    losses, weights = run(tmp_path / "whole", rows, "adamw_8bit", **constant)
    paged = {"page_dir": tmp_path, "save_steps": 2, "resume": "auto", **constant}
    for last, budget in ((2, LEAST), (4, 1 << 20)):
        ours, moved = run(
            tmp_path / "run", rows, "paged_adamw_8bit", last, host_budget=budget, **paged
        )
    assert ours[-2:] == losses[-2:]
    assert all(torch.equal(moved[name], weights[name]) for name in weights)


def test_budgets_are_for_paged_optimizers():
    for name, value in (("device_budget", 1 << 20), ("host_budget", LEAST), ("page_dir", "pages")):
        with pytest.raises(ConfigError, match=f"^{name} is for a paged optimizer; got optim="):
            TrainConfig("out", **{name: value})
        TrainConfig("out", optim="paged_adamw_8bit", **{name: value})
    with pytest.raises(ConfigError, match="host_budget must be None or a number of bytes"):
        TrainConfig("out", optim="paged_adamw_32bit", host_budget=LEAST - 1)


def test_no_directory_for_pages(tmp_path, generator):
    """Known before the first step, and before anything is written."""
    rows = examples(4, generator)
    (tmp_path / "file").touch()
    for name, why in (("no/such", "No such file or directory"), ("file", "Not a directory")):
        expected = f"^page_dir: expected a directory that can be written; got .*{name}: {why}$"
        with pytest.raises(ConfigError, match=expected):
            run(tmp_path / "run", rows, "paged_adamw_8bit", page_dir=tmp_path / name)
    assert not (tmp_path / "run").exists()
