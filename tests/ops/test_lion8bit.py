"""8-bit Lion on every backend: beside bitsandbytes' Lion of 32 bits, and code by code."""

import pytest
import torch

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError, ShapeError
from lowrank.ops import adamw8bit
from tests.ops.isas import ISAS, running_on, using_threads

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
SHAPES = [(5, 700), (3, 256), (40, 16), (7,), (), (3, 5, 3, 3), (1, 1000), (2, 33), (9, 48)]


@pytest.fixture(params=["reference", *ISAS])
def backend(request):
    named = ops.use_backend("reference") if request.param == "reference" else None
    with using_threads(1), named if named is not None else running_on(request.param):
        yield


class Moved:
    """Parameters under lion8bit_step, each with its state; step by step."""

    def __init__(self, *params, **options):
        self.p = [p.clone() for p in params]
        states = [ops.adamw8bit_state(p) for p in params]
        self.m, self.m_scale = ([s[i] for s in states] for i in range(2))
        self.options = DEFAULTS | options

    def step(self, *grads):
        ops.lion8bit_step(self.p, grads, self.m, self.m_scale, **self.options)


class Theirs:
    """The same under bitsandbytes' Lion, float32 and 32 bits."""

    def __init__(self, *params, lr, beta1, beta2, weight_decay):
        self.p = [torch.nn.Parameter(p.float().clone()) for p in params]
        self.optimizer = bitsandbytes.optim.Lion(
            self.p, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay
        )

    def step(self, *grads):
        for p, grad in zip(self.p, grads, strict=True):
            p.grad = grad.float()
        self.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_step_is_bitsandbytes(backend, dtype):
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    grads = [(torch.randn(shape) * 1e-2).to(dtype) for shape in SHAPES]
    options = DEFAULTS | {"lr": 0.01, "weight_decay": 0.1}
    moved, theirs = Moved(*params, **options), Theirs(*params, **options)
    moved.step(*grads)
    theirs.step(*grads)
    for got, expected in zip(moved.p, theirs.p, strict=True):
        rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-6
        torch.testing.assert_close(got.float(), expected.detach(), rtol=rounding, atol=1e-7)


def test_fifty_steps_go_where_32_bits_go(backend):
    """A sign differs only where the moment and the gradient cancel, to what a code is off."""
    start = torch.randn(16, 512)
    moved, theirs = Moved(start), Theirs(start, **DEFAULTS)
    off = torch.tensor(0.0)
    for _ in range(50):
        grad = torch.randn_like(start) + start.sign()
        moved.step(grad)
        theirs.step(grad)
        off = max(off, (moved.p[0] - theirs.p[0].detach()).abs().mean())
    way = (theirs.p[0].detach() - start).abs().mean()
    assert off < 0.05 * way


def test_what_has_no_gradient_stays_where_it_is(backend):
    start = torch.randn(3, 1000)
    dead = torch.rand(3, 1000) < 0.5
    moved = Moved(start)
    for _ in range(30):
        moved.step(torch.randn_like(start).add_(1).masked_fill_(dead, 0))
    assert torch.equal(moved.p[0][dead], start[dead])
    assert (moved.m[0][dead] == 127).all()
    assert (moved.p[0][~dead] != start[~dead]).float().mean() > 0.99


