"""A decoder whose blocks are cut among several ranks: tensor parallel."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lowrank.errors import TargetError
from lowrank.models.attention import Attention
from lowrank.models.blocks import MLP, ParallelBlock
from lowrank.models.decoder import Decoder
from lowrank.models.experts import Mixture
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.parallel import ColwiseParallel, RowwiseParallel, colwise_refusal, rowwise_refusal
from lowrank.nn.quant_linear import QuantLinear
from lowrank.optim.shards import is_sharded


def tensor_parallel(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Let each rank of `mesh` have its share of every block's heads and hidden units, in place.

    Every rank has the whole model, quantized and with its adapters; it keeps its part. Embedding,
    norms and head stay whole. A last projection whose blocks do not fall on the cuts is cut by rows
    instead: its input is gathered first. TargetError says what cannot be cut, and nothing then is.
    What is cut is trained and evaluated; it does not generate.

    Shoeybi et al., arXiv:1909.08053.
    """
    if any(map(is_sharded, model.parameters())) or model.unread or model.placement:
        raise TargetError(
            "tensor_parallel: expected a model that lies whole in one place; got one that is cut, "
            "still to be read, or in part on the host; load it without sharded and weights_budget"
        )
    ranks, styles = mesh.size(), {}
    heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
    if any(count % ranks for count in heads):
        raise TargetError(
            f"tensor_parallel: expected heads, {heads[0]} and {heads[1]} of keys and values, to be "
            f"shared out evenly among {ranks} ranks; use as many as divide both"
        )
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            first = (module.q, module.k, module.v) if module.qkv is None else (module.qkv,)
            last = module.out
            if module.qkv is not None and not module.by_head:
                raise TargetError(_joined(name, "queries, keys and values"))
            norms = [n for n in (module.q_norm, module.k_norm) if n is not None]
            if any(p.requires_grad for norm in norms for p in norm.parameters()):
                raise TargetError(f"tensor_parallel: {name}: expected norms that are not trained")
        elif isinstance(module, MLP):
            first = tuple(layer for layer in (module.gate, module.up) if layer is not None)
            last = module.down
            if module.gate_up is not None:
                raise TargetError(_joined(name, "gate and up"))
        elif isinstance(module, Mixture):
            raise TargetError(f"tensor_parallel: {name}: mixtures of experts are not cut")
        else:
            continue
        for layer in first:
            styles[layer] = _colwise(name, layer, ranks, None)
        styles[last] = _last(name, last, ranks)
    for layer, style in styles.items():
        parallelize_module(layer, mesh, style)
    for block in model.body.blocks:
        if not isinstance(block, ParallelBlock):
            for norm in (block.attention_norm, block.mlp_norm):
                norm.register_forward_hook(_one_for_all(mesh))
    model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return model


def _without_cache(model: Decoder, args: tuple, options: dict) -> None:
    if options.get("cache") is not None:
        raise TargetError(
            "tensor_parallel: expected no cache, whose heads are those of a whole model; generate "
            "with one that is not cut"
        )


def _one_for_all(mesh: DeviceMesh) -> Callable[..., DTensor]:
    """What several layers read, one DTensor: their gradients are added up, then sent once."""
    return lambda norm, inputs, y: DTensor.from_local(y, mesh, (Replicate(),), run_check=False)


def _last(name: str, layer: nn.Module, ranks: int) -> ParallelStyle:
    """How a projection of what the others made of x is cut."""
    if _is_plain(layer) or rowwise_refusal(layer, ranks) is None:
        return RowwiseParallel()
    return _colwise(name, layer, ranks, Shard(-1))


def _colwise(name: str, layer: nn.Module, ranks: int, of_x: Shard | None) -> ParallelStyle:
    if not _is_plain(layer) and (reason := colwise_refusal(layer, ranks)):
        raise TargetError(f"tensor_parallel: {name}: {reason}")
    if of_x is None:
        return ColwiseParallel()
    return ColwiseParallel(input_layouts=of_x, output_layouts=Replicate())


def _is_plain(layer: nn.Module) -> bool:
    return not isinstance(layer, QuantLinear | LoRALinear)


def _joined(name: str, what: str) -> str:
    return (
        f"tensor_parallel: {name} has {what} in one layer, whose rows torch.chunk would cut across "
        "them: such families are not cut"
    )
