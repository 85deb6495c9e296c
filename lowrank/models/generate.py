"""Text from a model, token by token, over a key-value cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing
from typing import Any, overload

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DataError
from lowrank.models.cache import KVCache
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.sampling import Sampler, Sampling
from lowrank.models.tokenizer import Tokenizer
from lowrank.models.writing import Writing
from lowrank.surgery.rows import adapter_rows, rows_of

Messages = Sequence[Mapping[str, Any]]
GREEDY = Sampling()
_PIECE = 1024  # positions of a prompt that are read at once, where layers see a window
_END_OF_TURN = "<|im_end|>"  # ChatML's, in which messages are rendered where there is no template


@overload
def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: str | Messages, **options: Any
) -> str: ...
@overload
def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: list[str] | list[Messages], **options: Any
) -> list[str]: ...


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Messages | list[str] | list[Messages],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
) -> str | list[str]:
    """What the model writes after a text or in answer to messages, or after each of several.

    Temperature 0 takes the likeliest token each time; above it, tokens are drawn, as `Sampling`
    says. Writing ends at an end token of the model or of the tokenizer, or at the first of the
    `stop` strings, neither of which is part of what is returned; and where the positions end that
    the model was trained for. Several are written together, each as it would be alone.

    Raises DataError for what is no prompt, is empty, or is longer than the model's positions, and
    for messages to a model that has no chat template.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    prompts = _each(prompt)
    texts = [""] * len(prompts)
    for row, piece in _pieces(model, tokenizer, prompts, max_new_tokens, sampling, stop):
        texts[row] += piece
    return texts[0] if prompts[0] is prompt else texts


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """The text of `generate` for one prompt, piece by piece as the model writes it.

    A piece is whole characters, and no part of a stop string. The model is in eval mode until the
    last piece, or until the iterator is closed.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    prompts = _each(prompt)
    if prompts[0] is not prompt:
        raise DataError(
            f"prompt: expected one text, or messages, to stream; got {len(prompts)}; "
            "generate() takes several"
        )
    pieces = _pieces(model, tokenizer, prompts, max_new_tokens, sampling, stop)
    return (piece for _, piece in pieces)


@torch.inference_mode()
def generate_ids(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    ends: Set[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """The ids written after each prompt, up to and without the first of `ends`."""
    rooms = _rooms(model, prompts, max_new_tokens)
    _check_ends("ends", ends, model.config.vocab_size)
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    with closing(_steps(model, prompts, max(rooms), sampling, open_rows)) as steps:
        for step in steps:
            for row, token in step:
                if token not in ends:
                    written[row].append(token)
                if token in ends or len(written[row]) == rooms[row]:
                    open_rows.remove(row)
    return written


def _pieces(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    max_new_tokens: int,
    sampling: Sampling,
    stop: str | Sequence[str],
) -> Iterator[tuple[int, str]]:
    """(row, text) as it is written; what is wrong with the arguments is said before the first."""
    stop = _checked_stop(stop)
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    rooms = _rooms(model, ids, max_new_tokens)
    ends = {*model.config.eos_token_ids, tokenizer.eos_token_id} - {None}
    _check_ends("eos_token_id", ends, model.config.vocab_size)
    if tokenizer.chat_template is None and not isinstance(prompts[0], str):
        ends.add(tokenizer.backend.token_to_id(_END_OF_TURN))
    writings = [Writing(tokenizer, ends, stop, room) for room in rooms]

    def write() -> Iterator[tuple[int, str]]:
        was_training, open_rows = model.training, set(range(len(ids)))
        model.eval()  # no dropout while writing
        try:
            with closing(_steps(model, ids, max(rooms), sampling, open_rows)) as steps:
                for step in steps:
                    for row, token in step:
                        piece = writings[row].add(token)
                        if writings[row].ended:
                            open_rows.remove(row)
                        if piece:
                            yield row, piece
        finally:
            model.train(was_training)

    return write()


@torch.inference_mode()
def _steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    most: int,
    sampling: Sampling,
    open_rows: Set[int],
) -> Generator[list[tuple[int, int]]]:
    """(row, its next token) of each of the `open_rows`, again and again.

    Those that the caller takes out, after `most` tokens at the latest, leave the batch; where none
    are left it ends.
    """
    device, B, S = next(model.parameters()).device, len(prompts), max(map(len, prompts))
    starts = torch.tensor([[S - len(prompt)] for prompt in prompts], device=device)
    # on the left, so that every row's tokens end where writing begins
    ids = torch.tensor([[0] * (S - len(p)) + list(p) for p in prompts], device=device)
    columns, mask = torch.arange(S + most - 1, device=device), None
    if any(len(prompt) < S for prompt in prompts):
        mask = (columns >= starts).long()
    cache = KVCache(
        model.config, B, S + most - 1, dtype=model.body.norm.weight.dtype, device=device
    )
    sampler = Sampler(sampling, prompts, model.config.vocab_size, device)
    rows, adapters = list(range(B)), rows_of(model, B)
    with ExitStack() as narrowed:
        while True:
            for piece in pieces(ids, model.config):
                place = seen = None
                if mask is not None:
                    end = cache.length + piece.shape[1]
                    place = (columns[cache.length : end] - starts).clamp_(min=0)
                    seen = mask[:, :end]
                logits = model(piece, seen, place, logits_to_keep=1, cache=cache)[:, -1]
            chosen = sampler.choose(logits)
            yield [one for one in zip(rows, chosen.tolist(), strict=True) if one[0] in open_rows]
            ids = chosen[:, None]
            if len(open_rows) == len(rows):
                continue
            if not open_rows:
                return
            places = _closed_up([row in open_rows for row in rows])
            rows, ids, starts = [rows[i] for i in places], ids[places], starts[places]
            mask = None if mask is None else mask[places]
            cache.keep(places)
            sampler.keep(places)
            if adapters is not None:
                narrowed.close()
                narrowed.enter_context(adapter_rows(model, [adapters[row] for row in rows]))


def pieces(ids: Tensor, config: DecoderConfig) -> Sequence[Tensor]:
    """Of prompts [B, S], what is read at once: windows ask for a mask, [S, S] of all of them."""
    return ids.split(_PIECE, dim=1) if any(kind.window for kind in config.kinds) else (ids,)


def _closed_up(stays: list[bool]) -> list[int]:
    """The places of those that stay, the last of them where others leave: the fewest to move."""
    left = sum(stays)
    last = [i for i in range(left, len(stays)) if stays[i]]
    return [i if stays[i] else last.pop() for i in range(left)]


def _rooms(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens may be written after each prompt: the last needs no position of its own."""
    if not 1 <= max_new_tokens < 2**31:
        raise ConfigError(f"max_new_tokens: expected 1 to 2**31 - 1; got {max_new_tokens}")
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
    return [min(max_new_tokens, positions - len(prompt) + 1) for prompt in prompts]


