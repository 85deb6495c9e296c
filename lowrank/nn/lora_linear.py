"""A linear layer with low-rank adapters beside it, under the names PEFT gives them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank import ops, quant
from lowrank.adapters import lora
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, FileFormatError, TargetError
from lowrank.nn.autocast import linear_dtype
from lowrank.nn.fusible import NO_BASE, Base, fusible_base, is_patched, quick_dtype
from lowrank.nn.held import replaced
from lowrank.nn.quant_linear import QuantLinear, dense_matrix, is_conv1d, is_dense_linear
from lowrank.nn.rows import stacked
from lowrank.nn.small import AtHand, at_hand_of, small_product
from lowrank.nn.started import StartedLayer
from lowrank.quant import Quantizer
from lowrank.quant.blocks import panels

# p, A [E, R, K], B [E, N, R], s, and which rows have which of the E; None: all have the only one
Branch = tuple[float, Tensor, Tensor, float, tuple[Tensor, Tensor] | None]


class LoRALinear(StartedLayer):
    """y = x Wᵀ + b + Σ s·drop(x) Aᵀ Bᵀ over the active adapters.   Hu et al., arXiv:2106.09685.

    x: [..., K], y: [..., N]. `base_layer` holds W [N, K] and b [N], frozen, dense or quantized;
    `lora_A[name].weight` is A [R, K], `lora_B[name].weight` is B [N, R], `scaling[name]` is s.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: LoRAConfig | None = None,
        quantizer: str | Quantizer | None = None,
        adapter: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_around(linear, config or LoRAConfig(), adapter, "", quantizer)

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear | QuantLinear,
        config: LoRAConfig,
        adapter: str = "default",
        name: str = "",
        quantizer: str | Quantizer | None = None,
    ) -> LoRALinear:
        """The same layer with an adapter; `linear` becomes `base_layer` and is frozen.

        With a `quantizer`, `linear` is an nn.Linear and stays as it is, but for its bias, which the
        QuantLinear made of it shares. `name` is the layer's name in its model, for the config's
        rank_pattern and alpha_pattern.
        """
        cls.check(linear, config, name)
        if quantizer is not None and not is_dense_linear(linear):
            raise TargetError(
                f"{name or 'wrap'}: expected nn.Linear or Conv1D to quantize; "
                f"got {type(linear).__name__}"
            )
        layer = cls.__new__(cls)
        layer._init_around(linear, config, adapter, name, quantizer)
        return layer

    @classmethod
    def bare(cls, linear: nn.Linear) -> LoRALinear:
        """The layer around `linear`, which has no adapter yet."""
        layer = cls.__new__(cls)
        layer._around(linear)
        return layer

    def _around(self, base: nn.Module) -> None:
        super().__init__(base)
        N, K = self.matrix_shape
        vars(self).update(out_features=N, in_features=K)

    def _init_around(
        self,
        linear: nn.Linear | QuantLinear,
        config: LoRAConfig,
        adapter: str,
        name: str,
        quantizer: str | Quantizer | None,
    ) -> None:
        if (
            config.starts_from_weight
            and quantizer is None
            and (config.init_lora_weights == "loftq" or not is_dense_linear(linear))
        ):
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r}: expected an nn.Linear and a "
                f"quantizer; got {type(linear).__name__} and None; pass quantizer='nf4'"
            )
        base = linear if quantizer is None else QuantLinear.from_linear(linear, quantizer)
        self._around(base)
        self.add_adapter(adapter, config.with_fresh_start(), name)
        self.set_adapter([adapter])
        if config.starts_from_weight:
            self.initialise(adapter, config, linear.weight)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        self.__dict__["at_hand"] = None  # what is set may be what it was found by

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"at_hand": None}

    def forward(self, x: Tensor) -> Tensor:
        at_hand = None if torch.compiler.is_compiling() else at_hand_of(self)
        if at_hand is None:
            return super().forward(x)
        y = small_product(at_hand, x)
        if y is None:
            y = _product_at_hand(at_hand, x)
        return super().forward(x) if y is None else y

    def compute(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        if self.magnitudes and any(a in self.magnitudes for a in adapters):
            return self._rescaled(x, adapters)
        return self._summed(x, self._branches(adapters))

    def by_rows(self, x: Tensor) -> Tensor:
        adapters = self.rows.among(self.config)
        if any(a in self.magnitudes for a in adapters):
            y = super().by_rows(self.rows.as_batch(x))
            return y.view(*x.shape[:-1], y.shape[-1])
        branches = []
        for p, names in self._by_dropout(adapters).items():
            A, B = stacked([(*self.factors(a), self.scaling[a]) for a in names])
            branches.append((p, A, B, 1.0, self.rows.groups(names, x)))
        return self._summed(x, branches)

    def _summed(self, x: Tensor, branches: list[Branch]) -> Tensor:
        if not branches:
            return self.base_layer(x)
        dtype = linear_dtype(x)
        fused = fusible_base(self.base_layer, x)
        if fused is None:
            y = self.base_layer(x)
        else:
            y = _lora_linear(x.to(dtype), fused, *branches.pop(0))
        for branch in branches:
            y = (y + _lora_linear(x.to(dtype), NO_BASE, *branch)).to(y.dtype)
        return y

    def _rescaled(self, x: Tensor, active: list[str]) -> Tensor:
        """The same where some have a gain g, which is for all that is multiplied by drop(x):

        y = x Wᵀ + b + Σ s·drop(x) Aᵀ Bᵀ + Σ g ∘ (drop(x) (W + s·B A)ᵀ) - drop(x) Wᵀ
        """
        dtype, fused = linear_dtype(x), fusible_base(self.base_layer, x)
        first, p = active[0], self._dropped(active[0])
        if fused is not None and len(active) == 1 and p == 0:
            A, B, s = *self.factors(first), self.scaling[first]
            weight, bias, block_size = fused
            z = _lora_linear(x.to(dtype), (weight, None, block_size), p, A[None], B[None], s)
            g = self.gain(first, quick_dtype(self.base_layer, dtype))
            if bias is not None and z.dtype == g.dtype == bias.dtype:
                return torch.addcmul(bias, z, g)
            y = z * g  # of two dtypes, addcmul takes four times as long as this and adding
            return (y if bias is None else y + bias).to(dtype)
        y = whole = self.base_layer(x)
        for branch in self._branches([a for a in active if a not in self.magnitudes]):
            y = (y + _lora_linear(x.to(dtype), NO_BASE, *branch)).to(y.dtype)
        for adapter in [a for a in active if a in self.magnitudes]:
            p, g, (A, B) = self._dropped(adapter), self.gain(adapter), self.factors(adapter)
            z = F.dropout(x, p) if p > 0 else x
            w = self.base_layer(z) if p > 0 else whole
            w = w if self.bias is None else w - self.bias
            branch = (A[None], (g[:, None] * B)[None], self.scaling[adapter])
            y = (y + (g - 1) * w + _lora_linear(z.to(dtype), NO_BASE, 0.0, *branch)).to(y.dtype)
        return y

    def _branches(self, adapters: Iterable[str]) -> list[Branch]:
        """One for each p of the adapters' dropouts."""
        return [
            (p, *lora.folded([(*self.factors(a), self.scaling[a]) for a in names]), None)
            for p, names in self._by_dropout(adapters).items()
        ]

    def _by_dropout(self, adapters: Iterable[str]) -> dict[float, list[str]]:
        by_p: dict[float, list[str]] = {}
        for adapter in adapters:
            by_p.setdefault(self._dropped(adapter), []).append(adapter)
        return by_p

    def _dropped(self, adapter: str) -> float:
        """The share of x that the adapter's dropout takes away, now."""
        dropout = self.lora_dropout[adapter]
        return dropout.p if dropout.training and type(dropout) is not nn.Identity else 0.0

    is_linear = True

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig, name: str) -> None:
        super().check(base, config, name)
        shape = getattr(base, "out_features", None), getattr(base, "in_features", None)
        weight = getattr(base, "weight", None)
        known = isinstance(base, QuantLinear) or is_conv1d(base)
        if not known and not (isinstance(weight, Tensor) and tuple(weight.shape) == shape):
            raise TargetError(
                f"{name or 'wrap'}: expected a linear layer: nn.Linear, QuantLinear, Conv1D, or one"
                " with `in_features`, `out_features`, `weight` [out, in] and `bias`; "
                f"got {type(base).__name__}"
            )
        spans, N = config.spans(name), cls.matrix_shape_of(base)[0]
        if spans and spans[-1][1] > N:
            end = spans[-1][1]
            raise ConfigError(f"target_rows: expected rows of {name}, up to {N}; got {end}")

    @classmethod
    def matrix_shape_of(cls, base: nn.Module) -> tuple[int, int]:
        if is_conv1d(base):
            return tuple(base.weight.shape[::-1])
        return base.out_features, base.in_features

    @classmethod
    def part_shapes(
        cls, base: nn.Module, config: LoRAConfig, name: str = ""
    ) -> dict[str, tuple[int, ...]]:
        shapes = super().part_shapes(base, config, name)
        if spans := config.spans(name):
            rows = sum(stop - start for start, stop in spans)
            shapes["lora_B"] = (rows, config.rank(name))
        return shapes

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = super().factors(adapter)
        return A, self._spread(B, adapter) if self.spans[adapter] else B

    def _spread(self, B: Tensor, adapter: str) -> Tensor:
        """B [N, R] with the rows that the adapter has, and zeros."""
        parts, last, spans = [], 0, self.spans[adapter]
        pieces = B.split([stop - start for start, stop in spans])
        for (start, stop), piece in zip(spans, pieces, strict=True):
            parts += [B.new_zeros(start - last, B.shape[1]), piece]
            last = stop
        return torch.cat([*parts, B.new_zeros(self.out_features - last, B.shape[1])])

    def to_file(self, adapter: str) -> dict[str, Tensor]:
        tensors = super().to_file(adapter)
        if self.spans[adapter]:
            tensors["lora_B.weight"] = self._spread(tensors["lora_B.weight"], adapter).detach()
        return tensors

    def from_file(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        if spans := self.spans[adapter]:
            B = tensors["lora_B.weight"]
            here = torch.cat([B[start:stop] for start, stop in spans])
            if B.count_nonzero() != here.count_nonzero():
                raise FileFormatError(
                    f"lora_B.weight: expected zeros but in the rows {spans} that adapter "
                    f"{adapter!r} has in the model; load it under another name"
                )
            tensors = {**tensors, "lora_B.weight": here}
        super().from_file(adapter, tensors)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        base = self.unmerged_base
        return (
            base.dequantize(dtype)
            if isinstance(base, QuantLinear)
            else dense_matrix(base).to(dtype)
        )

    def products(self, rows: Tensor) -> Tensor:
        base = self.unmerged_base
        if isinstance(base, QuantLinear):
            return quant.linear(base.quantizer, rows, base.storage)
        weight = dense_matrix(base)
        if weight.dtype == rows.dtype:
            return F.linear(rows, weight)
        if weight.device.type != "cpu":
            return F.linear(rows.to(weight.dtype), weight).to(rows.dtype)
        parts = (weight[some].to(rows.dtype) for some in self._some_rows())
        return torch.cat([F.linear(rows, part) for part in parts], dim=1)

    def squares(self, dtype: torch.dtype) -> Tensor:
        base = self.unmerged_base
        if isinstance(base, QuantLinear) and not quant.decodes_rows(base.quantizer):
            return super().squares(dtype)
        if isinstance(base, QuantLinear):
            storage, decode = base.storage, quant.dequantize_rows
            parts = (
                decode(base.quantizer, storage, some.start, some.stop, dtype)
                for some in self._some_rows()
            )
        else:
            parts = (dense_matrix(base)[some].to(dtype) for some in self._some_rows())
        return torch.cat([part.square().sum(1) for part in parts])

    def _some_rows(self) -> Iterator[slice]:
        """The rows of W, as many at a time as fit in a few MB."""
        N, K = self.matrix_shape
        device = next(self.unmerged_base.parameters()).device
        return (slice(start, stop) for start, stop in panels(N, K, device))

    def plain(self, matrix: Tensor) -> nn.Module:
        base = self.unmerged_base
        if is_conv1d(base):
            return replaced(base, weight=matrix.T.contiguous())
        if isinstance(base, QuantLinear) and base.conv1d:
            plain = replaced(base.conv1d[0], weight=matrix.T.contiguous())
            plain.register_parameter("bias", base.bias)
            return plain
        if type(base) is not nn.Linear and "weight" in base._parameters and not is_patched(base):
            return replaced(base, weight=matrix)  # a class of the user's own
        linear = nn.Linear.__new__(nn.Linear)  # what it does to make one is to fill a weight
        nn.Module.__init__(linear)
        vars(linear).update(
            in_features=self.in_features, out_features=self.out_features, training=self.training
        )
        weight = nn.Parameter(matrix, requires_grad=False)
        linear._parameters.update(weight=weight, bias=base.bias)  # adapters do not change the bias
        return linear

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {super().extra_repr()}"


def _product_at_hand(at_hand: AtHand, x: Tensor) -> Tensor | None:
    """What `compute` gives, where the operator computes the base too, or None."""
    name, fused = at_hand.adapter, fusible_base(at_hand.base, x)
    A, B = (part[name]._parameters.get("weight") for part in (at_hand.As, at_hand.Bs))
    if fused is None or A is None or B is None:
        return None
    dropout = at_hand.dropouts[name]
    p = dropout.p if dropout.training and type(dropout) is not nn.Identity else 0.0
    x = x.to(linear_dtype(x))
    return _lora_linear(x, fused, p, A[None], B[None], at_hand.scaling[name])


def _lora_linear(
    x: Tensor,
    base: Base,
    p: float,
    A: Tensor,
    B: Tensor,
    s: float,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """ops.lora_linear of one dropout, its seed drawn anew where p > 0.

    The seed is drawn on the device of x, whose generator checkpointing puts back before it
    computes again: both times, the mask is the same.
    """
    weight, bias, block_size = base
    if A.dtype not in (x.dtype, torch.float32) or A.dtype != B.dtype:
        A, B = A.float(), B.float()
    seed = torch.randint(2**63 - 1, (), device=x.device) if p > 0 else None
    return ops.lora_linear(x, *weight, bias, block_size, A, B, s, groups, p, seed)
