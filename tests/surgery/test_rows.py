"""Batches whose rows have different adapters, against PEFT and against a row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError, ShapeError, TargetError
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, words
from tests.surgery.models import Mixed

ROWS = ["first", None, "second", "first", "__base__", "third"]


def three(**options) -> nn.Module:
    """A Llama with adapters of different ranks, scales and layers, in evaluation."""
    model = tiny_llama()
    for adapter, config in {
        "first": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
        "second": {"r": 5, "lora_alpha": 3, "target_modules": ["v_proj", "up_proj"]},
        "third": {"r": 1, "target_modules": ["down_proj"]},
    }.items():
        config = LoRAConfig(init_lora_weights=False, **config, **options)
        lowrank.inject(model, config, adapter=adapter)
    return model


def one_at_a_time(model: nn.Module, ids: torch.Tensor, rows: list[str | None]) -> torch.Tensor:
    """What adapter_rows is to equal: the batch under each adapter, and of it the rows."""
    active = lowrank.surgery.targets.adapted_layers(model)
    before = list(dict.fromkeys(a for layer in active.values() for a in layer.active_adapters))
    whole = {}
    for adapter in dict.fromkeys(rows):
        if adapter in (None, "__base__"):
            with lowrank.disable_adapters(model):
                whole[adapter] = model(ids).logits
        else:
            lowrank.set_adapter(model, adapter)
            whole[adapter] = model(ids).logits
    lowrank.set_adapter(model, before)
    return torch.stack([whole[adapter][i] for i, adapter in enumerate(rows)])


@torch.no_grad()
def test_rows_equal_peft(generator):
    base, ids = tiny_llama(), words(generator, batch=5)
    config = {"init_lora_weights": False, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 5}
    theirs = peft_model(base, "first", r=3, **config)
    with quiet():
        theirs.add_adapter("second", peft.LoraConfig(r=4, **config))
    model = base
    lowrank.inject(model, LoRAConfig(r=3, **config), adapter="first")
    lowrank.inject(model, LoRAConfig(r=4, **config), adapter="second")
    model.load_state_dict(theirs.base_model.model.state_dict())
    rows = ["second", "first", "__base__", "first", "second"]
    with lowrank.adapter_rows(model, rows):
        logits = model(ids).logits
    expected = theirs.eval()(ids, adapter_names=rows).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def row_by_row(model: nn.Module, ids: torch.Tensor, rows: list[str | None]) -> torch.Tensor:
    found = []
    for row, adapter in zip(ids, rows, strict=True):
        with lowrank.adapter_rows(model, [adapter]):
            y = model(row[None])
            found.append((y if isinstance(y, torch.Tensor) else y.logits)[0])
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("quantizer", [None, "nf4", "int8"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"method": "vera"}], ids=str)
def test_rows_equal_one_at_a_time(generator, options, quantizer):
    model, ids = three(**options), words(generator, batch=len(ROWS))
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "vera" in name:
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    if quantizer is not None:
        lowrank.quantize(model, quantizer)
    lowrank.scale_adapter(model, "second", 1.7)
    expected = one_at_a_time(model, ids, ROWS)
    plain = model(ids).logits
    with lowrank.adapter_rows(model, ROWS):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        with lowrank.adapter_rows(model, ["third", None]):  # nests
            two = model(ids[:2]).logits
        torch.testing.assert_close(two, row_by_row(model, ids[:2], ["third", None]))
        with lowrank.disable_adapters(model):
            base = model(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids).logits, plain) and not torch.equal(base, plain)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_gradients_go_to_each_rows_adapter(generator, options):
    model, ids = three(**options), words(generator, batch=len(ROWS))
    model.double()
    lowrank.set_adapter(model, ["first", "second", "third"])
    weigh = torch.randn(len(ROWS), 1, 1, generator=generator)
    with lowrank.adapter_rows(model, ROWS):
        (model(ids).logits * weigh).square().sum().backward()
    ours = gradients(model)
    for i, adapter in enumerate(ROWS):
        if adapter not in (None, "__base__"):
            lowrank.set_adapter(model, adapter)
            (model(ids[i : i + 1]).logits * weigh[i]).square().sum().backward()
    lowrank.set_adapter(model, ["first", "second", "third"])
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)
        assert gradient.abs().sum() > 0, name


def test_rows_without_an_adapter_leave_it_without_gradient(generator):
    model, ids = three(), words(generator, batch=2)
    lowrank.set_adapter(model, ["first", "second"])
    with lowrank.adapter_rows(model, ["first", None]):
        model(ids).logits.sum().backward()
    layer = model.model.layers[0].self_attn.v_proj
    assert layer.lora_A["first"].weight.grad is not None
    assert layer.lora_A["second"].weight.grad is None


def test_different_dropouts_in_a_batch(generator):
    model = nn.Sequential(nn.Linear(16, 12))
    for adapter, p in (("first", 0.0), ("second", 0.5), ("third", 0.5)):
        config = LoRAConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_dropout=p)
        lowrank.inject(model, config, adapter=adapter)
    x = torch.ones(4000, 1, 16)
    rows = ["first", "second", "third", None] * 1000
    with torch.no_grad(), lowrank.adapter_rows(model, rows):
        model.eval()
        expected = model(x)[:4]
        y = model.train()(x).view(1000, 4, 12)
    assert torch.equal(y[:, 0], y[:1, 0].expand(1000, 12))  # drops nothing
    assert (y[:, 1:3].std(0) > 0).all() and torch.equal(y[0, 3], expected[3, 0])
    error = (y.mean(0) - expected[:, 0]).abs()
    assert (error <= 6 * y.std(0) / 1000**0.5 + 1e-4).all()


@torch.no_grad()
def test_other_kinds_of_layers(generator):
    model, ids = Mixed(), torch.randint(11, (4, 7), generator=generator)
    for adapter, targets in (("first", ["table", "conv", "linear"]), ("second", ["conv"])):
        config = LoRAConfig(r=2, target_modules=targets, init_lora_weights=False)
        lowrank.inject(model, config, adapter=adapter)
    rows = ["second", "first", None, "first"]
    expected = row_by_row(model, ids, rows)
    with lowrank.adapter_rows(model, rows):
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    lowrank.set_adapter(model, "second")
    torch.testing.assert_close(model(ids[:1])[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_the_backward_pass_within(generator, reentrant):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    for adapter in ("first", "second"):
        config = LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        lowrank.inject(model, config, adapter=adapter)
    lowrank.set_adapter(model, ["first", "second"])
    x = torch.randn(3, 5, 6, generator=generator).requires_grad_()
    rows = ["second", None, "first"]
    with lowrank.adapter_rows(model, rows):
        model(x).square().sum().backward()
        plain = gradients(model)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, plain[name])
        if not reentrant:
            loss = checkpoint(model, x, use_reentrant=False).square().sum()
    if not reentrant:
        with pytest.raises(CheckpointError):  # computed again with other adapters: not silently
            loss.backward()


@torch.no_grad()
def test_compiled_once_for_every_choice_of_lengths(generator):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    for adapter in ("first", "second"):
        config = LoRAConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        lowrank.inject(model, config, adapter=adapter)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 7, 9):
        x = torch.randn(3, length, 6, generator=generator)
        with lowrank.adapter_rows(model, ["second", None, "first"]):
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("rows", "error", "words"), [
    (["first", "x"], TargetError, "'x'"),
    ("first", ConfigError, "for each row"),
    ([], ConfigError, "for each row"),
], ids=str)  # fmt: skip
def test_refusals(rows, error, words):
    model = three()
    with pytest.raises(error, match=words), lowrank.adapter_rows(model, rows):
        pass
    assert all(layer.rows is None for layer in model.modules() if hasattr(layer, "rows"))


def test_a_first_dimension_that_is_no_batch(generator):
    model, ids = three(), words(generator, batch=3)
    with (
        lowrank.adapter_rows(model, ["first", None]),
        pytest.raises(ShapeError, match=r"expected x \[2, ...\].* got \[3, 7, 24\]"),
    ):
        model(ids)
    with torch.no_grad():
        model(ids)


def test_merged_and_replaced_modules_are_refused():
    model = three()
    lowrank.merge(model)
    with (
        pytest.raises(ConfigError, match="unmerge first"),
        lowrank.adapter_rows(model, ["first"]),
    ):
        pass
    model = tiny_llama()
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lowrank.inject(model, config, adapter="whole")
    with (
        pytest.raises(TargetError, match="lm_head .* one adapter for all rows"),
        lowrank.adapter_rows(model, ["whole"]),
    ):
        pass
    with pytest.raises(ConfigError, match="lm_head is replaced"):
        lowrank.combine_adapters(model, ["whole"], [1.0], "copy")


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_copies_of_a_packed_batch_equal_each_adapter_alone(generator, options, quantizer):
    """Loss and every gradient of Decoder.loss, whose layers see other shapes than the batch's."""
    config = DecoderConfig(61, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
    model = Decoder(config)
    if quantizer is not None:
        model = lowrank.quantize(model, quantizer)
    targets = {
        "one": ["q_proj", "v_proj", "embed_tokens"], "two": "all-linear", "three": ["down_proj"]
    }  # fmt: skip
    for r, (name, modules) in enumerate(targets.items(), 2):
        lora = LoRAConfig(r=r, target_modules=modules, init_lora_weights=False, **options)
        lowrank.inject(model, lora, adapter=name)
    lengths = [7, 1, 5, 9]
    ids = torch.randint(61, (1, sum(lengths)), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    labels[0, 3] = ids[0, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    losses, gradients = [], {}
    for name in targets:
        lowrank.set_adapter(model, name)
        losses.append(model.loss(ids, labels, positions))
        losses[-1].backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradients[key], parameter.grad = parameter.grad, None

    lowrank.set_adapter(model, list(targets))
    with lowrank.adapter_copies(model, list(targets)):
        repeated = [t.repeat(len(targets), 1) for t in (ids, labels, positions)]
        together = model.loss(*repeated, copies=len(targets))
        together.sum().backward()
        with pytest.raises(ShapeError, match=r"as many rows for each of 3 adapters; got \[2, 22\]"):
            model.loss(*(t[:2] for t in repeated))
    torch.testing.assert_close(together, torch.stack(losses))
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
