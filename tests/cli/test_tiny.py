"""The tiny Llama that comes with lowrank: small, a real language model, and a plain Llama."""

from __future__ import annotations

import random

import pytest
import torch

import lowrank
from tests.assets import train_tiny


def loss_per_token(model, rows) -> float:
    """Nats per token of [{"input_ids"}] but the first of each."""
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            total += model.loss(ids, ids).item()
            count += ids.shape[1] - 1
    return total / count


def test_it_is_under_a_megabyte(tiny):
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 1_000_000
    names = {file.name for file in tiny.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} == names


def test_it_is_a_language_model(tiny):
    """Of modules it has not seen, it is far better than counting pairs, and NF4 costs it little."""
    tokenizer = lowrank.load_tokenizer(tiny)
    texts, held_out = (
        [
            {
                "input_ids": [*tokenizer.encode(text), tokenizer.eos_token_id][
                    : train_tiny.MAX_LENGTH
                ]
            }
            for text in part
        ]
        for part in train_tiny.documentation()
    )
    held_out = random.sample(held_out, 100)
    unigram, bigram = train_tiny.count_models(texts, held_out)
    loss = loss_per_token(lowrank.load_model(tiny), held_out)
    assert loss < bigram - 0.4 < unigram - 1.5
    quantized = loss_per_token(lowrank.load_model(tiny, quantizer="nf4"), held_out)
    assert loss < quantized < loss + 0.1


def test_transformers_computes_the_same(tiny):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    text = (
        "Return a list of all the keys in the mailbox, é ünd 漢字 123.\n\n    def __init__(self):"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    ours = lowrank.load_tokenizer(tiny)
    assert ids[0].tolist() == ours.encode(text)
    assert ours.decode(ids[0].tolist()) == text
    with torch.no_grad():
        logits = lowrank.load_model(tiny)(ids)
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
