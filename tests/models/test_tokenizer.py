"""Tokenizers against transformers', and the GGUF ones against an independent byte-pair encoder."""

import json
from pathlib import Path

import pytest

import lowrank
from lowrank.data.chat import CHATML
from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers; pip install tokenizers")
transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")
regex = pytest.importorskip("regex", reason="the oracle needs regex; pip install regex")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "def f(x):\n    return x  # it's 1234, isn't it?\n\n\n\treturn  None ",
    "Grüße, 你好 👋🏽 naïve ½ ² ٣٤ \u00a0 x\r\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    "   ",
    "a'll B'LL 12ab34",
]


def train(vocab_size: int = 600) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on this file and the library's documentation."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [Path(__file__).read_text(encoding="utf-8"), json.__doc__, lowrank.load_model.__doc__]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder, **options):
    """As transformers saves one; returns theirs."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train(),
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        **options,
    )
    theirs.save_pretrained(folder)
    return theirs


MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Ünïcode?\n"},
    {"role": "assistant", "content": "Yes."},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_directory_of_transformers_and_back(tmp_path, template):
    theirs = write_tokenizer(tmp_path / "a", chat_template=template)
    ours = load_tokenizer(tmp_path / "a")
    ours.save(tmp_path / "b")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ids == again.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name) == getattr(again, name)
    assert len(ours) == len(theirs)
    if template:
        for tokenizer in (theirs, again):
            expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
            assert ours.apply_chat_template(MESSAGES) == expected
    else:
        again.chat_template = CHATML
        expected = again.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(MESSAGES, add_generation_prompt=True) == expected


def test_several_templates_take_the_default_one(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == TEMPLATE


def write_gguf_tokenizer(path, backend, pre="smollm", **changes):
    gguf = pytest.importorskip("gguf", reason="the writer; pip install gguf")
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(changes.get("merges", merges))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(changes.get("add_bos", False))
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens, [tuple(merge.split(" ")) for merge in merges]


def merge_by_rank(word: str, ranks: dict) -> list[str]:
    """Sennrich et al., algorithm 1: join the best-ranked neighbours until none has a rank."""
    parts = list(word)
    while len(parts) > 1:
        pairs = [ranks.get(pair, len(ranks)) for pair in zip(parts, parts[1:], strict=False)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def oracle_ids(text: str, tokens: list[str], merges: list, single_digits: bool) -> list[int]:
    """llama.cpp's words for the pre-tokenizer, in Python's regex; bytes as GPT-2 spells them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab, ranks = {t: i for i, t in enumerate(tokens)}, {pair: i for i, pair in enumerate(merges)}
    ids = []
    special = "|".join(map(regex.escape, SPECIAL))
    for chunk in regex.split(f"({special})", text):
        if chunk in SPECIAL:
            ids.append(vocab[chunk])
            continue
        for piece in regex.split(r"(\p{N})", chunk) if single_digits else [chunk]:
            for word in regex.findall(GPT2_WORDS, piece):
                parts = merge_by_rank("".join(spelled[b] for b in word.encode()), ranks)
                ids += [vocab[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    ("pre", "single_digits"), [("smollm", True), ("gpt-2", False), ("default", False)]
)
def test_a_gguf_tokenizer_equals_byte_pair_encoding_by_the_book(tmp_path, pre, single_digits):
    tokens, merges = write_gguf_tokenizer(tmp_path / "t.gguf", train(), pre)
    ours = load_tokenizer(tmp_path / "t.gguf")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == oracle_ids(text, tokens, merges, single_digits)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)
    assert ours.apply_chat_template(MESSAGES).startswith("<|im_start|>[system] Be <brief>")
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_a_gguf_tokenizer_of_qwen_equals_transformers(tmp_path):
    tokens, merges = write_gguf_tokenizer(tmp_path / "t.gguf", train(), "qwen2")
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    theirs.add_special_tokens({"additional_special_tokens": SPECIAL})
    ours = load_tokenizer(tmp_path / "t.gguf")
    for text in (*TEXTS, "e\u0301t\u00e9", "1234 5\r\n\r\n  x"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def write_sentencepiece(path, **changes):
    """Bytes, characters and merged pieces of this file with scores; returns {piece: score}."""
    gguf = pytest.importorskip("gguf", reason="the writer; pip install gguf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False)
    text = Path(__file__).read_text(encoding="utf-8").replace(" ", "\u2581")
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *learned]
    scores = [0.0] * 259 + [float(-i) for i in range(len(learned))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(learned)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(changes.get("add_space_prefix", True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokens, dict(zip(tokens, scores, strict=True))


def merge_by_score(text, scores):
    """SentencePiece by the book: of all that can merge, the best, and of these the first."""
    parts = list(text)
    while True:
        found = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in scores
        ]
        if not found:
            return parts
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("before", [True, False])
def test_a_gguf_tokenizer_of_sentencepiece_equals_merging_by_score(tmp_path, before):
    tokens, scores = write_sentencepiece(tmp_path / "t.gguf", add_space_prefix=before)
    ids = {token: i for i, token in enumerate(tokens)}
    ours = load_tokenizer(tmp_path / "t.gguf")
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    for text in [t for t in (*TEXTS, *lines[:80]) if t and not t.startswith("<|")]:
        spaced = ("\u2581" * before + text).replace(" ", "\u2581")
        expected = [
            i
            for part in merge_by_score(spaced, scores)
            for i in ([ids[part]] if part in ids else [3 + b for b in part.encode()])
        ]
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == text
    assert ours.encode("a", add_special_tokens=True)[0] == 1
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode("def f(x)", add_special_tokens=False) == ours.encode("def f(x)")


def test_a_gguf_that_asks_for_it_begins_with_its_first_token(tmp_path):
    write_gguf_tokenizer(tmp_path / "t.gguf", train(), add_bos=True)
    ours = load_tokenizer(tmp_path / "t.gguf")
    assert ours.encode("hi", add_special_tokens=True) == [1, *ours.encode("hi")]


def test_tokenizers_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match="expected tokenizer.json; save the tokenizer with"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(FileFormatError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<nope>"}))
    with pytest.raises(FileFormatError, match="eos_token: '<nope>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    for change, says in [
        ({"eos_token": 5}, "eos_token: expected text; got 5"),
        ({"eos_token": {"content": [1]}}, r"eos_token: expected text; got \[1\]"),
        ({"chat_template": 5}, "chat_template: expected text; got 5"),
        ({"eos_token": "\ud800"}, r"eos_token: expected text; got '\\ud800'"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected objects with name"),
        ({"chat_template": [5]}, "chat_template: expected objects with name"),
    ]:
        path.write_text(json.dumps(change))
        with pytest.raises(FileFormatError, match=says) as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path) in str(caught.value)
    path.write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(FileFormatError, match="chat_template.jinja: not UTF-8"):
        load_tokenizer(tmp_path)
    gguf = tmp_path / "t.gguf"
    for change, error, says in [
        ({"model": "bert"}, ConfigError, "expected gpt2 .* got 'bert'"),
        ({"pre": "chatglm"}, ConfigError, "tokenizer.ggml.pre: .* got 'chatglm'"),
        ({"model": "llama"}, FileFormatError, "tokenizer.ggml.scores: expected 600 numbers"),
        ({"merges": ["zz yy"]}, FileFormatError, "tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, FileFormatError, "merges: expected pairs of tokens; got 'a b c'"),
    ]:
        write_gguf_tokenizer(gguf, train(), **change)
        with pytest.raises(error, match=says):
            load_tokenizer(gguf)
    with pytest.raises(ConfigError, match="no such directory or .gguf file"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.slow
def test_smollm2_ids(smollm2, data_dir):
    from lowrank.models.gguf_file import GGUFFile

    ours = load_tokenizer(smollm2)
    metadata = GGUFFile(smollm2).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    text = (data_dir / "wikitext2_valid.txt").read_text(encoding="utf-8")[:60_000]
    code = Path(__file__).read_text(encoding="utf-8")
    for sample in (*TEXTS, text, code):
        assert ours.encode(sample) == oracle_ids(sample, tokens, merges, single_digits=True)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # transformers leaves out the splitting of digits, so only where there are none
    for line in text.splitlines():
        if not any(character.isnumeric() for character in line):
            assert ours.encode(line) == theirs.encode(line, add_special_tokens=False)
