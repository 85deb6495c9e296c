"""NEFTune: noise on the embeddings of what is learned from.   arXiv:2310.05914"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank.data import Batch
from lowrank.errors import ConfigError
from lowrank.nn.lora_embedding import LoRAEmbedding
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.train.loss import BatchLoss


@contextlib.contextmanager
def neftune(model: nn.Module, batch_loss: BatchLoss, alpha: float | None) -> Iterator[BatchLoss]:
    """`batch_loss` with noise of U(-1, 1) * alpha / sqrt(L d) on the d values of each token.

    L is the length of the token's own example, whatever the batch is padded to. No alpha: no noise.
    """
    if alpha is None:
        yield batch_loss
        return
    lengths: Tensor | None = None

    def noisy(batch: Batch) -> Tensor:
        nonlocal lengths
        lengths = example_lengths(batch)
        try:
            return batch_loss(batch)
        finally:
            lengths = None

    def add_noise(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if lengths is None:
            return output
        largest = alpha / (lengths * output.shape[-1]).sqrt()  # [B, S]
        noise = torch.empty_like(output).uniform_(-1.0, 1.0)
        return output + noise * largest.unsqueeze(-1).to(output.dtype)

    hook = input_embedding(model).register_forward_hook(add_noise)
    try:
        yield noisy
    finally:
        hook.remove()


def input_embedding(model: nn.Module) -> nn.Module:
    """What turns token ids into vectors: the model says so, or it is its first embedding."""
    if callable(getattr(model, "get_input_embeddings", None)):
        return model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding | QuantEmbedding | LoRAEmbedding):
            return module
    raise ConfigError(
        f"neftune_noise_alpha needs an embedding; got a {type(model).__name__} without one: give "
        "it get_input_embeddings(), or leave neftune_noise_alpha out"
    )


def example_lengths(batch: Batch) -> Tensor:
    """The number of tokens of the example that each token is of, as floats: [B, S]."""
    if batch.position_ids is None:
        assert batch.attention_mask is not None
        return batch.attention_mask.sum(1, keepdim=True).expand(batch.input_ids.shape).float()
    # from 1 on; padding is at position 0, of length 1
    example = (batch.position_ids == 0).cumsum(1)
    counts = torch.zeros(len(example), int(example.max()) + 1, device=example.device)
    counts.scatter_add_(1, example, torch.ones_like(example, dtype=counts.dtype))
    return counts.gather(1, example)
