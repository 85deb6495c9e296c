"""Every family against transformers and PEFT, and its ways of computing against each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.models.cache import KVCache
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.families import FAMILIES as TABLE
from tests.models.families import FAMILIES, WINDOW, make, pair, peft_name, targets
from tests.models.helpers import tokens

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")
peft = pytest.importorskip("peft", reason="the oracle; pip install peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
S = 50  # beyond every window
TOLERANCE = dict(atol=1e-4, rtol=1e-4)
EXACT = dict(atol=1e-5, rtol=1e-5)
each_family = pytest.mark.parametrize("name", FAMILIES)


def test_every_family_of_the_table_is_tested():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(TABLE)


@pytest.mark.parametrize("model_type", TABLE)
def test_no_part_has_the_name_of_another(model_type):
    """A name of a checkpoint that is what another part does would be found instead of it."""
    names = TABLE[model_type].names
    for part, name in names.items():
        assert name == part or name not in names


@each_family
def test_logits_and_loss_equal_transformers(name, tmp_path):
    ours, oracle = pair(name, tmp_path)
    ids = tokens(2, S)
    labels = torch.where(torch.rand(2, S) < 0.5, ids, -100)
    theirs = oracle(ids, labels=labels)
    assert_close(ours(ids), theirs.logits, **TOLERANCE)
    assert_close(ours.loss(ids, labels) / (labels[:, 1:] != -100).sum(), theirs.loss, **TOLERANCE)


@each_family
def test_gradients_of_all_weights_equal_transformers(name, tmp_path):
    ours, oracle = pair(name, tmp_path)
    ids = tokens(2, S)
    (ours.loss(ids, ids) / (2 * (S - 1))).backward()
    oracle(ids, labels=ids).loss.backward()
    theirs = dict(oracle.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == theirs.keys()
    for key, parameter in found.items():
        expected, layer = theirs[key].grad, oracle.get_submodule(key.rpartition(".")[0])
        if type(layer).__name__ == "Conv1D" and expected.ndim == 2:
            expected = expected.T
        assert_close(parameter.grad, expected, **TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")


@each_family
def test_every_gradient_of_an_adapter_of_pefts_equals_pefts(name, tmp_path):
    ours, oracle = pair(name, tmp_path)
    config = peft.LoraConfig(
        r=4, **targets(ours), init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(oracle, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours.requires_grad_(False)
    lowrank.load_adapter(ours, tmp_path / "adapter", is_trainable=True)
    ids = tokens(2, S)
    (ours.loss(ids, ids) / (2 * (S - 1))).backward()
    loss = theirs(ids, labels=ids).loss
    loss.backward()
    assert_close(ours.loss(ids, ids) / (2 * (S - 1)), loss, **TOLERANCE)
    found = {peft_name(n): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    expected = {n: p.grad for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and found
    for key in found:
        assert_close(found[key], expected[key], **TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("side", ["left", "right"])
@each_family
def test_a_padded_batch_equals_its_rows_one_by_one(name, side, tmp_path):
    ours, _ = pair(name, tmp_path)
    lengths = [5, WINDOW + 7, S - 3]
    if name == "phi3-longrope":  # which turns by the longest of a batch
        lengths = [40, 37, S - 3]
    ids, mask, alone = tokens(3, S), torch.zeros(3, S, dtype=torch.long), torch.zeros(())
    for b, n in enumerate(lengths):
        mask[b, S - n if side == "left" else 0 : S if side == "left" else n] = 1
    logits = ours(ids, mask)
    labels = torch.where(mask.bool(), ids, -100)
    for b in range(3):
        row = ids[b : b + 1, mask[b].bool()]
        assert_close(logits[b, mask[b].bool()], ours(row)[0], **EXACT)
        alone = alone + ours.loss(row, row)
        labels[b, mask[b].argmax()] = -100
    assert_close(ours.loss(ids, labels, attention_mask=mask), alone, **EXACT)


@each_family
def test_packed_examples_equal_unpacked_ones(name, tmp_path):
    ours, _ = pair(name, tmp_path)
    lengths = [7, 33, 10]
    if name == "phi3-longrope":
        lengths = [40, 36, 35]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = ours(ids, position_ids=positions)
    loss = ours.loss(ids, ids, position_ids=positions)
    alone = torch.zeros(())
    for example, found in zip(ids.split(lengths, 1), logits.split(lengths, 1), strict=True):
        assert_close(found, ours(example), **EXACT)
        alone = alone + ours.loss(example, example)
    assert_close(loss, alone, **EXACT)


@pytest.mark.parametrize("steps", [[13, 1, 1, 1, 1, 1, 20, 1, 1], [40, 10]])
@pytest.mark.parametrize("padding", [0, 6])
@each_family
def test_a_cache_changes_nothing(name, steps, padding, tmp_path):
    ours, _ = pair(name, tmp_path)
    length = sum(steps)
    ids = tokens(2, length)
    mask = torch.ones(2, length, dtype=torch.long) if padding else None
    if padding:
        mask[1, :padding] = 0
    expected = ours(ids, mask)
    cache, start = KVCache(ours.config, 2, length), 0
    with torch.no_grad():
        for step in steps:
            end = start + step
            logits = ours(ids[:, start:end], None if mask is None else mask[:, :end], cache=cache)
            seen = slice(None) if mask is None else mask[:, start:end].bool()
            assert_close(logits[seen], expected[:, start:end][seen], **EXACT)
            start = end


@each_family
def test_checkpointing_changes_no_bit(name, tmp_path, seed):
    ours, _ = pair(name, tmp_path)
    ids = tokens(2, S)
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, S)
    # the input of experts is not seen; parts side by side draw random numbers in another order
    plain = ours.config.mixture is None and ours.config.family.block != "parallel"
    options = dict(r=4, lora_dropout=0.2 if plain else 0.0, init_lora_weights=False)
    lowrank.inject(ours, lowrank.LoRAConfig(**options, **targets(ours))).train()
    found = []
    for way in (False, True, "selective"):
        for options in ({}, {"position_ids": positions}):
            ours.gradient_checkpointing = way
            ours.zero_grad()
            torch.manual_seed(seed)
            ours.loss(ids, ids, **options).backward()
            found.append({n: p.grad for n, p in ours.named_parameters() if p.requires_grad})
    for again in (found[2:4], found[4:6]):
        for one, other in zip(again, found[:2], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)


@each_family
def test_quantized_as_it_loads_it_computes_with_the_dequantized_weights(name, tmp_path):
    dense, _ = pair(name, tmp_path)
    quantized = lowrank.load_model(tmp_path, "nf4")
    packed = [n for n, m in quantized.named_modules() if isinstance(m, lowrank.QuantLinear)]
    linears = [n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)]
    assert packed == [n for n in linears if n != "lm_head"]
    for layer in packed:
        weight = quantized.get_submodule(layer).dequantize(torch.float32)
        dense.get_submodule(layer).weight.data = weight
    for name, parameter in dense.named_parameters():
        if parameter.ndim == 3:  # of experts
            parameter.data = quantized.get_submodule(name).dequantize(torch.float32)
    ids = tokens(2, S)
    assert_close(quantized(ids), dense(ids), **TOLERANCE)


@each_family
def test_transformers_loads_what_is_saved(name, tmp_path):
    ours, oracle = pair(name, tmp_path / "theirs")
    lowrank.save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    assert type(again) is type(oracle)
    ids = tokens(2, S)
    assert torch.equal(again(ids).logits, oracle(ids).logits)
    assert lowrank.load_model(tmp_path / "ours").config == ours.config
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert DecoderConfig.from_hf(raw) == ours.config
    assert DecoderConfig.from_hf(again.config.to_dict()) == ours.config


@each_family
def test_it_is_built_on_meta(name, tmp_path):
    ours, _ = pair(name, tmp_path)
    with torch.device("meta"):
        model = Decoder(ours.config)
    shapes = {key: p.shape for key, p in model.named_parameters()}
    assert shapes == {key: p.shape for key, p in ours.named_parameters()}


@pytest.mark.slow
# torch's own tracing of any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_each_is_one_graph_to_the_compiler(tmp_path):
    """All in one process, where the compiler takes what differs between two for a variable."""
    torch.compiler.reset()  # as many as it takes are these, without those of other tests
    ids = tokens(2, S)
    for name in ("qwen3", "smollm3-window", "phi3", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2"):
        ours, _ = pair(name, tmp_path / name)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_close(compiled(ids), ours(ids), **EXACT)


def test_the_page_of_models_has_every_family_and_what_is_adapted_by_default():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {row[0].strip("| `"): set(re.findall(r"`(\w+)`", row[-1])) for row in rows}
    assert set(told) - {"model_type"} == set(TABLE)
    for model_type, expected in told.items():
        if model_type in TABLE:
            raw = make(model_type.removesuffix("_text")).config.to_dict()
            with torch.device("meta"):
                model = Decoder(DecoderConfig.from_hf(raw))
            lowrank.inject(model, lowrank.LoRAConfig(r=2))
            layers = [n for n, m in model.named_modules() if isinstance(m, lowrank.LoRALinear)]
            assert {name.split(".")[-1] for name in layers} == expected
