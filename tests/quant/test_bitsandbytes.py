"""bitsandbytes as the oracle: the same codes, the same weights, its files read bit for bit."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from lowrank import quant
from lowrank.errors import ConfigError, DtypeError, ShapeError
from lowrank.quant import bitsandbytes as ours

from .bnb_layers import F, bnb, dequantized, edited, layer_tensors, same_bits, same_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(storage, dtype=torch.float32):
    return quant.quantizer_of(storage).dequantize(storage, dtype)


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 256), (33, 256), (7, 1024)])
def test_codes_and_weights_are_bitsandbytes(N, K, dtype, block_size):
    weight = torch.randn(N, K, dtype=dtype)
    weight[0, :64] = 0
    theirs, expected = layer_tensors(weight, nested=False, block_size=block_size)
    quantizer = quant.get("nf4", block_size=block_size, double_quant=False)
    storage = quantizer.quantize(weight)
    assert torch.equal(storage["packed"].flatten(), theirs["weight"].flatten())
    assert torch.equal(storage["absmax"].flatten(), theirs["weight.absmax"])
    assert torch.equal(storage["codebook"].flatten(), theirs["weight.quant_map"])
    assert torch.equal(quantizer.dequantize(storage, dtype), expected)


def test_a_short_block_is_rounded_as_bitsandbytes_rounds_its_last():
    for K in (33, 63, 123):  # one row: then its blocks are ours, the last one short
        weight = torch.randn(1, K)
        theirs, expected = layer_tensors(weight, nested=False)
        quantizer = quant.get("nf4", double_quant=False)
        storage = quantizer.quantize(weight)
        assert torch.equal(storage["absmax"].flatten(), theirs["weight.absmax"])
        assert torch.equal(quantizer.dequantize(storage), expected)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_flat_writes_the_very_file_that_bitsandbytes_writes(kind, block_size):
    quantizer = quant.get("flat", quant_type=kind, block_size=block_size, double_quant=False)
    for N, K in ((1, 1), (3, 33), (7, 80), (16, 64), (90, 1001)):
        weight = torch.randn(N, K, dtype=random.choice(DTYPES))
        theirs, expected = layer_tensors(weight, kind, nested=False, block_size=block_size)
        storage = quantizer.quantize(weight)
        written = ours.write(storage)
        assert list(written) == list(theirs)
        assert all(same_bits(written[key], theirs[key]) for key in theirs)
        assert same_weights(quantizer.dequantize(storage, weight.dtype), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_reading_gives_the_very_weights(nested, kind, storage):
    """Blocks that end with rows and that do not, odd sizes, one weight, one row, short blocks."""
    shapes, sizes = [(72, 320), (1, 64), (24, 80), (3, 33), (1, 1), (2, 4100)], (32, 64, 2048)
    for (N, K), block_size in itertools.product(shapes, sizes):
        dtype, other = random.sample(DTYPES, 2)
        if -(-N * K // 2) % storage.itemsize:
            continue  # bitsandbytes cannot store it
        weight = torch.randn(N, K, dtype=dtype)
        tensors, expected = layer_tensors(weight, kind, nested, block_size, storage)
        read = ours.read(tensors)
        assert read.shape == (N, K) and read.dtype == dtype
        if K % block_size:
            assert read.scheme == "flat"
        else:
            assert read.scheme == kind
            assert read.options == {"block_size": block_size, "double_quant": False}
        assert same_weights(dense(read, dtype), expected)
        assert same_weights(dense(read, other), dequantized_as(tensors, other))


def dequantized_as(tensors, dtype):
    """What bitsandbytes gives where the file's dtype is not that of the computation."""
    stats = {k.removeprefix("weight."): v for k, v in tensors.items() if k != "weight"}
    state = F.QuantState.from_dict(dict(stats), device=torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    state.dtype = dtype
    with torch.compiler.set_stance("force_eager"):
        return F.dequantize_4bit(tensors["weight"], state).reshape(shape)


@pytest.mark.parametrize("K", [64, 96])
def test_scales_that_were_rounded_to_16_bits_on_the_way(K):
    """An offset that was bfloat16 once, and plain absmax in bfloat16."""
    weight = torch.randn(40, K, dtype=torch.bfloat16)
    tensors, _ = layer_tensors(weight)
    for offset in (torch.tensor(0.1299).bfloat16().item(), 0, 1, -0.5, -(2**90)):
        changed = edited(tensors, nested_offset=offset)
        assert same_weights(dense(ours.read(changed), torch.bfloat16), dequantized(changed))
    for dtype in DTYPES:
        plain, _ = layer_tensors(weight, nested=False)
        plain["weight.absmax"] = plain["weight.absmax"].to(dtype)
        plain["weight.quant_map"] = plain["weight.quant_map"].to(dtype)  # which nobody reads
        assert same_weights(dense(ours.read(plain), torch.bfloat16), dequantized(plain))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_flat_layer_is_written_back_byte_for_byte(storage, nested):
    for (N, K), kind in itertools.product([(24, 80), (1, 96), (56, 576 + 1)], ["nf4", "fp4"]):
        tensors, _ = layer_tensors(torch.randn(N, K), kind, nested, storage=storage)
        read = ours.read(tensors)
        assert read.scheme == "flat" and not quant.quantizer_of(read).row_local
        written = ours.write(read)
        assert list(written) == list(tensors)
        assert all(same_bits(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("K", [64, 80])
def test_experts_are_read_as_the_matrix_of_all_rows(K, nested):
    weight = torch.randn(4, 6, K)
    tensors, expected = layer_tensors(weight, nested=nested)
    assert expected.shape == weight.shape
    read = ours.read(tensors, shape=(4, 6, K))
    assert read.shape == (24, K)
    assert same_weights(dense(read).view(4, 6, K), expected)
    for shape in (None, (24, K), (6, 4, K), (4, 6, K, 1)):
        with pytest.raises(ShapeError, match=r"a\.weight: expected .*; got \[4, 6, "):
            ours.read(tensors, "a.", shape)


def test_bits_a_weight_of_each_layout():
    def bits(K, nested=True):
        tensors, _ = layer_tensors(torch.randn(1024, K), nested=nested)
        storage = ours.read(tensors)
        requantized = None if storage.scheme == "flat" else quant.requantize_scales(storage)
        return storage.bits_per_parameter, requantized and requantized.bits_per_parameter

    assert bits(1000) == (pytest.approx(4.127, abs=0.02), None)
    assert bits(1000, nested=False) == (pytest.approx(4.5, abs=0.01), None)
    assert bits(4096) == (pytest.approx(4.5, abs=0.01), pytest.approx(4.14, abs=0.01))
    assert bits(576) == (pytest.approx(4.5, abs=0.01), pytest.approx(4.24, abs=0.01))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_bitsandbytes_computes_with(dtype, double_quant, kind):
    quantizer = quant.get(kind, double_quant=double_quant)
    storage = quantizer.quantize(torch.randn(40, 192, dtype=dtype))
    written = ours.write(storage)
    got = dequantized(written)
    assert same_weights(got, quantizer.dequantize(storage, dtype))
    again = ours.read(written)
    assert again.scheme == kind and torch.equal(again["packed"], storage["packed"])
    assert same_weights(dense(again), quantizer.dequantize(storage))
    stats = {key.removeprefix("weight."): v for key, v in written.items() if key != "weight"}
    parameter = bnb.nn.Params4bit.from_prequantized(written["weight"], stats, device="cpu")
    layer = bnb.nn.Linear4bit(192, 40, bias=False, compute_dtype=dtype, quant_type=kind)
    layer.weight = parameter
    x = torch.randn(3, 192, dtype=dtype)
    y = layer(x)  # over AVX-512 with bfloat16 units, it packs the codes anew in evaluation
    torch.testing.assert_close(y, x @ got.T, rtol=2e-2, atol=2e-2)


def test_int8_rows_both_ways():
    for N, K in ((1, 1), (48, 33), (20, 128)):
        linear = torch.nn.Linear(K, N)
        theirs = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
        theirs.load_state_dict(linear.state_dict())
        tensors = theirs.to("cpu").state_dict()
        read = ours.read(tensors)
        assert read.scheme == "int8" and read.shape == (N, K) and read.dtype == torch.float16
        expected = F.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
        assert same_weights(dense(read), expected)
        ours_of_it = quant.get("int8").quantize(linear.weight)
        assert all(same_bits(read[name], ours_of_it[name]) for name in ("CB", "SCB"))
        written = ours.write(ours_of_it)
        assert all(same_bits(written[key], tensors[key]) for key in ("weight", "SCB"))
        assert written["weight_format"].item() == 0 and written["weight_format"].shape == ()
        other = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")
        other.load_state_dict(written | {"bias": linear.bias.detach()})
        x = torch.randn(5, K)
        assert torch.equal(other(x), theirs(x))


def test_scales_can_be_quantized_anew():
    """Dear in bits they are exact; in 8 bits they cost what our own double quantization costs."""
    weight = torch.randn(64, 4096)
    tensors, expected = layer_tensors(weight)
    exact = ours.read(tensors)
    small = quant.requantize_scales(exact)
    assert small.options == {"block_size": 64, "double_quant": True}
    assert torch.equal(small["packed"], exact["packed"])
    again = quant.quantizer_of(small)
    added = (again.dequantize(small) - expected).norm() / expected.norm()
    lost = (expected - weight).norm() / weight.norm()
    assert 0 < added < 0.004 < 0.09 < lost  # of squares: 0.2 % more
    error = (again.dequantize(small) - weight).norm() / weight.norm()
    assert error < 1.002 * lost
    assert quant.requantize_scales(small) is small
    blocks = quant.get("int8_blockwise").quantize(weight)
    assert quant.requantize_scales(blocks).bits_per_parameter < 8.1
    for name in ("flat", "hqq", "int8"):
        other = quant.get(name, **({} if name == "int8" else {"double_quant": False}))
        with pytest.raises(ConfigError, match=rf"storage: expected absmax .*got '{name}'"):
            quant.requantize_scales(other.quantize(weight[:, :64]))


@pytest.mark.parametrize("call", [quant.requantize_scales, ours.write])
@pytest.mark.parametrize("value", [None, torch.randn(8, 64), {}])
def test_what_is_no_storage_is_refused(call, value):
    with pytest.raises(ConfigError, match="storage: expected a quant.Storage, .*; got "):
        call(value)


def test_what_bitsandbytes_cannot_hold_is_not_written():
    with pytest.raises(ConfigError, match="K: expected a multiple of the block size 64.*'flat'"):
        ours.write(quant.get("nf4").quantize(torch.randn(4, 96)))
    other = quant.CodebookQuantizer(torch.linspace(-1, 1, 16))
    for quantizer in (other, quant.get("af4"), quant.get("hqq"), quant.get("int8_blockwise")):
        with pytest.raises(ConfigError, match=f"scheme: expected .*got '{quantizer.name}'"):
            ours.write(quantizer.quantize(torch.randn(4, 64)))
    per_row = quant.Fitted(per="row").quantize(torch.randn(4, 64))
    with pytest.raises(ConfigError, match="scheme: expected .*got 'fitted'"):
        ours.write(per_row)
    with pytest.raises(DtypeError, match="expected the dtype to be one of .*got float64"):
        ours.write(quant.get("nf4").quantize(torch.randn(4, 64, dtype=torch.float64)))


def test_bytes_are_stored_as_any_dtype_that_they_fill():
    weight = torch.randn(6, 80)
    for storage in (torch.int8, torch.float64, torch.bfloat16):
        name = str(storage).removeprefix("torch.")
        quantizer = quant.get("flat", quant_storage=name, double_quant=False)
        theirs, _ = layer_tensors(weight, nested=False, storage=storage)
        written = ours.write(quantizer.quantize(weight))
        assert all(same_bits(written[key], theirs[key]) for key in theirs)
    with pytest.raises(ConfigError, match="quant_storage: expected one of .*; got 'int4'"):
        quant.get("flat", quant_storage="int4")
    odd = quantizer.quantize(torch.randn(3, 33))
    with pytest.raises(ConfigError, match="that 50 bytes fill, uint8 does; got float64"):
        ours.write(replace(odd, options=odd.options | {"quant_storage": "float64"}))


def test_a_table_of_any_name_is_written_by_its_values():
    weight = torch.randn(4, 64)
    fp4 = quant.get("fp4", double_quant=False).quantize(weight)
    named = quant.CodebookQuantizer(fp4["codebook"]).quantize(weight)
    written = ours.write(named)
    assert all(same_bits(written[key], tensor) for key, tensor in ours.write(fp4).items())
