"""Predicted peaks of whole training runs beside those of processes that take them."""

from __future__ import annotations

import os

import pytest

import lowrank
from benchmarks import memory, table
from lowrank.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's /proc"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in memory.MODELS.items():
        lowrank.save_model(Decoder(config), folder / name)
    return folder


def check(source, told):
    """Within a tenth, also of what is above the process itself."""
    peak, fixed = memory.predicted(source, told)
    measured = memory.measured(source, told, memory.GIVES_BACK)
    assert peak - fixed == pytest.approx(measured - fixed, rel=memory.WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("what", memory.RUNS)
def test_predicted_within_a_tenth_of_measured(what, sources):
    model, told = memory.RUNS[what]
    check(str(sources / model), told)


@pytest.mark.slow
@pytest.mark.parametrize("what", memory.SMOLLM2_RUNS)
def test_smollm2(what, smollm2):
    check(str(smollm2), memory.SMOLLM2_RUNS[what][1])


def test_rows_of_the_table(monkeypatch):
    monkeypatch.setattr(memory, "predicted", lambda source, told: (500 << 20, 300 << 20))
    monkeypatch.setattr(memory, "measured", lambda source, told, env: (500 if env else 600) << 20)
    row = memory.row("QLoRA", "tiny", "there", {"per_device_train_batch_size": 2, "max_length": 8})
    assert (
        "wrong" not in row
        and "100.0%" in table.table([row])
        and "QLoRA, 2 x 8" in table.table([row])
    )
    monkeypatch.setattr(memory, "measured", lambda source, told, env: 600 << 20)
    row = memory.row("QLoRA", "tiny", "there", {"per_device_train_batch_size": 2, "max_length": 8})
    assert "within 10%" in row["wrong"]
