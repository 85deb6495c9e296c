"""Weights replaced in place: as a fresh load gives, and without compiling again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import FileFormatError, TargetError
from tests.adapters.oracle import peft_model, quiet, tiny_llama, words
from tests.surgery.models import refused

ALL = ["q_proj", "v_proj", "up_proj"]


def saved(base: nn.Module, path, **options):
    """The directory of a random adapter, as PEFT writes it."""
    theirs = peft_model(base, **{"target_modules": ALL, "init_lora_weights": False, **options})
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape))
    with quiet():
        theirs.save_pretrained(path)
    return path


def slot(base: nn.Module, **options) -> nn.Module:
    config = {"r": 8, "target_modules": ALL, "init_lora_weights": False, "lora_alpha": 3}
    return lowrank.inject(copy.deepcopy(base), LoRAConfig(**{**config, **options}))


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {"r": 8}, {"r": 3, "lora_alpha": 5}, {"r": 2, "use_rslora": True},
    {"r": 4, "target_modules": ["v_proj"]}, {"r": 2, "rank_pattern": {"up_proj": 7}},
    {"r": 3, "alpha_pattern": {"q_proj": 1}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("use_dora", [False, True])
def test_it_is_what_loading_afresh_gives(tmp_path, generator, options, use_dora):
    base, ids = tiny_llama(), words(generator)
    path = saved(base, tmp_path / "new", use_dora=use_dora, **options)
    model = slot(base, use_dora=use_dora)
    tensors = {name: p.data_ptr() for name, p in model.named_parameters()}
    for _ in range(2):
        lowrank.hotswap_adapter(model, path)
    fresh = lowrank.load_adapter(copy.deepcopy(base), path)
    torch.testing.assert_close(model(ids).logits, fresh(ids).logits, rtol=1e-5, atol=1e-5)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == tensors
    lowrank.scale_adapter(model, "default", 0.5)
    lowrank.scale_adapter(fresh, "default", 0.5)
    torch.testing.assert_close(model(ids).logits, fresh(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_is_compiled_again(tmp_path, generator):
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = copy.deepcopy(base)
    lowrank.inject(model, LoRAConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled, x = torch.compile(model, backend=counter), torch.randn(3, 6, generator=generator)
    compiled(x)
    for i, (r, alpha, targets) in enumerate(
        [(4, 8, ["0", "2"]), (1, 3, ["0", "2"]), (2, 5, ["2"])]
    ):
        other = copy.deepcopy(base)
        config = LoRAConfig(r=r, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        lowrank.inject(other, config)
        lowrank.hotswap_adapter(model, lowrank.save_adapter(other, tmp_path / str(i)))
        torch.testing.assert_close(compiled(x), other(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("options", "words"), [
    ({"r": 9}, "rank 9 there, and place for at most 8"),
    ({"use_dora": True}, "method is 'dora' there, 'lora' here"),
    ({"target_modules": ["q_proj", "k_proj"]}, "no place for .*k_proj"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
], ids=str)  # fmt: skip
def test_refusals_leave_the_model_as_it_was(tmp_path, options, words):
    base = tiny_llama()
    path, model = saved(base, tmp_path / "new", **options), slot(base)
    with refused(model, FileFormatError, words):
        lowrank.hotswap_adapter(model, path)


def test_unknown_names_and_other_models(tmp_path):
    base = tiny_llama()
    path, model = saved(base, tmp_path / "new"), slot(base)
    with pytest.raises(TargetError, match="'b'"):
        lowrank.hotswap_adapter(model, path, "b")
    wide = nn.Sequential(nn.Linear(6, 8))
    lowrank.inject(wide, LoRAConfig(target_modules=["0"]))
    with pytest.raises(FileFormatError, match="no place for"):
        lowrank.hotswap_adapter(wide, path)
