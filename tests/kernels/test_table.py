"""The committed table of kernels is of the kernels that there are."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks import compile_all, kernel_cases  # noqa: E402


def test_the_table_has_a_line_for_every_case():
    """After a change of the kernels or their tiles: `make compile-all`."""
    lines = [line.strip("| ").split(" | ") for line in compile_all.TABLE.read_text().splitlines()]
    rows = [tuple(cells[:2]) for cells in lines if len(cells) == 2 + len(compile_all.ARCHITECTURES)]
    assert rows[2:] == [(case.name, case.dtype) for case in kernel_cases.cases()]
