"""A report as markdown: the table that is printed, and the page that is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .result import Report, Row, perplexity_of
from .speed import MANY

_WORST = 3  # layers named for each scheme
_NONE = "–"


def table(report: Report) -> str:
    """Rows by rising error, the dense weights first; then what the marks and failures mean."""
    timed = any(row.speed for row in report.measured)
    outputs = any(row.output_error is not None for row in report.measured)
    head = ["scheme", "bits", "MB", "error", "worst layer"]
    head += ["output error"] if outputs else []
    head += ["perplexity", "rise"] if report.loss is not None else []
    if timed:
        head += ["quantize GB/s", "dequantize GB/s", "y = xWᵀ, M=1", f"M={MANY}"]
    head += ["y = xWᵀ from"]
    lines = [head, _dense(report, outputs, timed)]
    lines += [_cells(row, report, outputs, timed) for row in report.measured]
    text = _markdown(lines)
    failed = [f"- `{row.scheme}` failed: {row.failure}" for row in report.rows if row.failure]
    if any(row.favoured for row in report.rows):
        failed.insert(
            0,
            f"\\* Favoured here: the weights have been through {report.about['quantized_before']}, "
            "whose blocks hold equidistant values too.",
        )
    return "\n".join([text, *(["", *failed] if failed else [])])


def page(report: Report, pictures: Sequence[str]) -> str:
    """The whole of report.md: the table, its words, the worst layers, pictures, the machine."""
    about = report.about
    machine = about["machine"]
    before = about["quantized_before"]
    lines = [
        f"# Quantizers on {about['model']}",
        "",
        f"{about['layers']} linear layers, {about['weights']:,} weights in {about['dtype']}"
        + (f", which have been through {before}." if before else "."),
        "",
        table(report),
        "",
        "- **bits** stored for each weight, scales and tables included; **MB**: 10⁶ bytes of them.",
        "- **error**: relative RMSE, ‖W − Q‖ / ‖W‖ over all layers; **worst layer**: of one layer.",
    ]
    if any(row.output_error is not None for row in report.measured):
        lines.append(
            "- **output error**: ‖X(W − Q)ᵀ‖ / ‖XWᵀ‖ on real activations X, root mean square over "
            f"the layers; up to {about['options']['rows']} rows of each."
        )
    if report.loss is not None:
        options = about["options"]
        lines.append(
            f"- **perplexity** over {about['predicted']} of the first {about['tokens']} tokens, in "
            f"windows of {options['window']} that begin every {options['stride']}; **rise** over "
            "the dense weights'."
        )
    if any(row.speed for row in report.measured):
        lines.append(
            "- **quantize**, **dequantize**: dense bytes a second; **y = xWᵀ**: time over that of "
            f"dense weights, for 1 and {MANY} rows of x. Medians, on layers of one shape in turn."
        )
    lines += ["", "## Worst layers", "", _worst(report)]
    for name in pictures:
        lines += ["", f"![{name.partition('.')[0]}]({name})"]
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} threads; lowrank {machine['lowrank']}, "
        f"torch {machine['torch']}, Python {machine['python']}, {machine['platform']}; "
        f"seed {about['options']['seed']}; {about['date']}.",
    ]
    return "\n".join(lines) + "\n"


def _dense(report: Report, outputs: bool, timed: bool) -> list[str]:
    bits = 8 * report.dense_bytes / report.about["weights"]
    cells = ["dense", f"{bits:.2f}", _megabytes(report.dense_bytes), "0", "0"]
    cells += ["0"] if outputs else []
    cells += [_fixed(perplexity_of(report.loss)), ""] if report.loss is not None else []
    return [*cells, *(["", "", "1.00", "1.00"] if timed else []), "weights"]


def _cells(row: Row, report: Report, outputs: bool, timed: bool) -> list[str]:
    ((_, worst),) = row.worst()
    star = r" \*" if row.favoured else ""
    cells = [f"`{row.scheme}`{star}", f"{row.bits:.2f}", _megabytes(row.nbytes)]
    cells += [_digits(row.error), _digits(worst)]
    cells += [_digits(row.output_error)] if outputs else []
    if report.loss is not None:
        rise = None if row.loss is None else perplexity_of(row.loss - report.loss) - 1
        cells += [_fixed(row.perplexity), _percent(rise)]
    if timed and row.speed is not None:
        fast = row.speed
        cells += [f"{fast.quantize / 1e9:.2f}", f"{fast.dequantize / 1e9:.2f}"]
        cells += [f"{fast.linear_1:.2f}", f"{fast.linear_many:.2f}"]
    return [*cells, "codes" if row.fused else "dequantized"]


def _worst(report: Report) -> str:
    lines = [["scheme", *(["layer, error"] * _WORST)]]
    for row in report.measured:
        named = [f"{name}, {_digits(error)}" for name, error in row.worst(_WORST)]
        lines.append([f"`{row.scheme}`", *named, *([""] * (_WORST - len(named)))])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [line[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        for line in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [padded[0], rule, *padded[1:]])


def _digits(value: float | None) -> str:
    """Four decimals, or three digits of what they would lose."""
    if value is None or math.isnan(value):
        return _NONE
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}" if value else "0"


def _fixed(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _NONE
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _NONE
    return f"{100 * value:+.1f} %" if value < 100 else f"× {value + 1:.1e}"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}" if nbytes >= 1e5 else f"{nbytes / 1e6:.1e}"
