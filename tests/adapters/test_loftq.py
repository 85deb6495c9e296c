"""LoftQ and QPiSSA over every scheme: against PEFT's, and against the SVD in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lowrank import quant
from lowrank.adapters import svd
from lowrank.adapters.loftq import loftq
from lowrank.adapters.pissa import qpissa
from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError
from tests.adapters.oracle import peft_model, spread_singular_values_
from tests.quant.schemes import same

METHODS = [loftq, qpissa]
SHAPES = [(48, 96), (96, 48), (40, 123), (63, 63)]


def weight_like_a_models(N: int, K: int, dtype=torch.float32) -> torch.Tensor:
    """Normal, with a few directions that stand out, as trained weights have."""
    strong = torch.randn(N, 4) @ torch.randn(4, K)
    return ((torch.randn(N, K) + 0.5 * strong) / K**0.5).to(dtype)


def error(quantizer, weight, storage, A, B, scaling=1.0) -> float:
    base = quantizer.dequantize(storage, torch.float64)
    return (weight.double() - base - scaling * B.double() @ A.double()).norm().item()


def error_alone(quantizer, weight) -> float:
    base = quantizer.dequantize(quantizer.quantize(weight), torch.float64)
    return (weight.double() - base).norm().item()


@pytest.mark.parametrize("method", METHODS)
def test_less_is_lost_than_by_quantizing_alone(method, quantizer):
    exact = quantizer.name == "none"
    for shape in SHAPES:
        weight = weight_like_a_models(*shape)
        alone = error_alone(quantizer, weight)
        storage, A, B = method(weight, quantizer, 8)
        assert A.shape == (8, shape[1]) and B.shape == (shape[0], 8)
        assert A.dtype == B.dtype == torch.float32 and tuple(storage.shape) == shape
        once = error(quantizer, weight, storage, A, B)
        assert once <= (1e-6 * weight.norm() if exact else 0.97 * alone)
        more = error(quantizer, weight, *method(weight, quantizer, 8, num_iter=4))
        assert more <= once * (1 + 1e-5) + 1e-6


class OnCPU(TorchFunctionMode):
    """PEFT's LoftQ moves what it is given to a GPU; here it stays."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(value):
            is_device = isinstance(value, str | torch.device)
            return "cpu" if is_device and str(value) == "cuda" else value

        kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
        return func(*map(here, args), **kwargs)


@pytest.mark.parametrize("num_iter", [1, 3])
@pytest.mark.parametrize(("bits", "name"), [(4, "nf4"), (8, "int8")])
def test_loftq_is_pefts(bits, name, num_iter):
    """The same codes at first, and a product that leaves the same error."""
    oracle = pytest.importorskip("peft.utils.loftq_utils", reason="needs peft: pip install peft")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantizer = quant.get(name, **({"double_quant": False} if bits == 4 else {}))
    weight = weight_like_a_models(64, 128)
    with OnCPU():
        Q, A, B = oracle.loftq_init(weight, bits, 8, num_iter)
    theirs = (weight.double() - Q.double() - B.double() @ A.double()).norm().item()
    storage, A, B = loftq(weight, quantizer, 8, num_iter)
    ours = error(quantizer, weight, storage, A, B)
    if num_iter == 1:
        torch.testing.assert_close(quantizer.dequantize(storage), Q, rtol=1e-6, atol=1e-7)
        assert ours == pytest.approx(theirs, rel=1e-5)
    else:  # where two singular values are close, the last digits of theirs change what follows
        assert ours == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("alpha", [4, 20])
def test_pissa_over_an_unquantized_rest_is_pefts(init, alpha):
    model = torch.nn.Sequential(torch.nn.Linear(96, 40))
    spread_singular_values_(model[0].weight)
    options = {"r": 8, "lora_alpha": alpha, "target_modules": ["0"], "init_lora_weights": init}
    theirs = peft_model(model, **options).base_model.model[0]
    weight = model[0].weight.detach()
    niter = None if init == "pissa" else 4
    storage, A, B = qpissa(weight, quant.get("none"), 8, niter=niter, scaling=alpha / 8)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    if niter is None:
        torch.testing.assert_close(B @ A, product, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(storage["dense"], theirs.base_layer.weight.data)
    else:  # a fast SVD is a random one, and ours follows some directions more
        ours, full = (weight - alpha / 8 * B @ A).norm(), (weight - alpha / 8 * product).norm()
        assert ours <= full * (1 + 1e-4)
    assert error(quant.get("none"), weight, storage, A, B, alpha / 8) <= 1e-6 * weight.norm()


def errors_by_the_papers(weight, quantizer, r, num_iter, principal) -> list[float]:
    """|W - Q - B A| after each iteration, by torch's SVD."""
    Q, product, found = 0, 0, []
    for _ in range(num_iter):
        for step in ("svd", "quantize") if principal else ("quantize", "svd"):
            if step == "svd":
                U, S, Vh = torch.linalg.svd(weight - Q, full_matrices=False)
                product = U[:, :r] * S[:r] @ Vh[:r]
            else:
                Q = quantizer.dequantize(quantizer.quantize(weight - product), torch.float64)
        found.append((weight - Q - product).norm().item())
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_iteration_is_kept(method, shape):
    """In float64: in float32 a code may tip over, which changes all that follows."""
    quantizer = quant.get("nf2", block_size=32)  # coarse: the error rises and falls
    weight = weight_like_a_models(*shape, dtype=torch.float64)
    wanted = errors_by_the_papers(weight, quantizer, 6, 12, method is qpissa)
    for num_iter in (1, 2, 12):
        got = error(quantizer, weight, *method(weight, quantizer, 6, num_iter))
        assert got == pytest.approx(min(wanted[:num_iter]), rel=1e-6)
    # one code of 5,000 that tips over moves what six singular vectors take by up to 1e-4
    got = error(quantizer, weight, *method(weight.float(), quantizer, 6))
    assert got == pytest.approx(wanted[0], rel=1e-3)


@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_the_svds_in_float64(shape, niter):
    matrix = torch.randn(*shape) @ torch.diag(0.9 ** torch.arange(shape[1]))
    for r, s in ((1, 1.0), (5, 0.25), (5, -2.0)):
        A, B = svd.factors(matrix, r, s, 1e-6, niter)
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        nearest = U[:, :r] * S[:r] @ Vh[:r]
        got = s * B.double() @ A.double()
        if niter is None:
            assert (got - nearest).norm() <= 1e-6 * nearest.norm()
        assert (matrix - got).norm() <= (1 + 1e-4) * (matrix - nearest).norm()
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=0)
        assert A.dtype == B.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weight", [torch.zeros(6, 40), torch.ones(1, 1), torch.ones(6, 40)])
