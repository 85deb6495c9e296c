"""A few rows of x past all that is asked on the way: the same bits, and only where nobody asks."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import ops
from lowrank.ops import few_rows
from lowrank.ops.cpu.codebook import goes_by_panels
from lowrank.ops.few_rows import FewRows
from tests.ops.isas import needs_library

pytestmark = needs_library
SCHEMES = [("nf4", {}), ("nf4", {"double_quant": False}), ("fp4", {"block_size": 128})]


def layer(N=45, K=63, scheme="nf4", bias=True, **options) -> lowrank.QuantLinear:
    return lowrank.QuantLinear(K, N, bias=bias, quantizer=lowrank.quant.get(scheme, **options))


def operands(made: lowrank.QuantLinear):
    return made.quantizer.codebook_operands(made.storage)


def few(made: lowrank.QuantLinear) -> FewRows:
    *weight, block_size = operands(made)
    held = dict(made.named_parameters())
    found = FewRows.over(held, tuple(weight), made.in_features, block_size)
    assert found is not None and found.is_of(held)
    return found


def slow(made: lowrank.QuantLinear, x: torch.Tensor, bias=None) -> torch.Tensor:
    *weight, block_size = operands(made)
    return torch.ops.lowrank.codebook_linear(x, *weight, bias, block_size)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_same_bits_as_the_operator(scheme, dtype):
    for N, K in ((1, 1), (45, 63), (128, 96), (3, 577)):
        made = layer(N, K, scheme[0], **scheme[1])
        for shape in ((K,), (1, K), (1, 1, K), (2, 8, K), (16, K)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(few(made).product(x, None), slow(made, x))
        for M in (17, 27, 100, 1024):  # as many rows as a prompt has
            x = torch.randn(M, K).to(dtype)
            y = few(made).product(x, None)
            assert y is None or torch.equal(y, slow(made, x))
            assert (y is None) == goes_by_panels(x, N)
        bias = made.bias if dtype == torch.float32 else None
        x = torch.randn(2, K).to(dtype)
        assert torch.equal(few(made).product(x, bias), slow(made, x, bias))
        assert torch.equal(made(x), slow(made, x, made.bias.to(dtype)))


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_norm_of_the_same_bits_as_the_operators(dtype, plus_one):
    for H, shape in ((1, (1,)), (63, (1, 1)), (576, (2, 8)), (20, (16,)), (63, (3, 99))):
        x, weight = torch.randn(*shape, H).to(dtype), torch.randn(H)
        for w in (weight, weight.to(dtype)):
            y = few_rows.rms_norm(x, w, 1e-5, plus_one)
            assert y.dtype == dtype
            assert torch.equal(y, torch.ops.lowrank.rms_norm(x, w, 1e-5, plus_one)[0])


@torch.no_grad()
def test_no_norm_where_somebody_has_to_see_it_or_refuse_it():
    x, weight = torch.randn(2, 63), torch.ones(63)
    assert few_rows.rms_norm(x, weight, 1e-5, False) is not None
    for other in (
        torch.randn(0, 63), torch.randn(2, 62), torch.tensor(1.0),
        torch.randn(63, 2).T, x.double(), x.to("meta"), x.int(),
    ):  # fmt: skip
        assert few_rows.rms_norm(other, weight, 1e-5, False) is None
    for other in (torch.ones(1, 63), torch.ones(126)[::2], weight.double(), weight.to("meta")):
        assert few_rows.rms_norm(x, other, 1e-5, False) is None
    with torch.enable_grad():
        assert few_rows.rms_norm(x, weight, 1e-5, False) is None
    with ops.use_backend("reference"):
        assert few_rows.rms_norm(x, weight, 1e-5, False) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert few_rows.rms_norm(x, weight, 1e-5, False) is None


class Seen(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Seen.calls += "codebook_linear" in str(func)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_not_where_somebody_has_to_see_the_call():
    made = layer()
    found, x = few(made), torch.randn(3, 63)
    assert found.product(x, made.bias) is not None
    for other in (
        torch.randn(1024, 63), torch.randn(0, 63), torch.randn(3, 62), torch.randn(63, 3).T,
        torch.randn(3, 63).double(), torch.randn(3, 63, device="meta"), nn.Parameter(x).to("meta"),
        torch.tensor(1.0), torch.randn(3, 63).int(), torch.randn(63).to_sparse(),
    ):  # fmt: skip
        assert found.product(other, None) is None
    unaligned = torch.frombuffer(bytearray(4 * 63 + 1), dtype=torch.float32, offset=1, count=63)
    assert found.product(unaligned, None) is None
    for bias in (made.bias.double(), made.bias[:44], made.bias.repeat(2)[::2]):
        assert found.product(x, bias) is None
    with torch.enable_grad():
        assert found.product(x, made.bias) is None  # its gradient is asked for
        assert found.product(x.clone().requires_grad_(), None) is None
        assert found.product(x, None) is not None
    for name in ("reference", "cpu", "cpu_int16"):
        with ops.use_backend(name):
            assert found.product(x, None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert found.product(x, None) is None
    with Seen():
        made(x)
    assert Seen.calls == 1
    y = torch.func.vmap(made)(x[:, None])
    torch.testing.assert_close(y[:, 0], made(x))
    with torch.inference_mode():
        assert found.product(torch.randn(3, 63), made.bias) is not None


@torch.no_grad()
def test_a_weight_that_the_kernel_refuses_or_that_is_not_held():
    made = layer()
    *weight, block_size = operands(made)
    held = dict(made.named_parameters())
    over = FewRows.over
    assert over(held, tuple(weight), 96, block_size) is None
    assert over(held, tuple(weight), 63, 48) is None
    assert over(held | {"packed": held["packed"].clone()}, tuple(weight), 63, block_size) is None
    found = over(held, tuple(weight), 63, block_size)
    assert not found.is_of(held | {"codebook": held["codebook"].clone()})
    held["packed"].data = held["packed"].data.clone()
    assert not found.is_of(held)


@torch.no_grad()
def test_what_a_layer_holds_may_change_between_calls():
    made, x = layer(), torch.randn(2, 63)

    def assert_current(made=made):
        exact = x.double() @ made.dequantize(torch.float64).T + made.bias.double()
        torch.testing.assert_close(made(x), exact.float(), rtol=1e-5, atol=1e-5)

    assert_current()
    made.storage = layer(scheme="fp4").storage
    assert_current()
    made.load_state_dict(layer(block_size=32).state_dict())
    assert_current()
    made.load_state_dict(layer(block_size=32).state_dict(), assign=True)
    assert_current()
    for parameter in made.parameters():
        parameter.data = parameter.data.clone()
    made.get_parameter("packed").data.random_(0, 255)
    assert_current()
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        twin.get_parameter("packed").random_(0, 255)
        assert_current(twin)
    assert_current()
    made.bias = nn.Parameter(torch.randn(45))
    assert_current()
    made.storage = layer(scheme="int8").storage
    assert_current()
    made.storage = layer().storage
    assert_current()
    assert made.to("meta")(x.to("meta")).is_meta
