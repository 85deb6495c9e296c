"""The CUDA kernels as they are, compiled for this processor: every thread a fiber, in random order.

The library is the same sources, C ABI and launchers included, over `emulated_cuda/`. What it cannot
show is speed, and how a tensor core rounds within a product.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank import ops
from lowrank.errors import BackendError
from lowrank.ops import cuda as backend
from lowrank.ops import native, reference
from lowrank.ops.cuda import launch
from tests.ops.cuda_weights import (
    ADAMW_SHAPES,
    BLOCKS,
    DTYPES,
    SHAPES,
    allowed_error,
    cases,
    product,
    rounded,
)
from tests.ops.guarded import guarded, unwritten
from tests.ops.interpreted_dequantize import random_weight
from tests.ops.interpreted_quantize import hard_weight
from tests.ops.sparse import rows_apart

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "emulated_cuda"
# Undefined behaviour, such as a load that is not aligned, ends the program.
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
    *(f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"),
]
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs a CPU with Linux's mmap and mprotect"
)
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a CPU with g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulated_cuda")
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATOR / "emulation.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    compiling = [
        subprocess.Popen(["g++", *FLAGS, "-x", "c++", "-c", source, "-o", made])
        for source, made in zip(sources, objects, strict=True)
    ]
    assert [process.wait(timeout=300) for process in compiling] == [0] * len(compiling)
    path = folder / "libemulated.so"
    subprocess.run(["g++", "-shared", *objects, "-o", path], check=True, timeout=60)
    loaded = ctypes.CDLL(str(path))
    for name, argtypes in native.CUDA_FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = argtypes, ctypes.c_int32
    loaded.lowrank_cuda_message.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(autouse=True)
def on_emulator(library, monkeypatch):
    """The backend `cuda` by name, over CPU tensors and the emulator's device 0."""
    monkeypatch.setattr(native, "load_cuda", lambda: library)
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "place", lambda device: (0, 0))
    monkeypatch.setattr(launch, "has_tensor_cores", lambda device: True)
    with ops.use_backend("cuda"):
        yield


