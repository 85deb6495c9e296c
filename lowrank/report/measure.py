"""Measure schemes on a model: layer by layer, scheme after scheme; the model is then as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, ShapeError, WeightError
from lowrank.io.versions import processor, versions
from lowrank.nn.quant_linear import QuantLinear
from lowrank.quant import Quantizer, Storage
from lowrank.quant.affine import Int4Affine
from lowrank.quant.blocks import panels

from . import perplexity, speed
from .activations import capture, evaluating
from .result import Layer, Report, Row
from .schemes import Schemes, resolve
from .weights import linears_of, squares, weights_of

# Formats of GGUF whose blocks are affine; what has been through one is kind to affine schemes.
AFFINE_FORMATS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
_TIMED_BYTES = 1 << 28  # of dense weights among which the speed is measured
_WINDOW = 512  # tokens
_QUIET_SECONDS = 2.0  # a comparison that takes less shows no progress bar


def report(
    model: nn.Module | Mapping[str, Tensor],
    schemes: Schemes | None = None,
    *,
    inputs: Any = None,
    text: str | Sequence[int] | Tensor | None = None,
    tokenizer: Any = None,
    skip: Iterable[str] = ("lm_head",),
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
    skip: layers to leave out, by name or suffix.   speed: time each scheme too.
    seed: of the timed inputs, and of quantizers that draw random numbers.
    quantized_before: the format that the weights have been through, such as "Q4_1".

    Error is relative RMSE, ‖W - Q‖ / ‖W‖ in the Frobenius norm, for a layer or over all of them.
    Beside the model there is one dense weight at a time, the scheme's packed weights where there
    is a text or `speed`, and the activations. The model's modules, values and modes are the same
    afterwards, whatever happens. A scheme that fails is a row with its reason.
    Raises ConfigError, TargetError, DataError, and WeightError for a weight that is not finite.
    """
    quantizers = resolve(schemes)
    window = _window(model, window)
    _check_numbers(rows=rows, tokens=tokens, window=window, stride=stride)
    if not isinstance(model, nn.Module) and (text is not None or inputs is not None):
        raise ConfigError("text, inputs: expected a model to run them through; got tensors alone")
    ids = None if text is None else perplexity.token_ids(text, tokenizer, tokens)
    comparison = _Comparison(model, skip, seed, speed)
    spans = []
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
        "model": name or getattr(model, "name_or_path", None) or type(model).__name__,
        "layers": len(comparison.squares),
        "weights": comparison.count,
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "quantized_before": quantized_before,
        "options": {"skip": list(skip), "rows": rows, "seed": seed}
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


