"""Several layers of one x in one call: what each gives by itself, whatever they become."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import LoRAConfig, LoRALinear, QuantLinear, ops
from lowrank.nn.together import Together
from tests.ops.isas import needs_library

K = 63


def quantized(N: int, scheme: str = "nf4", bias: bool = True, **options) -> QuantLinear:
    return QuantLinear(K, N, bias=bias, quantizer=lowrank.quant.get(scheme, **options))


def adapted(N: int, scheme: str = "nf4", **options) -> LoRALinear:
    config = LoRAConfig(**{"r": 5, "lora_alpha": 7, "init_lora_weights": False, **options})
    return LoRALinear.wrap(nn.Linear(K, N), config, quantizer=scheme)


def exact(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In float64, of what the layer holds now."""
    base = getattr(layer, "base_layer", layer)
    W = base.dequantize(torch.float64) if isinstance(base, QuantLinear) else base.weight.double()
    y = x.double() @ W.T
    if base.bias is not None:
        y = y + base.bias.double()
    for a in getattr(layer, "active_adapters", []):
        A, B = layer.lora_A[a].weight.double(), layer.lora_B[a].weight.double()
        y = y + layer.scaling[a] * (x.double() @ A.T @ B.T)
    return y


@torch.inference_mode()
def assert_right(together: Together, x: torch.Tensor, *layers: nn.Module) -> None:
    for layer, y in zip(layers, together.products(x, *layers), strict=True):
        torch.testing.assert_close(y, exact(layer, x).to(x.dtype), rtol=1e-4, atol=1e-4)


