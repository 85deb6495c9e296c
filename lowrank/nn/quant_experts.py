"""Quantized weights of the experts of a fused mixture, where a 3-D parameter was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank import quant
from lowrank.errors import ConfigError, FileFormatError, ShapeError
from lowrank.nn.grouped import grouped_mm
from lowrank.nn.quant_linear import product
from lowrank.nn.quant_weight import QuantWeight, resolve
from lowrank.ops.checks import check_float, check_tensors
from lowrank.quant import Quantizer, Storage, bitsandbytes


class LikeWeights:
    """What stands for the weights of experts [E, N, K], [E, K, N] or of one, and is no tensor."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)


@dataclass(frozen=True, eq=False)
class ExpertWeights(LikeWeights):
    """Weights of experts as code written for a dense tensor takes them; nothing is decoded yet.

    index None: of all, [E, ...]; an int: of one, [...]; a tensor [S]: of those, [S, ...]. The last
    two dimensions are [N, K], or [K, N] if `transposed`.

    Products with one expert, or with all of them group by group, run as a QuantLinear does:
    F.linear, x @ w.T, torch.bmm, F.grouped_mm. Any other function of torch sees the dequantized
    weights, which are made again for the backward rather than kept.
    """

    of: QuantExperts
    index: int | Tensor | None
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        (rows, K), E = self.of.matrix_shape, self.of.num_experts
        which = (
            (E,) if self.index is None else () if isinstance(self.index, int) else self.index.shape
        )
        return torch.Size((*which, *((K, rows // E) if self.transposed else (rows // E, K))))

    @property
    def dtype(self) -> torch.dtype:
        """What the weights were before quantization, or what the module was cast to since."""
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        return next(self.of.parameters()).device

    def __getitem__(self, key: int | slice | Tensor) -> ExpertWeights:
        """Those of some experts: by index, slice, list or tensor. IndexError: there is none."""
        if not isinstance(key, int | slice | list | Tensor):
            raise IndexError(
                f"experts: expected one index, slice, list or tensor; got {key!r}; "
                "call dequantize() first"
            )
        if self.index is not None:
            raise IndexError(f"experts: expected one index, into E={self.of.num_experts}; got two")
        E = self.of.num_experts
        if isinstance(key, int) or (isinstance(key, Tensor) and not key.dim()):
            if not -E <= (e := int(key)) < E:
                raise IndexError(f"experts: expected {-E} to {E - 1}; got {e}")
            return replace(self, index=e % E)
        device = key.device if isinstance(key, Tensor) else "cpu"
        return replace(self, index=torch.arange(E, device=device)[key])

    def transpose(self, dim0: int, dim1: int) -> ExpertWeights:
        """The last two dimensions exchanged."""
        last = {self.ndim - 2, self.ndim - 1}
        if {d % self.ndim for d in (dim0, dim1)} != last:
            raise ShapeError(
                f"transpose: expected the last two dimensions of {list(self.shape)}; "
                f"got {dim0}, {dim1}; call dequantize() first"
            )
        return replace(self, transposed=not self.transposed)

    @property
    def T(self) -> ExpertWeights:
        return self.transpose(0, 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weights, of this shape."""
        N = self.of.matrix_shape[0] // self.of.num_experts
        if self.index is None:
            weight = self.of.quantizer.dequantize(self.of.storage, dtype).unflatten(0, (-1, N))
        elif isinstance(self.index, int):
            weight = self._expert(self.index, dtype)
        else:
            check_float("dtype", dtype)
            shape = (*self.index.shape, N, self.of.matrix_shape[1])
            weight = torch.empty(shape, dtype=dtype, device=self.device)
            for place, e in zip(weight.flatten(0, -3), self.index.flatten().tolist(), strict=True):
                place.copy_(self._expert(e, dtype))
        return weight.mT if self.transposed else weight

    def _expert(self, e: int, dtype: torch.dtype) -> Tensor:
        N = self.of.matrix_shape[0] // self.of.num_experts
        return quant.dequantize_rows(self.of.quantizer, self.of.storage, e * N, (e + 1) * N, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> x Wᵀ + b, [..., N], of one expert that is not transposed."""
        N, quantizer = self.shape[0], self.of.quantizer
        if not quant.has_row_parts(quantizer):
            return with_dense(torch.nn.functional.linear, (x, self, bias), {})
        storage = self.of.storage.rows(self.index * N, (self.index + 1) * N)
        return product(x, quantizer, storage, bias, self.of.compute_dtype)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple, kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class QuantExperts(QuantWeight, LikeWeights):
    """E weights [N, K] of a fused mixture of experts, quantized; [K, N] each if `transposed`.

    It stands where the parameter [E, N, K] or [E, K, N] was, and indexed, transposed or passed to
    torch's products it is one: see ExpertWeights. Held is the matrix [E N, K] of all rows, so every
    scheme of rows does; one that decodes a weight as a whole is refused.

    A state dict's plain tensor, under the parameter's own name, is quantized as it is loaded;
    bitsandbytes' tensors under this name are taken as they are.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        weight: Tensor,
        quantizer: str | Quantizer = "nf4",
        transposed: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        check_tensors(weight=weight)
        if weight.dim() != 3 or weight.numel() == 0:
            raise ShapeError(
                f"weight: expected [E, N, K], each at least 1; got {list(weight.shape)}"
            )
        quantizer = check_quantizer(resolve(quantizer))
        storage = quantizer.quantize(_matrix(weight, transposed))
        self._hold(storage, quantizer, weight.shape[0], transposed, compute_dtype)

    @classmethod
    def from_storage(
        cls,
        storage: Storage,
        quantizer: Quantizer,
        num_experts: int,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantExperts:
        """Those of the rows [E N, K] of already quantized experts."""
        experts = cls.__new__(cls)
        experts._hold(storage, check_quantizer(quantizer), num_experts, False, compute_dtype)
        return experts

    def _hold(self, storage, quantizer, num_experts, transposed, compute_dtype) -> None:
        if compute_dtype is not None:
            check_float("compute_dtype", compute_dtype)
        super().__init__(storage, quantizer)
        self.num_experts, self.transposed = num_experts, transposed
        self.compute_dtype = compute_dtype

    @property
    def weights(self) -> ExpertWeights:
        """All of them."""
        return ExpertWeights(self, None, self.transposed)

    @property
    def shape(self) -> torch.Size:
        """[E, N, K], or [E, K, N] if transposed."""
        return self.weights.shape

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def __getitem__(self, key: int | slice | Tensor) -> ExpertWeights:
        return self.weights[key]

    def transpose(self, dim0: int, dim1: int) -> ExpertWeights:
        return self.weights.transpose(dim0, dim1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weights, as the parameter was."""
        return self.weights.dequantize(dtype)

    def matrix(self, weight: Tensor) -> Tensor:
        """[E N, K]."""
        return _matrix(weight, self.transposed)

    def read_bitsandbytes(self, tensors: Mapping[str, Tensor], name: str) -> Storage:
        if self.transposed:
            raise FileFormatError(
                f"{name}weight: expected dense experts, as they are held transposed to the blocks "
                "of bitsandbytes; got its tensors; quantize the original weights"
            )
        return bitsandbytes.read(tensors, name, self.shape)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {super().extra_repr()}"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple, kwargs: Any = None) -> Any:
        args = tuple(_whole(value) for value in args)
        return _call(func, args, {name: _whole(value) for name, value in (kwargs or {}).items()})


def check_quantizer(quantizer: Quantizer) -> Quantizer:
    """The same. Raises ConfigError for one that cannot decode one expert without the others."""
    if not quant.decodes_rows(quantizer):
        raise ConfigError(
            "quantizer: expected one that is row_local or has dequantize_rows for experts; "
            f"got {getattr(quantizer, 'name', type(quantizer).__name__)!r}"
        )
    return quantizer


def is_transposed(module: nn.Module) -> bool:
    """Whether its weights are [E, K, N]: transformers' word, or a silent class."""
    return getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")


def replace_parameter(module: nn.Module, name: str, weights: nn.Module) -> None:
    """Put `weights` where the parameter `name` of `module` is; its keys go on to be loaded."""
    del module._parameters[name]
    setattr(module, name, weights)
    module.register_load_state_dict_pre_hook(partial(_take_plain_keys, name))


def restore_parameter(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Undo `replace_parameter`, with `weight` as the parameter."""
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook = wrapped.hook
        if isinstance(hook, partial) and (hook.func, hook.args) == (_take_plain_keys, (name,)):
            del hooks[key]
    delattr(module, name)
    module.register_parameter(name, weight)


def _take_plain_keys(
    name: str, module: nn.Module, state_dict: dict, prefix: str, *_: object
) -> None:
    name = prefix + name
    if name in state_dict:
        for key in [key for key in state_dict if key.startswith(f"{name}.")]:
            suffix = key[len(name) :]
            if bitsandbytes.is_layer({f"weight{suffix}": state_dict[key]}):
                state_dict[f"{name}.weight{suffix}"] = state_dict.pop(key)
        state_dict[f"{name}.weight"] = state_dict.pop(name)


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    return (weight.mT if transposed else weight).flatten(0, 1)


def _call(func: Callable, args: tuple, kwargs: dict) -> Any:
    if torch.compiler.is_compiling():  # which expert it is, no graph knows
        return torch.compiler.disable(_call)(func, args, kwargs)
    rule = _RULES.get(func)
    y = rule(*args, **kwargs) if rule is not None else None
    return with_dense(func, args, kwargs) if y is None else y


def _whole(value: Any) -> Any:
    return value.weights if isinstance(value, QuantExperts) else value


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    one = isinstance(weight, ExpertWeights) and isinstance(weight.index, int)
    return weight.linear(input, bias) if one and not weight.transposed else None


def _matmul(x: Any, w: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or not isinstance(w, ExpertWeights) or not w.transposed:
        return None
    if isinstance(w.index, int):
        return w.mT.linear(x)
    if w.index is None and x.dim() == 3 and len(x) == len(w):
        return torch.stack([w[e].mT.linear(x[e]) for e in range(len(w))])
    return None


def _grouped(
    mat_a: Any,
    mat_b: Any,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Rows offs[e - 1] to offs[e] of x [M, K] with expert e; rows beyond the last are zeros."""
    x, w = mat_a, mat_b
    whole = isinstance(w, ExpertWeights) and w.index is None and w.transposed
    if not whole or x.dim() != 2 or offs is None or bias is not None or out_dtype is not None:
        return None
    if len(offs) != len(w):
        raise ShapeError(f"offs: expected [E={len(w)}]; got {list(offs.shape)}")
    *parts, rest = groups(x, offs)
    parts = [w[e].mT.linear(part) for e, part in enumerate(parts) if len(part)]
    dtype = parts[0].dtype if parts else x.dtype
    return torch.cat([*parts, rest.new_zeros(len(rest), w.shape[-1], dtype=dtype)])


def groups(x: Tensor, offs: Tensor) -> tuple[Tensor, ...]:
    """The rows of each expert, and those beyond the last."""
    ends = offs.tolist()
    return x.split([end - start for start, end in pairwise([0, *ends, len(x)])])


MATMULS = {torch.matmul, torch.mm, torch.bmm}
MATMULS |= {Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
GROUPED = {
    getattr(home, name)
    for home in (torch.nn.functional, torch)
    for name in ("grouped_mm", "_grouped_mm")  # as far as this torch has them
    if hasattr(home, name)
} | {grouped_mm}
_RULES: dict[Callable, Callable] = {
    torch.nn.functional.linear: _linear,
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(GROUPED, _grouped),
}


def with_dense(func: Callable, args: tuple, kwargs: dict) -> Any:
    """func of the dequantized weights, which are not kept for the backward."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]

    def run(*_: Tensor) -> Any:
        named = {name: _dense(value, floats) for name, value in kwargs.items()}
        return func(*(_dense(value, floats) for value in args), **named)

    if not torch.is_grad_enabled():
        return run()
    # what is passed tells the device; the weights are no argument, as torch would dispatch on them
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)


def _dense(value: Any, floats: list[torch.dtype]) -> Any:
    if isinstance(value, LikeWeights):
        return value.dequantize(floats[0] if floats else value.dtype)
    return value
