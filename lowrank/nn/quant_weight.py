"""A frozen weight held in a quantizer's own tensors: what every quantized module is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank import quant
from lowrank.errors import ConfigError, DtypeError, FileFormatError, ShapeError, WeightError
from lowrank.ops.checks import check_tensors
from lowrank.quant import Quantizer, Storage, bitsandbytes, checks
from lowrank.quant.description import Description, as_bits, read_description

_DESCRIPTION = "_extra_state"  # torch's own key for what get_extra_state returns


class QuantWeight(nn.Module):
    """A weight of `shape` [N, K] that `quantizer` reads.

    Each tensor of the Storage is a frozen integer parameter under its own name (floats as their
    bits), so `.to(dtype)` cannot corrupt it, FSDP shards it, DDP does not broadcast it, and
    safetensors stores it. `model.requires_grad_(True)` ends at the first of them in a RuntimeError:
    torch asks each parameter, no module, so the words are torch's. `dtype` is what a plain weight
    in its place would have, which `.to(dtype)` changes; `weight_dtype` is what it had before
    quantization.

    A state dict also has `_extra_state`, which describes the tensors: scheme, options, shape, dtype
    and a version. `load_state_dict` takes

    - such a state dict. The module becomes what it describes, another scheme or other options than
      it was made with included; a scheme that is not known, or a newer version, is refused;
    - a plain float `weight` [N, K], which is quantized;
    - bitsandbytes' keys of 4 bits and of int8, exactly (`quant.bitsandbytes.read`): the scheme,
      block size and quantizer of the module become the file's.
    """

    def __init__(self, storage: Storage, quantizer: str | Quantizer) -> None:
        super().__init__()
        self.matrix_shape = tuple(checks.storage(storage).shape)
        self._tensor_dtypes: dict[str, torch.dtype] = {}
        self._set(storage, resolve(quantizer))

    @property
    def storage(self) -> Storage:
        """The quantized weight: the parameters viewed in the dtypes the quantizer computes with.

        One of another scheme, or with other options, may be set: the quantizer is then its own.
        """
        parameters = self._parameters
        tensors = {}
        for name, dtype in self._tensor_dtypes.items():
            bits = parameters[name]
            tensors[name] = bits if bits.dtype == dtype else bits.view(dtype)
        return Storage(self._scheme, self.matrix_shape, self.weight_dtype, tensors, self._options)

    @storage.setter
    def storage(self, storage: Storage) -> None:
        self._set(storage)

    def _set(self, storage: Storage, quantizer: Quantizer | None = None) -> None:
        if tuple(checks.storage(storage).shape) != self.matrix_shape:
            raise ShapeError(
                f"storage: expected a weight of shape {list(self.matrix_shape)}; "
                f"got {list(storage.shape)}"
            )
        for name in storage.tensors.keys() - self._tensor_dtypes.keys():
            if name in ("weight", "bias") or hasattr(self, name):
                raise ConfigError(
                    "storage: expected tensors not named weight or bias, nor as an attribute of a "
                    f"module is; got {name!r}; choose another name"
                )
        if quantizer is None:
            same = (storage.scheme, dict(storage.options)) == (self._scheme, self._options)
            quantizer = self.quantizer if same else quant.quantizer_of(storage)
        self.quantizer = quantizer
        for name in self._tensor_dtypes:
            del self._parameters[name]
        self._tensor_dtypes = {name: tensor.dtype for name, tensor in storage.tensors.items()}
        self._scheme, self._options = storage.scheme, dict(storage.options)
        self.weight_dtype = self.dtype = storage.dtype
        for name, tensor in storage.tensors.items():
            self.register_parameter(name, nn.Parameter(as_bits(tensor), requires_grad=False))

    def refill(self, storage: Storage) -> None:
        """Hold another weight of the same quantizer, in the memory of the one that is held.

        That is, where tensors of the same kinds allow; among those of a whole model, new ones would
        scatter the memory that making them has freed. The dtypes of the layer stay as they are.
        """
        held, dtype = self.storage, self.dtype
        kinds = [{n: (t.dtype, t.shape) for n, t in s.tensors.items()} for s in (held, storage)]
        if kinds[0] == kinds[1] and storage.options == held.options:
            for name, tensor in storage.tensors.items():
                held[name].copy_(tensor)
        else:
            self._set(replace(storage, dtype=held.dtype), self.quantizer)
            self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, as `dequantize` gives it."""
        return self.matrix_shape

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of a plain `weight` in a state dict."""
        return self.shape

    def matrix(self, weight: Tensor) -> Tensor:
        """The [N, K] to quantize of a plain `weight`."""
        return weight

    def tie(self, other: QuantWeight) -> None:
        """Hold the very parameters of `other`, a weight of the same shape."""
        self._set(other.storage, other.quantizer)
        self.dtype = other.dtype
        for name in self._tensor_dtypes:
            self._parameters[name] = other._parameters[name]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the module computes with."""
        return self.quantizer.dequantize(self.storage, dtype)

    def read_bitsandbytes(self, tensors: Mapping[str, Tensor], name: str) -> Storage:
        """What the module becomes with these tensors of a layer; `name` is its prefix."""
        return bitsandbytes.read(tensors, name, self.matrix_shape)

    def extra_repr(self) -> str:
        storage = self.storage
        options = "".join(f", {key}={value}" for key, value in storage.options.items())
        return f"quantizer={storage.scheme}{options}, {storage.bits_per_parameter:.2f} bits/weight"

    def get_extra_state(self) -> Tensor:
        """The description that goes into the state dict, JSON as uint8."""
        return self._description().tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Called by torch when the tensors are loaded; all but the dtype is settled by then."""
        self.weight_dtype = read_description(state, _DESCRIPTION).dtype

    def _description(self) -> Description:
        return Description(
            self._scheme, self.matrix_shape, self.weight_dtype, self._tensor_dtypes, self._options
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantWeight:
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        dtype = self.dtype
        own = {
            key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)
        }
        for name in own.keys() & {"weight", _DESCRIPTION, *self._tensor_dtypes}:
            check_tensors(**{prefix + name: own[name]})
        is_bitsandbytes = bitsandbytes.is_layer(own)
        if "weight" in own or is_bitsandbytes:
            for name in (*self._tensor_dtypes, _DESCRIPTION):
                if name in own and not (is_bitsandbytes and bitsandbytes.is_key(name)):
                    raise FileFormatError(
                        f"{prefix}weight: expected it or the quantized tensors; got both"
                    )
            if is_bitsandbytes:
                loaded = {key: t for key, t in own.items() if not bitsandbytes.is_key(key)}
                storage = self.read_bitsandbytes(own, prefix)
                loaded |= self._take(storage, quant.quantizer_of(storage))
            else:
                loaded = own | self._fill(self._quantize(own.pop("weight"), prefix))
            loaded[_DESCRIPTION] = self.get_extra_state()
        elif _DESCRIPTION in own and not self._is_described_by(own, prefix):
            loaded = own | self._take(*self._read_described(own, prefix))
        else:
            loaded = own
        self._check_tensors(loaded, prefix)
        super()._load_from_state_dict(
            {prefix + key: value for key, value in loaded.items()}, prefix, local_metadata, *rest
        )
        assigned = local_metadata.get("assign_to_params_buffers", False)
        self.dtype = self.weight_dtype if assigned else dtype

    def _quantize(self, weight: Tensor, prefix: str) -> Storage:
        if tuple(weight.shape) != self.plain_shape:
            raise ShapeError(
                f"{prefix}weight: expected {list(self.plain_shape)}; got {list(weight.shape)}"
            )
        try:
            return self.quantizer.quantize(self.matrix(weight))
        except (WeightError, DtypeError) as error:
            raise type(error)(f"{prefix}{error}") from error

    def _is_described_by(self, own: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether the description is of tensors like this module's."""
        found, mine = (
            read_description(own[_DESCRIPTION], prefix + _DESCRIPTION),
            self._description(),
        )
        if found.shape != self.matrix_shape:
            raise ShapeError(
                f"{prefix}{_DESCRIPTION}: expected a weight of {list(self.matrix_shape)}; "
                f"got {list(found.shape)}"
            )
        return (found.scheme, found.options, found.dtypes) == (
            mine.scheme,
            mine.options,
            mine.dtypes,
        ) and all(own[n].shape == self._parameters[n].shape for n in mine.dtypes if n in own)

    def _read_described(self, own: Mapping[str, Tensor], prefix: str) -> tuple[Storage, Quantizer]:
        name = prefix + _DESCRIPTION
        storage = read_description(own[_DESCRIPTION], name).storage(own, prefix)
        try:
            quantizer = quant.quantizer_of(storage)
        except (ConfigError, ShapeError, DtypeError) as error:
            raise FileFormatError(f"{name}: {error}") from error
        fresh = quantizer.quantize(
            torch.empty(self.matrix_shape, dtype=storage.dtype, device="meta")
        )
        if fresh.options != storage.options:  # what a file had, and no quantizer makes
            return _readable(storage, quantizer, name), quantizer
        if fresh.tensors.keys() != storage.tensors.keys():
            raise FileFormatError(
                f"{name}: expected the tensors {', '.join(fresh.tensors)} for {storage.scheme}; "
                f"got {', '.join(storage.tensors)}"
            )
        for key, tensor in storage.tensors.items():
            _check(prefix + key, tensor, fresh[key], storage)
        return storage, quantizer

    def _fill(self, storage: Storage) -> dict[str, Tensor]:
        """What to load so that the parameters hold this Storage of the module's own quantizer."""
        if {name: t.dtype for name, t in storage.tensors.items()} != self._tensor_dtypes:
            return self._take(storage, self.quantizer)  # dense ones may have another dtype now
        self.weight_dtype = storage.dtype
        return {name: as_bits(tensor) for name, tensor in storage.tensors.items()}

    def _take(self, storage: Storage, quantizer: Quantizer) -> dict[str, Tensor]:
        """Become this Storage, copied to where the module is; returns the parameters."""
        device = next(iter(self.storage.tensors.values())).device
        tensors = dict(storage.tensors)
        if device.type != "meta":
            tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        self._set(replace(storage, tensors=tensors), quantizer)
        return {name: self._parameters[name] for name in self._tensor_dtypes}

    def _check_tensors(self, loaded: Mapping[str, Tensor], prefix: str) -> None:
        # copy_ would convert: other bits under the right name and shape are refused
        for name in self._tensor_dtypes:
            if name in loaded:
                _check(prefix + name, loaded[name], self._parameters[name], self._description())


def quant_weights(model: nn.Module) -> dict[str, QuantWeight]:
    """The quantized weights of a model by name; of those that share parameters, the first."""
    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, QuantWeight):
            held = {id(p) for p in module.parameters(recurse=False) if not p.is_floating_point()}
            if not held <= seen:
                found[name] = module
            seen |= held
    return found


def resolve(quantizer: str | Quantizer, what: str = "quantizer") -> Quantizer:
    """The quantizer of this name, or the object itself if it is one; `what` it is in an error."""
    if isinstance(quantizer, str):
        return quant.get(quantizer)
    if isinstance(quantizer, type) or not isinstance(quantizer, Quantizer):
        raise ConfigError(
            f"{what}: expected a name or an object with quantize, dequantize; got {quantizer!r}"
        )
    return quantizer


def _readable(storage: Storage, quantizer: Quantizer, name: str) -> Storage:
    """`storage`, if `quantizer` finds in it what it looks for."""
    shapes = {key: tensor.to("meta") for key, tensor in storage.tensors.items()}
    try:
        quantizer.dequantize(replace(storage, tensors=shapes), storage.dtype)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{name}: {storage.scheme!r} cannot read it: {error!r}") from error
    return storage


def _check(name: str, tensor: Tensor, expected: Tensor, of: Storage | Description) -> None:
    what = f"{of.scheme}, {dict(of.options)}"
    if tensor.dtype != expected.dtype:
        raise DtypeError(
            f"{name}: expected {expected.dtype} for {what}; got {tensor.dtype}; "
            "make the layer with the options of the file"
        )
    if tensor.shape != expected.shape:
        raise ShapeError(
            f"{name}: expected {list(expected.shape)} for {what}; got {list(tensor.shape)}; "
            "make the layer with the options of the file"
        )
