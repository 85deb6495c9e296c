"""One side's linear layer over one weight, made and called as its package's own users would."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers


@dataclass
class Layer:
    """A linear layer of `name` for activations of `dtype`.

    `exact()` decodes what its stored weight stands for, [N, K] in float64; `stored_bytes` is what
    a product must read. An inexact result is an error where `checked` (ours), else a number to
    print (a peer's).
    """

    name: str
    module: nn.Module
    dtype: torch.dtype
    shape: tuple[int, int]
    exact: Callable[[], Tensor]
    stored_bytes: int
    checked: bool = False

    def copies(self, count: int) -> list[nn.Module]:
        """`count` modules with memory of their own."""
        return [self.module, *(copy.deepcopy(self.module) for _ in range(count - 1))]


def dense_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """nn.Linear over the unquantized weight in `dtype`."""
    module = nn.Linear(1, 1, bias=False)
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    held = module.weight
    return Layer("torch", module, dtype, weight.shape, held.double, held.nbytes)


def lowrank_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """lowrank.QuantLinear, NF4 with double quantization."""
    import lowrank

    linear = nn.Linear(1, 1, bias=False)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    module = lowrank.QuantLinear.from_linear(linear, peers.lowrank_quantizer())
    storage = module.storage
    return _over(storage, "lowrank", module, dtype)


def dequantize_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """Our dequantization into a new tensor, then torch's matmul; a backward finds it kept."""
    storage = peers.lowrank_quantizer().quantize(weight)
    return _over(storage, "dequantize", Decoding(storage, dequantized_linear), dtype)


def compiled_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """Decoding and matmul in plain torch, in one graph of torch.compile's."""
    storage = peers.lowrank_quantizer().quantize(weight)
    module = Decoding(storage, peers.compiled(plain_linear))
    return replace(_over(storage, "compile", module, dtype), checked=False)


class Decoding(nn.Module):
    """A quantized weight whose product is `product(x, packed, absmax, absmax_scale, codebook)`."""

    def __init__(self, storage, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operands = peers.operands(storage)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, *self.operands)


def dequantized_linear(x: Tensor, *operands: Tensor) -> Tensor:
    """y = x Wᵀ, W written to memory by our dequantization in the dtype of x."""
    from lowrank import ops

    weight = ops.codebook_dequantize(*operands, x.shape[-1], peers.BLOCK_SIZE, x.dtype)
    return F.linear(x, weight)


def plain_linear(x: Tensor, *operands: Tensor) -> Tensor:
    """y = x Wᵀ of `plain_weight`."""
    return F.linear(x, plain_weight(*operands, x.dtype))


def plain_weight(
    packed: Tensor, absmax: Tensor, absmax_scale: Tensor, codebook: Tensor, dtype: torch.dtype
) -> Tensor:
    """w[n, k] = codebook[code[n, k]] · (absmax[n, k // G] · step[n] + offset[n])  [N, K], rounded
    once to `dtype`; whole blocks only.

    What the reference computes, without the panels and lookups by pairs that make it fast: a
    compiler is to find its own way.
    """
    codes = torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten(1)  # [N, K]
    step, offset = absmax_scale.split(1, dim=1)  # [N, 1] each
    blocks = codebook[0][codes.int()].unflatten(1, (-1, peers.BLOCK_SIZE))
    return (blocks * (absmax.float() * step + offset)[:, :, None]).flatten(1).to(dtype)


def refusal(name: str, N: int, K: int) -> str | None:
    """Why a side cannot hold a weight of this shape, or None."""
    if name == "compile" and K % peers.BLOCK_SIZE:
        return (
            f"compile takes K of a multiple of {peers.BLOCK_SIZE}: where a slice follows the "
            "decoding, torch 2.13 compiles code whose results are wrong"
        )
    group = peers.BLOCK_SIZE * peers.TORCHAO_GROUP
    if name == "torchao" and N * K % group:
        return f"torchao takes weights of a multiple of {group} elements"
    return None


def bitsandbytes_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """bitsandbytes' Linear4bit, NF4 with double quantization (its compress_statistics)."""
    bnb = peers.bitsandbytes()
    N, K = weight.shape
    options = {"quant_type": "nf4", "compress_statistics": True}
    module = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, **options)
    module.weight = bnb.nn.Params4bit(
        weight.to(dtype, copy=True), requires_grad=False, **options, module=module
    ).to(weight.device)
    if os.environ.get("LOWRANK_ISA"):
        # the instruction set that everybody is restricted to lacks it
        module.support_avx512bf16_for_cpu = False
    held = peers.bitsandbytes_tensors(module.weight.data, module.weight.quant_state)
    held = tuple(t.clone() for t in held)  # before the module rearranges them at its first call
    stored = sum(t.nbytes for t in held)
    return Layer(
        "bitsandbytes",
        module,
        dtype,
        weight.shape,
        lambda: peers.exact_bitsandbytes(held, weight.shape),
        stored,
    )


def torchao_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """nn.Linear over torchao's NF4Tensor, which is always double-quantized."""
    held = peers.torchao_nf4(weight.to(dtype))
    module = nn.Linear(1, 1, bias=False)
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(held, requires_grad=False)
    return Layer(
        "torchao",
        module,
        dtype,
        weight.shape,
        lambda: peers.exact_torchao(held),
        peers.torchao_bytes(held),
    )


def _over(storage, name: str, module: nn.Module, dtype: torch.dtype) -> Layer:
    return Layer(
        name,
        module,
        dtype,
        storage.shape,
        lambda: peers.exact_lowrank(storage),
        storage.nbytes,
        checked=True,
    )


LAYERS: dict[str, Callable[[Tensor, torch.dtype], Layer]] = {
    "lowrank": lowrank_layer,
    "torch": dense_layer,
    "dequantize": dequantize_layer,
    "compile": compiled_layer,
    "bitsandbytes": bitsandbytes_layer,
    "torchao": torchao_layer,
}
