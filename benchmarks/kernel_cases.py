"""Every Triton kernel in every tile that the launchers choose: what is compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import triton
import triton.language as tl
from triton.compiler import ASTSource

from lowrank.kernels import configs, lora_configs
from lowrank.kernels.adamw8bit import adamw8bit_kernel
from lowrank.kernels.codebook_dequantize import codebook_dequantize_kernel
from lowrank.kernels.codebook_linear import codebook_linear_kernel, codebook_linear_row_kernel
from lowrank.kernels.codebook_linear_dx import codebook_linear_dx_kernel, sum_parts_kernel
from lowrank.kernels.codebook_quantize import codebook_quantize_kernel
from lowrank.kernels.lion8bit import lion8bit_kernel
from lowrank.kernels.lora_linear import lora_expand_kernel, lora_shrink_kernel
from lowrank.kernels.lora_linear_backward import lora_dx_kernel, lora_dy_kernel, lora_sum_kernel
from lowrank.kernels.softmax_cross_entropy import softmax_cross_entropy_kernel

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}

FIXED_TYPES = {
    "packed_ptr": "*u8",
    "scale_ptr": "*fp32",
    "codebook_ptr": "*fp32",
    "mids_ptr": "*fp32",
    "order_ptr": "*i32",
    "parts_ptr": "*fp32",
    "addend_ptr": "*fp32",
    "h_ptr": "*fp32",
    "g_ptr": "*fp32",
    "da_ptr": "*fp32",
    "db_ptr": "*fp32",
    "offsets_ptr": "*i32",
    "seed_ptr": "*i64",
    "scale": "fp32",
    "factor": "fp32",
    "keep_scale": "fp32",
}
NOT_DIVISIBLE = {"M", "E", "least_kept", "parts", "tensors"}  # by 16: as many as there are


@dataclass
class Case:
    """A kernel as it is launched: the type of its tensors, its constants and its options."""

    name: str
    kernel: object
    dtype: str
    double_quant: bool
    constants: dict
    aligned: bool = True  # 16 divides the pointers, K and the strides, as in every real model
    tensor_cores: bool = False
    types: dict = field(default_factory=dict)  # of arguments that are not what they mostly are

    def source(self) -> ASTSource:
        """What the launcher's call would compile."""
        constants = {k: v for k, v in self.constants.items() if k not in OPTIONS}
        names = list(self.kernel.arg_names)
        if "scale_ptr" in names and not self.double_quant:
            constants["scale_ptr"] = None
        absent = {p.name: p.default for p in self.kernel.params if p.has_default}
        constants = {n: v for n, v in absent.items() if n not in self.types} | constants
        signature = {n: "constexpr" if n in constants else self._type(n) for n in names}
        divisible = [
            name
            for name, type_ in signature.items()
            if name == "row_bytes"
            or (self.aligned and type_[0] in "*i" and name not in NOT_DIVISIBLE)
        ]
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
        )

    def _type(self, name: str) -> str:
        if name in self.types:
            return self.types[name]
        if not name.endswith("_ptr"):
            return FIXED_TYPES.get(name, "i32")
        if name == "absmax_ptr":
            quantizes = self.kernel is codebook_quantize_kernel
            return "*u8" if self.double_quant and not quantizes else "*fp32"
        return FIXED_TYPES.get(name, f"*{self.dtype}")


def cases() -> Iterator[Case]:
    """Every kernel in every tile that the launchers choose, and what a model rarely has."""
    for dtype in DTYPES:
        yield _quantize(dtype, 64)
        for double_quant in (False, True):
            yield _dequantize(dtype, double_quant)
            yield _linear(1, dtype, double_quant)
        for M in (16,) if dtype == "fp32" else (16, 32, 64):
            yield _linear(M, dtype)
            yield _linear_dx(M, dtype)
    yield _quantize("bf16", 4096)
    for M in (1, 16, 32, 64):
        for G in (32, 128):
            yield _linear(M, "bf16", G=G)
        yield _linear(M, "bf16", per_row=True)
        yield _linear(M, "bf16", K=4095, aligned=False)
    for M in (16, 64):
        for G in (32, 128):
            yield _linear_dx(M, "bf16", G=G)
        yield _linear_dx(M, "bf16", per_row=True)
        yield _linear_dx(M, "bf16", aligned=False)
    yield _adamw8bit()
    yield _lion8bit()
    for dtype in DTYPES:
        yield _softmax_cross_entropy(dtype, 128256)
    yield _softmax_cross_entropy("bf16", 50257)
    yield _softmax_cross_entropy("fp32", 128256, gradient=False)
    yield from lora_cases()
    yield Case("sum_parts", sum_parts_kernel, "bf16", False, {"PARTS": 8, "BLOCK": 1024})


