"""What is multiplied: weights of real models, N out features x K in features, rows, dtypes."""

from __future__ import annotations

import re

from benchmarks.errors import UsageError
from benchmarks.installed import chosen

SHAPES = {
    "llama3-8b.q": (4096, 4096),
    "llama3-8b.k": (1024, 4096),
    "llama3-8b.gate": (14336, 4096),
    "llama3-8b.down": (4096, 14336),
    "llama3-70b.q": (8192, 8192),
    "llama3-70b.gate": (28672, 8192),
    "llama3-70b.down": (8192, 28672),
    "smollm2-135m.q": (576, 576),
    "smollm2-135m.k": (192, 576),
    "smollm2-135m.gate": (1536, 576),
    "smollm2-135m.down": (576, 1536),
}
HEADS = {"smollm2-135m.head": (49152, 576), "llama3-8b.head": (128256, 4096)}
HEADLINE, HEADLINE_HEAD = ("llama3-8b.q",), ("smollm2-135m.head",)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse(text: str, known: dict[str, tuple[int, int]] = SHAPES) -> tuple[str, int, int]:
    """A known name, or NxK, as (label, N, K). Raises UsageError saying what is known."""
    if text in known:
        rows, columns = known[text]
        return f"{rows}x{columns} ({text})", rows, columns
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UsageError(f"shape: expected NxK or one of {', '.join(known)}; got {text!r}")
    rows, columns = int(match[1]), int(match[2])
    names = [name for name, shape in known.items() if shape == (rows, columns)]
    return f"{rows}x{columns}" + (f" ({names[0]})" if names else ""), rows, columns


def layers_bytes(N: int, K: int, sides: int, working_set: int) -> int:
    """What `sides` layers over [N, K] hold, at most, and the oracle of one of them beside them.

    Each side's copies fill the working set, and are two at least: dense ones, of up to 4 bytes an
    element, are a fifth of the sides. The oracle takes 16 bytes an element for a while.
    """
    packed, dense = max(working_set, N * K), max(working_set, 8 * N * K)
    return sides * packed + -(-sides // 5) * (dense - packed) + 16 * N * K


def parse_rows(text: str) -> list[int]:
    """--rows: positive numbers parted by commas. Raises UsageError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(f"--rows: expected positive numbers like 1,16,512; got {text!r}")
    return list(dict.fromkeys(counts))


def parse_dtypes(text: str) -> dict[str, str]:
    """--dtypes: short names parted by commas, with torch's names. Raises UsageError."""
    return {name: DTYPES[name] for name in chosen("--dtypes", text.split(","), DTYPES)}
