"""What a run is a run of: the settings, weights and data that a checkpoint goes on with, or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.data import TokenizedExamples
from lowrank.io.adapter_config import config_of
from lowrank.optim.shards import is_sharded, local, sharded, whole
from lowrank.surgery.targets import adapted_layers
from lowrank.train.config import TrainConfig
from lowrank.train.weights import trained_adapters

# What may differ when a run goes on: how far, in what batches, in how much memory, what is shown
# and kept. Everything else decides what is learned.
FREE = {
    "parallel",
    "cpu_offload",
    "ddp_timeout",
    "output_dir",
    "overwrite_output_dir",
    "resume",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "auto_find_batch_size",
    "gradient_checkpointing",
    "activation_offloading",
    "device_budget",
    "host_budget",
    "page_dir",
    "token_cache",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "disable_tqdm",
    "report_to",
    "project",
    "run_name",
}
# of an adapter's config, what says where it comes from and not what it computes
_FREE_OF_ADAPTERS = {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping"}


def outline(
    model: nn.Module,
    config: TrainConfig,
    train_data: TokenizedExamples,
    eval_data: TokenizedExamples | None,
    ranks: int = 1,
) -> dict[str, Any]:
    """All that must agree but for weights, as JSON has it: {kind: {name: value}}."""
    settings = {k: v for k, v in config.to_dict().items() if k not in FREE}
    settings["examples in a step"] = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks
    )
    found = {
        "settings": settings,
        **{f"adapter {name!r}": _adapter(model, name) for name in trained_adapters(model)},
        "trained tensors": {
            name: in_words(p) for name, p in model.named_parameters() if p.requires_grad
        },
        "data": {
            "training": train_data.fingerprint,
            "held out": None if eval_data is None else eval_data.fingerprint,
        },
    }
    return json.loads(json.dumps(found, default=sorted))  # tuples are lists and sets sorted there


def in_words(tensor: Tensor) -> str:
    """Its shape and dtype."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What of two identities is not the same, each in words."""
    defaults = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}
    found = []
    for kind in dict.fromkeys([*there, *here]):
        if kind not in there or kind not in here:
            where = "here" if kind in here else "in the checkpoint"
            found.append(f"{kind} is only {where}")
            continue
        for name in dict.fromkeys([*there[kind], *here[kind]]):
            # a setting that is newer than the checkpoint was then what it is by default
            absent = defaults.get(name) if kind == "settings" else None
            old, new = there[kind].get(name, absent), here[kind].get(name, absent)
            if old != new:
                found.append(_difference(kind, name, old, new))
    return found


def frozen_hash(model: nn.Module) -> str:
    """A hash of the parameters that no training touches, of any name, dtype and device.

    Without those of adapters that are trained in part, and without weights that an adapter has
    changed when it started (LoftQ, PiSSA, OLoRA): its file says itself which base it belongs to.
    """
    skipped = set()
    for layer in adapted_layers(model).values():
        if any(config.starts_from_weight for config in layer.config.values()):
            skipped.update(map(id, layer.unmerged_base.parameters()))
    return untrained_hash(model, skipped)


def untrained_hash(model: nn.Module, skipped: Collection[int] = ()) -> str:
    """A hash of the parameters that are neither trained, nor of an adapter that is in part, nor
    those with the ids `skipped`.
    """
    of_adapters = set().union(*trained_adapters(model).values())
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if not p.requires_grad and id(p) not in of_adapters and id(p) not in skipped:
            digest.update(f"{name} {p.dtype} {list(p.shape)}\n".encode())
            digest.update(_row_hashes(p))
    return digest.hexdigest()


def _adapter(model: nn.Module, adapter: str) -> dict[str, Any]:
    layers = {n: layer for n, layer in adapted_layers(model).items() if adapter in layer.config}
    config = config_of(model, layers, adapter).to_peft()
    return {name: value for name, value in config.items() if name not in _FREE_OF_ADAPTERS}


def _row_hashes(tensor: Tensor) -> bytes:
    """64 bits of each row of a tensor, of which this rank may have some: all of them, in order.

    Σ c_j w_j mod 2^64 over the row's words w of 64 bits, c odd and random: whoever has a row has
    its hash, and how a tensor is cut makes no difference.
    """
    own = local(tensor.detach())
    rows = own.flatten(1) if own.ndim > 1 else own.reshape(-1, 1)
    n_bytes = rows.shape[1] * rows.element_size()
    words = -(-n_bytes // 8)
    drawn = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words,), generator=drawn) * 2 + 1
    found = []
    for some in rows.split(max(1, (1 << 22) // max(1, words))):  # not all of a GPU's at once
        raw = some.cpu().contiguous().view(torch.uint8)
        raw = torch.nn.functional.pad(raw, (0, 8 * words - n_bytes))
        found.append((raw.view(torch.int64) * factors).sum(1))
    hashes = torch.cat(found)
    if is_sharded(tensor):
        hashes = whole(sharded(hashes.to(own.device), (len(tensor),), tensor)).cpu()
    return hashes.numpy().tobytes()


def _difference(kind: str, name: str, old: Any, new: Any) -> str:
    if kind == "model":
        return "the frozen weights are others: another base model, or quantized otherwise"
    if kind == "data":
        return f"the {name} data is not what it was" if old and new else f"{name} data came or went"
    of = "" if kind == "settings" else f" of {kind}"
    return f"{name}{of} was {json.dumps(old)} and is {json.dumps(new)}"
