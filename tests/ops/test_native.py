"""The loader of the native library: one table of signatures, and reasons where it is not usable."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank import ops
from lowrank.errors import BackendError, ConfigError
from lowrank.ops import cpu, native
from tests.ops.isas import needs_library
from tests.ops.weights import random_weight

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "lowrank.h"


def python(code, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_table_is_the_header():
    header = HEADER.read_text()
    assert f"#define LOWRANK_ABI {native.ABI}\n" in header
    declared = {
        name: arguments
        for name, arguments in re.findall(
            r"LOWRANK_EXPORT int32_t (\w+)\((.*?)\);", header, flags=re.DOTALL
        )
    }
    assert declared.keys() == native.FUNCTIONS.keys()
    kinds = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    for name, arguments in declared.items():
        parts = [a.strip() for a in arguments.split(",") if a.strip() != "void"]
        expected = [ctypes.c_void_p if "*" in a else kinds[a.split()[0]] for a in parts]
        assert list(native.FUNCTIONS[name]) == expected, name


@needs_library
def test_every_usable_isa_can_be_chosen_and_named():
    before = native.isa()
    try:
        for name in native.usable_isas():
            native.use_isa(name)
            assert native.isa() == name
    finally:
        native.use_isa(before)
    with pytest.raises(ConfigError, match="isa: expected one of"):
        native.use_isa("sse9")
    for name in set(native.ISAS) - set(native.usable_isas()):
        with pytest.raises(BackendError, match="instruction set"):
            native.use_isa(name)


@needs_library
def test_the_environment_chooses_the_isa():
    code = "from lowrank.ops import native; print(native.isa())"
    done = python(code, LOWRANK_ISA="generic")
    assert done.returncode == 0 and done.stdout == "generic\n", done.stderr
    done = python("from lowrank.ops import native; print(native.load_cpu())", LOWRANK_ISA="sse9")
    assert "LOWRANK_ISA: expected one of generic, avx2, avx512, neon; got 'sse9'" in done.stdout


@needs_library
def test_one_openmp_runtime():
    code = (
        "from lowrank.ops import native; native.load_cpu()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({p for p in maps if 'libgomp' in p or 'libomp' in p}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs a CPU with Linux's /proc/self/maps")
    assert python(code).stdout == "1\n"


@needs_library
def test_what_the_pointers_need_is_refused_with_a_reason():
    packed, absmax, scale, codebook = random_weight(8, 100, 64, double_quant=True)
    x = torch.randn(2, 100)

    def reason(x=x, packed=packed, absmax=absmax, scale=scale, codebook=codebook, bias=None, G=64):
        return cpu.refuse("codebook_linear", x, packed, absmax, scale, codebook, bias, G)

    assert reason() is None
    assert "float64" in reason(x=x.double())
    assert "packed" in reason(x=torch.randn(2, 300))
    assert "packed" in reason(packed=packed.int())
    assert "contiguous" in reason(packed=packed.T.contiguous().T)
    assert "absmax" in reason(absmax=absmax[:4])
    assert "absmax" in reason(absmax=absmax.float())
    assert "absmax" in reason(scale=None)
    assert "absmax_scale" in reason(scale=scale[:4])
    assert "absmax_scale" in reason(scale=scale.double())
    assert "codebook" in reason(codebook=codebook.repeat(2, 1))
    assert "codebook" in reason(codebook=codebook.double())
    assert "contiguous" in reason(codebook=codebook.repeat(1, 2)[:, ::2].expand(8, 16))
    assert "power of two" in reason(G=96)
    assert "bias" in reason(bias=torch.randn(7))
    assert "not all tensors are on the CPU" in reason(x=x.to("meta"))
    assert "rows" in cpu.refuse("codebook_quantize", torch.randn(64, 8).T, codebook, 64)
    assert "float64" in cpu.refuse("codebook_quantize", torch.randn(8, 64).double(), codebook, 64)
    assert "labels" in cpu.refuse(
        "linear_cross_entropy", x, torch.randn(5, 100), torch.zeros(3, dtype=torch.int64), True
    )
    assert "dy" in cpu.refuse(
        "codebook_linear_dx", torch.randn(2, 7), packed, absmax, scale, codebook, 100, 64
    )


@needs_library
def test_asked_by_name_a_refusal_is_an_error():
    weight = random_weight(8, 64)
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        ops.codebook_linear(torch.randn(2, 64, dtype=torch.float64), *weight)
