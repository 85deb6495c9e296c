"""Mixtures of experts against transformers' and PEFT's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import lowrank
from lowrank import quant
from lowrank.errors import ConfigError, FileFormatError, LowrankError, TargetError, WeightError
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.experts import Mixture, Router, watched_routers
from lowrank.models.generate import generate_ids
from lowrank.models.mixture_config import MixtureConfig
from lowrank.nn.quant_experts import QuantExperts
from lowrank.train import TrainConfig, Trainer
from tests.models.helpers import TINY, tokens
from tests.quant.schemes import same

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")

H, I, E = 44, 23, 5  # noqa: E741


def mixtral_block(k: int) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = dict(hidden_size=H, intermediate_size=I, num_local_experts=E)
    config = transformers.MixtralConfig(**sizes, num_experts_per_tok=k)
    return MixtralSparseMoeBlock(config)


def qwen_block(k: int, normalised: bool) -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = dict(hidden_size=H, moe_intermediate_size=I, num_experts=E)
    config = transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=k, norm_topk_prob=normalised)
    return Qwen3MoeSparseMoeBlock(config)


BLOCKS = {
    "mixtral": (lambda: mixtral_block(2), 2, True),
    "one_expert": (lambda: mixtral_block(1), 1, True),
    "all_experts": (lambda: mixtral_block(E), E, True),
    "qwen3": (lambda: qwen_block(3, True), 3, True),
    "qwen3_as_they_are": (lambda: qwen_block(2, False), 2, False),
}


def blocks(kind: str) -> tuple[Mixture, nn.Module]:
    make, k, normalised = BLOCKS[kind]
    oracle = make()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = MixtureConfig(E, k, I, normalised)
    ours = Mixture(H, "silu", config)
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


@pytest.mark.parametrize("shape", [(2, 63), (1, 1), (3, 1)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_mixture_and_every_gradient_equal_transformers(kind, shape):
    ours, oracle = blocks(kind)
    x, dy = torch.randn(*shape, H), torch.randn(*shape, H)
    results = []
    for block in (ours, oracle):
        z = x.clone().requires_grad_()
        y = block(z)
        y.backward(dy)
        results.append({"y": y, "x": z.grad} | {n: p.grad for n, p in block.named_parameters()})
    for name, expected in results[1].items():
        assert_close(results[0][name], expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


CONFIG = dict(
    r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
)


class Holder(nn.Module):
    """A block under a name, as in a model."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


def results(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, and the gradients of x and of all that is trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | trained


@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq", "flat"])
def test_quantized_with_adapters_it_is_its_dense_twin(scheme):
    model = Holder(blocks("qwen3")[0])
    twin = copy.deepcopy(model)
    lowrank.quantize(model, scheme)
    with torch.no_grad():
        for leaf in ("gate_up_proj", "down_proj"):
            getattr(twin.mlp.experts, leaf).copy_(getattr(model.mlp.experts, leaf).dequantize())
    assert isinstance(model.mlp.experts.down_proj, QuantExperts)
    assert model.mlp.gate.weight.shape == (E, H)  # the router stays as it is
    x, dy = torch.randn(2, 31, H), torch.randn(2, 31, H)
    for each in (model, twin):
        torch.manual_seed(5)
        lowrank.inject(each, lowrank.LoRAConfig(**CONFIG, init_lora_weights=False))
    got, expected = results(model, x, dy), results(twin, x, dy)
    assert len(expected) == 2 + 4 and got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_no_work_and_no_memory_but_for_experts_that_are_chosen():
    """One row for each token and expert it goes to; nothing of the size of a weight is kept."""
    model = Holder(blocks("qwen3")[0]).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(1, 7, H, requires_grad=True))
    own = {p.data_ptr() for p in model.parameters()}
    floats = [t for t in kept if t.is_floating_point() and t.data_ptr() not in own]
    rows = 7 * 3
    assert max(t.numel() for t in floats) == rows * 2 * I  # gate and up, before they are multiplied
    assert sum(t.numel() for t in floats if t.numel() > rows * 2) == rows * 2 * I


