"""Blocks that come to the device when they compute: the same numbers within a budget of bytes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, TrainingError
from lowrank.models import placement
from lowrank.models.generate import generate_ids
from lowrank.optim import streams
from tests.models.helpers import llama, tokens
from tests.optim.gpu_on_cpu import Machine

pytest.importorskip("transformers", reason="writes the checkpoints; pip install transformers")
LAYERS = 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama(num_hidden_layers=LAYERS, attention_bias=True).save_pretrained(folder)
    return folder


def sizes(model):
    """(bytes of one block, of all the rest)"""
    whole, block = (sum(p.nbytes for p in m.parameters()) for m in (model, model.model.layers[0]))
    return block, whole - LAYERS * block


def budget_for(model, resident):
    """What lets `resident` blocks stay and two of the others come."""
    block, rest = sizes(model)
    return rest + (resident + 2) * block


def pair(directory, quantizer, resident):
    whole = lowrank.load_model(directory, quantizer)
    budget = budget_for(whole, resident)
    return whole, lowrank.load_model(directory, quantizer, weights_budget=budget)


@pytest.mark.parametrize("quantizer", [None, "nf4", "int8"])
@pytest.mark.parametrize("resident", [0, 2])
def test_the_same_logits_and_words(directory, quantizer, resident):
    whole, model = pair(directory, quantizer, resident)
    block, _ = sizes(whole)
    assert len(model.placement.away) == LAYERS - resident
    ids = tokens(2, 12)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert torch.equal(model(ids), whole(ids))
    prompts = [[5, 6, 7], [1, 2]]
    texts = [generate_ids(m, prompts, max_new_tokens=8) for m in (whole, model)]
    assert texts[0] == texts[1]
    assert model.placement.peak_bytes == 2 * block
    for name, tensor in whole.state_dict().items():  # and they can be read at any time
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_the_same_gradients(directory, quantizer, checkpointing):
    models = pair(directory, quantizer, 1)
    block, _ = sizes(models[0])
    ids, gradients = tokens(2, 12), []
    state = None
    for model in models:
        lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules="all-linear"))
        state = state or [torch.randn_like(p) for p in model.parameters() if p.requires_grad]
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter, value in zip(trained.values(), state, strict=True):
                parameter.copy_(0.2 * value)
        model.gradient_checkpointing = checkpointing
        for _ in range(2):  # the second adds to the first
            loss = model.loss(ids, ids)
            loss.backward()
        gradients.append({n: p.grad for n, p in trained.items()} | {"loss": loss.detach()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, atol=0, rtol=0, msg=name)
    assert models[1].placement.peak_bytes == 2 * block


def test_a_graph_keeps_no_weights(directory):
    """What is noted for the backward has the bytes of two blocks, where it had those of all."""
    ids, noted = tokens(2, 12), []
    models = pair(directory, None, 0)
    for model in models:
        lowrank.inject(model, lowrank.LoRAConfig(r=4))
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(ids, ids)
        noted.append(sum(storage.nbytes() for storage in storages.values()))
        del loss
    block, _ = sizes(lowrank.unload(models[0]))
    assert noted[0] - noted[1] > 0.95 * (LAYERS - 2) * block


def test_in_streams_nothing_is_read_before_it_is_there(directory, monkeypatch):
    """On a GPU that is none, whose streams keep only who has to come before whom."""
    machine = Machine()
    machine.install(monkeypatch)
    whole = lowrank.load_model(directory)
    monkeypatch.setattr(placement, "streams_of", streams.Streams)
    model = lowrank.load_model(directory, weights_budget=budget_for(whole, 1))
    lowrank.inject(model, lowrank.LoRAConfig(r=4))
    ids = tokens(1, 4)
    with machine:
        model.loss(ids, ids).backward()
        with torch.no_grad():
            model(ids)
            model(ids)
    assert machine.races == [] and len(machine.seen) > 1


def test_what_cannot_be_is_refused(directory):
    whole = lowrank.load_model(directory)
    least = budget_for(whole, 0)
    with pytest.raises(ConfigError, match=f"weights_budget: expected at least {least} bytes"):
        lowrank.load_model(directory, weights_budget=least - 1)
    everything = sum(p.nbytes for p in whole.parameters())
    assert lowrank.load_model(directory, weights_budget=everything).placement is None
    with pytest.raises(ConfigError, match="sharded: expected no weights_budget beside it"):
        lowrank.load_model("nobody/fetches-this", weights_budget=least, sharded=True)
    model = lowrank.load_model(directory, weights_budget=least)
    model.requires_grad_(True)
    with pytest.raises(TrainingError, match="weights that train have to stay on the device"):
        model(tokens(1, 3))
