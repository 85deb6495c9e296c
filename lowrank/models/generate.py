"""Text from a model, token by token, over a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DataError
from lowrank.models.attention import KVCache
from lowrank.models.decoder import Decoder
from lowrank.models.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@overload
def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: str | Messages, **options: Any
) -> str: ...
@overload
def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: list[str], **options: Any
) -> list[str]: ...


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | list[str] | Messages,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
) -> str | list[str]:
    """What the model writes after a text, after each of a list of texts, or in answer to messages.

    Temperature 0 takes the likeliest token each time; above it, tokens are drawn from
    softmax(logits / temperature), cut to the `top_k` likeliest and then to the fewest that together
    have `top_p`. Writing ends at an end token of the model or of the tokenizer, which is left out.
    """
    prompts = _encode(tokenizer, prompt)
    ends = set(model.config.eos_token_ids)
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    was_training = model.training
    model.eval()  # no dropout while writing
    try:
        written = generate_ids(
            model,
            prompts,
            max_new_tokens,
            ends=ends,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
    finally:
        model.train(was_training)
    texts = [tokenizer.decode(ids) for ids in written]
    return texts if not isinstance(prompt, str) and isinstance(prompt[0], str) else texts[0]


@torch.inference_mode()
def generate_ids(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    ends: set[int] | frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """The ids written after each prompt, up to and without the first of `ends`."""
    _check(max_new_tokens, temperature, top_p, top_k, seed)
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {i}: expected at least one token; got none")
        if len(prompt) > positions:
            raise DataError(
                f"prompt {i}: expected at most max_position_embeddings={positions} tokens, which "
                f"the model was trained for; got {len(prompt)}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise DataError(
                f"prompt {i}: expected token ids below the model's vocab_size={vocab_size}; "
                f"got {min(prompt)} to {max(prompt)}: use the model's own tokenizer"
            )
    device = next(model.parameters()).device
    ids, mask = _left_padded(prompts, device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    B, S = ids.shape
    dtype = model.model.norm.weight.dtype
    cache = KVCache(model.config, B, S + max_new_tokens, dtype=dtype, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(B))
    for _ in range(max_new_tokens):
        logits = model(ids, mask, logits_to_keep=1, cache=cache)[:, -1].float()
        chosen = _choose(logits, temperature, top_p, top_k, generator)
        for row, token in enumerate(chosen.tolist()):
            if row in open_rows and token in ends:
                open_rows.discard(row)
            elif row in open_rows:
                written[row].append(token)
        if not open_rows:
            break
        ids = chosen[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)
    return written


def _encode(tokenizer: Tokenizer, prompt: Any) -> list[list[int]]:
    """The ids of each text; of messages, those of their one rendered text."""
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt, add_special_tokens=True)]
    if not isinstance(prompt, Sequence):
        raise DataError(f"prompt: expected text, texts or messages; got {type(prompt).__name__}")
    if prompt and all(isinstance(text, str) for text in prompt):
        return [tokenizer.encode(text, add_special_tokens=True) for text in prompt]
    if prompt and all(isinstance(message, Mapping) for message in prompt):
        return [tokenizer.encode(tokenizer.apply_chat_template(prompt, add_generation_prompt=True))]
    raise DataError(f"prompt: expected text, texts or messages; got {type(prompt).__name__}")


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """ids [B, S] and, unless all are as long, mask [B, S]; tokens end where writing begins."""
    S = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (S - len(p)) + list(p) for p in prompts], device=device)
    if all(len(prompt) == S for prompt in prompts):
        return ids, None
    starts = torch.tensor([[S - len(prompt)] for prompt in prompts], device=device)
    return ids, (torch.arange(S, device=device) >= starts).long()


def _choose(
    logits: Tensor,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token for each row of logits [B, V]: [B]."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    # the largest is 0, so that none overflows however low the temperature
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probs.sort(descending=True)
        # a token stays if those before it have not reached top_p; so the first always does
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _check(
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
) -> None:
    if not 1 <= max_new_tokens < 2**31:
        raise ConfigError(f"max_new_tokens: expected 1 to 2**31 - 1; got {max_new_tokens}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed: expected a whole number of 64 bits; got {seed}")
    if not temperature >= 0:
        raise ConfigError(f"temperature: expected at least 0; got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: expected above 0 and at most 1; got {top_p}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: expected at least 1; got {top_k}")
