"""The decoder against transformers, and its several ways of computing against each other."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lowrank.errors import ConfigError, ShapeError
from lowrank.models.cache import KVCache
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from tests.models.helpers import TINY, llama, tokens

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")

SMALL = dict(hidden_size=48, intermediate_size=123, num_hidden_layers=3)
VARIANTS = {
    "grouped": dict(num_attention_heads=6, num_key_value_heads=2),
    "plain": dict(num_attention_heads=4, num_key_value_heads=4, rope_theta=500000.0),
    "tied": dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True),
    "biased": dict(
        num_attention_heads=4, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "wide_head": dict(num_attention_heads=3, num_key_value_heads=1, head_dim=22),
    "linear_rope": dict(
        num_attention_heads=4, num_key_value_heads=2, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "llama3_rope": dict(
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "dynamic_rope": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    ),
    "yarn_rope": dict(
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 8.0,
        },
    ),
}


def pair(variant: str) -> tuple[Decoder, torch.nn.Module]:
    """Our decoder and transformers' with the same random weights."""
    oracle = llama(**SMALL, **VARIANTS[variant])
    ours = Decoder(DecoderConfig.from_hf(oracle.config.to_dict()))
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_equal_transformers(variant):
    ours, oracle = pair(variant)
    ids = tokens(2, 123)
    labels = torch.where(torch.rand(2, 123) < 0.5, ids, -100)
    assert_close(ours(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)

    count = (labels[:, 1:] != -100).sum()
    loss = ours.loss(ids, labels) / count
    expected = oracle(ids, labels=labels).loss
    assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    expected.backward()
    theirs = dict(oracle.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(theirs)
    for name, parameter in ours.named_parameters():
        assert_close(
            parameter.grad,
            theirs[name].grad,
            atol=1e-4,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_frozen_head_gives_the_same_gradients():
    ours, oracle = pair("grouped")
    ours.requires_grad_(False)
    ours.model.layers.requires_grad_(True)
    ids = tokens(3, 63)
    loss = ours.loss(ids, ids)
    loss.backward()
    (oracle(ids, labels=ids).loss * (3 * 62)).backward()
    assert loss.dtype == torch.float32
    theirs = dict(oracle.model.layers.named_parameters())
    for name, parameter in ours.model.layers.named_parameters():
        scale = theirs[name].grad.abs().max().item()
        assert_close(parameter.grad, theirs[name].grad, atol=1e-4 * max(1, scale), rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_batch_equals_its_rows_one_by_one(side):
    ours, oracle = pair("grouped")
    lengths, S = [5, 40, 63], 70
    ids, mask = tokens(3, S), torch.zeros(3, S, dtype=torch.long)
    spans = []
    for b, n in enumerate(lengths):
        start = {"left": S - n, "right": 0, "both": (S - n) // 2}[side]
        spans.append(slice(start, start + n))
        mask[b, spans[-1]] = 1
    logits = ours(ids, mask)
    expected = oracle(ids, attention_mask=mask).logits
    for b, span in enumerate(spans):
        assert_close(logits[b, span], ours(ids[b : b + 1, span])[0], atol=1e-5, rtol=1e-5)
        assert_close(logits[b, span], expected[b, span], atol=1e-4, rtol=1e-4)
    labels = torch.where(mask.bool(), ids, -100)
    alone = sum(
        ours.loss(ids[b : b + 1, span], ids[b : b + 1, span]) for b, span in enumerate(spans)
    )
    for b, span in enumerate(spans):
        labels[b, span.start] = -100
    assert_close(ours.loss(ids, labels, attention_mask=mask), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [[[7, 1, 30, 25]], [[63], [63]], [[20, 43], [60, 3]]])
def test_packed_examples_equal_unpacked_ones(rows):
    ours, _ = pair("grouped")
    S = sum(rows[0])
    ids = tokens(len(rows), S)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    logits = ours(ids, position_ids=positions)
    loss = ours.loss(ids, ids, position_ids=positions)
    loss.backward()
    packed_grads = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    alone = torch.zeros(())
    for b, row in enumerate(rows):
        start = 0
        for n in row:
            example = ids[b : b + 1, start : start + n]
            assert_close(logits[b, start : start + n], ours(example)[0], atol=1e-5, rtol=1e-5)
            alone = alone + ours.loss(example, example)
            start += n
    alone.backward()
    assert_close(loss, alone, atol=1e-5, rtol=1e-5)
    for name, parameter in ours.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert_close(packed_grads[name], parameter.grad, atol=1e-5 * max(1, scale), rtol=1e-5)


@pytest.mark.parametrize("steps", [[50, 1, 1, 1], [20, 13, 20], [1] * 9])
@pytest.mark.parametrize("padding", [0, 6])
def test_a_cache_changes_nothing(steps, padding):
    ours, _ = pair("grouped")
    S = sum(steps)
    ids = tokens(2, S)
    mask = torch.ones(2, S, dtype=torch.long) if padding else None
    if padding:
        mask[1, : min(padding, steps[0] - 1)] = 0
    expected = ours(ids, mask)
    cache, start = KVCache(ours.config, 2, S + 3), 0
    with torch.no_grad():
        for step in steps:
            end = start + step
            logits = ours(ids[:, start:end], None if mask is None else mask[:, :end], cache=cache)
            wanted = expected[:, start:end]
            if mask is not None:
                logits, wanted = (
                    logits[mask[:, start:end].bool()],
                    wanted[mask[:, start:end].bool()],
                )
            assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
            start = end
    assert cache.length == S


def test_logits_to_keep_selects_positions():
    ours, _ = pair("tied")
    ids = tokens(2, 20)
    full = ours(ids)
    assert_close(ours(ids, logits_to_keep=3), full[:, -3:])
    assert_close(ours(ids, logits_to_keep=0), full)
    index = torch.tensor([4, 0, 19])
    assert_close(ours(ids, logits_to_keep=index), full[:, index])


def test_gradient_checkpointing_changes_no_gradient():
    ours, _ = pair("grouped")
    ids = tokens(2, 33)
    ours.loss(ids, ids).backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing = True
    ours.loss(ids, ids).backward()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name], atol=0, rtol=0)


def test_no_label_gives_a_loss_of_zero_that_can_be_differentiated():
    ours, _ = pair("grouped")
    ids = tokens(1, 9)
    for head_trains in (True, False):
        ours.lm_head.requires_grad_(head_trains)
        loss = ours.loss(ids, torch.full_like(ids, -100))
        loss.backward()
        assert loss.item() == 0


def test_bfloat16_stays_near_transformers():
    ours, oracle = pair("grouped")
    ids = tokens(2, 40)
    expected = oracle(ids).logits
    ours_error = (ours.bfloat16()(ids) - expected).abs().mean()
    theirs_error = (oracle.bfloat16()(ids).logits - expected).abs().mean()
    assert ours_error < 1.2 * theirs_error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model_type": "mamba"},
            r"model_type: expected one of llama, .*; got 'mamba'.*lowrank.inject",
        ),
        ({"hidden_act": "swish"}, "hidden_act: expected one of silu, gelu.*; got 'swish'"),
        (
            {"num_key_value_heads": 4},
            "num_key_value_heads: expected a divisor of num_attention_heads=6; got 4",
        ),
        ({"hidden_size": None}, "hidden_size: expected a positive integer; got None"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive integer; got '64'"),
        ({"vocab_size": 10**30}, "vocab_size: expected a positive integer; got 1000"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a positive number; got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number; got nan"),
        ({"rope_theta": "x"}, "rope_theta: expected a positive number; got 'x'"),
        ({"rope_theta": [1]}, "rope_theta: expected a positive number"),
        ({"rope_scaling": 4}, "rope_scaling: expected an object or none; got 4"),
        ({"rope_scaling": {"rope_type": [1]}}, "rope_type: expected one of"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            "linear needs factor: expected a positive number; got 0",
        ),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false; got 'yes'"),
        ({"eos_token_id": {}}, "eos_token_id: expected a token id or none; got {}"),
        ({"bos_token_id": [1]}, "bos_token_id: expected a token id or none"),
        ({"head_dim": 7}, "head_dim: .* even number; got 7"),
        (
            {"rope_scaling": {"rope_type": "xpos", "factor": 2.0}},
            "rope_type: expected one of .*; got 'xpos'",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "linear needs factor: expected a positive number; got None",
        ),
    ],
)
def test_a_config_we_cannot_build_is_refused(change, says):
    raw = {**TINY, **SMALL, **VARIANTS["grouped"], "model_type": "llama", "head_dim": 8}
    with pytest.raises(ConfigError, match=says):
        DecoderConfig.from_hf({**raw, **change})


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_the_round_trip_through_both_spellings(variant):
    theirs = transformers.LlamaConfig(**{**TINY, **SMALL, **VARIANTS[variant]}, eos_token_id=[5, 7])
    config = DecoderConfig.from_hf(theirs.to_dict())
    again = transformers.LlamaConfig(**config.to_hf(torch.float32))
    assert (
        DecoderConfig.from_hf(again.to_dict())
        == config
        == DecoderConfig.from_hf(config.to_hf(torch.float32))
    )
    assert config.eos_token_ids == {5, 7}


def test_wrong_shapes_are_named():
    ours, _ = pair("grouped")
    ids = tokens(2, 10)
    with pytest.raises(ShapeError, match=r"input_ids: expected shape \[B, S\]"):
        ours(ids[0])
    with pytest.raises(ShapeError, match=r"attention_mask: expected shape \(2, 10\); got \(2, 9\)"):
        ours(ids, torch.ones(2, 9))
    with pytest.raises(ShapeError, match=r"position_ids: expected shape \(2, 10\); got \(2, 11\)"):
        ours(ids, position_ids=torch.arange(11).expand(2, 11))
    with pytest.raises(ShapeError, match=r"labels: expected shape \(2, 10\)"):
        ours.loss(ids, ids[:, :9])
    with pytest.raises(ShapeError, match="capacity 9"):
        ours(ids, cache=KVCache(ours.config, 2, 9))


# torch's own tracing of any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_forward_is_one_graph_to_the_compiler():
    ours, _ = pair("grouped")
    ids = tokens(2, 20)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    (compiled(ids) ** 2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    (ours(ids) ** 2).sum().backward()
    for name, parameter in ours.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert_close(gradients[name], parameter.grad, atol=1e-5 * max(1, scale), rtol=1e-5)


def test_building_on_meta_allocates_nothing_and_imports_no_symbolic_algebra():
    script = (
        "import sys, torch; from lowrank.models.decoder import Decoder;"
        "from lowrank.models.config import DecoderConfig;"
        "c = DecoderConfig(10**6, 4096, 11008, 32, 32, 8, 128); torch.set_default_device('meta');"
        "print(all(p.is_meta for p in Decoder(c).parameters()), 'sympy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False"]