def _quantize(dtype: str, G: int) -> Case:
    constants = configs.quantize(4096, G) | {"PER_ROW": False}
    return Case(f"codebook_quantize G={G}", codebook_quantize_kernel, dtype, False, constants)


def _dequantize(dtype: str, double_quant: bool) -> Case:
    name = "codebook_dequantize" + _suffix(64, double_quant)
    constants = configs.dequantize(4096, 64)
    return Case(name, codebook_dequantize_kernel, dtype, double_quant, constants)


def _linear(
    M: int,
    dtype: str,
    double_quant: bool = True,
    K: int = 4096,
    G: int = 64,
    per_row: bool = False,
    aligned: bool = True,
) -> Case:
    name = f"codebook_linear M={M}" + _suffix(G, double_quant, per_row, aligned)
    shared = {"K": K, "PER_ROW": per_row}
    if M == 1:
        constants = configs.linear_row(K, G) | shared
        return Case(name, codebook_linear_row_kernel, dtype, double_quant, constants, aligned)
    constants = configs.linear(M, K, G, dtype == "fp32") | shared | {"DOT": DTYPES[dtype]}
    on_tensor_cores = dtype != "fp32"
    return Case(
        name, codebook_linear_kernel, dtype, double_quant, constants, aligned, on_tensor_cores
    )


def _linear_dx(
    M: int, dtype: str, G: int = 64, per_row: bool = False, aligned: bool = True
) -> Case:
    name = f"codebook_linear_dx M={M}" + _suffix(G, True, per_row, aligned)
    on_tensor_cores = dtype != "fp32"
    constants = configs.linear_dx(M, G, not on_tensor_cores)
    constants |= {"PART": 512, "PER_ROW": per_row, "DOT": DTYPES[dtype]}
    return Case(name, codebook_linear_dx_kernel, dtype, True, constants, aligned, on_tensor_cores)


def _adamw8bit() -> Case:
    """The parameters of a model with LoRA, of all dtypes."""
    types = {"table_ptr": "*i64", "maps_ptr": "*i32"} | dict.fromkeys(
        ("beta1", "rest1", "beta2", "rest2", "decay", "rate", "root2", "eps", "below"), "fp32"
    )
    return Case("adamw8bit", adamw8bit_kernel, "all", False, configs.adamw8bit(448), types=types)


def _lion8bit() -> Case:
    types = {"table_ptr": "*i64", "maps_ptr": "*i32"} | dict.fromkeys(
        ("beta1", "rest1", "beta2", "rest2", "decay", "rate", "below"), "fp32"
    )
    return Case("lion8bit", lion8bit_kernel, "all", False, configs.lion8bit(448), types=types)


def _softmax_cross_entropy(dtype: str, V: int, gradient: bool = True) -> Case:
    types = {"logits_ptr": "*fp32", "labels_ptr": "*i64", "losses_ptr": "*fp32", "scale": "fp32"}
    constants = configs.softmax_cross_entropy(V) | {"GRADIENT": gradient}
    name = f"softmax_cross_entropy V={V}" + ("" if gradient else ", the loss alone")
    kernel = softmax_cross_entropy_kernel
    return Case(name, kernel, dtype, False, constants, aligned=V % 16 == 0, types=types)


def lora_cases() -> Iterator[Case]:
    """The kernels of LoRA: every tile, adapters of both dtypes, one or several, with dropout."""
    for dtype in DTYPES:
        for M in (16, 4096):
            yield from _lora(M, 16, dtype)
    yield from _lora(4096, 16, "bf16", adapters="fp32", dropout=True)
    yield from _lora(512, 64, "bf16", adapters="fp32", dropout=True)
    yield from _lora(512, 64, "fp32", dropout=True)
    for dtype in ("fp32", "bf16"):
        yield from _lora(512, 16, dtype, adapters="fp32", E=16, dropout=True)
        yield from _lora(4096, 256, dtype, adapters="fp32", dropout=True)
    yield from _lora(512, 12, "bf16", dropout=True, aligned=False)
    for M in (1, 16, 64):
        yield _branch(M, "bf16", "bf16")
        yield _branch(M, "bf16", "fp32")
    yield _branch(16, "fp32", "fp32")
    yield _branch(16, "bf16", "addend")
    yield Case("lora_sum", lora_sum_kernel, "bf16", False, lora_configs.SUM)


