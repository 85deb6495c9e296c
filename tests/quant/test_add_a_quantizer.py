"""docs/add-a-quantizer.md: a short example, a whole list. tests/test_docs.py runs the page."""

import re
from pathlib import Path

import torch

from lowrank import quant

from .schemes import NAMES, make, required, variants

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-quantizer.md"


def test_a_whole_quantizer_takes_less_than_20_lines():
    text = PAGE.read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    assert len([line for line in first.splitlines() if line.strip()]) < 20
    names: dict = {}
    exec(first.replace('"ternary"', '"ternary-of-a-test"'), names)  # it needs nothing else
    assert callable(names["Ternary"]().quantize) and callable(names["Ternary"]().dequantize)


def bits(quantizer: quant.Quantizer) -> float:
    weight = torch.empty(4096, 4096, device="meta")
    return round(quantizer.quantize(weight).bits_per_parameter, 2)


def test_the_tables_bits_are_what_schemes_take():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| (.*) \| ([\d., ]+) \| .*\|$", page, re.MULTILINE)
    small, default = {}, {}
    for names, text, several in rows:
        for name, written in zip(re.findall(r"\w+", names), several.split(", "), strict=True):
            plain = re.search(r"scales plain by default: ([\d.]+)", text)
            small[name], default[name] = float(written), float(plain[1] if plain else written)
    assert set(small) == set(NAMES) - {"none"}
    for name in small:
        assert bits(quant.get(name, **required(name))) == default[name], name
        for variant in variants(double_quant=True, per="tensor"):
            assert variant[0] != name or bits(make(variant)) == small[name], name


def test_the_page_lists_every_scheme():
    table = PAGE.read_text(encoding="utf-8").split("## The schemes that are there")[1]
    assert set(re.findall(r"`(\w+)`(?=[ ,|])", table)) >= set(NAMES)