def test_in_half_precision_and_under_autocast_it_is_near():
    model = Holder(blocks("mixtral")[0])
    x, dy = torch.randn(2, 31, H), torch.randn(2, 31, H)
    expected = results(model, x, dy)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        under = results(model, x, dy)
    half = results(copy.deepcopy(model).bfloat16(), x.bfloat16(), dy.bfloat16())
    for name in expected:
        for got in (under, half):
            # a token whose probabilities are within rounding may go to another expert
            error = (got[name].float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.3, name
    assert under["x"].dtype == torch.float32 and half["y"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_it_compiles_and_a_seed_repeats_every_bit():
    model = Holder(blocks("qwen3")[0])
    x, dy = torch.randn(2, 31, H), torch.randn(2, 31, H)
    first = results(model, x, dy)
    model.zero_grad()
    second = results(model, x, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(x), model(x))


MODELS = {
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": dict(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, mlp_only_layers=[1]
    ),
}


def pair_with_imbalance(model_type: str, directory) -> tuple[Decoder, nn.Module]:
    """Ours and transformers', whose configs ask for the loss of the routers."""
    oracle = saved(model_type, directory, output_router_logits=True, router_aux_loss_coef=0.7)
    return lowrank.load_model(directory), oracle


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_loss_of_routers_is_transformers(model_type, padded, tmp_path):
    ours, oracle = pair_with_imbalance(model_type, tmp_path)
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    if padded:
        mask[0, 25:], mask[2, 31:] = 0, 0
    labels = torch.where(torch.rand(3, 40) < 0.4, -100, ids).masked_fill(mask == 0, -100)
    theirs = oracle(ids, labels=labels, attention_mask=mask)
    theirs.loss.backward()
    count = (labels[:, 1:] != -100).sum()
    for way in (False, True, "selective"):
        ours.gradient_checkpointing = way
        ours.zero_grad()
        loss = ours.loss(ids, labels, attention_mask=mask) / count
        assert_close(loss, theirs.loss, atol=1e-4, rtol=1e-4)
        loss.backward()
        for name, parameter in oracle.named_parameters():
            got = ours.get_parameter(name).grad
            assert_close(got, parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)
    ours.config = replace(
        ours.config, mixture=replace(ours.config.mixture, output_router_logits=False)
    )
    plain = ours.loss(ids, labels, attention_mask=mask) / count
    assert_close(loss - plain, 0.7 * theirs.aux_loss, atol=1e-4, rtol=1e-4)


def test_copies_of_a_batch_have_each_their_own(tmp_path):
    ours, _ = pair_with_imbalance("mixtral", tmp_path)
    ids = tokens(2, 30)
    both = ours.loss(ids.repeat(3, 1), ids.repeat(3, 1), copies=3)
    assert both.shape == (3,)
    assert_close(both, ours.loss(ids, ids).expand(3))


def test_routers_are_watched_only_while_a_loss_is_computed(tmp_path):
    ours, _ = pair_with_imbalance("mixtral", tmp_path)
    routers = [module for module in ours.modules() if isinstance(module, Router)]
    with watched_routers(ours) as found:
        ours(tokens(1, 8))
    assert len(found) == len(routers) == 3
    ours(tokens(1, 8))
    assert len(found) == 3


def saved(model_type: str, directory, **changes) -> nn.Module:
    """transformers' model, as it writes it."""
    sizes = {**TINY, **MODELS[model_type], "num_hidden_layers": 3, **changes}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    oracle = transformers.AutoModelForCausalLM.from_config(config).eval()
    oracle.save_pretrained(directory)
    return oracle


@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq", "flat", "fitted"])
def test_experts_are_quantized_part_by_part_as_they_would_be_whole(scheme, tmp_path):
    oracle = saved("mixtral", tmp_path)
    quantizer = {"fitted": lambda: quant.Fitted()}.get(scheme, lambda: scheme)()
    model = lowrank.load_model(tmp_path, quantizer, compute_dtype=torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        whole = getattr(oracle.model.layers[1].mlp.experts, name)
        got = getattr(model.model.layers[1].mlp.experts, name)
        assert got.compute_dtype == torch.bfloat16 and got.shape == whole.shape
        assert same(got.storage, QuantExperts(whole, quantizer).storage)


def test_what_is_skipped_stays_dense(tmp_path):
    saved("qwen3_moe", tmp_path)
    model = lowrank.load_model(tmp_path, "nf4", skip=["lm_head", "experts.down_proj"])
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, QuantExperts)
    assert isinstance(experts.down_proj, nn.Parameter)
    dense = lowrank.load_model(tmp_path, "nf4", skip=["experts"], dtype=torch.bfloat16)
    assert dense.model.layers[2].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert isinstance(dense.model.layers[1].mlp.up_proj, lowrank.QuantLinear)
    with pytest.raises(LowrankError, match="skip: .*experts.up_proj"):
        lowrank.load_model(tmp_path, "nf4", skip=["experts.up_proj"])


@pytest.mark.parametrize("model_type", MODELS)
def test_quantized_models_are_saved_and_read_again(model_type, tmp_path):
    saved(model_type, tmp_path / "dense")
    model = lowrank.load_model(tmp_path / "dense", "nf4")
    ids = tokens(2, 20)
    lowrank.save_model(model, tmp_path / "packed", format="lowrank", max_shard_bytes=20_000)
    again = lowrank.load_model(tmp_path / "packed")
    assert isinstance(again.model.layers[0].mlp.experts.down_proj, QuantExperts)
    assert torch.equal(again(ids), model(ids))
    lowrank.save_model(model, tmp_path / "decoded")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="gate_up_proj: expected a linear layer, as bitsandbytes"):
        lowrank.save_model(model, tmp_path / "bnb", format="bitsandbytes")
    assert not (tmp_path / "bnb").exists()


