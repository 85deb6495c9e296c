"""Schemes of other packages: found by entry point when they are asked for, or refused in a line."""

import importlib
import sys

import pytest
import torch

from lowrank import QuantLinear, quant
from lowrank.errors import ConfigError

MODULE = '''
import torch
from lowrank import quant

class Halves:
    """A scheme like any other."""
    def quantize(self, weight):
        tensors = {"rounded": weight.half()}
        return quant.Storage(self.name, tuple(weight.shape), weight.dtype, tensors)

    def dequantize(self, storage, dtype=torch.float32):
        return storage["rounded"].to(dtype)

class NoQuantizer:
    pass

if __name__ == "ep_registers":
    quant.register("ep-registered")(Halves)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package of these modules and entry points, as pip would."""

    def install(name, modules, points):
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[lowrank.quantizers]\n{lines}")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    yield install
    for module in [m for m in sys.modules if m.startswith("ep_")]:
        del sys.modules[module]


def test_a_class_is_loaded_when_its_name_is_asked_for(package):
    package("ep_a", {"ep_class": MODULE}, {"ep-halves": "ep_class:Halves"})
    assert "ep-halves" not in quant.names() and "ep_class" not in sys.modules
    quantizer = quant.get("ep-halves")
    assert quantizer.name == "ep-halves" and "ep-halves" in quant.names()
    layer = QuantLinear(8, 4, quantizer="ep-halves")
    assert layer(torch.randn(2, 8)).shape == (2, 4)
    assert type(quant.quantizer_of(layer.storage)) is type(quantizer)


def test_a_module_may_register_it_itself(package):
    package("ep_b", {"ep_registers": MODULE}, {"ep-registered": "ep_registers"})
    assert quant.get("ep-registered").name == "ep-registered"


def test_an_unknown_name_lists_what_is_installed_too(package):
    package("ep_c", {}, {"ep-known": "ep_absent:Halves"})
    with pytest.raises(ConfigError, match=r"expected one of .*ep-known, .*nf4.*; got 'ep-unknown'"):
        quant.get("ep-unknown")


@pytest.mark.parametrize(
    ("point", "match"),
    [
        ("ep_absent:Halves", r"ep_absent:Halves fails to load: ModuleNotFoundError"),
        ("ep_faulty", r"ep_faulty fails to load: ZeroDivisionError"),
        ("ep_bad:Missing", r"ep_bad:Missing fails to load: AttributeError"),
        ("ep_bad:NoQuantizer", r"ep_bad:NoQuantizer to be a class with quantize and dequantize"),
        ("ep_bad:MODULE", r"fails to load: AttributeError"),
        ("ep_bad", r"ep_bad to be a class with quantize and dequantize; got <module"),
    ],
)
def test_what_is_no_quantizer_is_refused_in_one_line(package, point, match):
    package("ep_d", {"ep_bad": MODULE, "ep_faulty": "1 / 0"}, {"ep-wrong": point})
    for _ in range(2):  # and leaves nothing behind
        with pytest.raises(ConfigError, match=match) as error:
            quant.get("ep-wrong")
        assert "\n" not in str(error.value) and str(error.value).startswith("quantizer 'ep-wrong'")
        assert "ep-wrong" not in quant.names()


def test_two_packages_of_one_name_are_refused(package):
    package("ep_e", {"ep_one": MODULE}, {"ep-twice": "ep_one:Halves"})
    package("ep_f", {"ep_two": MODULE}, {"ep-twice": "ep_two:Halves"})
    with pytest.raises(ConfigError, match="expected one entry point; got ep_one.*, ep_two"):
        quant.get("ep-twice")


def test_what_is_built_in_cannot_be_replaced(package):
    package("ep_g", {"ep_nf4": MODULE}, {"nf4": "ep_nf4:Halves"})
    assert isinstance(quant.get("nf4"), quant.CodebookQuantizer)
    assert "ep_nf4" not in sys.modules


def test_a_storage_of_an_unknown_scheme_is_refused_by_name():
    storage = quant.Storage("nf5", (4, 8), torch.float32, {})
    with pytest.raises(ConfigError, match="quantizer: expected one of .*; got 'nf5'"):
        quant.quantizer_of(storage)


def test_a_storage_of_another_scheme_is_named():
    storage = quant.get("nf3").quantize(torch.randn(4, 64))
    with pytest.raises(ConfigError, match=r"expected a tensor 'packed'; got 'nf3', which has plan"):
        quant.get("nf4").dequantize(storage)


def test_a_table_of_ones_own_is_a_scheme_by_two_lines():
    @quant.register("test-table")
    class Table(quant.FixedCodebook):
        table = [i / 15 for i in range(16)]

    storage = Table(block_size=32, double_quant=False).quantize(torch.rand(4, 64))
    assert storage.scheme == "test-table"
    again = quant.quantizer_of(storage)
    assert type(again) is Table and again.options == storage.options
    assert QuantLinear(64, 4, quantizer="test-table")(torch.rand(2, 64)).shape == (2, 4)


def test_an_anonymous_table_is_read_back_from_its_storage():
    table = torch.rand(4, 16) * 2 - 1
    storage = quant.get("codebook", codebook=table, block_size=128).quantize(torch.randn(4, 200))
    again = quant.quantizer_of(storage)
    assert torch.equal(again.codebook, table) and again.options == storage.options
    with pytest.raises(
        ConfigError,
        match="expected its option codebook, which has no",
    ):
        quant.get("codebook")


@pytest.mark.parametrize("name", ["weight", "bias", "half", "in_features", "storage", "forward"])
def test_a_tensor_named_as_an_attribute_is_refused_by_name(name):
    storage = quant.Storage(
        "own", (4, 8), torch.float32, {"codes": torch.zeros(4), name: torch.ones(4)}
    )
    layer = QuantLinear(8, 4)
    before = layer.storage
    with pytest.raises(ConfigError, match=f"storage: expected tensors not named .*; got '{name}'"):
        layer.storage = storage
    assert layer.storage.tensors.keys() == before.tensors.keys()
