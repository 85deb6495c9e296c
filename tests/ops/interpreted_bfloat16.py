"""Run by test_triton.py in its own process: what the interpreter gets wrong in bfloat16."""

from __future__ import annotations

import os

import torch


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(a_ptr, b_ptr, out_ptr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

    @triton.jit
    def cast(x_ptr, out_ptr):
        at = tl.arange(0, 16)
        tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))

    a, b = torch.ones(16, 16).bfloat16(), torch.ones(16, 16).bfloat16()
    product = torch.zeros(16, 16)
    multiply[(1,)](a, b, product)
    print("dot:", "right" if torch.equal(product, a.float() @ b.float()) else "wrong")

    x, rounded = torch.full((16,), 1 + 2**-8 + 2**-9), torch.zeros(16).bfloat16()
    cast[(1,)](x, rounded)
    print("cast:", "right" if torch.equal(rounded, x.bfloat16()) else "wrong")


if __name__ == "__main__":
    main()