def _check_ends(name: str, ends: Set[int], vocab_size: int) -> None:
    if beyond := [end for end in ends if not 0 <= end < vocab_size]:
        raise ConfigError(
            f"{name}: expected token ids below vocab_size={vocab_size}; got {beyond[0]}, which no "
            "text can end with: use the model's own tokenizer, or mend its configuration"
        )


def _each(prompt: Any) -> list[Any]:
    """The texts or conversations of a prompt, which may be one of them or several."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence) or not prompt:
        raise _no_prompt(prompt)
    return [prompt] if isinstance(prompt[0], Mapping) else list(prompt)


def _encode(tokenizer: Tokenizer, prompt: Any) -> list[int]:
    """The ids of a text; of messages, those of their one rendered text."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    if not (isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)):
        raise _no_prompt(prompt)
    if tokenizer.chat_template is None and tokenizer.backend.token_to_id(_END_OF_TURN) is None:
        raise DataError(
            "prompt: expected a chat model for messages; its tokenizer has no chat template, nor "
            "the tokens of ChatML: pass text, or set tokenizer.chat_template"
        )
    return tokenizer.encode(tokenizer.apply_chat_template(prompt, add_generation_prompt=True))


def _no_prompt(prompt: Any) -> DataError:
    got = "none" if prompt in ([], ()) else type(prompt).__name__
    return DataError(f"prompt: expected text, messages, or a list of either; got {got}")


def _checked_stop(stop: str | Sequence[str]) -> list[str]:
    strings = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in strings):
        raise ConfigError(f"stop: expected strings of at least one character; got {stop!r:.80}")
    return strings
