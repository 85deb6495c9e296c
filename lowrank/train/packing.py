"""Whether a model can be trained on packs: tried out, not believed."""

from __future__ import annotations

import logging

import torch
from torch import nn

from lowrank.data import Sampler, TokenizedExamples, collate
from lowrank.errors import ConfigError
from lowrank.train.loss import logits_of

logger = logging.getLogger("lowrank.train")

_TOKENS = 8  # of each of the two examples that are tried
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; others: 16 bits
_TOLERANCE_16 = 5e-2


def check_packing(model: nn.Module, data: TokenizedExamples) -> None:
    """ConfigError unless two examples in one row give this model the logits they give it alone.

    The row comes with position_ids that restart and a mask [B, 1, S, S] of what each token may see.
    """
    first, second = (data.ids[data.span(i)][:_TOKENS] for i in (0, len(data) - 1))
    ids = torch.cat([first, second])
    offsets = [0, len(first), len(ids)]
    tried = TokenizedExamples(ids, ids, offsets, [len(first) - 1, len(second) - 1])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, *alone = (
                logits_of(model, collate(tried, rows, end_to_end=False).to(device))[0]
                for rows in ([[0, 1]], [[0]], [[1]])
            )
    except Exception as error:  # of a forward that takes no such mask or positions
        raise ConfigError(
            f"packing is on, but {type(model).__name__} fails on a pack, given position_ids and a "
            f"mask [B, 1, S, S]: {error!r:.200}: turn it off"
        ) from error
    finally:
        model.train(was_training)
    expected = torch.cat(alone)
    error = (packed - expected).abs().max().item()
    if not error <= _TOLERANCE.get(expected.dtype, _TOLERANCE_16) * expected.abs().max().item():
        raise ConfigError(
            f"packing is on, but {type(model).__name__} does not keep the examples of a pack "
            f"apart: its logits differ by {error:.2g} from those of each alone: turn it off"
        )


def log_packing(sampler: Sampler) -> None:
    """Say how many packs there are and how full."""
    rows, capacity = sampler.rows_per_epoch, sampler.pack_to
    assert capacity is not None
    logger.info(
        "packing: %d examples in %d rows of %d tokens, %.1f %% full",
        len(sampler.lengths),
        rows,
        capacity,
        100 * sum(sampler.lengths) / (rows * capacity),
    )
