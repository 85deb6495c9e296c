"""Two processes that share layers and decoders; test_parallel.py looks at what they found.

python -m tests.models.parallel_ranks FOLDER SEED RANK SIZE CASE ...
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank.cli.demo import TINY
from lowrank.errors import TargetError
from lowrank.io.safetensors import write_safetensors
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.parallel import tensor_parallel
from lowrank.models.placement import place
from lowrank.models.saving import save_model
from lowrank.nn.parallel import ColwiseParallel, RowwiseParallel

from .helpers import TINY as SMALL

STEPS = 20
LAYERS = {  # scheme, adapter, N, K
    "codes": ("nf4", False, 65, 256),
    "codes and adapter": ("nf4", True, 65, 256),
    "float32 scales, a table a row": ("af4", True, 66, 128),
    "dense and adapter": (None, True, 7, 38),
    "no adapter nor codes": (None, False, 8, 6),
}
STYLES = {
    "colwise": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(input_layouts=Replicate()),
}


class Sent(TorchDispatchMode):
    """Counts what goes to the other ranks, and the largest of it in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(
            ("wait", "_wrap")
        ):
            sent = args[0] if isinstance(args[0], list) else [args[0]]
            self.calls += 1
            self.largest = max(self.largest, *(t.nbytes for t in sent))
        return func(*args, **(kwargs or {}))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local_bytes(model: nn.Module) -> int:
    """What this rank holds, with whatever its tensors are views of."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(part.untyped_storage().nbytes() for part in parts)


def layer(kind: str) -> nn.Module:
    scheme, adapter, N, K = LAYERS[kind]
    made: nn.Module = nn.Linear(K, N)
    if scheme is not None:
        made = lowrank.QuantLinear.from_linear(made, lowrank.quant.get(scheme, block_size=64))
    if not adapter:
        return made
    made = lowrank.LoRALinear.wrap(made, lowrank.LoRAConfig(r=3, lora_alpha=7))
    nn.init.normal_(made.lora_B["default"].weight)
    return made


def layers(seed: int, mesh: DeviceMesh) -> tuple[dict, dict]:
    """What comes out of each kind of layer, and every gradient, whole and cut."""
    tensors, numbers = {}, {}
    for kind in LAYERS:
        for name, style in STYLES.items():
            torch.manual_seed(seed)
            alone = layer(kind)
            x = torch.randn(2, 5, LAYERS[kind][3])
            dy = torch.randn(2, 5, LAYERS[kind][2])
            cut = copy.deepcopy(alone)
            if mesh.get_local_rank() and isinstance(cut, lowrank.LoRALinear):
                nn.init.normal_(cut.lora_A["default"].weight)  # the first rank's count
            if kind == "no adapter nor codes":  # torch's own part of the style
                cut.requires_grad_(False)
                alone.requires_grad_(False)
            elif name == "colwise":
                for one in (alone, cut):
                    one.bias.requires_grad_(True)
            held = local_bytes(cut)
            parallelize_module(cut, mesh, style)
            for way, model in (("one", alone), ("two", cut)):
                into = x.clone().requires_grad_()
                y = model(into)
                y.backward(dy)
                at = f"{kind}/{name}/{way}"
                tensors |= {f"{at}/y": whole(y), f"{at}/dx": into.grad}
                for of, p in model.named_parameters():
                    if p.requires_grad:
                        tensors[f"{at}/{of}"] = whole(p.grad).contiguous()
                        if isinstance(p, DTensor):
                            assert p.grad.placements == p.placements, of
                with torch.no_grad():
                    tensors[f"{at}/a row"] = whole(model(x[:1, :1]))
                if isinstance(model, lowrank.QuantLinear):
                    tensors[f"{at}/weight"] = whole(model.dequantize())
            numbers[f"{kind}/{name}"] = [held, local_bytes(cut)]
    return tensors, numbers


def trained(
    one: nn.Module, two: nn.Module, batches: torch.Tensor, lr: float = 1e-2
) -> tuple[dict, dict]:
    """Both after a step of AdamW for each of the batches: what they then are, losses and norms."""
    tensors, numbers = {}, {}
    for way, model in (("one", one), ("two", two)):
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=lr, eps=1e-4)
        found = numbers[way] = {"losses": [], "norms": []}
        for ids in batches:
            loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
            found["losses"].append(loss.item())
            found["norms"].append(whole(norm).item())
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            if p.requires_grad:
                tensors[f"{way}/{name}"] = whole(p).contiguous()
    return tensors, numbers


def real(seed: int, mesh: DeviceMesh, path: str | Path, steps: int) -> tuple[dict, dict]:
    """A real model on Shakespeare, a token a letter."""
    torch.manual_seed(seed)
    model = lowrank.load_model(path, quantizer=lowrank.quant.get("nf4", block_size=32))
    lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules="all-linear"))
    text = (Path(os.environ["LOWRANK_TEST_DATA"]) / "tinyshakespeare.txt").read_bytes()
    batches = torch.tensor([3 + byte for byte in text[: steps * 32]]).view(steps, 1, 32)
    cut = tensor_parallel(copy.deepcopy(model), mesh)
    return trained(model, cut, batches, lr=1e-4)  # of steps that are larger rounding grows


def stories260k(seed: int, mesh: DeviceMesh) -> tuple[dict, dict]:
    return real(seed, mesh, Path(os.environ["LOWRANK_TEST_DATA"]) / "stories260K", STEPS)


def smollm2(seed: int, mesh: DeviceMesh) -> tuple[dict, dict]:
    return real(seed, mesh, os.environ["LOWRANK_SMOLLM2"], 3)


def stories(seed: int, mesh: DeviceMesh) -> tuple[dict, dict]:
    """Steps of AdamW over real text: one process, and the two."""
    torch.manual_seed(seed)
    model = lowrank.load_model(TINY)
    # 256 columns of down_proj have cuts between blocks, 96 of o_proj have none: where that is
    # dense it is cut by columns, and in the other layers by rows
    skip = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    lowrank.quantize(model, lowrank.quant.get("nf4", block_size=32), skip=["lm_head", *skip])
    lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules="all-linear"))
    start, text = copy.deepcopy(model), Path(__file__).read_text()
    tokens = lowrank.load_tokenizer(TINY).encode(text)
    batches = torch.tensor(tokens[: STEPS * 32]).view(STEPS, 1, 32)

    cut = copy.deepcopy(start)
    held = local_bytes(cut.model.layers)
    with Sent() as starting:
        tensor_parallel(cut, mesh)
    numbers = {"bytes": [held, local_bytes(cut.model.layers)]}
    adapters = [p.nbytes for p in start.parameters() if p.requires_grad]
    numbers["at the start"] = [starting.calls, len(adapters), starting.largest, max(adapters)]
    with Sent() as sent:
        cut(batches[0])
    numbers["forward"] = sent.calls
    with torch.inference_mode():
        few = batches[0][:, :5]  # where products of several layers are one call, in one process
        tensors = {"one/logits": start(few), "two/logits": cut(few)}
    try:
        lowrank.generate(cut, lowrank.load_tokenizer(TINY), "Once", max_new_tokens=2)
    except TargetError as error:
        numbers["generating"] = str(error)
    more, both = trained(model, cut, batches)
    tensors |= more
    numbers |= both
    losses = []
    for kind in (False, True, "selective"):
        cut.gradient_checkpointing = kind
        loss = F.cross_entropy(cut(batches[0])[0, :-1], batches[0][0, 1:])
        loss.backward()
        grads = [whole(p.grad).norm().item() for p in cut.parameters() if p.requires_grad]
        losses.append([loss.item(), *grads])
        cut.zero_grad()
    return tensors, {**numbers, "checkpointing": losses}


def refused(seed: int, mesh: DeviceMesh) -> tuple[dict, dict]:
    """What cannot be cut, and that it is as before."""
    torch.manual_seed(seed)
    config, said, changed = lowrank.LoRAConfig(r=2), {}, []
    dora = lowrank.LoRALinear.wrap(nn.Linear(64, 8), lowrank.LoRAConfig(r=2, use_dora=True))
    rows = lowrank.LoRAConfig(r=2, target_rows={"up": [(0, 4)]})
    merged = lowrank.LoRALinear.wrap(nn.Linear(64, 8), config)
    merged.merge()
    small = {**SMALL, "num_hidden_layers": 1}
    models = {
        "heads": {**small, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
        "fused": {**small, "model_type": "phi3"},
        "experts": {
            **small, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1
        },
    }  # fmt: skip
    llama = DecoderConfig.from_hf({"model_type": "llama", **small})
    placed = Decoder(
        DecoderConfig.from_hf({"model_type": "llama", **SMALL, "num_hidden_layers": 4})
    )
    most = sum(p.nbytes for p in placed.parameters()) - 1
    placed.placement = place(placed, placed.body.blocks, torch.device("cpu"), most)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Decoder(llama), folder)
        unread = lowrank.load_model(folder, sharded=True)
    wrong = {
        "cut": (None, tensor_parallel(Decoder(llama), mesh)),
        "placed": (None, placed),
        "unread": (None, unread),
        "block": (RowwiseParallel(), lowrank.QuantLinear(96, 8)),
        "columns": (RowwiseParallel(), lowrank.LoRALinear(7, 8, config=config)),
        "rows": (ColwiseParallel(), lowrank.QuantLinear(64, 1)),
        "scheme": (ColwiseParallel(), lowrank.QuantLinear(64, 8, quantizer="int8")),
        "dora": (ColwiseParallel(), dora),
        "target_rows": (
            ColwiseParallel(),
            lowrank.LoRALinear.wrap(nn.Linear(64, 8), rows, name="up"),
        ),
        "merged": (RowwiseParallel(), merged),
        **{
            name: (None, Decoder(DecoderConfig.from_hf({"model_type": "llama", **sizes})))
            for name, sizes in models.items()
        },
    }
    for name, (style, module) in wrong.items():
        before = [id(p) for p in module.parameters()]
        try:
            if style is None:
                tensor_parallel(module, mesh)
            else:
                parallelize_module(module, mesh, style)
            said[name] = None
        except TargetError as error:
            said[name] = str(error)
        if [id(p) for p in module.parameters()] != before:
            changed.append(name)
    return {}, {"said": said, "changed": changed}


def both_ways(seed: int, _: DeviceMesh) -> tuple[dict, dict]:
    """Two pairs of four processes: each pair shares every weight, and its halves by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "weights"))
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 192), nn.SiLU(), nn.Linear(192, 66), nn.SiLU())
    alone: nn.Module = nn.Sequential(*layers)
    lowrank.quantize(alone, lowrank.quant.get("nf4", block_size=32))
    lowrank.inject(alone, lowrank.LoRAConfig(r=4, target_modules="all-linear"))
    for name, p in alone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    cut, x = copy.deepcopy(alone), torch.randn(4, 64)
    held = local_bytes(cut)
    parallelize_module(cut, mesh["weights"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(cut, mesh=mesh["data"])
    rows = x.chunk(2)[mesh["data"].get_local_rank()]
    tensors = {}
    for way, model, some in (("one", alone, x), ("two", cut, rows)):
        model(some).square().mean().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                tensors[f"{way}/{name}"] = whole(p.grad).contiguous()
    return tensors, {"bytes": [held, local_bytes(cut)]}


CASES = {case.__name__: case for case in (layers, stories, refused)}
MORE = {case.__name__: case for case in (both_ways, stories260k, smollm2)}


def main(folder: str, seed: str, rank: str, ranks: str, *names: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(ranks),
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (int(ranks),))
    for name in names:
        tensors, numbers = (CASES | MORE)[name](int(seed), mesh)
        at = Path(folder) / name
        if tensors:
            write_safetensors(at.with_suffix(f".{rank}.safetensors"), tensors)
        at.with_suffix(f".{rank}.json").write_text(json.dumps(numbers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
