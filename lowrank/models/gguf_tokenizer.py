"""The tokenizer in a GGUF file's metadata: byte-level BPE, as in GPT-2 and its descendants."""

from __future__ import annotations

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


def tokenizer_from_gguf(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file whose `tokenizer.ggml.model` is gpt2."""
    tokenizers = import_tokenizers()
    metadata = GGUFFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(
            f"{path}: tokenizer.ggml.model: expected gpt2 (byte-level BPE); got {kind!r}; "
            "load the tokenizer of the model's Hugging Face directory"
        )
    tokens = _strings(path, metadata, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in _strings(path, metadata, "tokenizer.ggml.merges")]
    if broken := [merge for merge in merges if len(merge) != 2]:
        raise FileFormatError(
            f"{path}: tokenizer.ggml.merges: expected pairs of tokens; got {' '.join(broken[0])!r}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = tokenizers.models.BPE(vocab, merges, ignore_merges=_ignores_merges(metadata))
    except Exception as error:  # tokenizers raises Exception itself
        raise FileFormatError(f"{path}: tokenizer.ggml.merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(path, metadata.get("tokenizer.ggml.pre", "default"))
    backend.decoder = tokenizers.decoders.ByteLevel()
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


def _pre_tokenizer(path: str | Path, name: str):
    """How text is cut into words before merging; names are llama.cpp's."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("default", "gpt-2"):
        return byte_level
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if name == "llama-bpe":
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, bytes_only])
    raise ConfigError(
        f"{path}: tokenizer.ggml.pre: expected default, gpt-2, smollm or llama-bpe; got {name!r}; "
        "load the tokenizer of the model's Hugging Face directory"
    )


def _ignores_merges(metadata: dict[str, Any]) -> bool:
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say
    return metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def _strings(path: str | Path, metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FileFormatError(f"{path}: {key}: expected a list of strings")
    return value
