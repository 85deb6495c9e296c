"""The model that would be trained, on the meta device: every parameter, and none of its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_weight import QuantWeight
from lowrank.quant import Quantizer, Storage
from lowrank.surgery import inject, quantize

PACKED, SCALES, DENSE = "packed weights", "scales", "dense weights"
EMBEDDINGS, ADAPTERS = "embeddings", "adapters"


def build(
    config: DecoderConfig,
    lora: LoRAConfig | None,
    quantizer: Quantizer | None,
    dtype: torch.dtype,
    skip: Iterable[str],
    embeddings: bool,
) -> nn.Module:
    """What `load_model` and `inject` would make; without `lora`, all of it trains."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype)
    if quantizer is not None:
        quantize(model, quantizer, skip=skip, embeddings=embeddings)
    if lora is None:
        model.requires_grad_(True)
    else:
        inject(model, lora.with_fresh_start())
    return model.train()


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that a step changes."""
    return [p for p in model.parameters() if p.requires_grad]


def held(model: nn.Module) -> Counter[str]:
    """Bytes of the parameters and buffers, by what they are; what is shared counts once."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for name, module in model.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        largest = max((t.nbytes for _, t in tensors if t is not None), default=0)
        for _, tensor in tensors:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            found[_kind(name, module, tensor, largest)] += tensor.nbytes
    return found


def blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of the decoder's blocks, whatever its family calls it."""
    return next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )


def are_alike(some: nn.ModuleList) -> bool:
    """Whether all blocks have parameters of the same names, shapes and kinds."""
    signatures = {
        tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
        for block in some
    }
    return len(signatures) == 1


def stand_in(model: nn.Module) -> None:
    """Let quantized layers that have no operator of their own return results without decoding.

    They decode some rows at a time where there are values; on the meta device, all at once.
    """
    for module in model.modules():
        if isinstance(module, QuantWeight) and not hasattr(module.quantizer, "linear"):
            module.quantizer = _Undecoded(module.quantizer)


class _Undecoded:
    """A quantizer whose `linear` returns an empty y, and an empty dx."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.row_local = getattr(quantizer, "row_local", False)
        self.quantize, self.dequantize = quantizer.quantize, quantizer.dequantize

    def linear(self, x: Tensor, storage: Storage, bias: Tensor | None = None) -> Tensor:
        return _Product.apply(x, bias, storage.shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, N: int) -> Tensor:
        ctx.shape, ctx.bias = x.shape, bias is not None
        return x.new_empty(*x.shape[:-1], N)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dbias = dy.new_empty(dy.shape[-1]) if ctx.needs_input_grad[1] else None
        return dy.new_empty(ctx.shape), dbias, None


def _kind(name: str, module: nn.Module, tensor: Tensor, largest: int) -> str:
    if isinstance(module, nn.Embedding | QuantEmbedding):
        return EMBEDDINGS
    if isinstance(module, QuantWeight) and not tensor.is_floating_point():
        return PACKED if tensor.nbytes == largest else SCALES
    if ".lora_" in name or ".modules_to_save" in name or "trainable_tokens" in name:
        return ADAPTERS
    return DENSE
