"""LoRAConfig: PEFT's names and defaults, and every wrong value refused in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lowrank import LoRAConfig
from lowrank.errors import ConfigError

from .oracle import peft


def test_defaults_are_pefts():
    theirs = peft.LoraConfig()
    for field in dataclasses.fields(LoRAConfig):
        if field.name in ("method", "target_rows"):  # a class and a flag for each, and nothing
            continue
        assert getattr(LoRAConfig(), field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    "options",
    [
        {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj", "bias": "lora_only", "use_rslora": True},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {r"layers\.0\..*": 5.5},
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "someone/something",
            "exclude_modules": ["lm_head"],
        },
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"},
        {
            "target_modules": ["q_proj"],
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 5},
        },
    ],
)
def test_the_file_is_pefts_dump(tmp_path, options):
    theirs = peft.LoraConfig(**{k: v for k, v in options.items() if "loftq" not in f"{k}{v}"})
    if options.get("init_lora_weights") == "loftq":  # with which theirs asks for scipy at once
        theirs.init_lora_weights, theirs.loftq_config = "loftq", options["loftq_config"]
    theirs.inference_mode = True  # as save_pretrained of a model writes it
    theirs.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    expected = json.loads(text)
    if isinstance(expected["target_modules"], list):
        expected["target_modules"] = options["target_modules"]  # a set of theirs has no order
    if peft.__version__ != expected["peft_version"] or peft.__version__ != "0.21.2":
        pytest.skip("the keys written are those of peft 0.21.2: pip install peft==0.21.2")
    ours = LoRAConfig(**options).to_peft()
    assert ours == expected
    assert json.dumps(ours, indent=2, sort_keys=True) == json.dumps(
        expected, indent=2, sort_keys=True
    )
    assert LoRAConfig.from_peft(ours) == LoRAConfig(**options)


def test_reads_old_and_future_files():
    old = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert LoRAConfig.from_peft(old) == LoRAConfig(r=4, lora_alpha=16, target_modules=["q_proj"])
    assert LoRAConfig.from_peft({**old, "a_key_of_2031": {"x": 1}}).r == 4
    # initialisations that leave the base alone are, once trained, plain LoRA
    assert LoRAConfig.from_peft({**old, "init_lora_weights": "eva"}).init_lora_weights is True


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"lora_bias": True},
        {"init_lora_weights": "corda"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"r": "8"},
        {"target_modules": {"q_proj": 1}},
    ],
)
def test_refuses_files_that_mean_something_else(change):
    with pytest.raises(ConfigError, match=next(iter(change))) as caught:
        LoRAConfig.from_peft({"peft_type": "LORA", "r": 4, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 2.0),
        ("r", True),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 0),
        ("alpha_pattern", {"q_proj": 0.0}),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", None),
        ("bias", "some"),
        ("bias", None),
        ("use_rslora", 1),
        ("use_dora", 1),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "pissa_niter_"),
        ("init_lora_weights", "pissa_niter_x"),
        ("loftq_config", {"loftq_iter": 2}),  # no method to which it belongs
        ("loftq_config", 4),
        ("init_lora_weights", None),
        ("init_lora_weights", 1),
        ("target_modules", []),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", [""]),
        ("target_modules", ""),
        ("target_modules", "(q_proj"),
        ("target_modules", 7),
        ("exclude_modules", [None]),
        ("exclude_modules", "*"),
        ("modules_to_save", [3]),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(?i)q_proj": 4}),  # a regex alone, but not as part of the whole name's
        ("rank_pattern", {"q_proj": 10**30}),
        ("target_modules", [["q_proj"]]),
        ("base_model_name_or_path", 5),
        ("revision", ["main"]),
        ("rank_pattern", {3: 4}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("layers_to_transform", -1),
        ("layers_to_transform", []),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", "layers"),
        ("task_type", "GUESSING"),
        ("inference_mode", "no"),
    ],
)
def test_refuses_wrong_values(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        LoRAConfig(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [{"loftq_bit": 4}, {"loftq_iter": 0}, {"loftq_iter": 2.0}, {"loftq_bits": True}, None]
)
def test_refuses_wrong_loftq_configs(value):
    with pytest.raises(ConfigError, match="loftq_") as caught:
        LoRAConfig(init_lora_weights="loftq", loftq_config=value)
    assert "\n" not in str(caught.value)


def test_takes_pefts_loftq_config():
    theirs = peft.LoftQConfig(loftq_iter=3)
    expected = {"loftq_bits": 4, "loftq_iter": 3}
    for given in (theirs, {"loftq_iter": 3}):
        config = LoRAConfig(init_lora_weights="loftq", loftq_config=given)
        assert config.loftq_config == expected
    # in a file it may be left over: PEFT's example of LoftQ sets the other to True before saving
    left = {"peft_type": "LORA", "init_lora_weights": True, "loftq_config": expected}
    assert LoRAConfig.from_peft(left) == LoRAConfig()


def test_layers_to_transform_wants_names():
    with pytest.raises(ConfigError, match="layers_to_transform"):
        LoRAConfig(target_modules=".*q_proj", layers_to_transform=[0])


def test_takes_pefts_task_type_and_sets():
    config = LoRAConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules={"q_proj"})
    assert config.task_type == "CAUSAL_LM" and type(config.task_type) is str
    assert config.target_modules == ["q_proj"]


def test_takes_the_rest_of_pefts_fields_at_their_defaults():
    theirs = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    given = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
    given["fan_in_fan_out"] = True  # as tutorials of GPT-2 have it
    config = LoRAConfig(**given)
    assert config == LoRAConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    assert dataclasses.replace(config, r=2).r == 2


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("lora_alfa", 16, "did you mean 'lora_alpha'"),
        ("rank", 16, "no such field; did you mean 'rank_pattern'"),
        ("target_module", ["q_proj"], "did you mean 'target_modules'"),
        ("wholly_other", 1, "expected one of r, lora_alpha"),
        ("layer_replication", [[0, 2]], "is not supported, expected None"),
        ("peft_type", "IA3", "expected 'LORA'"),
    ],
)
def test_refuses_unknown_fields(field, value, says):
    with pytest.raises(ConfigError, match=f"{field}.*{says}") as caught:
        LoRAConfig(r=4, **{field: value})
    assert "\n" not in str(caught.value)
