"""A token through all blocks in one call: what the blocks give one by one, whatever they become."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import lowrank
from lowrank import LoRAConfig
from lowrank.models.at_once import AtOnce
from lowrank.models.cache import KVCache
from lowrank.models.decoder import Decoder
from lowrank.ops import whole_blocks
from tests.models.families import FAMILIES, WINDOW, pair, targets
from tests.models.helpers import tokens as random_tokens
from tests.ops.isas import needs_library

pytest.importorskip("transformers", reason="makes the models; pip install transformers")
pytestmark = needs_library
# they have layer norms, no gate, or experts: their blocks run one by one
OTHERS = ("gpt2", "gpt_neox", "phi", "mixtral", "qwen3_moe")
KERNELS = [name for name in FAMILIES if not name.startswith(OTHERS) or name.startswith("phi3")]


def tokens(B: int, S: int) -> torch.Tensor:
    return random_tokens(B, S, 97)


class Alone(AtOnce):
    """Leaves every block to itself: what `AtOnce` is held against."""

    def run(self, *given: object) -> None:
        return None


@pytest.fixture
def quantized(tmp_path):
    """A random model of a family in NF4, biases and norms of any numbers."""

    def make(name: str, *, adapter: bool = False, **options) -> Decoder:
        model = pair(name, tmp_path, **{"quantizer": "nf4", **options})[0].eval()
        if adapter:
            config = LoRAConfig(r=4, init_lora_weights=False, **targets(model))
            model = lowrank.inject(model, config)
        return model.eval()

    return make


def one_by_one(model: Decoder) -> Decoder:
    other = copy.deepcopy(model)
    other.at_once = Alone()
    return other


@torch.inference_mode()
def written(model: Decoder, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all positions but the first two, given one after another."""
    B, S = ids.shape
    dtype = model.body.norm.weight.dtype
    cache, logits = KVCache(model.config, B, S, dtype=dtype), []
    model(ids[:, :2], None if mask is None else mask[:, :2], cache=cache)
    for t in range(2, S):
        seen = None if mask is None else mask[:, : t + 1]
        logits.append(model(ids[:, t : t + 1], seen, cache=cache))
    return torch.cat(logits, dim=1)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """As many as there were calls of the kernel for whole blocks."""
    made, run = [], whole_blocks.run

    def counted(blocks, *given):
        made.append(len(blocks))
        return run(blocks, *given)

    monkeypatch.setattr(whole_blocks, "run", counted)
    return made


def assert_same(model: Decoder, ids: torch.Tensor, mask=None, tolerance: float = 1e-4) -> None:
    got, wanted = written(model, ids, mask), written(one_by_one(model), ids, mask)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_every_family_past_its_window(quantized, name, adapter, calls):
    model, S = quantized(name, adapter=adapter), WINDOW + 7
    assert_same(model, tokens(1, S))
    assert calls == [len(model.body.blocks)] * (S - 2)
    mask = torch.ones(3, S, dtype=torch.long)
    mask[0, :1] = mask[2, :9] = 0  # what a row's first token stands behind
    assert_same(model, tokens(3, S), mask)
    assert len(calls) == 2 * (S - 2)


@pytest.mark.parametrize("name", ["gpt2", "phi", "mixtral"])
def test_blocks_that_are_not_the_kernels_run_one_by_one(quantized, name, calls):
    assert_same(quantized(name), tokens(2, 5))
    assert not calls


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(quantized, name, dtype, calls):
    model = quantized(name, dtype=dtype)
    ids = tokens(2, 9)
    got = written(model, ids).float()
    wanted = written(one_by_one(model), ids).float()
    assert calls
    # one rounding of 8 or 11 bits, in another place in each of three blocks
    error = (got - wanted).norm() / wanted.norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("rows, at_once", [(16, True), (17, False)])
def test_as_many_rows_as_the_kernel_takes(quantized, rows, at_once, calls):
    assert_same(quantized("llama"), tokens(rows, 4))
    assert bool(calls) == at_once


