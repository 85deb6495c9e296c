"""Results as Markdown, from the JSON of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence

OP_COLUMNS = (
    "",
    "median ms",
    "p10–p90",
    "n",
    "speed",
    "over bare",
    "GB/s",
    "TFLOP/s",
    "of ceiling",
    "floor ×",
    "error",
    "extra MB",
    "path",
)
STEP_COLUMNS = (
    "",
    "s/step",
    "p10–p90",
    "real tokens/s",
    "speed",
    "over plain",
    "TFLOP/s",
    "of ceiling",
    "peak MB",
    "loading MB",
    "first loss",
    "last loss",
    "loss difference",
)
DECODING_COLUMNS = (
    "",
    "ms/token",
    "p10–p90",
    "n",
    "tokens/s",
    "speed",
    "over dense fp32",
    "peak MB",
    "loading MB",
)
MEMORY_COLUMNS = ("", "predicted MB", "measured MB", "of measured", "with malloc as it is, MB")
DISTRIBUTED_COLUMNS = (
    "",
    "s/step",
    "all-reduce MB",
    "all-gather MB",
    "reduce-scatter MB",
    "sent MB/step",
    "blocks held MB",
    "of one process",
    "table and head MB",
    "adapters MB",
    "optimizer MB",
    "held MB",
    "planned MB",
    "last loss",
)


def render(result: dict) -> str:
    """The whole run: machine, ceilings, and one table a case."""
    parts = [header(result)]
    parts += [titled(case) for case in cases(result["rows"])]
    if result.get("notes"):
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    return "\n\n".join(parts) + "\n"


def header(result: dict) -> str:
    """Machine, versions and ceilings in a few lines; the device first, where it is a GPU."""
    machine, run = result["machine"], result["run"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    level = f"restricted to {run['isa']}" if run["isa"] else "as the CPU allows"
    return (
        f"{_device(machine)}{machine['cpu']} (family/model {machine['cpu_family_model']}), "
        f"{machine['cores']} cores, "
        f"{machine['threads']} threads, {level}; L3 {megabytes(machine['l3_bytes'])} MB as shown, "
        f"inputs rotate over {megabytes(run['working_set'])} MB; "
        f"flags {' '.join(machine['flags'])}. {machine['system']}, "
        f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}, "
        f"{run['date']}.\n\n" + ceilings_line(result["ceilings"])
    )


def _device(machine: dict) -> str:
    if "capability" not in machine:
        return ""
    major, minor = machine["capability"]
    return (
        f"{machine['device']} (capability {major}.{minor}, {machine['multiprocessors']} "
        f"multiprocessors, {megabytes(machine['device_memory_bytes'])} MB, L2 "
        f"{megabytes(machine['l2_bytes'])} MB, CUDA {machine['cuda']}, "
        f"{machine['driver and clocks']}); "
    )


def ceilings_line(limits: dict[str, float]) -> str:
    """The ceilings as a sentence."""
    rates = [
        f"{match[1] or 'float32'} matmul {tflops(rate)}"
        for name, rate in limits.items()
        if (match := re.fullmatch(r"matmul_(?:(\w+)_)?tflops", name))
    ]
    return (
        f"Ceilings, the best in this run: copy {limits['copy_gbs']:.1f} GB/s, "
        f"read {limits['read_gbs']:.1f} GB/s, {', '.join(rates)}."
    )


def tflops(rate: float) -> str:
    """A rate in the unit that suits it."""
    return f"{rate:.0f} TFLOP/s" if rate >= 10 else f"{rate * 1e3:.0f} GFLOP/s"


def cases(rows: Sequence[dict]) -> list[list[dict]]:
    """Rows of one benchmark and case together, in the order of the run."""
    grouped: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["benchmark"], row["case"]), []).append(row)
    return list(grouped.values())


def titled(rows: Sequence[dict]) -> str:
    """One case with its heading, and what was wrong in it."""
    wrong = [f"WRONG: {row['contender']}: {row['wrong']}" for row in rows if "wrong" in row]
    return "\n\n".join([f"### {rows[0]['benchmark']}: {rows[0]['case']}", table(rows), *wrong])


def table(rows: Sequence[dict]) -> str:
    """One case as a Markdown table. `speed` is against the row that says 1.00."""
    columns, cells = OP_COLUMNS, _op_cells
    if "losses" in rows[0]:
        columns, cells = STEP_COLUMNS, _step_cells
    elif "new_tokens" in rows[0]:
        columns, cells = DECODING_COLUMNS, _decoding_cells
    elif "predicted_bytes" in rows[0]:
        columns, cells = MEMORY_COLUMNS, _memory_cells
    elif "sent_bytes" in rows[0]:
        columns, cells = DISTRIBUTED_COLUMNS, _distributed_cells
    lines = [[*columns], ["---", *("---:" for _ in columns[1:])]]
    lines += [cells(row) for row in rows]
    keep = [i for i in range(len(columns)) if i == 0 or any(line[i] for line in lines[2:])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "| " + " | ".join(line[i].ljust(widths[i]) for i in keep) + " |" for line in lines
    )


def _op_cells(row: dict) -> list[str]:
    memory_floor = row.get("memory_floor_ms")
    return [
        row["contender"],
        f"{row['median_ms']:.3g}",
        f"{row['p10_ms']:.3g}–{row['p90_ms']:.3g}",
        str(row["n"]),
        f"{row['speed']:.2f}×",
        f"{row['over_bare']:.3f}×" if "over_bare" in row else "",
        _rate(row.get("gbs")),
        _rate(row.get("tflops")),
        _share(row),
        f"{row['median_ms'] / memory_floor:.2f}" if memory_floor else "",
        f"{row['error']:.1e}" if row.get("error") is not None else "",
        megabytes(row["extra_bytes"]) if row.get("extra_bytes") is not None else "",
        row.get("path", ""),
    ]


def _step_cells(row: dict) -> list[str]:
    losses = row["losses"]
    return [
        row["contender"],
        f"{row['median_ms'] * 1e-3:.2f}",
        f"{row['p10_ms'] * 1e-3:.2f}–{row['p90_ms'] * 1e-3:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['speed']:.2f}×",
        f"{row['over_plain']:.2f}×" if "over_plain" in row else "",
        _rate(row.get("tflops")),
        _share(row),
        megabytes(row["peak_bytes"]),
        megabytes(row["load_peak_bytes"]),
        f"{losses[0]:.4f}",
        f"{losses[-1]:.4f}",
        "" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
    ]


def _decoding_cells(row: dict) -> list[str]:
    return [
        row["contender"],
        f"{row['median_ms']:.1f}",
        f"{row['p10_ms']:.1f}–{row['p90_ms']:.1f}",
        str(row["n"]),
        f"{row['written_per_second']:.1f}",
        f"{row['speed']:.2f}×",
        f"{row['over_dense']:.2f}×" if "over_dense" in row else "",
        megabytes(row["peak_bytes"]),
        megabytes(row["load_peak_bytes"]),
    ]


def _memory_cells(row: dict) -> list[str]:
    return [
        row["contender"],
        megabytes(row["predicted_bytes"]),
        megabytes(row["measured_bytes"]),
        f"{row['predicted_bytes'] / row['measured_bytes']:.1%}",
        megabytes(row["kept_bytes"]),
    ]


def _distributed_cells(row: dict) -> list[str]:
    sent = row["sent_bytes"]
    kinds = ("all-reduce", "all-gather", "reduce-scatter")
    return [
        row["contender"],
        f"{row['median_ms'] * 1e-3:.2f}",
        *(megabytes(sent[kind]) if kind in sent else "" for kind in kinds),
        megabytes(sum(sent.values())),
        megabytes(row["block_bytes"]),
        f"{row['block_share']:.3f}",
        megabytes(row["rest_bytes"]),
        megabytes(row["adapter_bytes"]),
        megabytes(row["state_bytes"]),
        megabytes(row["held_bytes"]),
        megabytes(row["planned_bytes"]) if "planned_bytes" in row else "",
        f"{row['last_loss']:.4f}",
    ]


def _share(row: dict) -> str:
    """The least time that the ceilings allow, as a share of the median."""
    floor = row.get("floor_ms")
    return f"{100 * floor / row['median_ms']:.0f} %" if floor else ""


def megabytes(count: float) -> str:
    """Bytes as MB of a million, with one decimal below ten."""
    value = count / 1e6
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _rate(value: float | None) -> str:
    return f"{value:.3g}" if value else ""
