"""What a decoder holds, made of the tensors that files have for it: dense, quantized, or packed."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import DtypeError, FileFormatError, LowrankError, ShapeError, WeightError
from lowrank.io.pages import Reused, empty_bytes
from lowrank.io.quantized import QuantizedTensors, join, load_layer, quantized_twin
from lowrank.models.expert_files import Gathered
from lowrank.models.experts import Experts, Router
from lowrank.models.holders import Holder
from lowrank.models.named import Weights
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_experts import QuantExperts
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.quant_weight import QuantWeight
from lowrank.quant import Quantizer, Storage, bitsandbytes, quantizer_of


class Maker:
    """Reads the tensors of a holder, and makes of them what the model has there.

    What files hold `quantized` is taken as it is, holders in `to_quantize` are quantized, and
    everything else is in `dtype`. Errors name the `source`.
    """

    def __init__(
        self,
        weights: Weights,
        quantized: Mapping[str, QuantizedTensors],
        quantizer: Quantizer | None,
        to_quantize: Set[str],
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
        source: str | Path,
    ) -> None:
        self._weights, self._quantized, self._source = weights, quantized, source
        self._quantizer, self._to_quantize = quantizer, to_quantize
        self._dtype, self._compute_dtype = dtype, compute_dtype
        self._reused = Reused()
        self._gathered: dict[str, Gathered] = {}  # experts that are not all there yet

    def read(self, holder: Holder) -> dict[str, Tensor]:
        """Its tensors by leaf; a weight to quantize lies in memory that the next one reuses."""
        if (part := holder.packed(self._quantized)) is not None:
            names = self._quantized[part].names
            return {leaf: self._weights.read(join(part, leaf)) for leaf in names}
        tensors = {}
        for leaf, name in holder.files.items():
            # a bias stays, and so does what is dense, but for rows that are copied
            passes = isinstance(holder.module, Experts) or (
                holder.name in self._to_quantize and leaf == "weight"
            )
            empty = self._reused.empty if passes else empty_bytes
            tensor = tensors[leaf] = self._weights.read(name, empty)
            if not tensor.is_floating_point():
                raise FileFormatError(
                    f"{self._source}: {name}: expected floats; got {tensor.dtype}"
                )
        return tensors

    def make(
        self, holder: Holder, tensors: dict[str, Tensor]
    ) -> QuantWeight | nn.Parameter | dict[str, Tensor] | None:
        """The layer or weight, or tensors by leaf; None of experts before their last rows come."""
        name, module = holder.name, holder.module
        part, rows = holder.packed(self._quantized), None
        if part is not None and (part != name or isinstance(module, Router)):
            rows = self._stored(holder, tensors, part)
        if isinstance(module, Router) and rows is not None:
            tensors = {"weight": quantizer_of(rows).dequantize(rows, self._dtype)}
        if name in self._quantized and rows is None:
            return self._prequantized(holder, tensors)
        if isinstance(module, Experts):
            return self._with_rows(holder, next(iter(tensors.values())) if rows is None else rows)
        if name in self._to_quantize:
            return self._quantize(holder, tensors)
        return {leaf: tensor.to(self._dtype) for leaf, tensor in tensors.items()}

    def _stored(self, holder: Holder, tensors: Mapping[str, Tensor], part: str) -> Storage:
        """What a layer of bitsandbytes is that is a part of one of ours."""
        try:
            return bitsandbytes.read(tensors, f"{part}.", holder.shape)
        except LowrankError as error:
            raise type(error)(f"{self._source}: {error}") from error

    def _with_rows(
        self, holder: Holder, rows: Tensor | Storage
    ) -> nn.Parameter | QuantExperts | None:
        name = holder.name
        if name not in self._gathered:
            shape = tuple(holder.module.get_parameter(*holder.files).shape)
            by = self._quantizer if name in self._to_quantize else None
            self._gathered[name] = Gathered(shape, by, self._dtype, self._compute_dtype)
        try:
            layer = self._gathered[name].add(rows)
        except (WeightError, DtypeError, ShapeError) as error:
            raise type(error)(f"{name}: {error}") from error
        if layer is not None:
            del self._gathered[name]
        return layer

    def _quantize(self, holder: Holder, tensors: Mapping[str, Tensor]) -> QuantWeight:
        name, module, quantizer = holder.name, holder.module, self._quantizer
        assert quantizer is not None
        try:
            # from the file's own precision; `dtype` is what it would be, were it dequantized
            storage = replace(quantizer.quantize(tensors["weight"]), dtype=self._dtype)
        except (WeightError, DtypeError) as error:
            raise type(error)(f"{name}.{error}") from error
        if isinstance(module, nn.Embedding):
            return QuantEmbedding.from_storage(storage, quantizer)
        bias = nn.Parameter(tensors["bias"].to(self._dtype)) if "bias" in tensors else None
        return QuantLinear.from_storage(storage, quantizer, bias, self._compute_dtype)

    def _prequantized(self, holder: Holder, tensors: dict[str, Tensor]) -> QuantWeight:
        """The layer that the files hold quantized, its codes and scales as they are."""
        module = holder.module
        if isinstance(module, Experts):
            layer = QuantExperts(module.get_parameter(*holder.files))
        else:
            layer = quantized_twin(module, holder.name, self._source)
        if "bias" in tensors:
            tensors["bias"] = tensors["bias"].to(self._dtype)
        load_layer(layer, tensors, self._source, holder.name)
        layer.storage = replace(layer.storage, dtype=self._dtype)
        if isinstance(layer, QuantLinear | QuantExperts):
            layer.compute_dtype = self._compute_dtype
        return layer