def test_dense_and_other_schemes_run_one_by_one(quantized, calls):
    assert_same(quantized("llama", quantizer=None), tokens(1, 5))
    assert_same(quantized("llama", quantizer="int8"), tokens(1, 5))
    assert not calls


def test_whatever_changes_is_seen(quantized, calls):
    model = quantized("qwen3", adapter=True)
    ids, block = tokens(1, 6), model.body.blocks[1]

    def seen() -> bool:
        calls.clear()
        assert_same(model, ids)
        return bool(calls)

    assert seen()
    lowrank.scale_adapter(model, "default", 3.0)
    assert seen()
    with torch.no_grad():
        block.mlp.down.lora_B["default"].weight.add_(1)
        block.attention_norm.weight = nn.Parameter(block.attention_norm.weight * 2)
    block.attention.q_norm.eps = 0.1
    block.attention.scale = 0.7
    assert seen()
    block.mlp.gate.base_layer = lowrank.QuantLinear.from_linear(nn.Linear(48, 80), "fp4")
    assert seen()
    with lowrank.disable_adapters(model):
        assert not seen()
    config = LoRAConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    lowrank.inject(model, config, adapter="other")
    lowrank.set_adapter(model, "other")
    seen()
    lowrank.set_adapter(model, "default")
    assert seen()
    lowrank.merge(model)
    seen()
    lowrank.unmerge(model)
    block.mlp.up_proj = nn.Linear(48, 80)
    assert not seen()


@torch.inference_mode()
def test_a_hook_that_comes_while_writing_is_called(quantized, calls):
    model = quantized("llama", adapter=True)
    block = model.body.blocks[2]
    ids, cache, hooked = tokens(1, 1), KVCache(model.config, 1, 40), []
    places = (block, block.attention, block.mlp, block.mlp_norm, block.attention.out,
              block.mlp.down.base_layer)  # fmt: skip
    for module in places:
        calls.clear()
        model(ids, cache=cache)
        assert calls == [3]
        handle = module.register_forward_hook(lambda *given: hooked.append(given[0]))
        model(ids, cache=cache)
        model(ids, cache=cache)
        assert hooked[-2:] == [module] * 2
        assert calls == [3]
        handle.remove()
        model(ids, cache=cache)
        assert calls == [3] * 2
    handle = register_module_forward_hook(lambda *given: hooked.append(given[0]))
    model(ids, cache=cache)
    handle.remove()
    assert block.mlp in hooked
    assert calls == [3] * 2


@torch.inference_mode()
def test_what_has_to_be_seen_is_seen(quantized, calls):
    model = quantized("llama")
    ids, cache = tokens(2, 1), KVCache(model.config, 2, 9)
    wanted = model(ids, cache=cache)
    assert len(calls) == 1
    for around in (
        lowrank.ops.use_backend("reference"),
        torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile(),
    ):
        with around:
            model(ids, cache=cache)
    assert len(calls) == 1
    other = pickle.loads(pickle.dumps(model))
    cache = KVCache(model.config, 2, 9)
    torch.testing.assert_close(other(ids, cache=cache), wanted)
    assert len(calls) == 2


@torch.inference_mode()
def test_positions_that_are_kept_twice(quantized):
    model = quantized("llama")
    ids, keep = tokens(2, 1), torch.tensor([0, 0, 0])
    once = model(ids, cache=KVCache(model.config, 2, 4))
    kept = model(ids, logits_to_keep=keep, cache=KVCache(model.config, 2, 4))
    torch.testing.assert_close(kept, once.expand(2, 3, -1))


def test_gradients_run_one_by_one(quantized, calls):
    model = quantized("llama", adapter=True)
    model(tokens(1, 1), cache=KVCache(model.config, 1, 4)).sum().backward()
    assert not calls
    assert model.body.blocks[0].mlp.down.lora_B["default"].weight.grad is not None
