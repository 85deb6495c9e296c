"""The bytes of a training step, counted while it runs on the meta device, where it has none.

What autograd keeps is not modelled but watched: the decoder itself runs forward and backward, and
every storage is counted from the operator that makes it to the last that holds it.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS, GRADIENTS, LOGITS, WORKSPACE = "activations", "gradients", "logits", "workspace"

# (operator, its arguments) -> bytes it takes within, beside what it returns
Within = Callable[[Any, tuple[Any, ...]], dict[str, int]]


class Trace(TorchDispatchMode):
    """Inside, what is made and freed is written down; `peaks` then says what was alive at most.

    What is `held` before does not count. Tensors whose last dimension is `vocab_size` are logits.
    `labelled` rows have a label: how many is what no tensor without values can say.
    """

    def __init__(
        self, held: Iterable[Tensor], vocab_size: int, labelled: int, within: Within
    ) -> None:
        super().__init__()
        self._vocab_size, self._labelled, self._within = vocab_size, labelled, within
        self._held = {id(storage): storage for t in held for storage in [t.untyped_storage()]}
        self._kinds: list[str] = []
        self._sizes: list[int] = []
        self._alive: dict[int, tuple[weakref.ref, int]] = {}  # by id of a storage
        # of a storage's number, or ~ that once it is freed, or what an operator takes within
        self._events: list[int | dict[str, int]] = []
        self._marks: list[int] = []
        self._library = torch.library.Library("aten", "IMPL")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, for a second, to keep it out of here

    def __enter__(self) -> Trace:
        # the meta device would take the formula, with all scores
        self._library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._library._destroy()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:
            result = args[0].new_empty(self._labelled, args[0].ndim, dtype=torch.int64)
        elif func is torch.ops.aten.index_select.default:
            result = _index_select(*args)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if within := self._within(func, args):
            self._events.append(within)
        return result

    def mark(self) -> None:
        """Let `peaks` part what comes before from what comes after."""
        self._marks.append(len(self._events))

    def peaks(self, gradients: Iterable[Tensor]) -> list[Counter[str]]:
        """What was alive, by kind, when it was most: before the first mark, and after it.

        `gradients` are those that count as such, from when they were made.
        """
        for gradient in gradients:
            alive = self._alive.get(id(gradient.untyped_storage()))
            if alive is not None:
                self._kinds[alive[1]] = GRADIENTS
        border = self._marks[0] if self._marks else len(self._events)
        live: Counter[str] = Counter()
        total, most, found = 0, [-1, -1], [Counter[str](), Counter[str]()]
        for place, event in enumerate(self._events):
            extra: dict[str, int] = {}
            if isinstance(event, dict):
                extra = event
            else:
                index, sign = (event, 1) if event >= 0 else (~event, -1)
                live[self._kinds[index]] += sign * self._sizes[index]
                total += sign * self._sizes[index]
            part, now = int(place >= border), total + sum(extra.values())
            if now > most[part]:
                most[part], found[part] = now, live + Counter(extra)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._alive or id(storage) in self._held:
            return
        number, key = len(self._sizes), id(storage)

        def freed(_: object) -> None:
            self._events.append(~number)
            del self._alive[key]

        self._alive[key] = (weakref.ref(storage, freed), number)
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocab_size
        self._sizes.append(storage.nbytes())
        self._kinds.append(LOGITS if is_logits else ACTIVATIONS)
        self._events.append(number)


def mark_first_gradient(trace: Trace, module: nn.Module) -> list[Any]:
    """Let the first gradient of a parameter of `module` be the trace's mark; handles to remove."""
    seen: list[bool] = []

    def mark(_: Tensor) -> None:
        if not seen:
            seen.append(True)
            trace.mark()

    trained = [p for p in module.parameters() if p.requires_grad]
    return [p.register_post_accumulate_grad_hook(mark) for p in trained]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Fused.apply(q, k, v)


class _Fused(torch.autograd.Function):
    """Fused attention keeps q, k, v, its result and a number for each row of scores.

    Tensors [B, heads, S, D] lie in memory as [B, S, heads, D], as the kernels write them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, heads, S, D = q.shape
        out = q.new_empty(B, S, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(B, heads, S, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return tuple(_like(t) for t in (q, k, v))


def _like(t: Tensor) -> Tensor:
    B, heads, S, D = t.shape
    return t.new_empty(B, S, heads, D).transpose(1, 2)


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """The same; torch's own for the meta device imports its compiler, which takes a second."""
    shape = list(x.shape)
    shape[dim] = index.numel()
    return x.new_empty(shape)


def nbytes(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
