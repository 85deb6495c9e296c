"""Every family writes what transformers does, in a batch, and to the last of its positions."""

import pytest
import torch

from lowrank.models.generate import generate_ids
from tests.models.families import FAMILIES, WINDOW, pair
from tests.models.helpers import assert_same_greedy, tokens

pytest.importorskip("transformers", reason="the oracle; pip install transformers")


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_equal_transformers(name, tmp_path):
    model, oracle = pair(name, tmp_path)
    oracle.generation_config.eos_token_id = None
    # a prompt longer than the window, one that outgrows it, one that stays within
    prompts = [tokens(1, S)[0].tolist() for S in (WINDOW + 9, WINDOW - 5, 2)]
    together = generate_ids(model, prompts, 10)
    longest = len(prompts[0]) + 10
    for prompt, written in zip(prompts, together, strict=True):
        assert len(written) == 10
        if model.config.length_matters:  # turned by the longest of a batch: see by how much at once
            padded = torch.tensor([prompt + written])
            expected = logits_as_long_as(model, padded, longest)[0, len(prompt) - 1 : -1]
            best = expected.max(-1).values
            assert (best - expected[range(10), written]).max() < 1e-4
            continue
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )  # fmt: skip
        assert_same_greedy(oracle, prompt, written, expected[0, len(prompt) :].tolist())


def logits_as_long_as(model, ids, length):
    """The logits where a text of that length is read, of its first tokens."""
    rest = torch.zeros(1, length - ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        return model(torch.cat([ids, rest], dim=1))[:, : ids.shape[1]]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_short_row_is_written_on_where_a_long_one_has_ended(name, tmp_path):
    model, _ = pair(name, tmp_path)
    most = model.config.max_position_embeddings
    prompts = [tokens(1, S)[0].tolist() for S in (most - 2, most - 9)]
    together = generate_ids(model, prompts, 10**6)
    assert [len(written) for written in together] == [3, 10]
    for prompt, written in zip(prompts, together, strict=True):
        assert_same_greedy(model, prompt, written, *generate_ids(model, [prompt], 10**6))
