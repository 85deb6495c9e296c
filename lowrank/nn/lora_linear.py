"""A linear layer with low-rank adapters beside it, under the names PEFT gives them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lowrank import ops
from lowrank.adapters import initial, lora
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, FileFormatError, ShapeError, TargetError, WeightError
from lowrank.nn.autocast import linear_dtype
from lowrank.nn.fusible import NO_BASE, Base, fusible_base
from lowrank.nn.quant_linear import QuantLinear
from lowrank.quant import Quantizer


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + Σ s·drop(x) Aᵀ Bᵀ over the active adapters.   Hu et al., arXiv:2106.09685.

    x: [..., K], y: [..., N]. `base_layer` holds W [N, K] and b [N], frozen, dense or quantized;
    `lora_A[name].weight` is A [R, K], `lora_B[name].weight` is B [N, R], `scaling[name]` is s.
    Adapters are float32 over a 16-bit or quantized base, else of the base's dtype.

    While merged, `base_layer` is a dense linear with W + Σ s·B A, and the layer that was there is
    kept aside, so that unmerging gives back its very bits. A state dict of the plain layer
    (`weight`, `bias`, or a quantized layer's tensors) loads into `base_layer`, strict too.
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
        expected = nn.Linear | QuantLinear if quantizer is None else nn.Linear
        if isinstance(linear, LoRALinear) or not isinstance(linear, expected):
            raise TargetError(
                f"{name or 'wrap'}: expected nn.Linear{' or QuantLinear' * (quantizer is None)}; "
                f"got {type(linear).__name__}"
            )
        layer = cls.__new__(cls)
        layer._init_around(linear, config, adapter, name, quantizer)
        return layer

    def _init_around(
        self,
        linear: nn.Linear | QuantLinear,
        config: LoRAConfig,
        adapter: str,
        name: str,
        quantizer: str | Quantizer | None,
    ) -> None:
        if not isinstance(config, LoRAConfig):
            raise ConfigError(f"config: expected a LoRAConfig; got {type(config).__name__}")
        if config.starts_from_weight and quantizer is None:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r}: expected an nn.Linear and a "
                f"quantizer; got {type(linear).__name__} and None; pass quantizer='nf4', or 'none' "
                "to leave the rest in full precision"
            )
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        base = linear if quantizer is None else QuantLinear.from_linear(linear, quantizer)
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.config: dict[str, LoRAConfig] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}  # s, what scale_adapter chose included
        self.active_adapters: list[str] = []
        self.disabled = False
        # in a list, so that it is no submodule: a merged layer's state is the merged weight alone
        self._aside: list[nn.Module] = []
        self.register_load_state_dict_pre_hook(_take_plain_keys)
        self.add_adapter(adapter, config.with_fresh_start(), name)
        self.set_adapter([adapter])
        if config.starts_from_weight:
            self.initialise(adapter, config, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.unmerged_base(x)
        branches = [] if self.merged else self._branches()
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

    def _branches(self) -> list[tuple[float, Tensor, Tensor, float]]:
        """(p, A [1, R, K], B [1, N, R], s) for each p of the active adapters' dropouts."""
        by_p: dict[float, list[tuple[Tensor, Tensor, float]]] = {}
        for name in self.active_adapters:
            dropout = self.lora_dropout[name]
            p = dropout.p if dropout.training else 0.0
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            by_p.setdefault(p, []).append((A, B, self.scaling[name]))
        return [(p, *lora.folded(branches)) for p, branches in by_p.items()]

    @property
    def merged(self) -> bool:
        """Whether `base_layer` holds the merged weight."""
        return bool(self._aside)

    @property
    def unmerged_base(self) -> nn.Module:
        """The base layer as it is without any adapter, merged or not."""
        return self._aside[0] if self._aside else self.base_layer

    @property
    def weight(self) -> Tensor:
        """W [N, K] of a dense base layer, as code written for nn.Linear expects it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """b [N] of the base layer."""
        return self.base_layer.bias

    def add_adapter(self, adapter: str, config: LoRAConfig, name: str = "") -> None:
        """Add an inactive adapter as `config` says; `name` is this layer's name in its model."""
        if adapter in self.lora_A:
            raise ConfigError(
                f"adapter: {adapter!r} is already there; delete it first or choose another name"
            )
        if not isinstance(adapter, str) or not adapter or "." in adapter:
            raise ConfigError(f"adapter: expected a name without dots; got {adapter!r}")
        self._refuse_if_merged("add_adapter")
        if config.starts_from_weight:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r}: changes the base, so it is for a "
                "first adapter only: LoRALinear.wrap(linear, config, quantizer=...)"
            )
        weight = next(self.base_layer.parameters())
        dtype = (
            torch.promote_types(weight.dtype, torch.float32)
            if weight.is_floating_point()
            else torch.float32
        )
        r = config.rank(name)
        A = _linear(self.in_features, r, weight.device, dtype)
        B = _linear(r, self.out_features, weight.device, dtype)
        lora.init_(A.weight, B.weight, config.init_lora_weights)
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout)
        self.lora_A[adapter], self.lora_B[adapter] = A, B
        self.config[adapter], self.r[adapter], self.lora_alpha[adapter] = (
            config,
            r,
            config.alpha(name),
        )
        self.scale_adapter(adapter, 1.0)

    def initialise(self, adapter: str, config: LoRAConfig, weight: Tensor) -> None:
        """Start `adapter` from the original plain `weight` as config.init_lora_weights says.

        The quantized base is made anew, so that base + s·B A is near the weight. On the meta device
        nothing is computed; there, loading a plain `weight` does the same.
        """
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        storage, *factors = self._split(adapter, config, weight.to(A.device))
        with torch.no_grad():
            self.base_layer.refill(storage)
            for parameter, factor in zip((A, B), factors, strict=True):
                parameter.copy_(factor)
        self.config[adapter] = config

    def _split(self, adapter: str, config: LoRAConfig, weight: Tensor) -> tuple:
        """(Storage, A, B) of adapters.initial.split."""
        self._refuse_if_merged("initialise")
        base, r = self.base_layer, self.r[adapter]
        if weight.shape != base.plain_shape:
            expected = list(base.plain_shape)
            raise ShapeError(f"weight: expected {expected}; got {list(weight.shape)}")
        quantizer, weight = base.quantizer, base.matrix(weight)
        if weight.is_meta:
            N, K = weight.shape
            return quantizer.quantize(weight), weight.new_empty(r, K), weight.new_empty(N, r)
        s = lora.scaling(r, self.lora_alpha[adapter], config.use_rslora)
        return initial.split(config, weight, quantizer, r, s)

    def set_adapter(self, adapters: Iterable[str]) -> None:
        """Make these, as far as they are here, active: they add up, and only they train."""
        self._refuse_if_merged("set_adapter")
        self.active_adapters = [a for a in adapters if a in self.lora_A]
        for part in (self.lora_A, self.lora_B):
            for adapter, linear in part.items():
                linear.requires_grad_(
                    adapter in self.active_adapters and not self.config[adapter].inference_mode
                )

    def scale_adapter(self, adapter: str, factor: float) -> None:
        """s = factor · alpha / R (sqrt(R) if rank-stabilized); never cumulative."""
        self._refuse_if_merged("scale_adapter")
        rslora = self.config[adapter].use_rslora
        self.scaling[adapter] = factor * lora.scaling(
            self.r[adapter], self.lora_alpha[adapter], rslora
        )

    def delete_adapter(self, adapter: str) -> None:
        """Forget an adapter, if it is here."""
        self._refuse_if_merged("delete_adapter")
        if adapter in self.lora_A:
            for part in (self.lora_dropout, self.lora_A, self.lora_B):
                del part[adapter]
            for table in (self.config, self.r, self.lora_alpha, self.scaling):
                del table[adapter]
            self.active_adapters = [a for a in self.active_adapters if a != adapter]

    def merge(
        self, adapters: Iterable[str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Fold adapters (None: the active ones) into a dense base layer, the old one kept aside.

        `dtype` of the merged weight: None means the base's, which for a quantized base is the dtype
        its weight had before quantization. Quantizing again would round the adapter away.
        """
        self._refuse_if_merged("merge")
        chosen = [
            a for a in (self.active_adapters if adapters is None else adapters) if a in self.lora_A
        ]
        base = self.base_layer
        dense = isinstance(base, nn.Linear)
        dtype = dtype or (base.weight.dtype if dense else base.storage.dtype)
        weight = (
            base.weight if dense else base.dequantize(torch.promote_types(dtype, torch.float32))
        )
        branches = [(self.lora_A[a].weight, self.lora_B[a].weight, self.scaling[a]) for a in chosen]
        merged = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(
            lora.merged_weight(weight, branches, dtype), requires_grad=False
        )
        merged.bias = base.bias  # the same parameter: adapters do not change it
        merged.train(base.training)
        self._aside, self.base_layer = [base], merged

    def unmerge(self) -> None:
        """Put the base layer back as it was before `merge`, bit for bit."""
        if self._aside:
            self.base_layer, self._aside = self._aside[0], []

    def _refuse_if_merged(self, what: str) -> None:
        if self.merged:
            raise ConfigError(
                f"{what}: expected unmerged layers; the adapters are merged: call unmerge first"
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> LoRALinear:
        for base in self._aside:
            base._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        state = "merged" if self.merged else "disabled" if self.disabled else "active"
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {state}={self.active_adapters}"


def _lora_linear(x: Tensor, base: Base, p: float, A: Tensor, B: Tensor, s: float) -> Tensor:
    """ops.lora_linear of one dropout, its seed drawn anew where p > 0.

    The seed is drawn on the device of x, whose generator checkpointing puts back before it
    computes again: both times, the mask is the same.
    """
    weight, bias, block_size = base
    if A.dtype not in (x.dtype, torch.float32) or A.dtype != B.dtype:
        A, B = A.float(), B.float()
    seed = torch.randint(2**63 - 1, (), device=x.device) if p > 0 else None
    return ops.lora_linear(x, *weight, bias, block_size, A, B, s, None, p, seed)


def _linear(K: int, N: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """A frozen [N, K] without bias, not initialised.

    Not by `nn.utils.skip_init`: its way through the meta device imports torch's symbolic algebra.
    """
    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = K, N
    linear.weight = nn.Parameter(torch.empty(N, K, device=device, dtype=dtype), False)
    return linear


def _take_plain_keys(layer: LoRALinear, state_dict: dict, prefix: str, *_: object) -> None:
    """Before loading: a plain linear's keys go to `base_layer`, the adapters stay as they are.

    But an adapter that starts from the weight, and its base, are made of the plain weight anew.
    """
    plain = {
        key[len(prefix) :]
        for key in state_dict
        if key.startswith(prefix) and key[len(prefix) :].split(".")[0] not in layer._modules
    }
    moved = {f"base_layer.{name}": state_dict.pop(prefix + name) for name in plain}
    if plain - {"bias"}:
        for adapter, config in layer.config.items():
            if config.starts_from_weight:
                moved |= _start_of(layer, adapter, config, moved, prefix)
                del moved["base_layer.weight"]
    if plain:
        own = layer.state_dict()
        moved = {name: own[name] for name in own if name.startswith("lora_")} | moved
    for name, value in moved.items():
        state_dict.setdefault(prefix + name, value)


def _start_of(
    layer: LoRALinear, adapter: str, config: LoRAConfig, plain: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """The tensors of the base and of the adapter that start from base_layer.weight of `plain`."""
    weight = plain.get("base_layer.weight")
    if weight is None or not weight.is_floating_point():
        raise FileFormatError(
            f"{prefix}weight: expected the original in floats, as adapter {adapter!r} starts with "
            f"a part of it ({config.init_lora_weights!r}); got a quantized one; load the whole "
            "layer's state dict, or the original"
        )
    try:
        storage, A, B = layer._split(adapter, config, weight)
    except (ShapeError, WeightError) as error:
        raise type(error)(f"{prefix}{error}") from error
    base = QuantLinear.from_storage(storage, layer.base_layer.quantizer).state_dict()
    tensors = {f"base_layer.{name}": value for name, value in base.items()}
    return tensors | {f"lora_A.{adapter}.weight": A, f"lora_B.{adapter}.weight": B}
