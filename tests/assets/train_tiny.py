"""Trains the tiny Llama of `lowrank demo --tiny` and the tests: python -m tests.assets.train_tiny

A language model of the standard library's documentation, names and signatures with docstrings, of
the modules that `lowrank.data.stdlib` does not hold out. About ten minutes on one core; fp16,
under 1 MB with its tokenizer. Its held-out loss is printed beside those of a unigram and a bigram.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import lowrank
from lowrank.data import stdlib
from lowrank.io.safetensors import save_safetensors
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.train import TrainConfig, Trainer

OUTPUT = Path(lowrank.__file__).parent / "cli" / "tiny"
EOS = "<|endoftext|>"
SPECIAL = [EOS, "<|im_start|>", "<|im_end|>"]
CONFIG = DecoderConfig(
    vocab_size=768,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    eos_token_id=0,
    pad_token_id=0,
)
MAX_LENGTH = 384


def documentation() -> tuple[list[str], list[str]]:
    """(train, held-out) texts: a name, its signature where Python knows it, its whole docstring."""
    train: list[str] = []
    held_out: list[str] = []
    for name, obj in stdlib.documented():
        try:
            signature = str(inspect.signature(obj))
        except (TypeError, ValueError, AttributeError):
            signature = ""
        text = f"{name}{signature}\n\n{inspect.cleandoc(obj.__doc__)}"
        if " at 0x" not in text:
            (held_out if stdlib.is_held_out(name) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def examples(tokenizer: Tokenizer, texts: list[str]) -> list[dict[str, list[int]]]:
    """Each text with its end, cut into pieces of MAX_LENGTH."""
    rows = [[*tokenizer.encode(text).ids, CONFIG.eos_token_id] for text in texts]
    pieces = [row[i : i + MAX_LENGTH] for row in rows for i in range(0, len(row), MAX_LENGTH)]
    return [{"input_ids": piece} for piece in pieces if len(piece) > 1]


def count_models(train: list[dict], held_out: list[dict]) -> tuple[float, float]:
    """Nats per held-out token of a unigram, and of a bigram interpolated with it."""
    V = CONFIG.vocab_size
    one = Counter(t for row in train for t in row["input_ids"][1:])
    two = Counter(
        pair for row in train for pair in zip(row["input_ids"], row["input_ids"][1:], strict=False)
    )
    left = Counter(t for row in train for t in row["input_ids"][:-1])
    total = sum(one.values())
    unigram = bigram = n = 0
    for row in held_out:
        for a, b in zip(row["input_ids"], row["input_ids"][1:], strict=False):
            p = (one[b] + 1) / (total + V)
            q = (two[a, b] + 20 * p) / (left[a] + 20)  # Dirichlet smoothing
            unigram, bigram, n = unigram - math.log(p), bigram - math.log(q), n + 1
    return unigram / n, bigram / n


def save(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face directory in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        n: p.detach().to(torch.float16) for n, p in model.named_parameters()
    }  # the tied head once
    save_safetensors(folder / "model.safetensors", state)
    config = json.dumps(CONFIG.to_hf(torch.float16), indent=2)
    (folder / "config.json").write_text(config + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    settings |= {
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--epochs", type=float, default=10)
    args = parser.parse_args()

    torch.manual_seed(0)
    texts, held_out_texts = documentation()
    tokenizer = train_tokenizer(texts)
    train, held_out = examples(tokenizer, texts), examples(tokenizer, held_out_texts)
    unigram, bigram = count_models(train, held_out)
    tokens = sum(len(row["input_ids"]) for row in train)
    print(f"{len(train)} texts, {tokens} tokens; held out {len(held_out)}; "
          f"nats per token: unigram {unigram:.3f}, bigram {bigram:.3f}")  # fmt: skip

    model = Decoder(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=Path(folder) / "run",
            learning_rate=3e-3,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            warmup_ratio=0.02,
            weight_decay=0.05,
            adam_beta2=0.98,
            max_length=MAX_LENGTH,
            logging_steps=50,
            eval_steps=500,
        )
        result = Trainer(model, config, train, held_out).train()
    save(model, tokenizer, args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"nats per held-out token: {result.metrics}; {size} bytes in {args.output}")


if __name__ == "__main__":
    main()
