"""One rank of a way to share training, in a process of its own.

`python -m benchmarks.distributed_worker SIDE RANK RANKS FOLDER STEPS` trains, and prints a line of
JSON: seconds and loss of each step, bytes that go between ranks in one, and bytes that stay held.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from benchmarks.memory import random_model
from lowrank.models.decoder import Decoder
from lowrank.models.parallel import tensor_parallel
from lowrank.train.distributed import Ranks
from lowrank.train.sharding import shard

ROWS, LENGTH, VOCABULARY, RANK, LR = 4, 128, 8000, 16, 1e-3
SIZES = (1024, 4)  # hidden size, layers: torchao's tensor is cut in halves at these


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, by the kind of collective: what a ring of `ranks` needs at least.

    Of a tensor of S bytes in all, gathering or scattering sends (n - 1) / n of it, adding up twice
    that, and telling all of them S.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}
        self._share = (ranks - 1) / ranks
        self._ranks = ranks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_").replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap")):
            kind, size = self._size(name, args)
            self.bytes[kind] = self.bytes.get(kind, 0) + size
        return func(*args, **(kwargs or {}))

    def _size(self, name: str, args: tuple) -> tuple[str, float]:
        sizes = [sum(t.nbytes for t in _tensors(arg)) for arg in (*args, None)[:2]]
        if name.startswith("allreduce"):
            return "all-reduce", 2 * self._share * sizes[0]
        if name.startswith("broadcast"):
            return "broadcast", sizes[0]
        # c10d has (output, input), its functional twin the input alone
        whole = max(sizes) if sizes[1] else sizes[0] * self._ranks
        if name.startswith("reducescatter"):
            whole = max(sizes) if sizes[1] else sizes[0]
            return "reduce-scatter", self._share * whole
        if name.startswith("allgather"):
            return "all-gather", self._share * whole
        raise RuntimeError(f"distributed: a collective that is not counted: {name}")


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


class Adapted(nn.Module):
    """A peer's frozen layer with an adapter beside it, as its users write it."""

    def __init__(self, base: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Linear(linear.in_features, RANK, bias=False)
        self.B = nn.Linear(RANK, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.B(self.A(x))


def decoder() -> Decoder:
    """The same random weights on every rank and every side."""
    torch.manual_seed(0)
    hidden, layers = SIZES
    return Decoder(random_model(hidden, layers, VOCABULARY, tied=False)).requires_grad_(False)


def ours() -> Decoder:
    model = lowrank.quantize(decoder(), "nf4")
    torch.manual_seed(1)
    config = lowrank.LoRAConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return lowrank.inject(model, config)


def with_peer(make: Callable[[nn.Linear], nn.Module]) -> Decoder:
    """The same decoder with a peer's layers in its blocks."""
    model = decoder()
    torch.manual_seed(1)
    for block in model.body.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Adapted(make(child), child))
    return model


def bitsandbytes() -> Decoder:
    from benchmarks import peers

    bnb = peers.bitsandbytes()

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4",
            compute_dtype=torch.float32,
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer = layer.to("cpu")
        layer.quant_state = layer.weight.quant_state  # FSDP2 cuts the weight alone
        return layer

    return with_peer(make)


def torchao() -> Decoder:
    from benchmarks.peers import torchao_nf4

    class Linear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = nn.Parameter(torchao_nf4(linear.weight.data), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    return with_peer(Linear)


SIDES: dict[str, tuple[Callable[[], Decoder], str]] = {
    "lowrank, one process": (ours, "one"),
    "lowrank, DDP": (ours, "ddp"),
    "lowrank, FSDP2": (ours, "fsdp"),
    "lowrank, tensor parallel": (ours, "tp"),
    "bitsandbytes, FSDP2": (bitsandbytes, "fsdp"),
    "torchao, FSDP2": (torchao, "fsdp"),
}


def held_bytes(module: nn.Module) -> dict[str, int]:
    """What this rank holds of the blocks' frozen weights, of all else that is frozen, of adapters.

    Every tensor once, with all the memory it is a part of; those inside of tensors, too.
    """
    found = {"blocks": 0, "rest": 0, "adapters": 0}
    seen: set[int] = set()
    blocks = {id(m) for m in module.body.blocks.modules()}
    for child in module.modules():
        place = "blocks" if id(child) in blocks else "rest"
        held = [
            (part, p.requires_grad) for p in child.parameters(recurse=False) for part in _parts(p)
        ]
        held += [(part, False) for part in _beside(child)]
        for part, trained in held:
            at = part.untyped_storage()
            if at.data_ptr() not in seen:
                seen.add(at.data_ptr())
                found["adapters" if trained else place] += at.nbytes()
    return found


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that this rank has of one."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [tensor]


def _beside(layer: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps beside a weight: scales, scales of scales, tables."""
    found, state = [], getattr(layer, "quant_state", None)
    while state is not None:
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = state.state2
    return found


def main(side: str, rank: str, ranks: str, folder: str, steps: str) -> None:
    """Train, and say what it took."""
    torch.set_num_threads(1)
    made, way = SIDES[side]
    size = int(ranks)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=size,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    model = made()
    if way == "fsdp":
        shard(model)
    elif way == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (size,)))
    held = held_bytes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    together = Ranks("ddp") if way == "ddp" else None
    generator = torch.Generator().manual_seed(2)
    seconds, losses, sent = [], [], Sent(size)
    for _ in range(int(steps)):
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        labels = ids[:, 1:]
        if way in ("ddp", "fsdp"):
            rows = slice(int(rank) * ROWS // size, (int(rank) + 1) * ROWS // size)
            ids, labels = ids[rows], labels[rows]
        begin = time.perf_counter()
        sent = Sent(size)
        with sent:
            logits = model(ids)[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
            loss = loss / (ROWS * (LENGTH - 1))
            loss.backward()
            if together is not None:
                together.sum_gradients(trained)
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        told = torch.tensor([loss.item()], dtype=torch.float64)
        if way in ("ddp", "fsdp"):
            dist.all_reduce(told)
        losses.append(told.item())
    state = sum(
        part.nbytes for s in optimizer.state.values() for t in s.values()
        if isinstance(t, Tensor) for part in _parts(t)
    )  # fmt: skip
    answer = {"seconds": seconds, "losses": losses, "sent": sent.bytes, "held": held}
    print(json.dumps(answer | {"state": state}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
