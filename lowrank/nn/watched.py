"""Modules that a kernel computes for, and whether they are still what they were when looked at."""

from __future__ import annotations

from operator import is_

from torch import Tensor, float32, nn
from torch.nn.modules.module import _has_any_global_hook

from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear
from lowrank.nn.small import AtHand, at_hand_of
from lowrank.ops import many_rows, native
from lowrank.ops.few_rows import has_to_be_seen

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotTheKernels(Exception):
    """What was looked at is not the kernel's to compute; for who looks, and nobody else."""


class Watched:
    """What has been looked at, to be asked before each use whether anything of it has changed.

    A token asks that of a whole model: the lists are gone through by functions of C.
    """

    def __init__(self) -> None:
        self.dtypes = set(native.DTYPES)  # of x, that all products take
        self._dicts: list[dict] = []  # each is to have `_values` under `_names`
        self._names: list[str] = []
        self._values: list[object] = []
        self._hooks: list[dict] = []  # where there has to be nothing
        self._hooked = False
        self._tensors: list[Tensor] = []
        self._pointers: list[int] = []
        self._sizes: list[int] = []

    def watch(self, module: nn.Module) -> None:
        """Nothing may be hooked to it, nor be patched into it."""
        state = vars(module)
        self.see(state, "forward", state.get("forward"))
        hooks = [state[name] for name in _HOOKS]
        self._hooks += hooks
        self._hooked = any(hooks)
        if self._hooked or "forward" in state:
            raise NotTheKernels

    def see(self, held: dict, name: str, value: object) -> None:
        """What is held under this name is to stay this."""
        self._dicts.append(held)
        self._names.append(name)
        self._values.append(value)

    def hold(self, held: dict, name: str) -> Tensor | None:
        """The tensor that is held under this name, which is to stay where it is."""
        tensor = held.get(name)
        self.see(held, name, tensor)
        if tensor is not None:
            self._tensors.append(tensor)
            self._pointers.append(tensor.data_ptr())
            self._sizes.append(tensor.numel())  # less may be left at the same place
        return tensor

    def is_unchanged(self) -> bool:
        """Whether it would be found again."""
        return (
            any(self._hooks) == self._hooked
            and all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
            and list(map(Tensor.numel, self._tensors)) == self._sizes
        )

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel may be given x, and nobody has to see that modules are called."""
        return x.dtype in self.dtypes and not has_to_be_seen(x) and not _has_any_global_hook()

    def product(self, layer: nn.Module | None) -> tuple[native.Product, many_rows.Layer]:
        """The product of a layer, without x, twice: as the kernel of few rows has it, and of many.

        Raises NotTheKernels where it has none.

        That is of QuantLinear whose codes the kernel multiplies, or LoRALinear around it with one
        adapter of plain LoRA.
        """
        if type(layer) is QuantLinear:
            self.watch(layer)
            return self._product(layer, None)
        if type(layer) is not LoRALinear:
            raise NotTheKernels
        self.watch(layer)
        at_hand = at_hand_of(layer)
        self.see(vars(layer), "at_hand", at_hand)
        if at_hand is None or type(at_hand.base) is not QuantLinear:
            raise NotTheKernels
        self.watch(at_hand.base)
        self.see(layer._modules, "base_layer", at_hand.base)
        return self._product(at_hand.base, at_hand)

    def _product(
        self, base: QuantLinear, adapter: AtHand | None
    ) -> tuple[native.Product, many_rows.Layer]:
        few = base.few()
        self.see(vars(base), "few_rows", vars(base)["few_rows"])
        self.see(vars(base), "compute_dtype", vars(base).get("compute_dtype"))
        if few is None:
            raise NotTheKernels
        for name in few.held:
            self.hold(base._parameters, name)
        bias = self.hold(base._parameters, "bias")
        if base.compute_dtype is not None:
            self.dtypes &= {base.compute_dtype}
        if bias is not None or adapter is not None:
            self.dtypes &= {float32}
        if bias is not None and not few.takes(bias):
            raise NotTheKernels
        A, B, scale = (None, None, 0.0) if adapter is None else self._adapter(adapter)
        at, at_A, at_B = (None if t is None else t.data_ptr() for t in (bias, A, B))
        R = 0 if A is None else A.shape[0]
        weight = tuple(few.held.values())
        return (
            native.Product(*few.weight, at, at_A, at_B, R, scale),
            many_rows.Layer(weight, few.sizes, bias, A, B, scale),
        )

    def _adapter(self, adapter: AtHand) -> tuple[Tensor, Tensor, float]:
        """A, B and the scale."""
        name, dropout = adapter.adapter, adapter.dropouts[adapter.adapter]
        self.see(adapter.dropouts, name, dropout)
        for part in ("training", "p"):  # Identity has no p
            self.see(vars(dropout), part, vars(dropout).get(part))
        self.see(adapter.scaling, name, adapter.scaling[name])
        factors = []
        for parts in (adapter.As, adapter.Bs):
            self.see(parts, name, parts[name])
            factors.append(self.hold(parts[name]._parameters, "weight"))
        A, B = factors
        if type(dropout) is not nn.Identity and dropout.training and dropout.p:
            raise NotTheKernels
        if A is None or B is None or A.dtype != float32 or B.dtype != float32:
            raise NotTheKernels
        if has_to_be_seen(A, B):
            raise NotTheKernels
        return A, B, adapter.scaling[name]
