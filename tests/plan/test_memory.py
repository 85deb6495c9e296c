"""Whole plans: parameters, components, optimizers, devices."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lowrank
from lowrank import quant
from lowrank.cli.demo import TINY
from lowrank.errors import ConfigError, LowrankError
from lowrank.plan import plan_memory
from lowrank.plan.optimizers import KINDS, optimizer_state
from lowrank.train import TrainConfig
from lowrank.train.optimizer import OPTIMIZERS
from tests.io.conftest import hub as hub
from tests.plan.test_step import config

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
QLORA = lowrank.LoRAConfig(r=16, target_modules="all-linear")


def test_parameters_of_a_model_that_is_public():
    """8,030,261,248 as its card says; NF4 with double quantization is 4.13 bits a weight."""
    plan = plan_memory(LLAMA3_8B, QLORA, quantizer="nf4", dtype=torch.bfloat16, max_length=64)
    linear = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert plan.parameters == 8_030_261_248 + plan.trainable
    assert plan.trainable == 41_943_040
    assert plan.components["packed weights"] == linear // 2
    bits = 8 * (linear // 2 + plan.components["scales"]) / linear
    assert 4.12 < bits < 4.15
    assert plan.components["embeddings"] == 128256 * 4096 * 2
    assert plan.components["adapters"] == 4 * plan.trainable
    assert plan.components["optimizer"] == 8 * plan.trainable
    assert plan.peak == sum(plan.components.values()) > plan.loading


def test_full_training_holds_four_times_the_parameters():
    plan = plan_memory(LLAMA3_8B, per_device_train_batch_size=1, max_length=2)
    for name in ("gradients", "dense weights"):
        assert plan.components[name] > 0.8 * 4 * plan.parameters
    assert plan.components["optimizer"] == 8 * plan.parameters
    assert plan.trainable == plan.parameters


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_of_the_optimizer(optim, dtype, tmp_path):
    parameters = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((70, 96), (4096, 3), (7,))]
    config = TrainConfig(output_dir=tmp_path, optim=optim)
    optimizer = OPTIMIZERS[optim]([{"params": parameters}], config)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    held = sum(t.nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor))
    assert optimizer_state(optim, parameters).device == held


def test_every_optimizer_is_known():
    assert KINDS.keys() == OPTIMIZERS.keys()
    assert {name for name, kind in KINDS.items() if kind.paged} == {
        name for name in OPTIMIZERS if name.startswith("paged")
    }


def test_a_budget_leaves_the_rest_elsewhere():
    free = plan_memory(config(), optim="paged_adamw_8bit", max_length=16)
    assert free.elsewhere == 0
    budget = free.components["optimizer"] // 2
    tight = plan_memory(config(), optim="paged_adamw_8bit", device_budget=1 << 18, max_length=16)
    assert tight.components["optimizer"] <= max(budget, 1 << 18)
    assert tight.elsewhere + tight.components["optimizer"] >= free.components["optimizer"]


def test_devices_share_all_but_activations():
    one = plan_memory(LLAMA3_8B, QLORA, quantizer="nf4", max_length=64)
    four = plan_memory(LLAMA3_8B, QLORA, quantizer="nf4", max_length=64, devices=4)
    for name in ("packed weights", "scales", "embeddings", "adapters", "optimizer"):
        assert four.components[name] == pytest.approx(one.components[name] / 4, abs=1)
    assert four.components["activations"] == one.components["activations"]
    # whole on each are two blocks, and what is outside of blocks: the table and the head
    more = four.components["workspace"] - one.components["workspace"]
    assert more > one.components["embeddings"] + one.components["packed weights"] / 32


def test_more_of_anything_takes_more():
    def peak(**changes) -> int:
        return plan_memory(LLAMA3_8B, QLORA, quantizer="nf4", **changes).peak

    base = peak()
    assert peak(per_device_train_batch_size=9) > base < peak(max_length=1025)
    assert peak(gradient_checkpointing=True) < peak(gradient_checkpointing="selective") < base
    assert base < peak(gradient_accumulation_steps=2)
    assert peak(embeddings=True) < base and peak(dtype=torch.bfloat16) < base


def test_every_method_and_scheme_can_be_planned():
    small = config(layers=1)
    starts = [{"init_lora_weights": start} for start in ("pissa", "olora", "eva")]
    for changes in [*({"method": name} for name in lowrank.adapters.names()), *starts]:
        lora = lowrank.LoRAConfig(r=4, target_modules="all-linear", **changes)
        assert plan_memory(small, lora, max_length=16).trainable > 0
    for scheme in set(lowrank.quant.names()) - {"none", "codebook", "affine"}:
        plan = plan_memory(small, QLORA, quantizer=scheme, max_length=16)
        assert plan.components["packed weights"] > plan.components["scales"] > 0, scheme


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": "adam"}, "optim: expected one of adamw_torch"),
        ({"device_budget": 1 << 20}, "device_budget: belongs to a paged"),
        ({"device": "tpu"}, "device: expected cpu or cuda"),
        ({"gradient_checkpointing": "full"}, "gradient_checkpointing: expected"),
        ({"max_length": 1}, "max_length: expected at least 2"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"devices": 0}, "devices"),
        ({"dtype": torch.int8}, "dtype"),
        ({"quantizer": "nf5"}, "nf5"),
        ({"embeddings": True}, "embeddings: belongs to a quantizer"),
    ],
)
def test_what_no_run_could_be_told(changes, words):
    with pytest.raises(LowrankError, match=words):
        plan_memory(config(), **changes)


def test_a_model_that_is_nowhere():
    with pytest.raises(ConfigError, match="no such directory, config.json"):
        plan_memory("there/is/none")
    with pytest.raises(ConfigError, match="num_attention_heads missing"):
        plan_memory({k: v for k, v in LLAMA3_8B.items() if k != "num_attention_heads"})


def test_of_a_repository_nothing_but_the_config_is_fetched(hub):
    run, root, asked = hub
    folder = root / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    script = "import lowrank; print(lowrank.plan_memory('owner/model', max_length=16).parameters)"
    assert run(script) == ["8030261248"]
    assert asked and all("config.json" in path for path in asked)


@pytest.mark.parametrize(
    ("quantizer", "format", "embeddings"),
    [("nf4", "bitsandbytes", False), ("int4", "lowrank", False), ("nf4", "lowrank", True)],
)
def test_a_directory_that_is_quantized_is_planned_as_it_is(quantizer, format, embeddings, tmp_path):
    scheme = quant.get(quantizer, block_size=32)
    made = lowrank.load_model(
        TINY, scheme, embeddings=embeddings, skip=["lm_head", "0.mlp.up_proj"]
    )
    lowrank.save_model(made, tmp_path / "quantized", format=format)
    held = sum(p.nbytes for p in made.parameters())
    plan = plan_memory(tmp_path / "quantized", QLORA, max_length=32)
    model = ("packed weights", "scales", "dense weights", "embeddings")
    kept = sum(plan.components[name] for name in model)
    # a config.json of bitsandbytes has no block size
    assert held == kept if format == "lowrank" else abs(held - kept) < 0.03 * held
    with pytest.raises(ConfigError, match="quantizer: expected that of the model, .*; got none"):
        hub = json.loads((tmp_path / "quantized" / "config.json").read_text())
        hub["quantization_config"] = {"quant_method": "lowrank", "version": 1}
        plan_memory(hub, QLORA)


def test_examples_are_cut_at_the_positions_of_the_model():
    short = {**LLAMA3_8B, "max_position_embeddings": 64}
    plans = [plan_memory(short, QLORA, max_length=n) for n in (64, 4096)]
    assert plans[0].components == plans[1].components
    assert plans[1].settings.max_length == 64
    sizes = {k: n for k, n in LLAMA3_8B.items() if k.startswith("num_") or k.endswith("_size")}
    assert plan_memory(sizes, QLORA, max_length=4096).settings.max_length == 4096
