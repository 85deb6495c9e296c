"""What every Triton kernel takes of every GPU generation: compiled to real cubins with no GPU.

    python -m benchmarks.compile_all [--arch 80,90]

writes the table benchmarks/results/kernels.md and fails if a kernel spills, needs local memory, or
has no tensor-core instruction where it multiplies matrices.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks.kernel_cases import OPTIONS, Case, cases

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = Path(__file__).parent / "results" / "kernels.md"
MOST_SHARED = 99 << 10  # of one program on sm_86, 89 and 120; the others have more
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

HEADER = """\
# What the Triton kernels take of six generations of GPUs

{}. `make compile-all` writes this.

Each cell: registers a thread / KiB of shared memory of a program; `+` where its matrix products are
tensor-core instructions. No kernel spills, and none has local memory.
"""


@dataclass
class Usage:
    """What a cubin takes: for each thread, and of shared memory for each program."""

    registers: int
    shared: int
    stack: int  # bytes of local memory
    spills: int  # instructions that read or write local memory
    tensor_cores: int  # instructions that multiply matrices
    ptx: str


def compile_case(case: Case, arch: int, folder: Path) -> Usage:
    """Compile for this architecture; `folder` takes the cubin."""
    options = {k: v for k, v in case.constants.items() if k in OPTIONS}
    compiled = triton.compile(case.source(), target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    return Usage(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        shared=compiled.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", usage).group(1)),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        tensor_cores=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass)),
        ptx=compiled.asm["ptx"],
    )


def faults(case: Case, used: Usage) -> list[str]:
    """What must not be: spills, local memory, a matrix product without tensor cores."""
    found = []
    if used.stack or used.spills:
        found.append(f"{used.stack} bytes of local memory, {used.spills} spills")
    if used.shared > MOST_SHARED:
        found.append(
            f"{used.shared} bytes of shared memory; the least of these GPUs has {MOST_SHARED}"
        )
    if case.tensor_cores and not used.tensor_cores:
        found.append("no tensor-core instruction")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compile all, on every core, and write the table; 1 if anything is wrong with a kernel."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.compile_all")
    options.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)))
    archs = [int(text) for text in options.parse_args(argv).arch.split(",")]
    names = [(case.name, case.dtype) for case in cases()]
    jobs = list(itertools.product(range(len(names)), archs))
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        results = pool.map(_cell, *zip(*jobs, strict=True))
        results = list(tqdm(results, "compiling", len(jobs), unit="cubin", disable=None))
    wrong = [
        f"{' '.join(names[number])} sm_{arch}: {fault}"
        for (number, arch), (_, found) in zip(jobs, results, strict=True)
        for fault in found
    ]
    cells = iter([cell for cell, _ in results])
    rows = [[*name, *itertools.islice(cells, len(archs))] for name in names]
    text = "\n".join([*HEADER.format(_versions()).splitlines(), "", *_table(archs, rows)]) + "\n"
    print(text, end="")
    print(*wrong, sep="\n", file=sys.stderr)
    if not wrong:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text)
    return 1 if wrong else 0


def _cell(number: int, arch: int) -> tuple[str, list[str]]:
    """What the table says of a case, by its number, and what is wrong with it."""
    case = next(itertools.islice(cases(), number, None))
    with tempfile.TemporaryDirectory() as folder:
        used = compile_case(case, arch, Path(folder))
    cell = f"{used.registers} / {used.shared / 1024:.3g}" + " +" * bool(used.tensor_cores)
    return cell, faults(case, used)


def _table(archs: list[int], rows: list[list[str]]) -> list[str]:
    head = ["kernel", "dtype", *(f"sm_{arch}" for arch in archs)]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _versions() -> str:
    """Of Triton and of the assemblers that it brings, one for Blackwell by itself."""
    found = [f"Triton {triton.__version__}"]
    for tool in sorted(TOOLS.glob("ptxas*")):
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        found.append(f"{tool.name} {re.search(r'V([0-9.]+)', said.stdout).group(1)}")
    return ", ".join(found)


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [TOOLS / "cuobjdump", option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
