"""Adapters go to the hub and come back, through a local server that answers as it does."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank.errors import ConfigError, FileFormatError
from tests.adapters.oracle import peft, quiet, tiny_llama
from tests.io.adapters import adapted

pytest.importorskip("huggingface_hub", reason="the client: pip install huggingface_hub")

PUSH = """
import copy, torch, lowrank
model = lowrank.load_model({base!r})
config = lowrank.LoRAConfig(r=4, init_lora_weights=False, trainable_token_indices=[3])
lowrank.inject(model, config)
print(lowrank.push_adapter(model, "org/new", private=True, message="First"))
print(lowrank.push_adapter(model, "org/new"))
again = lowrank.load_model({base!r})
lowrank.load_adapter(again, "org/new")
ids = torch.arange(20)[None]
print(torch.equal(model(ids), again(ids)))
for options in ({{"token": "wrong"}}, {{"revision": "v9"}}):
    try:
        lowrank.push_adapter(model, "org/new", **options)
    except lowrank.errors.ConfigError as error:
        print(error)
"""


def test_an_adapter_goes_there_and_back(hub, tmp_path):
    run, root, asked = hub
    tiny_llama().save_pretrained(tmp_path / "base")
    environment = {"HF_TOKEN": "key", "HF_HUB_DISABLE_XET": "1"}
    said = run(PUSH.format(base=str(tmp_path / "base")), **environment)
    assert said[0] == said[1] and "/org/new/commit/" in said[0]
    assert said[2] == "True"
    assert "org/new: the hub refuses: " in said[3] and "pass token=" in said[3]
    assert said[4] == "org/new: no revision 'v9'; make that branch first"
    assert len(said) == 5
    assert asked[0] == "CREATE new private" and "COMMIT new: First" in asked
    assert "COMMIT new: Add adapter" in asked
    assert {line for line in asked if line.startswith("lfsFile")} == {
        "lfsFile new/adapter_model.safetensors"
    }
    files = {path.name for path in (root / "org" / "new").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    with quiet():  # what lies there is what PEFT reads
        peft.PeftModel.from_pretrained(tiny_llama(), str(root / "org" / "new"))


SUBFOLDER = """
import torch, lowrank
model = lowrank.load_model({base!r})
lowrank.load_adapter(model, "org/several", subfolder="second", token="key")
print(float(model(torch.arange(20)[None]).double().abs().sum()))
"""


def test_one_of_several(hub, tmp_path, generator):
    run, root, asked = hub
    base, ids = tiny_llama(), torch.arange(20)[None]
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, adapter="second", target_modules=["q_proj"])
    folder = root / "org" / "several"
    lowrank.save_adapter(model, folder, adapter="second")
    (said,) = run(SUBFOLDER.format(base=str(tmp_path / "base")))
    expected = model(ids).logits.double().abs().sum().item()
    assert float(said) == pytest.approx(expected, rel=1e-4)
    assert "GET several/second/adapter_config.json" in asked

    here = lowrank.load_adapter(tiny_llama(), folder, subfolder="second")
    there = lowrank.load_adapter(tiny_llama(), folder / "second")
    assert here.state_dict().keys() == there.state_dict().keys()
    with pytest.raises(FileFormatError, match="in its folders second: pass one of them as subf"):
        lowrank.load_adapter(tiny_llama(), folder)


def test_what_is_no_repository():
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="form owner/name; got 'adapter'"):
        lowrank.push_adapter(model, "adapter")
