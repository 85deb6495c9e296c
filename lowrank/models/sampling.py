"""How the next token is chosen from logits: the likeliest, or drawn from the likely ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import ConfigError, WeightError

_NUCLEUS = 1024  # of the likeliest tokens, in which top_p is looked for before all are sorted


@dataclass(frozen=True)
class Sampling:
    """The numbers of one way to choose; each is checked, and means what transformers means by it.

    Temperature 0 takes the likeliest token; above it, one is drawn from softmax(logits /
    temperature), cut to the `top_k` likeliest and then to the fewest that together have `top_p`.
    Before all that, the logits of tokens that are in the text already, the prompt among it, are
    divided by `repetition_penalty`, or multiplied where negative (Keskar et al., arXiv:1909.05858,
    §4.1). A `seed` draws from a generator of its own, None from torch's.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed: expected a whole number of 64 bits; got {self.seed}")
        if not 0 <= self.temperature < torch.inf:
            raise ConfigError(
                f"temperature: expected at least 0, and finite; got {self.temperature}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected above 0 and at most 1; got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: expected at least 1; got {self.top_k}")
        if not 0 < self.repetition_penalty < torch.inf:
            raise ConfigError(
                "repetition_penalty: expected above 0, 1 for none, and finite; "
                f"got {self.repetition_penalty}"
            )


class Sampler:
    """Chooses a token for each row, step after step; remembers what is in each text already."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._sampling, self._size = sampling, len(prompts)
        self._rows = list(range(len(prompts)))  # those that are left
        self._generator: torch.Generator | None = None
        if sampling.seed is not None:
            self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._seen: Tensor | None = None  # bool [B, V]
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[torch.tensor(prompt, device=device)] = True

    def keep(self, rows: Sequence[int]) -> None:
        """Of the rows that are left, go on with these; what they draw depends on no other."""
        self._rows = [self._rows[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[rows]

    def choose(self, logits: Tensor) -> Tensor:
        """One token for each row that is left, of logits [B, V]: [B].

        Raises WeightError where the largest of a row is not finite.
        """
        logits = logits.float()
        if self._seen is not None:
            logits = penalised(logits, self._seen, self._sampling.repetition_penalty)
        best, chosen = logits.max(-1)  # NaN where there is one
        if not bool((finite := best.isfinite()).all()):
            row = int(finite.long().argmin())
            raise WeightError(
                f"prompt {self._rows[row]}: expected finite logits; got {best[row].item()}: a "
                "weight is not finite, or float16 has overflowed: use bfloat16 or float32"
            )
        if self._sampling.temperature >= torch.finfo(torch.float32).tiny:
            chosen = self._drawn(distribution(logits, self._sampling))
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _drawn(self, probs: Tensor) -> Tensor:
        """A token for each row of probs [B, V]; for those that are gone another is drawn, too."""
        every = probs
        if len(probs) < self._size:
            every = probs.new_ones(self._size, probs.shape[-1])
            every[self._rows] = probs
        return torch.multinomial(every, 1, generator=self._generator)[self._rows, 0]


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of tokens `seen` [B, V] made smaller by a penalty above 1."""
    less = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, less, logits)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from, given float32 logits [B, V]; rows add up to 1, or to `top_p`."""
    # the largest is 0, so that none overflows however low the temperature
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    return _nucleus(probs, sampling.top_p) if (sampling.top_p or 1.0) < 1 else probs


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """probs [B, V] with 0 but for the fewest, likeliest first, that together have `top_p`."""
    V = probs.shape[-1]
    values, index = probs.topk(min(_NUCLEUS, V))
    if V > _NUCLEUS and bool((values.sum(-1) < top_p).any()):  # they are seldom so flat
        values, index = probs.sort(descending=True)
    # a token stays if those before it have not reached top_p; so the first always does
    values[values.cumsum(-1) - values >= top_p] = 0
    return torch.zeros_like(probs).scatter_(-1, index, values)
