"""Run once when the CPU library is loaded: does each kernel give what the generic one gives?

An instruction set may have been built wrong, or be emulated wrong. Every function that computes
takes a small ragged problem on the generic set and on another; where they differ, the other is
refused. Nothing here is a tensor: no mode, device or seed that torch was set to plays a part.
"""

from __future__ import annotations

import ctypes
import random
import struct
from functools import cache

from . import native

N, K, G, BLOCKS, PACKED = 3, 75, 32, 3, 48  # a weight: three blocks a row, the last of 11
COLUMNS = 300  # of a parameter of AdamW: two blocks, the last of 44
FORMATS = {0: "f", 1: "e", 2: "H"}  # of `struct`, for each lowrank_dtype; bfloat16 by its bits
# What another order of a sum, or a fused multiply-add, may change; then the rounding to the dtype.
SUMS = {0: 1e-5, 1: 2**-9, 2: 2**-6}

Record = tuple[str, float, list[float]]  # function, tolerance, what it gave


def wrong_function(library: ctypes.CDLL, isa: int) -> str | None:
    """The first function that is wrong on this instruction set, which stays in use."""
    library.lowrank_use_isa(0)
    expected = _records(library)
    library.lowrank_use_isa(isa)
    for (name, tolerance, right), (_, _, got) in zip(expected, _records(library), strict=True):
        if right != got and not _near(right, got, tolerance):
            return name
    return None


def _records(library: ctypes.CDLL) -> list[Record]:
    """What every function gives on the instruction set in use, of the same input each time."""
    rng, records = random.Random(1), []

    def call(name: str, tolerance: float, arguments: tuple, *outputs: bytearray, dtype=0) -> None:
        pointers = [_pointer(a) if isinstance(a, bytes | bytearray) else a for a in arguments]
        values = [float(getattr(library, f"lowrank_{name}")(*pointers, 1))]
        for output in outputs:
            values += _unpacked(output, dtype)
        records.append((name, tolerance, values))

    def uniform(count: int, dtype: int = 0) -> bytearray:
        return _packed([2 * rng.random() - 1 for _ in range(count)], dtype)

    scales, table = uniform(2 * N), uniform(16 * N)
    weight = (rng.randbytes(N * PACKED), rng.randbytes(N * BLOCKS), scales, table, N, N, K, G)
    one_table = (*weight[:4], 1, N, K, G)
    rows = ctypes.byref(native.Rows(None, 1, 2, N))
    by_chance = native.Dropout(rng.getrandbits(60), 1 << 30, 4 / 3)
    dropout = ctypes.byref(by_chance)
    by = native.Adamw8bitCoefficients(0.9, 0.1, 0.99, 0.01, 0.999, 0.01, 1.5, 1e-8)
    of_lion = ctypes.byref(native.Lion8bitCoefficients(0.9, 0.1, 0.99, 0.01, 0.999, 0.01))
    maps = [_packed(_moments(signed)) for signed in (True, False)]
    for dtype, size in ((0, 4), (1, 2), (2, 2)):
        x = uniform(17 * K, dtype)
        codes, absmax = bytearray(N * PACKED), bytearray(4 * N * BLOCKS)
        call("codebook_quantize", 0, (x, dtype, N, K, K, table, N, G, codes, absmax), absmax)
        records.append(("codebook_quantize", 0, list(codes)))
        y = bytearray(size * N * K)
        call("codebook_dequantize", 0, (*weight, 0, N, y, dtype), y, dtype=dtype)
        y = bytearray(size * N * (K - 32))
        call("codebook_dequantize_columns", 0, (*weight, 32, K, y, dtype), y, dtype=dtype)
        for name in ("codebook_linear", "codebook_linear_int16"):
            for M, of in ((1, one_table), (2, weight), (5, one_table), (17, weight)):
                y = bytearray(size * M * N)
                arguments = (x, dtype, M, *of, None, y)
                call(name, SUMS[dtype], arguments, y, dtype=dtype)
        A, B, h = uniform(5 * K), uniform(N * 5), bytearray(4 * 17 * 5)
        y, of_lora = bytearray(size * 17 * N), [_pointer(b) for b in (A, B, h)]
        addresses = [ctypes.addressof(pointer) for pointer in of_lora]
        lora = native.Lora(*addresses, 5, 0.5, ctypes.addressof(by_chance))
        arguments = (x, dtype, 17, *one_table, None, ctypes.byref(lora), y)
        call("codebook_lora_linear", SUMS[dtype], arguments, y, dtype=dtype)
        records.append(("codebook_lora_linear", SUMS[0], _unpacked(h)))
        if dtype == 0:
            lora = native.Lora(*addresses, 5, 0.5, None)
            dx, dA, dB = (bytearray(4 * count) for count in (17 * K, 5 * K, N * 5))
            arguments = (uniform(17 * N), x, 17, *one_table, ctypes.byref(lora), dx, 0, dA, dB)
            call("codebook_lora_backward", SUMS[0], arguments, dx, dA, dB)
        ys = [bytearray(size * 2 * N) for _ in range(2)]
        given = [_pointer(b) for b in (*one_table[:4], A, B, *ys)]
        at = [ctypes.addressof(pointer) for pointer in given]
        to = (ctypes.c_void_p * 2)(*at[6:])
        two = (native.Product * 2)(
            native.Product(*at[:4], 1, N, G, None, None, None, 0, 0),
            native.Product(*at[:4], 1, N, G, None, at[4], at[5], 5, 0.5),
        )
        call("codebook_products", SUMS[dtype], (x, dtype, 2, K, two, 2, to), *ys, dtype=dtype)
        # two texts of 4 heads over 2, 7 of 19 elements; the third of 5 positions is the newest
        q, keys, values = (uniform(2 * n * 19, dtype) for n in (4, 5 * 2, 5 * 2))
        angles = [_pointer(b) for b in (uniform(6, dtype), uniform(3, dtype), bytes([1, 0, 1] * 2))]
        at = [ctypes.addressof(pointer) for pointer in angles]
        newest = native.Newest(*at, 0, 0, 3, 2, 4, 2, 19, 6, 5, 2, 0, 0.3, 2)
        of_heads, out = (ctypes.c_int64 * 6)(76, 19, 38, 19, 38, 19), bytearray(size * 2 * 4 * 19)
        arguments = (ctypes.byref(newest), q, q, q, of_heads, dtype, keys, values, out)
        call("attend_newest", SUMS[dtype], arguments, out, keys, values, dtype=dtype)
        panel = bytearray(4 * 2 * K)
        call("gather_rows", 0, (x, dtype, K, K, rows, dropout, panel), panel)
        call("scatter_rows", 0, (panel, K, rows, dropout, 1, x, dtype, K), x, dtype=dtype)
        y, rstd, dweight = bytearray(size * N * K), bytearray(4 * N), bytearray(4 * K)
        arguments = (x, dtype, N, K, A, 0, 1, 1e-5, y, rstd)
        call("rms_norm", SUMS[dtype], arguments, y, dtype=dtype)
        records.append(("rms_norm", SUMS[0], _unpacked(rstd)))
        dy, dx, dup = uniform(N * K, dtype), bytearray(size * N * K), bytearray(size * N * K)
        arguments = (dy, x, dtype, N, K, A, 0, 0, rstd, dx, dweight)
        call("rms_norm_backward", 2 * SUMS[dtype], arguments, dx, dtype=dtype)
        records.append(("rms_norm_backward", SUMS[0], _unpacked(dweight)))
        of_heads = [_pointer(b) for b in (x, dy, uniform(34), uniform(17))]
        data, other, cos, sin = (ctypes.addressof(pointer) for pointer in of_heads)
        angles = ctypes.byref(native.Angles(cos, sin, 1, 34, 0))
        heads = native.Heads(data, 1, 1, 2, 37, 0, 0, 38)
        y = bytearray(size * 2 * 37)
        call("rotate", SUMS[dtype], (ctypes.byref(heads), dtype, angles, 1, y), y, dtype=dtype)
        for activation in (0, 1):
            gate = ctypes.byref(native.Gate(data, other, N, K, K + 2, K, dtype, activation))
            y = bytearray(size * N * K)
            call("gated", SUMS[dtype], (gate, y), y, dtype=dtype)
            call("gated_backward", SUMS[dtype], (gate, dy, dx, dup), dx, dup, dtype=dtype)
        p, g = uniform(COLUMNS, dtype), uniform(COLUMNS, dtype)
        m, v = bytearray(rng.randbytes(COLUMNS)), bytearray(rng.randbytes(COLUMNS))
        m_scale, v_scale = _packed([0.5, 0.25]), _packed([0.5, 0.25])
        pointers = [_pointer(b) for b in (p, g, m, v, m_scale, v_scale)]
        addresses = [ctypes.addressof(pointer) for pointer in pointers]
        tensor = native.Moments8bitTensor(*addresses, 1, COLUMNS, dtype)
        arguments = (ctypes.byref(tensor), 1, *maps, ctypes.byref(by))
        call("adamw8bit_step", SUMS[dtype], arguments, p, dtype=dtype)
        call_scales = [*_unpacked(m_scale), *_unpacked(v_scale)]
        records.append(("adamw8bit_step", 0, [*m, *v, *call_scales]))
        call(
            "lion8bit_step",
            SUMS[dtype],
            (ctypes.byref(tensor), 1, maps[0], of_lion),
            p,
            dtype=dtype,
        )
        records.append(("lion8bit_step", 0, [*m, *_unpacked(m_scale)]))
    logits, loss = uniform(2 * K), bytearray(4 * 2)
    labels = struct.pack("2q", 3, K - 1)
    call("softmax_cross_entropy", SUMS[0], (logits, labels, 2, K, loss, 1), logits, loss)
    return records


