"""Which backend runs an operator, and why.

The choice is made inside the operator, so a compiled graph holds one call whatever runs it. A
backend is a module of this package with a function for each operator it offers and two that give
a reason or None: `missing()`, why it cannot run here, and `refuse(op, *args)`, why not on these
arguments. What is missing (a compiler, a GPU, Triton) is a reason too, never an error.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch.autograd import forward_ad

from lowrank.errors import BackendError, ConfigError

from . import autograd, reference
from .checks import value_of

BACKENDS = ("cpu", "cpu_int16", "triton", "cuda", "reference")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_ANY_DEVICE = ("reference",)
_NATIVE = ("cpu", "cpu_int16")
_TRACED = ("rms_norm", "rotate", "gated")  # no backend for GPUs has kernels of them
_KINDS = {"i": int, "f": float, "b": bool, "s": str}

# For the process, not a thread: autograd runs the backward of CUDA tensors in its own threads.
_named: str | None = os.environ.get("LOWRANK_BACKEND") or None


class use_backend:
    """Run every operator on the backend of this name, or on the best one again with None.

    A call holds until the next one; `with use_backend("reference"):` holds inside the block; both
    hold for every thread. Where the named backend refuses a call, BackendError says why; operators
    that it does not offer at all run on the reference. The environment's LOWRANK_BACKEND sets it
    at start.
    """

    def __init__(self, name: str | None) -> None:
        global _named
        _check_name(name)
        self._before, _named = _named, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info) -> None:
        global _named
        _named = self._before


def is_named() -> bool:
    """Whether a backend was asked for by name, which what is no operator must not run past."""
    return _named is not None


def call(name: str, *args):
    """torch.ops.lowrank.<name> of arguments that were checked, the shortest way there is.

    Where nobody could see it on the way, that is the kernel itself, with the gradient beside it;
    else past autograd's wrapper if no gradient is asked for, which then only calls the operator
    again. The dispatchers passed by take 15 to 40 us each time.
    """
    alone = _is_alone() and all(map(_is_plain_if_tensor, args))
    if alone and (kernel := _native(name, args)) is not None:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _recorded(name, kernel)(*args)
        return kernel(*args)
    op = getattr(torch.ops.lowrank, name).default
    if torch.compiler.is_compiling():
        return getattr(reference, name)(*args) if _is_traced(name, args[0]) else op(*args)
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    if _is_recorded(args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _is_traced(name: str, x: torch.Tensor) -> bool:
    """Whether the compiler is shown what the operator means: where nothing else than that runs.

    Then it makes one kernel of it and what surrounds it, and the gradients of both.
    """
    return name in _TRACED and (x.device.type == "cuda" or _named == "reference")


def straight(op: str, args: tuple, kinds: str) -> Callable | None:
    """What runs `op` in the end, where nobody on the way to it could see the call or refuse it.

    That is on plain tensors of the CPU, with no mode, transform, trace, autocast or profiler about,
    no gradient but in what it is promised in, and where a native backend refuses nothing: it looks
    at all that the checks of `functions` look at, but a bias's dtype. Checks, wrappers and torch's
    dispatcher, passed by, are half of the Python in front of one row of x. None: the call takes the
    long way.

    `kinds` has a letter for each argument: t a tensor, d one that has a gradient, ? a tensor or
    None, or one of _KINDS.
    """
    if not _is_alone():
        return None
    for value, kind in zip(args, kinds, strict=True):
        if kind in _KINDS:
            if type(value) is not _KINDS[kind]:
                return None
        elif (value is not None or kind != "?") and not is_plain(value):
            return None
    kernel = _native(op, args)
    if kernel is None or not torch._C._any_requires_grad(*args):
        return kernel
    for value, kind in zip(args, kinds, strict=True):
        if kind in "t?" and value is not None and value.requires_grad:
            return None
    return _recorded(op, kernel) if torch.is_grad_enabled() else kernel


@cache
def _recorded(op: str, kernel: Callable) -> Callable:
    """The kernel with the gradient of the operator beside it."""
    apply = autograd.recorded(op)
    return lambda *args: apply(*args, kernel)


def _native(op: str, args: tuple) -> Callable | None:
    """The kernel of the native backend that is in use, if it refuses nothing."""
    name = _named or "cpu"
    if name not in _NATIVE:
        return None
    backend = _load(name)
    if isinstance(backend, str) or backend.refuse(op, *args) is not None:
        return None
    return getattr(backend, op)


def is_alone() -> bool:
    """Whether a call may go past the dispatchers, ours and torch's, to the kernels of the CPU."""
    return _named is None and _is_alone()


def _is_alone() -> bool:
    """Whether nothing in this thread has to see a call: what `straight` lists."""
    return (
        not torch.compiler.is_compiling()
        and _thread() in _plain()[0]
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
    )


def is_plain(value: object) -> bool:
    """Whether this is a tensor of the CPU and nothing else."""
    if type(value) is not torch.Tensor and type(value) is not torch.nn.Parameter:
        return False
    return torch._C._dispatch_keys(value).raw_repr() in _plain()[1]


def _is_plain_if_tensor(value: object) -> bool:
    return is_plain(value) or not isinstance(value, torch.Tensor)


@cache
def _plain() -> tuple[set[tuple[int, int]], set[int]]:
    """`_thread()` where nothing is about, and the dispatch keys of tensors that are nothing else.

    Seen in a thread of its own, whatever the first caller has about him; with inference mode too.
    """
    threads, tensors = set(), set()

    def look() -> None:
        for inference in (False, True):
            with torch.inference_mode(inference):
                threads.add(_thread())
                tensors.add(torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr())

    looking = threading.Thread(target=look)
    looking.start()
    looking.join()
    return threads, tensors


def _thread() -> tuple[int, int]:
    """What the dispatcher does beside in this thread: modes, traces, autocast."""
    included = torch._C._dispatch_tls_local_include_set()
    return included.raw_repr(), torch._C._dispatch_tls_local_exclude_set().raw_repr()


def _is_recorded(args: tuple) -> bool:
    """Whether autograd, or a transform of torch.func, has to see a call."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _refuse_tangents(name: str, args: tuple) -> None:
    """Of an operator without a rule for forward mode torch makes zeros, and says nothing."""
    for value in args:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise ConfigError(
                f"{name}: expected no tangents; got one of forward-mode differentiation, as "
                "torch.func.jvp does it, which is not there; use torch.autograd.grad"
            )


def runner(op: str, own: Callable | None = None) -> Callable:
    """The implementation of `op` that is registered with torch: choose a backend, run it.

    `own` makes the arguments of a rank of those that are told for all of them.
    """

    def run(*args):
        if own is not None:
            args = own(*args)
        device_type = _device_type(args)
        kernel = _choose(op, args, device_type)
        # A kernel picks its own precision; autocast would round its float32 products to bf16.
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return kernel(*args)
        return kernel(*args)

    run.__name__ = op
    return run


def explain(op: str, *args) -> str:
    """Say, a line for each backend, whether it runs `op` on these arguments, or why it refuses.

    `args` are the operator's own, as `torch.ops.lowrank.<op>` takes them; without any, the text
    says which backends are there at all.
    """
    from .schema import OPERATORS

    if op not in OPERATORS:
        raise ConfigError(f"op: expected one of {', '.join(OPERATORS)}; got {op!r}")
    if not args:
        lines = [f"  {name}: {reason or 'here'}" for name, reason in standing(op).items()]
        return "\n".join([f"{op}: backends that are here", *lines, *_remarks(BACKENDS)])
    schema = getattr(torch.ops.lowrank, op).default._schema
    expected = len(schema.arguments)
    if len(args) != expected:
        raise ConfigError(
            f"explain({op!r}): expected {expected} arguments or none; got {len(args)}"
        )
    for argument, value in zip(schema.arguments, args, strict=True):
        if str(argument.type) == "Tensor" and not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"explain({op!r}): {argument.name}: expected a tensor; got {value_of(value)}"
            )
    device_type = _device_type(args)
    lines, found = [f"{op} on {device_type}"], False
    for name in _order(device_type, op):
        reason = _refusal(name, op, args)
        if reason is not None:
            lines.append(f"  {name}: refuses: {reason}")
        else:
            lines.append(f"  {name}: {'would run if asked by name' if found else 'runs'}")
            found = True
    lines += _remarks(_order(device_type, op))
    if _named is not None:
        lines.append(f"  ({_named!r} was asked for by name)")
    return "\n".join(lines)


def standing(op: str) -> dict[str, str | None]:
    """{backend: why it cannot run `op` here on any arguments, or None if it can}."""
    found: dict[str, str | None] = {}
    for name in BACKENDS:
        backend = _load(name)
        if isinstance(backend, str):
            found[name] = backend
        else:
            found[name] = _offers(backend, op) or backend.missing()
    return found


def preferred(op: str, device_type: str) -> str:
    """The backend that runs `op` there on arguments that none refuses; its name, if it was named.

    Raises ConfigError if LOWRANK_BACKEND is no backend.
    """
    order, refusals = _order(device_type, op), standing(op)
    return next((name for name in order if refusals[name] is None), order[0])


def _remarks(names: tuple[str, ...]) -> list[str]:
    """What backends have to say beside whether they run: a line each of `remarks()`, if any."""
    said = (getattr(_load(name), "remarks", tuple)() for name in names)
    return [f"  ({remark})" for remarks in said for remark in remarks]


def _choose(op: str, args: tuple, device_type: str) -> Callable:
    reason = ""
    for name in _order(device_type, op):
        reason = _refusal(name, op, args)
        if reason is None:
            return getattr(_load(name), op)
    raise BackendError(f"{op}: backend {_named!r}, asked for by name, refuses: {reason}")


def _device_type(args: tuple) -> str:
    """Where the first tensor is, or the first of a list of them."""
    first = args[0]
    if isinstance(first, torch.Tensor):
        return first.device.type
    return first[0].device.type if first else "cpu"


def _order(device_type: str, op: str) -> tuple[str, ...]:
    if _named is None:
        return _PREFERENCE.get(device_type, _ANY_DEVICE)
    _check_name(_named)
    backend = _load(_named)
    if isinstance(backend, ModuleType) and not hasattr(backend, op):
        return _ANY_DEVICE
    return (_named,)


def _refusal(name: str, op: str, args: tuple) -> str | None:
    backend = _load(name)
    if isinstance(backend, str):
        return backend
    return _offers(backend, op) or backend.refuse(op, *args)


def _offers(backend: ModuleType, op: str) -> str | None:
    return None if hasattr(backend, op) else f"has no {op}"


@cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"lowrank.ops.{name}")
    except Exception as error:  # whatever a Triton of another version raises
        return f"cannot be imported: {error!r}"


def _check_name(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}; got {name!r}")
