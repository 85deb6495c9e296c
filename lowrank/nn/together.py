"""Linear layers of one x, a few rows of it, multiplied in one call of the kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from lowrank.nn.watched import NotTheKernels, Watched
from lowrank.ops import native
from lowrank.ops.few_rows import MOST_ROWS


class Together:
    """Calls layers with the same x, at once where that is quicker and the same.

    That is for 1 to 16 rows on a CPU in inference mode, and QuantLinear whose codes the kernel
    multiplies, or LoRALinear around it with one adapter of plain LoRA; not for `no_grad` alone, in
    which a block runs that is computed again, to the same bits, for its gradients. A token takes
    200 products: what there is to ask of the layers is asked once, and then whether anything of it
    has changed.
    A copy, pickled or not, has asked nothing yet.
    """

    def __init__(self) -> None:
        self._found: _Found | None = None

    def __reduce__(self) -> tuple:
        return Together, ()

    def products(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """layer(x) of each layer."""
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            found = self._found
            if found is None or not found.is_of(layers):
                found = self._found = _Found(layers)
            if found.products is not None and (ys := found.run(x)) is not None:
                return ys
        return [layer(x) for layer in layers]


class _Found(Watched):
    """What is known of some layers: their products, or None where one is not the kernel's."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self._layers = layers
        self.products: ctypes.Array[native.Product] | None = None
        try:
            found = [self.product(layer) for layer in layers]
        except NotTheKernels:
            return
        if len({K for _, K in found}) == 1:
            products = [product for product, _ in found]
            self.products = (native.Product * len(products))(*products)
            self._K, self._widths = found[0][1], [product.N for product in products]
            self._to = ctypes.c_void_p * len(products)

    def is_of(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether it would be found again."""
        return layers == self._layers and self.is_unchanged()

    def run(self, x: Tensor) -> list[Tensor] | None:
        """layer(x) of each; None where x is not a few rows, or somebody has to see the calls."""
        *leading, K = x.shape or (0,)
        if K != self._K or not 0 < x.numel() <= MOST_ROWS * K or not self.takes(x):
            return None
        ys = [x.new_empty((*leading, N)) for N in self._widths]
        status = native.load_cpu().lowrank_codebook_products(
            x.data_ptr(), native.DTYPES[x.dtype], x.numel() // K, K, self.products, len(ys),
            self._to(*[y.data_ptr() for y in ys]), torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "codebook_products")
        return ys
