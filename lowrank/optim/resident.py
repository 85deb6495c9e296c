"""Optimizers with their state beside the parameters, on the device of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank.optim.base import Params, RuleOptimizer
from lowrank.optim.rules import ADAMW, ADAMW_8BIT, LION, LION_8BIT, Rule
from lowrank.optim.shards import cut, local, sharded

MIN_8BIT_SIZE = 4096  # as bitsandbytes


class Resident(RuleOptimizer):
    """The state of a parameter is made at its first step, and stays where the parameter was."""

    def advance(
        self, rule: Rule, params: Sequence[Tensor], step: int, numbers: Mapping[str, Any]
    ) -> None:
        for p in params:
            if not self.state[p]:
                shapes = rule.states(p)
                for name, state in rule.states(local(p)).items():
                    made = sharded(state.make(p.device), shapes[name].shape, p)
                    self.state[p][name] = made
        params = [p for p in params if local(p).numel()]  # there may be no rows of one here
        if params:
            names = self.state[params[0]].keys() - {"step"}
            states = {name: [local(self.state[p][name]) for p in params] for name in names}
            grads = [local(p.grad) for p in params]
            rule.step([local(p) for p in params], grads, states, step=step, **numbers)

    def keep(self, states: Mapping[Tensor, tuple[Rule, Mapping[str, Tensor]]]) -> None:
        for p, (_, tensors) in states.items():
            for name, tensor in tensors.items():
                self.state[p][name] = cut(tensor, p)


class AdamW(Resident):
    """AdamW with float32 moments (float64 of float64 parameters), whatever the parameters are.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;  p = (1 - lr wd) p - lr m̂ / (√v̂ + eps)

    torch's fused kernel: over float32 parameters, torch.optim.AdamW(fused=True) to the bit.
    arXiv:1711.05101
    """

    rule = ADAMW

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class AdamW8bit(Resident):
    """AdamW with moments of 8 bits: about 2.03 bytes a parameter in place of 8.

    A float32 scale for each 256 elements of a row; parameters of fewer than `min_8bit_size`
    elements, all shards of one together, keep float32 moments. What has no gradient, or a zero
    one and no moment, is not moved but by weight decay; a gradient that is not finite makes its
    parameter NaN, and with the next step all of that block of 256.   arXiv:2110.02861
    """

    rule = ADAMW_8BIT

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
        )


class Lion(Resident):
    """Lion with a float32 moment (float64 of float64 parameters), whatever the parameters are.

    c = b1 m + (1 - b1) g;  m = b2 m + (1 - b2) g;  p = (1 - lr wd) p - lr sign(c)

    Its rate is 3 to 10 times lower than AdamW's, its decay as much higher.   arXiv:2302.06675
    """

    rule = LION

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)


class Lion8bit(Resident):
    """Lion with its moment in 8 bits, about 1.02 bytes a parameter in place of 4.

    As in `AdamW8bit`; a gradient that is not finite makes its element of the parameter NaN at once.
    """

    rule = LION_8BIT

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, weight_decay=weight_decay, min_8bit_size=min_8bit_size
        )
