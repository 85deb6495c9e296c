"""The tokenizer in a GGUF file's metadata: byte-level BPE, as GPT-2's, or SentencePiece's BPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.gguf_file import GGUFFile
from lowrank.models.tokenizer import Tokenizer, import_tokenizers

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # llama.cpp's kinds of token; the rest are ordinary
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# how the words of a text are found, by llama.cpp's names; Qwen's digits stand alone
_WORDS = {"llama-bpe": _LLAMA3_WORDS, "qwen2": _LLAMA3_WORDS.replace("{1,3}", "")}
_SPACE = "\u2581"


def tokenizer_from_gguf(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file whose `tokenizer.ggml.model` is gpt2 or llama."""
    tokenizers = import_tokenizers()
    metadata = GGUFFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{path}: tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama "
            f"(SentencePiece); got {kind!r}; load the tokenizer of the model's Hugging Face "
            "directory"
        )
    tokens = _strings(path, metadata, "tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = (_byte_level if kind == "gpt2" else _sentencepiece)(path, metadata, vocab)
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list):
        raise FileFormatError(f"{path}: tokenizer.ggml.token_type: expected a list; got {kinds!r}")
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            backend.add_special_tokens([added]) if added.special else backend.add_tokens([added])

    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    for theirs, ours in names.items():
        i = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            config[f"{ours}_token"] = tokens[i]
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in config:
        bos = config["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return Tokenizer(backend, config, metadata.get("tokenizer.chat_template"))


def _byte_level(path: str | Path, metadata: Mapping[str, Any], vocab: dict[str, int]) -> Any:
    """Words cut by a rule of their own, in bytes, and merged in the order of a list."""
    import tokenizers

    merges = [tuple(m.split(" ")) for m in _strings(path, metadata, "tokenizer.ggml.merges")]
    if broken := [merge for merge in merges if len(merge) != 2]:
        raise FileFormatError(
            f"{path}: tokenizer.ggml.merges: expected pairs of tokens; got {' '.join(broken[0])!r}"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    try:
        # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say
        model = tokenizers.models.BPE(vocab, merges, ignore_merges=name == "llama-bpe")
    except Exception as error:  # tokenizers raises Exception itself
        raise FileFormatError(f"{path}: tokenizer.ggml.merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(path, name)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    return backend


def _sentencepiece(path: str | Path, metadata: Mapping[str, Any], vocab: dict[str, int]) -> Any:
    """Spaces are letters, and of two tokens side by side those merge whose whole scores highest.

    What is in no token becomes the bytes it is made of.   Kudo & Richardson, arXiv:1808.06226.
    """
    import tokenizers

    scores = metadata.get("tokenizer.ggml.scores")
    numbers = isinstance(scores, list) and all(isinstance(score, float) for score in scores)
    if not numbers or len(scores) != len(vocab):
        raise FileFormatError(
            f"{path}: tokenizer.ggml.scores: expected {len(vocab)} numbers, one for each token, of "
            "which no two are the same"
        )
    ranked = sorted(vocab, key=lambda token: -scores[vocab[token]])
    merges = [
        pair
        for token in ranked
        for pair in ((token[:i], token[i:]) for i in range(1, len(token)))
        if pair[0] in vocab and pair[1] in vocab
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    names = list(vocab)
    in_range = isinstance(unknown, int) and 0 <= unknown < len(names)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab,
            merges,
            unk_token=names[unknown] if in_range else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    before = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = tokenizers.normalizers.Replace(" ", _SPACE)
    steps = [tokenizers.normalizers.Prepend(_SPACE), replace] if before else [replace]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    decoders = tokenizers.decoders
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(before))
    return backend


def _pre_tokenizer(path: str | Path, name: str):
    """How text is cut into words before merging."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("default", "gpt-2"):
        return byte_level
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if name in _WORDS:
        words = pre_tokenizers.Split(Regex(_WORDS[name]), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, bytes_only])
    raise ConfigError(
        f"{path}: tokenizer.ggml.pre: expected default, gpt-2, smollm, {' or '.join(_WORDS)}; got "
        f"{name!r}; load the tokenizer of the model's Hugging Face directory"
    )


def _strings(path: str | Path, metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FileFormatError(f"{path}: {key}: expected a list of strings")
    return value
