"""Editing models: targets, counts, switching and merging, against PEFT on a tiny Llama."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear, QuantLinear
from lowrank.errors import ConfigError, LowrankError, TargetError, WeightError
from tests.adapters.oracle import peft_model, tiny_llama, words


def lora_names(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def peft_names(model: nn.Module) -> set[str]:
    from peft.tuners.lora import LoraLayer

    return {
        name
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def state(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    values = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    return {"modules": [n for n, _ in model.named_modules()], **values}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state(model)
    assert after.keys() == before.keys() and after["modules"] == before["modules"]
    for name in before.keys() - {"modules"}:
        assert torch.equal(after[name][0], before[name][0]) and after[name][1] == before[name][1], (
            name
        )


TARGETS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*layers\.1\..*(gate|up)_proj"},
    {"target_modules": ["model.layers.0.self_attn.k_proj", "mlp.down_proj"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": None},
    {"target_modules": ["q_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\..*": 5},
        "alpha_pattern": {"up_proj": 2.5},
    },
]


@pytest.mark.parametrize("options", TARGETS)
def test_targets_ranks_scalings_and_the_line_are_pefts(options, capsys):
    model = tiny_llama(attention_bias=True)
    theirs = peft_model(model, r=4, lora_alpha=6, **options)
    assert lowrank.inject(model, LoRAConfig(r=4, lora_alpha=6, **options)) is model
    assert lora_names(model, LoRALinear) == peft_names(theirs)
    for name in lora_names(model, LoRALinear):
        ours, other = model.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert (ours.r, ours.lora_alpha, ours.scaling) == (other.r, other.lora_alpha, other.scaling)
    wanted = {
        n.removeprefix("base_model.model."): p.requires_grad for n, p in theirs.named_parameters()
    }
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    theirs.print_trainable_parameters()
    line = capsys.readouterr().out
    lowrank.print_trainable_parameters(model)
    assert capsys.readouterr().out == line
    assert lowrank.count_parameters(model) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    "options", [TARGETS[1], TARGETS[-1], {"target_modules": ["q_proj"], "use_rslora": True}]
)
def test_logits_gradients_and_merge_are_pefts(options, generator):
    model = tiny_llama()
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    theirs = peft_model(model, **options)
    lowrank.inject(model, LoRAConfig(**options))
    model.load_state_dict(theirs.base_model.model.state_dict())
    ids = words(generator)
    for one in (model, theirs):
        one.train()
        one(input_ids=ids, labels=ids).loss.backward()
        one.eval()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    for name, grad in grads.items():
        want = theirs.base_model.model.get_parameter(name).grad
        assert (grad - want).norm() <= 1e-5 * want.norm(), name
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        ours, merged = lowrank.merge_and_unload(model), theirs.merge_and_unload()
        assert ours.state_dict().keys() == merged.state_dict().keys()
        for name, weight in merged.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], weight)


def test_quantized_weights_count_as_weights(capsys):
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    lowrank.quantize(model, "nf4", double_quant=True)
    dense = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    assert lowrank.count_parameters(model) == (dense, total)
    lowrank.inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    added = 2 * 2 * (24 + 24)
    lowrank.print_trainable_parameters(model)
    line = f"trainable params: {added:,d} || all params: {total + added:,d} || "
    assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(
    ("targets", "nearest"),
    [
        (["q_prj"], "q_proj"),
        (["q_proj", "gate"], "gate_proj"),
        (["query_key_value"], "down_proj"),
        (r"q_proj", "q_proj"),
        (r".*\.nothing", "o_proj"),
        (["layers.7.q_proj"], "q_proj"),
    ],
)
def test_targets_that_match_nothing(targets, nearest):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(TargetError, match=nearest) as caught:
        lowrank.inject(model, LoRAConfig(target_modules=targets))
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_targets_that_are_no_linears():
    model = tiny_llama()
    before = state(model)
    for targets in (["mlp"], ["q_proj", "embed_tokens"], r".*norm"):
        with pytest.raises(TargetError, match="expected a linear layer"):
            lowrank.inject(model, LoRAConfig(target_modules=targets))
    with pytest.raises(TargetError, match="matches nothing"):
        lowrank.inject(nn.Sequential(nn.ReLU()), LoRAConfig(target_modules="all-linear"))
    assert_unchanged(model, before)


def test_an_error_half_way_leaves_the_model_alone(monkeypatch):
    model = tiny_llama()
    lowrank.inject(model, LoRAConfig(target_modules=["q_proj"], bias="all"))
    before = state(model)
    calls = []

    def fails(weight, *_, **__):
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(nn.init, "kaiming_uniform_", fails)
    with pytest.raises(MemoryError):
        lowrank.inject(model, LoRAConfig(target_modules=["q_proj", "k_proj"]), adapter="b")
    assert_unchanged(model, before)


def test_the_config_is_not_changed_and_all_linear_is_resolved():
    config = LoRAConfig(target_modules="all-linear")
    model = lowrank.inject(tiny_llama(), config)
    assert config == LoRAConfig(target_modules="all-linear")
    assert len(model.model.layers[0].mlp.up_proj.config["default"].target_modules) == 14
    model = lowrank.inject(tiny_llama(layers=3), config)  # 21 names: as PEFT, down to suffixes
    theirs = peft_model(tiny_llama(layers=3), target_modules="all-linear")
    resolved = model.model.layers[0].mlp.up_proj.config["default"].target_modules
    assert set(resolved) == theirs.peft_config["default"].target_modules


def test_a_layer_in_two_places_is_adapted_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    lowrank.inject(model, LoRAConfig(target_modules="all-linear"))
    assert model["a"][0] is model["b"][0] and isinstance(model["a"][0], LoRALinear)
    lowrank.merge_and_unload(model)
    assert model["a"][0] is model["b"][0] and type(model["a"][0]) is nn.Linear


def two_adapters(**options) -> nn.Module:
    model = tiny_llama()
    config = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 3}
    lowrank.inject(model, LoRAConfig(**{**config, **options}), adapter="a")
    lowrank.inject(
        model, LoRAConfig(**{**config, "target_modules": ["v_proj", "up_proj"]}), adapter="b"
    )
    return model


@torch.no_grad()
def test_switching_equals_peft(generator):
    import peft

    base, ids = tiny_llama(), words(generator)
    options = {"r": 3, "init_lora_weights": False}
    theirs = peft_model(base, "first", target_modules=["q_proj", "v_proj"], **options)
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["v_proj", "up_proj"], **options))
    model = copy.deepcopy(base)
    lowrank.inject(
        model, LoRAConfig(target_modules=["q_proj", "v_proj"], **options), adapter="first"
    )
    lowrank.inject(
        model, LoRAConfig(target_modules=["v_proj", "up_proj"], **options), adapter="second"
    )
    model.load_state_dict(theirs.base_model.model.state_dict())

    def assert_equal():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        wanted = {
            n.removeprefix("base_model.model."): p.requires_grad
            for n, p in theirs.named_parameters()
        }
        assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted

    assert_equal()
    for active in ("second", "first", ["first", "second"]):
        lowrank.set_adapter(model, active)
        theirs.base_model.set_adapter(active)
        assert_equal()
    theirs.base_model.set_adapter("second")
    lowrank.set_adapter(model, "second")
    lowrank.delete_adapter(model, "first")
    theirs.delete_adapter("first")
    assert_equal()
    with lowrank.disable_adapters(model):
        assert torch.equal(model(ids).logits, base(ids).logits)


@torch.no_grad()
def test_scale_is_never_cumulative(generator):
    model, ids = two_adapters(), words(generator)
    v = model.model.layers[0].self_attn.v_proj
    once = v.scaling["a"]
    for _ in range(3):
        lowrank.scale_adapter(model, "a", 1.5)
    assert v.scaling["a"] == 1.5 * once and v.scaling["b"] == once
    lowrank.scale_adapter(model, "a", 0.0)
    scaled = model(ids).logits
    with lowrank.disable_adapters(model):
        torch.testing.assert_close(scaled, model(ids).logits)
    lowrank.scale_adapter(model, "a", 1.0)
    assert v.scaling["a"] == once
    with pytest.raises(ConfigError, match="factor"):
        lowrank.scale_adapter(model, "a", float("nan"))


@torch.no_grad()
def test_disable_nests_and_works_as_a_call(generator):
    model, ids = two_adapters(), words(generator)
    adapted = model(ids).logits
    with lowrank.disable_adapters(model):
        base = model(ids).logits
        with lowrank.disable_adapters(model):
            pass
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, adapted) and not torch.equal(base, adapted)
    lowrank.disable_adapters(model)
    assert torch.equal(model(ids).logits, base)
    lowrank.enable_adapters(model)
    with pytest.raises(RuntimeError, match="inside"), lowrank.disable_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, adapted)


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_the_answer_and_unmerge_every_bit(quantized, dtype, generator):
    model, ids = two_adapters().to(dtype), words(generator)
    if quantized:
        lowrank.quantize(model, "nf4")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with lowrank.disable_adapters(model):
        base = model(ids).logits
    for chosen in (["a"], ["a", "b"]):
        lowrank.set_adapter(model, chosen)
        adapted = model(ids).logits
        lowrank.merge(model)
        gap = (adapted - base).float().norm()
        tolerance = 1e-5 if dtype == torch.float32 else 0.2
        assert (model(ids).logits - adapted).float().norm() < tolerance * gap
        with lowrank.disable_adapters(model):
            assert torch.equal(model(ids).logits, base)
        lowrank.unmerge(model)
        assert torch.equal(model(ids).logits, adapted)
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_adapter_survives_merging_over_a_quantized_base(dtype, generator):
    model, ids = lowrank.quantize(tiny_llama(), "nf4"), words(generator, batch=8)
    lowrank.inject(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))

    def loss():
        return model(input_ids=ids, labels=ids).loss

    first = loss().item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    last = loss().item()
    assert last < first - 0.3
    assert lowrank.merge_and_unload(model, dtype=dtype) is model
    assert not lora_names(model, LoRALinear) and not lora_names(model, QuantLinear)
    if dtype == torch.float32:
        assert abs(loss().item() - last) < 1e-5
    else:
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
        model.to(dtype)
        assert abs(loss().item() - last) < 0.05 * (first - last)


def test_merging_a_broken_adapter_changes_nothing():
    model = two_adapters()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B["a"].weight[0, 0] = float("nan")
    modules = [n for n, _ in model.named_modules()]
    weights = [p for p in model.parameters()]
    with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.v_proj"):
        lowrank.merge(model)
    assert [n for n, _ in model.named_modules()] == modules
    assert all(p is q for p, q in zip(model.parameters(), weights, strict=True))


def test_merge_and_unload_unties_a_tied_head(generator):
    model, ids = tiny_llama(), words(generator)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    lowrank.inject(model, LoRAConfig(target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        want, embedding = model(ids).logits, model.model.embed_tokens.weight.clone()
        lowrank.merge_and_unload(model)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize(
    "act",
    [
        lambda m: lowrank.set_adapter(m, "c"),
        lambda m: lowrank.set_adapter(m, ["a", "c"]),
        lambda m: lowrank.delete_adapter(m, "c"),
        lambda m: lowrank.scale_adapter(m, "c", 2.0),
        lambda m: lowrank.merge(m, ["c"]),
        lambda m: lowrank.merge(m, dtype=torch.int8),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"]), adapter="a"),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"]), adapter="x.y"),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"], bias="all"), adapter="d"),
    ],
)
def test_wrong_requests_change_nothing(act):
    model = two_adapters(bias="lora_only")
    before = state(model)
    with pytest.raises(LowrankError) as caught:
        act(model)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_merged_models_refuse_edits():
    model = two_adapters()
    lowrank.merge(model)
    before = state(model)
    for act in (
        lambda: lowrank.set_adapter(model, "b"),
        lambda: lowrank.delete_adapter(model, "b"),
        lambda: lowrank.scale_adapter(model, "a", 2.0),
        lambda: lowrank.merge(model),
        lambda: lowrank.quantize(model),
        lambda: lowrank.inject(model, LoRAConfig(target_modules=["o_proj"]), adapter="c"),
    ):
        with pytest.raises(ConfigError, match="unmerge first"):
            act()
        assert_unchanged(model, before)


def test_merge_without_adapters():
    with pytest.raises(TargetError, match="inject or load one first"):
        lowrank.merge(tiny_llama())


def test_inference_mode_freezes():
    model = lowrank.inject(
        tiny_llama(), LoRAConfig(target_modules=["q_proj"], bias="all", inference_mode=True)
    )
    assert not any(p.requires_grad for p in model.parameters())


def test_injecting_again_leaves_what_trains():
    model = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=["q_proj"]))
    model.model.embed_tokens.weight.requires_grad_(True)
    lowrank.inject(model, LoRAConfig(target_modules=["q_proj", "k_proj"]), adapter="b")
    assert model.model.embed_tokens.weight.requires_grad
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".b." in n)


def test_quantize_replaces_linears_in_place(generator):
    model, ids = tiny_llama(), words(generator)
    dense = copy.deepcopy(model)
    assert lowrank.quantize(model, "nf4", double_quant=False) is model
    assert lora_names(model, QuantLinear) == {
        n for n in lora_names(dense, nn.Linear) if n != "lm_head"
    }
    storage = model.model.layers[0].mlp.up_proj.storage
    assert storage.options["double_quant"] is False
    for name in lora_names(model, QuantLinear):
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_quantize_under_adapters_and_with_skip():
    model = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=["q_proj"]))
    lowrank.quantize(model, skip=["lm_head", "layers.0.mlp.up_proj", "k_proj"])
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, QuantLinear)
    assert type(model.model.layers[0].self_attn.q_proj.lora_A["default"]) is nn.Linear
    kept = {n for n in lora_names(model, nn.Linear) if "lora_" not in n}
    assert kept == {"lm_head", "model.layers.0.mlp.up_proj"} | {
        f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_refuses_a_bad_weight_by_name(bad):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    modules = [n for n, _ in model.named_modules()]
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.down_proj"):
        lowrank.quantize(model)
    assert [n for n, _ in model.named_modules()] == modules and not lora_names(model, QuantLinear)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantizer": "nf5"}, "nf5"),
        ({"skip": ["lm_had"]}, "lm_head"),
        ({"skip": [r"model", "lm_head", "layers", "q_proj"]}, "skip"),
        ({"quantizer": lowrank.quant.get("nf4"), "double_quant": True}, "double_quant"),
    ],
)
def test_quantize_refuses_wrong_requests(options, match):
    model = tiny_llama()
    if "layers" in options.get("skip", ()):
        options = {
            "skip": [
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "lm_head",
            ]
        }
    with pytest.raises(LowrankError, match=match):
        lowrank.quantize(model, **options)
    assert not lora_names(model, QuantLinear)


def test_quantize_refuses_a_tied_head_that_is_not_skipped():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="lm_head.*skip"):
        lowrank.quantize(model, skip=[])
