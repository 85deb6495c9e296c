"""EVA: adapters that start from what a model's layers are given, as PEFT starts them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.adapters.eva import Components, distribute
from lowrank.errors import ConfigError, DataError
from tests.adapters.oracle import peft, quiet, tiny_llama

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("sizes", [[400], [7, 1, 92, 300], [200, 200]])
def test_components_are_those_of_all_rows(sizes):
    K, R = 40, 12
    x = torch.randn(sum(sizes), K, dtype=torch.float64) * 0.8 ** torch.arange(K) + 3
    found = Components(K)
    for rows in x.split(sizes):
        found.update(rows)
    centred = x - x.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.singular_values[:R], S[:R])
    cosines = (found.vectors[:R] * Vh[:R]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(R, dtype=torch.float64), rtol=0, atol=1e-6)
    share = S.square() / centred.square().sum()
    torch.testing.assert_close(found.explained[:R], share[:R])


def test_ranks_go_to_the_largest_shares():
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.01]),
        "b": torch.tensor([0.4, 0.02]),
        "c": torch.zeros(2),
    }
    assert distribute(shares, 4) == {"a": 2, "b": 2, "c": 0}
    assert distribute(shares, 3) == {"a": 2, "b": 1, "c": 0}


def spread(model: nn.Module) -> nn.Module:
    """The embedding varies along its first directions far more than along the last."""
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        U, _, Vh = torch.linalg.svd(table, full_matrices=False)
        table.copy_(U * (10 * 0.6 ** torch.arange(table.shape[1])) @ Vh)
    return model


def batch(generator, rows=8, length=16) -> dict[str, torch.Tensor]:
    ids = torch.randint(48, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rho": 1.0},
        {"whiten": True, "use_label_mask": False},
        {"adjust_scaling_factors": False},
    ],
)
def test_it_is_pefts(generator, options):
    base, data = spread(tiny_llama()), batch(generator)
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "eva"}
    with quiet():
        settings = peft.LoraConfig(**config, eva_config=peft.EvaConfig(**options))
        theirs = peft.get_peft_model(copy.deepcopy(base), settings, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(theirs, [data], show_progress_bar=False)
    ours = lowrank.inject(copy.deepcopy(base), LoRAConfig(**config, eva_config=options))
    assert lowrank.initialize_eva(ours, [data, data]) is ours
    names = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert names == {n for n, m in ours.named_modules() if hasattr(m, "lora_A")}
    for name in names:
        a, b = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert a.r == b.r and a.scaling == pytest.approx(b.scaling)
        A, A0 = a.lora_A["default"].weight, b.lora_A["default"].weight
        similar = torch.cosine_similarity(A, A0, dim=1).abs()
        lengths = A.norm(dim=1) / A0.norm(dim=1)
        assert similar.min() > 0.98, name
        # PEFT divides by S in place, once for each layer of the same input
        if not options.get("whiten") or "mlp" in name:
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-2, atol=0)
        assert not a.lora_B["default"].weight.any()
    torch.testing.assert_close(ours(data["input_ids"]).logits, base(data["input_ids"]).logits)


def test_it_trains_saves_and_loads(tmp_path, generator):
    base, data = spread(tiny_llama()), batch(generator)
    config = LoRAConfig(r=3, target_modules=TARGETS, init_lora_weights="eva", use_dora=True)
    model = lowrank.inject(copy.deepcopy(base), config).train()
    nothing = {**data, "labels": torch.full_like(data["labels"], -100)}  # no token counts
    lowrank.initialize_eva(model, [nothing, data])
    assert model.training and all(m.training for m in model.modules())
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_magnitude_vector"}
    loss = model(data["input_ids"]).logits.square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    model.eval()
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path)
    ids = data["input_ids"]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_changes_nothing(generator):
    config = LoRAConfig(r=3, target_modules=TARGETS, init_lora_weights="eva")
    model = lowrank.inject(tiny_llama(), config)
    before = copy.deepcopy(model.state_dict())

    def fails(model, batch):
        raise RuntimeError("of the model's own")

    for error, batches, forward in (
        (DataError, [], None),
        (DataError, None, None),
        (RuntimeError, [torch.zeros(1, 2, dtype=torch.long)], fails),
    ):
        options = {} if forward is None else {"forward": forward}
        with pytest.raises(error):
            lowrank.initialize_eva(model, batches, **options)
        now = model.state_dict()
        assert now.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in now.items())
    plain = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match='init_lora_weights: expected "eva"'):
        lowrank.initialize_eva(plain, [batch(generator)])
    lowrank.merge(model)
    with pytest.raises(ConfigError, match="merged"):
        lowrank.initialize_eva(model, [batch(generator)])


@pytest.mark.parametrize(
    "options", [{"rho": 0.5}, {"tau": 2.0}, {"whiten": 2}, {"rho": "2"}, {"rha": 2}, 3]
)
def test_wrong_options(options):
    with pytest.raises(ConfigError):
        LoRAConfig(init_lora_weights="eva", eva_config=options)
    with pytest.raises(ConfigError, match="eva_config"):
        LoRAConfig(eva_config={"rho": 2.0})
