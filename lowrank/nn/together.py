"""Linear layers of one x, multiplied past what stands before each: as one node of the graph."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from lowrank.nn.watched import NotTheKernels, Watched
from lowrank.ops import many_rows, native
from lowrank.ops.dispatch import is_alone
from lowrank.ops.few_rows import MOST_ROWS


class Together:
    """Calls layers with the same x, at once where that is quicker and the same.

    That is on a CPU, and of QuantLinear whose codes the kernel multiplies, or LoRALinear around it
    with one adapter of plain LoRA and no dropout. 1 to 16 rows are one call of the kernel, in
    inference mode; not for `no_grad` alone, in which a block runs that is computed again, to the
    same bits, for its gradients. Of more rows, in float32, the layers are one node of the graph.
    A token takes 200 products, a step twice as many: what there is to ask of the layers is asked
    once, and then whether anything of it has changed.
    A copy, pickled or not, has asked nothing yet.
    """

    def __init__(self) -> None:
        self._found: _Found | None = None

    def __reduce__(self) -> tuple:
        return Together, ()

    def products(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """layer(x) of each layer."""
        if not torch.compiler.is_compiling():
            found = self._found
            if (found is None or not found.is_of(layers)) and is_alone():
                found = self._found = _Found(layers)
            if found is not None and (ys := found.run(x)) is not None:
                return ys
        return [layer(x) for layer in layers]


class _Found(Watched):
    """What is known of some layers: their products, or None where one is not the kernel's."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self._layers = layers
        self._few: ctypes.Array[native.Product] | None = None
        try:
            found = [self.product(layer) for layer in layers]
        except NotTheKernels:
            return
        if len({layer.K for _, layer in found}) == 1:
            self._few = (native.Product * len(found))(*[product for product, _ in found])
            self._many = [layer for _, layer in found]
            self._K = self._many[0].K
            self._to = ctypes.c_void_p * len(found)

    def is_of(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether it would be found again."""
        return layers == self._layers and self.is_unchanged()

    def run(self, x: Tensor) -> list[Tensor] | None:
        """layer(x) of each; None where the kernels do not take x, or a call has to be seen."""
        if self._few is None or x.shape[-1:] != (self._K,) or not x.numel() or not self.takes(x):
            return None
        if many_rows.takes(x, self._many):
            return many_rows.products(x, self._many)
        if x.numel() > MOST_ROWS * self._K or not torch.is_inference_mode_enabled():
            return None
        ys = [x.new_empty((*x.shape[:-1], product.N)) for product in self._few]
        status = native.load_cpu().lowrank_codebook_products(
            x.data_ptr(), native.DTYPES[x.dtype], x.numel() // self._K, self._K, self._few, len(ys),
            self._to(*[y.data_ptr() for y in ys]), torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "codebook_products")
        return ys
