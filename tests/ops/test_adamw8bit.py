"""8-bit AdamW on every backend: beside torch.optim.AdamW in float64, and code by code."""

import hashlib

import pytest
import torch

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError, ShapeError
from lowrank.ops import adamw8bit
from tests.ops.isas import ISAS, running_on, using_threads

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

M_MAP, V_MAP = adamw8bit.dynamic_map(True), adamw8bit.dynamic_map(False)
DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture(params=["reference", *ISAS])
def backend(request):
    named = ops.use_backend("reference") if request.param == "reference" else None
    with using_threads(1), named if named is not None else running_on(request.param):
        yield


class Moved:
    """Parameters under adamw8bit_step, each with its state; step by step."""

    def __init__(self, *params, **options):
        self.p = [p.clone() for p in params]
        states = [ops.adamw8bit_state(p) for p in params]
        self.m, self.m_scale, self.v, self.v_scale = ([s[i] for s in states] for i in range(4))
        self.options, self.steps = DEFAULTS | options, 0

    def step(self, *grads):
        self.steps += 1
        state = (self.m, self.m_scale, self.v, self.v_scale)
        ops.adamw8bit_step(self.p, grads, *state, step=self.steps, **self.options)


class Exact:
    """The same under torch.optim.AdamW in float64."""

    def __init__(self, *params, lr, beta1, beta2, eps, weight_decay):
        self.p = [p.double().requires_grad_() for p in params]
        self.optimizer = torch.optim.AdamW(
            self.p, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay
        )

    def step(self, *grads):
        for p, grad in zip(self.p, grads, strict=True):
            p.grad = grad.double()
        self.optimizer.step()


def blocks(values):
    """[N, C] -> [N, ceil(C / 256), 256], filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 256))
    return padded.unflatten(1, (-1, 256))


def test_the_maps_are_bitsandbytes():
    for signed, first_bytes in ((True, "e732639a65f497b4"), (False, "305f002cc11278fb")):
        ours = adamw8bit.dynamic_map(signed)
        assert torch.equal(ours, bitsandbytes.functional.create_dynamic_map(signed))
        assert hashlib.sha256(ours.numpy().tobytes()).hexdigest()[:16] == first_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_step_is_exact(backend, dtype):
    shapes = [(5, 700), (3, 256), (40, 16), (7,), (), (3, 5, 3, 3), (2, 1033)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    grads = [(torch.randn(shape) * 1e-2).to(dtype) for shape in shapes]
    options = DEFAULTS | {"lr": 0.01, "weight_decay": 0.1}
    moved, exact = Moved(*params, **options), Exact(*params, **options)
    moved.step(*grads)
    exact.step(*grads)
    for got, expected in zip(moved.p, exact.p, strict=True):
        rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-6
        # below its smallest normal number float16 has steps of 2^-24
        least = 2**-25 + 1e-8 if dtype == torch.float16 else 1e-8
        torch.testing.assert_close(got.double(), expected.detach(), rtol=rounding, atol=least)


def test_a_hundred_steps_are_nearer_to_torch_than_bitsandbytes(backend):
    """On a noisy quadratic, from the same start with the same noise."""
    start, curvature = torch.randn(16, 512), 10 ** (torch.rand(16, 512) * 2 - 1)
    options = DEFAULTS | {"lr": 0.01, "weight_decay": 0.01}
    moved, exact = Moved(start, **options), Exact(start, **options)
    p = torch.nn.Parameter(start.clone())
    theirs = bitsandbytes.optim.AdamW8bit([p], lr=0.01, betas=(0.9, 0.999), weight_decay=0.01)
    for _ in range(100):
        noise = 0.1 * torch.randn_like(start)
        moved.step(curvature * moved.p[0] + noise)
        exact.step(curvature * exact.p[0].detach() + noise)
        p.grad = curvature * p.detach() + noise
        theirs.step()
    end = exact.p[0].detach()
    way, off = (end - start).norm(), (moved.p[0] - end).norm()
    assert off < 0.06 * way  # what codes of 8 bits cost; 0.046 as a rule
    assert off < (p.detach() - end).norm()


def test_what_has_no_gradient_stays_where_it_is(backend):
    """bitsandbytes 0.50 on a CPU cannot store 0 and moves it, 3 % as far as its live neighbours."""
    start = torch.randn(3, 1000)
    dead = torch.rand(3, 1000) < 0.5
    moved, exact = Moved(start), Exact(start, **DEFAULTS)
    for _ in range(100):
        grad = torch.randn_like(start).add_(1).masked_fill_(dead, 0)
        moved.step(grad)
        exact.step(grad)
    assert torch.equal(moved.p[0][dead], start[dead])
    assert (moved.m[0][dead] == 127).all() and (moved.v[0][dead] == 0).all()
    way = exact.p[0].detach() - start
    assert (moved.p[0] - exact.p[0]).norm() < 0.02 * way.norm()


def test_small_gradients_beside_large_ones_do_not_run_away(backend):
    """The v of a gradient 1e-4 times its neighbour's is below the map; as 0, it gives 1e3 lr."""
    start = torch.zeros(1, 256)
    moved = Moved(start, lr=1e-3, beta2=0.99)
    scale = torch.full((1, 256), 1e-4)
    scale[0, ::16] = 1
    for step in range(60):
        grad = scale * (1 + 0.1 * torch.randn_like(start))
        if step % 5 == 4:
            grad[0, 1::16] = 0  # m is not, and v must not be, 0 here
        moved.step(grad)
    assert moved.p[0].abs().max() < 1.2 * 60 * 1e-3
    assert (moved.v[0] > 0).all()


