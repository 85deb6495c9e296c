"""The numbers of `lion8bit_step`; map and layout of its moment are those of `adamw8bit`."""

from __future__ import annotations

from typing import NamedTuple


class Coefficients(NamedTuple):
    """The numbers of one step, in the order of the C struct; each is rounded to float32 where used.

    c = m * beta1 + g * rest1,  m = m * beta2 + g * rest2
    p = p * decay - sign(c) * rate
    """

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    decay: float
    rate: float


def coefficients(lr: float, beta1: float, beta2: float, weight_decay: float) -> Coefficients:
    return Coefficients(beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr)
