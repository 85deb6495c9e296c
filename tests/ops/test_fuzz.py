"""Wrong arguments of every kind: one line that names what is wrong, or the reference's result.

Each example is a right call of which one or two arguments were changed, in shape, dtype, strides,
layout, device or kind. `torch.ops.lowrank` itself, which compiled graphs call, may complain in
torch's words, and never ends the process: the backends refuse what their pointers cannot take.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from lowrank import ops
from lowrank.errors import LowrankError
from tests.ops.isas import needs_library
from tests.ops.weights import random_weight

SEED = int(os.environ.get("LOWRANK_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn]
OTHERS = [None, 0, -1, 1, 33, 64, 3.5, "64", True, float("nan"), (), [], (1, 2), torch.float32]

Call = tuple[str, dict]  # a function of lowrank.ops and its arguments by name


@st.composite
def calls(draw) -> Call:
    """A right call of any function, small, of ragged shapes and zero rows."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    name = draw(st.sampled_from(list(MAKERS)))
    return name, MAKERS[name](draw)


def weight(draw, N: int, K: int, G: int) -> dict:
    tables = draw(st.sampled_from((1, N)))
    tensors = random_weight(N, K, G, draw(st.booleans()), tables)
    return dict(zip(("packed", "absmax", "absmax_scale", "codebook"), tensors, strict=True))


def sizes(draw) -> tuple[int, int, int, int, torch.dtype]:
    M, N = draw(st.sampled_from((0, 1, 3, 17))), draw(st.sampled_from((1, 2, 9)))
    K, G = draw(st.sampled_from((1, 31, 33, 64, 100))), draw(st.sampled_from((32, 64, 4096)))
    return M, N, K, G, draw(st.sampled_from((*FLOATS, torch.float64)))


def quantize(draw) -> dict:
    _, N, K, G, _ = sizes(draw)
    w = torch.randn(N, K).to(draw(st.sampled_from(FLOATS)))
    return {"weight": w, "codebook": weight(draw, N, K, G)["codebook"], "block_size": G}


def dequantize(draw) -> dict:
    _, N, K, G, dtype = sizes(draw)
    return weight(draw, N, K, G) | {"K": K, "block_size": G, "dtype": dtype}


def linear(draw) -> dict:
    M, N, K, G, dtype = sizes(draw)
    bias = torch.randn(N).to(dtype) if draw(st.booleans()) else None
    x = torch.randn(M, K).to(dtype)
    return {"x": x, **weight(draw, N, K, G), "bias": bias, "block_size": G}


def linear_dx(draw) -> dict:
    M, N, K, G, dtype = sizes(draw)
    return {"dy": torch.randn(M, N).to(dtype), **weight(draw, N, K, G), "K": K, "block_size": G}


def cross_entropy(draw) -> dict:
    M, V, H, _, dtype = sizes(draw)
    labels = torch.randint(0, V, (M,))
    labels[torch.rand(M) < 0.3] = -100
    return {
        "x": torch.randn(M, H).to(dtype),
        "weight": torch.randn(V, H).to(dtype),
        "labels": labels,
    }


def lora(draw) -> dict:
    M, N, K, G, dtype = sizes(draw)
    E, R = draw(st.sampled_from((1, 3))), 4
    base = dict.fromkeys(("packed", "absmax", "absmax_scale", "codebook"))
    kind = draw(st.sampled_from(("none", "dense", "codes")))
    if kind == "codes":
        base = weight(draw, N, K, G)
    weight_of = {"dense": torch.randn(N, K).to(dtype)}.get(kind, base.pop("packed"))
    dropout = {"p": 0.3, "seed": torch.tensor(5)} if draw(st.booleans()) else {}
    groups = ops.group_rows(torch.randint(-1, E, (M,)), E) if E > 1 else None
    return {
        "x": torch.randn(M, K).to(dtype), "weight": weight_of, **base, "bias": None,
        "block_size": G, "A": torch.randn(E, R, K), "B": torch.randn(E, N, R), "scale": 0.5,
        "groups": groups, **dropout,
    }  # fmt: skip


