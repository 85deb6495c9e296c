"""What the functions of the LoRA operators refuse: one line that names, expects and got."""

from __future__ import annotations

import pytest
import torch

from lowrank import ops
from lowrank.errors import ConfigError, DataError, DtypeError, LowrankError, ShapeError
from tests.ops.weights import random_weight

M, K, N, R = 5, 33, 10, 3
META = torch.empty(N, K, device="meta")


def arguments(**changed) -> dict:
    good = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "absmax": None,
        "absmax_scale": None,
        "codebook": None,
        "bias": torch.randn(N),
        "block_size": 64,
        "A": torch.randn(1, R, K),
        "B": torch.randn(1, N, R),
        "scale": 0.5,
        "groups": None,
        "p": 0.0,
        "seed": None,
    }
    assert changed.keys() <= good.keys()
    return good | changed


def packed(rows: int = N) -> dict:
    names = ("weight", "absmax", "absmax_scale", "codebook")
    return dict(zip(names, random_weight(rows, K), strict=True))


def groups(order_length: int = M, offsets_length: int = 2, dtype=torch.int32):
    return torch.arange(order_length).to(dtype), torch.zeros(offsets_length, dtype=dtype)


WRONG = {
    "x: expected [..., K]; got a scalar": (ShapeError, {"x": torch.tensor(1.0)}),
    "x: expected [..., K=33]": (ShapeError, {"x": torch.randn(M, K - 1)}),
    "x: expected torch.float32": (DtypeError, {"x": torch.ones(M, K, dtype=torch.int32)}),
    "A, B: expected [E, R, K]": (ShapeError, {"A": torch.randn(R, K)}),
    "got [1, 3, 33] and [1, 10, 2]": (ShapeError, {"B": torch.randn(1, N, R - 1)}),
    "got [1, 0, 33]": (ShapeError, {"A": torch.randn(1, 0, K), "B": torch.randn(1, N, 0)}),
    "A: expected torch.float32": (DtypeError, {"A": torch.randn(1, R, K).bfloat16()}),
    "A, B: expected one dtype": (
        DtypeError,
        {
            "x": torch.randn(M, K).bfloat16(),
            "A": torch.randn(1, R, K).bfloat16(),
        },
    ),
    "A: expected on cpu": (ConfigError, {"A": torch.randn(1, R, K, device="meta")}),
    "weight: expected [N=10, K=33]": (ShapeError, {"weight": torch.randn(N, K - 1)}),
    "weight: expected torch.float32; got": (DtypeError, {"weight": torch.randn(N, K).half()}),
    "weight: expected on cpu": (ConfigError, {"weight": META}),
    "weight: a quantized weight is frozen": (
        ConfigError,
        {"weight": torch.randn(N, K, requires_grad=True)},
    ),
    "packed: expected 10 rows": (ShapeError, packed(N + 1)),
    "absmax: expected None without": (ConfigError, {"absmax": torch.ones(N, 1)}),
    "codebook: expected None without": (ConfigError, {"weight": None, "codebook": META}),
    "block_size: expected a power of two": (ConfigError, {**packed(), "block_size": 48}),
    "bias: expected [N=10]": (ShapeError, {"bias": torch.randn(N + 1)}),
    "bias: expected torch.float32": (DtypeError, {"bias": torch.randn(N).half()}),
    "bias: expected None without a weight": (ConfigError, {"weight": None}),
    "groups: expected them for E=2": (
        ConfigError,
        {"A": torch.randn(2, R, K), "B": torch.randn(2, N, R)},
    ),
    "order: expected [5]": (ShapeError, {"groups": groups(M + 1)}),
    "offsets: expected [2]": (ShapeError, {"groups": groups(M, 3)}),
    "order: expected torch.int32": (DtypeError, {"groups": groups(dtype=torch.int64)}),
    "p: expected a probability": (ConfigError, {"p": 1.0, "seed": torch.tensor(1)}),
    "seed: expected an int64 scalar with p=0.5": (ConfigError, {"p": 0.5}),
    "seed: expected None with p=0": (ConfigError, {"seed": torch.tensor(1)}),
    "seed: expected a scalar": (ShapeError, {"p": 0.5, "seed": torch.tensor([1])}),
    "seed: expected torch.int64": (DtypeError, {"p": 0.5, "seed": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("said", WRONG)
def test_the_forward_refuses(said):
    error, changed = WRONG[said]
    with pytest.raises(error) as caught:
        ops.lora_linear(**arguments(**changed))
    assert said in str(caught.value) and "\n" not in str(caught.value)


BACKWARD = {
    "dy: expected [..., N=10]": {"dy": torch.randn(M, N + 1)},
    "dy: expected torch.float32": {"dy": torch.ones(M, N, dtype=torch.int64)},
    "x: expected [5, 33]": {"x": torch.randn(M, K + 1)},
    "x: expected torch.float32": {"x": torch.randn(M, K).half()},
    "h: expected [5, 3]": {"h": torch.randn(M, R + 1)},
    "h: expected torch.float32": {"h": torch.randn(M, R).half()},
    "needs: expected three": {"needs": (True,)},
    "weight: expected [N=10, K=33]": {"weight": torch.randn(K, N)},
    "order: expected [5]": {"groups": groups(M + 1)},
    "seed: expected an int64 scalar": {"p": 0.1},
}


@pytest.mark.parametrize("said", BACKWARD)
def test_the_backward_refuses(said):
    good = arguments(**{k: v for k, v in BACKWARD[said].items() if k not in ("dy", "h", "needs")})
    good.pop("bias")
    good |= {"dy": torch.randn(M, N), "h": torch.randn(M, R), "needs": (True, True, True)}
    with pytest.raises(LowrankError) as caught:
        ops.lora_linear_backward(**(good | BACKWARD[said]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_group_rows_refuses():
    with pytest.raises(ShapeError, match="adapter_ids: expected"):
        ops.group_rows(torch.zeros(2, 3, dtype=torch.int64), 2)
    with pytest.raises(DtypeError, match="adapter_ids: expected"):
        ops.group_rows(torch.zeros(2), 2)
    with pytest.raises(ConfigError, match="E: expected a whole number >= 1"):
        ops.group_rows(torch.zeros(2, dtype=torch.int64), 0)
    for wrong in (-2, 3):
        with pytest.raises(DataError, match=f"below E=3; got {wrong}"):
            ops.group_rows(torch.tensor([0, wrong, 1]), 3)
