"""PEFT over a tiny random Llama, the oracle of the adapter tests."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="needs peft, the oracle: pip install peft")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install transformers"
)


def tiny_llama(attention_bias: bool = False, layers: int = 2) -> nn.Module:
    """A Llama with random weights: hidden 24, two heads, intermediate 40, 48 words."""
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=attention_bias,
        initializer_range=0.15,  # so that attention is not uniform
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def spread_singular_values_(weight: torch.Tensor) -> None:
    """Each singular value is 0.9 of the one before: near ones mix their vectors in float32."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    weight.copy_(U * S[0] * 0.9 ** torch.arange(len(S)) @ Vh)


def peft_model(model: nn.Module, adapter: str = "default", **options) -> nn.Module:
    """A copy of the model under PEFT, with an adapter of these LoraConfig options."""
    with quiet():
        return peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(**options), adapter_name=adapter
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Lets pass what peft and transformers warn each other of: names that the other will drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def words(generator: torch.Generator, batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(48, (batch, length), generator=generator)
