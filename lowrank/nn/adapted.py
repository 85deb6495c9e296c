"""What every layer with adapters shares, whatever kind of layer it is around."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters import lora, registry
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.held import Held
from lowrank.nn.in_files import InFiles
from lowrank.nn.quant_weight import QuantWeight
from lowrank.nn.rescaled import RescaledLayer
from lowrank.nn.rows import Rows
from lowrank.nn.small import AtHand
from lowrank.nn.with_base import parameters_of
from lowrank.quant import Quantizer


class AdaptedLayer(RescaledLayer, InFiles):
    """A frozen `base_layer` with adapters beside it; the weight of the base is read as W [N, K].

    A kind of layer says what it is for (`check`), what (B A) does to x (`low_rank`), how its base
    is read as a matrix (`matrix`) and made of one again (`plain`), and N and K (`matrix_shape_of`).

    What is trained lies under the names of the adapter's method, then the adapter's own:
    `lora_A[adapter].weight`, `lora_B[adapter].weight`, as in PEFT. `scaling[adapter]` is s.
    Adapters are float32 over a 16-bit or quantized base, else of the base's dtype. Several that are
    active add up, each with its own ΔW to the same base: s·B A, or for one with a magnitude (DoRA)
    g ∘ (W + s·B A) - W with a gain g [N] for each row.

    A state dict of the plain layer (`weight`, `bias`, or a quantized layer's tensors) loads into
    `base_layer`, strict too.
    """

    takes_rows = True  # whether adapter_rows can tell apart what comes to it: x is [rows, ...]
    is_linear = False  # only then is an adapter for some outputs, or starts from the weight

    config: dict[str, LoRAConfig]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    rows: Rows | None  # of adapter_rows, in place of what is active
    at_hand: AtHand | None
    spans: dict[str, list[tuple[int, int]]]  # of N, those that an adapter is for
    _parts: dict[str, tuple[str, ...]]  # names of what the adapter's method trains
    _shared: dict[str, dict[str, Tensor]]  # what `factors` takes beside its tensors

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        vars(self).update(  # nn.Module's way to set each of them costs more than all of this
            config={}, r={}, lora_alpha={}, active_adapters=[], disabled=False, rows=None,
            at_hand=None, spans={}, _parts={}, _shared={},
        )  # fmt: skip
        for parameter in parameters_of(base):
            parameter.requires_grad_(False)
        tables = {name: nn.ModuleDict() for name in ("lora_dropout", "lora_A", "lora_B")}
        self._modules.update(base_layer=base, **tables)

    @classmethod
    def wrap(
        cls,
        base: nn.Module,
        config: LoRAConfig,
        adapter: str = "default",
        name: str = "",
        quantizer: str | Quantizer | None = None,
    ) -> AdaptedLayer:
        """The same layer with an adapter; `base` becomes `base_layer` and is frozen.

        `name` is the layer's name in its model, for the config's rank_pattern and alpha_pattern. A
        `quantizer` is for linear layers. Raises TargetError, ConfigError: `check` says which.
        """
        cls.check(base, config, name)
        if quantizer is not None:
            raise ConfigError(
                f"quantizer: expected None, {cls.__name__} is not linear; got {quantizer!r}; call "
                "lowrank.quantize first"
            )
        layer = cls(base)
        layer.add_adapter(adapter, config, name)
        layer.set_adapter([adapter])
        return layer.train(base.training)

    @classmethod
    def check(cls, base: nn.Module, config: LoRAConfig, name: str) -> None:
        """Raises TargetError if `base` is not what this kind is for, ConfigError for the config."""
        if not isinstance(config, LoRAConfig):
            raise ConfigError(f"config: expected a LoRAConfig; got {type(config).__name__}")
        if not cls.is_linear and (config.spans(name) or config.starts_from_weight):
            start, kind = f"init_lora_weights={config.init_lora_weights!r}", type(base).__name__
            field = "target_rows" if config.spans(name) else start
            raise ConfigError(f"{field}: expected linear layers; {name or 'the layer'} is {kind}")
        if isinstance(base, AdaptedLayer):
            raise TargetError(
                f"{name or 'wrap'}: expected a layer without adapters; got {type(base).__name__}"
            )

    def plain(self, matrix: Tensor) -> nn.Module:
        """A layer without adapters, frozen, like the unmerged base but with W = `matrix`."""
        raise NotImplementedError

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the base's weight, or the one it had before quantization."""
        base = self.unmerged_base
        return base.weight_dtype if isinstance(base, QuantWeight) else base.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The weight of a dense base layer, as code written for that layer expects it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return getattr(self.base_layer, "bias", None)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What the layer would give for x if its matrix were B A, and it had no bias."""
        return F.linear(F.linear(x.to(A.dtype), A), B)

    def over_rows(self, values: Tensor) -> Tensor:
        """Values [N], one for each row of W, in a shape to multiply what the layer returns by."""
        return values

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.unmerged_base(x)
        if self.merged:
            return self.base_layer(x)
        return self.compute(x, self.active_adapters) if self.rows is None else self.by_rows(x)

    def by_rows(self, x: Tensor) -> Tensor:
        """What each row of x [rows, ...] gives with its own adapter: a part of them at a time."""
        parts = self.rows.parts(self.config, x)
        y = torch.cat([self.compute(x[rows], adapters) for adapters, rows in parts])
        return y[torch.cat([rows for _, rows in parts]).argsort()]

    def compute(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """What x gives with these adapters."""
        y = whole = self.base_layer(x)
        for adapter in adapters:
            (A, B), s, g = self.factors(adapter), self.scaling[adapter], self.gain(adapter)
            z = self.dropped(adapter, x)
            if g is not None:
                w = whole if z is x else self.base_layer(z)
                w = w if self.bias is None else w - self.over_rows(self.bias)
                y, B = y + self.over_rows(g - 1) * w, g[:, None] * B
            y = (y + s * self.low_rank(z, A, B)).to(whole.dtype)
        return y

    def dropped(self, adapter: str, x: Tensor) -> Tensor:
        """x as it comes to the adapter; x itself if nothing is dropped."""
        dropout = self.lora_dropout[adapter]
        return dropout(x) if dropout.training else x

    def init_(self, tensors: dict[str, Tensor], config: LoRAConfig) -> None:
        """Fill a fresh adapter's tensors in place."""
        registry.get(config.method).init_(tensors, config)

    def add_adapter(self, adapter: str, config: LoRAConfig, name: str = "") -> None:
        """Add an inactive adapter as `config` says; `name` is this layer's name in its model."""
        if adapter in self.config:
            raise ConfigError(
                f"adapter: {adapter!r} is already there; delete it first or choose another name"
            )
        check_name(adapter)
        self._refuse_if_merged("add_adapter")
        if self.config:  # the first one's is what `wrap` checked
            self.check(self.base_layer, config, name)
        if config.starts_from_weight:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r}: changes the base, so it is for a "
                "first adapter only: LoRALinear.wrap(linear, config, quantizer=...)"
            )
        weight, dtype = parameters_of(self.base_layer)[0], torch.float32
        if weight.is_floating_point():
            dtype = torch.promote_types(weight.dtype, dtype)
        device = getattr(weight, "computes_on", weight.device)  # of a weight that comes and goes
        tensors = {
            part: torch.empty(shape, dtype=dtype, device=device)
            for part, shape in self.part_shapes(self.base_layer, config, name).items()
        }
        self.init_(tensors, config)
        for part, tensor in tensors.items():
            if part not in self._modules:
                self.add_module(part, nn.ModuleDict())
            self._modules[part][adapter] = Held(tensor)
        p = config.lora_dropout
        self.lora_dropout[adapter] = nn.Dropout(p) if p > 0 else nn.Identity()  # as in PEFT
        _tell_mode(self.lora_dropout, self.training)
        self.config[adapter], self.r[adapter] = config, config.rank(name)
        self.spans[adapter] = config.spans(name)
        self._parts[adapter] = tuple(tensors)
        self._share(adapter)
        self.lora_alpha[adapter] = config.alpha(name)
        self.scale_adapter(adapter, 1.0)
        if hasattr(self.method(adapter), "magnitude"):
            if not self.magnitudes:
                self.register_load_state_dict_post_hook(_start_noted)
            self.magnitudes[adapter] = self.method(adapter).magnitude
            self.start_magnitude(adapter)

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """What the adapter has here, by the names of its method: lora_A, lora_B."""
        return {part: self._modules[part][adapter].weight for part in self._parts[adapter]}

    def method(self, adapter: str) -> registry.Method:
        """The kind of adapter it is."""
        return registry.get(self.config[adapter].method)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(A [R, K], B [N, R]) of ΔW = s·B A."""
        return self.method(adapter).factors(self.tensors(adapter) | self._shared[adapter])

    def _share(self, adapter: str) -> None:
        """Find what the adapter's method shares among layers, on the device that this one is on."""
        method, self._shared[adapter] = self.method(adapter), {}
        if hasattr(method, "shared"):
            device = next(iter(self.tensors(adapter).values())).device
            self._shared[adapter] = method.shared(*self.matrix_shape, self.r[adapter], device)

    def set_adapter(self, adapters: Iterable[str]) -> None:
        """Make these, as far as they are here, active: they add up, and only they train."""
        self._refuse_if_merged("set_adapter")
        before, self.active_adapters = (
            self.active_adapters,
            [a for a in adapters if a in self.config],
        )
        for adapter in {*before, *self.active_adapters}:  # the others are idle, and frozen, as ever
            trains = adapter in self.active_adapters and not self.config[adapter].inference_mode
            frozen = getattr(self.method(adapter), "frozen", ())
            for part in self._parts[adapter]:
                for parameter in self._modules[part][adapter]._parameters.values():
                    parameter.requires_grad_(trains and part not in frozen)

    def scale_adapter(self, adapter: str, factor: float) -> None:
        """s = factor · alpha / R (sqrt(R) if rank-stabilized); never cumulative."""
        self._refuse_if_merged("scale_adapter")
        rslora = self.config[adapter].use_rslora
        self.scaling[adapter] = factor * lora.scaling(
            self.r[adapter], self.lora_alpha[adapter], rslora
        )
        self.forget_norms(adapter)

    def delete_adapter(self, adapter: str) -> None:
        """Forget an adapter, if it is here."""
        self._refuse_if_merged("delete_adapter")
        if adapter in self.config:
            for part in (*self.tensors(adapter), "lora_dropout"):
                del self._modules[part][adapter]
            for table in (
                self.config, self.r, self.spans, self._parts, self.lora_alpha, self.scaling,
                self._shared, self.magnitudes,
            ):  # fmt: skip
                table.pop(adapter, None)
            self.forget_norms(adapter)
            self.active_adapters = [a for a in self.active_adapters if a != adapter]
            self.at_hand = None

    def merge(
        self, adapters: Iterable[str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Fold adapters (None: the active ones) into a plain base layer, the old one kept aside.

        `dtype` of the merged weight: None means the base's, which for a quantized base is the dtype
        its weight had before quantization. Quantizing again would round the adapter away.
        """
        self.stand_in(self.plain(self.merged_matrix(adapters, dtype or self.weight_dtype)))

    @torch.no_grad()
    def merged_matrix(self, adapters: Iterable[str] | None, dtype: torch.dtype) -> Tensor:
        """W + ΣΔW [N, K] of the adapters (None: the active ones), rounded once to `dtype`.

        Raises WeightError if it is not finite.
        """
        self._refuse_if_merged("merge")
        chosen = [
            a for a in (self.active_adapters if adapters is None else adapters) if a in self.config
        ]
        weight = self.matrix(torch.promote_types(dtype, torch.float32))
        G, branches = self.changed(chosen)
        weight = weight if G is None else weight * G[:, None].to(weight.dtype)
        return lora.merged_weight(weight, branches, dtype)

    def started_again(self, plain: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """What a plain layer's tensors become, by the names of this layer's state dict.

        Where an adapter starts from the weight, `plain` is made into its base and itself anew.
        """
        return plain

    def _refuse_if_merged(self, what: str) -> None:
        if self.merged:
            raise ConfigError(
                f"{what}: expected unmerged layers; the adapters are merged: call unmerge first"
            )

    def train(self, mode: bool = True) -> AdaptedLayer:
        """As of any module; the six in which a layer holds its adapter are only told the mode."""
        vars(self)["training"] = mode
        for child in self._modules.values():
            if type(child) is nn.ModuleDict:
                _tell_mode(child, mode)
            else:
                child.train(mode)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        """A plain layer's keys go to `base_layer`, the adapters stay as they are.

        But an adapter that starts from the weight, and its base, are made of the plain weight anew,
        and a magnitude that nobody has trained yet is that of the new weight.
        """
        self.forget_base()
        plain = {
            key[len(prefix) :]
            for key in state_dict
            if key.startswith(prefix) and key[len(prefix) :].split(".")[0] not in self._modules
        }
        moved = {f"base_layer.{name}": state_dict.pop(prefix + name) for name in plain}
        if plain - {"bias"}:
            keys = {a: f"{prefix}{part}.{a}.weight" for a, part in self.magnitudes.items()}
            self.note_starts([adapter for adapter, key in keys.items() if key in state_dict])
            moved = self.started_again(moved, prefix)
        if plain:
            own = self.state_dict()
            moved = {name: own[name] for name in own if not name.startswith("base_layer.")} | moved
        for name, value in moved.items():
            state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable, recurse: bool = True) -> AdaptedLayer:
        self.at_hand = None
        self.forget_base()
        super()._apply(fn, recurse)
        for adapter in self.config:
            self._share(adapter)
        return self


def check_name(adapter: str) -> None:
    """Raises ConfigError for what cannot be the name of an adapter."""
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise ConfigError(f"adapter: expected a name without dots; got {adapter!r}")
    if "/" in adapter or "\\" in adapter:  # save_adapter makes a folder of that name
        raise ConfigError(f"adapter: expected a name without slashes; got {adapter!r}")


def _tell_mode(module: nn.Module, training: bool) -> None:
    vars(module)["training"] = training
    for child in module._modules.values():
        _tell_mode(child, training)


def _start_noted(layer: AdaptedLayer, _: object) -> None:
    layer.start_noted()
