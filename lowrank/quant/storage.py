"""A quantized weight: named tensors with the shape and dtype they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowrank.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Storage:
    """What a quantizer makes of one weight [N, K].

    `tensors` are the quantizer's own, in the dtypes it computes with; `QuantLinear` keeps them as
    integer parameters and gives them back. `dtype` is the dtype of the weight before quantization.
    `options` are what the quantizer needs, beside the tensors, to read them.
    """

    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    options: Mapping[str, int | float | bool | str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name. ConfigError: another scheme's storage, which has none."""
        if name not in self.tensors:
            raise ConfigError(
                f"storage: expected a tensor {name!r}; got {self.scheme!r}, which has "
                f"{', '.join(self.tensors) or 'none'}; quant.quantizer_of(storage) reads it"
            )
        return self.tensors[name]

    def rows(self, start: int, stop: int) -> Storage:
        """Rows start <= n < stop of a row-local scheme's weight, as views. ShapeError: no such.

        Its tensors are [N, ...], with a part for each row, or [1, ...], shared by all of them.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ShapeError(
                f"rows: expected 0 <= start < stop <= N={self.shape[0]}; got {start}, {stop}"
            )
        part = {k: t[start:stop] if own else t for k, (t, own) in self._by_row().items()}
        return replace(self, shape=(stop - start, *self.shape[1:]), tensors=part)

    def take(self, index: Tensor) -> Storage:
        """Rows `index` [n], int64 or int32, of such a weight, copied. IndexError: there is none."""
        part = {k: t.index_select(0, index) if own else t for k, (t, own) in self._by_row().items()}
        return replace(self, shape=(index.numel(), *self.shape[1:]), tensors=part)

    @classmethod
    def of_rows(cls, parts: Sequence[Storage]) -> Storage:
        """The weight of the parts' rows one above the other, each part of several rows.

        What a row-local scheme makes of the whole; what its parts share is that of the first.
        """
        first = parts[0]
        tensors = {
            name: torch.cat([part[name] for part in parts]) if own else tensor
            for name, (tensor, own) in first._by_row().items()
        }
        rows = sum(part.shape[0] for part in parts)
        return replace(first, shape=(rows, *first.shape[1:]), tensors=tensors)

    def _by_row(self) -> dict[str, tuple[Tensor, bool]]:
        """Each tensor, and whether it has a part for each row."""
        N = self.shape[0]
        for name, tensor in self.tensors.items():
            if tensor.shape[:1] not in ((N,), (1,)):
                raise ShapeError(
                    f"{name}: expected [N={N}, ...] or [1, ...], as row_local schemes have it, to "
                    f"take rows of; got {list(tensor.shape)} of {self.scheme!r}; keep it whole"
                )
        return {name: (tensor, tensor.shape[0] == N) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits, scales and codebook included, for each weight of [N, K]."""
        return 8 * self.nbytes / max(1, torch.Size(self.shape).numel())