def lora_backward(draw) -> dict:
    call = lora(draw)
    call.pop("bias")
    x, B = call["x"], call["B"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    needs = draw(st.tuples(*[st.booleans()] * 3))
    dy, h = torch.randn(len(x), B.shape[1]).to(x.dtype), torch.randn(len(x), 4).to(wide)
    return {"dy": dy, "x": x, "h": h, **call, "needs": needs}


def rms_norm(draw) -> dict:
    M, _, H, _, dtype = sizes(draw)
    x, weight = torch.randn(M, H).to(dtype), torch.randn(H).to(draw(st.sampled_from(FLOATS)))
    return {"x": x, "weight": weight, "eps": 1e-5, "plus_one": draw(st.booleans())}


def rms_norm_backward(draw) -> dict:
    call = rms_norm(draw)
    del call["eps"]
    x = call["x"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    needs = draw(st.tuples(*[st.booleans()] * 2))
    dy, rstd = torch.randn(x.shape).to(x.dtype), torch.rand(len(x), 1).to(wide)
    return {"dy": dy, "x": x, "weight": call["weight"], "rstd": rstd, **call, "needs": needs}


def rotate(draw) -> dict:
    S, heads, _, _, dtype = sizes(draw)
    D = draw(st.sampled_from((2, 8, 34, 65)))
    half = draw(st.integers(0, D // 2))
    q, k = torch.randn(2, S, heads, D).to(dtype), torch.randn(2, S, 2, D).to(dtype)
    cos, sin = (torch.randn(draw(st.sampled_from((1, 2))), S, 1, half) for _ in range(2))
    sin = sin[:1].expand(cos.shape).contiguous()
    of_angles = draw(st.sampled_from((dtype, torch.float32)))
    return {"q": q, "k": k, "cos": cos.repeat(1, 1, 1, 2).to(of_angles), "sin": sin.to(of_angles)}


def gated(draw) -> dict:
    M, _, width, _, dtype = sizes(draw)
    gate, up = torch.randn(2, M, 2 * width).to(dtype).chunk(2, -1)
    activation = draw(st.sampled_from(("silu", "gelu", "gelu_tanh")))
    return {"gate": gate, "up": up, "activation": activation}


def gated_backward(draw) -> dict:
    call = gated(draw)
    return {"dy": torch.randn(call["up"].shape).to(call["up"].dtype), **call}


def group_rows(draw) -> dict:
    E = draw(st.sampled_from((1, 3)))
    return {"adapter_ids": torch.randint(-1, E, (draw(st.sampled_from((0, 1, 9))),)), "E": E}


def adamw8bit_step(draw) -> dict:
    params = [torch.randn(3, 300), torch.randn(5)][: draw(st.integers(0, 2))]
    params = [p.to(draw(st.sampled_from(FLOATS))) for p in params]
    states = list(zip(*map(ops.adamw8bit_state, params), strict=True)) or [()] * 4
    lists = dict(zip(("m", "m_scale", "v", "v_scale"), map(list, states), strict=True))
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    return {"params": params, "grads": [p * 2 for p in params], **lists, **numbers}


def lion8bit_step(draw) -> dict:
    whole = adamw8bit_step(draw)
    return {
        name: value for name, value in whole.items() if name not in ("v", "v_scale", "eps", "step")
    }


MAKERS = {
    "codebook_quantize": quantize,
    "codebook_dequantize": dequantize,
    "codebook_linear": linear,
    "codebook_linear_dx": linear_dx,
    "linear_cross_entropy": cross_entropy,
    "lora_linear": lora,
    "lora_linear_backward": lora_backward,
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "rotate": rotate,
    "gated": gated,
    "gated_backward": gated_backward,
    "group_rows": group_rows,
    "adamw8bit_step": adamw8bit_step,
    "lion8bit_step": lion8bit_step,
    "adamw8bit_state": lambda draw: {"p": torch.randn(3, 7)},
}


def unaligned(value: Tensor) -> Tensor:
    """The same at an address that its elements do not divide, as some files lie in memory."""
    if value.numel() == 0:
        return value
    data = bytearray(b"-" + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(data, dtype=value.dtype, offset=1).view(value.shape)


def wrong(draw, value):
    """Another value for an argument; for a list of tensors, mostly for one of them."""
    if isinstance(value, list | tuple) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return type(value)([*value[:at], wrong(draw, value[at]), *value[at + 1 :]])
    if not isinstance(value, Tensor):
        return draw(st.sampled_from([*OTHERS, torch.zeros(2), torch.ones(())]))
    if value.is_meta or value.layout != torch.strided:
        return value
    flat = value.flatten()
    return draw(
        st.sampled_from(
            [
                lambda: None,
                lambda: 1.0,
                lambda: value.tolist(),
                lambda: value.to(draw(st.sampled_from(DTYPES))),
                lambda: value.to("meta"),
                lambda: value.to_sparse() if value.is_floating_point() else None,
                lambda: flat,
                lambda: value[..., :-1] if value.dim() else value[None],
                lambda: value[:-1] if value.dim() else value[None],
                lambda: value[:0] if value.dim() else value[None],
                lambda: torch.cat([value, value]) if value.dim() else value[None],
                lambda: value[None],
                # Right in all but its strides and its address: the result must be the same.
                lambda: unaligned(value),
                lambda: torch.stack([value, value], -1)[..., 0],
                lambda: value.mT.contiguous().mT if value.dim() > 1 else value,
                lambda: torch.cat([flat[:1], flat])[1:].view(value.shape) if value.dim() else value,
                lambda: value[:1].expand(value.shape) if value.dim() and len(value) else value,
                # Of the right type, with numbers of another size.
                lambda: value + 1 if value.dtype.itemsize > 1 else value,
                lambda: value.clone().requires_grad_(value.is_floating_point()),
            ]
        )
    )()


@st.composite
def wrong_calls(draw) -> Call:
    name, arguments = draw(calls())
    for at in draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True)):
        arguments[at] = wrong(draw, arguments[at])
    return name, arguments


def outcome(function, arguments: dict):
    """Its result, and the arguments as it left them; or the error that it raised."""
    fresh = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)
    for old, new in zip(tree_flatten(arguments)[0], tree_flatten(fresh)[0], strict=True):
        if isinstance(old, Tensor) and old.requires_grad:
            new.requires_grad_()
    try:
        return function(**fresh), fresh
    except LowrankError as error:
        return error


def check(got, expected, context) -> None:
    """The same but for rounding: garbage is what is looked for, and tolerances have their tests."""
    for a, b in zip(tree_flatten(got)[0], tree_flatten(expected)[0], strict=True):
        if not isinstance(a, Tensor) or a.is_meta:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, context
        if a.layout == torch.strided:
            near = 8 * torch.finfo(a.dtype).eps + 1e-5 if a.is_floating_point() else 0
            a, b = a.detach().double(), b.detach().double()
            atol = near * max([1.0, *b[b.isfinite()].abs().tolist()])
            torch.testing.assert_close(a, b, rtol=near, atol=atol, equal_nan=True, msg=str(context))


@st.composite
def wrong_operator_calls(draw) -> tuple[str, list]:
    """The same of `torch.ops.lowrank`, whose arguments have no names and no defaults."""
    name, arguments = draw(calls().filter(lambda call: call[0] in ops.schema.OPERATORS))
    if "groups" in arguments:
        order, offsets = arguments.pop("groups") or (None, None)
        needs = [list(arguments.pop("needs"))] if "needs" in arguments else []
        p, seed = arguments.pop("p", 0.0), arguments.pop("seed", None)
        raw = [*arguments.values(), order, offsets, p, seed, *needs]
    else:
        arguments |= {"needs": list(arguments["needs"])} if "needs" in arguments else {}
        raw = list(arguments.values()) + [True] * (name in ("linear_cross_entropy", "rotate"))
    for at in draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=2, unique=True)):
        was, raw[at] = raw[at], wrong(draw, raw[at])
        # Torch 2.13 hands a kernel in Python whatever lies at that index in its memory: in place of
        # a dtype, -1 is a layout, and 64 the end of the process once torch.Generator() was called.
        if isinstance(was, torch.dtype) and type(raw[at]) is int:
            raw[at] = None
    return name, raw


