"""The cache of keys and values: what it holds of layers that see a window, and what it costs."""

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.models.cache import KVCache
from tests.models.families import FAMILIES, WINDOW, make, pair
from tests.models.helpers import tokens

pytest.importorskip("transformers", reason="the oracle; pip install transformers")


@pytest.mark.parametrize("name", ["mistral", "phi3", "gemma2", "gemma3", "qwen2-window"])
def test_a_window_bounds_what_is_held(name, tmp_path):
    model, _ = pair(name, tmp_path)
    short, long = (KVCache(model.config, 2, capacity) for capacity in (4 * WINDOW, 400 * WINDOW))
    for layer in range(model.config.num_hidden_layers):
        window = model.config.kinds[model.config.kind_of(layer)].window
        places = [t.shape[1] for cache in (short, long) for t in cache.of(layer)]
        if window is None:
            assert places == [4 * WINDOW] * 2 + [400 * WINDOW] * 2
        else:
            assert len({*places}) == 1 and WINDOW <= places[0] <= 1.25 * WINDOW


@pytest.mark.parametrize("steps", [[1] * 60, [40, *[1] * 9, 30, 1], [15, 1, 1, 2, 17, 3, 18, 5]])
@pytest.mark.parametrize("window", [1, 2, WINDOW, 50, 1000])
def test_any_steps_see_what_the_window_shows(window, steps, tmp_path):
    """Also batches with padding on the left: all of a text at once gives the same."""
    changes = {**FAMILIES["gemma3"][1], "sliding_window": window}
    make("gemma3", **changes).save_pretrained(tmp_path)
    model = lowrank.load_model(tmp_path)
    length = sum(steps)
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 3], mask[2, : length - 1] = 0, 0
    with torch.no_grad():
        for seen in (None, mask):
            expected = model(ids, seen)
            cache, end = KVCache(model.config, 3, length), 0
            for step in steps:
                start, end = end, end + step
                now = None if seen is None else seen[:, :end]
                logits = model(ids[:, start:end], now, cache=cache)
                here = slice(None) if seen is None else seen[:, start:end].bool()
                assert_close(logits[here], expected[:, start:end][here], rtol=1e-4, atol=1e-4)
            assert cache.length == length


def test_a_text_of_several_windows_is_written_as_transformers_writes_it(tmp_path):
    model, oracle = pair("mistral", tmp_path)
    prompt = tokens(1, 3)
    cache, written = KVCache(model.config, 1, 120), []
    ids = prompt
    with torch.no_grad():
        while cache.length < 110:
            logits = model(ids, logits_to_keep=1, cache=cache)[:, -1]
            expected = oracle(torch.cat([prompt, *written], dim=1)).logits[:, -1]
            assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            written.append(ids := logits.argmax(-1, keepdim=True))
