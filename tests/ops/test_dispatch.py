"""Which backend runs: by preference, by name, and why not."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank import ops
from lowrank.errors import BackendError, ConfigError, LowrankError
from tests.ops.weights import random_weight


def arguments(dtype=torch.float32):
    return (torch.randn(2, 64, dtype=dtype), *random_weight(8, 64), None, 64)


def test_explain_names_every_backend_and_its_reason():
    text = ops.explain("codebook_linear", *arguments())
    assert text.startswith("codebook_linear on cpu\n")
    assert "reference: " in text and "cpu: " in text and ": runs" in text
    text = ops.explain("codebook_linear")
    assert all(f"  {name}: " in text for name in ("cpu", "triton", "cuda", "reference"))
    for name in ("triton", "cuda"):
        assert (f"  {name}: here" in text) <= torch.cuda.is_available()


def test_float64_runs_on_the_reference_and_the_cpu_backend_says_why_not():
    args = arguments(torch.float64)
    text = ops.explain("codebook_linear", *args)
    assert "cpu: refuses: " in text and "reference: runs" in text
    assert torch.ops.lowrank.codebook_linear(*args).dtype == torch.float64


def test_a_backend_asked_for_by_name_raises_its_reason():
    args = arguments(torch.float64)
    with (
        ops.use_backend("cpu"),
        pytest.raises(BackendError, match="codebook_linear: backend 'cpu'"),
    ):
        torch.ops.lowrank.codebook_linear(*args)
    with ops.use_backend("triton"), pytest.raises(BackendError, match="'triton'.*refuses: "):
        torch.ops.lowrank.codebook_linear(*arguments())


def test_use_backend_holds_inside_the_block_and_nests():
    args = arguments()
    with ops.use_backend("reference"):
        assert "asked for by name" in ops.explain("codebook_linear", *args)
        with ops.use_backend(None):
            assert "asked for by name)" not in ops.explain("codebook_linear", *args)
        text = ops.explain("codebook_linear", *args)
        assert "reference: runs" in text and "cpu: " not in text
    assert "asked for by name)" not in ops.explain("codebook_linear", *args)
    with pytest.raises(ZeroDivisionError), ops.use_backend("reference"):
        raise ZeroDivisionError
    assert "asked for by name)" not in ops.explain("codebook_linear", *args)


def test_use_backend_as_a_call_holds_until_the_next():
    ops.use_backend("reference")
    try:
        assert "('reference' was asked for by name)" in ops.explain("codebook_linear", *arguments())
    finally:
        ops.use_backend(None)


def test_the_choice_is_made_at_run_time_in_a_compiled_graph():
    args = arguments(torch.float64)
    compiled = torch.compile(
        lambda *a: torch.ops.lowrank.codebook_linear(*a), fullgraph=True, backend="eager"
    )
    compiled(*args)
    with ops.use_backend("cpu"), pytest.raises(BackendError):
        compiled(*args)


def test_bad_names_and_arguments():
    with pytest.raises(ConfigError, match="backend: expected one of cpu, .*reference; got 'gpu'"):
        ops.use_backend("gpu")
    with pytest.raises(ConfigError, match="op: expected one of .*codebook_linear.*; got 'linear'"):
        ops.explain("linear")
    with pytest.raises(ConfigError, match="expected 7 arguments or none; got 1"):
        ops.explain("codebook_linear", torch.randn(3))
    with pytest.raises(ConfigError, match="codebook: expected a tensor; got None"):
        x, packed, absmax, _, *_ = arguments()
        ops.explain("codebook_linear", x, packed, absmax, None, None, None, 64)


@pytest.mark.parametrize("name", ["reference", "nothing"])
def test_the_environment_names_the_backend(name):
    code = (
        "import torch; from lowrank import ops; args = torch.ones(1, 64), torch.ones(1, 16), 64\n"
        "ops.codebook_quantize(*args); print(ops.explain('codebook_quantize', *args))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LOWRANK_BACKEND": name, "PYTHONPATH": ":".join(p or "." for p in sys.path)},
        capture_output=True,
        text=True,
    )
    if name == "reference":
        assert done.returncode == 0 and "'reference' was asked for by name" in done.stdout
    else:
        assert "ConfigError: backend: expected one of cpu, " in done.stderr
        assert "got 'nothing'" in done.stderr


# None: Triton is not there; ModuleType: one without what ours is written in.
@pytest.mark.parametrize("triton", ["None", "types.ModuleType('triton')"])
def test_a_missing_backend_is_a_reason_and_not_an_error(triton):
    code = (
        "import sys, types, torch; from lowrank import ops;"
        f"sys.modules['triton'] = sys.modules['triton.language'] = {triton};"
        "print(ops.explain('codebook_linear'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(p or "." for p in sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "triton: cannot be imported" in done.stdout


class Seen(TorchDispatchMode):
    """Counts the calls of codebook_linear that come by."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.lowrank.codebook_linear.default
        return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass of the plainest kind: what its __torch_function__ sees, it notes."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += func is torch.ops.lowrank.codebook_linear.default
        return super().__torch_function__(func, types, args, kwargs)


def test_modes_profilers_and_subclasses_see_the_call():
    x, *weight, bias, block_size = arguments()
    ops.codebook_linear(x, *weight)
    with Seen() as mode:
        ops.codebook_linear(x, *weight)
    assert mode.calls == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.codebook_linear(x, *weight)
    assert any(event.key == "lowrank::codebook_linear" for event in profile.key_averages())
    ops.codebook_linear(x.as_subclass(Named), *weight)
    assert Named.seen == 1


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_of_another_kind_are_what_they_stand_for(inference):
    with torch.inference_mode(inference):
        x, *weight, bias, block_size = arguments()
        y = ops.codebook_linear(x, *weight)
        assert y.is_inference() == inference
        assert torch.equal(ops.codebook_linear(torch._neg_view(x), *weight), -y)
        assert torch.equal(ops.codebook_linear(torch._efficientzerotensor(2, 64), *weight), 0 * y)
        meta = [None if t is None else t.to("meta") for t in (x, *weight)]
        assert ops.codebook_linear(*meta).device.type == "meta"


def test_what_is_wrong_is_told_without_gradients_too():
    x, packed, absmax, scale, codebook, bias, block_size = arguments()
    wrong = [
        (x, packed, absmax.clone().requires_grad_(), scale, codebook),
        (x, packed, absmax, scale, codebook, torch.randn(8).bfloat16()),
        (x, packed, absmax, scale, codebook, None, 64.0),
        (x, packed, absmax, scale, codebook, None, True),
        (x.tolist(), packed, absmax, scale, codebook),
        (x[:, :32], packed, absmax, scale, codebook),
        (x, packed, absmax, scale, codebook.tolist()),
    ]
    for call in wrong:
        with torch.no_grad(), pytest.raises(LowrankError):
            ops.codebook_linear(*call)
