"""Every kind of layer that can have adapters, against the same layer with the merged weight."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import LowrankError
from lowrank.nn.kinds import kind_of
from tests.nn.lora_kinds import KINDS, Kind, Largest

RANDOM = LoRAConfig(r=4, lora_alpha=6, init_lora_weights=False)
OTHER = LoRAConfig(r=8, lora_alpha=3, init_lora_weights=False, use_rslora=True)


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


def gradients(layer, run, x, dy) -> dict[str, torch.Tensor]:
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = run(x)
    (y.to(dy.dtype) * dy).sum().backward()
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({"x": x.grad} if x.is_floating_point() else {}), **found}


def assert_same(got: dict, want: dict, rtol: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


def test_is_the_layer_with_the_merged_weight(kind):
    layer = kind.wrap(RANDOM)
    layer.add_adapter("other", OTHER)
    x = kind.x()
    dy = torch.randn_like(layer(x))
    for active in (["default"], ["other"], ["default", "other"]):
        layer.set_adapter(active)
        got = gradients(layer, layer, x, dy)
        assert {n.split(".")[1] for n in got if n.startswith("lora_")} == set(active)
        assert_same(got, gradients(layer, lambda x: kind.formula(layer, x), x, dy), 1e-5)


def test_merging_and_back(kind):
    base = kind.make()
    layer, x = kind.wrap(RANDOM, base), kind.x()
    weight, plain = base.weight.clone(), copy.deepcopy(base)(x)
    y = layer(x)
    assert not torch.allclose(y, plain, atol=1e-2)
    layer.disabled = True
    assert torch.equal(layer(x), plain)
    layer.disabled = False
    layer.merge()
    assert layer.merged and type(layer.base_layer) is type(base)
    torch.testing.assert_close(layer(x), y)
    layer.disabled = True
    assert torch.equal(layer(x), plain)
    layer.disabled = False
    layer.unmerge()
    assert layer.base_layer is base and torch.equal(base.weight, weight)
    assert torch.equal(layer(x), y)


def test_a_fresh_adapter_changes_nothing(kind):
    for how in (True, "gaussian"):
        layer = kind.wrap(LoRAConfig(r=4, init_lora_weights=how))
        x = kind.x()
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
        layer(x).sum().backward()
        grads = [p.grad for p in layer.parameters() if p.requires_grad]
        assert any(bool(grad.any()) for grad in grads if grad is not None)


def test_copies_and_states(kind):
    layer, x = kind.wrap(RANDOM), kind.x()
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    other = kind.wrap(RANDOM)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    fresh = kind.make()
    adapters = {n: p.clone() for n, p in layer.state_dict().items() if n.startswith("lora_")}
    layer.load_state_dict(fresh.state_dict())  # a plain layer's, strict
    assert torch.equal(layer.base_layer.weight, fresh.weight)
    after = layer.state_dict()
    assert all(torch.equal(after[n], p) for n, p in adapters.items())


def test_on_the_meta_device(kind):
    with torch.device("meta"):
        layer = kind.wrap(RANDOM)
        y = layer(kind.x())
    real = kind.wrap(RANDOM)
    assert {n: p.shape for n, p in layer.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert y.shape == real(kind.x()).shape and y.is_meta
    layer.to_empty(device="cpu").load_state_dict(real.state_dict())
    if not any(
        True for _ in layer.buffers()
    ):  # a buffer that is not saved is for its owner to fill
        x = kind.x()
        assert torch.equal(layer(x), real(x))


def test_compiled_whole(kind):
    layer, x = kind.wrap(RANDOM), kind.x()
    dy = torch.randn_like(layer(x))
    torch.compiler.reset()  # it counts how often one forward is compiled
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(gradients(layer, compiled, x, dy), gradients(layer, layer, x, dy), 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(kind, use_reentrant):
    layer, x = kind.wrap(LoRAConfig(r=4, init_lora_weights=False, lora_dropout=0.3)), kind.x()
    if use_reentrant and not x.is_floating_point():
        return  # torch: none of the inputs has a gradient
    dy = torch.randn_like(layer(x))

    def run(x):
        torch.manual_seed(3)
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    def plain(x):
        torch.manual_seed(3)
        return layer(x)

    assert_same(gradients(layer, run, x, dy), gradients(layer, plain, x, dy), 1e-6)


def test_sixteen_bit_base_keeps_float32_adapters(kind):
    layer, x = kind.wrap(RANDOM, kind.make().bfloat16()), kind.x()
    x = x.bfloat16() if x.is_floating_point() else x
    dy = torch.randn_like(layer(x), dtype=torch.float32)
    got = gradients(layer, layer, x, dy)
    assert got["y"].dtype == torch.bfloat16
    assert {p.dtype for n, p in layer.named_parameters() if n.startswith("lora_")} == {torch.float}
    assert_same(got, gradients(layer, lambda x: kind.formula(layer, x), x, dy), 2e-2)


def test_autocast(kind):
    layer, x = kind.wrap(RANDOM), kind.x()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype
    want = kind.formula(layer, x)
    assert (y.double() - want).norm() < 2e-2 * want.norm()


def test_dropout_is_on_the_adapters_input(kind):
    layer, x = kind.wrap(LoRAConfig(r=4, init_lora_weights=False, lora_dropout=0.4)), kind.x()
    y = layer.eval()(x)
    torch.testing.assert_close(y.double(), kind.formula(layer, x), rtol=1e-4, atol=1e-4)
    trained = layer.train()(x)
    assert torch.equal(trained, y) != x.is_floating_point()  # ids are not dropped


def test_wrap_takes_its_own_kind_alone(kind):
    base = kind.make()
    for wrong in (nn.LayerNorm(3), nn.ConvTranspose2d(2, 2, 2), None, kind.wrap(RANDOM)):
        with pytest.raises(LowrankError, match="wrap: expected"):
            kind_of(base).wrap(wrong, RANDOM)
    with pytest.raises(LowrankError, match="config: expected a LoRAConfig; got dict"):
        kind_of(base).wrap(base, {"r": 4})
    assert base.weight.requires_grad


class Positions(nn.Embedding):
    """One whose ids are no rows: OPT's, which are two further on."""

    def forward(self, ids):
        return super().forward(ids + 2)


