"""The choice of a token: against transformers' own processors of logits."""

import pytest
import torch
from torch.testing import assert_close

from lowrank.models.sampling import Sampler, Sampling, distribution, penalised

logits_process = pytest.importorskip(
    "transformers.generation.logits_process", reason="the oracle; pip install transformers"
)

KINDS = [
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=7),
    dict(temperature=1.3, top_k=10**6),
    dict(temperature=0.9, top_p=0.8),
    dict(temperature=1.0, top_p=1.0),
    dict(temperature=3.0, top_p=0.999),
    dict(temperature=0.2, top_k=40, top_p=0.3),
]


def theirs(prompts, logits, temperature, top_k=None, top_p=None, penalty=1.0):
    """transformers' processors in the order in which its `generate` applies them."""
    chain = [logits_process.RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    chain.append(logits_process.TemperatureLogitsWarper(temperature))
    if top_k is not None:
        chain.append(logits_process.TopKLogitsWarper(min(top_k, logits.shape[-1])))
    if top_p is not None and top_p < 1:
        chain.append(logits_process.TopPLogitsWarper(top_p))
    for process in chain:
        logits = process(prompts, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("V", [37, 2500])
@pytest.mark.parametrize("options", KINDS)
def test_what_is_drawn_from_equals_transformers(V, options):
    for spread in (0.01, 1.0, 8.0):  # flat: the nucleus is larger than what is looked at first
        logits, prompts = torch.randn(5, V) * spread, torch.randint(V, (5, 9))
        seen = torch.zeros(5, V, dtype=torch.bool).scatter(1, prompts, True)
        for penalty in (1.0, 1.7, 0.6):
            ours = distribution(penalised(logits, seen, penalty), Sampling(**options))
            ours = ours / ours.sum(-1, keepdim=True)
            expected = theirs(prompts, logits, penalty=penalty, **options)
            # a token at the border of the nucleus may fall to either side by rounding
            differ = (ours == 0) != (expected == 0)
            assert differ.sum(-1).max() <= 1
            edge = differ.any(-1)
            assert edge.sum() <= 2
            assert_close(ours[~edge], expected[~edge])


def test_a_token_that_was_written_is_penalised_from_then_on():
    logits = torch.tensor([[1.0, 1.5, -1.0, 2.0], [4.0, 3.0, 2.5, -1.0]])
    sampler = Sampler(Sampling(repetition_penalty=2.0), [[3, 3], [1]], 4, torch.device("cpu"))
    steps = [sampler.choose(logits).tolist() for _ in range(4)]
    # halved once, however often they are there: 2 -> 1, 1.5 -> 0.75; 3 -> 1.5, 4 -> 2
    assert steps == [[1, 0], [0, 2], [3, 0], [3, 0]]
    assert logits[0, 3] == 2


def test_ties_at_the_kth_all_stay():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert (distribution(logits, Sampling(1.0, top_k=2)) > 0).tolist() == [
        [True, True, True, False]
    ]
