"""QuantEmbedding: the rows of the dequantized table, and no more of it decoded than they."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank import QuantEmbedding, QuantLinear, quant
from lowrank.errors import (
    ConfigError,
    DtypeError,
    FileFormatError,
    ShapeError,
    TargetError,
    WeightError,
)
from tests.quant.schemes import same


class Whole:
    """A scheme whose rows cannot be had one by one: each is stored less the one before."""

    def quantize(self, weight):
        differences = weight.detach().diff(dim=0, prepend=torch.zeros_like(weight[:1]))
        return quant.Storage("whole", tuple(weight.shape), weight.dtype, {"steps": differences})

    def dequantize(self, storage, dtype=torch.float32):
        return storage["steps"].cumsum(0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_those_of_the_dequantized_table(dtype, quantizer):
    for N, K in ((1, 1), (50, 33), (70, 96)):
        embedding = nn.Embedding(N, K, dtype=dtype)
        layer = QuantEmbedding.from_embedding(embedding, quantizer)
        table = layer.dequantize(dtype)
        for shape in ((), (0,), (7,), (3, 0, 2), (2, 3, 5)):
            for kind in (torch.int64, torch.int32):
                ids = torch.randint(N, shape, dtype=kind)
                y = layer(ids)
                assert y.dtype == dtype and torch.equal(y, F.embedding(ids, table))
        every = torch.randperm(N)
        assert torch.equal(layer(every), table[every])


def test_ids_beyond_the_table_are_an_index_error(quantizer):
    layer = QuantEmbedding(50, 33, quantizer=quantizer)
    for ids in ([0, 50], [-1, 3], [49, 2**31 - 1]):
        with pytest.raises(IndexError, match=f"index: expected 0 to 49; got {min(ids)} to "):
            layer(torch.tensor(ids))
    for kind in (torch.float32, torch.uint8, torch.int16, torch.bool):
        with pytest.raises(DtypeError, match="ids: expected torch.int32 or torch.int64"):
            layer(torch.zeros(3, dtype=kind))
    assert layer.to("meta")(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 33)
    for wrong in (None, 3, [1, 2]):
        with pytest.raises(DtypeError, match="ids: expected a tensor; got"):
            layer(wrong)


def test_only_the_rows_asked_for_are_decoded():
    decoded = []

    class Watched(type(quant.get("nf4"))):
        def dequantize(self, storage, dtype=torch.float32):
            decoded.append(storage.shape[0])
            return super().dequantize(storage, dtype)

    layer = QuantEmbedding(1000, 64, quantizer=Watched())
    layer(torch.tensor([[5, 5, 999, 5], [7, 999, 7, 7]]))
    assert decoded == [3]


def test_a_scheme_without_rows_decodes_the_panels_that_are_asked_for():
    N, K = 4100, 300  # two panels
    quantizer = quant.get("flat", block_size=64)
    layer = QuantEmbedding.from_embedding(nn.Embedding(N, K), quantizer)
    table, ids = layer.dequantize(), torch.randint(N, (9, 5))
    assert torch.equal(layer(ids), table[ids])
    assert torch.equal(layer(torch.tensor([4099])), table[4099:])
    with pytest.raises(IndexError, match="index: expected 0 to 4099; got 3 to 4100"):
        layer(torch.tensor([4100, 3]))
    with pytest.raises(ConfigError, match="row_local or has dequantize_rows.*got 'whole'"):
        QuantEmbedding(50, 32, quantizer=Whole())
    storage = Whole().quantize(torch.randn(50, 32))
    with pytest.raises(ConfigError, match="quantizer: expected a scheme.*got 'whole'"):
        quant.dequantize_rows(Whole(), storage, 0, 5, torch.float32)


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}]
)
def test_what_a_frozen_table_cannot_mean_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(ConfigError, match=f"{name}: expected none"):
        QuantEmbedding.from_embedding(nn.Embedding(10, 32, **option), "nf4")


def test_padding_and_training_are_kept():
    embedding = nn.Embedding(10, 32, padding_idx=3).eval()
    layer = QuantEmbedding.from_embedding(embedding, "nf4")
    assert layer.padding_idx == 3 and not layer.training
    assert not layer(torch.tensor([3])).any()
    assert QuantEmbedding(10, 32, padding_idx=-1).padding_idx == 9
    assert not QuantEmbedding(10, 32, padding_idx=-1)(torch.tensor(9)).any()
    with pytest.raises(ShapeError, match="num_embeddings, embedding_dim: expected at least 1"):
        QuantEmbedding(0, 32)
    with pytest.raises(DtypeError, match="^dtype: expected a floating-point dtype"):
        QuantEmbedding(10, 32, dtype=torch.int8)
    for wrong in (None, nn.Linear(8, 8), nn.EmbeddingBag(10, 32)):
        with pytest.raises(TargetError, match="from_embedding: expected an nn.Embedding; got "):
            QuantEmbedding.from_embedding(wrong, "nf4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_change_the_dtype_of_the_output_and_no_bit(dtype, quantizer):
    layer = QuantEmbedding(20, 45, quantizer=quantizer)
    ids, before = torch.randint(20, (5,)), copy.deepcopy(layer.storage)
    for cast in (lambda m: m.to(dtype), lambda m: nn.Sequential(m).to("cpu", dtype)[0]):
        other = cast(copy.deepcopy(layer))
        assert same(other.storage, before) and other.dtype == dtype
        assert torch.equal(other(ids), layer.dequantize(dtype)[ids])
        assert other.float()(ids).dtype == torch.float32
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        assert same(copied.storage, before) and torch.equal(copied(ids), layer(ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(ids).dtype == torch.float32 == nn.Embedding(20, 45)(ids).dtype
    with pytest.raises(RuntimeError, match="floating point"):
        layer.requires_grad_(True)
    assert not any(p.requires_grad or p.is_floating_point() for p in layer.parameters())


def test_files_meta_skeletons_to_empty_and_plain_tables(tmp_path, quantizer):
    embedding = nn.Embedding(20, 45, dtype=torch.bfloat16)
    layer = QuantEmbedding.from_embedding(embedding, quantizer)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    ids = torch.randint(20, (2, 3))
    for assign in (False, True):
        for made_with in (quantizer, "nf4"):
            other = QuantEmbedding(20, 45, quantizer=made_with, device="meta")
            if not assign:
                other.to_empty(device="cpu")
            other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
            assert same(other.storage, layer.storage)
            # as nn.Embedding: its dtype is its own, unless the file's tensors are assigned
            assert other.dtype == (torch.bfloat16 if assign else torch.float32)
            assert torch.equal(other(ids), layer.dequantize(other.dtype)[ids])
    plain = QuantEmbedding(20, 45, quantizer=quantizer)
    outcome = plain.load_state_dict(embedding.state_dict())
    assert not outcome.missing_keys and not outcome.unexpected_keys
    assert same(plain.storage, layer.storage)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))


def test_bad_tables_are_refused_by_name():
    model = nn.ModuleDict({"embed": QuantEmbedding(20, 45)})
    before = copy.deepcopy(model["embed"].storage)
    bad = torch.randn(20, 45)
    bad[4, 7] = float("inf")
    cases = (
        (WeightError, r"embed\.weight: expected finite values; got NaN or inf in row 4", bad),
        (ShapeError, r"embed\.weight: expected \[20, 45\]; got \[45, 20\]", bad.T),
        (DtypeError, r"embed\.weight: expected a floating-point dtype", bad.isfinite()),
    )
    for error, match, weight in cases:
        with pytest.raises(error, match=match):
            model.load_state_dict({"embed.weight": weight})
    whole = QuantLinear(45, 20, bias=False, quantizer=Whole()).state_dict()
    with pytest.raises(FileFormatError, match="got 'whole'"):
        model.load_state_dict({f"embed.{k}": v for k, v in whole.items()})
    assert same(model["embed"].storage, before)


def test_bad_arguments_are_named():
    storage = QuantEmbedding(20, 45).storage
    for padding_idx in (20, -21, "3", 1.5):
        match = "padding_idx: expected None, or from -20 to 19; got "
        with pytest.raises(ConfigError, match=match):
            QuantEmbedding(20, 45, padding_idx)
        with pytest.raises(ConfigError, match=match):
            QuantEmbedding.from_storage(storage, "nf4", padding_idx)
    for layer in (
        QuantEmbedding(20, 45, -2),
        QuantEmbedding.from_storage(storage, "nf4", -2),
    ):
        assert layer.padding_idx == torch.nn.Embedding(20, 45, -2).padding_idx == 18
    for size in ("45", 0, 2.5):
        with pytest.raises(ShapeError, match="num_embeddings, embedding_dim: expected at least 1"):
            QuantEmbedding(20, size)
    with pytest.raises(ConfigError, match="storage: expected a quant.Storage.*; got NoneType"):
        QuantEmbedding.from_storage(None, "nf4")


def test_a_tied_linear_holds_the_very_parameters():
    layer = QuantEmbedding(20, 64, quantizer="fp4")
    head = QuantLinear(64, 20, bias=False)
    head.tie(layer)
    assert [id(p) for p in head.parameters()] == [id(p) for p in layer.parameters()]
    assert torch.equal(head.dequantize(), layer.dequantize())
    model = nn.ModuleDict({"embed": layer, "head": head})
    names = [name for name, _ in model.named_parameters()]
    assert names == [f"embed.{name}" for name in layer.storage.tensors]
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert next(other["embed"].parameters()) is next(other["head"].parameters())
    with pytest.raises(ShapeError, match=r"storage: expected a weight of shape \[20, 32\]"):
        QuantLinear(32, 20).tie(layer)


def test_the_repr_says_what_it_is():
    text = repr(QuantEmbedding(4000, 1024, padding_idx=2))
    assert "QuantEmbedding(4000, 1024, padding_idx=2, quantizer=nf4, block_size=64" in text
    assert "bits/weight" in text
