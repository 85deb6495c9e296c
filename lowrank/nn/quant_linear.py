"""A linear layer whose frozen weight is quantized, by whichever quantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank import quant
from lowrank.errors import ConfigError, DtypeError, FileFormatError, ShapeError, WeightError
from lowrank.nn.autocast import linear_dtype
from lowrank.quant import Quantizer, Storage, bitsandbytes

# A float kept as integer bits: `.to(bf16)`, autocast and mixed precision then leave it alone.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantLinear(nn.Module):
    """y = x Wᵀ + b with W [N = out_features, K = in_features] held in a quantizer's own tensors.

    Each tensor of the Storage is a frozen integer parameter under its own name (floats as their
    bits), so `.to(dtype)` cannot corrupt it, FSDP shards it, DDP does not broadcast it, and
    safetensors stores it; `model.requires_grad_(True)` raises rather than training codes.

    x is cast to `compute_dtype` (default: its own dtype, or autocast's) and y is returned in the
    dtype that nn.Linear would return. A fresh layer is initialised as nn.Linear is; with
    device="meta" nothing is allocated, and a loader fills it.

    `load_state_dict` takes, besides these parameters, a plain float `weight` [N, K], which it
    quantizes, and bitsandbytes' 4-bit keys. The latter are exact: the layer then holds them as they
    are, so its scheme, block size and quantizer become the file's, and double-quantized scales
    become the plain float32 ones that they stand for.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quantizer: str | Quantizer = "nf4",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._describe(in_features, out_features, quantizer, compute_dtype)
        bound = 1 / math.sqrt(in_features)
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype).uniform_(
            -bound, bound
        )
        self.storage = self.quantizer.quantize(weight)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(weight.new_empty(out_features).uniform_(-bound, bound))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quantizer: str | Quantizer, compute_dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """The layer with `linear`'s weight quantized and its very bias parameter."""
        quantizer = _resolve(quantizer)
        layer = cls.from_storage(
            quantizer.quantize(linear.weight), quantizer, linear.bias, compute_dtype
        )
        return layer.train(linear.training)

    @classmethod
    def from_storage(
        cls,
        storage: Storage,
        quantizer: str | Quantizer,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """The layer that holds an already quantized weight [N, K] and `bias` [N]."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        N, K = storage.shape
        if bias is not None and bias.shape != (N,):
            raise ShapeError(f"bias: expected [N={N}]; got {list(bias.shape)}")
        layer._describe(K, N, quantizer, compute_dtype)
        layer.storage = storage
        layer.bias = bias
        return layer

    def _describe(self, in_features, out_features, quantizer, compute_dtype) -> None:
        if in_features < 1 or out_features < 1:
            raise ShapeError(
                f"in_features, out_features: expected at least 1; got {in_features}, {out_features}"
            )
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise DtypeError(f"compute_dtype: expected a floating-point dtype; got {compute_dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.quantizer = _resolve(quantizer)
        self.compute_dtype = compute_dtype
        self._tensor_dtypes: dict[str, torch.dtype] = {}

    @property
    def storage(self) -> Storage:
        """The quantized weight: the parameters viewed in the dtypes the quantizer computes with."""
        parameters = self._parameters
        tensors = {
            name: parameters[name].view(dtype) for name, dtype in self._tensor_dtypes.items()
        }
        return Storage(
            self._scheme,
            (self.out_features, self.in_features),
            self.weight_dtype,
            tensors,
            self._options,
        )

    @storage.setter
    def storage(self, storage: Storage) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(storage.shape) != expected:
            raise ShapeError(
                f"storage: expected a weight of shape {list(expected)}; got {list(storage.shape)}"
            )
        for name in storage.tensors.keys() - self._tensor_dtypes.keys():
            if name in ("weight", "bias") or hasattr(self, name):
                raise ConfigError(
                    "storage: expected tensors not named weight or bias, nor as an attribute of a "
                    f"module is; got {name!r}; choose another name"
                )
        for name in self._tensor_dtypes:
            del self._parameters[name]
        self._tensor_dtypes = {name: tensor.dtype for name, tensor in storage.tensors.items()}
        self._scheme, self._options = storage.scheme, dict(storage.options)
        self.weight_dtype = storage.dtype
        for name, tensor in storage.tensors.items():
            self.register_parameter(name, nn.Parameter(_as_bits(tensor), requires_grad=False))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the layer multiplies by."""
        return self.quantizer.dequantize(self.storage, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(f"x: expected [..., K={self.in_features}]; got {list(x.shape)}")
        out_dtype = linear_dtype(x)
        compute_dtype = self.compute_dtype or out_dtype
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        return quant.linear(self.quantizer, x.to(compute_dtype), self.storage, bias).to(out_dtype)

    def extra_repr(self) -> str:
        storage = self.storage
        options = "".join(f", {key}={value}" for key, value in storage.options.items())
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quantizer={storage.scheme}{options}, "
            f"{storage.bits_per_parameter:.2f} bits/weight{compute}"
        )

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        own = {
            key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)
        }
        if "weight" in own:
            if any(name in own for name in self._tensor_dtypes):
                raise FileFormatError(
                    f"{prefix}weight: expected it or the quantized tensors; got both"
                )
            if bitsandbytes.is_layer(own):
                self._take_bitsandbytes(own, prefix)
                loaded = {key: value for key, value in own.items() if key.split(".")[0] != "weight"}
                loaded.update((name, self._parameters[name]) for name in self._tensor_dtypes)
            else:
                storage = self._quantize(own.pop("weight"), prefix)
                self.weight_dtype = storage.dtype
                loaded = own | {name: _as_bits(tensor) for name, tensor in storage.tensors.items()}
        else:
            loaded = own
        self._check_tensors(loaded, prefix)
        super()._load_from_state_dict(
            {prefix + key: value for key, value in loaded.items()}, prefix, *rest
        )

    def _quantize(self, weight: Tensor, prefix: str) -> Storage:
        expected = [self.out_features, self.in_features]
        if list(weight.shape) != expected:
            raise ShapeError(f"{prefix}weight: expected {expected}; got {list(weight.shape)}")
        try:
            return self.quantizer.quantize(weight)
        except (WeightError, DtypeError) as error:
            raise type(error)(f"{prefix}{error}") from error

    def _take_bitsandbytes(self, own: Mapping[str, Tensor], prefix: str) -> None:
        storage = bitsandbytes.read(own, prefix)
        expected = [self.out_features, self.in_features]
        if list(storage.shape) != expected:
            raise ShapeError(
                f"{prefix}weight: expected a weight of {expected}; got {list(storage.shape)}"
            )
        device = next(iter(self.storage.tensors.values())).device
        if device.type != "meta":
            moved = {name: tensor.to(device, copy=True) for name, tensor in storage.tensors.items()}
            storage = Storage(storage.scheme, storage.shape, storage.dtype, moved, storage.options)
        self.storage = storage
        self.quantizer = bitsandbytes.quantizer(storage)

    def _check_tensors(self, loaded: Mapping[str, Tensor], prefix: str) -> None:
        # copy_ would convert: other bits under the right name and shape are refused
        for name in self._tensor_dtypes:
            tensor, expected = loaded.get(name), self._parameters[name]
            if tensor is None:
                continue
            if tensor.dtype != expected.dtype:
                raise DtypeError(
                    f"{prefix}{name}: expected {expected.dtype} for {self._scheme}, "
                    f"{self._options}; got {tensor.dtype}; "
                    "make the layer with the options of the file"
                )
            if tensor.shape != expected.shape:
                raise ShapeError(
                    f"{prefix}{name}: expected {list(expected.shape)} for {self._scheme}, "
                    f"{self._options}; got {list(tensor.shape)}; "
                    "make the layer with the options of the file"
                )


def _resolve(quantizer: str | Quantizer) -> Quantizer:
    if isinstance(quantizer, str):
        return quant.get(quantizer)
    if not isinstance(quantizer, Quantizer):
        raise ConfigError(
            f"quantizer: expected a name or an object with quantize, dequantize; got {quantizer!r}"
        )
    return quantizer


def _as_bits(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.detach().view(_BITS[tensor.element_size()])
    return tensor.detach()
