"""GGUF files made by the gguf package's own writer, whole and broken."""

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.gguf_file import GGUFFile
from tests.models.helpers import llama, tokens, write_gguf

gguf = pytest.importorskip("gguf", reason="the writer and oracle; pip install gguf")
pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def dequantized(model, kind):
    """The model with each weight as the gguf package reads it back."""
    quant = gguf.GGMLQuantizationType[kind]
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.ndim == 2 and kind != "F32":
            codes = gguf.quants.quantize(parameter.detach().numpy(), quant)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(codes, quant).copy())
    return model


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_on_the_same_values(tmp_path, kind, tied):
    oracle = llama(tie_word_embeddings=tied, rope_theta=50000.0, rms_norm_eps=1e-5)
    write_gguf(tmp_path / "m.gguf", oracle, kind)
    model = lowrank.load_model(tmp_path / "m.gguf")
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = dequantized(oracle, kind)(ids).logits
        assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    assert model.config.rms_norm_eps == 1e-5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_linear_positions_and_quantization(tmp_path):
    oracle = llama(rope_scaling={"rope_type": "linear", "factor": 4.0})
    scaling = {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 4.0}
    write_gguf(tmp_path / "m.gguf", oracle, **scaling)
    ids = tokens(1, 60)
    model = lowrank.load_model(str(tmp_path / "m.gguf"))
    assert_close(model(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
    ours = lowrank.load_model(tmp_path / "m.gguf", quantizer="nf4")
    assert_close(ours(ids), lowrank.quantize(model, "nf4")(ids), atol=1e-5, rtol=1e-5)


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, llama(), "Q4_0", tokenizer_model="gpt2", token_list=["a", "é", "ģ"])
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert_close(ours.read(tensor.name), torch.tensor(expected), atol=0, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_before_anything_is_made(tmp_path, share):
    write_gguf(tmp_path / "m.gguf", llama(), "Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError) as caught:
        lowrank.load_model(tmp_path / "cut.gguf")
    assert "cut.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_random_damage_to_the_header_never_escapes_as_another_error(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama(), "Q8_0")
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    header = min(t.offset for t in GGUFFile(tmp_path / "m.gguf").tensors.values())
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        at = int(torch.randint(0, header, ()))
        damaged[at : at + 4] = bytes(torch.randint(0, 256, (4,)).tolist())
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            lowrank.load_model(tmp_path / "d.gguf")
        except (FileFormatError, ConfigError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"block_count": 2**31 - 1}, "missing tensors: model.layers.2147483646"),
        ({"rope_freq_base": float("nan")}, "rope_theta: expected a positive number; got nan"),
        ({"layer_norm_rms_eps": float("inf")}, "rms_norm_eps: expected a positive number; got inf"),
        ({"head_count": 0}, "num_attention_heads: expected a positive integer; got 0"),
    ],
)
def test_metadata_that_cannot_be_is_refused_with_the_file(tmp_path, metadata, says):
    write_gguf(tmp_path / "m.gguf", llama(), **metadata)
    with pytest.raises((ConfigError, FileFormatError), match=f"m.gguf: {says}"):
        lowrank.load_model(tmp_path / "m.gguf")


def test_other_architectures_and_kinds_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("token_embd.weight", torch.randn(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="expected GGUF architecture llama; got 'qwen2'"):
        lowrank.load_model(path)
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(FileFormatError, match="does not begin with 'GGUF'"):
        lowrank.load_model(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    with pytest.raises(FileFormatError, match="version 2 or 3, little-endian"):
        lowrank.load_model(path)
