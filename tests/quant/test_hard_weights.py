"""Hard weights and hard tables, each through every scheme: quantized, multiplied, saved, loaded."""

import copy
import io
import pickle
import random

import pytest
import torch

import lowrank
from lowrank import QuantLinear, quant
from lowrank.errors import DtypeError, LowrankError, ShapeError

from .schemes import NAMES, label, make, required, same, variants

BLOCK = 32


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def spiked(K, at):
    """A row of a thousandth, but for one weight."""
    row = torch.full((1, K), 1e-3)
    row[0, at] = -1.0
    return row


# What [N, K] each is; the largest error allowed, as a share of its largest magnitude.
WEIGHTS = {
    "one element": (lambda: rows([-0.37]), 0.01),
    "one element, zero": (lambda: rows([0.0]), 0),
    "one element, subnormal": (lambda: rows([-3e-40]), 1),
    "K=1": (lambda: torch.randn(70, 1), 0.6),
    "K=2": (lambda: torch.randn(5, 2), 0.6),
    "odd K": (lambda: torch.randn(6, 45), 0.6),
    "K one more than a block": (lambda: torch.randn(6, BLOCK + 1), 0.6),
    "K one less than two blocks": (lambda: torch.randn(6, 2 * BLOCK - 1), 0.6),
    "K below a block": (lambda: torch.randn(6, BLOCK // 2), 0.6),
    "one long row": (lambda: torch.randn(1, 5000), 0.6),
    "all zero": (lambda: torch.zeros(4, 70), 0),
    "all minus zero": (lambda: -torch.zeros(4, 70), 0),
    "zeros but one": (lambda: torch.eye(3, 70), 0.01),
    "zeros but the last, in a short block": (lambda: torch.eye(70)[-2:].clone(), 0.01),
    "a zero block among others": (lambda: torch.randn(2, 96) * torch.eye(3)[1:].repeat(1, 32), 0.6),
    "subnormals": (lambda: (torch.rand(4, 70) * 2 - 1) * 1e-40, 1.1),
    "the least subnormals": (lambda: torch.randint(-3, 4, (4, 70)) * 2.0**-149, 2),
    "subnormals beside ones": (lambda: torch.where(torch.rand(4, 70) < 0.5, 1e-42, 1.0), 0.01),
    "an outlier first": (lambda: spiked(70, 0), 0.3),
    "an outlier last": (lambda: spiked(70, 69), 0.3),
    "all equal": (lambda: torch.full((3, 70), -0.25), 0.01),
    "all positive": (lambda: torch.rand(4, 70) + 1, 0.6),
    "all negative": (lambda: -torch.rand(4, 70) - 1, 0.6),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("variant", variants(block_size=BLOCK), ids=label)
def test_a_hard_weight_goes_all_the_way(variant, case):
    quantizer, (weight, tolerance) = make(variant), WEIGHTS[case]
    weight = weight()
    N, K = weight.shape
    storage = quantizer.quantize(weight)
    W = quantizer.dequantize(storage, torch.float64)
    assert W.shape == (N, K) and W.isfinite().all()
    largest = weight.abs().max().double()
    assert (W - weight).abs().max() <= tolerance * largest
    if weight.count_nonzero() == 0:
        assert W.count_nonzero() == 0

    layer = QuantLinear.from_storage(storage, quantizer)
    x = torch.randn(3, K, requires_grad=True)
    y, dy = layer(x), torch.randn(3, N)
    (dx,) = torch.autograd.grad(y, x, dy)
    for got, expected, of in ((y, x.double() @ W.T, x), (dx, dy.double() @ W, dy)):
        bound = 1e-5 * of.double().norm() * W.norm() + 1e-42  # a sum may be of subnormals
        assert (got.double() - expected).norm() <= bound

    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    again = QuantLinear(K, N, bias=False, quantizer=quantizer)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert same(other.storage, storage)
        assert torch.equal(other.dequantize(torch.float64), W)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_weight_is_refused_in_one_line(name):
    quantizer = quant.get(name, **required(name))
    floats = torch.ones(4, 64)
    for wrong in (
        None,
        [[1.0, 2.0]],
        floats.to_sparse(),
        floats.to(torch.complex64),
        floats.to(torch.float8_e4m3fn),
        floats.int(),
        floats.bool(),
    ):
        with pytest.raises(DtypeError, match="^weight: expected .*; got [^\n]*$"):
            quantizer.quantize(wrong)
    for shape in ((0, 64), (4, 0), (0, 0), (64,), (2, 4, 64), ()):
        with pytest.raises(ShapeError, match=r"^weight: expected \[N, K\] with N, K >= 1; got \["):
            quantizer.quantize(torch.ones(shape))


TABLES = {
    "unsorted": torch.tensor([3, 14, 0, 9, 1, 15, 7, 2, 11, 5, 13, 4, 10, 6, 12, 8]) / 15,
    "descending": torch.linspace(1, -1, 16),
    "with doubles": torch.tensor(
        [-1.0, -1, -0.5, -0.5, 0, 0, 0, 0, 0, 0.25, 0.25, 0.5, 1, 1, 1, 1]
    ),
    "unsorted with doubles": torch.tensor([0.5, -1, 0, 1] * 4),
    "one value": torch.full((16,), 0.5),
    "zeros": torch.zeros(16),
    "of one side": torch.linspace(-1, -0.1, 16),
    "with subnormals": torch.tensor([-1.0, -1e-40, 1e-40, 1] + [0.0] * 12),
    "small": torch.linspace(-1, 1, 16) * 1e-3,
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("per_row", [False, True], ids=["one", "per row"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_any_table_of_16_values_takes_the_nearest(double_quant, per_row, table):
    values = TABLES[table]
    if per_row:
        values = torch.stack([values[torch.randperm(16)] for _ in range(5)])
    weight = torch.randn(5, 77)
    quantizer = quant.CodebookQuantizer(values, block_size=32, double_quant=double_quant)
    storage = quantizer.quantize(weight)
    W = quantizer.dequantize(storage, torch.float64)
    scales = quant.CodebookQuantizer(torch.ones(16), 32, double_quant)  # any code decodes to them
    absmax = scales.dequantize(scales.quantize(weight), torch.float64)
    exact = torch.nn.functional.pad(weight, (0, 19)).unflatten(1, (-1, 32)).abs().amax(-1)
    s = weight.double() / exact.repeat_interleave(32, 1)[:, :77]  # before its scale is rounded
    table_of_row = values.double().expand(5, 16)[:, None]
    nearest = (s[..., None] - table_of_row).abs().amin(-1)
    taken = W / absmax
    assert ((s - taken).abs() <= nearest + 1e-6).all()
    assert ((taken[..., None] - table_of_row).abs().amin(-1) <= 1e-6).all()
    x = torch.randn(4, 77)
    torch.testing.assert_close(
        quantizer.linear(x, storage).double(), x.double() @ W.T, rtol=1e-4, atol=1e-5
    )
    again = QuantLinear(77, 5, bias=False)
    again.load_state_dict(QuantLinear.from_storage(storage, quantizer).state_dict())
    assert torch.equal(again.dequantize(torch.float64), W)


@pytest.mark.parametrize(
    "wrong",
    [
        None, 5, "abc", {}, [], [0.0] * 15, [0.0] * 17, ["0"] * 16, [[0.0] * 16, [0.0] * 15],
        torch.zeros(0, 16), torch.zeros(2, 2, 16), torch.zeros(16, dtype=torch.complex64),
        torch.zeros(16, device="meta"), torch.zeros(16).to_sparse(),
        [float("nan")] + [0.0] * 15, [float("inf")] + [0.0] * 15, [1.0000001] + [0.0] * 15,
        [10**400] * 16,
    ],
    ids=lambda wrong: str(wrong)[:30].replace("\n", ""),
)  # fmt: skip
def test_what_is_no_table_is_refused_in_one_line(wrong):
    for take in (quant.CodebookQuantizer, lambda table: quant.get("codebook", codebook=table)):
        with pytest.raises(LowrankError, match=r"^codebook: expected [^\n]*$"):
            take(wrong)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("theirs", variants(block_size=32), ids=label)
def test_tensors_of_another_scheme_are_taken_as_what_they_are_or_reported(theirs, strict):
    """With their description and without it, into layers of other schemes and block sizes."""
    weight = torch.randn(8, 64)
    source = QuantLinear.from_storage(make(theirs).quantize(weight), make(theirs))
    tensors = source.state_dict()
    expected = source.dequantize(torch.float64)
    bare = {k: v for k, v in tensors.items() if k != "_extra_state"}
    for ours in random.sample(variants(block_size=32) + variants(block_size=4096), 6):
        layer = QuantLinear(64, 8, bias=False, quantizer=make(ours))
        layer.load_state_dict(tensors, strict=strict)
        assert torch.equal(layer.dequantize(torch.float64), expected), ours
        layer = QuantLinear(64, 8, bias=False, quantizer=make(ours))
        try:
            outcome = layer.load_state_dict(bare, strict=strict)
        except (LowrankError, RuntimeError):
            continue
        told = set(outcome.missing_keys) - {"_extra_state"} or outcome.unexpected_keys
        assert told or torch.equal(layer.dequantize(torch.float64), expected), ours


def test_a_model_with_a_bad_weight_anywhere_is_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight.data[2, 3] = torch.nan
    before = copy.deepcopy(model.state_dict())
    for name in NAMES:
        with pytest.raises(LowrankError, match=r"1: weight: expected .* in row 2"):
            lowrank.quantize(model, quant.get(name, **required(name)))
        assert [type(m) for m in model] == [torch.nn.Linear] * 2
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