# What a message may name that is no argument but in one: the weight's codes, the parts of groups.
INSIDE = ("packed", "order", "offsets")
EXAMPLES = hypothesis.settings(
    max_examples=400, deadline=None, database=None, print_blob=False,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)  # fmt: skip


def test_every_function_is_fuzzed():
    functions = {name for name, f in vars(ops).items() if inspect.isfunction(f)}
    assert set(MAKERS) == functions - {"explain"}


@hypothesis.seed(SEED)
@EXAMPLES
@hypothesis.given(wrong_calls())
def test_wrong_arguments_are_named_in_one_line_or_change_nothing(call):
    name, arguments = call
    got = outcome(getattr(ops, name), arguments)
    if isinstance(got, LowrankError):
        assert "\n" not in str(got) and len(str(got)) < 300
        named = re.findall(r"\w+", str(got).partition(":")[0])
        parameters = inspect.signature(getattr(ops, name)).parameters
        assert set(named) & {*parameters, *INSIDE}, str(got)
        return
    with ops.use_backend("reference"):
        expected = outcome(getattr(ops, name), arguments)
    check(got, expected, (name, f"LOWRANK_TEST_SEED={SEED}"))


@hypothesis.seed(SEED)
@EXAMPLES
@hypothesis.given(calls(), st.sampled_from((torch.bfloat16, torch.float64)))
def test_right_arguments_are_taken_whatever_the_default_dtype(call, dtype):
    name, arguments = call
    expected = outcome(getattr(ops, name), arguments)
    assert not isinstance(expected, LowrankError), (name, str(expected))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = outcome(getattr(ops, name), arguments)
    finally:
        torch.set_default_dtype(before)
    assert not isinstance(got, LowrankError), (name, str(got))
    check(got, expected, (name, f"LOWRANK_TEST_SEED={SEED}"))


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it makes of such arguments
@hypothesis.seed(SEED)
@EXAMPLES
@hypothesis.given(wrong_operator_calls(), st.sampled_from((None, "cpu", "cpu_int16", "reference")))
def test_no_argument_of_an_operator_ends_the_process(call, backend):
    name, raw = call
    with ops.use_backend(backend), contextlib.suppress(Exception):
        getattr(torch.ops.lowrank, name)(*raw)


@needs_library
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_tensor_that_kernels_read_by_address_is_aligned_to_its_elements(double_quant):
    weight = random_weight(3, 40, 32, double_quant)
    right = [torch.randn(2, 40), *weight, torch.randn(3), 32]
    for i, value in enumerate(right):
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            call = [*right[:i], unaligned(value), *right[i + 1 :]]
            assert "cpu: refuses: " in ops.explain("codebook_linear", *call), i
            got = torch.ops.lowrank.codebook_linear(*call)
            torch.testing.assert_close(got, torch.ops.lowrank.codebook_linear(*right))
