"""Every registered scheme in each of its variants: a new one is tested by being registered."""

from __future__ import annotations

import inspect
from itertools import product

import torch

from lowrank import quant

TABLE = torch.tensor([0.9, -1, -0.5, 0.5, 0.1, -0.1, 0, 1, 0.3, -0.3, 0.3, 0.7, -0.7, 0.2, -0.2, 0])
NAMES = quant.names()  # before any test registers one of its own
CHOICES = {
    "double_quant": [False, True],
    "per": ["tensor", "row"],
    "quant_type": ["nf4", "fp4"],
    "codebook": [TABLE],  # neither sorted nor without doubles
}


def variants(**fixed) -> list:
    """(name, options) for each scheme and each combination of its choices and of `fixed`."""
    found = []
    for name in NAMES:
        parameters = inspect.signature(type(quant.get(name, **required(name)))).parameters
        choices = {k: v for k, v in CHOICES.items() if k in parameters}
        choices |= {k: [v] for k, v in fixed.items() if k in parameters}
        found += [
            (name, dict(zip(choices, values, strict=True))) for values in product(*choices.values())
        ]
    return found


def required(name: str) -> dict:
    """What `quant.get(name)` cannot do without."""
    return {"codebook": TABLE} if name == "codebook" else {}


def make(variant):
    """The quantizer of one of `variants`."""
    name, options = variant
    return quant.get(name, **options)


def label(variant) -> str:
    name, options = variant
    return "-".join([name, *(str(v) for k, v in options.items() if k != "codebook")])


def same(a: quant.Storage, b: quant.Storage) -> bool:
    """Whether two storages hold the same bits under the same names."""
    return a.tensors.keys() == b.tensors.keys() and all(
        t.dtype == b[name].dtype and torch.equal(t, b[name]) for name, t in a.tensors.items()
    )
