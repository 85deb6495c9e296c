"""Tiny random models in the formats that others write."""

from __future__ import annotations

import torch

TINY = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.1,
)


def llama(**changes) -> torch.nn.Module:
    """transformers' model, random, biases and norms included."""
    import transformers

    config = transformers.LlamaConfig(**{**TINY, **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def tokens(B: int, S: int, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, (B, S))


@torch.no_grad()
def assert_same_greedy(model: torch.nn.Module, prompt: list[int], one: list, other: list) -> None:
    """Both go on alike after the prompt, till rounding alone tells the two largest logits apart."""
    for n, pair in enumerate(zip(one, other, strict=False)):
        if len({*pair}) > 1:
            logits = model(torch.tensor([prompt + one[:n]]))
            last = getattr(logits, "logits", logits)[0, -1]
            assert last.max() - last[list(pair)].min() < 1e-5, n
            return
    assert len(one) == len(other)