def _lora(
    M: int,
    R: int,
    dtype: str,
    adapters: str | None = None,
    E: int = 1,
    dropout: bool = False,
    aligned: bool = True,
) -> Iterator[Case]:
    """A forward and a backward of K x K; adapters in `dtype` unless said."""
    adapters = adapters or dtype
    K = 4096 if aligned else 4095
    on_tensor_cores = dtype != "fp32"
    shape = (M, K, E, R, not on_tensor_cores)
    precision = {"PRECISION": "tf32" if on_tensor_cores else "ieee"}
    dot = {"DOT": DTYPES[adapters]}
    one = {} if E > 1 else {"order_ptr": None, "offsets_ptr": None}
    seed = {} if dropout else {"seed_ptr": None}
    suffix = f" M={M} R={R}" + (f" E={E}" if E > 1 else "")
    suffix += f", {adapters} adapters" + (", dropout" if dropout else "")
    suffix += "" if aligned else ", odd K"

    def case(name: str, kernel: object, constants: dict) -> Case:
        types = {"a_ptr": f"*{adapters}", "b_ptr": f"*{adapters}"}
        return Case(
            name + suffix, kernel, dtype, False, constants | one | precision, aligned,
            on_tensor_cores, types,
        )  # fmt: skip

    tile = lora_configs.shrink(*shape)
    parts, part = lora_configs.shrink_parts(M, K, tile["BLOCK_M"], tile["BLOCK_K"])
    tile |= dot | {"PART": part}
    read = {"PARTS": parts if lora_configs.adds_parts(parts, M, R) else 1}
    yield case("lora_shrink", lora_shrink_kernel, tile | seed | {"RANK_LAST": False})
    if R > lora_configs.MOST_RANKS_IN_ONE_PASS:
        transposed = {"RANK_LAST": True, "seed_ptr": None}
        yield case("lora_shrink dy", lora_shrink_kernel, tile | transposed)
    yield case("lora_expand", lora_expand_kernel, lora_configs.expand(*shape) | read)
    tile = lora_configs.dy(*shape)
    blocks = triton.cdiv(K, tile["BLOCK_N"]) * triton.cdiv(R, tile["BLOCK_R"])
    tile |= dot | {"CHUNK": lora_configs.chunk(M, E, blocks, tile["BLOCK_M"])}
    tile |= {} if R <= lora_configs.MOST_RANKS_IN_ONE_PASS else {"g_ptr": None}
    yield case("lora_dy", lora_dy_kernel, tile)
    tile = lora_configs.dx(M, E, R, not on_tensor_cores)
    blocks = triton.cdiv(K, tile["BLOCK_K"]) * triton.cdiv(R, tile["BLOCK_R"])
    tile |= {"CHUNK": lora_configs.chunk(M, E, blocks, tile["BLOCK_M"])}
    if tile["BLOCK_R"] >= R:
        yield case("lora_dx", lora_dx_kernel, tile | seed)
    else:
        yield case("lora_dx dA", lora_dx_kernel, tile | seed | {"dx_ptr": None})
        yield case("lora_dx dx", lora_dx_kernel, tile | seed | {"x_ptr": None, "da_ptr": None})


def _branch(M: int, dtype: str, adapters: str) -> Case:
    """codebook_linear with a branch of LoRA: of 16 ranks, its h in parts; or as an addend."""
    case = _linear(M, dtype)
    case.name += f", a branch: {adapters}"
    if adapters == "addend":
        case.types = {"addend_ptr": "*fp32"}
        return case
    case.types = {"parts_ptr": "*fp32", "h_ptr": "*fp32", "b_ptr": f"*{adapters}", "scale": "fp32"}
    parts = 16 if M <= 32 else 1
    case.constants |= lora_configs.ranks(16, dtype == "fp32") | {"PARTS": parts}
    if M > 1:
        case.constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    return case


def _suffix(G: int, double_quant: bool, per_row: bool = False, aligned: bool = True) -> str:
    return (
        f" G={G}"
        + ("" if double_quant else ", float32 scales")
        + (", a table a row" if per_row else "")
        + ("" if aligned else ", odd K")
    )
