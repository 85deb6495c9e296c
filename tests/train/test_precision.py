"""fp16 with a scaled loss against torch's autocast and GradScaler, and where it cannot go on."""

from __future__ import annotations

import copy

import pytest
import torch

from lowrank.errors import ConfigError, TrainingError
from lowrank.train import Callback, TrainConfig, Trainer

from .support import Small, example_loss, examples, windows


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "max_grad_norm": 0.5, **settings}
    rates = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return TrainConfig(path / "run", fp16=True, **rates, **settings)


class Scales(Callback):
    """The scale of the loss after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, loop):
        self.seen.append(loop.update.scaler.get_scale())


def amp_loop(model, steps):
    """Losses as PyTorch's mixed-precision recipe has them, one example a forward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for window in steps:
        with torch.autocast("cpu", torch.float16):
            parts = [example_loss(model, row) for row in window]
            loss = sum(part.float() for part, _ in parts) / sum(count for _, count in parts)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_equals_torch_amp(tmp_path, generator):
    rows, model = examples(12, generator), Small()
    expected = amp_loop(copy.deepcopy(model), windows(rows, 42, 2, 4))
    dtypes = set()
    model.head.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    result = Trainer(model, config(tmp_path), rows).train()
    torch.testing.assert_close(result.losses, expected, rtol=2e-3, atol=0)
    assert dtypes == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_scale_that_overflows_is_halved_and_the_step_taken_again(tmp_path, generator):
    """No step is lost: the losses are those of a scale that was right from the start."""

    class Loud(Small):
        def forward(self, input_ids):
            return super().forward(input_ids) * 40.0

    rows, model, scales = examples(12, generator), Loud(), Scales()
    with torch.no_grad():
        model.head.weight.mul_(30.0)
    same = copy.deepcopy(model)
    result = Trainer(model, config(tmp_path / "found"), rows, callbacks=[scales]).train()
    assert scales.seen[0] < 2.0**16 and len(result.losses) == 6

    class Right(Callback):
        def on_train_begin(self, loop):
            loop.update.scaler = torch.amp.GradScaler("cpu", init_scale=min(scales.seen))

    expected = Trainer(same, config(tmp_path / "right"), rows, callbacks=[Right()]).train()
    # a power of two moves no bit but those of subnormal numbers
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-3, atol=0)


def test_what_would_underflow_is_learned(tmp_path, generator):
    """Gradients of activations below float16's least number, which the scale lifts."""

    class Quiet(Small):
        def forward(self, input_ids):
            h = self.mix(self.embed(input_ids))[0].half()
            h.register_hook(lambda grad: (grad.float() * 1e-7).to(grad.dtype))
            return self.head(h)

    model = Quiet()
    model.head.requires_grad_(False)
    result = Trainer(model, config(tmp_path), examples(12, generator)).train()
    assert len(set(result.losses)) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_no_scale_makes_finite_stops_the_run(tmp_path, generator, value):
    model = Small()
    before = copy.deepcopy(model.state_dict())
    model.head.weight.register_hook(lambda grad: grad * value)
    with pytest.raises(TrainingError, match="step 1: the norm of the gradient is (inf|nan) in the"):
        Trainer(model, config(tmp_path), examples(8, generator)).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_in_half_precision_are_not_trained(tmp_path, generator):
    model = Small()
    model.head.half()
    with pytest.raises(ConfigError, match="^fp16 trains .* float32; head.weight is float16: conve"):
        Trainer(model, config(tmp_path), examples(8, generator))
    with pytest.raises(ConfigError, match="bf16 and fp16 are both on: turn one of them off"):
        TrainConfig("out", bf16=True, fp16=True)
