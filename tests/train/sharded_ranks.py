"""Runs of processes that each have a part of the model: cases for test_sharded.py.

python -m tests.train.sharded_ranks FOLDER SEED RANK SIZE CASE ...
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank.cli.demo import TINY
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.optim import AdamW8bit, Lion8bit, PagedAdamW8bit
from lowrank.optim.shards import cut, local, put, whole
from lowrank.train import TrainConfig, shard

from . import ranks
from .ranks import CONSTANT, Case, rows, train
from .test_decoder_training import SHAPE

# no count of rows is even, and no row ends with a block of 64
ODD = {**SHAPE, "hidden_size": 40, "intermediate_size": 93, "vocab_size": 97}


def adapted(case: Case, scheme: str = "nf4", r: int = 5, of_rank: int = 0, **options) -> nn.Module:
    torch.manual_seed(case.seed)
    config = DecoderConfig.from_hf({"model_type": "llama", **ODD})
    model = lowrank.quantize(Decoder(config), scheme, **options)
    torch.manual_seed(case.seed + of_rank)
    return lowrank.inject(model, lowrank.LoRAConfig(r=r, target_modules="all-linear"))


def sizes(model: nn.Module) -> dict[str, list[int]]:
    """Bytes of each tensor, here and of all of it, and its rows."""
    return {n: [local(p).nbytes, whole(p).nbytes, len(p)] for n, p in model.named_parameters()}


def equal(case: Case) -> dict:
    """Accumulated, clipped, evaluated; the last step of each epoch has one example."""
    model = adapted(case, of_rank=case.rank, embeddings=True, skip=())
    sent = ranks.Sent()
    with sent:
        found = train(model, case.settings(eval_steps=5), rows(case.seed), rows(case.seed + 1, 5))
    return {**found, "sizes": sizes(model), "sent": sent.bytes}


def full(case: Case) -> dict:
    """All of a dense decoder is trained, its biases too, with 8-bit moments."""
    torch.manual_seed(case.seed)
    config = {"model_type": "qwen2", **ODD, "tie_word_embeddings": True}
    model = Decoder(DecoderConfig.from_hf(config)).requires_grad_(True)
    config = case.settings(max_steps=3, optim="paged_adamw_8bit", learning_rate=1e-3)
    return train(model, config, rows(case.seed))


OPTIONS = {
    "checkpointed": {"gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": "selective", "packing": True, "max_length": 24},
    "offloaded": {"cpu_offload": True},
    "padded": {"padding_free": False},
}


def options(case: Case) -> dict:
    """A few steps with each of the options."""
    found, values = {}, {}
    for name, more in OPTIONS.items():
        if case.ranks == 1:
            more = {k: v for k, v in more.items() if k != "cpu_offload"}
        config = case.settings(name, max_steps=3, **more)
        one = train(adapted(case, "fp4", double_quant=True), config, rows(case.seed))
        found[name] = one["losses"]
        values |= {f"{name} {key}": p for key, p in one["trained"].items()}
    return {"losses": found, "trained": values}


class Largest(TorchDispatchMode):
    """The most bytes that any tensor which is made has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if type(tensor) is torch.Tensor and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


LOADED = [("nf4", False), ("nf4", True), ("int8", False), (None, False), ("fitted", False)]


def loaded(case: Case) -> dict:
    """Each process reads its own rows: the same bits as those of the whole."""
    found = []
    for scheme, embeddings in LOADED:
        options = {"quantizer": scheme, "embeddings": embeddings, "skip": ()}
        model = lowrank.load_model(TINY, sharded=True, **options)
        lowrank.inject(model, lowrank.LoRAConfig(r=3, target_modules="all-linear"))
        largest = Largest()
        sent = ranks.Sent()
        with largest, sent:
            shard(model)
        rows_of = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
        plain = lowrank.load_model(TINY, **options)
        same = [
            torch.equal(p, whole(rows_of[name])) and p.dtype == rows_of[name].dtype
            for name, p in plain.named_parameters()
        ]
        ids = torch.arange(12).view(1, 12)
        same.append(torch.equal(model(ids), plain(ids)))
        found.append([all(same), largest.bytes, sum(sent.bytes.values())])
    model = lowrank.load_model(TINY, quantizer="nf4", sharded=True)
    torch.manual_seed(case.seed + case.rank)
    lowrank.inject(model, lowrank.LoRAConfig(r=3, target_modules="all-linear"))
    trained = train(model, case.settings(max_steps=2, save_strategy="steps"), rows(case.seed))
    return {"found": found, **trained}


