"""torch_compile: the same losses, from graphs that serve batches of every size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import ConfigError
from lowrank.train import Callback, TrainConfig, Trainer

from .support import VOCAB, Small, examples
from .test_decoder_training import decoder

# the compiler looks at the gradients of what it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 4, "per_device_train_batch_size": 3, **settings}
    return TrainConfig(path, learning_rate=1e-2, lr_scheduler_type="constant", **settings)


def adapted():
    model = lowrank.quantize(decoder(), "nf4")
    return lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules=["q_proj", "down_proj"]))


class Counts(Callback):
    """How many graphs there are after each step."""

    def __init__(self, graphs):
        self.graphs, self.counts = graphs, []

    def on_step_end(self, loop):
        self.counts.append(len(self.graphs))


@pytest.fixture(scope="module")
def registered():
    """The graphs that the backend `counting` was given, which runs them as they are."""
    found = []

    def counting(graph, example_inputs):
        found.append(graph)
        return graph

    torch._dynamo.register_backend(counting, name="counting")
    return found


@pytest.fixture
def graphs(registered):
    torch.compiler.reset()
    registered.clear()
    yield registered
    torch.compiler.reset()


class Means(nn.Module):
    """The mean of the embeddings so far: quickly compiled."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)

    def forward(self, input_ids):
        count = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        return self.head(self.embed(input_ids).cumsum(1) / count[:, None])


@pytest.mark.parametrize(
    "make", [Means, pytest.param(adapted, marks=pytest.mark.slow)], ids=["padded", "end to end"]
)
def test_compiled_learns_the_same(tmp_path, generator, graphs, make):
    """With noise and smoothing, in ten steps whose graphs are not those of ten shapes."""
    rows, model = examples(15, generator), make()
    rest = {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "max_steps": 10}
    expected = Trainer(copy.deepcopy(model), config(tmp_path / "a", **rest), rows).train()
    settings = config(tmp_path / "b", torch_compile_backend="counting", **rest)
    counting = Counts(graphs)
    result = Trainer(model, settings, rows, callbacks=[counting]).train()
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-4, atol=0)
    first, last = counting.counts[0], counting.counts[-1]
    assert 0 < first <= last < 5 * first


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [True, False])
def test_through_the_real_compiler(tmp_path, generator, padding_free):
    rows, model = examples(9, generator), adapted()
    rest = {"padding_free": padding_free}
    expected = Trainer(copy.deepcopy(model), config(tmp_path / "a", **rest), rows).train()
    result = Trainer(model, config(tmp_path / "b", torch_compile=True, **rest), rows).train()
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-4, atol=0)


def test_a_backend_that_is_none_is_refused(tmp_path, generator):
    with pytest.raises(
        ConfigError, match="^torch_compile_backend must be one of .*inductor.*; got"
    ):
        settings = config(tmp_path / "run", torch_compile_backend="inducter")
        Trainer(Small(), settings, examples(4, generator))
    assert not (tmp_path / "run").exists()
