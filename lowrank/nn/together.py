"""Linear layers of one x, a few rows of it, multiplied in one call of the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.small import AtHand, at_hand_of
from lowrank.ops import native
from lowrank.ops.few_rows import MOST_ROWS, has_to_be_seen

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


class _Found:
    """What is known of some layers: their products, or None where one is not the kernel's."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self._layers = layers
        self._seen: list[tuple[Mapping, str, object]] = []  # what has to be in which dict
        self._hooks: list[Mapping] = []  # where there has to be nothing
        self._tensors: list[Tensor] = []
        self._dtypes = set(native.DTYPES)  # of x
        self._K = 0
        found = [self._of(layer) for layer in layers]
        self._hooked = any(self._hooks)
        self._pointers = [t.data_ptr() for t in self._tensors]
        self._sizes = [t.numel() for t in self._tensors]  # less may be left at the same place
        self.products: ctypes.Array[native.Product] | None = None
        if not self._hooked and None not in found and len({K for _, K in filter(None, found)}) == 1:
            products = [product for product, _ in filter(None, found)]
            self.products = (native.Product * len(products))(*products)
            self._K, self._widths = found[0][1], [product.N for product in products]
            self._to = ctypes.c_void_p * len(products)

    def is_of(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether it would be found again."""
        if layers != self._layers or any(self._hooks) != self._hooked:
            return False
        for held, name, value in self._seen:
            if held.get(name) is not value:
                return False
        tensors = self._tensors
        if [t.data_ptr() for t in tensors] != self._pointers:
            return False
        return [t.numel() for t in tensors] == self._sizes

    def run(self, x: Tensor) -> list[Tensor] | None:
        """layer(x) of each; None where x is not a few rows, or somebody has to see the calls."""
        *leading, K = x.shape or (0,)
        if K != self._K or not 0 < x.numel() <= MOST_ROWS * K or x.dtype not in self._dtypes:
            return None
        if has_to_be_seen(x) or _has_any_global_hook():
            return None
        ys = [x.new_empty((*leading, N)) for N in self._widths]
        status = native.load_cpu().lowrank_codebook_products(
            x.data_ptr(), native.DTYPES[x.dtype], x.numel() // K, K, self.products, len(ys),
            self._to(*[y.data_ptr() for y in ys]), torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "codebook_products")
        return ys

    def _of(self, layer: nn.Module) -> tuple[native.Product, int] | None:
        """The product of a layer, without x, and its K."""
        self._watch(layer)
        if type(layer) is QuantLinear:
            return self._product(layer, None)
        if type(layer) is not LoRALinear:
            return None
        at_hand = at_hand_of(layer)
        self._seen.append((vars(layer), "at_hand", at_hand))
        if at_hand is None or type(at_hand.base) is not QuantLinear:
            return None
        self._watch(at_hand.base)
        self._seen.append((layer._modules, "base_layer", at_hand.base))
        return self._product(at_hand.base, at_hand)

    def _product(
        self, base: QuantLinear, adapter: AtHand | None
    ) -> tuple[native.Product, int] | None:
        few, bias = base.few(), base._parameters.get("bias")
        self._seen.append((vars(base), "few_rows", vars(base)["few_rows"]))
        self._seen.append((vars(base), "compute_dtype", vars(base).get("compute_dtype")))
        if few is None:
            return None
        for name, tensor in few.held.items():
            self._hold(base._parameters, name, tensor)
        self._hold(base._parameters, "bias", bias)
        if base.compute_dtype is not None:
            self._dtypes &= {base.compute_dtype}
        A, B, R, scale = None, None, 0, 0.0
        if adapter is not None:
            A, B, R, scale = self._adapter(adapter)
            if R == 0:
                return None
        if bias is not None or A is not None:
            self._dtypes &= {torch.float32}
        if bias is not None and not few.takes(bias):
            return None
        at = None if bias is None else bias.data_ptr()
        return native.Product(*few.weight, at, A, B, R, scale), few.K

    def _adapter(self, adapter: AtHand) -> tuple[int, int, int, float]:
        """Pointers of A and B, the rank, and the scale; a rank of 0 where they are not plain."""
        name, dropout = adapter.adapter, adapter.dropouts[adapter.adapter]
        self._seen.append((adapter.dropouts, name, dropout))
        self._seen.append((vars(dropout), "training", dropout.training))
        self._seen.append((adapter.scaling, name, adapter.scaling[name]))
        factors = []
        for parts in (adapter.As, adapter.Bs):
            self._seen.append((parts, name, parts[name]))
            factor = parts[name]._parameters.get("weight")
            self._hold(parts[name]._parameters, "weight", factor)
            factors.append(factor)
        A, B = factors
        drops = type(dropout) is not nn.Identity and dropout.training and dropout.p
        plain = all(
            t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in factors
        )
        if drops or not plain or has_to_be_seen(*factors):
            return 0, 0, 0, 0.0
        return A.data_ptr(), B.data_ptr(), A.shape[0], adapter.scaling[name]

    def _watch(self, module: nn.Module) -> None:
        """Nothing may be hooked to it, nor be patched into it."""
        state = vars(module)
        self._seen.append((state, "forward", state.get("forward")))
        self._hooks += [state[name] for name in _HOOKS]
        self._hooks.append({"forward": 0} if "forward" in state else {})

    def _hold(self, held: Mapping, name: str, tensor: Tensor | None) -> None:
        self._seen.append((held, name, tensor))
        if tensor is not None:
            self._tensors.append(tensor)
