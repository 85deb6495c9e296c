"""Text in pieces: whole characters, nothing of a stop string, and together the text of all ids."""

import random

import pytest

from lowrank.models.tokenizer import Tokenizer
from lowrank.models.writing import Writing
from tests.models.test_tokenizer import SPECIAL, TEXTS, train

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers; pip install tokenizers")


def byte_level() -> Tokenizer:
    return Tokenizer(train(), {"eos_token": SPECIAL[0]})


def sentencepiece() -> Tokenizer:
    """As Llama 2's: words after a mark for the space, other characters as bytes."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgh", "▁a", "▁de"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("d", "e"), ("▁", "de")]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {**vocab, "de": len(vocab)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return KINDS[request.param]()


def pieces(tokenizer, ids, stop=(), ends=frozenset(), most=10**6):
    writing, found = Writing(tokenizer, ends, stop, min(most, len(ids))), []
    for token in ids:
        found.append(writing.add(token))
        if writing.ended:
            break
    assert writing.ended
    return found


def random_text() -> str:
    return "".join(random.choices(" abcdefgh\n.ß你👋🏽é", k=random.randrange(1, 60)))


def test_pieces_make_the_text(tokenizer):
    for text in [*TEXTS, *(random_text() for _ in range(60))]:
        if ids := tokenizer.encode(text):
            found = pieces(tokenizer, ids)
            assert "".join(found) == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in found)


def test_any_ids_make_the_text_that_decoding_them_makes():
    tokenizer = byte_level()
    for _ in range(200):  # bytes that are no characters among them
        ids = random.choices(range(len(tokenizer)), k=random.randrange(1, 40))
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_ends_before_the_first_stop_string(tokenizer):
    for _ in range(150):
        ids = tokenizer.encode(random_text())
        text = tokenizer.decode(ids)
        stop = ["never there"]
        for _ in range(random.randrange(1, 4)):
            start = random.randrange(len(text) + 1)
            stop.append(text[start : start + random.randrange(1, 6)] or "x")
        found = pieces(tokenizer, ids, stop)
        # as if it were read character by character
        reads = (text[:n] for n in range(len(text) + 1))
        ends = next(([len(r) - len(s) for s in stop if r.endswith(s)] for r in reads
                     if r.endswith(tuple(stop))), [len(text)])  # fmt: skip
        assert "".join(found) == text[: min(ends)]


def test_a_piece_is_held_back_only_while_it_may_begin_a_stop_string():
    tokenizer = byte_level()
    ids = [i for c in "ab<c<|d<|e" for i in tokenizer.encode(c)]
    assert pieces(tokenizer, ids, ["<|e", "zz"]) == ["a", "b", "", "<c", "", "", "<|d", "", "", ""]


def test_an_end_token_ends_it_and_most_does(tokenizer):
    ids = tokenizer.encode("a de")
    end = tokenizer.eos_token_id
    assert "".join(pieces(tokenizer, [*ids, end, *ids], ends={end})) == tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids * 3, most=len(ids))) == tokenizer.decode(ids)
    first = tokenizer.encode("👋")
    assert len(first) > 1
    assert "".join(pieces(tokenizer, first, most=1)) == tokenizer.decode(first[:1])