class Seen(TorchDispatchMode):
    """How many products torch's dispatcher sees: none that the kernel is given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "codebook" in str(func) or "lora" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (4, 1), (5,), (2, 8), (16,), (17,), (0,)])
@pytest.mark.parametrize("make", [quantized, adapted])
def test_of_any_number_of_rows(generator, make, rows):
    x = torch.randn(*rows, K, generator=generator)
    assert_right(Together(), x, make(45))
    assert_right(Together(), x, make(45), make(1), make(64))
    assert_right(Together(), x, quantized(3, bias=False), adapted(45, r=16), quantized(7, "fp4"))


@pytest.mark.parametrize(
    "layers",
    [
        (quantized(5, "int8"), quantized(9)),
        (nn.Linear(K, 5), quantized(9)),
        (LoRALinear.wrap(nn.Linear(K, 5), LoRAConfig(r=3, init_lora_weights=False)), adapted(4)),
        (adapted(5, lora_dropout=0.5).eval(), quantized(9)),
        (adapted(5, "int8"), adapted(9)),
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
def test_layers_of_every_kind(generator, layers):
    together = Together()
    for _ in range(3):
        assert_right(together, torch.randn(2, K, generator=generator), *layers)


@needs_library
@torch.inference_mode()
def test_one_call_of_the_kernel_that_nobody_on_the_way_to_it_sees(generator):
    together, layers = Together(), (adapted(5), quantized(9))
    x = torch.randn(2, K, generator=generator)
    alone = [layer(x) for layer in layers]
    for y, wanted in zip(together.products(x, *layers), alone, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    with torch.profiler.profile() as profile:
        together.products(x, *layers)
    assert any("codebook_linear" in event.name for event in profile.events())
    with Seen() as seen:
        together.products(x, *layers)
    assert seen.calls == 2
    with ops.use_backend("reference"):
        assert_right(together, x, *layers)
    halves = together.products(x.bfloat16(), *layers)
    assert [y.dtype for y in halves] == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert together.products(x, *layers)[1].dtype == torch.bfloat16
    vmapped = torch.func.vmap(lambda x: together.products(x, layers[1])[0])(x[:, None])
    torch.testing.assert_close(vmapped[:, 0], alone[1])


def test_gradients_are_those_of_the_layers(generator):
    together, layer = Together(), adapted(5)
    x = torch.randn(2, K, generator=generator, requires_grad=True)
    (y,) = together.products(x, layer)
    wanted = torch.autograd.grad(layer(x).sum(), [x, layer.lora_A["default"].weight])
    got = torch.autograd.grad(y.sum(), [x, layer.lora_A["default"].weight])
    assert all(map(torch.equal, got, wanted))


def gradients(ys, x, layers, dys):
    """Of all that is trained."""
    trained = [t for t in (x, *nn.ModuleList(layers).parameters()) if t.requires_grad]
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, trained, given)


@pytest.mark.parametrize("rows", [(17,), (3, 37), (600,)])
@pytest.mark.parametrize("frozen", ["nothing", "x", "A", "B", "all but x"])
def test_every_gradient_of_many_rows(generator, rows, frozen):
    layers = [adapted(45, r=16), quantized(64, bias=False), adapted(7), adapted(30, "fp4", r=1)]
    x = torch.randn(*rows, K, generator=generator, requires_grad=frozen != "x")
    for layer in layers:
        for name, p in layer.named_parameters():
            of = "A" if "lora_A" in name else "B" if "lora_B" in name else None
            p.requires_grad_(of is not None and frozen not in (of, "all but x"))
    ys = Together().products(x, *layers)
    wide = x.detach().double().requires_grad_(x.requires_grad)
    right = [exact(layer, wide) for layer in layers]
    for y, wanted in zip(ys, right, strict=True):
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
        assert y.requires_grad == wanted.requires_grad
    dys = [torch.randn(y.shape, generator=generator) for y in ys]
    wanted = gradients(right, wide, layers, [dy.double() for dy in dys])
    for got, alike in zip(gradients(ys, x, layers, dys), wanted, strict=True):
        assert (got.double() - alike).norm() <= 1e-6 * alike.norm()


@needs_library
def test_many_rows_are_one_node_that_keeps_what_its_gradients_need(generator):
    together, layers = Together(), [adapted(45), adapted(7)]
    x = torch.randn(40, K, generator=generator, requires_grad=True)
    ys = together.products(x, *layers)
    assert ys[0].grad_fn is ys[1].grad_fn
    with torch.no_grad():
        again = together.products(x, *layers)
    assert all(map(torch.equal, ys, again))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for layer in layers:
            layer.lora_A["default"].weight.requires_grad_(False)
        together.products(x, *layers)
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)  # of dA alone
    with torch.no_grad():
        layers[0].lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[0].sum().backward()


@needs_library
def test_many_rows_and_what_has_to_be_seen_of_them(generator):
    together, layers = Together(), [adapted(45), adapted(7, lora_dropout=0.5), quantized(5)]
    x = torch.randn(40, K, generator=generator, requires_grad=True)
    assert [y.requires_grad for y in together.products(x, *layers)] == [True] * 3
    layers[2].bias.requires_grad_(False)
    assert len({y.grad_fn for y in together.products(x, *layers)}) == 3  # dropout is on
    layers[1].eval()
    assert len({y.grad_fn for y in together.products(x, *layers)}) == 1
    layers[1].train()
    layers[1].lora_dropout["default"].p = 0.0
    assert len({y.grad_fn for y in together.products(x, *layers)}) == 1
    layers[1].lora_dropout["default"].p = 0.1
    assert len({y.grad_fn for y in together.products(x, *layers)}) == 3
    layers[1].eval()
    layers[2].bias.requires_grad_(True)
    (y,) = together.products(x, *layers)[2:]
    assert torch.equal(torch.autograd.grad(y.sum(), layers[2].bias)[0], torch.full((5,), 40.0))
    layers[2].bias.requires_grad_(False)
    with Seen() as seen:
        together.products(x, *layers)
    assert seen.calls == 3
    handle = layers[0].register_forward_hook(lambda module, args, y: y + 1)
    before = together.products(x, *layers)[0]
    handle.remove()
    torch.testing.assert_close(together.products(x, *layers)[0] + 1, before)


def test_what_the_layers_are_may_change_between_calls(generator):
    together, layers = Together(), [adapted(5), quantized(9)]
    lora, plain = layers
    x = torch.randn(2, 1, K, generator=generator)

    def assert_current() -> None:
        for _ in range(2):
            assert_right(together, x, *layers)

    assert_current()
    plain.storage = quantized(9, "fp4").storage
    assert_current()
    plain.load_state_dict(quantized(9, block_size=32).state_dict(), assign=True)
    assert_current()
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()
    plain.get_parameter("packed").data.random_(0, 255)
    assert_current()
    plain.bias = nn.Parameter(torch.randn(9, generator=generator))
    assert_current()
    plain.bias = None
    assert_current()
    lora.scaling["default"] *= 2
    assert_current()
    lora.lora_B["default"].weight = nn.Parameter(torch.randn(5, 5, generator=generator))
    assert_current()
    lora.lora_A["default"].weight.data = torch.randn(5, K, generator=generator)
    assert_current()
    for part, kept in (("lora_A", (slice(3),)), ("lora_B", (slice(None), slice(3)))):
        weight = getattr(lora, part)["default"].weight
        weight.data = weight.data[kept]
    assert_current()
    lora.add_adapter("second", LoRAConfig(r=2, init_lora_weights=False))
    lora.set_adapter(["second"])
    assert_current()
    lora.set_adapter(["default", "second"])
    assert_current()
    lora.set_adapter(["default"])
    assert_current()
    lora.base_layer = quantized(5)
    assert_current()
    lora.base_layer = nn.Linear(K, 5)
    assert_current()
    layers[:] = [adapted(45), adapted(9)]
    assert_current()
    layers[1] = quantized(3)
    assert_current()
    plain = layers[1]
    plain.storage = quantized(3, "int8").storage
    assert_current()
    plain.storage = quantized(3).storage
    assert_current()
    layers[0].disabled = True
    y = together.products(x, *layers)[0]
    torch.testing.assert_close(y, layers[0].base_layer(x))
    layers[0].disabled = False
    assert_current()
    with lowrank.adapter_rows(nn.ModuleList(layers), [None, "default"]):
        first, second = together.products(x, *layers)[0]
    torch.testing.assert_close(first, layers[0].base_layer(x)[0])
    torch.testing.assert_close(second, exact(layers[0], x)[1].float(), rtol=1e-4, atol=1e-4)
    assert_current()


@torch.inference_mode()
def test_hooks_and_patches_are_called(generator):
    together, layers = Together(), (adapted(5), quantized(9))
    x = torch.randn(2, K, generator=generator)
    plain = [y.clone() for y in together.products(x, *layers)]

    def assert_more(by: tuple[float, float]) -> None:
        for _ in range(2):
            for y, before, more in zip(together.products(x, *layers), plain, by, strict=True):
                torch.testing.assert_close(y, before + more, rtol=1e-4, atol=1e-4)

    for i, hooked in ((0, layers[0]), (0, layers[0].base_layer), (1, layers[1])):
        handle = hooked.register_forward_hook(lambda module, args, y: y + 1)
        assert_more((float(i == 0), float(i == 1)))
        handle.remove()
        assert_more((0, 0))
    forward = layers[1].forward
    layers[1].forward = lambda x: forward(x) + 1
    assert_more((0, 1))
    del layers[1].forward
    assert_more((0, 0))
    called = []
    handle = register_module_forward_hook(lambda module, args, y: called.append(module))
    try:
        together.products(x, *layers)
    finally:
        handle.remove()
    assert layers[0] in called and layers[1] in called


def test_dropout_is_the_layers(generator):
    together, lora = Together(), adapted(5, lora_dropout=0.5).eval()
    x = torch.randn(16, K, generator=generator)
    assert_right(together, x, lora)
    lora.train()
    with torch.inference_mode():
        assert not torch.equal(*(together.products(x, lora)[0] for _ in range(2)))
    lora.eval()
    assert_right(together, x, lora)


def test_a_copy_looks_at_its_own_layers(generator):
    owner = nn.Module()
    owner.layer, owner.together = quantized(9), Together()
    x = torch.randn(2, K, generator=generator)
    assert_right(owner.together, x, owner.layer)
    for twin in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        twin.layer.get_parameter("packed").random_(0, 255)
        assert_right(twin.together, x, twin.layer)
    assert_right(owner.together, x, owner.layer)


def test_another_device_and_x_of_another_width(generator):
    together, layer = Together(), quantized(9)
    assert_right(together, torch.randn(2, K, generator=generator), layer)
    with torch.inference_mode(), pytest.raises(lowrank.errors.LowrankError, match="K=63"):
        together.products(torch.randn(2, K + 32, generator=generator), layer)
    layer.to("meta")
    with torch.inference_mode():
        assert together.products(torch.empty(2, K, device="meta"), layer)[0].is_meta
