"""The layout is a rule, not a picture: who imports whom, what nobody may, how long a file is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A file imports only from what stands to the right of its own place.
CHAIN = (("cli",), ("train", "plan", "report"), ("models",), ("io",), ("surgery",), ("nn",))
CHAIN += (("quant", "adapters"), ("ops",), ("kernels",))
RIGHT_OF = {
    place: {p for group in CHAIN[i + 1 :] for p in group}
    for i, group in enumerate(CHAIN)
    for place in group
}
LEAVES = ("errors", "progress", "registry")  # these stand alone, or import errors
ALLOWED = {
    **{place: right | {"data", "optim", *LEAVES} for place, right in RIGHT_OF.items()},
    "cli": RIGHT_OF["cli"] | {"data", "optim", "lowrank", *LEAVES},  # it is a user too
    "train": RIGHT_OF["train"] - {"models"} | {"data", "optim", *LEAVES},
    "optim": {"ops", "errors"},
    "data": {"errors", "progress"},
    **{leaf: {"errors"} - {leaf} for leaf in LEAVES},
    "kernels": set(),
}
# quant.report, the tool that compares quantizers, is a lazy attribute of quant.
EXCEPTIONS = {("lowrank/quant/__init__.py", "lowrank.report")}

FORBIDDEN = {"transformers", "peft", "bitsandbytes", "accelerate", "trl", "kernels"}
FORBIDDEN |= {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}

MAX_LINES = 400


def python_files(*folders: str) -> list[Path]:
    return [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), name_of(file))


def imports(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of each import, relative ones made absolute; name "" in `import m`."""
    package = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def place_of(module: str, name: str) -> str | None:
    """Which part of the house `from module import name` reaches; None for another house."""
    parts = module.split(".")
    if parts[0] != "lowrank":
        return None
    if len(parts) > 1:
        return parts[1]
    return name if name in ALLOWED else "lowrank"


def home_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def test_imports_point_to_the_right():
    wrong = []
    for file in python_files("lowrank", "kernels"):
        home = home_of(file)
        if home in ("__init__", "__main__"):  # the front doors: they only re-export and call
            continue
        assert home in ALLOWED, f"{name_of(file)} is in no place that the layout knows"
        for line, module, name in imports(file):
            place = place_of(module, name)
            if place in (None, home) or place in ALLOWED[home]:
                continue
            if (name_of(file), f"{module}.{name}" if module == "lowrank" else module) in EXCEPTIONS:
                continue
            wrong.append(f"{name_of(file)}:{line}: {home} imports {place}")
    assert not wrong, "\n".join(wrong)


def test_the_rule_catches_a_wrong_import():
    assert "models" not in ALLOWED["train"] and "nn" not in ALLOWED["ops"]
    assert place_of("lowrank.models.decoder", "Decoder") == "models"
    assert place_of("lowrank", "surgery") == "surgery" and place_of("torch", "nn") is None


def test_kernels_import_triton_and_one_another():
    wrong = [
        f"{name_of(file)}:{line}: {module}"
        for file in python_files("kernels")
        for line, module, _ in imports(file)
        if module.split(".")[0] not in ("__future__", "triton")
        and not module.startswith("lowrank.kernels")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_forbidden_is_imported():
    wrong = [
        f"{name_of(file)}:{line}: {module}"
        for file in python_files("lowrank", "kernels")
        for line, module, _ in imports(file)
        if module.split(".")[0] in FORBIDDEN
    ]
    assert not wrong, "\n".join(wrong)


def nodes_outside_printers(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, but for functions named print_*: to print is what those are for."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name.startswith("print_")):
            yield child
            yield from nodes_outside_printers(child)


def test_no_pickle_under_another_name_and_no_print():
    wrong = []
    for file in python_files("lowrank", "kernels"):
        for node in nodes_outside_printers(tree_of(file)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.save",
            ):
                wrong.append(
                    f"{name_of(file)}:{node.lineno}: {ast.unparse(node)} (safetensors only)"
                )
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            if called == "print" and home_of(file) != "cli":
                wrong.append(f"{name_of(file)}:{node.lineno}: print (use logging)")
    assert not wrong, "\n".join(wrong)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_stay_in_their_file():
    wrong = [
        f"{name_of(file)}:{line}: {module}.{name}"
        for file in python_files("lowrank", "kernels", "tests", "benchmarks")
        for line, module, name in imports(file)
        if module.split(".")[0] == "lowrank" and any(map(is_private, [*module.split("."), name]))
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_touch_no_private_fields():
    wrong = [
        f"{name_of(file)}:{node.lineno}: {ast.unparse(node)}"
        for file in python_files("tests", "benchmarks")
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and ast.unparse(node.value) not in ("self", "torch", "os")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long():
    native = [f for f in sorted((ROOT / "csrc").rglob("*")) if f.is_file()]
    lengths = {
        name_of(f): len(f.read_text(encoding="utf-8").splitlines())
        for f in [*python_files("lowrank", "kernels", "tests", "benchmarks"), *native]
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_csrc_knows_neither_torch_nor_python():
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11|pyconfig)')
    wrong = [
        name_of(f)
        for f in (ROOT / "csrc").rglob("*")
        if f.is_file() and include.search(f.read_text())
    ]
    assert wrong == []


def test_every_operator_has_a_meaning():
    """An operator of the schema table is a function of lowrank.ops and of the reference."""
    from lowrank import ops
    from lowrank.ops import reference, schema

    for name in schema.OPERATORS:
        assert callable(getattr(reference, name, None)), f"{name} has no reference"
        assert callable(getattr(ops, name, None)), f"{name} is not a function of lowrank.ops"
