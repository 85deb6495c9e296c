"""What is printed and written: the table, the page, JSON, plots."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank import quant
from lowrank.errors import ConfigError
from lowrank.report import report
from lowrank.surgery.quantize import SKIP

DOCS = Path(__file__).resolve().parents[2] / "docs"
FILES = {"report.md", "report.json", "error.png", "layers.png"}


class Language(nn.Sequential):
    def __init__(self) -> None:
        layers = [nn.Linear(32, 32) for _ in range(60)]
        super().__init__(nn.Embedding(20, 32), *layers, nn.Linear(32, 20))


class Broken:
    def quantize(self, weight):
        raise RuntimeError("no")

    def dequantize(self, storage, dtype):
        raise RuntimeError("no")


@pytest.fixture(scope="module")
def compared():
    torch.manual_seed(1)
    schemes = {name: name for name in ("nf4", "int8", "hqq", "none")} | {"broken": Broken()}
    return report(
        Language(), schemes, text=torch.randint(0, 20, (40,)), window=16,
        name="a model", quantized_before="Q4_1",
    )  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_ranks_and_marks(compared):
    lines = str(compared).splitlines()
    assert len({len(line) for line in lines[:7]}) == 1  # it is aligned
    head, _, dense, *rows = map(cells, lines[:7])
    assert head[:4] == ["scheme", "bits", "MB", "error"] and dense[:2] == ["dense", "32.00"]
    assert {row[0] for row in rows} == {"`none`", "`int8`", "`nf4`", r"`hqq` \*"}
    errors = [float(row[3]) for row in rows]
    assert errors == sorted(errors) and errors[0] == 0
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert by_name["`none`"]["perplexity"] == dict(zip(head, dense, strict=True))["perplexity"]
    assert by_name["`none`"]["rise"] == "+0.0 %"
    assert by_name["`nf4`"]["y = xWᵀ from"] == "codes"
    assert by_name["`int8`"]["y = xWᵀ from"] == "dequantized"
    assert any(
        line.startswith(r"\* Favoured here: the weights have been through Q4_1") for line in lines
    )
    assert lines[-1] == "- `broken` failed: 0.no" or "`broken` failed: 1: no" in lines[-1]


def test_only_what_was_measured_has_a_column():
    text = str(report(nn.Sequential(nn.Linear(32, 4)), ["hqq"], speed=False))
    assert cells(text.splitlines()[0]) == [
        "scheme",
        "bits",
        "MB",
        "error",
        "worst layer",
        "y = xWᵀ from",
    ]
    assert "Favoured" not in text and "failed" not in text


def test_json_holds_every_number(compared, tmp_path):
    compared.save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    about = data["about"]
    assert about["model"] == "a model" and about["layers"] == 61 and about["tokens"] == 40
    assert about["options"] == {
        "skip": list(SKIP),
        "rows": 256,
        "seed": 0,
        "window": 16,
        "stride": 16,
    }
    assert about["machine"]["torch"] == torch.__version__ and about["machine"]["processor"]
    assert data["dense"]["perplexity"] == pytest.approx(math.exp(compared.loss), rel=1e-5)
    for one, row in zip(data["schemes"], compared.rows, strict=True):
        assert one["scheme"] == row.scheme
        if row.failure is not None:
            continue
        for key, value in (
            ("error", row.error),
            ("output_error", row.output_error),
            ("bits", row.bits),
        ):
            assert one[key] == pytest.approx(value, rel=1e-5)
        assert one["bytes"] == row.nbytes and one["layers"].keys() == row.layers.keys()
        assert one["speed"]["linear_1"] == pytest.approx(row.speed.linear_1, rel=1e-5)
    assert data["schemes"][0]["options"] == {"block_size": 64, "double_quant": True}


def test_what_is_no_number_is_null(compared):
    endless = replace(compared, rows=[replace(compared.rows[0], loss=1e4)], loss=math.nan)
    data = endless.to_dict()
    assert data["dense"]["perplexity"] is None and data["schemes"][0]["perplexity"] is None
    json.dumps(data, allow_nan=False)
    assert "–" in str(endless)


def test_pictures_are_small_pngs(compared, tmp_path):
    paths = compared.save(tmp_path / "new" / "folder")
    assert {path.name for path in paths} == FILES == {p.name for p in paths[0].parent.iterdir()}
    page = (tmp_path / "new/folder/report.md").read_text()
    for name in ("error.png", "layers.png"):
        raw = (tmp_path / "new/folder" / name).read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) < 100_000
        width, height = struct.unpack(">II", raw[16:24])
        assert 300 < width < 2200 and 250 < height < 1200
        assert f"]({name})" in page
    assert page.startswith("# Quantizers on a model\n") and "through Q4_1" in page
    assert re.search(r"perplexity\*\* over 37 of the first 40 tokens", page)


def test_every_scheme_is_named_once_in_the_picture(compared):
    from lowrank.report.plots import ERRORS, LAYERS, plots

    figures = plots(compared)
    for axes in figures[ERRORS].axes:
        assert sorted(text.get_text() for text in axes.texts) == ["hqq *", "int8", "nf4"]
    named = [label.get_text() for label in figures[LAYERS].axes[0].get_xticklabels()]
    assert named == ["int8", "hqq", "nf4"]


def test_labels_do_not_cover_one_another():
    from matplotlib.text import Text

    from lowrank.report.plots import ERRORS, plots

    schemes = [f"nf4:block_size={g}" for g in (32, 64, 128)] + ["int4", "fp4", "af4", "fitted"]
    schemes += ["int4_affine", "hqq", "nf4:double_quant=false", "int4:double_quant=false"]
    figure = plots(report({"a.weight": torch.randn(64, 512)}, schemes, speed=False))[ERRORS]
    figure.draw_without_rendering()
    # of the words, without the line to their point
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            width = min(a.x1, b.x1) - max(a.x0, b.x0)
            height = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert width < 2 or height < 4, (a, b)


def test_without_matplotlib_the_tables_are_written(compared, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        paths = compared.save(tmp_path)
    assert {path.name for path in paths} == {"report.md", "report.json"}
    assert "no plots: they need matplotlib: pip install 'lowrank-torch[plots]'" in caplog.text
    assert ".png" not in (tmp_path / "report.md").read_text()


def test_a_full_disk_leaves_what_was_there(compared, tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("older")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        compared.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "older"


def test_an_output_that_is_no_directory(compared, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="output: expected a directory; .*file is a file"):
            compared.save(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=f"output: {tmp_path} cannot be written to"):
        compared.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_failures_are_a_report_too(tmp_path):
    compared = report(nn.Sequential(nn.Linear(4, 4)), {"broken": Broken()})
    assert "`broken` failed: 0: no" in str(compared)
    assert {path.name for path in compared.save(tmp_path)} == {"report.md", "report.json"}


def test_it_is_an_attribute_of_quant():
    assert quant.report is report
    with pytest.raises(AttributeError, match="'lowrank.quant' has no attribute 'reports'"):
        quant.reports  # noqa: B018


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_the_docs_show_what_was_measured(name):
    page = (DOCS / "report" / name / "report.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"(^\| scheme .*?)\n\n- \*\*bits", page, re.DOTALL | re.MULTILINE)
    assert rows in (DOCS / "report.md").read_text(encoding="utf-8")
