"""Sums of adapters: exact where they claim to be, and PEFT's where PEFT works on ΔW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.adapters.combine import METHODS, WITH_DENSITY, WITH_RANK
from lowrank.errors import ConfigError, TargetError, WeightError
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, words
from tests.surgery.models import Mixed, refused

ATTENTION = ["q_proj", "k_proj", "v_proj"]


def options_of(method: str) -> dict:
    return {"density": 1.0} if method in WITH_DENSITY else {}


def deltas(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """ΔW in float64 of each layer, as merging makes it."""
    twin = copy.deepcopy(model).double()
    before = {n: p.clone() for n, p in twin.named_parameters() if "base_layer.weight" in n}
    lowrank.merge(twin, [adapter])
    after = dict(twin.named_parameters())
    return {n.removesuffix(".base_layer.weight"): after[n] - w for n, w in before.items()}


def sum_of(model: nn.Module, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    each = {a: deltas(model, a) for a in weights}
    return {n: sum(w * each[a][n] for a, w in weights.items()) for n in next(iter(each.values()))}


def assert_is(model: nn.Module, adapter: str, wanted: dict[str, torch.Tensor], atol=2e-6) -> None:
    found = deltas(model, adapter)
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=atol)


def three_adapters() -> nn.Module:
    """Of different ranks, layers, scales and methods' options."""
    model = tiny_llama()
    for adapter, options in {
        "a": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
        "b": {
            "r": 6,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "rank_pattern": {"k_proj": 2},
        },
        "c": {"r": 2, "target_modules": ["v_proj", "down_proj"], "alpha_pattern": {"v_proj": 1}},
    }.items():
        lowrank.inject(model, LoRAConfig(init_lora_weights=False, **options), adapter=adapter)
    lowrank.scale_adapter(model, "b", 1.5)
    return model


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_a_sum_is_exact_whatever_the_ranks_layers_and_scales(method):
    model = three_adapters()
    weights = {"a": 0.7, "b": -1.3, "c": 2.0}
    wanted = sum_of(model, weights)
    lowrank.combine_adapters(model, list(weights), list(weights.values()), "all", method)
    assert_is(model, "all", wanted)
    v = model.model.layers[0].self_attn.v_proj
    assert v.r["all"] == 3 + 6 + 2 and v.scaling["all"] == 1.0 and v.active_adapters == ["a"]
    assert not v.lora_A["all"].weight.requires_grad
    assert model.model.layers[1].self_attn.k_proj.r["all"] == 2


def test_linear_takes_no_more_rank_than_the_matrix_has():
    model = tiny_llama()
    for adapter in "ab":
        config = LoRAConfig(r=9, target_modules=ATTENTION, init_lora_weights=False)
        lowrank.inject(model, config, adapter=adapter)
    wanted = sum_of(model, {"a": 1.0, "b": 0.5})
    lowrank.combine_adapters(model, ["a", "b"], [1.0, 0.5], "linear", "linear")
    lowrank.combine_adapters(model, ["a", "b"], [1.0, 0.5], "cat", "cat")
    assert_is(model, "linear", wanted)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.r == {"a": 9, "b": 9, "linear": 18, "cat": 18}
    assert layer.k_proj.r == {"a": 9, "b": 9, "linear": 12, "cat": 18}  # its N


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"method": "vera"}, {"method": "lora_fa"},
    {"use_dora": True, "use_rslora": True}, {"lora_dropout": 0.3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_at_weight_1_is_itself(generator, method, options):
    model, ids = tiny_llama(), words(generator)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False}
    lowrank.inject(model, LoRAConfig(**config, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name or "vera" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator)).add_("vera" in name)
    lowrank.scale_adapter(model, "default", 0.7)
    expected = model(ids).logits
    lowrank.combine_adapters(model, ["default"], [1.0], "same", method, **options_of(method))
    lowrank.set_adapter(model, "same")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=2e-5)
    lowrank.delete_adapter(model, "default")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=2e-5)


