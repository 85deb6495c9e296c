"""How much memory a training run takes, by component, before anything of the model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.models.config import DecoderConfig
from lowrank.nn.quant_weight import quant_weights, resolve
from lowrank.ops.checks import check_float, check_sizes
from lowrank.plan import model as models
from lowrank.plan.cards import Card
from lowrank.plan.optimizers import KINDS, optimizer_state
from lowrank.plan.source import Stored, read_config
from lowrank.plan.step import backward_peaks, reading_peak, scratch
from lowrank.plan.trace import ACTIVATIONS, GRADIENTS, LOGITS, WORKSPACE
from lowrank.quant import Quantizer

OPTIMIZER, RUNTIME = "optimizer", "runtime"
COMPONENTS = (
    models.PACKED, models.SCALES, models.DENSE, models.EMBEDDINGS, models.ADAPTERS, GRADIENTS,
    OPTIMIZER, ACTIVATIONS, LOGITS, WORKSPACE, RUNTIME,
)  # fmt: skip

# Beside tensors: Python, torch and our library in host memory; a CUDA context and cuBLAS on a GPU
_RUNTIME = {"cpu": 285 << 20, "cuda": 600 << 20}
_WRITING = {"cpu": 240 << 20, "cuda": 600 << 20}  # the same where nothing trains


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told, as far as it matters for memory; names are those of TrainConfig.

    Without `lora` all parameters train. Raises ConfigError for what no run could be told.
    """

    lora: LoRAConfig | None = None
    quantizer: Quantizer | None = None
    embeddings: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    dtype: torch.dtype = torch.float32
    per_device_train_batch_size: int = 8
    max_length: int = 1024
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool | str = False
    optim: str = "adamw_torch"
    device_budget: int | None = None
    device: str = "cuda"
    devices: int = 1

    def __post_init__(self) -> None:
        check_float("dtype", self.dtype)
        check_sizes(
            per_device_train_batch_size=self.per_device_train_batch_size,
            max_length=self.max_length,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            devices=self.devices,
        )
        if self.kind not in _RUNTIME:
            raise ConfigError(f"device: expected cpu or cuda; got {self.device!r}")
        if self.gradient_checkpointing not in (True, False, "selective"):
            raise ConfigError(
                f"gradient_checkpointing: expected True, False or 'selective'; "
                f"got {self.gradient_checkpointing!r}"
            )
        if self.max_length < 2:
            raise ConfigError(
                f"max_length: expected at least 2, a token and its next; got {self.max_length}"
            )
        if self.embeddings and self.quantizer is None:
            raise ConfigError("embeddings: belongs to a quantizer; got True without one")
        if self.optim not in KINDS:
            raise ConfigError(f"optim: expected one of {', '.join(KINDS)}; got {self.optim!r}")

    @property
    def kind(self) -> str:
        """Of the device: cpu or cuda."""
        return str(self.device).partition(":")[0]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    components: {what: bytes} of COMPONENTS when training takes the most.
    loading: what is taken at most while the weights stream in.
    elsewhere: states of a paged optimizer in host memory or in a file.
    parameters, trainable: numbers of the whole model.
    """

    components: dict[str, int]
    loading: int
    elsewhere: int
    parameters: int
    trainable: int
    settings: Settings
    count_writing: Callable[[], int] = field(repr=False, compare=False)

    @property
    def training(self) -> int:
        """The sum of the components."""
        return sum(self.components.values())

    @property
    def peak(self) -> int:
        """Bytes on each device at most, of training and of loading."""
        return max(self.loading, self.training)

    @cached_property
    def writing(self) -> int:
        """Bytes at most where nothing trains, and one device writes texts.

        As many as are in a batch, each of `max_length` tokens with its prompt.
        """
        return self.count_writing()

    def __getstate__(self) -> dict[str, Any]:
        """For a pickle, which takes the count and not what counts."""
        return vars(self) | {"writing": self.writing, "count_writing": None}

    def fits(self, card: Card) -> bool:
        """Whether the run finds room on such a card."""
        return self.peak <= card.total


class Planner:
    """Plans of one model under changing settings; what does not change is found once."""

    def __init__(self, config: DecoderConfig, stored: Stored | None = None) -> None:
        self.config, self._stored = config, stored
        self._built: dict[str, tuple[nn.Module, Counter[str]]] = {}
        self._plans: dict[str, MemoryPlan] = {}

    @classmethod
    def of(
        cls,
        model: str | Path | Mapping[str, Any] | DecoderConfig,
        revision: str | None = None,
        token: str | None = None,
    ) -> Planner:
        """Of a directory, a hub repository, a config.json's content, or a DecoderConfig."""
        return cls(*read_config(model, revision, token))

    def settings(self, given: Settings) -> Settings:
        """What a run of this model makes of those `given`.

        Examples are cut at the model's positions, and what is quantized already stays so.
        """
        length = min(given.max_length, max(2, self.config.max_position_embeddings))
        settings = replace(given, max_length=length)
        if self._stored is None or given.quantizer is not None:
            return settings
        if self._stored.quantizer is None:
            raise ConfigError(
                "quantizer: expected that of the model, which is quantized already, and whose "
                "config.json does not name it; got none"
            )
        return replace(settings, **self._stored._asdict())

    def plan(self, settings: Settings) -> MemoryPlan:
        """What a run with these settings takes."""
        settings = self.settings(settings)
        key = repr((_named(settings.quantizer), {**vars(settings), "quantizer": None}))
        if key not in self._plans:
            self._plans[key] = self._plan(settings)
        return self._plans[key]

    def _plan(self, s: Settings) -> MemoryPlan:
        model, held = self._model(s)
        config, parameters = self.config, models.trained(model)
        state = optimizer_state(s.optim, parameters, s.device_budget)
        peaks = backward_peaks(
            model,
            config.num_hidden_layers,
            batch_size=s.per_device_train_batch_size,
            length=s.max_length,
            checkpointing=s.gradient_checkpointing,
            accumulates=s.gradient_accumulation_steps > 1,
            device=s.kind,
        )
        gradients = sum(p.nbytes for p in parameters)
        peaks.append(Counter({GRADIENTS: gradients, WORKSPACE: state.step}))
        most = max(peaks, key=lambda peak: sum(peak.values()))
        room = scratch(model, s.dtype, s.kind)
        shared = Counter(held) + Counter({OPTIMIZER: state.device, GRADIENTS: most[GRADIENTS]})
        own = {k: most[k] for k in (ACTIVATIONS, LOGITS, WORKSPACE)}
        own[WORKSPACE] += room
        if s.devices > 1:
            shared = Counter({k: -(-n // s.devices) for k, n in shared.items()})
            own[WORKSPACE] += _gathered(model, config.num_hidden_layers)
        bytes_of = shared + Counter(own) + Counter({RUNTIME: _RUNTIME[s.kind]})
        loading = -(-sum(held.values()) // s.devices) + _RUNTIME[s.kind]
        loading += 2 * _largest(model, s.dtype)

        def writing() -> int:
            batch = s.per_device_train_batch_size, s.max_length
            reading = reading_peak(model, config.num_hidden_layers, *batch, s.dtype, s.kind)
            return sum(held.values()) + reading + room + _WRITING[s.kind]

        return MemoryPlan(
            components={name: bytes_of[name] for name in COMPONENTS},
            loading=loading,
            elsewhere=-(-state.elsewhere // s.devices),
            parameters=_count(model),
            trainable=sum(p.numel() for p in parameters),
            settings=s,
            count_writing=writing,
        )

    def _model(self, s: Settings) -> tuple[nn.Module, Counter[str]]:
        key = repr((s.lora, _named(s.quantizer), s.embeddings, s.skip, s.dtype))
        if key not in self._built:
            model = models.build(self.config, s.lora, s.quantizer, s.dtype, s.skip, s.embeddings)
            held = models.held(model)
            models.stand_in(model)
            self._built[key] = model, held
        return self._built[key]


def plan_memory(
    model: str | Path | Mapping[str, Any] | DecoderConfig,
    lora: LoRAConfig | None = None,
    *,
    quantizer: str | Quantizer | None = None,
    embeddings: bool = False,
    skip: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.float32,
    per_device_train_batch_size: int = 8,
    max_length: int = 1024,
    gradient_accumulation_steps: int = 1,
    gradient_checkpointing: bool | str = False,
    optim: str = "adamw_torch",
    device_budget: int | None = None,
    device: str = "cuda",
    devices: int = 1,
    revision: str | None = None,
    token: str | None = None,
) -> MemoryPlan:
    """The memory that training takes at most, from the model's configuration alone.

    `model` is a directory, a hub repository, of which config.json is fetched, a config.json's
    content, or a DecoderConfig. `lora` None trains all parameters. The rest is as for `load_model`
    and TrainConfig; batches are full, of `max_length` tokens that all have labels. `devices` share
    weights, gradients and states, as fully sharded training does, with a batch each: computed, not
    measured, as is all on a GPU; on a CPU the peak is within 10 % of what is measured.

    The decoder runs forward and backward on the meta device while its storages are counted.
    Raises ConfigError for what no run could be told.
    """
    settings = Settings(
        lora=lora,
        quantizer=None if quantizer is None else resolve(quantizer),
        embeddings=embeddings,
        skip=tuple(skip),
        dtype=dtype,
        per_device_train_batch_size=per_device_train_batch_size,
        max_length=max_length,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        optim=optim,
        device_budget=device_budget,
        device=device,
        devices=devices,
    )
    return Planner.of(model, revision, token).plan(settings)


def _named(quantizer: Quantizer | None) -> str:
    """What tells quantizers apart."""
    return "" if quantizer is None else f"{type(quantizer).__qualname__} {vars(quantizer)}"


def _gathered(model: nn.Module, layers: int) -> int:
    """Bytes that are whole on every device at a time: two blocks, and what is outside of blocks."""
    blocks = [list(block.parameters()) for block in models.blocks(model, layers)]
    inside = {id(p) for block in blocks for p in block}
    outside = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return outside + 2 * max(sum(p.nbytes for p in block) for block in blocks)


def _largest(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest tensor before it is quantized."""
    dense = [p.nbytes for p in model.parameters() if p.is_floating_point()]
    packed = [w.matrix_shape for w in quant_weights(model).values()]
    return max([*dense, *(N * K * dtype.itemsize for N, K in packed)])


def _count(model: nn.Module) -> int:
    """Parameters of the model, those that are quantized too."""
    weights = quant_weights(model).values()
    quantized = {id(p) for w in weights for p in w.parameters() if not p.is_floating_point()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in quantized)
    return dense + sum(N * K for N, K in (w.matrix_shape for w in weights))
