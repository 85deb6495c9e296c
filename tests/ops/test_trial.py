"""An instruction set whose kernels are wrong is refused when the library is loaded, by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.ops import native, trial
from tests.ops.isas import ISAS, needs_library

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
# "AVX-512" that is generic but for one kernel, which the environment names; AVX2 is generic.
BROKEN = """
#include <stdlib.h>
#include <string.h>
#include "kernels.h"
namespace lowrank {
static void quantize(const void* a, int32_t b, int64_t c, const CodebookWeight& d, uint8_t* packed,
                     float* f, int32_t g) {
  kernels_generic()->quantize(a, b, c, d, packed, f, g);
  packed[1] ^= 1;
}
static void dequantize(const CodebookWeight& a, const Rectangle& b, void* out, int32_t d,
                       int32_t e) {
  kernels_generic()->dequantize(a, b, out, d, e);
  static_cast<uint16_t*>(out)[1] ^= 1;
}
static int32_t linear(const void* a, int32_t b, int64_t c, const CodebookWeight& d, const float* e,
                      const lowrank_lora* f, void* y, int32_t g) {
  kernels_generic()->linear(a, b, c, d, e, f, y, g);
  memset(y, 0, f ? 0 : 4);
  return 0;
}
static int32_t lora_linear(const void* a, int32_t b, int64_t c, const CodebookWeight& d,
                           const float* e, const lowrank_lora* f, void* y, int32_t g) {
  kernels_generic()->linear(a, b, c, d, e, f, y, g);
  if (f) f->h[f->R] = 0;
  return 0;
}
static int32_t linear_backward(const float* a, const float* b, int64_t c, const CodebookWeight& d,
                               const lowrank_lora* e, const LinearGradients& f, int32_t g) {
  kernels_generic()->linear_backward(a, b, c, d, e, f, g);
  f.dB[1] = 0;
  return 0;
}
static int32_t products(const void* a, int32_t b, int64_t c, int64_t d, const lowrank_product* e,
                        int64_t f, void* const* y, int32_t g) {
  return kernels_generic()->products(a, b, c, d, e, f - 1, y, g);
}
static int32_t attend(const lowrank_newest& a, const void* b, const void* c, const void* d,
                      const int64_t* e, int32_t f, void* g, void* h, void* i, int32_t j) {
  lowrank_newest one = a;
  one.softcap = 0;
  return kernels_generic()->attend_newest(one, b, c, d, e, f, g, h, i, j);
}
static int32_t linear_int16(const void* a, int32_t b, int64_t c, const CodebookWeight& d,
                            const float* e, void* f, int32_t g) {
  kernels_generic()->linear_int16(a, b, c, d, e, f, g);
  return 1;
}
static void softmax(float* a, const int64_t* b, int64_t c, int64_t d, float* loss, bool f,
                    int32_t g) {
  kernels_generic()->softmax_cross_entropy(a, b, c, d, loss, f, g);
  loss[1] += 0.01f;
}
static void gather(const void* a, int32_t b, int64_t c, int64_t d, const lowrank_rows& e,
                   const lowrank_dropout*, float* g, int32_t h) {
  kernels_generic()->gather_rows(a, b, c, d, e, nullptr, g, h);
}
static void scatter(const float* a, int64_t b, const lowrank_rows& c, const lowrank_dropout* d,
                    bool, void* f, int32_t g, int64_t h, int32_t i) {
  kernels_generic()->scatter_rows(a, b, c, d, false, f, g, h, i);
}
static void rms_norm(const Norm& a, const void* b, float c, void* d, float* rstd, int32_t f) {
  kernels_generic()->rms_norm(a, b, c, d, rstd, f);
  rstd[1] *= 1.01f;
}
static void rms_norm_backward(const Norm& a, const void* b, const void* c, const float* d, void* e,
                              float* dweight, int32_t f) {
  kernels_generic()->rms_norm_backward(a, b, c, d, e, dweight, f);
  dweight[74] = 9;
}
static void rotate(const lowrank_heads& a, int32_t b, const lowrank_angles& c, bool, void* d,
                   int32_t e) {
  kernels_generic()->rotate(a, b, c, false, d, e);
}
static void gated(const lowrank_gate& a, void* y, int32_t b) {
  lowrank_gate silu = a;
  silu.activation = 0;
  kernels_generic()->gated(silu, y, b);
}
static void gated_backward(const lowrank_gate& a, const void* b, void* c, void*, int32_t d) {
  kernels_generic()->gated_backward(a, b, c, c, d);
}
static void adamw(const lowrank_moments8bit_tensor& a, int64_t b, int64_t c, const AdamwStep& d) {
  kernels_generic()->adamw8bit(a, b, c, d);
  a.v[299] ^= 1;
}
static void lion(const lowrank_moments8bit_tensor& a, int64_t b, int64_t c, const LionStep& d) {
  kernels_generic()->lion8bit(a, b, c, d);
  a.m_scale[1] *= 2;
}
const Kernels* kernels_avx2() { return kernels_generic(); }
const Kernels* kernels_avx512() {
  static Kernels kernels = *kernels_generic();
  const char* broken = getenv("BROKEN");
  if (!strcmp(broken, "codebook_quantize")) kernels.quantize = quantize;
  if (!strcmp(broken, "codebook_dequantize")) kernels.dequantize = dequantize;
  if (!strcmp(broken, "codebook_linear")) kernels.linear = linear;
  if (!strcmp(broken, "codebook_lora_linear")) kernels.linear = lora_linear;
  if (!strcmp(broken, "codebook_lora_backward")) kernels.linear_backward = linear_backward;
  if (!strcmp(broken, "codebook_products")) kernels.products = products;
  if (!strcmp(broken, "attend_newest")) kernels.attend_newest = attend;
  if (!strcmp(broken, "codebook_linear_int16")) kernels.linear_int16 = linear_int16;
  if (!strcmp(broken, "softmax_cross_entropy")) kernels.softmax_cross_entropy = softmax;
  if (!strcmp(broken, "gather_rows")) kernels.gather_rows = gather;
  if (!strcmp(broken, "scatter_rows")) kernels.scatter_rows = scatter;
  if (!strcmp(broken, "rms_norm")) kernels.rms_norm = rms_norm;
  if (!strcmp(broken, "rms_norm_backward")) kernels.rms_norm_backward = rms_norm_backward;
  if (!strcmp(broken, "rotate")) kernels.rotate = rotate;
  if (!strcmp(broken, "gated")) kernels.gated = gated;
  if (!strcmp(broken, "gated_backward")) kernels.gated_backward = gated_backward;
  if (!strcmp(broken, "adamw8bit_step")) kernels.adamw8bit = adamw;
  if (!strcmp(broken, "lion8bit_step")) kernels.lion8bit = lion;
  return &kernels;
}
}  // namespace lowrank
"""
KERNELS = [name.removeprefix("lowrank_") for name in native.FUNCTIONS]
# blocks: the other functions one after another, which has no kernel of its own
KERNELS = [
    n
    for n in KERNELS
    if n not in ("abi", "blocks") and "isa" not in n and not n.endswith("columns")
]
SCRIPT = """
from lowrank import ops
from lowrank.cli import env
from lowrank.ops import native
print(native.isa(), *native.refused_isas())
print(env.versions_and_devices()["native CPU kernels"])
print(ops.explain("codebook_linear"))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package whose AVX-512 kernels are broken."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(ROOT / "lowrank", folder / "lowrank", ignore=shutil.ignore_patterns("lib"))
    (folder / "lowrank" / "lib").mkdir()
    (folder / "broken.cpp").write_text(BROKEN)
    sources = [f for f in (ROOT / "csrc").glob("*.cpp") if "_" not in f.stem]
    sources += [ROOT / "csrc" / "kernels_generic.cpp", folder / "broken.cpp"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off"]
    library = folder / "lowrank" / "lib" / "liblowrank_cpu.so"
    command = [COMPILER, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", library]
    subprocess.run(command, check=True, timeout=300)
    return folder


def told(copy: Path, broken: str, **environment) -> list[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LOWRANK_")}
    env |= {"PYTHONPATH": str(copy), "BROKEN": broken, **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: install g++")
@pytest.mark.parametrize("isa", [ISAS[native.ISAS.index("avx512")]])
@pytest.mark.parametrize("broken", [*KERNELS, "nothing"])
def test_a_broken_kernel_is_refused_and_the_next_set_is_used(copy, broken, isa):
    chosen, kernels, *explained = told(copy, broken)
    if broken == "nothing":
        assert chosen == "avx512" and "refused" not in "".join((kernels, *explained))
        return
    reason = f"its {broken} is not the generic one's; LOWRANK_ISA=avx512 forces it"
    assert chosen == "avx2 avx512"
    assert kernels.startswith("avx2, of ") and kernels.endswith(f"; avx512 refused: {reason}")
    assert f"  (avx512 is refused: {reason})" in explained
    assert "  cpu: here" in explained
    if broken == KERNELS[0]:
        chosen, *_ = told(copy, broken, LOWRANK_ISA="avx512")
        assert chosen == "avx512"


@pytest.mark.parametrize("isa", ISAS)
def test_what_was_built_here_passes(isa):
    before = native.isa()
    try:
        assert trial.wrong_function(native.load_cpu(), native.ISAS.index(isa)) is None
        assert native.isa() == isa
    finally:
        native.use_isa(before)


@needs_library
def test_every_function_that_computes_is_tried():
    text = Path(trial.__file__).read_text()
    computing = {n.removeprefix("lowrank_") for n in native.FUNCTIONS if "isa" not in n}
    assert {name for name in computing if f'"{name}"' not in text} == {"abi", "blocks"}


@needs_library
def test_neither_torchs_modes_nor_its_seed_play_a_part():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from lowrank.ops import native
state = torch.get_rng_state()
torch.set_default_dtype(torch.float64)
with FakeTensorMode(), torch.device("meta"):
    native.load_cpu()
assert torch.equal(state, torch.get_rng_state()) and not native.refused_isas()
print(native.isa())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() in native.ISAS, done.stderr


@needs_library
def test_threads_that_come_at_once_find_the_library_tried_and_try_it_once():
    code = """
import threading, time
from lowrank.ops import native, trial
tried, found, start = [], [], threading.Barrier(4)
wrong_function = trial.wrong_function
def slow(library, isa):
    tried.append(isa)
    time.sleep(0.2)
    return wrong_function(library, isa)
def first_call():
    start.wait()
    native.load_cpu()
    found.append(native.isa())
trial.wrong_function = slow
threads = [threading.Thread(target=first_call) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(tried) == len(set(tried)), tried
assert found == [native.usable_isas()[-1]] * 4, found
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LOWRANK_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
