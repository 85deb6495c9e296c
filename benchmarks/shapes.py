"""Weights of real models, N out features x K in features."""

from __future__ import annotations

import re

from benchmarks.errors import UsageError

SHAPES = {
    "llama3-8b.q": (4096, 4096),
    "llama3-8b.k": (1024, 4096),
    "llama3-8b.gate": (14336, 4096),
    "llama3-8b.down": (4096, 14336),
    "llama3-70b.down": (8192, 28672),
    "smollm2-135m.q": (576, 576),
    "smollm2-135m.k": (192, 576),
    "smollm2-135m.gate": (1536, 576),
    "smollm2-135m.down": (576, 1536),
}
HEADLINE = ("llama3-8b.q",)


def parse(text: str) -> tuple[str, int, int]:
    """A name from SHAPES, or NxK, as (label, N, K). Raises UsageError saying what is known."""
    if text in SHAPES:
        rows, columns = SHAPES[text]
        return f"{rows}x{columns} ({text})", rows, columns
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UsageError(f"shape: expected NxK or one of {', '.join(SHAPES)}; got {text!r}")
    rows, columns = int(match[1]), int(match[2])
    names = [name for name, shape in SHAPES.items() if shape == (rows, columns)]
    return f"{rows}x{columns}" + (f" ({names[0]})" if names else ""), rows, columns


def parse_rows(text: str) -> list[int]:
    """--rows: positive numbers parted by commas. Raises UsageError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(f"--rows: expected positive numbers like 1,16,512; got {text!r}")
    return list(dict.fromkeys(counts))
