"""rms_norm, rotate and gated against torch in float64, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError, ShapeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(autouse=True, params=["reference", None], ids=["reference", "best"])
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def near(got, expected, dtype, scale=1.0):
    """Within what rounding a few steps in that dtype does to numbers of that scale."""
    allowed = 8 * torch.finfo(dtype).eps * (expected.abs() + scale)
    return ((got.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 63), (2, 5, 576), (2, 0, 4), (70, 3, 64)])
def test_rms_norm_and_both_gradients(shape, plus_one, dtype):
    x, weight, dy = (torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape))
    ours, exact = leaves(x, weight), leaves(x.double(), weight.double())
    y = ops.rms_norm(*ours, 1e-3, plus_one)
    assert y.dtype == dtype and y.shape == x.shape
    expected = F.rms_norm(exact[0], shape[-1:], exact[1] + plus_one, 1e-3)
    assert near(y, expected, dtype)
    got = torch.autograd.grad(y, ours, dy)
    right = torch.autograd.grad(expected, exact, dy.double())
    rows = x.numel() // shape[-1]
    size = 1 / x.double().square().mean(-1).sqrt().clamp(min=0.02).min().item() if rows else 1
    assert near(got[0], right[0], dtype, 8 * size)
    assert near(got[1], right[1], dtype, 4 * rows**0.5)


def test_the_weight_of_a_norm_may_be_of_another_dtype_and_x_of_any_strides():
    x = torch.randn(4, 6, 32).transpose(0, 1)
    weight = torch.randn(32)
    expected = F.rms_norm(x, (32,), weight, 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)
    y = ops.rms_norm(x.bfloat16(), weight, 1e-6)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "turned"), [(64, 64), (20, 10), (7, 6), (3, 0)])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotate_and_its_gradients(D, turned, batch, dtype):
    B, S = 3, 5
    angle = torch.randn(batch, S, 1, turned // 2, dtype=torch.float64) * 100
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(dtype), angle.sin().to(dtype)
    q, k = torch.randn(B, S, 6, D).to(dtype), torch.randn(B, 2, S, D).to(dtype).transpose(1, 2)
    ours = leaves(q, k)
    got = ops.rotate(*ours, cos, sin)
    slopes = [torch.randn(t.shape).to(dtype) for t in (q, k)]
    gradients = torch.autograd.grad(got, ours, slopes)
    half = turned // 2
    unit = torch.complex(cos[..., :half].double(), sin.double())

    def turn(x, unit):  # as complex numbers
        x = x.double()
        pairs = torch.complex(x[..., :half], x[..., half:turned]) * unit
        return torch.cat([pairs.real, pairs.imag, x[..., turned:]], -1)

    for x, y, dy, dx in zip((q, k), got, slopes, gradients, strict=True):
        assert y.dtype == dtype and y.is_contiguous()
        assert near(y, turn(x, unit), dtype, 2)
        assert near(dx, turn(dy, unit.conj()), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", [(5,), (3, 63), (2, 4, 1000), (2, 0, 3)])
def test_gated_and_its_gradients(shape, activation, dtype):
    gate, up, dy = (torch.randn(shape).to(dtype) * 3 for _ in range(3))
    ours, exact = leaves(gate, up), leaves(gate.double(), up.double())
    y, expected = ops.gated(*ours, activation), GATES[activation](exact[0]) * exact[1]
    assert near(y, expected, dtype, 1 + up.double().abs())
    got = torch.autograd.grad(y, ours, dy)
    right = torch.autograd.grad(expected, exact, dy.double())
    size = (1 + gate.double().square()) * (1 + up.double().abs()) * (1 + dy.double().abs())
    assert all(near(g, r, dtype, size) for g, r in zip(got, right, strict=True))


def test_the_halves_of_a_joined_projection_are_gated_as_they_lie():
    joined = torch.randn(3, 5, 2 * 33, requires_grad=True)
    apart = leaves(*joined.chunk(2, dim=-1))
    y, expected = ops.gated(*joined.chunk(2, dim=-1), "silu"), ops.gated(*apart, "silu")
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, joined, dy)[0]
    assert torch.equal(got, torch.cat(torch.autograd.grad(expected, apart, dy), dim=-1))


def test_gates_that_are_large_infinite_or_not_a_number():
    gate = torch.tensor([-torch.inf, -1e30, -200.0, -88.0, 0.0, 88.0, 1e30, torch.inf, torch.nan])
    for activation in ("silu", "gelu_tanh"):
        got, expected = ops.gated(gate, gate.new_ones(9), activation), GATES[activation](gate)
        finite = slice(1, 7)
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-6, atol=1e-36)
        assert got[7] == torch.inf and got[8].isnan()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiler_sees_their_meaning_where_no_backend_has_kernels(backend, dtype):
    """As on a GPU, where it makes one kernel of them; of the CPU's it sees a call."""
    x, weight, up = (torch.randn(s).to(dtype) for s in ((2, 5, 4, 8), (8,), (2, 5, 4, 8)))
    angle = torch.randn(2, 5, 1, 3, dtype=torch.float64)
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(dtype), angle.sin().to(dtype)
    called = []

    def block(x, weight, up):
        q, k = ops.rotate(ops.rms_norm(x, weight, 1e-5, True), up, cos, sin)
        return ops.gated(q, k, "gelu_tanh")

    def record(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    eager, ours = leaves(x, weight, up), leaves(x, weight, up)
    torch.compiler.reset()
    y = torch.compile(block, fullgraph=True, backend=record)(*ours)
    expected, dy = block(*eager), torch.randn_like(y)
    opaque = [name for name in called if "lowrank" in name]
    assert opaque == [] if backend == "reference" else len(opaque) == 3
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y, ours, dy)
    torch.testing.assert_close(got, torch.autograd.grad(expected, eager, dy))
    torch.compiler.reset()


def test_bad_input_is_named():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ShapeError, match=r"x, weight: expected \[..., H\] and \[H\]"):
        ops.rms_norm(x, weight[:-1], 1e-5)
    with pytest.raises(DtypeError, match="weight: expected torch.float32"):
        ops.rms_norm(x, weight.int(), 1e-5)
    with pytest.raises(ConfigError, match="plus_one: expected True or False; got 1"):
        ops.rms_norm(x, weight, 1e-5, 1)
    q, k, cos, sin = (torch.randn(2, 3, h, d) for h, d in ((4, 8), (2, 8), (1, 8), (1, 4)))
    with pytest.raises(ShapeError, match="q, k: expected"):
        ops.rotate(q, k[:, 1:], cos, sin)
    with pytest.raises(ShapeError, match=r"cos: expected \[1 or 2, 3, 1, T\] with T <= 8 even"):
        ops.rotate(q, k, sin[..., :3], sin)
    with pytest.raises(ShapeError, match=r"sin: expected \[2, 3, 1, 4\]"):
        ops.rotate(q, k, cos, cos)
    with pytest.raises(ConfigError, match="cos, sin: expected constants"):
        ops.rotate(q, k, cos.requires_grad_(), sin)
    with pytest.raises(ShapeError, match="gate, up: expected"):
        ops.gated(x, x[:1], "silu")
    with pytest.raises(DtypeError, match="up: expected the dtype of gate"):
        ops.gated(x, x.half(), "silu")
    with pytest.raises(ConfigError, match="activation: expected one of silu, gelu, gelu_tanh"):
        ops.gated(x, x, "swish")
