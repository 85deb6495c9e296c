"""No kernel multiplies a row by a stride in 32 bits: tensors may exceed 2^31 elements.

Read in Triton's own intermediate form, where each operation has its type.
"""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks import kernel_cases  # noqa: E402

KERNELS = {case.kernel.__name__: case for case in reversed(list(kernel_cases.cases()))}

_CONSTANT = re.compile(r"(%\w+) = arith\.constant (?:dense<)?(-?\d+)")
_SAME_VALUE = re.compile(r"(%\w+) = (?:tt\.(?:splat|expand_dims|broadcast|reshape)) (%\w+)")
_PRODUCT = re.compile(r"= arith\.muli (%\w+), (%\w+) : (?:i32|tensor<[\dx]*xi32>)")


def products_in_32_bits(case: kernel_cases.Case) -> list[str]:
    """Products of two numbers of run time, or of one and the case's K: those that may overflow.

    What is multiplied by another constant is a program's number and the size of its tile, which
    make an index in a row or a row's number, and no dimension has 2^31.
    """
    options = {k: v for k, v in case.constants.items() if k in kernel_cases.OPTIONS}
    compiled = triton.compile(case.source(), target=GPUTarget("cuda", 80, 32), options=options)
    text = compiled.asm["ttir"]
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    same = dict(_SAME_VALUE.findall(text))
    wrong = []
    for product in _PRODUCT.finditer(text):
        values = []
        for name in product.groups():
            while name in same:
                name = same[name]
            values.append(constants.get(name))
        strides = [v for v in values if v is None or v == case.constants.get("K")]
        if len(strides) == 2:
            wrong.append(product.group())
    return wrong


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_addressed_in_64_bits(name):
    assert products_in_32_bits(KERNELS[name]) == []


@triton.jit
def by_a_stride(x_ptr, out_ptr, x_stride, WIDE: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    tl.store(out_ptr + m, tl.load(x_ptr + m * x_stride))


@triton.jit
def by_a_constant(x_ptr, out_ptr, K: tl.constexpr, WIDE: tl.constexpr):
    m = tl.program_id(0) * 4 + tl.arange(0, 4)
    m = m.to(tl.int64) if WIDE else m
    tl.store(out_ptr + m, tl.load(x_ptr + m * K))


@pytest.mark.parametrize("kernel", [by_a_stride, by_a_constant])
def test_the_check_sees_a_product_in_32_bits(kernel):
    for wide in (False, True):
        constants = {"WIDE": wide} | ({"K": 4096} if kernel is by_a_constant else {})
        case = kernel_cases.Case("sample", kernel, "fp32", False, constants)
        assert bool(products_in_32_bits(case)) is not wide