class _Comparison:
    """The weights, and what is measured on them for each scheme."""

    def __init__(
        self, model: nn.Module | Mapping[str, Tensor], skip: Iterable[str], seed: int, timed: bool
    ) -> None:
        self.model, self.seed, self.timed = model, seed, timed
        self.linears: dict[str, nn.Linear] = {}
        self.activations: dict[str, Tensor] = {}
        if isinstance(model, nn.Module):
            self.linears = linears_of(model, skip)
            self._keys = dict.fromkeys(self.linears)
        else:
            self._keys = weights_of(model, skip)
        self.squares: dict[str, float] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.count = self.dense_bytes = 0
        for name in self._keys:
            weight = self._weight(name)
            self.squares[name] = squares(name, weight)
            self._shapes[name] = tuple(weight.shape)
            self.count += weight.numel()
            self.dense_bytes += weight.numel() * weight.element_size()
        self.device, self.dtype = weight.device, weight.dtype
        self._tick: Callable[[], object] = lambda: None

    @contextmanager
    def running(self, schemes: int, windows: int) -> Iterator[None]:
        """Eval mode, a progress bar, and the global random numbers put back."""
        bar = _bar(schemes * (len(self.squares) + windows) + windows)
        if bar is not None:
            self._tick = bar.update
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                if isinstance(self.model, nn.Module):
                    with evaluating(self.model):
                        yield
                else:
                    yield
        finally:
            if bar is not None:
                bar.close()

    def loss(self, ids: Tensor, spans: list) -> float:
        """The text's loss per token by the model as it stands."""
        return perplexity.loss_per_token(self.model, ids, spans, self._tick)

    def row(
        self, label: str, quantizer: Quantizer | ConfigError, ids: Tensor | None, spans: list
    ) -> Row:
        """A scheme's row; its failure, if it fails."""
        if isinstance(quantizer, ConfigError):
            return Row(label, failure=_one_line(quantizer))
        torch.manual_seed(self.seed)
        try:
            return self._measure(label, quantizer, ids, spans)
        except Exception as error:  # whatever somebody else's quantizer raises
            return Row(label, failure=_one_line(error))

    @torch.no_grad()
    def _measure(self, label: str, quantizer: Quantizer, ids: Tensor | None, spans: list) -> Row:
        timed = self._timed_layers() if self.timed else []
        storages: dict[str, Storage] = {}
        layers = {}
        for name in self._keys:
            try:
                storage, layers[name] = self._layer(name, quantizer)
            except Exception as error:
                raise WeightError(f"{name}: {_one_line(error)}") from error
            if ids is not None or name in timed:
                storages[name] = storage
            self._tick()
        row = Row(label, dict(storage.options), layers, fused=hasattr(quantizer, "linear"))
        if timed:
            weights = [self._weight(name) for name in timed]
            generator = torch.Generator().manual_seed(self.seed)
            kept = [storages[name] for name in timed]
            row = replace(row, speed=speed.measure(quantizer, weights, kept, generator))
        if ids is not None:
            new: dict[nn.Module, nn.Module] = {
                linear: QuantLinear.from_storage(storages[name], quantizer, linear.bias).eval()
                for name, linear in self.linears.items()
            }
            with perplexity.swapped(self.model, new):
                row = replace(row, loss=self.loss(ids, spans))
        return row

    def _layer(self, name: str, quantizer: Quantizer) -> tuple[Storage, Layer]:
        weight, x = self._weight(name), self.activations.get(name)
        N, K = weight.shape
        storage = quantizer.quantize(weight.clone())  # a stranger's may write into it
        restored = quantizer.dequantize(storage, torch.float32)
        if restored.shape != weight.shape:
            raise ShapeError(f"expected weights of {[N, K]} back; got {list(restored.shape)}")
        error = output = output_error = 0.0
        for start, stop in panels(N, K, weight.device):
            w = weight[start:stop].float()
            difference = restored[start:stop].float() - w
            error += float(difference.double().square().sum())
            if x is not None:
                output += float((x.float() @ w.T).double().square().sum())
                output_error += float((x.float() @ difference.T).double().square().sum())
        if not math.isfinite(error):
            raise WeightError("expected finite weights back; got NaN or inf")
        ratio = math.sqrt(output_error / output) if output else None
        layer = Layer(weight.numel(), self.squares[name], error, storage.nbytes, ratio)
        return storage, layer

    def _weight(self, name: str) -> Tensor:
        if self.linears:
            return self.linears[name].weight.detach()
        return self.model[self._keys[name]].detach()

    def _timed_layers(self) -> list[str]:
        """Layers of the shape that holds most of the weights, up to some bytes of them."""
        sizes: dict[tuple[int, ...], int] = {}
        for shape in self._shapes.values():
            sizes[shape] = sizes.get(shape, 0) + math.prod(shape)
        most = max(sizes, key=sizes.__getitem__)
        named = [name for name, shape in self._shapes.items() if shape == most]
        return named[: max(1, _TIMED_BYTES // (math.prod(most) * self.dtype.itemsize))]


def _check_numbers(rows: int, tokens: int, window: int, stride: int | None) -> None:
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 2), ("window", window, 2)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: expected at least {least}; got {value!r}")
    if stride is not None and not (isinstance(stride, int) and 1 <= stride <= window):
        raise ConfigError(f"stride: expected from 1 to the window of {window}; got {stride!r}")


def _window(model: object, given: int | None) -> int:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int):
        return _WINDOW if given is None else given
    if given is not None and given > most:
        raise ConfigError(f"window: expected at most the model's {most} positions; got {given}")
    return min(_WINDOW, most) if given is None else given


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words or type(error).__name__


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # disable=None: only on a terminal
    return tqdm(total=total, desc="comparing", delay=_QUIET_SECONDS, leave=False, disable=None)
