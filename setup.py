"""Builds the native libraries into lowrank/lib: csrc/*.cpp with g++, csrc/cuda/*.cu with nvcc.

They are plain C ABI libraries that ctypes opens: neither Python's headers nor torch are needed.
A missing compiler costs speed, not the installation. LOWRANK_BUILD=require makes it an error,
LOWRANK_BUILD=skip builds nothing; CXX and CXXFLAGS, NVCC and NVCCFLAGS mean what they always mean.
NVCC= (empty) builds no CUDA library.
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)  # the globs below, wherever pip was called from

MODE = os.environ.get("LOWRANK_BUILD", "auto")
if MODE not in ("auto", "require", "skip"):
    raise SetupError(f"LOWRANK_BUILD: expected auto, require or skip; got {MODE!r}")

# contract=off: a decoded weight is codebook * absmax rounded, never fused into what follows it.
CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]

# Only a file named for an instruction set may use it: everything else must run on any such CPU.
X86 = ("x86_64", "AMD64")
ISA = {
    "_avx2": (X86, ["-mavx2", "-mfma", "-mf16c"]),
    "_avx512": (
        X86,
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    ),
    "_neon": (("aarch64", "arm64"), []),
}

# Real code for each generation from Turing on, and PTX of the last for those after it.
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
NVCCFLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-cudart=static",
    "--threads=0",
]


def isa_flags(source: str):
    """Flags of a source named *_avx2.cpp and the like, [] for others, None if not for this CPU."""
    for suffix, (machines, flags) in ISA.items():
        if Path(source).stem.endswith(suffix):
            return flags if platform.machine() in machines else None
    return []


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{command[0]}: {error}") from error


def flags_of(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


class BuildNative(build_ext):
    """Compiles each Extension into one shared library, whatever the Python that builds it."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # no cpython tag: it is no Python module

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (ROOT / "lowrank" / "lib").mkdir(exist_ok=True)  # where an editable install copies it
        if ext.name.endswith("cuda"):
            self.build_cuda(ext, target)
        else:
            self.build_cpu(ext, target)

    def build_cpu(self, ext: Extension, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++")) + CXXFLAGS + flags_of("CXXFLAGS")
        objects = Path(self.build_temp, ext.name)
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            compiled = str(objects / f"{Path(source).stem}.o")
            run([*compiler, *isa_flags(source), "-Icsrc", "-c", source, "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        run([*compiler, "-shared", *compiled, "-o", str(target), *flags_of("LDFLAGS")])

    def build_cuda(self, ext: Extension, target: Path) -> None:
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        archs.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        run(
            [
                nvcc(),
                *NVCCFLAGS,
                *archs,
                *flags_of("NVCCFLAGS"),
                "-Icsrc",
                "-shared",
                *ext.sources,
                "-o",
                str(target),
            ]
        )


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3: what is native in it is tied to the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, system = super().get_tag()
        return "py3", "none", system


def nvcc() -> str:
    return os.environ.get("NVCC", shutil.which("nvcc") or "")


def extensions() -> list[Extension]:
    """What there is to build here: the CPU library always, the CUDA one where nvcc is."""
    if MODE == "skip":
        return []
    optional = MODE != "require"
    headers = [str(h) for h in Path("csrc").rglob("*.h*")]
    cpu = [str(s) for s in sorted(Path("csrc").glob("*.cpp")) if isa_flags(str(s)) is not None]
    cuda = [str(s) for s in sorted(Path("csrc/cuda").glob("*.cu"))]
    wanted = [("cpu", cpu)] + ([("cuda", cuda)] if nvcc() else [])
    return [
        Extension(f"lowrank.lib.liblowrank_{name}", sources, depends=headers, optional=optional)
        for name, sources in wanted
        if sources
    ]


setup(
    packages=[
        *find_packages(include=["lowrank", "lowrank.*"], exclude=["lowrank.kernels*"]),
        "lowrank.kernels",
        *(f"lowrank.kernels.{p}" for p in find_packages("kernels")),
    ],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
