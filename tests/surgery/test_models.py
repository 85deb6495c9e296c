"""Adapters in whole models that nobody here wrote, and in home-made ones, trained beside PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LoRAConfig
from tests.adapters.oracle import peft_model, tiny_llama, transformers

# what PEFT says of Conv1D, of grouped convolutions, and of tied weights that are adapted
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:LoRA adapter added", "ignore:Model with `tie_word"
)
OPTIONS = {"r": 4, "lora_alpha": 5, "init_lora_weights": False}


@dataclass
class Family:
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: list[str]
    result: str = "logits"


def words(length: int = 7) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(48, (2, length))}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def spread(model: nn.Module) -> nn.Module:
    """Norms and biases that are not at their start, and no dropout."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name.lower()), std=0.1)
    return model.eval()


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": 48, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, **ids, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


def neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def phi3() -> nn.Module:
    config = transformers.Phi3Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=4, num_labels=5, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, sliding_window=8,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


class Block(nn.Module):
    """A block as of a U-Net of diffusion models: convolutions about a time and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.time = nn.Embedding(10, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.to_q, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 3, 1, stride=2)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        h = torch.nn.functional.silu(self.norm(self.conv_in(x))) + self.time(steps)[..., None, None]
        h = h + self.depthwise(h)
        tokens = h.flatten(2).mT
        h = h + (self.to_q(tokens).softmax(-1) * self.to_v(tokens)).mT.view_as(h)
        return self.conv_out(h)


FAMILIES = {
    "llama": Family(tiny_llama, words, ["q_proj", "down_proj", "embed_tokens", "lm_head"]),
    "gpt2": Family(gpt2, words, ["c_attn", "c_proj", "wte", "wpe"]),
    "gpt_neox": Family(neox, words, ["query_key_value", "dense_4h_to_h"]),
    "phi3": Family(phi3, words, ["qkv_proj", "gate_up_proj"]),
    "t5": Family(
        t5, lambda: {**words(), "decoder_input_ids": words(5)["input_ids"]}, ["q", "wo", "shared"]
    ),
    "vit": Family(vit, pictures, ["projection", "q_proj", "fc1", "query", "classifier"]),
    "gemma3": Family(gemma3, words, ["embed_tokens", "v_proj"]),
    "unet": Family(
        Block,
        lambda: {"x": torch.randn(2, 3, 6, 6), "steps": torch.randint(10, (2,))},
        ["conv_in", "depthwise", "to_q", "to_v", "time", "conv_out"],
        "",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    found = FAMILIES[request.param]
    plain = spread(found.make())
    ends = {name.split(".")[-1] for name, _ in plain.named_modules()}
    targets = [target for target in found.targets if target in ends]
    return Family(lambda: plain, found.inputs, targets, found.result)


def run(model: nn.Module, inputs: dict[str, Tensor], result: str) -> Tensor:
    y = model(**inputs)
    return y[result] if result else y


def trained(
    model: nn.Module, family: Family, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """(what it says, the loss, every gradient, what it says after a step)."""
    y = run(model, inputs, family.result)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + y.square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3).step()
    return y.detach(), loss.detach(), grads, run(model, inputs, family.result).detach()


def test_a_step_is_pefts(family, tmp_path):
    plain, inputs = family.make(), family.inputs()
    theirs = peft_model(plain, target_modules=family.targets, **OPTIONS)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = lowrank.load_adapter(copy.deepcopy(plain), tmp_path, is_trainable=True)
    want, got = trained(theirs, family, inputs), trained(ours, family, inputs)
    for mine, other in zip((*got[:2], got[3]), (*want[:2], want[3]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    other = {
        name.removeprefix("base_model.model.").replace("embedding_", ""): grad
        for name, grad in want[2].items()
    }
    other = {n if n.endswith(".weight") else f"{n}.weight": grad for n, grad in other.items()}
    assert got[2].keys() == other.keys()
    for name, grad in got[2].items():
        error = (grad.flatten() - other[name].flatten()).norm()
        assert error <= 1e-5 * other[name].norm().clamp(min=1e-2), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_and_unloaded_it_is_the_plain_model(family, use_dora):
    plain, inputs = family.make().requires_grad_(False), family.inputs()
    was, before = run(plain, inputs, family.result), copy.deepcopy(plain.state_dict())
    model = copy.deepcopy(plain)
    config = LoRAConfig(target_modules=family.targets, use_dora=use_dora, **OPTIONS)
    lowrank.inject(model, config)
    y = run(model, inputs, family.result).detach()
    assert not torch.allclose(y, was, atol=1e-2)
    lowrank.merge(model)
    lowrank.unmerge(model)
    assert torch.equal(run(model, inputs, family.result), y)
    with lowrank.disable_adapters(model):
        assert torch.equal(run(model, inputs, family.result), was)
    assert lowrank.merge_and_unload(model) is model
    torch.testing.assert_close(run(model, inputs, family.result), y, rtol=1e-3, atol=1e-4)
    assert model.state_dict().keys() == before.keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any("lowrank" in type(m).__module__ for m in model.modules())


def test_parts_of_fused_projections():
    """q and v: thirds of GPT-2's c_attn, and of each head's rows in GPT-NeoX's query_key_value."""
    plain = spread(neox())
    rows = [
        (8 * (3 * head + part), 8 * (3 * head + part) + 8) for head in (0, 1) for part in (0, 2)
    ]
    config = LoRAConfig(target_modules=["query_key_value"], target_rows={"query_key_value": rows})
    model = lowrank.inject(copy.deepcopy(plain), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    fused = model.gpt_neox.layers[0].attention.query_key_value
    was = plain.gpt_neox.layers[0].attention.query_key_value
    x = torch.randn(5, 16)
    same = (fused(x) == was(x)).all(0).view(2, 3, 8)
    assert same[:, 1].all() and not same[:, [0, 2]].any()
