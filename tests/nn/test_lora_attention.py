"""Adapters on nn.MultiheadAttention, against torch's own with the merged weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.nn.lora_attention import LoRAMultiheadAttention
from tests.adapters.oracle import peft, peft_model

RANDOM = LoRAConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["mha"])
OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "extra_keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other_sizes": {"kdim": 7, "vdim": 5, "batch_first": True},
    "other_values": {"vdim": 5},
}


class Attention(nn.Module):
    """A model of one attention; its masks are those of the call."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 3, **options)
        for name, parameter in self.mha.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def forward(self, *inputs, **how):
        return self.mha(*inputs, **how)


def inputs(mha: nn.Module, same: bool, batched: bool = True) -> list[Tensor]:
    """query of length 5, key and value of length 6, or one tensor for all three."""
    if same:
        return [torch.randn(*((5, 2) if batched else (5,)), 12)] * 3
    sizes = ((5, 12), (6, mha.kdim), (6, mha.vdim))
    tensors = [torch.randn(n, *((2,) if batched else ()), size) for n, size in sizes]
    swap = batched and mha.batch_first
    return [t.transpose(0, 1) if swap else t for t in tensors]


def formula(layer: LoRAMultiheadAttention, *tensors: Tensor, **how) -> tuple[Tensor, Tensor | None]:
    """torch's attention with W + Σ s·B A, without its way for inference."""
    weights, d = {}, layer.embed_dim
    matrix, out = layer.matrix(torch.float32), layer.base_layer.out_proj
    of_out = out.matrix(torch.float32)
    for name in layer.active_adapters:
        (A, B), (C, D) = layer.factors(name), out.factors(name)
        matrix = matrix + layer.scaling[name] * B @ A
        of_out = of_out + out.scaling[name] * D @ C
    if layer.kdim == layer.vdim == d:
        weights = {"in_proj_weight": matrix}
    else:
        sizes = [d, layer.kdim, layer.vdim]
        blocks = [rows.split(sizes, dim=1)[i] for i, rows in enumerate(matrix.split(d, dim=0))]
        weights = {f"{n}_proj_weight": w for n, w in zip("qkv", blocks, strict=True)}
    weights["out_proj.weight"] = of_out
    plain = nn.MultiheadAttention(
        d, layer.num_heads, 0.0, layer.in_proj_bias is not None, layer.bias_k is not None,
        layer.add_zero_attn, layer.kdim, layer.vdim, layer.batch_first,
    )  # fmt: skip
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        if getattr(layer, name) is not None:
            weights[name] = getattr(layer, name)
    if out.bias is not None:
        weights["out_proj.bias"] = out.bias
    return functional_call(plain, weights, tensors, how)


def gradients(layer: nn.Module, run, tensors: list[Tensor], **how) -> dict[str, Tensor]:
    leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
    layer.zero_grad()
    y, weights = run(*(leaves[id(t)] for t in tensors), **how)
    loss = (y * y.detach().cos()).sum()
    if weights is not None:
        loss = loss + (weights * weights.detach().sin()).sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    results = {} if weights is None else {"weights": weights.detach()}
    return {
        "y": y.detach(),
        **results,
        **{f"x{i}": t.grad for i, t in enumerate(leaves.values())},
        **found,
    }


def assert_same(got: dict, want: dict, rtol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


def masks(kind: str, q: int, k: int) -> dict[str, Tensor]:
    if kind == "bool":
        padding = torch.zeros(2, k, dtype=torch.bool)
        padding[1, -2:] = True
        hidden = torch.rand(q, k) > 0.8
        hidden[:, 0] = False  # or a query sees nothing
        return {"key_padding_mask": padding, "attn_mask": hidden}
    if kind == "float":
        return {"attn_mask": torch.randn(2 * 3, q, k)}
    if kind == "padding":
        return {"key_padding_mask": torch.tensor([[False] * k, [False] * (k - 1) + [True]])}
    return {}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "padding"])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_torchs_with_the_merged_weights(options, mask, need_weights):
    model = lowrank.inject(Attention(**OPTIONS[options]), RANDOM)
    layer = model.mha
    layer.add_adapter("other", LoRAConfig(r=3, init_lora_weights=False))
    layer.set_adapter(["default", "other"])
    how = {"need_weights": need_weights, "average_attn_weights": mask != "float"}
    for same in (False, *([True] if layer.kdim == layer.vdim == 12 else [])):
        tensors = inputs(layer, same)
        q = tensors[0].shape[1 if layer.batch_first else 0]
        k = tensors[1].shape[1 if layer.batch_first else 0]
        if same and layer.batch_first:
            tensors = [tensors[0].transpose(0, 1)] * 3
            q = k = 5
        how |= masks(mask, q, k)
        got = gradients(layer, layer, tensors, **how)
        assert any("out_proj.lora_A.other" in name for name in got)
        assert_same(got, gradients(layer, lambda *x, **h: formula(layer, *x, **h), tensors, **how))