def test_magnitudes_and_plain_adapters_add_up(generator):
    model = three_adapters()
    dora = LoRAConfig(r=2, target_modules=ATTENTION, use_dora=True, init_lora_weights=False)
    lowrank.inject(model, dora, adapter="d")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
    weights = {"a": 0.5, "d": -0.8, "c": 1.5}
    wanted = sum_of(model, weights)
    lowrank.combine_adapters(model, list(weights), list(weights.values()), "all")
    assert_is(model, "all", wanted, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.config["all"].use_dora


def test_svd_is_the_nearest_of_its_rank():
    model = three_adapters()
    weights = {"a": 0.7, "b": 1.3}
    wanted = sum_of(model, weights)
    lowrank.combine_adapters(model, ["a", "b"], [0.7, 1.3], "four", "svd", svd_rank=4)
    for name, delta in wanted.items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        wanted[name] = U[:, :4] * S[:4] @ Vh[:4]
    assert_is(model, "four", wanted, atol=1e-5)
    lowrank.combine_adapters(model, ["a", "b"], [0.7, 1.3], "six", "svd")
    assert model.model.layers[0].self_attn.v_proj.r["six"] == 6  # the largest of theirs


def peft_pair(**options) -> tuple[nn.Module, nn.Module]:
    """The same two adapters of one rank in PEFT and here."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False}
    config |= options
    base = tiny_llama()
    theirs = peft_model(base, "one", **config)
    with quiet():
        theirs.add_adapter("two", peft.LoraConfig(**config))
    ours = copy.deepcopy(base)
    for adapter in ("one", "two"):
        lowrank.inject(ours, LoRAConfig(**config), adapter=adapter)
    ours.load_state_dict(theirs.base_model.model.state_dict())
    return theirs, ours


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_equals_peft_where_it_works_on_the_product(method, sign):
    theirs, ours = peft_pair()
    options = {"density": 0.4} if method in WITH_DENSITY else {}
    weights = [0.7, -0.4]
    rank = {"svd_rank": 7} if method in WITH_RANK else {}
    with quiet():
        theirs.base_model.add_weighted_adapter(
            ["one", "two"], weights, "sum", method, majority_sign_method=sign, **options, **rank
        )
    lowrank.combine_adapters(
        ours, ["one", "two"], weights, "sum", method, majority_sign_method=sign, **options, **rank
    )
    for name, delta in deltas(ours, "sum").items():
        layer = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(delta.float(), layer.get_delta_weight("sum"), rtol=0, atol=1e-5)
    if method == "ties_svd":  # on the factors it would elect among numbers that are not alike
        lowrank.combine_adapters(
            ours,
            ["one", "two"],
            weights,
            "same",
            "ties",
            majority_sign_method=sign,
            **options,
            **rank,
        )
        assert_is(ours, "same", deltas(ours, "sum"), atol=1e-5)


def test_pruned_factors_are_peft_s_one_at_a_time_and_sum_without_cross_terms():
    theirs, ours = peft_pair()
    wanted = {}
    for adapter, weight in (("one", 0.7), ("two", 0.4)):
        with quiet():  # of one adapter PEFT prunes nothing: the other one takes no part, at 0
            other = "two" if adapter == "one" else "one"
            theirs.base_model.add_weighted_adapter(
                [adapter, other], [weight, 0.0], f"{adapter}0", "magnitude_prune", density=0.3
            )
    lowrank.combine_adapters(
        ours, ["one", "two"], [0.7, 0.4], "sum", "magnitude_prune", density=0.3
    )
    for name in deltas(ours, "sum"):
        layer = theirs.base_model.model.get_submodule(name)
        wanted[name] = (layer.get_delta_weight("one0") + layer.get_delta_weight("two0")).double()
    assert_is(ours, "sum", wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear_svd", "dare_ties"])
def test_dare_repeats_by_its_seed_and_keeps_the_mean(method):
    model = tiny_llama()
    for adapter in "ab":
        config = LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        lowrank.inject(model, config, adapter=adapter)
    full = {"svd_rank": 24} if method in WITH_RANK else {}

    def drawn(seed: int) -> torch.Tensor:
        arguments = (["a", "b"], [0.5, 0.5], "c", method)
        lowrank.combine_adapters(model, *arguments, density=0.8, seed=seed, **full)
        found = torch.stack(list(deltas(model, "c").values()))
        lowrank.delete_adapter(model, "c")
        return found

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    if method != "dare_ties":
        wanted = torch.stack(list(sum_of(model, {"a": 0.5, "b": 0.5}).values()))
        draws = torch.stack([drawn(seed) for seed in range(60)])
        error = (draws.mean(0) - wanted).abs()
        assert bool((error <= 6 * draws.std(0) / 60**0.5 + 1e-5).all())


@pytest.mark.parametrize("method", METHODS)
def test_other_kinds_of_layers(generator, method):
    model, ids = Mixed(), torch.randint(11, (2, 7), generator=generator)
    targets = ["table", "conv", "linear"]
    for adapter, r in (("a", 4), ("b", 2)):
        config = LoRAConfig(r=r, target_modules=targets, init_lora_weights=False)
        lowrank.inject(model, config, adapter=adapter)
    lowrank.set_adapter(model, ["a", "b"])
    both = model(ids)
    lowrank.set_adapter(model, "a")
    alone = model(ids)
    lowrank.combine_adapters(model, ["a"], [1.0], "one", method, **options_of(method))
    lowrank.set_adapter(model, "one")
    torch.testing.assert_close(model(ids), alone, rtol=1e-5, atol=1e-4)
    if method in ("linear", "cat"):
        lowrank.combine_adapters(model, ["a", "b"], [1.0, 1.0], "two", method)
        lowrank.set_adapter(model, "two")
        torch.testing.assert_close(model(ids), both, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("arguments", "options", "error", "words"), [
    ((["a", "x"], [1, 1], "d"), {}, TargetError, "'x'"),
    ((["a", "b"], [1], "d"), {}, ConfigError, "one for each of 2"),
    ((["a", "b"], 1.0, "d"), {}, ConfigError, "one for each of 2 adapters; got 1.0"),
    ((["a", "a"], [1, 1], "d"), {}, ConfigError, "each once"),
    (([], [], "d"), {}, ConfigError, "expected names"),
    (("a", [1], "d"), {}, ConfigError, "expected names"),
    ((["a", "b"], [1, float("nan")], "d"), {}, ConfigError, "weights of 'b'"),
    ((["a", "b"], [1, "1"], "d"), {}, ConfigError, "weights of 'b'"),
    ((["a", "b"], [1, 1], "a"), {}, ConfigError, "already"),
    ((["a", "b"], [1, 1], "x.y"), {}, ConfigError, "dots"),
    ((["a", "b"], [1, 1], "d", "average"), {}, ConfigError, "expected one of 'linear'"),
    ((["a", "b"], [1, 1], "d", "svd"), {"svd_rank": 0}, ConfigError, "svd_rank"),
    ((["a", "b"], [1, 1], "d"), {"svd_rank": 4}, ConfigError, "svd_rank"),
    ((["a", "b"], [1, 1], "d", "ties"), {}, ConfigError, "density"),
    ((["a", "b"], [1, 1], "d", "ties"), {"density": 0}, ConfigError, "density"),
    ((["a", "b"], [1, 1], "d", "linear"), {"density": 0.5}, ConfigError, "density"),
    ((["a", "b"], [1, 1], "d"), {"majority_sign_method": "most"}, ConfigError, "'frequency'"),
    ((["a", "b"], [1, 1], "d"), {"seed": -1}, ConfigError, "seed"),
], ids=str)  # fmt: skip
def test_refusals_leave_the_model_as_it_was(arguments, options, error, words):
    model = three_adapters()
    with refused(model, error, words):
        lowrank.combine_adapters(model, *arguments, **options)


def test_a_damaged_adapter_is_refused_by_name():
    model = three_adapters()
    model.model.layers[1].self_attn.v_proj.lora_B["c"].weight.data[3, 1] = float("nan")
    before = {n for n, _ in model.named_parameters()}
    with pytest.raises(WeightError, match=r"layers\.1\.self_attn\.v_proj: .* 'c'"):
        lowrank.combine_adapters(model, ["a", "c"], [1, 1], "d")
    assert {n for n, _ in model.named_parameters()} == before


def test_merged_adapters_are_refused():
    model = three_adapters()
    lowrank.merge(model)
    with pytest.raises(ConfigError, match="unmerge first"):
        lowrank.combine_adapters(model, ["a", "b"], [1, 1], "d")


def test_a_combined_adapter_is_saved_and_trains(tmp_path, generator):
    model, ids = three_adapters(), words(generator)
    lowrank.combine_adapters(model, ["a", "b"], [0.7, 0.3], "ab")
    lowrank.set_adapter(model, "ab")
    expected = model(ids).logits
    lowrank.save_adapter(model, tmp_path, "ab")
    fresh = tiny_llama()
    base = {n.replace(".base_layer", ""): p for n, p in model.state_dict().items()}
    fresh.load_state_dict({n: base[n] for n in fresh.state_dict()})
    lowrank.load_adapter(fresh, tmp_path / "ab")
    torch.testing.assert_close(fresh(ids).logits, expected)
    model(ids).logits.square().sum().backward()
    layer = model.model.layers[0].self_attn.v_proj
    assert layer.lora_A["ab"].weight.grad.abs().sum() > 0 and layer.lora_A["a"].weight.grad is None


class Others(nn.Module):
    """Attention and fused experts, which one layer holds several matrices of."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x)
        return sum(nn.functional.linear(y, self.experts.up_proj[e]) for e in range(3))


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_several_matrices(generator, tmp_path, method):
    model, x = Others(), torch.randn(2, 4, 8, generator=generator)
    for adapter, r in (("a", 3), ("b", 2)):
        config = LoRAConfig(
            r=r, target_modules=["attention"], target_parameters=["up_proj"],
            init_lora_weights=False,
        )  # fmt: skip
        lowrank.inject(model, config, adapter=adapter)
    alone = model(x)
    lowrank.combine_adapters(model, ["a"], [1.0], "one", method, **options_of(method))
    lowrank.set_adapter(model, "one")
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-4)
    fresh = Others()
    fresh.load_state_dict(lowrank.surgery.unload(copy.deepcopy(model)).state_dict())
    lowrank.load_adapter(fresh, lowrank.save_adapter(model, tmp_path, "one"))
    torch.testing.assert_close(fresh(x), alone, rtol=1e-4, atol=1e-4)
    if method in ("linear", "cat"):
        lowrank.set_adapter(model, ["a", "b"])
        both = model(x)
        lowrank.combine_adapters(model, ["a", "b"], [1.0, 1.0], "two", method)
        lowrank.set_adapter(model, "two")
        torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(TargetError, match="one adapter for all rows"),
        lowrank.adapter_rows(model, ["a", "b"]),
    ):
        pass
