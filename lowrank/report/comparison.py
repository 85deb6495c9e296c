"""The weights of a model or a file, and what is measured on them for each scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, ShapeError, WeightError
from lowrank.nn.quant_linear import QuantLinear
from lowrank.progress import bar
from lowrank.quant import Quantizer, Storage
from lowrank.quant.blocks import panels

from . import speed
from .activations import evaluating
from .perplexity import Span, loss_per_token, swapped
from .result import Layer, Row
from .weights import linears_of, matrix_of, squares, weights_of

_TIMED_BYTES = 1 << 28  # of dense weights among which the speed is measured


class Comparison:
    """The weights, and what is measured on them for each scheme."""

    def __init__(
        self, model: nn.Module | Mapping[str, Tensor], skip: list[str], seed: int, timed: bool
    ) -> None:
        self.model, self.seed, self.timed = model, seed, timed
        self.linears: dict[str, nn.Module] = {}
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
        shown = bar("comparing", total=schemes * (len(self.squares) + windows) + windows)
        if shown is not None:
            self._tick = shown.update
        try:
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                if isinstance(self.model, nn.Module):
                    with evaluating(self.model):
                        yield
                else:
                    yield
        finally:
            if shown is not None:
                shown.close()

    def loss(self, ids: Tensor, spans: list[Span]) -> float:
        """The text's loss per token by the model as it stands."""
        return loss_per_token(self.model, ids, spans, self._tick)

    def row(
        self, label: str, quantizer: Quantizer | ConfigError, ids: Tensor | None, spans: list[Span]
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
    def _measure(
        self, label: str, quantizer: Quantizer, ids: Tensor | None, spans: list[Span]
    ) -> Row:
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
            weights = [
                self._weight(name).clone(memory_format=torch.contiguous_format) for name in timed
            ]
            generator = torch.Generator().manual_seed(self.seed)
            kept = [storages[name] for name in timed]
            row = replace(row, speed=speed.measure(quantizer, weights, kept, generator))
        if ids is not None:
            new: dict[nn.Module, nn.Module] = {
                linear: QuantLinear.from_storage(storages[name], quantizer, linear.bias).eval()
                for name, linear in self.linears.items()
            }
            with swapped(self.model, new):
                row = replace(row, loss=self.loss(ids, spans))
        return row

    def _layer(self, name: str, quantizer: Quantizer) -> tuple[Storage, Layer]:
        weight, x = self._weight(name), self.activations.get(name)
        N, K = weight.shape
        storage = quantizer.quantize(self._copy(name))
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
            return matrix_of(self.linears[name])
        return self.model[self._keys[name]].detach()

    def _copy(self, name: str) -> Tensor:
        """A dense copy, for quantizers that may write into it."""
        return self._weight(name).clone(memory_format=torch.contiguous_format)

    def _timed_layers(self) -> list[str]:
        """Layers of the shape that holds most of the weights, up to some bytes of them."""
        sizes: dict[tuple[int, ...], int] = {}
        for shape in self._shapes.values():
            sizes[shape] = sizes.get(shape, 0) + math.prod(shape)
        most = max(sizes, key=sizes.__getitem__)
        named = [name for name, shape in self._shapes.items() if shape == most]
        return named[: max(1, _TIMED_BYTES // (math.prod(most) * self.dtype.itemsize))]


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words or type(error).__name__
