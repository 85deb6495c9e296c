"""bitsandbytes' own layout: 4-bit codes in blocks that run on over the ends of rows.

It keeps what a file of bitsandbytes holds where a row is not a number of whole blocks, byte for
byte, nested scales too.   Format: bitsandbytes 0.50; QLoRA, arXiv:2305.14314, §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank import ops
from lowrank.errors import ConfigError

from . import checks
from .blocks import panels
from .codebooks import FP4, NF4
from .registry import register
from .storage import Storage

TABLES = {"nf4": NF4, "fp4": FP4}


@register("flat")
class Flat:
    """w[i] = codebook[code[i]] * absmax[i // G], i being the place in the weight read row by row.

    A row may begin and end inside a block, so the scheme is not row_local: its tensors cannot be
    sliced or sharded by rows, though rows are decoded from it by themselves. Use "nf4" or "fp4"
    where the file need not be bitsandbytes'.

    The Storage holds packed uint8 [ceil(N K / 2)] (even element in the high nibble), absmax float
    [ceil(N K / G)] and codebook float32 [1, 16]. From a file with nested scales absmax is uint8,
    beside nested_absmax float [ceil(blocks / nested_blocksize)] and nested_quant_map [256].
    """

    row_local = False

    def __init__(self, quant_type: str = "nf4", block_size: int = 64) -> None:
        if quant_type not in TABLES:
            raise ConfigError(f"quant_type: expected 'nf4' or 'fp4'; got {quant_type!r}")
        self.quant_type = quant_type
        self.block_size = checks.block_size(block_size)

    @classmethod
    def from_storage(cls, storage: Storage) -> Flat:
        """The quantizer of its table and block size; what it quantizes has plain scales."""
        return cls(storage.options["quant_type"], storage.options["block_size"])

    @property
    def options(self) -> dict[str, int | float | bool | str]:
        return {"quant_type": self.quant_type, "block_size": self.block_size}

    def quantize(self, weight: Tensor) -> Storage:
        """Nearest codes of weight [N, K]; a tie goes to the lower. WeightError: NaN or inf."""
        source = checks.matrix(weight)
        codebook = table(self.quant_type, source.device)
        values, G = source.reshape(-1), self.block_size
        whole = values.numel() // G * G
        # blocks as rows: then the operators' layout is this one
        parts = (values[:whole].view(-1, G), values[None, whole:])
        coded = [ops.codebook_quantize(rows, codebook, G) for rows in parts if rows.numel()]
        packed = torch.cat([codes.flatten() for codes, _ in coded])[: -(-values.numel() // 2)]
        packed = packed.clone()  # without the pad of the operators
        if values.numel() % 2:
            # bitsandbytes' pad: a zero
            packed[-1] = packed[-1] & 0xF0 | TABLES[self.quant_type].index(0.0)
        absmax = torch.cat([scales.flatten() for _, scales in coded])
        if not absmax.is_meta and not bool(torch.isfinite(absmax).all()):
            checks.finite(source)
        tensors = {"packed": packed, "absmax": absmax, "codebook": codebook}
        return Storage(self.name, tuple(weight.shape), weight.dtype, tensors, self.options)

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: one float32 product, rounded once to `dtype`."""
        N, K = storage.shape
        device = storage["packed"].device
        out = torch.empty(N, K, dtype=dtype, device=device)
        for start, stop in panels(N, K, device):
            out[start:stop] = self.dequantize_rows(storage, start, stop, dtype)
        return out

    def dequantize_rows(
        self, storage: Storage, start: int, stop: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Rows start <= n < stop of `dequantize`, [stop - start, K], the others left alone."""
        K, G = storage.shape[1], storage.options["block_size"]
        first, last = start * K // G, -(-stop * K // G)  # blocks
        packed = storage["packed"][first * G // 2 : last * G // 2]
        short = (last - first) * G // 2 - packed.numel()  # bytes that the last block lacks
        packed = torch.nn.functional.pad(packed, (0, short)).view(-1, G // 2)
        scales = absmax_of(storage, first, last)[:, None]
        blocks = ops.codebook_dequantize(packed, scales, None, storage["codebook"], G, G, dtype)
        begin = start * K - first * G
        return blocks.flatten()[begin : begin + (stop - start) * K].view(stop - start, K)


def table(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The codebook float32 [1, 16] of "nf4" or "fp4"."""
    return torch.tensor([TABLES[quant_type]], dtype=torch.float32, device=device)


def absmax_of(storage: Storage, first: int = 0, last: int | None = None) -> Tensor:
    """The float32 scales of blocks first <= b < last of a flat Storage.

    Nested: map[code] * nested_absmax[b // group] in nested_dtype, plus the offset, as bitsandbytes
    rounds it.
    """
    scales = storage["absmax"][first:last]
    if "nested_absmax" not in storage.tensors:
        return scales.float()
    options, device = storage.options, scales.device
    blocks = torch.arange(first, first + scales.numel(), device=device)
    group = storage["nested_absmax"].float()[blocks // options["nested_blocksize"]]
    product = storage["nested_quant_map"].float()[scales.int()] * group
    offset = torch.full((), options["nested_offset"], dtype=torch.float32, device=device)
    return product.to(getattr(torch, options["nested_dtype"])).add_(offset).float()
