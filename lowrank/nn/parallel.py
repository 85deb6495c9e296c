"""Tensor parallel styles for quantized and adapted linear layers, as torch has them for nn.Linear.

    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

Each rank has a part of W [N, K]: rows of it, and so a part of y (colwise), or columns, and so a
part of x, whose products add up (rowwise). An adapter is cut with it: beside rows, A is whole and B
has those rows; beside columns, A has those columns and B is whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor import parallel as styles

import lowrank.ops.sharding  # noqa: F401  its rules are what the operators compute by
from lowrank.errors import TargetError
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear

_CODES = 32  # a row's codes are stored in groups of so many
_METHODS = ("lora", "lora_fa")  # whose A and B are all there is


class ColwiseParallel(styles.ColwiseParallel):
    """Each rank has rows of W, as many as torch.chunk gives it, and computes that part of y.

    x is whole on every rank, or a DTensor; y is this rank's part unless `output_layouts` says
    otherwise. TargetError: a layer that cannot be cut, which stays as it was.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear | LoRALinear):
            return super()._apply(module, device_mesh)
        if reason := colwise_refusal(module, device_mesh.size()):
            raise TargetError(f"ColwiseParallel: {reason}")
        return _cut(self, module, device_mesh, 0)


class RowwiseParallel(styles.RowwiseParallel):
    """Each rank has columns of W and that part of x; the products are added up to y.

    x is this rank's part unless `input_layouts` says otherwise; y is whole. Cuts fall between
    blocks. TargetError: a layer that cannot be cut, which stays as it was.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear | LoRALinear):
            return super()._apply(module, device_mesh)
        if reason := rowwise_refusal(module, device_mesh.size()):
            raise TargetError(f"RowwiseParallel: {reason}")
        self.desired_input_layouts = (Shard(-1),)
        return _cut(self, module, device_mesh, 1)


def colwise_refusal(layer: nn.Module, ranks: int) -> str | None:
    """Why `layer` cannot be cut by rows among so many, or None."""
    N = layer.out_features
    if (ranks - 1) * -(-N // ranks) >= N:
        return f"expected a row of W [N={N}, K={layer.in_features}] for each of {ranks} ranks"
    return _refusal(layer)


def rowwise_refusal(layer: nn.Module, ranks: int) -> str | None:
    """Why `layer` cannot be cut by columns among so many, or None."""
    if reason := _refusal(layer):
        return reason
    base, step = _base(layer), 1
    if isinstance(base, QuantLinear):
        step = max(_CODES, base.storage.options["block_size"])
    N, K = layer.out_features, layer.in_features
    if K % (step * ranks):
        return (
            f"W [N={N}, K={K}] in blocks of {step} cannot be cut into {ranks} parts: expected K to "
            f"be a multiple of {step} * {ranks}, so that no cut falls within a block; quantize "
            "with a smaller block_size, or use ColwiseParallel(input_layouts=Shard(-1), "
            "output_layouts=Replicate())"
        )
    return None


def _refusal(layer: nn.Module) -> str | None:
    """Why `layer` cannot be cut at all."""
    base = _base(layer)
    if isinstance(layer, LoRALinear):
        if layer.merged or layer.rows is not None:
            return "expected adapters that are neither merged nor told apart by rows; undo it first"
        for name, config in layer.config.items():
            if config.method not in _METHODS or name in layer.magnitudes:
                kind = "DoRA" if name in layer.magnitudes else config.method
                return f"expected adapters of LoRA or LoRA-FA; adapter {name!r} is of {kind}"
            if layer.spans[name]:
                return f"expected adapters for all of a layer; {name!r} has target_rows"
    if isinstance(base, QuantLinear):
        if getattr(base.quantizer, "codebook_operands", None) is None:
            scheme = base.storage.scheme
            return f"expected 4-bit codes with a table, such as nf4, or dense weights; got {scheme}"
    elif type(base) is not nn.Linear:
        return f"expected an nn.Linear or QuantLinear; got {type(base).__name__}"
    return None


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


def _cut(style: styles.ParallelStyle, layer: nn.Module, mesh: DeviceMesh, dim: int) -> nn.Module:
    """`layer` with its parameters cut along `dim` of W, and DTensors coming in and going out."""

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if module is layer:
            _cut_base(_base(layer), mesh, dim)
            if isinstance(layer, LoRALinear):
                _cut_adapters(layer, mesh, dim)

    def enter(module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        x, *rest = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
        return x.redistribute(placements=style.desired_input_layouts), *rest

    def leave(module: nn.Module, y: DTensor, mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(placements=style.output_layouts)
        return y.to_local() if style.use_local_output else y

    return distribute_module(layer, mesh, partition, enter, leave)


def _cut_base(base: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Of what every rank has whole it keeps its part; nothing is sent."""
    N = base.out_features
    for name, p in base.named_parameters(recurse=False):
        if name == "bias":
            place: Placement = Shard(0) if dim == 0 else Replicate()
        elif name in ("absmax_scale", "codebook") and (dim == 1 or p.shape[0] != N):
            place = Replicate()  # for all columns, or for all rows
        else:
            place = Shard(dim)
        base.register_parameter(name, _part(p, mesh, place))


def _cut_adapters(layer: LoRALinear, mesh: DeviceMesh, dim: int) -> None:
    """The first rank's adapters, each rank its part: they may begin with other random numbers."""
    layer.at_hand = None  # what was found before is of whole tensors
    for adapter in layer.config:
        for held, cut in ((layer.lora_A[adapter], 1), (layer.lora_B[adapter], 0)):
            dist.broadcast(held.weight.detach(), group_src=0, group=mesh.get_group())
            part = _part(held.weight, mesh, Shard(dim) if cut == dim else Replicate())
            part.register_hook(_as_held(part.placements))
            held.register_parameter("weight", part)


def _as_held(placements: Sequence[Placement]):
    """What the ranks' parts of a sum make together, for a parameter that each of them has whole."""

    def reduced(gradient: DTensor) -> DTensor:
        return gradient.redistribute(placements=placements)

    return reduced


def _part(p: nn.Parameter, mesh: DeviceMesh, place: Placement) -> nn.Parameter:
    local = p.detach()
    if isinstance(place, Shard):
        local = local.chunk(mesh.size(), place.dim)[mesh.get_local_rank()].clone()
    whole = DTensor.from_local(
        local, mesh, (place,), run_check=False, shape=p.shape, stride=p.stride()
    )
    return nn.Parameter(whole, requires_grad=p.requires_grad)
