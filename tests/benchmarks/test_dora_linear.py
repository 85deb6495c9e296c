"""The DoRA layer's benchmark: who takes part, and that all of them are right."""

from __future__ import annotations

import pytest
import torch

from benchmarks import dora_linear, peers
from benchmarks.settings import Settings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_side_is_right_and_held_to_its_bare_layer(dtype):
    here = [n for n in ("torch", "peft", "bitsandbytes") if peers.missing(n) is None]
    dtypes = {dtype: getattr(torch, dtype)}
    settings = Settings(here, [("64x128", 64, 128)], (1, 130), dtypes, 0.02, 3, 1 << 18)
    settings.ceilings = {"copy_gbs": 10.0, "read_gbs": 20.0, "matmul_tflops": 0.1}
    made = dora_linear.run(settings)
    assert settings.notes == [] and len(made) == 2 * (3 + 4)
    limit = 1e-5 if dtype == "float32" else 3e-2
    for row in made:
        assert "wrong" not in row and row["error"] < limit, row["contender"]
        assert ("over_bare" in row) == ("frozen" not in row["contender"])
