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
    What no tensor without values can say: `labelled` rows have a label, the last position is that
    of `length` tokens, and as many tokens go to one expert as to another.
    """

    def __init__(
        self, held: Iterable[Tensor], vocab_size: int, labelled: int, length: int, within: Within
    ) -> None:
        super().__init__()
        self._vocab_size, self._within = vocab_size, within
        self._choices = 0  # of experts, by all tokens
        aten = torch.ops.aten
        # what depends on values that are not there, and what torch's own way imports a compiler for
        self._answers: dict[Any, Callable[..., Any]] = {
            aten.nonzero.default: lambda x: x.new_empty(labelled, x.ndim, dtype=torch.int64),
            aten._local_scalar_dense.default: lambda x: length - 1,
            aten.searchsorted.Tensor: self._searchsorted,
            aten.index_select.default: _index_select,
        }
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
        if func in self._answers:
            result = self._answers[func](*args)
        elif func is torch.ops.aten._to_copy.default and _leaves_meta(args[0], kwargs):
            result = self._ends(args[0])
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

    def _searchsorted(self, chosen: Tensor, edges: Tensor, **_: Any) -> Tensor:
        self._choices = chosen.numel()
        return edges.new_empty(edges.shape)

    def _ends(self, offs: Tensor) -> Tensor:
        """Where each expert's rows end, on the CPU."""
        E = offs.numel()
        return torch.arange(1, E + 1, dtype=offs.dtype, device="cpu") * self._choices // E

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


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _Fused.apply(q, k, v, attn_mask)


class _Fused(torch.autograd.Function):
    """Fused attention keeps q, k, v, its result, a number for each row of scores, and a mask, made
    into numbers.

    Tensors [B, heads, S, D] lie in memory as [B, S, heads, D], as the kernels write them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, heads, S, D = q.shape
        out = q.new_empty(B, S, heads, v.shape[-1]).transpose(1, 2)
        if mask is not None and mask.dtype == torch.bool:
            mask = q.new_empty(mask.shape)
        sums = q.new_empty(B, heads, S, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return *(_like(t) for t in (q, k, v)), None


def _like(t: Tensor) -> Tensor:
    B, heads, S, D = t.shape
    return t.new_empty(B, S, heads, D).transpose(1, 2)


def _leaves_meta(x: Tensor, kwargs: Any) -> bool:
    device = (kwargs or {}).get("device")
    return x.is_meta and device is not None and torch.device(device).type != "meta"


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """The same; torch's own for the meta device imports its compiler, which takes a second."""
    shape = list(x.shape)
    shape[dim] = index.numel()
    return x.new_empty(shape)


def nbytes(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
