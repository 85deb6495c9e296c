"""Linear layers whose adapter starts with a part of the weight, and whose base is the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.adapters import initial, lora
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import FileFormatError, ShapeError, WeightError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.held import replaced
from lowrank.nn.quant_linear import QuantLinear, is_conv1d
from lowrank.quant import Storage


class StartedLayer(AdaptedLayer):
    """What LoRALinear does for LoftQ, PiSSA and OLoRA: base + s·B A is near the weight it was."""

    def initialise(self, adapter: str, config: LoRAConfig, weight: Tensor) -> None:
        """Start `adapter` from the original plain `weight` as config.init_lora_weights says.

        The base is made anew, so that base + s·B A is near the weight: a quantized one in its own
        memory, a dense one as another layer. On the meta device nothing is computed; there, loading
        a plain `weight` does the same.
        """
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        rest, *factors = self.split(adapter, config, weight.to(A.device))
        with torch.no_grad():
            self.replace_base(rest)
            for parameter, factor in zip((A, B), factors, strict=True):
                parameter.copy_(factor)
        self.config[adapter] = config
        self.start_magnitude(adapter)

    def replace_base(self, rest: Storage | Tensor) -> None:
        """Let W be another: a Storage of the base's quantizer, or dense [N, K]."""
        base = self.base_layer
        if isinstance(base, QuantLinear):
            base.refill(rest)
        else:
            weight = rest.T.contiguous() if is_conv1d(base) else rest
            self.base_layer = replaced(base, weight=weight)
        self.forget_base()

    def split(
        self, adapter: str, config: LoRAConfig, weight: Tensor
    ) -> tuple[Storage | Tensor, Tensor, Tensor]:
        """What `adapters.initial.split` makes of a plain `weight` for the base and the adapter."""
        self._refuse_if_merged("initialise")
        base, r = self.base_layer, self.r[adapter]
        quantizer = base.quantizer if isinstance(base, QuantLinear) else None
        expected = base.weight.shape if quantizer is None else base.plain_shape
        if weight.shape != expected:
            raise ShapeError(f"weight: expected {list(expected)}; got {list(weight.shape)}")
        if quantizer is not None:
            weight = base.matrix(weight)
        elif is_conv1d(base):
            weight = weight.T
        if weight.is_meta:
            N, K = weight.shape
            rest = weight if quantizer is None else quantizer.quantize(weight)
            return rest, weight.new_empty(r, K), weight.new_empty(N, r)
        s = lora.scaling(r, self.lora_alpha[adapter], config.use_rslora)
        return initial.split(config, weight, quantizer, r, s)

    def started_again(self, plain: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        for adapter, config in self.config.items():
            if config.starts_from_weight:
                made = self._start_of(adapter, config, plain, prefix)
                plain = {n: t for n, t in plain.items() if n != "base_layer.weight"} | made
        return plain

    def _start_of(
        self, adapter: str, config: LoRAConfig, plain: dict[str, Tensor], prefix: str
    ) -> dict[str, Tensor]:
        """What the base and `adapter` are, given the plain base_layer.weight."""
        weight = plain.get("base_layer.weight")
        if weight is None or not weight.is_floating_point():
            raise FileFormatError(
                f"{prefix}weight: expected the original in floats, as adapter {adapter!r} starts "
                f"with a part of it ({config.init_lora_weights!r}); got a quantized one; load the "
                "whole layer's state dict, or the original"
            )
        try:
            rest, A, B = self.split(adapter, config, weight)
        except (ShapeError, WeightError) as error:
            raise type(error)(f"{prefix}{error}") from error
        base = self.base_layer
        if isinstance(base, QuantLinear):
            made = QuantLinear.from_storage(rest, base.quantizer).state_dict()
        else:
            made = {"weight": rest.T if is_conv1d(base) else rest}
        tensors = {f"base_layer.{name}": value for name, value in made.items()}
        return tensors | {f"lora_A.{adapter}.weight": A, f"lora_B.{adapter}.weight": B}