def test_all_that_is_wrong_in_a_directory_is_listed(tmp_path):
    saved("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    block = "model.layers.1.block_sparse_moe"
    del tensors[f"{block}.experts.3.w2.weight"], tensors[f"{block}.gate.weight"]
    tensors[f"{block}.experts.5.w1.weight"] = torch.zeros(3)
    tensors[f"{block}.experts.0.w3.weight"] = torch.zeros(160, 63)
    save_file(tensors, path)
    with pytest.raises(FileFormatError) as caught:
        lowrank.load_model(tmp_path)
    for part in (
        f"missing tensors: {block}.experts.3.w2.weight, {block}.gate.weight",
        f"unexpected tensors: {block}.experts.5.w1.weight",
        f"{block}.experts.0.w3.weight: expected shape (160, 64); got (160, 63)",
    ):
        assert part in str(caught.value)


def test_a_nan_names_the_experts_it_is_in(tmp_path):
    oracle = saved("mixtral", tmp_path)
    oracle.model.layers[2].mlp.experts.down_proj.data[3, 5, 7] = torch.nan
    oracle.save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"model\.layers\.2\.mlp\.experts\.down_proj: "):
        lowrank.load_model(tmp_path, "nf4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 0}, "num_local_experts: expected a positive integer; got 0"),
        ({"num_local_experts": "8"}, "num_local_experts: expected a positive integer; got '8'"),
        ({"num_experts": 7}, "num_experts and num_local_experts: expected one number"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok: expected at most num_experts=5; got 6"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise: expected 0; got 0.1"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef: expected a positive number; got -1"),
        ({"output_router_logits": "yes"}, "output_router_logits: expected true or false"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: expected a list; got 3"),
        ({"mlp_only_layers": ["a"]}, "mlp_only_layers: expected numbers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: expected a positive integer; got 0"),
    ],
)
def test_a_config_that_is_wrong(changes, message):
    of_qwen = any(name.startswith(("mlp_only", "decoder_sparse")) for name in changes)
    model_type = "qwen3_moe" if of_qwen else "mixtral"
    raw = {**TINY, "model_type": model_type, **MODELS[model_type], **changes}
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf(raw)


def test_projections_of_experts_are_pointed_to_where_they_are(tmp_path):
    saved("mixtral", tmp_path)
    model = lowrank.load_model(tmp_path, "nf4")
    message = "'w1' matches nothing .* target_parameters: experts.down_proj, experts.gate_up_proj"
    with pytest.raises(TargetError, match=message):
        lowrank.inject(model, lowrank.LoRAConfig(target_modules=["q_proj", "w1", "w2", "w3"]))


def test_a_model_that_trains_forgets_nothing_on_the_way(tmp_path):
    """Trained over quantized experts, saved, loaded again, and continued by it."""
    saved("qwen3_moe", tmp_path / "base")
    model = lowrank.load_model(tmp_path / "base", "nf4")
    config = lowrank.LoRAConfig(**{**CONFIG, "target_modules": ["q_proj", "v_proj"]})
    lowrank.inject(model, config)
    data = [{"input_ids": tokens(1, 20)[0].tolist()} for _ in range(4)]
    run = TrainConfig(
        tmp_path / "run",
        max_steps=6,
        learning_rate=3e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
    )
    result = Trainer(model, run, data).train()
    assert result.losses[-1] < 0.9 * result.losses[0]
    lowrank.save_adapter(model, tmp_path / "adapter")
    again = lowrank.load_model(tmp_path / "base", "nf4")
    lowrank.load_adapter(again, tmp_path / "adapter")
    ids = tokens(1, 9)
    model.eval()
    assert torch.equal(again(ids), model(ids))
    written = generate_ids(again, [ids[0].tolist(), [5, 6]], max_new_tokens=5)
    alone = generate_ids(again, [[5, 6]], max_new_tokens=5)
    assert written[1] == alone[0]
