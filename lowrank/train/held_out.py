"""The held-out loss of any model that predicts the next token, without a run around it."""

from __future__ import annotations

from torch import nn

from lowrank.data import Sampler, TokenizedExamples
from lowrank.train.evaluation import Evaluation
from lowrank.train.feed import Feed
from lowrank.train.loss import batch_loss, packs
from lowrank.train.precision import Precision


def held_out_loss(model: nn.Module, data: TokenizedExamples, batch_size: int = 8) -> float:
    """Mean of -log p per labelled token of `data`, in nats, in eval mode.

    In the model's own dtypes. The examples are taken `batch_size` at a time, fewer where memory
    does not suffice.
    """
    device = next(model.parameters()).device
    sampler = Sampler(data.lengths, batch_size, accumulation=1, seed=0)
    feed = Feed(data, sampler, device, end_to_end=packs(model), pad_token_id=0)
    evaluation = Evaluation(model, batch_loss(model), feed, Precision(None, device), halves=True)
    found = evaluation.metrics()
    assert found is not None
    return found["eval_loss"]
