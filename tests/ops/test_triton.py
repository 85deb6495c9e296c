"""The Triton kernels without a GPU: interpreted, each in a process of its own.

That they compile for real GPUs is in tests/kernels; what they do there, in test_triton_gpu.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def interpreted(name: str, *arguments) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.ops.interpreted_{name}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_interpreted_dequantize_equals_the_reference(seed):
    assert interpreted("dequantize", seed) == "96 cases equal\n"


def test_interpreted_quantize_equals_the_reference(seed):
    assert interpreted("quantize", seed) == "72 cases equal\n"


def test_interpreted_products_are_near_float64(seed):
    assert interpreted("linear", seed) == "30 cases right\n"


def test_interpreted_adamw8bit_equals_the_reference(seed):
    assert interpreted("adamw8bit", seed) == "all steps equal\n"


def test_interpreted_lion8bit_equals_the_reference(seed):
    assert interpreted("lion8bit", seed) == "all steps equal\n"


def test_interpreted_cross_entropy_is_near_float64(seed):
    assert interpreted("cross_entropy", seed) == "all right\n"


def test_interpreted_lora_is_near_float64_and_drops_what_the_reference_drops(seed):
    assert interpreted("lora", seed) == "24 cases right\n"


def test_the_interpreter_still_needs_what_works_around_it():
    """The day this fails, DOT can go from the kernels, and bfloat16 have its real tolerance."""
    assert interpreted("bfloat16") == "dot: wrong\ncast: wrong\n"


@pytest.mark.parametrize(
    "op", ["codebook_linear", "adamw8bit_step", "lion8bit_step", "linear_cross_entropy"]
)
def test_explain_names_triton_for_all_of_a_training_step(op):
    from lowrank import ops

    assert "triton: has no" not in ops.explain(op) and "\n  triton: " in ops.explain(op)


def test_refuses_what_is_not_on_one_gpu():
    from lowrank.ops import triton as backend

    p = torch.zeros(1)
    lists = [[tensor] for tensor in (p, p, p, p, p, p)]
    assert "on cpu" in backend.refuse("adamw8bit_step", *lists, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    assert "on cpu" in backend.refuse("linear_cross_entropy", p[None], p[None], p.long(), True)


def test_refuses_a_cpu_tensor_with_a_reason():
    from lowrank.ops import triton as backend

    assert (
        backend.refuse("codebook_linear", torch.zeros(1)) == "runs on CUDA tensors; got one on cpu"
    )


def test_scratch_is_one_buffer_that_grows():
    from lowrank.ops.scratch import scratch

    cpu = torch.device("cpu")
    with scratch((4, 8), torch.float32, cpu) as w:
        assert w.shape == (4, 8) and w.dtype == torch.float32 and w.is_contiguous()
    with scratch((64, 32), torch.bfloat16, cpu) as w:
        assert w.shape == (64, 32) and w.dtype == torch.bfloat16
        largest = w.data_ptr()
    with scratch((3, 5), torch.float16, cpu) as w:
        assert w.shape == (3, 5) and w.data_ptr() == largest
