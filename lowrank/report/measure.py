"""`report`: schemes on a model, measured layer by layer, the model then being as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError
from lowrank.io.versions import processor, versions
from lowrank.quant.affine import Int4Affine
from lowrank.surgery.quantize import SKIP, names_to_skip

from . import perplexity
from .activations import capture
from .comparison import Comparison
from .result import Report
from .schemes import Schemes, resolve

# Formats of GGUF whose blocks are affine; what has been through one is kind to affine schemes.
AFFINE_FORMATS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
_WINDOW = 512  # tokens


def report(
    model: nn.Module | Mapping[str, Tensor],
    schemes: Schemes | None = None,
    *,
    inputs: Any = None,
    text: str | Sequence[int] | Tensor | None = None,
    tokenizer: Any = None,
    skip: Iterable[str] = SKIP,
    rows: int = 256,
    tokens: int = 4096,
    window: int | None = None,
    stride: int | None = None,
    speed: bool = True,
    seed: int = 0,
    name: str | None = None,
    quantized_before: str | None = None,
) -> Report:
    """Compare schemes on the linear layers of any model, or on tensors named *.weight.

    schemes: names as "nf4" or "nf4:block_size=128,double_quant=false", or {label: name or
        quantizer}; None: all that are registered or installed, by their defaults.
    inputs: what the model is called with (a tensor, a tuple, a mapping, or a list of such batches),
        for the output error on `rows` real activations of each layer. Default: the text's windows.
    text: a text and its `tokenizer`, or token ids, for the perplexity of a causal language model
        over its first `tokens` tokens, in windows of `window` (default: 512, or the model's
        positions if fewer) that begin every `stride` (default: `window`, side by side).
    skip: layers to leave out, by name or suffix; heads and routers.   speed: time each scheme too.
    seed: of the timed inputs, and of quantizers that draw random numbers.
    quantized_before: the format that the weights have been through, such as "Q4_1".

    Error is relative RMSE, ‖W - Q‖ / ‖W‖ in the Frobenius norm, for a layer or over all of them.
    Beside the model there is one dense weight at a time, the activations, the packed weights of one
    scheme where there is a text or `speed`, and for `speed` copies of up to 256 MB of weights. The
    model's modules, values and modes are the same afterwards, whatever happens. A scheme that fails
    is a row with its reason.
    Raises ConfigError, TargetError, DataError, and WeightError for a weight that is not finite.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise ConfigError(
            f"model: expected an nn.Module or a mapping of tensors; got {type(model).__name__}; "
            "lowrank.load_model reads a model, lowrank.open_weights its tensors"
        )
    quantizers, skip = resolve(schemes), names_to_skip(skip)
    window = _window(model, window)
    _check_numbers(rows=rows, tokens=tokens, window=window, stride=stride, seed=seed)
    if not isinstance(model, nn.Module) and (text is not None or inputs is not None):
        raise ConfigError("text, inputs: expected a model to run them through; got tensors alone")
    vocabulary = _of_config(model, "vocab_size")
    ids = None if text is None else perplexity.token_ids(text, tokenizer, tokens, vocabulary)
    comparison = Comparison(model, skip, seed, speed)
    spans: list[perplexity.Span] = []
    if ids is not None:
        ids = ids.to(comparison.device)
        spans = perplexity.windows(len(ids), window, stride or window)
        if inputs is None:
            inputs = [ids[None, start:stop] for start, _, stop in spans]
    with comparison.running(len(quantizers), len(spans)):
        if inputs is not None:
            comparison.activations = capture(model, comparison.linears, inputs, rows)
        loss = None if ids is None else comparison.loss(ids, spans)
        measured = [
            comparison.row(label, quantizer, ids, spans) for label, quantizer in quantizers.items()
        ]
    if quantized_before in AFFINE_FORMATS:
        affine = {label for label, q in quantizers.items() if isinstance(q, Int4Affine)}
        measured = [replace(row, favoured=row.scheme in affine) for row in measured]
    about = {
        "model": name or getattr(model, "name_or_path", None) or _kind(model),
        "layers": len(comparison.squares),
        "weights": comparison.count,
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "quantized_before": quantized_before,
        "options": {"skip": skip, "rows": rows, "seed": seed}
        | ({} if ids is None else {"window": window, "stride": stride or window}),
        "tokens": None if ids is None else len(ids),
        "predicted": sum(stop - first for _, first, stop in spans) or None,
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(comparison.device),
            "threads": torch.get_num_threads(),
            **versions(),
        },
    }
    return Report(about, measured, comparison.dense_bytes, loss)


def _check_numbers(rows: int, tokens: int, window: int, stride: int | None, seed: int) -> None:
    # type: True is an int, but no number of rows
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 2), ("window", window, 2)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name}: expected at least {least}; got {value!r}")
    if stride is not None and not (type(stride) is int and 1 <= stride <= window):
        raise ConfigError(f"stride: expected from 1 to the window of {window}; got {stride!r}")
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
        raise ConfigError(f"seed: expected a whole number of 64 bits; got {seed!r}")


def _window(model: object, given: int | None) -> int:
    most = _of_config(model, "max_position_embeddings")
    if most is None:
        return _WINDOW if given is None else given
    if type(given) is int and given > most:
        raise ConfigError(f"window: expected at most the model's {most} positions; got {given}")
    return min(_WINDOW, most) if given is None else given


def _of_config(model: object, name: str) -> int | None:
    """What the model's config, if it has one, says of itself."""
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None


def _kind(model: object) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else "weights alone"