def refused(case: Case) -> dict:
    """Before anything is cut or sent every rank is told in what they do not agree."""
    said = []
    wrong: list[dict] = [{"r": 3}, {"quantizer": "int8"}, {"parallel": "ddp"}, {"seed": 3}]
    for own in wrong:
        own = own if case.rank else {}
        model = lowrank.load_model(TINY, quantizer=own.pop("quantizer", "nf4"), sharded=True)
        r = own.pop("r", 2)
        lowrank.inject(model, lowrank.LoRAConfig(r=r, target_modules=["q_proj"]))
        config = TrainConfig(case.folder / "run", **{"parallel": "fsdp", **own})
        said.append(ranks.error_of(partial(train, model, config, rows(case.seed))))
    return {"said": said, "wrote": (case.folder / "run").exists()}


def compiled(case: Case) -> dict:
    """Block by block; what gathers a block stays outside of its graph."""
    backend = "eager" if case.ranks > 1 else None
    config = case.settings(max_steps=2, gradient_checkpointing=True, torch_compile_backend=backend)
    return train(adapted(case), config, rows(case.seed))


def half_precision(case: Case) -> dict:
    """A policy of bfloat16 casts what is float, and no code or scale."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = adapted(case, "int8")
    names = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    plain = model(torch.arange(12).view(1, 12))
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    logits = model(torch.arange(12).view(1, 12))
    logits.float().square().mean().backward()
    after = {n: whole(p) for n, p in model.named_parameters() if n in names}
    grads = [p.grad.dtype for p in model.parameters() if p.grad is not None]
    return {
        "same": all(torch.equal(before[n], after[n]) for n in names),
        "dtype": str(logits.dtype),
        "grads": sorted({str(dtype) for dtype in grads}),
        "error": float(((logits - plain).norm() / plain.norm()).detach()),
    }


def resumed(case: Case) -> dict:
    """Six steps, and the same again from the checkpoint of step 3, in pages and 8 bits."""
    common = {"max_steps": 6, "optim": "paged_adamw_8bit", "save_steps": 3, "eval_steps": 2}
    common |= {"load_best_model_at_end": True, "cpu_offload": True}
    held_out = rows(case.seed + 1, 5)
    config = case.settings("whole", save_strategy="steps", **common)
    whole_run = train(adapted(case, r=96), config, rows(case.seed), held_out)
    config = case.settings("again", resume=case.folder / "whole" / "checkpoint-3", **common)
    again = train(adapted(case, r=96), config, rows(case.seed), held_out)
    return {
        "trained": {
            **{f"whole {name}": p for name, p in whole_run["trained"].items()},
            **{f"again {name}": p for name, p in again["trained"].items()},
        },
        "losses": [whole_run["losses"], again["losses"]],
    }


def half(case: Case) -> dict:
    """Three steps of six, for others to go on with."""
    name = f"half-{case.ranks}"
    config = case.settings(name, max_steps=3, save_strategy="steps", **CONSTANT)
    return train(adapted(case), config, rows(case.seed))


def other_half(case: Case) -> dict:
    """The rest of what one process began or, in one process, of what two began."""
    began = case.folder.parent / "half" / f"half-{3 - case.ranks}"
    config = case.settings(max_steps=6, resume=began, **CONSTANT)
    return train(adapted(case), config, rows(case.seed))


class Layers(nn.Module):
    """Matrices of 8-bit moments and of none, of rows that two cannot share, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (67, 300), (4500, 2), (1, 5000), (3, 5), (7,)
        self.parts = nn.ParameterList(torch.randn(*shape) for shape in shapes)


KINDS = {"adamw": AdamW8bit, "lion": Lion8bit, "paged": PagedAdamW8bit}


def optimizers(case: Case) -> dict:
    """Moved by the same gradients, sharded and whole: their states by one another's, too."""
    found = {}
    for name, kind in KINDS.items():
        torch.manual_seed(case.seed)
        one = Layers()
        both = shard(Layers())
        for p, q in zip(one.parameters(), both.parameters(), strict=True):
            put(p.detach(), q)
        optimizer_of = {model: kind(model.parameters(), lr=1e-2) for model in (one, both)}
        for step in range(6):
            for p, q in zip(one.parameters(), both.parameters(), strict=True):
                p.grad = torch.randn_like(p)
                q.grad = cut(p.grad, q)
            if step == 3:  # the states of each are the other's from here on
                states = {model: optimizer_of[model].state_dict() for model in (one, both)}
                optimizer_of = {model: kind(model.parameters(), lr=1e-2) for model in (one, both)}
                optimizer_of[one].load_state_dict(states[both])
                optimizer_of[both].load_state_dict(states[one])
            for optimizer in optimizer_of.values():
                optimizer.step()
        pairs = zip(one.parameters(), both.parameters(), strict=True)
        found[name] = [torch.equal(p, whole(q)) for p, q in pairs]
    return {"same": found}


CASES = equal, full, options, half_precision, resumed, half, other_half, optimizers, loaded, refused

if __name__ == "__main__":
    others = compiled, ranks.not_finite, ranks.best, ranks.stories, ranks.smollm2
    ranks.main((*CASES, *others), "fsdp", *sys.argv[1:])