def test_it_is_the_same_interface(library):
    assert library.lowrank_cuda_abi() == native.ABI and library.lowrank_cuda_ready() == 0
    assert backend.missing() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_reference_to_the_bit(dtype, generator):
    for _, K, G, weight in cases(generator):
        got = ops.codebook_dequantize(*weight, K, G, dtype)
        assert torch.equal(got, reference.codebook_dequantize(*weight, K, G, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_quantize_is_the_reference_to_the_bit(dtype, per_row, generator):
    for i, (N, K) in enumerate([*SHAPES, (2, 4500)]):
        for G in [32, 64, 256, 512, 4096]:
            table = torch.rand(N if per_row else 1, 16, generator=generator) * 2 - 1
            if i % 2:
                table = table.sort(dim=1).values.contiguous()
            weight = hard_weight(N, K, table, generator).to(dtype)
            weight[N // 2] *= 1e-39  # subnormal, or zeros
            wide = torch.randn(N, K + 3, generator=generator).to(dtype)
            for w in (weight, weight.T.contiguous().T, wide[:, 1 : K + 1]):
                want = reference.codebook_quantize(w, table, G)
                assert all(map(torch.equal, ops.codebook_quantize(w, table, G), want))


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_quantize_shows_what_is_not_finite_in_absmax(bad, generator):
    weight = torch.randn(3, 4200, generator=generator)
    weight[1, 4100] = bad
    for G in (64, 4096):
        _, absmax = ops.codebook_quantize(weight, torch.linspace(-1, 1, 16)[None], G)
        expected = torch.ones(absmax.shape, dtype=torch.bool)
        expected[1, 4100 // G] = False
        assert torch.equal(absmax.isfinite(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 11, 16])
def test_linear_is_within_its_bound_of_float64_whatever_the_order_of_threads(M, dtype, generator):
    for i, (N, K, G, weight) in enumerate(cases(generator)):
        if (i + M) % 3:
            continue  # a third of the cases for each M
        x = torch.randn(M, K, generator=generator).to(dtype)
        bias = torch.randn(N, generator=generator).to(dtype) if i % 2 else None
        y = ops.codebook_linear(x, *weight, bias, G)
        error = (y.double() - product(x, weight, K, G, bias)).abs()
        assert (error <= allowed_error(x, weight, K, G, bias)).all()
        near = rounded(weight, dtype)
        error = (y.double() - product(x, near, K, G, bias)).abs()
        assert (error <= allowed_error(x, near, K, G, bias, codebook_rounded=False)).all()
        assert torch.equal(y, ops.codebook_linear(x, *weight, bias, G))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-30, 12])
def test_linear_takes_codebooks_of_any_magnitude(power, dtype, generator):
    packed, absmax, _, codebook = random_weight(20, 192, 64, False, False, generator)
    weight = (packed, absmax, None, codebook * 10.0**power)
    x = torch.randn(2, 192, generator=generator).to(dtype)
    y = ops.codebook_linear(x, packed, absmax * 10.0**-power, None, weight[3], None, 64)
    weight = (packed, absmax * 10.0**-power, None, weight[3])
    error = (y.double() - product(x, weight, 192, 64, None)).abs()
    assert (error <= allowed_error(x, weight, 192, 64, None)).all()


def test_linear_of_a_codebook_of_zeros_and_of_zero_scales_is_the_bias(generator):
    packed, absmax, _, codebook = random_weight(20, 192, 32, False, False, generator)
    bias, x = torch.randn(20).half(), torch.randn(4, 192).half()
    for table, scales in ((codebook * 0, absmax), (codebook, absmax * 0)):
        y = ops.codebook_linear(x, packed, scales, None, table, bias, 32)
        assert torch.equal(y, bias.expand(4, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_rows_come_with_it(dtype, generator):
    N, K = 70, 700  # of W; the emulator's one multiprocessor then takes 32 at once, and 16 of 20
    for rows, G in ((slice(None), 32), (slice(20), 64)):
        packed, absmax, scale, codebook = random_weight(N, K, G, True, False, generator)
        weight = (packed[rows], absmax[rows], scale[rows], codebook)
        x = torch.randn(16, K, generator=generator).to(dtype)
        whole = ops.codebook_linear(x, *weight, None, G)
        for M in (1, 2, 4, 6, 8):
            assert torch.equal(ops.codebook_linear(x[:M], *weight, None, G), whole[:M])


def test_rows_of_x_do_not_touch_one_another(generator):
    weight = random_weight(20, 300, 64, True, False, generator)
    x = torch.randn(5, 300, generator=generator).bfloat16()
    want = ops.codebook_linear(x, *weight, None, 64)
    x[2, 7] = torch.nan
    got = ops.codebook_linear(x, *weight, None, 64)
    assert got[2].isnan().all()
    kept = [0, 1, 3, 4]
    assert torch.equal(got[kept], want[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_views_and_of_no_rows_and_of_many(dtype, generator):
    N, K, G = 24, 128, 64
    weight = random_weight(N, K, G, True, False, generator)
    wide = torch.randn(3, 2, 2 * K, generator=generator).to(dtype)
    for x in (wide[..., ::2], wide[..., 1 : K + 1], wide[:, :1, :K], wide[:0, :, :K]):
        y = ops.codebook_linear(x, *weight, None, G)
        assert torch.equal(y, ops.codebook_linear(x.contiguous(), *weight, None, G))
        assert y.shape == (*x.shape[:-1], N) and y.dtype == dtype
    many = torch.randn(17, K, generator=generator).to(dtype)
    w = reference.codebook_dequantize(*weight, K, G, dtype)
    assert torch.equal(ops.codebook_linear(many, *weight, None, G), many @ w.T)
    assert torch.equal(ops.codebook_linear_dx(many[:, :N], *weight, K, G), many[:, :N] @ w)


def test_before_ampere_16_bit_x_is_multiplied_as_float32(monkeypatch, generator):
    weight = random_weight(20, 192, 64, True, False, generator)
    x = torch.randn(3, 192, generator=generator).half()
    bias = torch.randn(20, generator=generator).half()
    monkeypatch.setattr(launch, "place", lambda device: (1, 0))  # the emulator's Turing
    with pytest.raises(BackendError, match="lacks the instructions"):
        ops.codebook_linear(x, *weight, bias, 64)
    monkeypatch.setattr(launch, "has_tensor_cores", lambda device: False)
    y = ops.codebook_linear(x, *weight, bias, 64)
    exact = ops.codebook_linear(x.float(), *weight, bias.float(), 64)
    assert torch.equal(y, exact.half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw8bit_has_the_codes_and_scales_of_the_reference_to_the_bit(dtype, generator):
    # The last has its own storage, not aligned for loads of several elements.
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in ADAMW_SHAPES]
    params.append(torch.randn(900, generator=generator).to(dtype)[1:].view(31, 29))
    ours = [[p, *ops.adamw8bit_state(p)] for p in params]
    for step in range(1, 7):
        spread = 10 ** (1.5 * torch.randn((), generator=generator).item() - 3)
        grads = [
            (torch.randn(p.shape, generator=generator).pow(3) * spread).to(dtype) for p in params
        ]
        for grad in grads:
            if step % 3 == 0 and grad.dim() > 1:
                grad[..., ::2] = 0
        theirs = [[t.clone() for t in state] for state in ours]
        with ops.use_backend("reference"):
            take(theirs, grads, step)
        take(ours, grads, step)
        for got, expected in zip(ours, theirs, strict=True):
            # torch's square root may be one off in the last place, and so a parameter.
            off = torch.finfo(dtype).eps
            torch.testing.assert_close(got[0], expected[0], rtol=off, atol=1e-8)
            assert all(map(torch.equal, got[1:], expected[1:]))


def test_adamw8bit_of_more_tensors_than_one_launch_takes_and_of_none(generator):
    params = [torch.randn(i % 3, 2, generator=generator) for i in range(1300)]
    ours = [[p, *ops.adamw8bit_state(p)] for p in params]
    theirs = [[t.clone() for t in state] for state in ours]
    grads = [torch.randn(2, p.shape[0], generator=generator).T for p in params]  # not contiguous
    take(ours, grads, 1)
    with ops.use_backend("cpu" if native.load_cpu() is not None else "reference"):
        take(theirs, grads, 1)
    for got, expected in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, got[1:], expected[1:]))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-8)
    backend.adamw8bit_step([], [], [], [], [], [], 1e-3, 0.9, 0.99, 1e-8, 0.0, 1)


def test_adamw8bit_says_that_it_wrote_and_shows_what_is_not_finite(generator):
    p = torch.randn(2, 300, generator=generator).requires_grad_()
    state = [p, *ops.adamw8bit_state(p)]
    loss = p.square().sum()
    grad = torch.randn(2, 300, generator=generator)
    grad[1, 299] = torch.nan
    take([state], [grad], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    expected = torch.tensor([[True, True], [True, False]])
    assert torch.equal(state[2].isfinite(), expected)
    assert torch.equal(state[4].isfinite(), expected)


def take(states, grads, step):
    params, *rest = zip(*states, strict=True)
    ops.adamw8bit_step(params, grads, *rest, step=step, **OPTIONS)


@needs_linux
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("G", BLOCKS)
def test_nothing_beyond_the_end_of_a_tensor_is_touched(G, dtype, generator, monkeypatch):
    def empty(*shape, dtype, device):
        return unwritten(*(shape[0] if len(shape) == 1 else shape), dtype=dtype)

    for N, K in [(3, 40), (17, 96), (33, 1024)]:
        for double_quant, per_row in ((True, False), (False, True)):
            weight = random_weight(N, K, G, double_quant, per_row, generator)
            bias, x = (torch.randn(n, generator=generator).to(dtype) for n in ((N,), (6, K)))
            table = torch.rand(1, 16, generator=generator)

            def results(weight, bias, x, table, G=G):
                yield ops.codebook_linear(x[:1], *weight, bias, G)
                yield ops.codebook_linear(x, *weight, bias, G)
                yield ops.codebook_dequantize(*weight, x.shape[1], G, x.dtype)
                yield from ops.codebook_quantize(x, table, G)

            expected = list(results(weight, bias, x, table))
            ends = [t if t is None else guarded(t) for t in weight]
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", empty)
                got = list(results(ends, guarded(bias), guarded(x), guarded(table)))
            assert all(map(torch.equal, got, expected))


@needs_linux
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw8bit_touches_nothing_beyond_the_end_of_a_tensor(dtype, generator):
    shapes = [(3, 300), (5, 7), (1, 256)]
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours = [[t.clone() for t in (g, *ops.adamw8bit_state(g))] for g in grads]
    ends = [[guarded(t) for t in state] for state in ours]
    take(ours, grads, 1)
    take(ends, [guarded(g) for g in grads], 1)
    for got, expected in zip(ends, ours, strict=True):
        assert all(map(torch.equal, got, expected))


@needs_linux
@pytest.mark.parametrize("stride", [3 << 29, (1 << 31) + 16])
def test_rows_may_lie_more_than_two_to_the_31_elements_apart(stride, generator):
    weight = random_weight(20, 128, 64, True, False, generator)
    for dtype in DTYPES:
        x = torch.randn(3, 128, generator=generator).to(dtype)
        far = rows_apart(x, stride)
        y = ops.codebook_linear(x, *weight, None, 64)
        assert torch.equal(ops.codebook_linear(far, *weight, None, 64), y)
        table = weight[3]
        got, want = (ops.codebook_quantize(t, table, 64) for t in (far, x))
        assert all(map(torch.equal, got, want))


def test_bad_arguments_are_refused_by_status(library):
    weight = random_weight(4, 64, 64, False, False, None)
    packed, absmax, _, codebook = weight
    x, y = torch.randn(1, 64), torch.empty(1, 4)

    given = {
        "x": x.data_ptr(), "dtype": 0, "M": 1, "stride": 64, "packed": packed.data_ptr(),
        "absmax": absmax.data_ptr(), "scale": None, "codebook": codebook.data_ptr(), "T": 1, "N": 4,
        "K": 64, "G": 64, "bias": None, "y": y.data_ptr(), "device": 0, "stream": None,
    }  # fmt: skip

    def linear(**other):
        return library.lowrank_cuda_codebook_linear(*(given | other).values())

    assert linear() == 0 and linear(M=0, x=None) == 0 and linear(N=0, y=None) == 0
    wrong = (
        {"x": None}, {"y": None}, {"packed": None}, {"dtype": 3}, {"M": 17}, {"M": -1}, {"T": 2},
        {"stride": 63}, {"stride": 66}, {"N": -1}, {"K": 0}, {"K": (1 << 30) + 1}, {"G": 48},
        {"G": 16}, {"G": 8192}, {"x": x.data_ptr() + 4}, {"packed": packed.data_ptr() + 4},
    )  # fmt: skip
    for arguments in wrong:
        assert linear(**arguments) == 1, arguments
    assert linear(device=2) == 1101  # LOWRANK_CUDA_ERROR + cudaErrorInvalidDevice
    assert library.lowrank_cuda_message(1101) == b"invalid device ordinal"
    assert library.lowrank_cuda_message(1) == b"an argument was refused"


def test_refusals_name_what_they_cannot_take(generator):
    packed, absmax, scale, codebook = random_weight(8, 100, 64, True, False, generator)
    x = torch.randn(2, 100)

    def reason(x=x, packed=packed, absmax=absmax, scale=scale, codebook=codebook, bias=None, G=64):
        return backend.refuse("codebook_linear", x, packed, absmax, scale, codebook, bias, G)

    assert reason() is None
    assert "float64" in reason(x=x.double())
    assert "packed" in reason(x=torch.randn(2, 300)) and "packed" in reason(packed=packed.int())
    assert "absmax" in reason(absmax=absmax.float()) and "absmax" in reason(scale=None)
    assert "absmax_scale" in reason(scale=scale.double())
    assert "codebook" in reason(codebook=codebook.double())
    assert "power of two" in reason(G=96)
    assert "bias" in reason(bias=torch.randn(7)) and "bias" in reason(bias=torch.randn(8).half())
    assert "not all tensors are on" in reason(absmax=absmax.to("meta"))
    assert "runs on" in reason(x=x.to("meta"))
    off = torch.zeros(8 * 64 + 4, dtype=torch.uint8)[4:].view(8, 64)
    assert "aligned" in reason(packed=off)
    assert "float64" in backend.refuse("codebook_quantize", x.double(), codebook, 64)
    assert "dy" in backend.refuse(
        "codebook_linear_dx", x[:, :7], packed, absmax, scale, codebook, 100, 64
    )
    assert "length" in backend.refuse("adamw8bit_step", [x], [], [x], [x], [x], [x])
