"""What is quantized beside nn.Linear: GPT-2's Conv1D, tables, experts, in transformers' models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, QuantEmbedding, QuantLinear
from lowrank.errors import ConfigError, TargetError, WeightError
from lowrank.nn.quant_experts import QuantExperts
from lowrank.nn.quant_weight import QuantWeight
from tests.adapters.oracle import quiet, transformers
from tests.models.helpers import TINY
from tests.surgery.models import assert_unchanged, names_of, state


def gpt2(tied: bool = True) -> nn.Module:
    sizes = dict(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    config = transformers.GPT2Config(**sizes, initializer_range=0.1, tie_word_embeddings=tied)
    return randomised(transformers.GPT2LMHeadModel(config))


def mixture(kind: str) -> nn.Module:
    layers = {
        **TINY,
        "intermediate_size": 160 if kind.startswith("qwen") else 96,
        "num_experts_per_tok": 1 if kind == "llama4" else 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    if kind == "mixtral":
        config = transformers.MixtralConfig(**layers, num_local_experts=4)
    elif kind == "gpt_oss":
        config = transformers.GptOssConfig(**layers, num_local_experts=4)
    elif kind == "llama4":
        config = transformers.Llama4TextConfig(
            **layers,
            intermediate_size_mlp=96,
            num_local_experts=4,
            pad_token_id=0,
            attention_chunk_size=64,
        )
    elif kind == "jetmoe":
        for other in ("head_dim", "num_attention_heads"):
            del layers[other]
        config = transformers.JetMoeConfig(**layers, kv_channels=16, num_local_experts=4)
    elif kind == "qwen2_moe":
        del layers["head_dim"]
        config = transformers.Qwen2MoeConfig(
            **layers, moe_intermediate_size=96, num_experts=4, shared_expert_intermediate_size=32
        )
    else:
        config = transformers.Qwen3MoeConfig(**layers, moe_intermediate_size=96, num_experts=4)
    with quiet():
        return randomised(transformers.AutoModelForCausalLM.from_config(config))


def randomised(model: nn.Module) -> nn.Module:
    """Biases that are not all zeros."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def with_dequantized(dense: nn.Module, model: nn.Module) -> nn.Module:
    """`dense`, the original, with the weights of its quantized twin put in."""
    for name, module in model.named_modules():
        if isinstance(module, QuantWeight):
            parent, _, leaf = name.rpartition(".")
            old = getattr(dense.get_submodule(parent), leaf)
            weight = module.dequantize(torch.float32)
            if isinstance(old, nn.Parameter):
                old.data = weight
            else:
                old.weight.data = weight.T if type(old).__name__ == "Conv1D" else weight
    return dense