class Standardized(nn.Conv2d):
    """One that computes with another weight than it has."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), {}, "wrap.max_norm: expected None, it would change"),
        (Positions(5, 4), {}, "got Positions, which computes something else"),
        (Standardized(2, 2, 1), {}, "expected Conv2d; got Standardized, which computes something"),
        (nn.Conv1d(4, 4, 1, groups=4), {"r": 6}, "r: expected a multiple of the 4 groups of"),
        (
            nn.Conv1d(4, 4, 1, groups=2),
            {"method": "vera"},
            "method: expected one with B, the layer",
        ),
        (nn.Conv1d(4, 4, 1), {"quantizer": "nf4"}, "quantizer: expected None, LoRAConv is not"),
        (nn.Embedding(5, 4), {"init_lora_weights": "loftq"}, "init_lora_weights='loftq': "),
    ],
)
def test_what_a_kind_cannot_do_is_refused_and_changes_nothing(base, options, match):
    options = dict(options)
    quantizer = options.pop("quantizer", None)
    with pytest.raises(LowrankError, match=match) as caught:
        kind_of(base).wrap(base, LoRAConfig(**{"r": 4, **options}), quantizer=quantizer)
    assert "\n" not in str(caught.value)
    assert base.weight.requires_grad


def test_a_further_adapter_is_checked_as_the_first_is():
    layer = kind_of(nn.Conv1d(4, 4, 1)).wrap(nn.Conv1d(4, 4, 1, groups=2), RANDOM)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(LowrankError, match="r: expected a multiple of the 2 groups"):
        layer.add_adapter("other", LoRAConfig(r=3))
    assert layer.state_dict().keys() == before.keys() and list(layer.config) == ["default"]


def test_other_methods():
    pairs = ((nn.Embedding(9, 6), torch.arange(5)), (nn.Conv1d(3, 4, 2), torch.randn(2, 3, 5)))
    for base, x in pairs:
        layer = kind_of(base).wrap(base, LoRAConfig(r=2, method="vera"))
        with torch.no_grad():
            for tensor in layer.tensors("default").values():
                tensor.normal_()
        y = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_over_a_quantized_embedding(scheme, use_dora):
    base = lowrank.QuantEmbedding.from_embedding(nn.Embedding(70, 64, padding_idx=3), scheme)
    layer = kind_of(base).wrap(base, replace(RANDOM, use_dora=use_dora))
    x = torch.randint(70, (3, 5))
    y, plain = layer(x), base(x)
    A, B = layer.factors("default")
    if not use_dora:
        want = plain + layer.scaling["default"] * A.T[x] @ B.T
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert not layer.lora_A["default"].weight.grad[:, 3].any()
    layer.merge()
    assert type(layer.base_layer) is nn.Embedding and layer.base_layer.padding_idx == 3
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert layer.base_layer is base


def test_a_magnitude_among_several(kind):
    layer, x = kind.wrap(replace(RANDOM, use_dora=True)), kind.x()
    layer.add_adapter("lora", OTHER)
    layer.add_adapter("dora", replace(OTHER, use_dora=True))
    with torch.no_grad():
        for adapter in ("default", "dora"):
            layer.lora_magnitude_vector[adapter].weight.mul_(1 + torch.rand(layer.matrix_shape[0]))
    for active in (["default", "lora"], ["default", "dora", "lora"]):
        layer.set_adapter(active)
        y = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
        layer.unmerge()


def test_a_quantized_conv1d_is_one_again_when_merged():
    plain = nn.ModuleDict({"fc": Conv1D(32, 64)})
    model = lowrank.quantize(copy.deepcopy(plain), "int8")
    lowrank.inject(model, replace(RANDOM, target_modules=["fc"]))
    x = torch.randn(5, 64)
    y = model["fc"](x)
    again = copy.deepcopy(model)
    for one in (model, again):
        assert {n: p.shape for n, p in one.state_dict().items() if n.endswith("base_layer.bias")}
        lowrank.merge_and_unload(one)
        assert type(one["fc"]) is Conv1D
        assert {n: p.shape for n, p in one.named_parameters()} == {
            n: p.shape for n, p in plain.named_parameters()
        }
        torch.testing.assert_close(one["fc"](x), y, rtol=1e-4, atol=1e-5)


def test_an_embeddings_step_makes_nothing_of_the_tables_size():
    layer = kind_of(nn.Embedding(1, 1)).wrap(nn.Embedding(5000, 64), RANDOM)
    with Largest() as largest:
        layer(torch.randint(5000, (2, 9))).square().sum().backward()
    assert 4 * 5000 <= largest.numel < 64 * 5000 / 4  # A's gradient, not the table's
