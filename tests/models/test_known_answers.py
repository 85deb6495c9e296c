"""Real models: what they are known to answer, and transformers on the same weights."""

import math
import struct

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import lowrank
from lowrank.models.generate import generate_ids

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)
PROMPT = [1, 403, 407, 261, 378]


@pytest.fixture(scope="module")
def stories(data_dir):
    return data_dir / "stories260K"


def words(path) -> list[bytes]:
    """llama2.c's tokenizer file: the longest length, then score, length and bytes of each token."""
    raw, pieces, at = path.read_bytes(), [], 4
    while at < len(raw):
        _, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


def test_stories_continue_as_known(stories):
    model = lowrank.load_model(stories)
    (ids,) = generate_ids(model, [PROMPT], 60, ends={1, 2})
    pieces = words(stories / "tok512.bin")
    text = b"".join(pieces[i] for i in [*PROMPT[1:], *ids]).decode()
    assert text.strip().startswith(STORY)


def test_stories_logits_equal_transformers(stories):
    transformers = pytest.importorskip(
        "transformers", reason="the oracle; pip install transformers"
    )
    oracle = transformers.LlamaForCausalLM.from_pretrained(stories).eval()
    model = lowrank.load_model(stories)
    ids = torch.randint(0, 512, (3, 123))
    assert_close(model(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)


def test_stories_learn_over_four_bits(stories, data_dir):
    """A few steps of QLoRA on real text, spelled in the model's own single-byte tokens."""
    pieces = words(stories / "tok512.bin")
    ids_of = {piece: i for i, piece in enumerate(pieces) if i > 2 and len(piece) == 1}
    text = (data_dir / "tinyshakespeare.txt").read_bytes()[:8192]
    ids = torch.tensor([ids_of[bytes([b])] for b in text if bytes([b]) in ids_of][:4096]).view(
        16, 256
    )
    model = lowrank.load_model(stories, quantizer="nf4")
    lowrank.inject(model, lowrank.LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for batch in ids.split(2):
        loss = model.loss(batch, batch) / (batch.numel() - len(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def perplexity(model, ids: torch.Tensor, window: int = 512) -> float:
    total = count = 0.0
    with torch.no_grad():
        for part in ids.split(window):
            out = model(part[None])
            logits = getattr(out, "logits", out)[0, :-1].float()
            total += F.cross_entropy(logits, part[1:], reduction="sum").item()
            count += len(part) - 1
    return math.exp(total / count)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_japan(smollm2):
    question = "What is the capital of Japan? Answer in one sentence."
    model, tokenizer = lowrank.load_model(smollm2), lowrank.load_tokenizer(smollm2)
    answer = lowrank.generate(model, tokenizer, [{"role": "user", "content": question}])
    assert answer == "The capital of Japan is Tokyo."


@pytest.mark.slow
def test_smollm2_perplexity_equals_transformers_and_its_dequantized_self(
    smollm2, data_dir, tmp_path
):
    transformers = pytest.importorskip(
        "transformers", reason="the oracle; pip install transformers"
    )
    text = (data_dir / "wikitext2_valid.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(lowrank.load_tokenizer(smollm2).encode(text)[:1024])
    assert len(ids) == 1024

    dense = lowrank.load_model(smollm2)
    # transformers' own reading of the file, not ours
    oracle = transformers.LlamaForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    expected = perplexity(oracle, ids)
    del oracle
    assert perplexity(dense, ids) == pytest.approx(expected, rel=1e-3)

    four_bit = lowrank.load_model(smollm2, quantizer="nf4")
    for name, module in four_bit.named_modules():
        if isinstance(module, lowrank.QuantLinear):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    quantized = perplexity(four_bit, ids)
    assert quantized == pytest.approx(perplexity(dense, ids), rel=1e-4)

    lowrank.save_model(four_bit, tmp_path)
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert quantized == pytest.approx(perplexity(saved, ids), rel=1e-3)
