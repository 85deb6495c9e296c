"""Methods beside LoRA and DoRA: LoRA-FA, VeRA, and one of a stranger's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear, adapters
from lowrank.errors import ConfigError, FileFormatError
from tests.adapters.oracle import peft, quiet
from tests.io.adapters import shake

K, N = 24, 40


def square() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("base_model.model.")] = parameter.grad
    return found


def test_lora_fa_trains_b_alone_and_is_saved_as_lora(tmp_path):
    base, x = square(), torch.randn(5, K)
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False}
    model = lowrank.inject(copy.deepcopy(base), LoRAConfig(method="lora_fa", **options))
    same = lowrank.inject(copy.deepcopy(base), LoRAConfig(**options))
    same.load_state_dict(model.state_dict())
    got, want = gradients(model, x), gradients(same, x)
    assert {name for name in got if "lora" in name} == {
        f"{i}.lora_B.default.weight" for i in (0, 2)
    }
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])
    lowrank.save_adapter(model, tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    lowrank.load_adapter(model, tmp_path)  # its own file, into itself
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(x), model(x))


def test_lora_fa_learns_on_an_embedding_too():
    model = nn.Sequential(nn.Embedding(9, K))
    lowrank.inject(model, LoRAConfig(method="lora_fa", r=4, target_modules=["0"]))
    ids = torch.randint(9, (5,))
    before = model(ids)
    assert torch.equal(before, model[0].base_layer(ids))
    model(ids).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, _ in trained] == ["0.lora_B.default.weight"]
    assert trained[0][1].grad.abs().max() > 0


def test_vera_is_pefts():
    base, x = square(), torch.randn(5, K)
    config = LoRAConfig(method="vera", r=6, lora_alpha=6, target_modules=["0", "2"])
    model = lowrank.inject(copy.deepcopy(base), config)
    torch.testing.assert_close(model(x), base(x))
    shake(model)
    with quiet():
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.VeraConfig(r=6, target_modules=["0", "2"])
        )
    shared = adapters.get("vera").shared(K, K, 6, torch.device("cpu"))
    with torch.no_grad():
        theirs.base_model.vera_A["default"].copy_(shared["vera_A"])
        theirs.base_model.vera_B["default"].copy_(shared["vera_B"])
        ours = dict(model.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("base_model.model.") + ".weight"
                parameter.copy_(ours[name])
    got, want = gradients(model, x), gradients(theirs, x)
    want = {f"{n}.weight" if "lambda" in n else n: value for n, value in want.items()}
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_vera_shares_what_is_not_trained(tmp_path, quantizer):
    config = LoRAConfig(method="vera", r=64, lora_alpha=64, target_modules=["0", "2"])
    base = square()
    model = lowrank.inject(copy.deepcopy(base), config, quantizer=quantizer)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (64 + K)
    shared = adapters.get("vera").shared
    before = [t.data_ptr() for t in shared(K, K, 64, torch.device("cpu")).values()]
    assert before == [t.data_ptr() for t in shared(K, K, 64, torch.device("cpu")).values()]
    shake(model)
    x = torch.randn(3, K)
    lowrank.save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 2 * (64 + K) + 1000
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path, quantizer=quantizer)
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x.double()), model(x).double(), rtol=1e-4, atol=1e-4)
    y = model(x)
    torch.testing.assert_close(lowrank.merge_and_unload(model)(x), y, rtol=1e-4, atol=1e-5)


def test_peft_refuses_what_is_no_lora(tmp_path):
    base = square()
    model = lowrank.inject(copy.deepcopy(base), LoRAConfig(method="vera", target_modules=["0"]))
    lowrank.save_adapter(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] != "LORA" and content["method"] == "vera"
    with quiet(), pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    content["method"] = "unheard"
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match="method: expected one of .*lora.*got 'unheard'"):
        lowrank.load_adapter(base, tmp_path)


def test_what_is_no_method_is_refused():
    with pytest.raises(ConfigError, match="expected a class with shapes, init_ and factors"):
        adapters.register("nothing")(nn.Linear)
    with pytest.raises(ConfigError, match="method 'lora' is registered, by .*another name"):
        adapters.register("lora")(adapters.lora_fa.LoRAFA)
    with pytest.raises(ConfigError, match="method: expected one of dora, .*vera; got 'verb'"):
        LoRAConfig(method="verb")
    for method in ("vera", "lora_fa"):
        with pytest.raises(ConfigError, match=f"use_dora: .*method='{method}'"):
            LoRAConfig(method=method, use_dora=True)


def test_a_method_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "other_method.py").write_text(
        "from lowrank.adapters.lora import LoRA\n\n\nclass Mine(LoRA):\n    pass\n"
    )
    info = tmp_path / "other_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other_method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lowrank.methods]\nothers-lora = other_method:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert LoRAConfig(method="others-lora").method == "others-lora"
    assert "others-lora" in adapters.names()


def test_a_method_may_have_any_rank_within():
    @adapters.register("test-doubled")
    class Doubled(adapters.lora.LoRA):
        """ΔW = s·[B, B] [A; A]."""

        def factors(self, tensors):
            A, B = tensors["lora_A"], tensors["lora_B"]
            return torch.cat([A, A]), torch.cat([B, B], dim=1)

    config = LoRAConfig(method="test-doubled", r=3, lora_alpha=3, init_lora_weights=False)
    layer, x = LoRALinear(K, N, config=config), torch.randn(5, K)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * x @ A.T @ B.T)
