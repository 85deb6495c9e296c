"""What adapters cost beside their arithmetic: in inject, forward, merge, load and switch.

A Llama of 32 blocks and hidden size 64, so that the arithmetic is next to nothing, with adapters of
rank 16 on its 224 linear layers. lowrank and peft take turns on copies of one model.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lowrank
from benchmarks import peers
from benchmarks.errors import MissingInputError
from benchmarks.harness import spread
from benchmarks.settings import OURS, Settings

BLOCKS, ADAPTERS, REPEATS, ROUNDS = 32, 30, 7, 60
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
PEER = "peft"


def run(settings: Settings) -> list[dict]:
    """A case for each thing done. Raises MissingInputError without transformers."""
    if peers.missing("transformers") is not None:
        raise MissingInputError("transformers is not installed: pip install transformers")
    base, with_peer = tiny_llama(BLOCKS), PEER in settings.against
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers, of names that the other will drop
        rows = _once(base, with_peer) + _load(base, with_peer)
        for tokens in (1, 16):
            rows += _forward(base, with_peer, tokens)
    return rows


def tiny_llama(blocks: int) -> nn.Module:
    """A Llama with random weights: hidden 64, four heads, intermediate 176."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _sides(with_peer: bool) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """How each puts its adapter into a model."""
    sides: dict[str, Callable] = {OURS: lambda m: lowrank.inject(m, lowrank.LoRAConfig(**OPTIONS))}
    if with_peer:
        import peft

        sides[PEER] = lambda m: peft.get_peft_model(m, peft.LoraConfig(**OPTIONS))
    return sides


def _once(base: nn.Module, with_peer: bool) -> list[dict]:
    times: dict[str, dict[str, list[float]]] = {"inject": {}, "merge_and_unload": {}}
    for turn in range(REPEATS + 1):
        for side, inject in _sides(with_peer).items():
            model = copy.deepcopy(base)
            took, adapted = _timed(lambda inject=inject, model=model: inject(model))
            if side == OURS:
                merging, _ = _timed(lambda adapted=adapted: lowrank.merge_and_unload(adapted))
            else:
                merging, _ = _timed(adapted.merge_and_unload)
            if turn:  # the first one imports, and fills caches
                times["inject"].setdefault(side, []).append(took)
                times["merge_and_unload"].setdefault(side, []).append(merging)
    return [row for case, sides in times.items() for row in rows_of(case, sides)]


def _load(base: nn.Module, with_peer: bool) -> list[dict]:
    """The first adapter is not counted: it wraps the layers, which `inject` measures."""
    cases = [
        f"{what}, the {n}" for what in ("load_adapter", "set_adapter") for n in ("2nd", "last")
    ]
    times: dict[str, dict[str, list[float]]] = {case: {} for case in cases}
    with tempfile.TemporaryDirectory() as name:
        lowrank.save_adapter(_sides(False)[OURS](copy.deepcopy(base)), name)
        for side in _sides(with_peer):
            load, switch = _doors(side, copy.deepcopy(base), Path(name))
            loading, switching = [], []
            for i in range(1, ADAPTERS + 1):
                loading.append(_timed(lambda i=i, load=load: load(f"n{i}"))[0])
                switching.append(_timed(lambda i=i, switch=switch: switch(f"n{i}"))[0])
            for what, taken in (("load_adapter", loading), ("set_adapter", switching)):
                times[f"{what}, the 2nd"][side] = taken[:3]
                times[f"{what}, the last"][side] = taken[-3:]
    return [row for case, sides in times.items() for row in rows_of(case, sides)]


def _doors(side: str, model: nn.Module, directory: Path) -> tuple[Callable, Callable]:
    """load(name) and switch(name) of a model that has a first adapter."""
    if side == OURS:
        lowrank.load_adapter(model, directory, adapter="n0")
        return (
            lambda name: lowrank.load_adapter(model, directory, adapter=name),
            lambda name: lowrank.set_adapter(model, name),
        )
    import peft

    adapted = peft.PeftModel.from_pretrained(model, directory, adapter_name="n0")
    return (lambda name: adapted.load_adapter(directory, name)), adapted.set_adapter


@torch.no_grad()
def _forward(base: nn.Module, with_peer: bool, tokens: int) -> list[dict]:
    models = {
        side: inject(copy.deepcopy(base)).eval() for side, inject in _sides(with_peer).items()
    }
    if with_peer:
        models[PEER] = models[PEER].base_model.model  # what it wraps the model in is not counted
    layers = BLOCKS * len(TARGETS)
    ids = torch.randint(256, (1, tokens))
    times: dict[str, list[float]] = {side: [] for side in models}
    for turn in range(ROUNDS + 5):
        bare, _ = _timed(lambda: base(ids), collect=False)
        for side, model in models.items():
            took, _ = _timed(lambda model=model: model(ids), collect=False)
            if turn >= 5:
                times[side].append((took - bare) / layers)
    return rows_of(f"forward of {tokens} tokens, beyond the bare model, a layer", times)


def _timed(call: Callable, collect: bool = True) -> tuple[float, nn.Module]:
    if collect:
        gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def rows_of(case: str, times: dict[str, list[float]]) -> list[dict]:
    """A row a side, with its speed against ours."""
    ours = statistics.median(times[OURS])
    return [
        {
            "benchmark": "adapters",
            "case": case,
            "contender": side,
            "path": "",
            **spread(taken),
            "baseline": OURS,
            "speed": ours / statistics.median(taken),
        }
        for side, taken in times.items()
    ]
