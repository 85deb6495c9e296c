"""Every exported function between unreadable pages: no byte past a buffer is read or written.

The functions are called as the library exports them, each buffer exactly as long as `lowrank.h`
says and hardly ever aligned; `make sanitize` runs this under AddressSanitizer too.
"""

from __future__ import annotations

import ctypes
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lowrank import ops
from lowrank.ops import adamw8bit, lion8bit, native, reference
from lowrank.ops.reference.philox import kept
from tests.ops.guarded import guarded, unwritten
from tests.ops.isas import ISAS, running_on
from tests.ops.weights import dense, random_weight

pytestmark = pytest.mark.parametrize("isa", ISAS)

CASES = 60
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


# What chooses the kernels is tested in test_native.py.
CONTROL = ("lowrank_abi", "lowrank_isa_in_use", "lowrank_isa_usable", "lowrank_use_isa")


@pytest.fixture(autouse=True)
def kernels(isa):
    with running_on(isa):
        yield


def call(name: str, *arguments) -> None:
    """Call the library; of a tensor it gets the address, of None and of nothing a null."""
    plain = [(a.data_ptr() or None) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert getattr(native.load_cpu(), name)(*plain) == 0


def test_every_function_is_called_here(isa):
    files = Path(__file__).parent.glob("test_cpu_bounds*.py")
    text = "".join(file.read_text() for file in files)
    called = set(re.findall(r'"(lowrank_\w+)"', text)) - set(CONTROL)
    assert called == set(native.FUNCTIONS) - set(CONTROL)


def random_shape() -> tuple[int, int, int]:
    """N, K, G: no rows, no columns, a last block of one element, several blocks, whole ones."""
    G = random.choice((32, 64, 128, 512))
    K = random.choice((0, 1, 31, 32, 33, G, G + 1, 2 * G - 1, 3 * G, random.randrange(1, 1100)))
    return random.randrange(0, 10), K, G


def weights():
    """(N, K, G, weight in guarded memory, the same weight dense)."""
    for _ in range(CASES):
        N, K, G = random_shape()
        tables = random.choice((1, max(1, N)))
        weight = random_weight(N, K, G, random.random() < 0.5, tables)
        far = tuple(None if t is None else guarded(t) for t in weight)
        yield N, K, G, far, dense(*weight, K, G)


def weight_arguments(weight, N: int, K: int, G: int):
    return (*weight, weight[3].shape[0], N, K, G)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(dtype):
    for _ in range(CASES):
        N, K, G = random_shape()
        tables, stride = random.choice((1, max(1, N))), K + random.choice((0, 5))
        rows = guarded(torch.randn(max(0, (N - 1) * stride + K)).to(dtype))
        weight = rows.as_strided((N, K), (stride, 1)) if N else rows.view(0, K)
        codebook = guarded(torch.rand(tables, 16) * 2 - 1)
        packed = unwritten(N, (K + 31) // 32 * 16, dtype=torch.uint8)
        absmax = unwritten(N, -(-K // G), dtype=torch.float32)
        call(
            "lowrank_codebook_quantize", rows, native.DTYPES[dtype], N, K, stride,
            codebook, tables, G, packed, absmax, random.choice((1, 2)),
        )  # fmt: skip
        if N and K:
            expected = reference.codebook_quantize(weight, codebook, G)
            assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype):
    for N, K, G, weight, w in weights():
        n0 = random.randrange(0, N + 1)
        n1 = random.choice((N, random.randrange(n0, N + 1)))
        out = unwritten(n1 - n0, K, dtype=dtype)
        call(
            "lowrank_codebook_dequantize", *weight_arguments(weight, N, K, G),
            n0, n1, out, native.DTYPES[dtype], random.choice((1, 2)),
        )  # fmt: skip
        assert torch.equal(out, w[n0:n1].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_columns(dtype):
    for N, K, G, weight, w in weights():
        k0 = random.randrange(0, K // 32 + 1) * 32
        k1 = random.choice((K, random.randrange(k0, K + 1)))
        out = unwritten(N, k1 - k0, dtype=dtype)
        call(
            "lowrank_codebook_dequantize_columns", *weight_arguments(weight, N, K, G),
            k0, k1, out, native.DTYPES[dtype], random.choice((1, 2)),
        )  # fmt: skip
        assert torch.equal(out, w[:, k0:k1].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["lowrank_codebook_linear", "lowrank_codebook_linear_int16"])
def test_linear(kernel, dtype):
    for N, K, G, weight, w in weights():
        M = random.choice((0, 1, 2, 3, 4, 5, 8, 17))
        x, y = guarded(torch.randn(M, K).to(dtype)), unwritten(M, N, dtype=dtype)
        bias = guarded(torch.randn(N)) if random.random() < 0.5 else None
        call(
            kernel, x, native.DTYPES[dtype], M,
            *weight_arguments(weight, N, K, G), bias, y, random.choice((1, 2)),
        )  # fmt: skip
        exact, bound = x.double() @ w.T.double(), x.double().abs() @ w.T.double().abs()
        if bias is not None:
            exact, bound = exact + bias, bound + bias.abs()
        allowed = EPS[dtype] * bound + torch.finfo(dtype).smallest_normal
        if kernel.endswith("int16"):  # of the largest that x and the table may be: 14 and 16 bits
            table = weight[3].abs().amax(1, keepdim=True).expand(-1, 16)
            largest = dense(*weight[:3], table, K, G).abs().sum(1)
            allowed += 2**-13 * x.double().abs().amax(1, keepdim=True) * largest if K else 0
        assert ((y - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_with_an_adapter(dtype):
    for N, K, G, weight, w in weights():
        if N == 0:
            continue
        M, R = random.choice((0, 1, 8, 17, 33)), random.choice((1, 3, 8, 13, 300))
        x, y = guarded(torch.randn(M, K).to(dtype)), unwritten(M, N, dtype=dtype)
        A, B = guarded(torch.randn(R, K)), guarded(torch.randn(N, R))
        h, bias = unwritten(M, R, dtype=torch.float32), guarded(torch.randn(N))
        by, mask = None, torch.ones(M, K)
        seed, p = torch.randint(-(2**62), 2**62, ()), 0.4
        dropout = native.Dropout(int(seed), reference.threshold(p), 1 / (1 - p))
        if random.random() < 0.5 and K:
            by = ctypes.addressof(dropout)
            mask = kept(torch.arange(M), K, p, seed) * torch.tensor(1 / (1 - p))
        lora = native.Lora(A.data_ptr(), B.data_ptr(), h.data_ptr(), R, 0.5, by)
        call(
            "lowrank_codebook_lora_linear", x, native.DTYPES[dtype], M,
            *weight_arguments(weight, N, K, G), bias, ctypes.addressof(lora), y,
            random.choice((1, 2)),
        )  # fmt: skip
        z = (x.float() * mask).double()
        exact_h, bound_h = z @ A.T.double(), z.abs() @ A.T.double().abs()
        assert ((h - exact_h).abs() <= EPS[torch.float32] * bound_h + 1e-37).all()
        exact = x.double() @ w.T.double() + bias + exact_h @ B.T.double() / 2
        bound = x.double().abs() @ w.T.double().abs() + bias.abs() + bound_h @ B.T.abs().double()
        allowed = EPS[dtype] * bound + torch.finfo(dtype).smallest_normal
        assert ((y - exact).abs() <= allowed).all()


def near(got, exact, bound) -> bool:
    """Each element, of sums whose terms' sizes add up to `bound`."""
    return bool(((got - exact).abs() <= EPS[torch.float32] * bound + 1e-37).all())


def test_backward_with_an_adapter():
    for N, K, G, weight, w in weights():
        if 0 in (N, K):
            continue
        M, R = random.choice((1, 8, 17, 33)), random.choice((1, 3, 8, 13, 300))
        dy, x, h, A, B = (torch.randn(s) for s in ((M, N), (M, K), (M, R), (R, K), (N, R)))
        far = [guarded(t) for t in (dy, x, h, A, B)]
        has_lora, needs, add = random.random() < 0.7, [random.random() < 0.7 for _ in "xAB"], 0
        needs = [needs[0], needs[1] and has_lora, needs[2] and has_lora]
        outs = [unwritten(*s, dtype=torch.float32) for s in ((M, K), (R, K), (N, R))]
        if random.random() < 0.5:
            add, _ = 1, outs[0].fill_(2.0)
        at_h = far[2].data_ptr() if needs[2] else None
        lora = native.Lora(far[3].data_ptr(), far[4].data_ptr(), at_h, R, 0.5, None)
        dx, dA, dB = (out if need else None for out, need in zip(outs, needs, strict=True))
        call(
            "lowrank_codebook_lora_backward", far[0], far[1] if needs[1] else None, M,
            *weight_arguments(weight, N, K, G), ctypes.addressof(lora) if has_lora else None, dx,
            add, dA, dB, random.choice((1, 2)),
        )  # fmt: skip
        dy, x, h, A, B, w = (t.double() for t in (dy, x, h, A, B, w))
        g, bound_g = dy @ B / 2, dy.abs() @ B.abs() / 2
        if needs[0]:
            exact, bound = dy @ w + 2.0 * add, dy.abs() @ w.abs() + 2.0 * add
            if has_lora:
                exact, bound = exact + g @ A, bound + bound_g @ A.abs()
            assert near(dx, exact, bound)
        if needs[1]:
            assert near(dA, g.T @ x, bound_g.T @ x.abs())
        if needs[2]:
            assert near(dB, dy.T @ h / 2, dy.abs().T @ h.abs())


def test_softmax_cross_entropy():
    for _ in range(CASES):
        T, V = random.randrange(0, 6), random.choice((1, 2, 15, 16, 17, 63, 64, 1031))
        z, labels = torch.randn(T, V) * 4, torch.randint(0, V, (T,))
        logits, loss, gradient = guarded(z), unwritten(T, dtype=torch.float32), T % 2
        call(
            "lowrank_softmax_cross_entropy", logits, guarded(labels), T, V, loss, gradient,
            random.choice((1, 2)),
        )  # fmt: skip
        expected = F.cross_entropy(z, labels, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
        softmax = z.softmax(1) - F.one_hot(labels, V) if gradient else z
        torch.testing.assert_close(logits, softmax, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_gathered_and_scattered(dtype):
    for case in range(CASES):
        M, K = random.randrange(1, 9), random.choice((0, 1, 3, 63, 64, 65, 130, 600))
        stride, count = K + random.choice((0, 5)), random.randrange(0, M + 1)
        order = torch.randperm(M)[:count].int() if case % 3 else torch.arange(count).int()
        some, seed, p = order.long(), torch.randint(-(2**62), 2**62, ()), 0.4
        memory = guarded(torch.randn((M - 1) * stride + K).to(dtype))
        x = memory.as_strided((M, K), (stride, 1))
        far = guarded(order)
        rows = native.Rows(far.data_ptr() if case % 3 and count else None, 0, count, M)
        dropout = native.Dropout(int(seed), reference.threshold(p), 1 / (1 - p))
        by, mask = None, torch.ones(count, K)
        if case % 2:
            by = ctypes.addressof(dropout)
            mask = kept(order, K, p, seed) * torch.tensor(1 / (1 - p))
        panel = unwritten(count, K, dtype=torch.float32)
        call(
            "lowrank_gather_rows", memory, native.DTYPES[dtype], K, stride,
            ctypes.addressof(rows), by, panel, random.choice((1, 2)),
        )  # fmt: skip
        assert torch.equal(panel, x[some].float() * mask)
        expected, add = memory.clone(), case % 5 > 2
        expected.as_strided(x.shape, x.stride())[some] = (panel * mask + add * x[some]).to(dtype)
        call(
            "lowrank_scatter_rows", panel, K, ctypes.addressof(rows), by, add, memory,
            native.DTYPES[dtype], stride, random.choice((1, 2)),
        )  # fmt: skip
        assert torch.equal(memory, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_and_its_gradients(dtype):
    for case in range(CASES):
        M, H = random.randrange(0, 5), random.choice((1, 3, 15, 16, 17, 63, 64, 65, 130, 600))
        x, dy = (guarded(torch.randn(M, H).to(dtype)) for _ in range(2))
        kind, plus_one, threads = random.choice(DTYPES), case % 2, random.choice((1, 2))
        weight = guarded(torch.randn(H).to(kind))
        y, rstd = unwritten(M, H, dtype=dtype), unwritten(M, 1, dtype=torch.float32)
        of_weight = (weight, native.DTYPES[kind], plus_one)
        of_x = (x, native.DTYPES[dtype], M, H, *of_weight)
        call("lowrank_rms_norm", *of_x, 1e-5, y, rstd, threads)
        dx, dweight = unwritten(M, H, dtype=dtype), unwritten(H, dtype=torch.float32)
        wanted = random.choice(((dx, dweight), (dx, None), (None, dweight)))
        call("lowrank_rms_norm_backward", dy, *of_x, rstd, *wanted, threads)
        exact = x.double().requires_grad_(), weight.double().requires_grad_()
        n = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        expected = n * (exact[1] + plus_one)
        gradients = torch.autograd.grad(expected, exact, dy.double())
        # what dx is a difference of
        slope = (dy.double() * (weight.double() + plus_one) * rstd).abs().sum() if M else 0
        got = zip((y, *wanted), (expected.detach(), *gradients), strict=True)
        for ours, right in got:
            if ours is not None and M:
                error = EPS[torch.float32 if ours is dweight else dtype] + 2e-6
                assert (ours - right).abs().max() <= error * right.abs().max() + 1e-6 * (1 + slope)
        if not M and wanted[1] is not None:
            assert (dweight == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate(dtype):
    for case in range(CASES):
        B, S, heads = random.randrange(1, 4), random.randrange(0, 4), random.randrange(1, 4)
        half, rest = random.choice((0, 1, 7, 8, 16, 17, 35)), random.choice((0, 1, 9))
        D, kind = 2 * half + rest, random.choice((dtype, torch.float32))
        padded = torch.randn(B, heads, S, D + 3).to(dtype)  # as a part of a joined projection
        size = max(0, padded.numel() - 3) if D else 0
        memory = guarded(padded.flatten()[:size])
        strides = (heads * S * (D + 3), D + 3, S * (D + 3), 1)
        x = memory.as_strided((B, S, heads, D), strides) if size else padded[..., :D].mT.mT
        x = x if size else torch.empty(B, S, heads, D, dtype=dtype)
        one = random.choice((1, B))
        cos = guarded(torch.randn(one, S, 1, 2 * half).to(kind))
        sin = guarded(torch.randn(one, S, 1, half).to(kind))
        angles = native.Angles(
            cos.data_ptr() or None, sin.data_ptr() or None, one, 2 * half, native.DTYPES[kind]
        )
        of_x = native.Heads(memory.data_ptr() or None, B, S, heads, D, *strides[:3])
        y, back = unwritten(B, S, heads, D, dtype=dtype), case % 2
        call(
            "lowrank_rotate", ctypes.addressof(of_x), native.DTYPES[dtype],
            ctypes.addressof(angles), back, y, random.choice((1, 2)),
        )  # fmt: skip
        right = reference.rotate(x.double(), x.double(), cos.double(), sin.double(), bool(back))[0]
        assert ((y - right).abs() <= EPS[dtype] * (right.abs() + 4)).all()
        assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_and_its_gradients(dtype):
    for case in range(CASES):
        M, width = random.randrange(0, 5), random.choice((0, 1, 3, 15, 16, 17, 63, 64, 65, 600))
        tensors, strides = [], []
        for _ in range(2):
            strides.append(width + random.choice((0, 5)))
            memory = guarded((torch.randn(max(0, (M - 1) * strides[-1] + width)) * 4).to(dtype))
            full = M and width
            tensors.append(memory.as_strided((M, width), (strides[-1], 1)) if full else memory)
        gate, up = tensors
        of = native.Gate(
            gate.data_ptr() or None, up.data_ptr() or None, M, width, *strides,
            native.DTYPES[dtype], case % 2,
        )  # fmt: skip
        threads = random.choice((1, 2))
        y, dgate, dup = (unwritten(M, width, dtype=dtype) for _ in range(3))
        dy = guarded(torch.randn(M, width).to(dtype))
        call("lowrank_gated", ctypes.addressof(of), y, threads)
        call("lowrank_gated_backward", ctypes.addressof(of), dy, dgate, dup, threads)
        if not (M and width):
            continue
        exact = gate.double().requires_grad_(), up.double().requires_grad_()
        activated = F.gelu(exact[0], approximate="tanh") if case % 2 else F.silu(exact[0])
        right = activated * exact[1]
        gradients = torch.autograd.grad(right, exact, dy.double())
        bound = (gate.double().abs() + 1) * (up.double().abs() + 1) * (dy.double().abs() + 1)
        for ours, exactly in zip((y, dgate, dup), (right, *gradients), strict=True):
            allowed = EPS[dtype] * (exactly.abs() + 1e-2) + 1e-6 * bound
            assert ((ours - exactly).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw8bit_step(dtype):
    numbers = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    maps = [guarded(adamw8bit.dynamic_map(signed)) for signed in (True, False)]
    for step in range(1, CASES // 2):
        lists = []
        for _ in range(random.randrange(0, 4)):
            shape = random.randrange(0, 5), random.choice((0, 1, 7, 16, 255, 256, 257, 600))
            p = torch.randn(shape).to(dtype)
            m, m_scale, v, v_scale = ops.adamw8bit_state(p)
            m, v = torch.randint_like(m, 256), torch.randint_like(v, 256)
            m_scale, v_scale = torch.rand_like(m_scale), torch.rand_like(v_scale)
            tensors = (p, torch.randn(shape).to(dtype), m, m_scale, v, v_scale)
            lists.append(([t.clone() for t in tensors], [guarded(t) for t in tensors]))
        ours = (native.Moments8bitTensor * len(lists))()
        for i, (_, (p, g, m, m_scale, v, v_scale)) in enumerate(lists):
            pointers = (t.data_ptr() for t in (p, g, m, v, m_scale, v_scale))
            ours[i] = native.Moments8bitTensor(*pointers, *p.shape, native.DTYPES[dtype])
        by = native.Adamw8bitCoefficients(*adamw8bit.coefficients(**numbers, step=step))
        call(
            "lowrank_adamw8bit_step", ctypes.addressof(ours), len(lists), *maps,
            ctypes.addressof(by), random.choice((1, 2)),
        )  # fmt: skip
        for expected, got in lists:
            reference.adamw8bit_step(*([t] for t in expected), *numbers.values(), step)
            torch.testing.assert_close(got[0], expected[0], rtol=2 * EPS[dtype], atol=1e-6)
            assert all(map(torch.equal, got[2:], expected[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lion8bit_step(dtype):
    numbers = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    table = guarded(adamw8bit.dynamic_map(True))
    by = native.Lion8bitCoefficients(*lion8bit.coefficients(**numbers))
    for _ in range(CASES // 2):
        lists = []
        for _ in range(random.randrange(0, 4)):
            shape = random.randrange(0, 5), random.choice((0, 1, 7, 16, 255, 256, 257, 600))
            p = torch.randn(shape).to(dtype)
            m, m_scale = ops.adamw8bit_state(p)[:2]
            m, m_scale = torch.randint_like(m, 256), torch.rand_like(m_scale)
            tensors = (p, torch.randn(shape).to(dtype), m, m_scale)
            lists.append(([t.clone() for t in tensors], [guarded(t) for t in tensors]))
        columns = list(zip(*(got for _, got in lists), strict=True)) or [()] * 4
        ours = native.moments8bit_tensors(*columns)
        call(
            "lowrank_lion8bit_step", ctypes.addressof(ours), len(lists), table,
            ctypes.addressof(by), random.choice((1, 2)),
        )  # fmt: skip
        for expected, got in lists:
            reference.lion8bit_step(*([t] for t in expected), *numbers.values())
            assert all(map(torch.equal, got, expected))
