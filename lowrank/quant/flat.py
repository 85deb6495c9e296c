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
from .blockwise import Blockwise
from .codebooks import FP4, NF4
from .int8_blockwise import Int8Blockwise
from .registry import register
from .storage import Storage

TABLES = {"nf4": NF4, "fp4": FP4}
QUANT_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
GROUP = 256  # scales that share a nested scale


@register("flat")
class Flat(Blockwise):
    """w[i] = codebook[code[i]] * absmax[i // G], i being the place in the weight read row by row.

    A row may begin and end inside a block, so the scheme is not row_local: its tensors cannot be
    sliced or sharded by rows, though rows are decoded from it by themselves. Use "nf4" or "fp4"
    where the file need not be bitsandbytes'.

    With `double_quant`, absmax[b] = nested_quant_map[code[b]] * nested_absmax[b // 256] + offset.
    `quant_storage` is the dtype as which a file of bitsandbytes has the bytes.

    The Storage holds packed uint8 [ceil(N K / 2)] (even element in the high nibble), absmax float32
    [blocks = ceil(N K / G)] and codebook float32 [1, 16]; with `double_quant` absmax is uint8, and
    there are nested_absmax [ceil(blocks / 256)], nested_quant_map [256] and nested_offset [1].
    """

    row_local = False

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        quant_storage: str = "uint8",
    ) -> None:
        if quant_type not in TABLES:
            raise ConfigError(f"quant_type: expected 'nf4' or 'fp4'; got {quant_type!r}")
        if quant_storage not in QUANT_STORAGES:
            raise ConfigError(
                f"quant_storage: expected one of {', '.join(QUANT_STORAGES)}; got {quant_storage!r}"
            )
        self.quant_type, self.quant_storage = quant_type, quant_storage
        super().__init__(block_size, double_quant)

    @property
    def options(self) -> dict[str, int | float | bool | str]:
        kinds = {"quant_type": self.quant_type, "quant_storage": self.quant_storage}
        return {**kinds, **super().options}

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
        if self.double_quant:
            tensors |= _nest(absmax)
        return Storage(self.name, tuple(weight.shape), weight.dtype, tensors, self.options)

    def dequantize(self, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: one float32 product, rounded once to `dtype`."""
        return self.dequantize_rows(storage, 0, storage.shape[0], dtype)

    def dequantize_rows(
        self, storage: Storage, start: int, stop: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Rows start <= n < stop of `dequantize`, [stop - start, K], the others left alone."""
        K, G = storage.shape[1], storage.options["block_size"]
        first, last = start * K // G, -(-stop * K // G)  # blocks
        packed = storage["packed"][first * G // 2 : last * G // 2]
        if missing := (last - first) * G // 2 - packed.numel():  # the last block is short
            packed = torch.nn.functional.pad(packed, (0, missing))
        packed, scales = packed.view(-1, G // 2), absmax_of(storage, first, last)[:, None]
        blocks = ops.codebook_dequantize(packed, scales, None, storage["codebook"], G, G, dtype)
        begin = start * K - first * G
        return blocks.flatten()[begin : begin + (stop - start) * K].view(stop - start, K)


def table(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The codebook float32 [1, 16] of "nf4" or "fp4"."""
    return torch.tensor([TABLES[quant_type]], dtype=torch.float32, device=device)


def absmax_of(storage: Storage, first: int = 0, last: int | None = None) -> Tensor:
    """The float32 scales of blocks first <= b < last of a flat Storage: a product, then a sum."""
    scales = storage["absmax"][first:last]
    if not storage.options["double_quant"]:
        return scales
    group = first // GROUP
    steps = storage["nested_absmax"][group : -(-(first + len(scales)) // GROUP)]
    steps = steps.repeat_interleave(GROUP)[first - group * GROUP :][: len(scales)]
    product = storage["nested_quant_map"].index_select(0, scales.int()) * steps
    return product.add_(storage["nested_offset"])


def _nest(absmax: Tensor) -> dict[str, Tensor]:
    """The four tensors of absmax [blocks] in 8 bits: a dynamic map around their mean."""
    offset = absmax.double().mean().float()
    nested = Int8Blockwise(GROUP).quantize((absmax - offset)[None])
    return {
        "absmax": nested["codes"][0],
        "nested_absmax": nested["absmax"][0],
        "nested_quant_map": nested["codebook"][0],
        "nested_offset": offset[None],
    }