def _near(right: list[float], got: list[float], tolerance: float) -> bool:
    pairs = zip(right, got, strict=True)
    return all(abs(a - b) <= tolerance * max(1.0, abs(a)) for a, b in pairs)


@cache
def _moments(signed: bool) -> list[float]:
    """256 ascending values as `adamw8bit.dynamic_map` has them, for a moment of either kind."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade + (not signed))
        for i in range(count):
            value = (0.1 + 0.9 * (i + 0.5) / count) * 10.0 ** (decade - 6)
            values += [value, -value] if signed else [value]
    return sorted(values)


def _packed(values: list[float], dtype: int = 0) -> bytearray:
    if dtype == 2:
        words = struct.unpack(f"{len(values)}I", struct.pack(f"{len(values)}f", *values))
        values = [word >> 16 for word in words]
    return bytearray(struct.pack(f"{len(values)}{FORMATS[dtype]}", *values))


def _unpacked(data: bytearray, dtype: int = 0) -> list[float]:
    count = len(data) // struct.calcsize(FORMATS[dtype])
    values = struct.unpack(f"{count}{FORMATS[dtype]}", data)
    if dtype == 2:
        bits = struct.pack(f"{count}I", *(word << 16 for word in values))
        values = struct.unpack(f"{count}f", bits)
    return list(values)


def _pointer(data: bytes | bytearray) -> ctypes.Array:
    """What a C function reads and writes in place of it."""
    of = ctypes.c_char * len(data)
    return of.from_buffer(data) if isinstance(data, bytearray) else of.from_buffer_copy(data)
