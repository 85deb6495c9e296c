"""A linear layer whose frozen weight is quantized, by whichever quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank import quant
from lowrank.errors import ShapeError, TargetError
from lowrank.nn.autocast import linear_dtype
from lowrank.nn.held import replaced
from lowrank.nn.quant_weight import QuantWeight, resolve
from lowrank.ops.checks import check_float, check_sizes, check_tensors
from lowrank.ops.few_rows import FewRows
from lowrank.quant import Quantizer, Storage
from lowrank.quant.codebook import CodebookQuantizer


class QuantLinear(QuantWeight):
    """y = x Wᵀ + b with W [N = out_features, K = in_features] quantized, and b a plain parameter.

    x is cast to `compute_dtype` (default: its own dtype, or autocast's) and y is returned in the
    dtype that nn.Linear would return. A fresh layer is initialised as nn.Linear is; with
    device="meta" nothing is allocated, and a loader fills it.

    With `fan_in_fan_out`, which `from_linear` sets for GPT-2's Conv1D, a plain `weight` to load is
    [K, N]; what is held, computed and saved is the same as without.
    """

    compute_dtype: torch.dtype | None = None
    fan_in_fan_out: bool = False
    conv1d: tuple[nn.Module, ...] = ()  # what it was made of, without its tensors
    few_rows: FewRows | bool | None  # False: none can be made of the weight; None: not tried yet

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
        check_sizes(in_features=in_features, out_features=out_features)
        if dtype is not None:
            check_float("dtype", dtype)
        quantizer, bound = resolve(quantizer), 1 / math.sqrt(in_features)
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype).uniform_(
            -bound, bound
        )
        b = None
        if bias:
            b = nn.Parameter(weight.new_empty(out_features).uniform_(-bound, bound))
        self._hold(quantizer.quantize(weight), quantizer, b, compute_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        quantizer: str | Quantizer,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """The layer with `linear`'s weight quantized and its very bias parameter.

        `linear` may also be GPT-2's Conv1D, y = x W + b: its W [K, N] is transposed. Of anything
        else, a LoRALinear too, this would be another function: TargetError.
        """
        quantizer, transposed = resolve(quantizer), is_conv1d(linear)
        if not (transposed or isinstance(linear, nn.Linear)):
            raise TargetError(
                f"from_linear: expected an nn.Linear or GPT-2's Conv1D; got {type(linear).__name__}"
            )
        weight = linear.weight.T.contiguous() if transposed else linear.weight
        layer = cls.from_storage(quantizer.quantize(weight), quantizer, linear.bias, compute_dtype)
        layer.fan_in_fan_out = transposed
        if transposed:
            empty = replaced(linear, weight=torch.empty(0, device="meta"))
            empty.register_parameter("bias", None)
            layer.conv1d = (empty,)
        return layer.train(linear.training)

    @classmethod
    def from_tied(
        cls,
        weight: QuantWeight,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """The layer with the very parameters of `weight`, an embedding's for instance."""
        layer = cls.from_storage(weight.storage, weight.quantizer, bias, compute_dtype)
        layer.tie(weight)
        return layer.train(weight.training)

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
        layer._hold(storage, quantizer, bias, compute_dtype)
        return layer

    def _hold(self, storage, quantizer, bias, compute_dtype) -> None:
        if compute_dtype is not None:
            check_float("compute_dtype", compute_dtype)
        super().__init__(storage, quantizer)
        if bias is not None:
            check_tensors(bias=bias)
            if bias.shape != (self.out_features,):
                raise ShapeError(f"bias: expected [N={self.out_features}]; got {list(bias.shape)}")
        self.bias = bias
        self.compute_dtype = compute_dtype

    @property
    def in_features(self) -> int:
        """K."""
        return self.matrix_shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.matrix_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if not torch.compiler.is_compiling() and (y := self._few(x)) is not None:
            return y
        check_tensors(x=x)
        return product(x, self.quantizer, self.storage, self.bias, self.compute_dtype)

    def _few(self, x: Tensor) -> Tensor | None:
        """The same of a few rows of x, if the kernel can be called at once."""
        if type(x) is not Tensor or self.compute_dtype not in (None, x.dtype):
            return None
        few = self.few()
        return None if few is None else few.product(x, self._parameters.get("bias"))

    def few(self) -> FewRows | None:
        """What multiplies a few rows of x with the weight as it is now, without the bias."""
        few = self.__dict__["few_rows"]
        if few is None or (few and not few.is_of(self._parameters)):
            few = self.__dict__["few_rows"] = _few_rows(self) or False
        return few or None

    def _set(self, storage: Storage, quantizer: Quantizer | None = None) -> None:
        super()._set(storage, quantizer)
        self.__dict__["few_rows"] = None

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        self.__dict__["few_rows"] = None
        return self

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"few_rows": None}

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """[N, K], or [K, N] with `fan_in_fan_out`."""
        return self.matrix_shape[::-1] if self.fan_in_fan_out else self.matrix_shape

    def matrix(self, weight: Tensor) -> Tensor:
        """[N, K] of a plain `weight`."""
        return weight.T.contiguous() if self.fan_in_fan_out else weight

    def extra_repr(self) -> str:
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}{compute}"
        )


def _few_rows(layer: QuantLinear) -> FewRows | None:
    """What `layer` computes a few rows with, where its product is that of `codebook_linear`."""
    quantizer = layer.quantizer
    if getattr(type(quantizer), "linear", None) is not CodebookQuantizer.linear:
        return None
    *operands, block_size = quantizer.codebook_operands(layer.storage)
    return FewRows.over(layer._parameters, tuple(operands), layer.in_features, block_size)


def product(
    x: Tensor,
    quantizer: Quantizer,
    storage: Storage,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """x Wᵀ + b in `compute_dtype`, or else as nn.Linear would; in the dtype it would return."""
    out_dtype = linear_dtype(x)
    compute_dtype = compute_dtype or out_dtype
    bias = None if bias is None else bias.to(compute_dtype)
    if x.dtype == compute_dtype == out_dtype:  # each .to takes microseconds, for nothing
        return quant.linear(quantizer, x, storage, bias)
    return quant.linear(quantizer, x.to(compute_dtype), storage, bias).to(out_dtype)


def is_dense_linear(module: nn.Module) -> bool:
    """Whether its weight can be quantized as a QuantLinear's."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dense_matrix(linear: nn.Module) -> Tensor:
    """W [N, K] of a linear layer that is not quantized, apart from autograd."""
    return (linear.weight.T if is_conv1d(linear) else linear.weight).detach()


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whoever wrote it: y = x W + b with W [K, N = nf]."""
    if type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )
