"""An instruction set from the running Python's own standard library: signature → docstring.

It needs no download, differs a little from one Python to the next, and is the same every time on
one of them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType

PROMPT = "What does {name}{signature} do in Python?\n"

# Importing these does something (opens a browser, prints, patches readline or sys.modules), needs a
# display, or brings no documentation of its own.
SKIP = frozenset({
    "__main__", "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
    "nt", "nturl2path", "pydoc_data", "readline", "rlcompleter", "site", "sitecustomize", "test",
    "this", "tkinter", "turtle", "turtledemo", "usercustomize", "venv", "xxlimited",
    "xxlimited_35", "xxsubtype",
})  # fmt: skip

_LOCAL = re.compile(r" at 0x|'/\w|'[A-Z]:\\")  # addresses and paths, which are this machine's own
_MAX_SIGNATURE = 120
_MIN_ANSWER, _MAX_ANSWER = 16, 300


def instruction_set(held_out: float = 0.1) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held-out) lists of {"prompt", "completion"}: signature → first paragraph.

    A top-level module lies wholly in one of the two, by a hash of its name, about `held_out` of
    them in the second; no prompt and no completion occurs twice. In the order of sorted names.
    """
    train: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    seen: set[str] = set()
    for name, obj in documented():
        signature, answer = _signature(obj), first_paragraph(obj)
        if signature is None or not _MIN_ANSWER <= len(answer) <= _MAX_ANSWER:
            continue
        prompt = PROMPT.format(name=name, signature=signature)
        if prompt in seen or answer in seen:
            continue
        seen |= {prompt, answer}
        side = evaluation if is_held_out(name, held_out) else train
        side.append({"prompt": prompt, "completion": answer})
    return train, evaluation


def is_held_out(name: str, held_out: float = 0.1) -> bool:
    """Whether a qualified name's top-level module is held out: its hash in [0, 1) < held_out."""
    digest = hashlib.sha256(name.partition(".")[0].encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out * 2**64


def documented() -> Iterator[tuple[str, object]]:
    """Every public module, class, function and method with a docstring, once: (its name, it)."""
    seen: dict[int, object] = {}  # holds the objects, so that no address is used twice
    for module in _modules():
        for name, obj in [(module.__name__, module), *_members(module)]:
            if id(obj) not in seen and isinstance(obj.__doc__, str) and obj.__doc__.strip():
                seen[id(obj)] = obj
                yield name, obj


def first_paragraph(obj: object) -> str:
    """The first paragraph of an object's own docstring on one line, without a leading signature."""
    name = getattr(obj, "__name__", "")
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(obj.__doc__ or ""))
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        while lines and re.match(rf"(\w+\.)*{re.escape(name)}\s*\(", lines[0].strip()):
            lines.pop(0)
        if lines:
            return " ".join(" ".join(lines).split())
    return ""


def _signature(obj: object) -> str | None:
    """`(a, b=1)` without annotations; None where unknown, long, or true on this machine only."""
    try:
        signature = inspect.signature(obj)
    except Exception:  # Python evaluates the defaults of functions in C, which can fail in any way
        return None
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    return text if len(text) <= _MAX_SIGNATURE and not _LOCAL.search(text) else None


def _modules() -> Iterator[ModuleType]:
    """The public modules that import here, in sorted order, children right after their parent."""
    top = {n for n in sys.stdlib_module_names if not n.startswith("_") and n not in SKIP}
    pending = sorted(top, reverse=True)
    while pending:
        name = pending.pop()
        module = _import(name)
        if module is None:
            continue
        yield module
        children = {found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []))}
        children = {c for c in children if not c.startswith(("_", "test"))}
        pending += sorted((f"{name}.{child}" for child in children), reverse=True)


def _import(name: str) -> ModuleType | None:
    """The module, or None if it is for another platform or was left out of this build."""
    quiet = io.StringIO()  # deprecated modules warn, and a few print
    try:
        with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError, KeyError):
        return None


def _members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The public classes, functions and methods of a module with their qualified names, sorted."""
    listed = getattr(module, "__all__", None)
    names = listed if listed is not None else [n for n in vars(module) if not n.startswith("_")]
    for name in sorted(set(names)):
        obj = vars(module).get(name)
        if not (inspect.isclass(obj) or inspect.isroutine(obj)):
            continue
        # Without __all__, what a module merely imported is another's.
        if listed is None and getattr(obj, "__module__", None) != module.__name__:
            continue
        yield f"{module.__name__}.{name}", obj
        if inspect.isclass(obj):
            for attribute in sorted(a for a in vars(obj) if not a.startswith("_")):
                method = inspect.getattr_static(obj, attribute)
                method = getattr(method, "__func__", method)  # classmethod and staticmethod
                if inspect.isroutine(method) and _is_own(method):
                    yield f"{module.__name__}.{name}.{attribute}", method


def _is_own(method: object) -> bool:
    """Whether a method comes with Python: other packages put some into its classes."""
    module = getattr(method, "__module__", None)
    return module is None or module.partition(".")[0] in sys.stdlib_module_names
