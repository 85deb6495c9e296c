"""Whether the processes that train together are to do the same, to the same model."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank.errors import ConfigError
from lowrank.train.config import TrainConfig
from lowrank.train.distributed import Ranks
from lowrank.train.identity import in_words, untrained_hash

# settings that may differ between processes that train together
_OF_A_RANK = {"device_budget", "host_budget", "page_dir", "token_cache", "disable_tqdm"}


def check_alike(
    ranks: Ranks, rows: int, outline: dict[str, Any], model: nn.Module, config: TrainConfig
) -> None:
    """ConfigError if there are more ranks than rows in an epoch, or if not all are to do the same.

    What tensors hold is for `check_weights`: ranks whose tensors are not alike cannot compare it.
    """
    if rows < ranks.size:
        raise ConfigError(
            f"{ranks.size} processes are to share the training data, and each needs a row of "
            f"it; got {rows}: start no more processes than that"
        )
    contents = {
        "training data": outline["data"]["training"],
        "held-out data": outline["data"]["held out"],
    }
    settings = {name: v for name, v in config.to_dict().items() if name not in _OF_A_RANK}
    adapters = {
        f"{name} of {kind}": value
        for kind in outline
        if kind.startswith("adapter ")
        for name, value in outline[kind].items()
    }
    tensors = {name: in_words(p) for name, p in model.named_parameters()}
    ranks.check_same({**settings, **adapters, **tensors}, contents)


def check_weights(ranks: Ranks, identity: dict[str, Any], model: nn.Module) -> None:
    """ConfigError if what is frozen is not the same on all ranks.

    Of weights in parts all compute the hashes together, that of the `identity` too: in time for a
    checkpoint, which the first writes alone.
    """
    hashes = identity["model"]["frozen weights"], untrained_hash(model)
    ranks.check_same({}, {"frozen weights": hashes})
