"""The operators on a CUDA device, beside dense torch, both sides of our own choice, bitsandbytes.

    python -m benchmarks.gpu [--shapes 4096x4096 …] [--rows 1,16,…] [--json [PATH]]

Each M has a case of the forward and one of dX. `from codes` and `through scratch` are the two ways
that the dispatch chooses from, whatever it chose: they tell where its table should change.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_timing, peers, shapes, table
from benchmarks.errors import UsageError
from benchmarks.harness import Contender, relative_error
from benchmarks.settings import add_rates

RESULTS = Path(__file__).parent / "results"
SHAPES = ("llama3-8b.k", "llama3-8b.q", "llama3-8b.down", "llama3-8b.gate", "llama3-70b.down")
ROWS = "1,2,4,8,16,32,64,128,512,2048,8192"
MOST_GRAPHED_ROWS = 16  # above, a launch is hidden behind the kernel before it
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
G = peers.BLOCK_SIZE

Weight = tuple[Tensor, Tensor, Tensor, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Run; 0 when every result was right, 1 when one was wrong, 2 for a mistake in the command."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    options.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options.add_argument("--rows", default=ROWS)
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    options.add_argument("--json", nargs="?", const="", default=None, metavar="PATH")
    given = options.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu: no CUDA device is here", file=sys.stderr)
        return 2
    try:
        wanted = [shapes.parse(text) for text in given.shapes]
        counts = [int(text) for text in given.rows.split(",")]
    except (UsageError, ValueError) as error:
        print(f"python -m benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    result = run(device, wanted, counts, getattr(torch, given.dtype), given.seconds)
    if given.json is not None:
        name = f"{gpu_timing.slug(result['machine'])}-{result['run']['date']}.json"
        path = Path(given.json) if given.json else RESULTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {path}")
    return 1 if any("wrong" in row for row in result["rows"]) else 0


def run(
    device: torch.device,
    wanted: Sequence[tuple[str, int, int]],
    rows_of_x: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
    scale: float = 1.0,
) -> dict:
    """All cases of all shapes, printed as they are done; `scale` shrinks what ceilings move."""
    torch.manual_seed(0)
    limits = gpu_timing.ceilings(device, dtype, scale)
    result: dict = {
        "machine": gpu_timing.describe(device),
        "run": {"date": datetime.date.today().isoformat(), "dtype": str(dtype)},
        "ceilings": limits,
        "rows": [],
    }
    print(json.dumps(result["machine"], indent=1), json.dumps(limits, indent=1), flush=True)
    for label, N, K in wanted:
        dense = torch.randn(N, K, device=device) * 0.02
        time = functools.partial(_time, result=result, seconds=seconds, device=device)
        time("codebook_quantize", label, _quantize(dense), "read")
        time("codebook_dequantize", label, _dequantize(dense, dtype), "copy")
        for M in rows_of_x:
            for transposed, direction in ((False, "forward"), (True, "dX")):
                contenders = _products(dense, M, dtype, transposed)
                time("codebook_linear", f"{label} M={M} {direction}", contenders, "read")
    return result


def _time(
    benchmark: str,
    case: str,
    contenders: Sequence[Contender],
    memory: str,
    result: dict,
    seconds: float,
    device: torch.device,
) -> None:
    rows = []
    for contender, summary in zip(
        contenders, gpu_timing.measure(contenders, seconds, device), strict=True
    ):
        row = {"benchmark": benchmark, "case": case, "contender": contender.name, **summary}
        row |= {"path": contender.path, "memory": memory}
        rows.append(row | {"moved": contender.moved, "flops": contender.flops})
    for row in rows:
        row["baseline"] = rows[0]["contender"]
        row["speed"] = rows[0]["median_ms"] / row["median_ms"]
    add_rates(rows, result["ceilings"])
    result["rows"] += rows
    print("\n" + table.titled(rows), flush=True)


def _quantize(dense: Tensor) -> list[Contender]:
    quantizer = peers.lowrank_quantizer()
    copies = gpu_timing.copies_past_cache(dense.nbytes, dense.device)
    weights = [dense.clone() for _ in range(copies)]

    def error(storage) -> float:
        return relative_error(peers.exact_lowrank(storage), dense.double())

    moved = dense.nbytes + dense.numel() // 2
    return [
        Contender("lowrank", lambda i: quantizer.quantize(weights[i]), copies, error, 0.11, moved)
    ]


def _dequantize(dense: Tensor, dtype: torch.dtype) -> list[Contender]:
    from lowrank import ops

    weights, exact = _quantized(dense)
    K, moved = dense.shape[1], _nbytes(weights[0]) + dense.numel() * dtype.itemsize
    error = functools.partial(relative_error, exact=exact)
    values = exact.to(dtype)
    return [
        Contender(
            "torch copy",  # of as many bytes written: what writing alone takes
            lambda i: values.clone(),
            2,
            error,
            LIMITS[dtype],
            2 * values.nbytes,
        ),
        Contender(
            "lowrank",
            lambda i: ops.codebook_dequantize(*weights[i], K, G, dtype),
            len(weights),
            error,
            LIMITS[dtype],
            moved,
        ),
    ]


def _products(dense: Tensor, M: int, dtype: torch.dtype, transposed: bool) -> list[Contender]:
    """y = x Wᵀ, or dx = dy W where `transposed`: dense, ours, ours by name, ours as a graph."""
    from lowrank import ops

    device, (N, K) = dense.device, dense.shape
    weights, exact = _quantized(dense)
    x = torch.randn(M, N if transposed else K, device=device).to(dtype)
    product = x.double() @ (exact if transposed else exact.T)
    flops, streamed = 2 * M * N * K, M * (N + K) * dtype.itemsize
    op = "codebook_linear_dx" if transposed else "codebook_linear"
    last = (K, G) if transposed else (None, G)

    dense_copies = gpu_timing.copies_past_cache(dense.numel() * dtype.itemsize, device)
    matrices = [exact.to(dtype) for _ in range(dense_copies)]
    error = functools.partial(relative_error, exact=product)

    def contender(name: str, call, copies: int, nbytes: int, path: str = "") -> Contender:
        moved = nbytes + streamed
        return Contender(name, call, copies, error, LIMITS[dtype], moved, flops, path)

    def by_torch(i: int) -> Tensor:
        return x @ matrices[i] if transposed else F.linear(x, matrices[i])

    def by_lowrank(i: int) -> Tensor:
        return getattr(ops, op)(x, *weights[i], *last)

    copies, held = len(weights), _nbytes(weights[0])
    path = peers.chosen_backend(op, x, *weights[0], *last)
    made = [
        contender("torch", by_torch, dense_copies, matrices[0].nbytes),
        contender("lowrank", by_lowrank, copies, held, path),
    ]
    if device.type != "cuda":
        return made
    for name, call in _named_paths(x, weights, last, transposed).items():
        made.append(contender(name, call, copies, held))
    if M <= MOST_GRAPHED_ROWS:
        for name, call, count, nbytes in (
            ("torch, CUDA graph", by_torch, dense_copies, matrices[0].nbytes),
            ("lowrank, CUDA graph", by_lowrank, copies, held),
        ):
            made.append(contender(name, gpu_timing.graphed(call, count), count, nbytes))
    if not transposed and peers.missing("bitsandbytes") is None:
        made.append(_bitsandbytes(dense, x, flops, streamed))
    return made


def _named_paths(x: Tensor, weights: list[Weight], last: tuple, transposed: bool) -> dict:
    """The two ways of the Triton backend; from codes only as far as its tiles go."""
    from lowrank.ops import triton as backend

    direct = backend.dx_from_codes if transposed else backend.linear_from_codes
    scratch = backend.dx_through_scratch if transposed else backend.linear_through_scratch
    ways = {"lowrank, through scratch": lambda i: scratch(x, *weights[i], *last)}
    if x.shape[0] <= backend.fused_rows(x.device, x.dtype):
        ways["lowrank, from codes"] = lambda i: direct(x, *weights[i], *last)
    return ways


def _bitsandbytes(dense: Tensor, x: Tensor, flops: int, streamed: int) -> Contender:
    """Its Linear4bit, held to the values that its own tensors stand for."""
    bnb = peers.bitsandbytes()
    layers = []
    probe = dense.numel() // 2
    for _ in range(gpu_timing.copies_past_cache(probe, dense.device)):
        layer = bnb.nn.Linear4bit(
            dense.shape[1], dense.shape[0], bias=False, compute_dtype=x.dtype, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            dense.to(x.dtype), requires_grad=False, quant_type="nf4", module=layer
        )
        layers.append(layer.to(dense.device))
    tensors = peers.bitsandbytes_tensors(layers[0].weight.data, layers[0].weight.quant_state)
    exact = peers.exact_bitsandbytes(tuple(t.cpu() for t in tensors), dense.shape)
    product = x.double() @ exact.to(dense.device).T

    def call(i: int) -> Tensor:
        with torch.no_grad():
            return layers[i](x)

    error = functools.partial(relative_error, exact=product)
    moved = sum(t.nbytes for t in tensors) + streamed
    return Contender("bitsandbytes", call, len(layers), error, None, moved, flops)


def _quantized(dense: Tensor) -> tuple[list[Weight], Tensor]:
    """Copies past the cache of the tensors of NF4 with double quantization, and their values."""
    storage = peers.lowrank_quantizer().quantize(dense)
    weight = peers.operands(storage)
    copies = gpu_timing.copies_past_cache(_nbytes(weight), dense.device)
    return [tuple(t.clone() for t in weight) for _ in range(copies)], peers.exact_lowrank(storage)


def _nbytes(weight: Weight) -> int:
    return sum(t.nbytes for t in weight)


if __name__ == "__main__":
    sys.exit(main())
