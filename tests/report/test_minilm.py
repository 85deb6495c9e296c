"""Errors on weights that no quantizer has touched: the 36 linear layers of all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lowrank import quant
from lowrank.report import Report
from lowrank.report.weights import WeightFiles
from tests.quant.schemes import label, variants

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "report.md"

# Relative RMSE at block size 64 (int8_blockwise: 256), without quantized scales.
EXPECTED = {"nf4": 0.0939, "int4": 0.1147, "fp4": 0.1271, "af4": 0.0973, "int4_affine": 0.0938}
EXPECTED |= {"hqq": 0.0895, "fitted-tensor": 0.0905, "fitted-row": 0.0856, "nf3": 0.2057}
EXPECTED |= {
    "flat-nf4": 0.0939,
    "flat-fp4": 0.1271,
    "nf2": 0.5696,
    "int8": 0.0100,
    "int8_blockwise": 0.0113,
    "none": 0,
}

VARIANTS = [variant for variant in variants() if variant[0] != "codebook"]


@pytest.fixture(scope="module")
def compared(minilm) -> Report:
    schemes = {label(variant): quant.get(variant[0], **variant[1]) for variant in VARIANTS}
    return quant.report(WeightFiles(minilm), schemes, skip=["pooler.dense"], speed=False)


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_error_of_each_scheme(variant, compared):
    name, options = variant
    (row,) = [row for row in compared.rows if row.scheme == label(variant)]
    key = "-".join([name, *(options[k] for k in ("per", "quant_type") if k in options)])
    assert row.error == pytest.approx(EXPECTED[key], abs=1e-4) and len(row.layers) == 36


def test_the_order_of_the_qlora_paper(compared):
    errors = {row.scheme: round(row.error, 3) for row in compared.rows}
    assert [errors[f"{name}-False"] for name in ("nf4", "int4", "fp4")] == [0.094, 0.115, 0.127]


def test_scales_in_8_bits_cost_no_more_than_qloras(compared, minilm):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    (row,) = [row for row in compared.rows if row.scheme == "nf4-True"]
    weights, theirs = load_file(minilm), 0.0
    for name in row.layers:
        w = weights[f"{name}.weight"]
        packed, state = bnb.functional.quantize_4bit(
            w, quant_type="nf4", blocksize=64, compress_statistics=True
        )
        theirs += (bnb.functional.dequantize_4bit(packed, state) - w).double().square().sum().item()
    assert sum(layer.square_error for layer in row.layers.values()) <= theirs


def test_the_pages_example_gives_the_pages_numbers(minilm, data_dir, tmp_path, monkeypatch):
    """Weights and activations, by transformers' model; the times are the machine's."""
    pytest.importorskip("transformers", reason="the example's model; pip install transformers")
    (example,) = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "all-MiniLM-L6-v2").symlink_to(minilm.parent)
    (tmp_path / "wikitext2_valid.txt").symlink_to(data_dir / "wikitext2_valid.txt")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, PAGE.name, "exec"), {})
    written = tmp_path / "docs" / "report" / "minilm" / "report.json"
    there = PAGE.parent / "report" / "minilm" / "report.json"
    new, old = (json.loads(path.read_text())["schemes"] for path in (written, there))
    assert [one["scheme"] for one in new] == [one["scheme"] for one in old]
    for a, b in zip(new, old, strict=True):
        assert a["bits"] == b["bits"] and a["error"] == pytest.approx(b["error"], rel=1e-4)
        assert a["output_error"] == pytest.approx(b["output_error"], rel=1e-3)
