"""Every operator is a well-behaved torch operator: opcheck, compile, meta, dynamic shapes."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from lowrank import ops
from tests.ops.weights import random_weight

OPS = torch.ops.lowrank


@pytest.fixture(autouse=True, params=["reference", None], ids=["reference", "best"])
def backend(request):
    with ops.use_backend(request.param):
        yield


def samples():
    for double_quant, K in ((False, 33), (True, 123)):
        weight = random_weight(10, K, 32, double_quant)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, K, dtype=dtype, requires_grad=True)
            bias = torch.randn(10, dtype=dtype, requires_grad=True)
            dy = torch.randn(4, 10, dtype=dtype, requires_grad=True)
            yield OPS.codebook_linear, (x, *weight, bias, 32)
            yield OPS.codebook_linear, (x.detach(), *weight, None, 32)
            yield OPS.codebook_linear_dx, (dy, *weight, K, 32)
            yield OPS.codebook_dequantize, (*weight, K, 32, dtype)
    yield OPS.codebook_quantize, (torch.randn(7, 123), random_weight(7, 33)[3], 64)
    yield (
        OPS.codebook_quantize,
        (torch.randn(7, 64, requires_grad=True), random_weight(7, 33)[3], 64),
    )
    yield from lora_samples()
    head, labels = torch.randn(20, 8), torch.tensor([3, -100, 19, 0])
    yield OPS.linear_cross_entropy, (torch.randn(4, 8, requires_grad=True), head, labels, True)
    yield OPS.linear_cross_entropy, (torch.randn(4, 8), head, labels, False)
    yield from elementwise_samples()
    params = [torch.randn(3, 300), torch.randn(5)]
    grads, states = [p * 2 for p in params], zip(*map(ops.adamw8bit_state, params), strict=True)
    states = list(map(list, states))
    yield OPS.adamw8bit_step, (params, grads, *states, 0.1, 0.9, 0.99, 1e-8, 0.0, 1)
    yield OPS.lion8bit_step, (params, grads, *states[:2], 0.1, 0.9, 0.99, 0.0)


def elementwise_samples():
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = (torch.randn(2, 3, 14, dtype=dtype) for _ in range(2))
        leaf, weight = x.clone().requires_grad_(), torch.randn(14, requires_grad=True)
        yield OPS.rms_norm, (leaf, weight, 1e-5, True)
        rstd = torch.rand(2, 3, 1)
        yield OPS.rms_norm_backward, (dy, x, weight.detach(), rstd, False, [True, False])
        yield OPS.rms_norm_backward, (dy, x, weight.detach(), rstd, True, [False, True])
        q = torch.randn(2, 5, 3, 8, dtype=dtype, requires_grad=True)
        k = torch.randn(2, 2, 5, 8, dtype=dtype).transpose(1, 2).requires_grad_()
        cos, sin = torch.randn(1, 5, 1, 6, dtype=dtype), torch.randn(1, 5, 1, 3, dtype=dtype)
        yield OPS.rotate, (q, k, cos, sin, False)
        yield OPS.rotate, (q.detach(), k, cos, sin, True)
        halves = torch.randn(2, 3, 28, dtype=dtype).chunk(2, dim=-1)
        leaves = [half.detach().requires_grad_() for half in halves]
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield OPS.gated, (*leaves, activation)
            yield OPS.gated_backward, (dy, *halves, activation)


def lora_samples():
    E, R, N, K, M = 3, 4, 10, 33, 6
    packed = random_weight(N, K, 32, double_quant=True)
    groups = ops.group_rows(torch.tensor([2, -1, 0, 0, 2, -1]), E)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, K, dtype=dtype)
        dy = torch.randn(2, 3, N, dtype=dtype)
        h = torch.randn(M, R)
        dense = (torch.randn(N, K, dtype=dtype), None, None, None)
        for weight, G, (order, offsets), p, needs in (
            (packed, 32, groups, 0.0, [True, True, True]),
            (dense, 64, groups, 0.5, [False, True, True]),
            (dense, 64, (None, None), 0.1, [True, False, True]),
            ((None,) * 4, 64, (None, None), 0.0, [True, True, False]),
        ):
            count = 1 if order is None else E
            A, B = torch.randn(count, R, K), torch.randn(count, N, R)
            seed = torch.tensor(7 << 40) if p else None
            rest = (A, B, 0.5, order, offsets, p, seed)
            yield OPS.lora_linear_backward, (dy, x, h, *weight, G, *rest, needs)
            bias = None if weight[0] is None else torch.randn(N, dtype=dtype, requires_grad=True)
            leaves = (t.clone().requires_grad_(n) for t, n in zip((x, A, B), needs, strict=True))
            x_leaf, A_leaf, B_leaf = leaves
            yield OPS.lora_linear, (x_leaf, *weight, bias, G, A_leaf, B_leaf, *rest[2:])


def test_opcheck():
    seen = set()
    for op, args in samples():
        torch.library.opcheck(op, args)
        seen.add(op.__name__)
    assert seen == set(ops.schema.OPERATORS)


def test_fakes_have_the_shape_dtype_and_strides_of_the_real():
    for op, args in samples():
        meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args)
        real, fake = op(*args), op(*meta)
        if real is None:
            assert fake is None
            continue
        if isinstance(real, torch.Tensor):
            real, fake = (real,), (fake,)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_compile_keeps_one_graph_for_every_batch_size():
    weight = random_weight(12, 96, 32, double_quant=True)
    head = torch.randn(30, 12)
    graphs = []

    def loss(x, bias, labels):
        y = ops.codebook_linear(x, *weight, bias, 32)
        return ops.linear_cross_entropy(y, head, labels)

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    traced = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    for M in (4, 7, 33):
        x = torch.randn(M, 96, requires_grad=True)
        bias = torch.randn(12, requires_grad=True)
        labels = torch.randint(0, 30, (M,))
        got = compiled(x, bias, labels)
        expected = loss(x, bias, labels)
        traced(x, bias, labels)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, (x, bias)), torch.autograd.grad(expected, (x, bias))
        )
    assert len(graphs) == 1
