"""QuantExperts: used as the dense 3-D parameter is, equal to it, and never kept dense."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError
from lowrank.nn.quant_experts import QuantExperts, replace_parameter
from tests.quant.schemes import same

E, N, K = 4, 24, 40
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 8e-3}


def one(x, w, e):
    return F.linear(x, w[e])


def one_with_bias(x, w, e):
    return F.linear(x, weight=w[torch.tensor(e)], bias=torch.ones(N, dtype=x.dtype))


def times(x, w, e):
    return x @ w[e].mT


def of_transposed(x, w, e):
    return torch.matmul(x, w.transpose(-2, -1)[e])


def grouped(x, w, e):
    return groups(x, w.transpose(-2, -1))


def groups(x, w):
    """Rows 0 to 3 of x by expert 1, to 5 by expert 3; the last row goes to nobody."""
    if isinstance(w, torch.Tensor):  # the dense oracle is in float64, which grouped_mm has not
        return torch.cat([x[0:3] @ w[1], x[3:5] @ w[3]])
    return F.grouped_mm(x, w, offs=torch.tensor([0, 3, 3, 5], dtype=torch.int32))[:5]


def batched(x, w, e):
    chosen = w[torch.tensor([e, 0, e, 1, 2, 2])]
    return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)


def whole(x, w, e):
    return torch.bmm(x.expand(E, -1, -1), w.mT)


def sliced(x, w, e):
    return torch.einsum("mk,enk->men", x, w[1:3])


def scaled(x, w, e):
    return (x @ w[e].mT) + torch.mul(w[e], 2.0).sum(1)


USES = [one, one_with_bias, times, of_transposed, grouped, batched, whole, sliced, scaled]


def agree(use, x, holder, tolerance) -> None:
    x = x.requires_grad_()
    y = use(x, holder, 2)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    x64 = x.detach().double().requires_grad_()
    y64 = use(x64, holder.dequantize(torch.float64), 2)
    (dx64,) = torch.autograd.grad(y64, x64, dy.double())
    assert y.dtype == dx.dtype == x.dtype
    for got, expected in ((y, y64), (dx, dx64)):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_products_are_those_of_the_dense_parameter(quantizer):
    holder = QuantExperts(torch.randn(E, N, K), quantizer)
    for use in (one, grouped, batched):
        agree(use, torch.randn(6, K), holder, 3e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scheme", ["nf4", "hqq", "flat"])
def test_each_use_in_each_dtype(scheme, dtype):
    holder = QuantExperts(torch.randn(E, N, K, dtype=dtype), scheme)
    for use in USES:
        agree(use, torch.randn(6, K, dtype=dtype), holder, TOLERANCE[dtype])


@pytest.mark.parametrize("quantizer", ["nf4", "hqq", "flat"])
def test_transposed_experts_hold_rows_of_outputs(quantizer):
    weight = torch.randn(E, K, N)
    holder = QuantExperts(weight, quantizer, transposed=True)
    assert holder.shape == (E, K, N) and holder[1].shape == (K, N)
    straight = QuantExperts(weight.mT.contiguous(), quantizer)
    assert same(holder.storage, straight.storage)
    assert torch.equal(holder.dequantize(), straight.dequantize().mT)
    agree(lambda x, w, e: x @ w[e], torch.randn(6, K), holder, 3e-6)
    agree(lambda x, w, e: torch.bmm(x.expand(E, -1, -1), w), torch.randn(6, K), holder, 3e-6)
    agree(lambda x, w, e: groups(x, w), torch.randn(6, K), holder, 3e-6)
    agree(lambda x, w, e: F.linear(x, w[e].T), torch.randn(6, K), holder, 3e-6)


def test_it_has_the_shape_dtype_and_indexing_of_a_tensor():
    weight = torch.randn(E, N, K, dtype=torch.float16)
    holder = QuantExperts(weight, "nf4")
    several = (torch.tensor([3, 3, 1]), torch.tensor([[0, 2], [1, 1]]), torch.tensor([]).long())
    for key in (0, -1, torch.tensor(3), slice(1, 3), [0, 2], *several):
        view, expected = holder[key], weight[key]
        assert view.shape == expected.shape and view.dim() == view.ndim == expected.dim()
        assert torch.equal(view.dequantize(), holder.dequantize()[key])
        assert view.transpose(-1, -2).shape == expected.mT.shape
        assert view.dtype == torch.float16 and view.device == weight.device
    assert len(holder) == len(holder.mT) == E and holder.ndim == 3
    assert [w.size() for w in holder] == [(N, K)] * E and holder[0].size(1) == K
    for key in (E, -E - 1, torch.tensor([0, E])):
        with pytest.raises(IndexError):
            holder[key]
    for key in (None, "up", 1.0, (0, slice(None)), ...):
        with pytest.raises(IndexError, match="experts: expected one index, slice, list or tensor"):
            holder[key]
    with pytest.raises(ShapeError, match=r"offs: expected \[E=4\]; got \[3\]"):
        F.grouped_mm(torch.randn(9, K), holder.mT, offs=torch.tensor([3, 6, 9], dtype=torch.int32))
    with pytest.raises(IndexError, match="expected one index, into E=4; got two"):
        holder[1][2]
    with pytest.raises(ShapeError, match="transpose: expected the last two dimensions"):
        holder.transpose(0, 1)
    with pytest.raises(ShapeError, match=r"x: expected \[..., K=40\]"):
        F.linear(torch.randn(3, 41), holder[0])


@pytest.mark.parametrize("quantizer", ["nf4", "hqq", "flat"])
def test_no_dense_weight_is_kept_for_the_backward(quantizer):
    holder, kept = QuantExperts(torch.randn(E, N, K), quantizer), []
    x = torch.randn(6, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for use in USES:
            use(x, holder, 2).sum().backward()
    own = {t.untyped_storage().data_ptr() for t in holder.parameters()}
    largest = max((t.numel() for t in kept if t.untyped_storage().data_ptr() not in own), default=0)
    assert largest <= E * x.numel()


# torch's own, where a graph goes on after a break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("use", [one, grouped, batched], ids=lambda use: use.__name__)
def test_compiled_with_breaks_in_its_graph(use):
    holder, x = QuantExperts(torch.randn(E, N, K), "nf4"), torch.randn(6, K, requires_grad=True)
    outcomes = []
    for run in (torch.compile(use, backend="aot_eager"), use):
        y = run(x, holder, 2)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-4)


def test_casts_copies_and_codes_that_cannot_be_trained(quantizer):
    holder = QuantExperts(torch.randn(E, N, K), quantizer)
    before, x = copy.deepcopy(holder.storage), torch.randn(3, K)
    y = F.linear(x, holder[1])
    for copied in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert same(copied.storage, before) and torch.equal(F.linear(x, copied[1]), y)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        holder.to(dtype)
        assert holder.dtype == dtype and same(holder.storage, before)
        assert F.linear(x.to(dtype), holder[1]).dtype == dtype
    with pytest.raises(RuntimeError, match="floating point"):
        holder.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, holder[1]).dtype == torch.bfloat16


class ManyExperts(nn.Module):
    def __init__(self, **kind):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, N, K, **kind))
        self.bias = nn.Parameter(torch.randn(E, N, **kind))


@pytest.mark.parametrize("transposed", [False, True])
def test_files_meta_skeletons_and_the_plain_key(transposed, quantizer, tmp_path):
    plain = nn.ModuleDict({"mlp": ManyExperts()})

    def held(model, quantizer):
        model = copy.deepcopy(model)
        weight = model["mlp"].up
        replace_parameter(model["mlp"], "up", QuantExperts(weight, quantizer, transposed))
        return model

    source = held(plain, quantizer)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    for other in (held(plain.to("meta"), quantizer), held(plain.to("meta"), "nf4")):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
        assert same(other["mlp"].up.storage, source["mlp"].up.storage)
    again = nn.ModuleDict({"mlp": ManyExperts()})
    for model in (held(again, quantizer), copy.deepcopy(held(again, quantizer))):
        outcome = model.load_state_dict(nn.ModuleDict({"mlp": ManyExperts()}).state_dict())
        assert not outcome.missing_keys and not outcome.unexpected_keys
        model.load_state_dict(again.state_dict())
        expected = held(again, quantizer)["mlp"].up
        assert same(model["mlp"].up.storage, expected.storage)
    with pytest.raises(ShapeError, match=r"mlp\.up\.weight: expected \[4, 24, 40\]; got \[4, 40"):
        source.load_state_dict({"mlp.up": torch.randn(E, K, N)}, strict=False)


def test_bad_experts_are_named():
    weight = torch.randn(E, N, K)
    with pytest.raises(DtypeError, match="weight: expected a tensor; got NoneType"):
        QuantExperts(None)
    for wrong in (weight[0], weight[:0], weight[None]):
        with pytest.raises(ShapeError, match=r"weight: expected \[E, N, K\], each at least 1"):
            QuantExperts(wrong)
    with pytest.raises(DtypeError, match="compute_dtype: expected a floating-point dtype"):
        QuantExperts(weight, compute_dtype=torch.int8)
    with pytest.raises(DtypeError, match="weight: expected a floating-point dtype"):
        QuantExperts(weight.int())
    weight[2, 5, 1] = float("nan")
    with pytest.raises(WeightError, match=f"NaN or inf in row {2 * N + 5}"):
        QuantExperts(weight)

    class Whole:
        def quantize(self, weight): ...

        def dequantize(self, storage, dtype): ...

    named = type("Named", (Whole,), {"name": "own"})
    for quantizer, name in ((Whole(), "Whole"), (named(), "own")):
        match = f"row_local or has dequantize_rows for experts; got '{name}'"
        with pytest.raises(ConfigError, match=match):
            QuantExperts(weight, quantizer)
    assert "QuantExperts([4, 24, 40], quantizer=nf4" in repr(QuantExperts(torch.randn(E, N, K)))