def test_decay_alone(backend):
    start = torch.randn(4, 300)
    moved = Moved(start, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        moved.step(torch.zeros_like(start))
    torch.testing.assert_close(moved.p[0], start * 0.95**3, rtol=1e-6, atol=0)


def test_the_moment_is_coded_to_the_nearest(backend):
    table = adamw8bit.dynamic_map(True).double()
    grad = torch.randn(9, 600) * 10 ** (1.5 * torch.randn(9, 600))
    moved = Moved(torch.zeros(9, 600), beta2=0)
    moved.step(grad)
    scale = moved.m_scale[0].repeat_interleave(256, 1)[:, :600].double()
    distance = (grad.double() / scale)[..., None] - table
    taken = distance.gather(-1, moved.m[0].long()[..., None])[..., 0].abs()
    assert (taken <= distance.abs().amin(-1) * (1 + 1e-6) + 1e-7).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_and_stays_in_its_block(backend, bad):
    start = torch.randn(2, 600)
    moved, sound = Moved(start), Moved(start)
    grad = torch.randn(2, 600)
    spoilt = grad.clone()
    spoilt[1, 300] = bad
    moved.step(spoilt)
    sound.step(grad)
    assert moved.p[0][1, 300].isnan() and moved.p[0].isnan().sum() == 1
    for _ in range(2):
        moved.step(grad)
        sound.step(grad)
    touched = torch.zeros(2, 600, dtype=torch.bool)
    touched[1, 256:512] = True
    assert torch.equal(moved.p[0][~touched], sound.p[0][~touched])
    assert moved.p[0][touched].isnan().all()


def test_tiny_gradients_have_a_sign(backend):
    for size in (1e-20, 1e-38, 1e-44):
        start, grad = torch.zeros(2, 300), torch.randn(2, 300).sign() * size
        moved = Moved(start, beta1=0.0)
        moved.step(grad)
        torch.testing.assert_close(moved.p[0], -1e-3 * grad.sign(), rtol=1e-6, atol=0)


def test_rows_by_themselves_are_as_in_the_whole(backend):
    start, parts = torch.randn(10, 333), [slice(0, 3), slice(3, 4), slice(4, 10)]
    whole, sharded = Moved(start), Moved(*(start[part] for part in parts))
    for _ in range(5):
        grad = torch.randn_like(start)
        whole.step(grad)
        sharded.step(*(grad[part] for part in parts))
    for name in ("p", "m", "m_scale"):
        (expected,), got = getattr(whole, name), getattr(sharded, name)
        assert torch.equal(torch.cat(got), expected), name


def test_no_parameters_and_empty_ones(backend):
    Moved().step()
    empty = Moved(torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(0))
    empty.step(torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernels_are_the_reference_to_the_bit(isa, threads, dtype):
    ours = Moved(*(torch.randn(shape).to(dtype) for shape in SHAPES), lr=1e-2, weight_decay=0.1)
    theirs = Moved(*ours.p, lr=1e-2, weight_decay=0.1)
    for step in range(1, 9):
        spread = 10 ** (1.5 * torch.randn(()).item() - 3)
        grads = [(torch.randn(p.shape) ** 3 * spread).to(dtype) for p in ours.p]
        for grad in grads:
            if step % 3 == 0 and grad.dim() > 1:
                grad[..., ::2] = 0
        with ops.use_backend("reference"):
            theirs.step(*grads)
        strided = [g.mT.contiguous().mT if g.dim() > 1 else g for g in grads]
        with running_on(isa), using_threads(threads):
            ours.step(*(strided if step % 2 else grads))
        for name in ("p", "m", "m_scale"):
            assert all(map(torch.equal, getattr(ours, name), getattr(theirs, name))), name


def test_autograd_is_told(backend):
    p = torch.randn(3, 40, requires_grad=True)
    state = [[t] for t in ops.adamw8bit_state(p)[:2]]
    loss = (p * p).sum()
    ops.lion8bit_step([p], [torch.ones(3, 40)], *state, **DEFAULTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_wrong_is_named():
    p, grad = torch.randn(4, 300), torch.randn(4, 300)
    m, m_scale = ops.adamw8bit_state(p)[:2]
    good = {"params": [p], "grads": [grad], "m": [m], "m_scale": [m_scale], **DEFAULTS}
    ops.lion8bit_step(**good)
    for error, message, bad in (
        (ShapeError, r"grads: expected 1 tensors", {"grads": []}),
        (ShapeError, r"m_scale\[0\]: expected \[4, 2\]", {"m_scale": [m_scale[:, :1]]}),
        (DtypeError, r"m\[0\]: expected torch.uint8", {"m": [m.int()]}),
        (DtypeError, r"params\[0\]", {"params": [p.double()]}),
        (ConfigError, "lr, weight_decay", {"lr": -1.0}),
        (ConfigError, "betas", {"beta2": 1.0}),
    ):
        with pytest.raises(error, match=message):
            ops.lion8bit_step(**good | bad)