def test_every_direction_can_learn(method, weight):
    """Rank beyond min(N, K), or beyond the rank of W: a fresh adapter's row of A, B zero."""
    quantizer = quant.get("nf4")
    storage, A, B = method(weight, quantizer, 9)
    assert error(quantizer, weight, storage, A, B) <= error_alone(quantizer, weight) + 1e-6
    assert (A.norm(dim=1) > 0).all() and A.isfinite().all() and B.isfinite().all()
    idle = B.norm(dim=0) == 0
    assert idle.sum() >= 8 and (A[idle].abs() <= weight.shape[1] ** -0.5).all()


def test_weights_that_the_codes_hold_exactly_lose_nothing():
    quantizer = quant.get("int4", double_quant=False)
    weight = torch.randint(-7, 8, (32, 64)).float()
    weight[:, 0] = 7
    assert error_alone(quantizer, weight) == 0
    for method in METHODS:
        storage, A, B = method(weight, quantizer, 4)
        assert same(storage, quantizer.quantize(weight)) and B.count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(method, dtype):
    weight, quantizer = weight_like_a_models(48, 96, dtype), quant.get("nf4")
    storage, A, B = method(weight, quantizer, 8, num_iter=2)
    assert storage.dtype == dtype
    assert A.dtype == B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(quantizer, weight, storage, A, B) < 0.97 * error_alone(quantizer, weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaling", [0.125, 3.0, -2.0])
def test_the_scale_of_the_layer_is_accounted_for(method, scaling):
    weight = weight_like_a_models(48, 96, torch.float64)  # in float32 a code may tip over
    quantizer = quant.get("nf4")
    once, A, B = method(weight, quantizer, 8)
    storage, C, D = method(weight, quantizer, 8, scaling=scaling)
    assert (quantizer.dequantize(storage) - quantizer.dequantize(once)).norm() <= 1e-4
    torch.testing.assert_close(scaling * D @ C, B @ A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [loftq, qpissa, lambda *a: qpissa(*a, niter=2)])
def test_the_same_weight_gives_the_same_bits(method):
    weight, quantizer = weight_like_a_models(40, 123), quant.get("nf4")
    before = torch.get_rng_state()
    one, A, B = method(weight, quantizer, 50)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_default_dtype(torch.float64)
    try:
        other, C, D = method(weight, quantizer, 50)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(one, other) and torch.equal(A, C) and torch.equal(B, D)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused(method):
    quantizer, weight = quant.get("nf4"), torch.randn(8, 64)
    bad = weight.clone()
    bad[5, 3] = float("nan")
    for wrong, options, kind, match in (
        (bad, {}, WeightError, "weight: expected finite values; got NaN or inf in row 5"),
        (weight[0], {}, ShapeError, r"weight: expected \[N, K\].*; got \[64\]"),
        (weight.char(), {}, DtypeError, "weight: expected the unquantized one.*; got torch.int8"),
        (weight, {"r": 0}, ConfigError, "r: expected a whole number >= 1; got 0"),
        (weight, {"r": 2.5}, ConfigError, "r: expected a whole number >= 1; got 2.5"),
        (weight, {"num_iter": 0}, ConfigError, "num_iter: expected a whole number >= 1; got 0"),
        (weight, {"scaling": 0.0}, ConfigError, "lora_alpha: expected another than 0"),
        (weight, {"scaling": math.nan}, ConfigError, "lora_alpha: expected another than 0"),
        (None, {}, DtypeError, "weight: expected a tensor; got NoneType"),
    ):
        with pytest.raises(kind, match=match):
            method(wrong, quantizer, **{"r": 4, **options})
