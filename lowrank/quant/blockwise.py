"""The two options of every scheme whose scales belong to blocks of a row."""

from __future__ import annotations

from . import checks


class Blockwise:
    """Blocks of G = `block_size` weights share a scale; with `double_quant` it takes 8 bits."""

    def __init__(self, block_size: int = 64, double_quant: bool = True) -> None:
        self.block_size = checks.block_size(block_size)
        self.double_quant = checks.flag("double_quant", double_quant)

    @property
    def options(self) -> dict[str, int | float | bool | str]:
        return {"block_size": self.block_size, "double_quant": self.double_quant}
