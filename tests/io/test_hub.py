"""Loading by a hub id, from a local server that answers as the hub's file endpoints do."""

import json

import pytest
import torch

import lowrank
from tests.io.adapters import shake
from tests.models.helpers import llama
from tests.models.test_tokenizer import write_tokenizer

pytest.importorskip("transformers", reason="writes the checkpoints; pip install transformers")


LOAD = """
import torch, lowrank
model = lowrank.load_model("org/{name}", quantizer="nf4", revision="v1")
tokenizer = lowrank.load_tokenizer("org/{name}", revision="v1")
print(model.name_or_path)
print(float(model(torch.arange(20)[None]).double().abs().sum()))
print(tokenizer.encode("def f(x): return x"))
"""


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_hub_id_loads_what_its_directory_loads(hub, shard):
    run, root, asked = hub
    folder = root / "org" / "small"
    llama().save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    for stray in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "model.onnx"):
        (folder / stray).write_bytes(b"large")
    first = run(LOAD.format(name="small"))
    assert first[0] == "org/small"
    fetched = {line.split("/", 1)[1] for line in asked if line.startswith("GET")}
    weights = {path.name for path in folder.glob("model*.safetensors*")}
    texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    optional = {"chat_template.jinja", "special_tokens_map.json"}
    assert weights | texts <= fetched <= weights | texts | optional

    asked.clear()
    assert run(LOAD.format(name="small"), HF_HUB_OFFLINE="1") == first
    assert asked == []
    local = LOAD.replace("org/{name}", str(folder)).replace(', revision="v1"', "")
    assert run(local)[1:] == first[1:]


OVER_QUANTIZED = """
import torch, lowrank
model = lowrank.load_model("org/nf4")
lowrank.load_adapter(model, "org/adapter", revision="v1")
print(float(model(torch.arange(20)[None]).double().abs().sum()))
"""


def test_an_adapter_over_a_quantized_model(hub):
    run, root, asked = hub
    llama().save_pretrained(root / "org" / "dense")
    model = lowrank.load_model(root / "org" / "dense", "nf4")
    lowrank.save_model(model, root / "org" / "nf4", format="lowrank", max_shard_bytes=50_000)
    lowrank.inject(model, lowrank.LoRAConfig(r=4))
    shake(model)
    lowrank.save_adapter(model, root / "org" / "adapter")
    (root / "org" / "adapter" / "adapter_model.bin").write_bytes(b"pickle")
    (said,) = run(OVER_QUANTIZED)
    expected = model(torch.arange(20)[None]).double().abs().sum().item()
    assert abs(float(said) - expected) < 1e-4 * expected
    fetched = {line for line in asked if line.startswith("GET adapter/")}
    assert fetched == {
        "GET adapter/adapter_config.json",
        "GET adapter/adapter_model.safetensors",
    }


ERRORS = """
import json, torch, lowrank
for call in json.loads({calls!r}):
    try:
        if "adapter" in call:
            lowrank.load_adapter(torch.nn.Linear(4, 4), call["adapter"])
        lowrank.load_model(call.pop("source"), **call)
        print("loaded")
    except lowrank.errors.LowrankError as error:
        print(type(error).__name__, error)
"""


def test_what_the_hub_refuses_is_said_in_one_line(hub):
    run, root, _ = hub
    llama().save_pretrained(root / "org" / "gated")
    (root / "org" / "empty").mkdir()
    (root / "org" / "old").mkdir()
    (root / "org" / "old" / "config.json").write_bytes(
        (root / "org" / "gated" / "config.json").read_bytes()
    )
    bare = root / "org" / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((root / "org" / "old" / "config.json").read_bytes())
    (root / "org" / "old" / "pytorch_model.bin").write_bytes(b"pickle")
    expected = [
        ({"source": "a--b/c"}, "ConfigError a--b/c: no name of a hub repository"),
        ({"source": "org/absent"}, "ConfigError org/absent: no such repository on the hub"),
        ({"source": "org/gated"}, "ConfigError org/gated: access must be granted first"),
        ({"source": "org/gated", "token": "key"}, "loaded"),
        ({"source": "org/gated", "token": "key", "revision": "v9"}, "no revision 'v9'"),
        ({"source": "org/empty"}, "FileFormatError org/empty: the repository has no config.json"),
        ({"source": "org/old"}, "FileFormatError org/old/pytorch_model.bin: pickled weights"),
        ({"adapter": "org/absent"}, "ConfigError org/absent: no such repository on the hub"),
        ({"adapter": "org/old"}, "FileFormatError org/old: the repository has no adapter_config"),
        ({"source": "org/bare"}, "FileFormatError org/bare: expected model.safetensors or"),
    ]
    lines = run(ERRORS.format(calls=json.dumps([call for call, _ in expected])))
    assert len(lines) == len(expected)
    for line, (_, says) in zip(lines, expected, strict=True):
        assert says in line


HURRY = "import time; time.sleep = lambda _: None\n"  # huggingface_hub waits between its trials


def test_a_hub_that_is_away_or_breaks_off(hub):
    run, root, _ = hub
    for name in ("ill", "breaks", "whole"):
        llama().save_pretrained(root / "org" / name)
    calls = json.dumps([{"source": "org/ill"}, {"source": "org/breaks"}])
    ill, breaks = run(HURRY + ERRORS.format(calls=calls))
    assert "org/ill: config.json is not in the cache, and the hub cannot be reached (" in ill
    assert "500" in ill
    assert "org/breaks: config.json cannot be fetched: " in breaks and "try again" in breaks
    script = HURRY + ERRORS.format(calls='[{"source": "org/whole"}]')
    (line,) = run(script, HF_HUB_OFFLINE="1")
    assert "org/whole: config.json is not in the cache, and the hub is not asked" in line
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # discard: nobody answers
    (line,) = run(script, **away)
    assert "config.json is not in the cache, and the hub cannot be reached" in line
    assert run(script) == ["loaded"]
    assert run(script, **away) == run(script, HF_HUB_OFFLINE="1") == ["loaded"]


AS_SOURCE = """
import torch, lowrank
model = lowrank.load_model("org/adapter", "nf4", revision="v1")
print(model.name_or_path, lowrank.load_tokenizer("org/adapter").encode("return"))
print(float(model(torch.arange(20)[None]).double().abs().sum()))
"""


def test_an_adapters_repository_brings_its_base(hub):
    run, root, asked = hub
    llama().save_pretrained(root / "org" / "base")
    write_tokenizer(root / "org" / "base")
    model = lowrank.load_model(root / "org" / "base", "nf4")
    model.name_or_path = "org/base"
    lowrank.inject(model, lowrank.LoRAConfig(r=4))
    shake(model)
    lowrank.save_adapter(model, root / "org" / "adapter")
    first = run(AS_SOURCE)
    assert first[0].startswith("org/base [")
    expected = model(torch.arange(20)[None]).double().abs().sum().item()
    assert abs(float(first[1]) - expected) < 1e-4 * expected
    asked.clear()
    assert run(AS_SOURCE, HF_HUB_OFFLINE="1") == first
    assert asked == []
