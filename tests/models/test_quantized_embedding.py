"""A quantized embedding in the decoder, and a head tied to it: one storage through everything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import QuantEmbedding, QuantLinear, quant
from lowrank.errors import ConfigError, WeightError
from lowrank.io.quantized import load_quantized, save_quantized
from lowrank.models.decoder import Decoder
from lowrank.models.generate import generate_ids
from lowrank.models.saving import save_model
from tests.models.helpers import assert_same_greedy, llama, tokens
from tests.quant.schemes import same


@pytest.fixture
def saved(tmp_path, request):
    """A directory of transformers', tied or not."""
    tied = getattr(request, "param", True)
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shared(model: nn.Module) -> bool:
    head, table = model.lm_head, model.model.embed_tokens
    mine = [p for name, p in head.named_parameters() if name != "bias"]
    return all(a is b for a, b in zip(mine, table.parameters(), strict=True))


def dense_twin(model: Decoder) -> Decoder:
    """The same model of plain layers, each with the dequantized weight."""
    twin = Decoder(model.config)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            twin.get_submodule(name).weight.data = module.dequantize(torch.float32)
        elif hasattr(module, "weight"):
            twin.get_submodule(name).weight.data = module.weight.detach()
    return twin.eval()


@pytest.mark.parametrize("saved", [True, False], indirect=True, ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq", "fitted"])
def test_it_computes_with_the_dequantized_table(saved, scheme):
    model = lowrank.load_model(saved, scheme, embeddings=True)
    tied = model.config.tie_word_embeddings
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.lm_head, QuantLinear) == tied
    assert not tied or shared(model)
    twin, ids = dense_twin(model), tokens(2, 11)
    logits = model(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, twin(ids), rtol=1e-4, atol=1e-4)
    config = lowrank.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lowrank.inject(model, config)
    lowrank.inject(twin, config)
    twin.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    loss, expected = model.loss(ids, ids), twin.loss(ids, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    weights, theirs = ([p for n, p in m.named_parameters() if "lora_" in n] for m in (model, twin))
    grads = zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, theirs), strict=True
    )
    for got, want in grads:
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)


def test_it_writes_as_the_dequantized_model_does(saved):
    model = lowrank.load_model(saved, "nf4", embeddings=True)
    prompts = [tokens(1, n)[0].tolist() for n in (3, 7)]
    written = generate_ids(model, prompts, 8)
    for prompt, *both in zip(
        prompts, written, generate_ids(dense_twin(model), prompts, 8), strict=True
    ):
        assert_same_greedy(model, prompt, *both)


def test_streaming_and_quantize_agree_and_take_less_memory(saved):
    streamed = lowrank.load_model(saved, "nf4", embeddings=True)
    plain = lowrank.load_model(saved)
    total = lowrank.count_parameters(plain)[1]
    edited = lowrank.quantize(plain, "nf4", embeddings=True)
    assert shared(edited)
    for name, module in streamed.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            assert same(module.storage, edited.get_submodule(name).storage)
    default = lowrank.load_model(saved, "nf4")
    assert isinstance(default.model.embed_tokens, nn.Embedding)
    assert default.lm_head.weight is default.model.embed_tokens.weight
    for model in (streamed, edited, default):
        assert lowrank.count_parameters(model)[1] == total
    V, H = streamed.model.embed_tokens.shape
    saves = sum(p.nbytes for p in default.parameters()) - sum(
        p.nbytes for p in streamed.parameters()
    )
    assert saves == 4 * V * H - streamed.model.embed_tokens.storage.nbytes > 3 * V * H


def test_casts_copies_and_devices_keep_one_storage(saved):
    model = lowrank.load_model(saved, "nf4", embeddings=True)
    before, ids = copy.deepcopy(model.lm_head.storage), tokens(1, 5)
    for cast in (copy.deepcopy, lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        model = cast(model)
        assert shared(model) and same(model.lm_head.storage, before)
        assert model(ids).dtype == model.model.norm.weight.dtype


def test_a_state_dict_loads_with_and_without_the_heads_keys(saved):
    model = lowrank.load_model(saved, "nf4", embeddings=True)
    ids = tokens(2, 5)
    state = model.state_dict()
    without = {k: v for k, v in state.items() if not k.startswith("lm_head.")}
    for tensors in (state, without):
        other = lowrank.quantize(Decoder(model.config), "nf4", embeddings=True)
        other.load_state_dict(tensors)
        assert shared(other) and torch.equal(other(ids), model(ids))
        other = lowrank.quantize(Decoder(model.config), "int8", embeddings=True)
        other.load_state_dict(tensors)  # which says it is nf4
        assert shared(other) and torch.equal(other(ids), model(ids))
    plain = lowrank.load_model(saved)
    other = lowrank.quantize(Decoder(model.config), "nf4", embeddings=True)
    other.load_state_dict(plain.state_dict())
    assert shared(other) and torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("saved", [True, False], indirect=True, ids=["tied", "untied"])
@pytest.mark.parametrize("skip", [["lm_head"], []])
def test_directories_keep_it_quantized_and_tied(saved, skip, tmp_path):
    model = lowrank.load_model(saved, "nf4", embeddings=True, skip=skip)
    ids = tokens(2, 5)
    save_model(model, tmp_path / "own", format="lowrank")
    again = lowrank.load_model(tmp_path / "own")
    assert torch.equal(again(ids), model(ids))
    assert shared(again) == model.config.tie_word_embeddings
    half = lowrank.load_model(tmp_path / "own", dtype=torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16
    save_model(model, tmp_path / "dense")
    torch.testing.assert_close(
        lowrank.load_model(tmp_path / "dense")(ids), model(ids), rtol=1e-4, atol=1e-4
    )
    save_quantized(model, tmp_path / "state")
    fresh = [Decoder(model.config), lowrank.quantize(Decoder(model.config), embeddings=True)]
    with torch.device("meta"):
        fresh.append(Decoder(model.config))
    for other in fresh:
        load_quantized(other, tmp_path / "state")
        assert torch.equal(other.eval()(ids), model(ids))
        assert shared(other) == model.config.tie_word_embeddings


def test_an_adapter_on_a_tied_head_merges_into_a_head_of_its_own(saved, tmp_path):
    model = lowrank.load_model(saved, "nf4", embeddings=True)
    config = lowrank.LoRAConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    lowrank.inject(model, config)
    ids = tokens(2, 5)
    expected = model(ids)
    merged = lowrank.merge_and_unload(model)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(ids), expected, rtol=1e-4, atol=1e-4)
    save_model(merged, tmp_path / "merged")
    again = lowrank.load_model(tmp_path / "merged")
    torch.testing.assert_close(again(ids), expected, rtol=1e-4, atol=1e-4)


def test_refusals_name_the_option_and_the_tensor(saved):
    with pytest.raises(ConfigError, match="embeddings: belongs to a quantizer"):
        lowrank.load_model(saved, embeddings=True)
    kept = lowrank.load_model(saved, "nf4", embeddings=True, skip=["embed_tokens"])
    assert isinstance(kept.model.embed_tokens, nn.Embedding) and kept.config.tie_word_embeddings
    model = lowrank.load_model(saved)
    model.model.embed_tokens.weight.data[3, 5] = float("nan")
    with pytest.raises(WeightError, match=r"^model\.embed_tokens: .*NaN or inf in row 3"):
        lowrank.quantize(model, embeddings=True)
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in model.modules())
    assert quant.has_row_parts(quant.get("nf4"))
