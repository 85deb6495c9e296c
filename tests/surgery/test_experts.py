"""Adapters on the weights of experts, against PEFT's on models of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError, LowrankError, TargetError
from tests.adapters.oracle import peft, peft_model, quiet, transformers
from tests.nn.lora_kinds import Largest
from tests.surgery.models import refused

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
PARAMETERS = {
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "target_modules": ["q_proj"],
    "r": 2,
    "lora_alpha": 3,
    "init_lora_weights": False,
}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    )
    model = transformers.GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {"mixtral": mixtral, "gpt_oss": gpt_oss}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(ids).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(1).flatten()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def pair(model: nn.Module, tmp_path, **options) -> tuple[nn.Module, nn.Module]:
    theirs = peft_model(model, **{**PARAMETERS, **options})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.load_adapter(copy.deepcopy(model), tmp_path / "theirs", is_trainable=True)
    return theirs, ours


def peft_name(name: str) -> str:
    """Of a tensor of ours, what PEFT calls it."""
    name = name.replace(".gate_up_proj.lora", ".base_layer.lora").replace(
        ".down_proj.lora", ".lora"
    )
    return f"base_model.model.{name}"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_logits_and_gradients_are_pefts(model, implementation, tmp_path, generator):
    model.set_experts_implementation(implementation)
    theirs, ours = pair(model, tmp_path)
    ids = torch.randint(48, (2, 9), generator=generator)
    want, theirs_grads = gradients(theirs, ids)
    got, grads = gradients(ours, ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert {peft_name(name) for name in grads} == set(theirs_grads)
    for name, grad in grads.items():
        other = theirs_grads[peft_name(name)]
        assert (grad - other).norm() <= 1e-5 * other.norm().clamp(min=1e-3), name


def test_files_go_both_ways(model, tmp_path, generator):
    ours = lowrank.inject(copy.deepcopy(model), LoRAConfig(**PARAMETERS))
    lowrank.save_adapter(ours, tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    ids = torch.randint(48, (2, 9), generator=generator)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_merged_and_unloaded_it_is_the_plain_model_again(model, generator):
    plain = copy.deepcopy(model)
    ids = torch.randint(48, (2, 9), generator=generator)
    was, before = model(ids).logits, copy.deepcopy(model.state_dict())
    lowrank.inject(model, LoRAConfig(**PARAMETERS))
    y = model(ids).logits
    assert not torch.allclose(y, was, atol=1e-2)
    with lowrank.disable_adapters(model):
        assert torch.equal(model(ids).logits, was)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, y)
    lowrank.merge(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)
    lowrank.unmerge(model)
    assert torch.equal(model(ids).logits, y)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    model.load_state_dict(before)
    assert torch.equal(model(ids).logits, was)
    assert not torch.equal(twin(ids).logits, was)
    twin.load_state_dict(before)  # a plain model's keys, strict
    with lowrank.disable_adapters(twin):
        assert torch.equal(twin(ids).logits, was)


def test_over_quantized_experts(model, tmp_path, generator):
    ids = torch.randint(48, (2, 9), generator=generator)
    lowrank.quantize(model, "int8")
    quantized = copy.deepcopy(model)
    lowrank.inject(model, LoRAConfig(**PARAMETERS))
    logits, grads = gradients(model, ids)
    assert sum("experts" in name for name in grads) == 8
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(copy.deepcopy(quantized), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-4)
    assert "model.layers.0.mlp.experts.down_proj" in model.state_dict()


def test_two_adapters_add_up(generator):
    model = mixtral()
    ids = torch.randint(48, (2, 9), generator=generator)
    lowrank.inject(model, LoRAConfig(**PARAMETERS), adapter="a")
    lowrank.inject(model, LoRAConfig(**{**PARAMETERS, "r": 3}), adapter="b")
    experts = model.model.layers[0].mlp.experts
    lowrank.set_adapter(model, ["a", "b"])
    want = model.model.layers[0].mlp.experts.down_proj.base_layer.weight.clone()
    for name in "ab":
        layer = experts.down_proj
        A, B = (part[name].weight for part in (layer.lora_A, layer.lora_B))
        delta = torch.einsum("ore,eri->eoi", B.unflatten(1, (-1, 4)), A.unflatten(0, (4, -1)))
        want += layer.scaling[name] * delta
    torch.testing.assert_close(experts.down_proj.dequantize(), want)
    y = model(ids).logits
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_a_fresh_one_changes_nothing_and_learns(generator):
    model = mixtral()
    ids = torch.randint(48, (2, 9), generator=generator)
    was = model(ids).logits.detach()
    config = LoRAConfig(r=2, target_parameters=["down_proj"])
    lowrank.inject(model, config)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 4 and all(".down_proj.lora_" in name for name in names)
    logits, _ = gradients(model, ids)
    assert torch.equal(logits, was)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    assert not torch.equal(model(ids).logits, was)


def test_compiled(generator):
    model = mixtral()
    lowrank.inject(model, LoRAConfig(**PARAMETERS))
    ids = torch.randint(48, (2, 9), generator=generator)
    run = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


class Fused(nn.Module):
    """Experts by all the products that models make with them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.w = nn.Parameter(torch.randn(6, *((32, 48) if transposed else (48, 32))))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        whole = self.w if self.is_transposed else self.w.mT  # [6, 32, 48]
        groups = torch.tensor([1, 1, 3, 4, 4, 5], dtype=torch.int32)
        chosen = self.w[torch.tensor([5, 0])] if self.is_transposed else self.w[[5, 0]].mT
        return [
            x @ whole[4],
            nn.functional.linear(x, whole.mT[torch.tensor(2)]),
            torch.bmm(x.expand(6, 5, 32), whole),
            torch.bmm(whole.mT[1:3], x.mT.expand(2, 32, 5)).mT,
            nn.functional.grouped_mm(x, whole, offs=groups),
            torch.matmul(x, chosen),
        ]


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_them_make_no_delta_of_their_size(transposed):
    model = nn.ModuleDict({"experts": Fused(transposed)})
    lowrank.inject(
        model, LoRAConfig(**{**PARAMETERS, "target_modules": [], "target_parameters": ["w"]})
    )
    x = torch.randn(5, 32, requires_grad=True)
    with Largest() as largest:
        y = model["experts"](x)
        sum((part * part.detach().cos()).sum() for part in y).backward()
    assert largest.numel < 48 * 32 * 2 + 1  # the two experts of an index at most
    grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    x.grad, whole = None, model["experts"].w.dequantize()
    for parameter in model.parameters():
        parameter.grad = None
    dense = Fused(transposed)
    del dense.w
    dense.w = model["experts"].w.dequantize()
    want = dense(x)
    for part, other in zip(y, want, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4)
    sum((part * part.detach().cos()).sum() for part in want).backward()
    others = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-3)
    assert whole.shape == model["experts"].w.shape


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"target_parameters": ["up_down_proj"]},
            TargetError,
            "has experts.down_proj, experts.g",
        ),
        ({"target_parameters": ["q_proj.weight"]}, TargetError, "layers are for target_modules"),
        ({"target_parameters": "down_proj"}, ConfigError, "expected a list of names"),
        ({"lora_dropout": 0.1}, ConfigError, "lora_dropout: expected 0 for the experts"),
        ({"use_dora": True}, ConfigError, "method: expected one of A and B alone"),
    ],
)
def test_wrong_requests_change_nothing(options, error, match):
    model = mixtral()
    with refused(model, error, match):
        lowrank.inject(model, LoRAConfig(**{**PARAMETERS, **options}))
    assert issubclass(error, LowrankError)