def outcome(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and their gradients to every activation's source and to what may train."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    trained = [p for n, p in model.named_parameters() if n.endswith(("norm.weight", "ln_f.weight"))]
    return [logits, *torch.autograd.grad(logits.square().sum(), [embedded, *trained])]


def assert_same(model: nn.Module, dense: nn.Module, ids: torch.Tensor) -> None:
    for got, expected in zip(outcome(model, ids), outcome(dense, ids), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_gpt2_computes_with_the_dequantized_weights(scheme, embeddings, generator):
    model, ids = gpt2(), torch.randint(97, (2, 7), generator=generator)
    dense = copy.deepcopy(model)
    lowrank.quantize(model, scheme, embeddings=embeddings)
    layers = {f"transformer.h.{i}" for i in (0, 1)}
    leaves = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    head = {"lm_head"} if embeddings else set()
    assert names_of(model, QuantLinear) == {f"{a}.{b}" for a in layers for b in leaves} | head
    tables = {"transformer.wte", "transformer.wpe"} if embeddings else set()
    assert names_of(model, QuantEmbedding) == tables
    assert_same(model, with_dequantized(dense, model), ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_gpt2s_own_state_dict_loads_transposed_square_weights_too(generator):
    source, ids = gpt2(), torch.randint(97, (2, 7), generator=generator)
    model = lowrank.quantize(gpt2(), "nf4", embeddings=True)
    outcome = model.load_state_dict(source.state_dict())
    assert not outcome.missing_keys and not outcome.unexpected_keys
    layer = model.transformer.h[1].attn.c_proj
    square = source.transformer.h[1].attn.c_proj.weight
    assert layer.in_features == layer.out_features == 48
    expected = layer.quantizer.dequantize(layer.quantizer.quantize(square.T.contiguous()))
    assert torch.equal(layer.dequantize(), expected)
    same = lowrank.quantize(copy.deepcopy(source), "nf4", embeddings=True)
    assert torch.equal(model(ids).logits, same(ids).logits)
    assert next(model.lm_head.parameters()) is next(model.transformer.wte.parameters())


def test_an_adapter_beside_a_quantized_conv1d_trains_and_merges(generator):
    model, ids = gpt2(), torch.randint(97, (2, 7), generator=generator)
    lowrank.quantize(model, "nf4")
    config = LoRAConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights=False)
    lowrank.inject(model, config)
    logits = model(ids).logits
    logits.square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    merged = lowrank.merge_and_unload(model)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_experts_compute_with_the_dequantized_weights(kind, how, generator):
    model, ids = mixture(kind), torch.randint(97, (2, 7), generator=generator)
    model.set_experts_implementation(how)
    dense = copy.deepcopy(model)
    total = sum(p.numel() for p in model.parameters())
    lowrank.quantize(model, "nf4")
    experts = {
        f"model.layers.{i}.mlp.experts.{w}_proj" for i in (0, 1) for w in ("gate_up", "down")
    }
    assert names_of(model, QuantExperts) == experts
    assert not {
        n for n in names_of(model, QuantLinear) if n.endswith(("gate", "router", "lm_head"))
    }
    assert lowrank.count_parameters(model)[1] == total
    for name in experts:
        parent, _, leaf = name.rpartition(".")
        assert name not in dict(model.named_parameters())
        held = sum(p.nbytes for p in model.get_submodule(name).parameters())
        assert held < 0.2 * getattr(dense.get_submodule(parent), leaf).nbytes
    assert_same(model, with_dequantized(dense, model), ids)


LLAMA4 = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
JETMOE = [
    f"{of}.{way}_linear.weight"
    for of in ("mlp", "self_attention.experts")
    for way in ("input", "output")
]


@pytest.mark.parametrize(("kind", "leaves"), [("llama4", LLAMA4), ("jetmoe", JETMOE)])
def test_experts_of_one_way_to_compute(kind, leaves, generator):
    model, ids = mixture(kind), torch.randint(97, (2, 7), generator=generator)
    dense = copy.deepcopy(model)
    lowrank.quantize(model, "nf4")
    experts = {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in leaves}
    assert names_of(model, QuantExperts) == experts
    # Llama 4's are [E, in, out], as its own forward multiplies by them
    assert {model.get_submodule(name).transposed for name in experts} == {kind == "llama4"}
    assert_same(model, with_dequantized(dense, model), ids)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_mixtures_own_state_dict_loads_and_adapters_train_beside_it(kind, generator):
    source, ids = mixture(kind), torch.randint(97, (2, 7), generator=generator)
    model = lowrank.quantize(mixture(kind), "nf4")
    model.load_state_dict(source.state_dict())
    same = lowrank.quantize(copy.deepcopy(source), "nf4")
    assert torch.equal(model(ids).logits, same(ids).logits)
    model.load_state_dict(same.state_dict())
    lowrank.inject(model, LoRAConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model(ids).logits.square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("build", [gpt2, lambda: mixture("gpt_oss")], ids=["gpt2", "gpt_oss"])
def test_whole_models_survive_copies_casts_and_the_meta_device(build, generator):
    model, ids = build(), torch.randint(97, (2, 7), generator=generator)
    lowrank.quantize(model, "nf4", embeddings=True)
    codes = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    state = copy.deepcopy(model.state_dict())
    logits = model(ids).logits
    blank = copy.deepcopy(model).to("meta")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        blank,
        copy.deepcopy(blank).to_empty(device="cpu"),
    ):
        other.load_state_dict(state, assign=other is blank)
        for name, buffer in model.named_buffers():  # not all are in a state dict
            parent, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(parent), leaf, buffer)
        assert torch.equal(other(ids).logits, logits)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        other = cast(copy.deepcopy(model))
        now = {n: p for n, p in other.named_parameters() if not p.is_floating_point()}
        assert now.keys() == codes.keys() and all(torch.equal(now[n], codes[n]) for n in codes)
        assert other(ids).logits.dtype == next(
            p.dtype for p in other.parameters() if p.is_floating_point()
        )
    with pytest.raises(RuntimeError, match="floating point"):
        model.requires_grad_(True)
    model.requires_grad_(False)


def test_skip_names_experts_and_routers_too(generator):
    model = mixture("mixtral")
    lowrank.quantize(model, skip=["layers.0.mlp.experts", "down_proj", "lm_head"])
    assert names_of(model, QuantExperts) == {"model.layers.1.mlp.experts.gate_up_proj"}

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(32, 4), nn.Linear(32, 64)

    assert names_of(lowrank.quantize(Router()), QuantLinear) == {"up"}
    assert names_of(lowrank.quantize(Router(), skip=[]), QuantLinear) == {"up", "gate"}
    with pytest.raises(TargetError, match="skip: 'up_prj'"):
        lowrank.quantize(Router(), skip=["up_prj"])


def test_whatever_is_refused_leaves_the_model_as_it_was():
    class Scaled(nn.Embedding):
        pass

    model = mixture("mixtral")
    model.extra = Scaled(10, 32)
    before = state(model)
    with pytest.raises(ConfigError, match="^extra: expected an nn.Embedding; got Scaled.*skip"):
        lowrank.quantize(model, embeddings=True)
    model.extra = nn.Embedding(10, 32, max_norm=1.0)
    with pytest.raises(ConfigError, match="^extra: max_norm: expected none"):
        lowrank.quantize(model, embeddings=True)
    model.extra = Scaled(10, 32)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5, 1] = float("inf")
    with pytest.raises(WeightError, match=r"^model\.layers\.1\.mlp\.experts\.down_proj: .*inf"):
        lowrank.quantize(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5, 1] = 0
    assert before["modules"] == [n for n, _ in model.named_modules()]
    flat = gpt2()
    flat.transformer.wte.weight.data[4, 4] = float("nan")
    before = state(flat)
    with pytest.raises(WeightError, match=r"^transformer\.wte: .*NaN or inf in row 4"):
        lowrank.quantize(flat, embeddings=True)
    flat.transformer.wte.weight.data[4, 4] = before["transformer.wte.weight"][0][4, 4] = 0
    assert_unchanged(flat, before)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def test_torchs_encoder_calls_its_layers_in_inference_too():
    model = encoder()
    dense = copy.deepcopy(model)
    x, padding = torch.randn(2, 6, 64), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    lowrank.quantize(model, "nf4")
    feed_forward = {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert names_of(model, QuantLinear) == feed_forward  # nobody calls out_proj
    with_dequantized(dense, model)
    config = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    for adapted in (False, True):
        if adapted:
            assert names_of(lowrank.inject(model, config), lowrank.LoRALinear) == feed_forward
            for name in feed_forward:
                layer = copy.deepcopy(model.get_submodule(name))
                layer.merge()
                dense.get_submodule(name).weight.data = layer.base_layer.weight.data
        for mask in (None, padding):
            expected = dense.train()(x, src_key_padding_mask=mask)  # which has only the one way
            for training in (True, False):
                model.train(training)
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        y = model(x, src_key_padding_mask=mask)
                    kept = slice(None) if mask is None else ~mask
                    torch.testing.assert_close(y[kept], expected[kept], rtol=1e-4, atol=1e-5)
    with pytest.raises(TargetError, match="'out_proj'.*matches nothing"):
        lowrank.inject(encoder(), LoRAConfig(target_modules=["out_proj"]))


def test_linears_that_share_a_weight_share_its_storage():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(32, 64), nn.Embedding(64, 32))
    model[1].weight = model[0].weight
    model[1].bias.data.fill_(3)
    lowrank.quantize(model)
    assert model[0].packed is model[1].packed and model[1].bias[0] == 3
    tied = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match=r"1\.weight: is also 0\.weight; .*embeddings=True"):
        lowrank.quantize(tied, skip=[])
    with pytest.raises(ConfigError, match=r"1\.weight: is also 0\.weight"):
        lowrank.quantize(tied, skip=["0"], embeddings=True)
    lowrank.quantize(tied, skip=["1"], embeddings=True)  # a tied layer follows its table
    assert tied[0].packed is tied[1].packed
