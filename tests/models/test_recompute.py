"""Recomputed activations: the same gradients to the last bit, and little that is kept."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.recompute import recompute

WAYS = (True, "selective")
H, I, B, S = 32, 96, 3, 26  # noqa: E741


def decoder(quantized: bool, targets, **options) -> Decoder:
    config = DecoderConfig(
        vocab_size=99, hidden_size=H, intermediate_size=I, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Decoder(config)
    if quantized:
        lowrank.quantize(model, "nf4")
    if targets:
        lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules=targets, **options))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model.train()


def step(model, way, seed, packed=False, bf16=False):
    """Loss, gradients and the bytes that stayed from the forward for the backward."""
    model.gradient_checkpointing = way
    model.zero_grad()
    torch.manual_seed(seed)
    ids = torch.randint(0, 99, (B, S))
    positions = torch.arange(S // 2).repeat(2).expand(B, S) if packed else None
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        loss = model.loss(ids, ids, position_ids=positions)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss, gradients, sum(kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "quantized, targets, options",
    [
        (False, None, {}),
        (False, "all-linear", {"use_dora": True}),
        (True, "all-linear", {"lora_dropout": 0.3}),
        (True, ["q_proj", "v_proj"], {}),
        (True, ["down_proj"], {}),
        (False, ["o_proj"], {"use_dora": True, "lora_dropout": 0.3}),
    ],
)
def test_gradients_are_the_same_bits(quantized, targets, options, bf16, seed):
    model = decoder(quantized, targets, **options)
    for packed in (False, True):
        loss, gradients, whole = step(model, False, seed, packed, bf16)
        for way in WAYS:
            again, same, kept = step(model, way, seed, packed, bf16)
            assert torch.equal(again, loss) and same.keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert torch.equal(same[name], gradient), (way, name)
            assert kept < whole


def test_little_is_kept_a_block(seed):
    """One [B, S, H] of each block, or two; and what the head and the angles keep once.

    The last block keeps numbers of rows, and only these rows.
    """
    model = decoder(True, "all-linear")
    block, selective = (step(model, way, seed)[2] for way in WAYS)
    activation = B * S * H * 4
    assert 2 * activation < selective - block < 3.1 * activation
    deeper = decoder(True, "all-linear")
    deeper.model.layers.extend(decoder(True, "all-linear").model.layers)
    assert step(deeper, True, seed)[2] - block == 3 * activation


def test_the_last_projection_is_not_computed_again(seed):
    model = decoder(True, "all-linear")
    calls = {}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(count(name.split(".")[-1]))
    expected = {True: {"down_proj": 3}, "selective": {"down_proj": 3, "o_proj": 3}}
    for way in WAYS:
        calls.clear()
        step(model, way, seed)
        once = {name: calls[name] for name in calls if calls[name] == 3}
        assert once == expected[way] and set(calls.values()) == {3, 6}


@pytest.mark.parametrize("part", ["", "mlp", "self_attn"])
def test_a_hook_on_a_block_or_a_part_of_it_is_called(part, seed):
    """It is called whole, and all of the block is computed again."""
    model = decoder(True, "all-linear")
    loss, gradients, _ = step(model, False, seed)
    seen = []
    for block in model.model.layers:
        block.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    for way in WAYS:
        again, same, _ = step(model, way, seed)
        assert torch.equal(again, loss) and len(seen) >= 3
        assert all(torch.equal(same[name], gradients[name]) for name in gradients)
        seen.clear()


class Doubled(torch.nn.Module):
    """A part of a block that is somebody else's."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args):
        return 2 * self.part(*args)


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
@pytest.mark.parametrize("by_adapter", [True, False])
def test_another_module_in_the_place_of_a_part(part, by_adapter, seed):
    """As modules_to_save puts there, which has the attributes of what it stands for."""
    model = decoder(False, None)
    if by_adapter:
        config = lowrank.LoRAConfig(target_modules=["lm_head"], modules_to_save=[part])
        for p in lowrank.inject(model, config).parameters():
            if p.requires_grad:  # no longer what it stands for
                p.data.add_(torch.randn_like(p), alpha=0.1)
    else:
        for block in model.model.layers:
            setattr(block, part, Doubled(getattr(block, part)))
    loss, gradients, _ = step(model, False, seed)
    for way in WAYS:
        again, same, _ = step(model, way, seed)
        assert torch.equal(again, loss)
        for name, gradient in gradients.items():
            assert torch.equal(same[name], gradient), (way, name)


def test_a_graph_that_is_kept_gives_its_gradient_twice(seed):
    model = decoder(True, "all-linear")
    model.gradient_checkpointing = "selective"
    ids = torch.randint(0, 99, (B, S))
    loss = model.loss(ids, ids)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or torch.equal(p.grad, 2 * first[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_within_autocast(way, seed):
    """Where a cast of a weight that the forward made without its graph must not be used again."""
    model = decoder(False, None)
    ids = torch.randint(0, 99, (B, S))
    found = []
    for switch in (False, way):
        model.gradient_checkpointing = switch
        model.zero_grad()
        plain = model.loss(ids, ids)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                model.loss(ids, ids).backward()
            plain.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.any() and torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("way", WAYS)
def test_without_gradients_nothing_is_kept(way, seed):
    model = decoder(False, None)
    model.gradient_checkpointing = way
    ids = torch.randint(0, 99, (B, S))
    with torch.no_grad():
        plain = model(ids)
    assert torch.equal(model.requires_grad_(False)(ids), plain)


def test_any_part_and_any_last_module(seed):
    torch.manual_seed(seed)
    x = torch.randn(5, 7, requires_grad=True)
    first, last = torch.nn.Linear(7, 7), torch.nn.Linear(7, 3)

    def part(x):
        y = torch.tanh(first(x))
        return y, (y * y).T.contiguous().T  # rows that are not next to one another

    y, z = part(x)
    expected = torch.autograd.grad((last(z) ** 2).sum() + y.sum(), [x, first.weight, last.weight])
    y, out = recompute(part, [first], [last], x)
    found = torch.autograd.grad((out**2).sum() + y.sum(), [x, first.weight, last.weight])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