def test_decay_alone(backend):
    start = torch.randn(4, 300)
    moved = Moved(start, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        moved.step(torch.zeros_like(start))
    torch.testing.assert_close(moved.p[0], start * 0.95**3, rtol=1e-6, atol=0)


def test_codes_are_the_nearest(backend):
    grad = torch.randn(9, 600) * 10 ** (1.5 * torch.randn(9, 600))
    moved = Moved(torch.zeros(9, 600), beta1=0, beta2=0)
    moved.step(grad)
    for values, codes, scale, table in (
        (grad, moved.m[0], moved.m_scale[0], M_MAP),
        (grad * grad, moved.v[0], moved.v_scale[0], V_MAP[1:]),
    ):
        scaled = blocks(values).double() / scale[..., None].double()
        distance = (scaled[..., None] - table.double()).abs()  # to each code
        nearest = distance.amin(-1).flatten(1)[:, :600]
        first = 256 - len(table)  # 1 in v, where only 0 is coded as 0
        chosen = blocks(codes)[..., None].long().sub(first).clamp(min=0)
        taken = distance.gather(-1, chosen)[..., 0].flatten(1)[:, :600]
        assert (taken <= nearest * (1 + 1e-6) + 1e-7).all()
    assert (moved.v[0] > 0).all()


def test_a_tie_goes_to_the_code_nearer_zero(backend):
    values = M_MAP[127:-1].double()
    exact = (values[:-1] + values[1:]) / 2
    middles, lower = exact.float(), torch.arange(127)
    tied = middles.double() == exact
    above = torch.nextafter(middles, torch.tensor(2.0))
    for sign in (1, -1):
        for s, expected in ((middles[tied], lower[tied]), (above, lower + 1)):
            grad = torch.cat([s * sign, torch.ones(1)])[None]
            moved = Moved(torch.zeros_like(grad), beta1=0, beta2=0)
            moved.step(grad)
            assert moved.m_scale[0].item() == 1
            assert torch.equal(moved.m[0][0, :-1], (127 + sign * expected).to(torch.uint8))


def test_lines_and_midpoints_find_the_code():
    """Of every 61st float that has one, from a random one on, and of those around each midpoint."""
    lowest, highest = adamw8bit.LOWEST, adamw8bit.HIGHEST
    for entries in (M_MAP[127:], V_MAP[1:]):
        lines, mids = adamw8bit.lines_and_mids(entries)
        exact = (entries[1:].double() + entries[:-1].double()) / 2
        around = exact.float().view(torch.int32)[:, None] + torch.arange(-20, 21)
        spread = torch.arange(lowest + int(torch.randint(61, ())), highest + 1, 61)
        b = torch.cat([spread.int(), around.flatten().int(), torch.tensor([lowest, highest])])
        b = b.clamp(lowest, highest).int()
        line = lines[(b - lowest >> 20).long()]
        rise = ((b & 0xFFFFF).long() * (line & 0xFFFF) >> 20).int()
        low = (line >> 16) + rise >> 6
        below = low + (b > mids[low])
        assert torch.equal(below, torch.bucketize(b.view(torch.float32).double(), exact).int())


def test_the_largest_is_kept_whatever_its_sign(backend):
    """The map has 1 and not -1: with the plain absmax a lasting m < 0 would lose 0.7 % a step."""
    moved = Moved(torch.zeros(2, 256))
    grad = torch.randn(2, 256).clamp(-1, 1)
    grad[0, 3], grad[1, 3] = 2, -2
    for _ in range(200):
        moved.step(grad)
    kept = M_MAP[moved.m[0][:, 3].long()] * moved.m_scale[0][:, 0]
    torch.testing.assert_close(kept, torch.tensor([2.0, -2.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_stays_in_its_block(backend, bad):
    start = torch.randn(2, 600)
    moved, sound = Moved(start), Moved(start)
    grad = torch.randn(2, 600)
    for step in range(2):
        sound.step(grad)
        spoilt = grad.clone()
        if step == 0:
            spoilt[1, 300] = bad
        moved.step(spoilt)
        assert moved.p[0][1, 300].isnan()
    touched = torch.zeros(2, 600, dtype=torch.bool)
    touched[1, 256:512] = True
    assert torch.equal(moved.p[0][~touched], sound.p[0][~touched])
    assert moved.p[0][touched].isnan().all()


def test_tiny_gradients_are_no_trouble(backend):
    for size in (1e-20, 1e-38, 1e-44):
        start = torch.randn(2, 300)
        moved = Moved(start)
        for _ in range(3):
            moved.step(torch.randn(2, 300) * size)
        assert (moved.p[0] - start).abs().max() < 1e-6


def test_rows_by_themselves_are_as_in_the_whole(backend):
    start, parts = torch.randn(10, 333), [slice(0, 3), slice(3, 4), slice(4, 10)]
    whole, sharded = Moved(start), Moved(*(start[part] for part in parts))
    for _ in range(5):
        grad = torch.randn_like(start)
        whole.step(grad)
        sharded.step(*(grad[part] for part in parts))
    for name in ("p", "m", "m_scale", "v", "v_scale"):
        (expected,), got = getattr(whole, name), getattr(sharded, name)
        assert torch.equal(torch.cat(got), expected), name


def test_no_parameters_and_empty_ones(backend):
    Moved().step()
    empty = Moved(torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(0))
    empty.step(torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(0))


def test_leaves_of_a_graph_are_changed_and_autograd_is_told(backend):
    p = torch.randn(3, 40, requires_grad=True)
    state = [[t] for t in ops.adamw8bit_state(p)]
    loss = (p * p).sum()
    ops.adamw8bit_step([p], [torch.ones(3, 40)], *state, step=1, **DEFAULTS)
    assert p.requires_grad and p.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles_into_one_graph(backend):
    start, grad = torch.randn(3, 300), torch.randn(3, 300)
    eager, compiled = Moved(start), Moved(start)

    def step(p, grad, m, m_scale, v, v_scale):
        ops.adamw8bit_step([p], [grad * 2], [m], [m_scale], [v], [v_scale], step=1, **DEFAULTS)
        return p * 2

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = [getattr(compiled, name)[0] for name in ("m", "m_scale", "v", "v_scale")]
    doubled = run(compiled.p[0], grad, *args)
    eager.step(grad * 2)
    assert torch.equal(doubled, eager.p[0] * 2)
    for name in ("p", "m", "m_scale", "v", "v_scale"):
        assert torch.equal(getattr(eager, name)[0], getattr(compiled, name)[0])


def test_what_is_wrong_is_named():
    p, grad = torch.randn(4, 300), torch.randn(4, 300)
    m, m_scale, v, v_scale = ops.adamw8bit_state(p)
    good = {"params": [p], "grads": [grad], "m": [m], "m_scale": [m_scale], "v": [v]}
    good |= {"v_scale": [v_scale], "step": 1, **DEFAULTS}
    ops.adamw8bit_step(**good)
    for error, message, bad in (
        (ShapeError, r"grads: expected 1 tensors", {"grads": []}),
        (ShapeError, r"grads\[0\]: expected \[4, 300\]", {"grads": [grad.T]}),
        (ShapeError, r"m_scale\[0\]: expected \[4, 2\]", {"m_scale": [m_scale[:, :1]]}),
        (DtypeError, r"grads\[0\]: expected torch.float32", {"grads": [grad.half()]}),
        (DtypeError, r"m\[0\]: expected torch.uint8", {"m": [m.int()]}),
        (DtypeError, r"params\[0\]", {"params": [p.double()]}),
        (ConfigError, r"v\[0\]: expected on cpu", {"v": [v.to("meta")]}),
        (ConfigError, "step: expected 1", {"step": 0}),
        (ConfigError, "lr, eps", {"lr": -1.0}),
        (ConfigError, "betas", {"beta2": 1.0}),
    ):
        with pytest.raises(error, match=message):
            ops.adamw8bit_step(**good | bad)