@pytest.mark.parametrize("options", OPTIONS)
def test_one_without_a_batch(options):
    layer = lowrank.inject(Attention(**OPTIONS[options]), RANDOM).mha
    tensors = inputs(layer, same=False, batched=False)
    how = {"key_padding_mask": torch.tensor([False] * 4 + [True] * 2)}
    got = gradients(layer, layer, tensors, **how)
    assert_same(got, gradients(layer, lambda *x, **h: formula(layer, *x, **h), tensors, **how))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_merge_disable_and_unload(options, use_dora):
    plain = Attention(**OPTIONS[options]).eval()
    before = copy.deepcopy(plain.state_dict())
    model = lowrank.inject(copy.deepcopy(plain), replace(RANDOM, use_dora=use_dora))
    tensors = inputs(model.mha, same=False)
    if use_dora:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1.5 + torch.rand_like(parameter))
    y, was = model(*tensors)[0], plain(*tensors)[0]
    assert not torch.allclose(y, was, atol=1e-2)
    with lowrank.disable_adapters(model):
        assert torch.equal(model(*tensors)[0], was)
    lowrank.merge(model)
    torch.testing.assert_close(model(*tensors)[0], y, rtol=1e-4, atol=1e-5)
    with lowrank.disable_adapters(model):
        torch.testing.assert_close(model(*tensors)[0], was)
    lowrank.unmerge(model)
    assert torch.equal(model(*tensors)[0], y)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(model(*tensors)[0], y, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_what_fails_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "x": nn.LayerNorm(8)})
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(lowrank.errors.LowrankError):
        lowrank.inject(model, LoRAConfig(target_modules=["mha", "x"]))
    assert [name for name, _ in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match='bias: expected "none" with an attention'):
        lowrank.inject(model, LoRAConfig(target_modules=["mha"], bias="all"))
    assert [name for name, _ in model.named_modules()] == modules
    with pytest.raises(ConfigError, match="attn_mask: expected the mask"):
        x = torch.randn(3, 2, 8)
        lowrank.inject(model, LoRAConfig(target_modules=["mha"]))
        model["mha"](x, x, x, is_causal=True)


def test_files_are_pefts_and_so_is_what_it_gets_right(tmp_path):
    plain = Attention()
    ours = lowrank.inject(copy.deepcopy(plain), RANDOM)
    lowrank.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    attention = theirs.base_model.model.mha
    out = attention.base_layer.out_proj
    x = torch.randn(5, 2, 12)
    wrong = theirs(x, x, x)[0]
    with torch.no_grad():  # it adds the delta of out_proj twice: half of it then is all of it
        out.scaling["default"] /= 2
    torch.testing.assert_close(theirs(x, x, x)[0], ours(x, x, x)[0])
    assert not torch.allclose(wrong, ours(x, x, x)[0], atol=1e-3)
    theirs = peft_model(plain, r=3, target_modules=["mha"], init_lora_weights=False)
    theirs.save_pretrained(tmp_path / "theirs")
    again = lowrank.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    theirs.base_model.model.mha.base_layer.out_proj.scaling["default"] /= 2
    torch.testing.assert_close(again(x, x, x)[0], theirs(x, x, x)[0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_torchs_encoder(norm_first):
    make = nn.TransformerEncoderLayer(12, 4, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(make, 2, enable_nested_tensor=not norm_first).eval()
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    config = LoRAConfig(r=2, init_lora_weights=False, target_modules=["self_attn", "linear1"])
    was = model(x, src_key_padding_mask=padding)
    lowrank.inject(model, config)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        assert not torch.allclose(y[0], was[0], atol=1e-3)
    torch.testing.assert_close(model.train()(x, src_key_padding_mask=padding)[0], y[0])
    lowrank.merge_and_unload(model.eval())
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[0], y[0])


def test_dropout_checkpointing_compiling_and_copies():
    model = lowrank.inject(Attention(), replace(RANDOM, lora_dropout=0.5))
    x = torch.randn(5, 2, 12)
    model.train()
    assert not torch.equal(model(x, x, x)[0], model(x, x, x)[0])
    model.eval()
    y = model(x, x, x)[0]
    assert torch.equal(copy.deepcopy(model)(x, x, x)[0], y)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, x, x)[0], y)
    again = torch.utils.checkpoint.checkpoint(model, x, x, x, use_reentrant=False)[0]
    assert torch.equal(again, y)
    fresh = Attention().state_dict()
    model.load_state_dict(fresh)
    assert torch.equal(model.mha.in_proj_weight, fresh["mha.in_proj_weight"])
    assert torch.equal(model.mha.out_proj.weight, fresh["mha.out_proj.weight"])


def test_sixteen_bits():
    layer = lowrank.inject(Attention().bfloat16(), RANDOM).mha
    x = torch.randn(5, 2, 12).bfloat16()
    y = layer(x, x, x)[0]
    want = formula(copy.deepcopy(layer).float(), *[x.float()] * 3)[0]
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() < 2e-2 * want.norm()
