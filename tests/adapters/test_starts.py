"""What adapters start with, over dense weights as PEFT has it: the same W_rest and the same B A."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear
from lowrank.errors import ConfigError, FileFormatError, ShapeError, WeightError
from tests.adapters.oracle import (
    peft,
    peft_model,
    quiet,
    spread_singular_values_,
    tiny_llama,
    words,
)
from tests.io.adapters import shake

K, N = 63, 37
MUTATING = ["pissa", "olora"]
TARGETS = ["q_proj", "up_proj", "down_proj"]


def graded(N: int = N, K: int = K, **options) -> nn.Linear:
    """A layer whose singular values are far apart, so that a part of them is one thing only."""
    linear = nn.Linear(K, N, **options)
    r = min(N, K)
    U, V = (torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q for n in (N, K))
    # a fast SVD of 16 iterations leaves 0.5 ** 33 of what it should leave out
    S = 0.5 ** torch.arange(r, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(U * S @ V.T)
    return linear


def product(layer: nn.Module) -> torch.Tensor:
    return layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def near(
    got: torch.Tensor, expected: torch.Tensor, tolerance: float, of: torch.Tensor | None = None
) -> None:
    """As a whole, in parts of `of`: a sum and its parts are as exact as what they are parts of."""
    whole = (expected if of is None else of).double().norm()
    assert (got.double() - expected.double()).norm() <= tolerance * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", [*MUTATING, "pissa_niter_16"])
def test_base_and_adapter_are_pefts(init, use_rslora, dtype):
    base = nn.Sequential(graded(), graded(K, N)).to(dtype)
    before = copy.deepcopy(base.state_dict())
    options = {"r": 6, "lora_alpha": 20, "use_rslora": use_rslora, "init_lora_weights": init}
    with quiet():
        config = peft.LoraConfig(**options, target_modules=["0", "1"])
        theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model
    ours = lowrank.inject(copy.deepcopy(base), LoRAConfig(**options, target_modules=["0", "1"]))
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # PEFT's factors are float32's
    for i in (0, 1):
        # PEFT rounds A and B to the base's dtype on their way to float32, and we do not
        weight = before[f"{i}.weight"]
        near(product(ours[i]), product(theirs[i]), tolerance)
        got, want = ours[i].base_layer.weight, theirs[i].base_layer.weight
        assert got.dtype == dtype and not torch.equal(got, weight)
        largest = max(weight, want, key=torch.linalg.norm)  # with OLoRA's s, the base
        near(got, want, tolerance, largest)
        whole = got.float() + ours[i].scaling["default"] * product(ours[i])
        near(whole, weight, tolerance, largest)
    if dtype == torch.float32:
        results = []
        for model in (ours, theirs):
            torch.manual_seed(1)
            y = model(torch.randn(9, K))
            y.backward(torch.randn(9, K))
            parts = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in model]
            # these are the same whichever signs the singular vectors have
            results.append(
                [y, *(B.grad @ B.T for _, B in parts), *(A.T @ A.grad for A, _ in parts)]
            )
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_orthogonal():
    layer = LoRALinear(K, N, config=LoRAConfig(r=8, init_lora_weights="orthogonal"))
    A, B = layer.factors("default")
    assert A.norm() > 1 and B.norm() > 1
    torch.testing.assert_close(B @ A, torch.zeros(N, K), rtol=0, atol=1e-6)
    stds = []
    with quiet():
        options = {"r": 8, "init_lora_weights": "orthogonal", "target_modules": ["0"]}
        for _ in range(30):
            model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(**options))
            ours = LoRALinear(K, N, config=LoRAConfig(r=8, init_lora_weights="orthogonal"))
            theirs = model.base_model.model[0]
            stds.append(
                [m.lora_A["default"].weight.std().item() for m in (ours, theirs)]
                + [m.lora_B["default"].weight.std().item() for m in (ours, theirs)]
            )
    A, A0, B, B0 = torch.tensor(stds).mean(0)
    assert abs(A / A0 - 1) < 0.1 and abs(B / B0 - 1) < 0.1
    with pytest.raises(ConfigError, match="r: expected an even one .*; got 3"):
        LoRALinear(K, N, config=LoRAConfig(r=3, init_lora_weights="orthogonal"))


@pytest.mark.parametrize("quantizer", [None, "nf4", "none"])
@pytest.mark.parametrize("init", MUTATING)
def test_the_layer_is_what_it_was_but_for_what_quantizing_loses(init, quantizer):
    linear, x = graded(), torch.randn(9, K)
    before = copy.deepcopy(linear.state_dict())
    config = LoRAConfig(r=6, init_lora_weights=init)
    layer = LoRALinear.wrap(linear, config, quantizer=quantizer)
    assert torch.equal(linear.weight, before["weight"]) and layer.bias is linear.bias
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert error < (0.1 if quantizer == "nf4" else 1e-5)
    # loading the original weight into it starts anew
    other = graded()
    layer.load_state_dict(other.state_dict())
    error = (layer(x) - other(x)).norm() / other(x).norm()
    assert error < (0.1 if quantizer == "nf4" else 1e-5)
    if quantizer is None:
        again = LoRALinear.wrap(other, config)
        assert torch.equal(layer.base_layer.weight, again.base_layer.weight)


@pytest.mark.parametrize("init", MUTATING)
def test_a_rank_beyond_the_weights_still_learns(init):
    linear = graded(5, 9)
    layer = LoRALinear.wrap(linear, LoRAConfig(r=7, init_lora_weights=init))
    x = torch.randn(4, 9)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert layer.lora_B["default"].weight.grad.abs().amin(1).min() > 0


@pytest.mark.parametrize("init", MUTATING)
def test_files_of_ours_and_pefts(tmp_path, generator, init):
    base, ids = tiny_llama(), words(generator)
    for name, module in base.named_modules():
        if name.split(".")[-1] in TARGETS:
            spread_singular_values_(module.weight.data)
    options = {"target_modules": TARGETS, "init_lora_weights": init, "r": 4}
    theirs = peft_model(base, **options)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    near(model(ids).logits, theirs(ids).logits, 1e-5)

    ours = lowrank.inject(copy.deepcopy(base), LoRAConfig(**options))
    shake(ours)
    lowrank.save_adapter(ours, tmp_path / "ours")
    with quiet():
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    near(read(ids).logits, ours(ids).logits, 1e-5)
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(ids).logits, ours(ids).logits)
    lowrank.load_adapter(again, tmp_path / "ours")  # over its own base, once more
    assert torch.equal(again(ids).logits, ours(ids).logits)
    other = tiny_llama()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FileFormatError, match="makes another base than it was trained over"):
        lowrank.load_adapter(other, tmp_path / "ours")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", MUTATING)
def test_converted_it_is_lora_over_the_plain_model(tmp_path, init, use_dora, use_rslora, quantizer):
    base, x = nn.Sequential(graded(), graded(K, N)), torch.randn(9, K)
    config = LoRAConfig(
        r=4, target_modules=["0", "1"], init_lora_weights=init, use_dora=use_dora,
        use_rslora=use_rslora, rank_pattern={"1": 6}, alpha_pattern={"0": 3.0},
    )  # fmt: skip
    model = lowrank.inject(copy.deepcopy(base), config, quantizer=quantizer)
    shake(model)
    trained = model(x)
    assert lowrank.convert_to_lora(model, base.state_dict()) is model
    tolerance = 1e-5 if quantizer is None else 0.2
    assert (model(x) - trained).norm() < tolerance * trained.norm()
    assert model[0].r == {"default": 8} and model[1].r == {"default": 12}
    assert all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())
    lowrank.inject(model, LoRAConfig(target_modules=["0"]), adapter="other")
    lowrank.save_adapter(model, tmp_path)
    if quantizer is None:
        with quiet():
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        torch.testing.assert_close(theirs(x), trained, rtol=1e-4, atol=1e-5)
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path, quantizer=quantizer)
    torch.testing.assert_close(again(x), model(x))
    lowrank.delete_adapter(model, "default")


def test_what_cannot_be_converted_stays_as_it_was():
    base = nn.Sequential(graded(), graded(K, N))
    model = lowrank.inject(
        copy.deepcopy(base), LoRAConfig(target_modules=["0", "1"], init_lora_weights="pissa")
    )
    before = copy.deepcopy(model.state_dict())
    weights = base.state_dict()
    for wrong, error, words_ in (
        ({}, ConfigError, "weights: expected 0.weight among them; it is missing"),
        ({**weights, "1.weight": torch.randn(K, N)}, WeightError, "1.weight: .*is not the base"),
        ({**weights, "1.weight": torch.randn(K, K)}, ShapeError, "1.weight: expected .*63, 37"),
        ({**weights, "1.weight": weights["1.weight"] * torch.nan}, WeightError, "1.weight.*NaN"),
    ):
        with pytest.raises(error, match=words_):
            lowrank.convert_to_lora(model, wrong)
        now = model.state_dict()
        assert now.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in now.items())
    plain = lowrank.inject(copy.deepcopy(base), LoRAConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="init_lora_weights=True"):
        lowrank.convert_to_lora(plain, weights)


@pytest.mark.parametrize("init", MUTATING)
def test_it_stays_alone_and_is_not_deleted(init):
    model = lowrank.inject(
        nn.Sequential(graded()), LoRAConfig(target_modules=["0"], init_lora_weights=init)
    )
    with pytest.raises(ConfigError, match="expected it alone"):
        lowrank.inject(model, LoRAConfig(target_modules=["0"]), adapter="other")
    with pytest.raises(ConfigError, match="principal part"):
        lowrank.delete_adapter(model, "default")
    with pytest.raises(ConfigError, match="expected a quantizer for 0"):
        lowrank.inject(
            nn.Sequential(graded()), LoRAConfig(target_modules=["0"], init_lora_weights="loftq")
        )
