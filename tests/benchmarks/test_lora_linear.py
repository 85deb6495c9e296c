"""The LoRA layer's benchmark: who takes part, that all of them are right, and what is counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks import lora_linear, peers
from benchmarks.settings import Settings

SHAPE = ("64x128", 64, 128)
CEILINGS = {"copy_gbs": 10.0, "read_gbs": 20.0, "matmul_tflops": 0.1}


def rows(against: list[str], dtype: str = "float32", rows_of_x: tuple[int, ...] = (1, 130)):
    here = [name for name in against if peers.missing(name) is None]
    dtypes = {dtype: getattr(torch, dtype)}
    settings = Settings(here, [SHAPE], rows_of_x, dtypes, 0.02, 3, 1 << 18)
    settings.ceilings = dict(CEILINGS)
    made = lora_linear.run(settings)
    assert settings.notes == []
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_side_is_right_and_held_to_its_bare_layer(dtype):
    made = rows(["torch", "peft", "bitsandbytes"], dtype)
    assert {row["case"].split(" over ")[1] for row in made} == {
        f"{base} {dtype}, {direction}"
        for base in ("dense", "NF4")
        for direction in ("forward", "forward + backward")
    }
    limit = 1e-5 if dtype == "float32" else 2e-2
    for row in made:
        assert "wrong" not in row and row["error"] < limit, row["contender"]
        assert ("over_bare" in row) == ("frozen" not in row["contender"])
    dense = {row["contender"] for row in made if "dense" in row["case"]}
    quantized = {row["contender"] for row in made if "NF4" in row["case"]}
    assert dense == {"torch, frozen", "lowrank", "peft"}
    assert quantized == {
        *("lowrank, frozen", "lowrank", "bitsandbytes, frozen", "peft + bitsandbytes")
    }
    assert all(row["path"] for row in made if row["contender"] == "lowrank")


def test_nobody_but_ours_where_nobody_is_asked_for():
    assert {row["contender"] for row in rows([])} == {"lowrank, frozen", "lowrank"}
    assert rows(["torch"], rows_of_x=(1, 64)) == []


def test_bytes_and_operations():
    """M = 130, N = 64, K = 128, R = 16, float32 over a dense base."""
    dense = [row for row in rows(["torch"]) if "over dense" in row["case"]]
    made = {(row["case"].rsplit(", ")[-1], row["contender"]): row for row in dense}
    M, N, K, R = 130, 64, 128, 16
    base, streamed, factors = 4 * N * K, 4 * M * (N + K), 4 * R * (N + K)
    bare, ours = made["forward", "torch, frozen"], made["forward", "lowrank"]
    assert (bare["moved"], bare["flops"]) == (base + streamed, 2 * M * N * K)
    assert ours["moved"] == base + streamed + factors
    assert ours["flops"] == 2 * M * N * K + 2 * M * R * (N + K)
    both = made["forward + backward", "lowrank"]
    assert both["moved"] == 2 * (base + streamed + factors) + 4 * M * K + factors
    assert both["flops"] == 4 * M * N * K + 6 * M * R * (N + K)
