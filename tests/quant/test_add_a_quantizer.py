"""docs/add-a-quantizer.md: a short example, a whole list. tests/test_docs.py runs the page."""

import re
from pathlib import Path

from .schemes import NAMES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-quantizer.md"


def test_a_whole_quantizer_takes_less_than_20_lines():
    text = PAGE.read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    assert len([line for line in first.splitlines() if line.strip()]) < 20
    names: dict = {}
    exec(first.replace('"ternary"', '"ternary-of-a-test"'), names)  # it needs nothing else
    assert callable(names["Ternary"]().quantize) and callable(names["Ternary"]().dequantize)


def test_the_page_lists_every_scheme():
    table = PAGE.read_text(encoding="utf-8").split("## The schemes that are there")[1]
    assert set(re.findall(r"`(\w+)`(?=[ ,|])", table)) >= set(NAMES)
