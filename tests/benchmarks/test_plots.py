"""Pictures: what they show, from made-up rows and from every committed file of results."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import cli, plot, results, roofline
from benchmarks.errors import UsageError

from .test_table import OP_ROW, STEP_ROW, result

FILES = sorted(results.RESULTS.glob("*.json"))


def rows() -> list[dict]:
    """Two sides of two dtypes at two M."""
    made = []
    for M in (1, 64):
        for side, dtype in (("torch fp32", "float32"), ("lowrank bf16", "bfloat16")):
            row = {**OP_ROW, "case": f"64x64 M={M} forward", "contender": side, "dtype": dtype}
            made.append(row | {"moved": 10_000, "flops": 8192 * M, "memory": "read"})
    return made


@pytest.fixture
def figure():
    from matplotlib import pyplot

    run = result(*rows(), {**rows()[0], "case": "64x64 M=8 dX"}, STEP_ROW)
    run["ceilings"]["matmul_bfloat16_tflops"] = 0.5
    yield roofline.figure_of(run)
    pyplot.close("all")


def test_a_roofline_has_its_points_under_the_measured_roof(figure):
    axis, other = figure.axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_title() == "codebook_linear, forward" and other.get_title().endswith("dX")
    assert "operations per byte" in axis.get_xlabel() and "GFLOP/s" in axis.get_ylabel()
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    expected = np.array([[0.8192, 8192 / 2.0 * 1e-6], [52.4288, 64 * 8192 / 2.0 * 1e-6]])
    for side in ("torch fp32", "lowrank bf16"):
        np.testing.assert_allclose(lines[side], expected)
    roof = [line for name, line in lines.items() if name.startswith("_")]
    (slope,) = (line for line in roof if line[0, 1] != line[-1, 1])
    np.testing.assert_allclose(slope[:, 1] / slope[:, 0], 33.3)  # GB/s, the read ceiling
    assert slope[-1, 1] == pytest.approx(500)  # where it meets the bfloat16 matmul
    levels = sorted(line[0, 1] for line in roof if line[0, 1] == line[-1, 1])
    assert levels == pytest.approx([170, 500])  # GFLOP/s
    said = " ".join(text.get_text() for text in axis.texts)
    for label in ("read 33 GB/s", "float32 matmul 170 GFLOP/s", "bfloat16 matmul 500 GFLOP/s"):
        assert label in said


def test_the_legend_names_every_contender_once_and_outside(figure):
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["torch fp32", "lowrank bf16"]
    figure.canvas.draw()
    left = legend.get_window_extent().x0
    assert all(axis.get_window_extent().x1 <= left for axis in figure.axes)


def test_a_contender_without_a_dtype_in_its_name_gets_its_rows():
    assert roofline.named({**OP_ROW, "contender": "torch", "dtype": "bfloat16"}) == "torch bf16"
    assert roofline.named({**OP_ROW, "contender": "torch fused fp32"}) == "torch fused fp32"


def test_speeds_are_over_rows_of_x():
    from matplotlib import pyplot

    figure = plot.figure_of(result(*rows()))
    (axis,) = figure.axes
    ours = next(line for line in axis.lines if line.get_label() == "lowrank bf16")
    assert ours.get_xydata().tolist() == [[1, 1.0], [64, 1.0]]
    assert "torch fp32 = 1" in axis.get_ylabel()
    pyplot.close("all")


@pytest.mark.parametrize("make", [plot.figure_of, roofline.figure_of])
def test_a_run_with_nothing_to_draw_is_refused(make):
    with pytest.raises(UsageError, match="the run holds no"):
        make(result(STEP_ROW))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_committed_results_make_tables_and_rooflines(file, tmp_path, capsys):
    png = tmp_path / "roofline.png"
    run = results.read(str(file))
    drawable = any(row.get("flops") for row in run["rows"])
    options = ["--roofline", str(png)] if drawable else []
    assert cli.main(["--table", str(file), *options]) in (0, cli.WRONG_RESULT)
    printed = capsys.readouterr().out
    assert all(row["contender"] in printed for row in run["rows"])
    if drawable:
        from matplotlib.image import imread

        image = imread(png)
        assert min(image.shape[:2]) >= 400 and image.std() > 0.01
