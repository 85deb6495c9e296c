"""Token ids and labels, against transformers' tokenizer and its mask of the assistant's tokens."""

from __future__ import annotations

import random

import pytest

from lowrank.data import load_examples, tokenize, tokenize_all
from lowrank.errors import DataError
from lowrank.models.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")
transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")
pytest.importorskip("jinja2", reason="needs jinja2: pip install jinja2")

SPECIAL = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# shows the reasoning of the last turn only, as several families do
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('!')[-1] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_CUE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }} / {% endfor %}{{ messages|length }}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
STRICT = (
    "{% if messages[-1]['role'] == 'user' and messages|length > 1 %}"
    "{{ raise_exception('the user has the last word') }}{% endif %}" + UNMARKED
)


def words(count: int) -> str:
    return " ".join(
        "".join(random.choices("abcdeé ,.\n", k=random.randint(1, 9))) for _ in range(count)
    )


@pytest.fixture(scope="module")
def backend():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([words(40) for _ in range(60)] + ["user assistant system"], trainer)
    return model


def ours(backend, template=None, bos=False) -> Tokenizer:
    config = {"eos_token": SPECIAL[0]}
    if bos:
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
        config["bos_token"] = SPECIAL[1]
    return Tokenizer(backend, config, template)


def conversation(turns: int, system: bool) -> list[dict]:
    """No answer begins with a line break, which would make one token with the cue's own."""
    roles = ["system"] * system + ["user", "assistant"] * turns
    return [{"role": role, "content": "a" + words(random.randint(1, 5))} for role in roles]


@pytest.mark.parametrize("bos", [False, True])
def test_text_ends_in_eos_and_is_learned_whole(backend, bos):
    tokenizer = ours(backend, bos=bos)
    start = [1] if bos else []
    for _ in range(20):
        text = words(5)
        plain = backend.encode(text).ids
        for given in (text, text + SPECIAL[0]):  # not twice
            found = tokenize({"text": given}, tokenizer)
            assert found["input_ids"] == start + plain + [0]
            assert found["labels"][len(start) :] == plain + [0]
    assert tokenize({"text": SPECIAL[1] + "a"}, tokenizer)["input_ids"].count(1) == 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("only", [True, False])
def test_a_prompt_keeps_the_ids_it_has_alone(backend, bos, only):
    """Even where the tokenizer would join the prompt's last letters with the completion's first."""
    tokenizer = ours(backend, bos=bos)
    joined = 0
    for _ in range(200):
        text = words(6)
        cut = random.randint(0, len(text) - 1)
        prompt, completion = text[:cut], text[cut:]
        example = {"prompt": prompt, "completion": completion}
        found = tokenize(example, tokenizer, completion_only_loss=only)
        head = [1] * bos + backend.encode(prompt).ids
        whole = [1] * bos + backend.encode(text).ids
        apart = head + backend.encode(completion).ids
        exact = whole[: len(head)] == head
        joined += not exact
        assert found["input_ids"] == (whole if exact else apart) + [0]
        learned = found["input_ids"][len(head) :]
        if only:
            assert found["labels"] == [-100] * len(head) + learned
        else:
            assert found["labels"][bos:] == found["input_ids"][bos:]
    assert joined > 20


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("system", [False, True])
def test_the_assistants_turns_as_transformers_marks_them(backend, system, template):
    """Where the template marks them as in transformers, and where it is rendered part by part."""
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], chat_template=CHATML
    )
    tokenizer = ours(backend, template)
    for turns in (1, 2, 5):
        messages = conversation(turns, system) + [{"role": "user", "content": words(2)}] * (
            turns % 2
        )
        expected = oracle.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = expected["input_ids"], expected["assistant_masks"]
        found = tokenize({"messages": messages}, tokenizer)
        assert found["input_ids"] == ids
        assert found["labels"] == [i if learn else -100 for i, learn in zip(ids, mask, strict=True)]
        assert sum(mask) > 0
        every = tokenize({"messages": messages}, tokenizer, completion_only_loss=False)
        assert every == {"input_ids": ids, "labels": ids}
        assert tokenize_all(load_examples([{"messages": messages}]), tokenizer).notes == []


def test_a_template_that_refuses_part_of_a_conversation(backend):
    """The cue for the second answer follows the user's message, where this template may not end."""
    tokenizer = ours(backend, STRICT)
    messages = conversation(2, False)
    found = tokenize({"messages": messages}, tokenizer)
    learned = [token for token in found["labels"] if token != -100]
    assert (
        tokenizer.decode(learned, skip_special_tokens=False)
        == f"{messages[1]['content']}<|im_end|>\n"
    )


def test_a_turn_that_is_shown_otherwise_once_past_is_not_learned(backend):
    tokenizer = ours(backend, FORGETFUL)
    messages = conversation(2, True)
    messages[2]["content"], messages[4]["content"] = "aa!bb", "cc!dd"
    found = tokenize({"messages": messages}, tokenizer)
    learned = [token for token in found["labels"] if token != -100]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "cc!dd<|im_end|>\n"
    notes = tokenize_all(load_examples([{"messages": messages}] * 2), tokenizer).notes
    assert len(notes) == 1 and notes[0].startswith("2 of 2 conversations have turns")


def test_a_template_that_does_not_show_turns_is_learned_whole_and_says_so(backend):
    tokenizer = ours(backend, NO_CUE, bos=True)
    rows = [{"messages": conversation(2, False)} for _ in range(3)]
    data = tokenize_all(load_examples(rows), tokenizer)
    assert "3 of 3 conversations are learned whole" in " ".join(data.notes)
    for i in range(3):
        ids = data.ids[data.offsets[i] : data.offsets[i + 1]].tolist()
        assert data.labels[data.offsets[i] : data.offsets[i + 1]].tolist() == [-100, *ids[1:]]
        assert ids.count(1) == 1  # the template writes the opening token itself


def test_a_conversation_that_the_template_refuses_is_named(backend, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n'
    )
    with pytest.raises(DataError, match=f"^{path}:2: .*the user has the last word"):
        tokenize_all(load_examples(path), ours(backend, STRICT))


def test_tools_reach_the_template(backend):
    tokenizer = ours(backend, "{{ tools[0].name }} " + CHATML)
    row = {"messages": conversation(1, False), "tools": [{"name": "abc"}]}
    ids = tokenize(row, tokenizer)["input_ids"]
    assert tokenizer.decode(ids).startswith("abc user")


def test_what_is_cut_and_what_is_dropped(backend):
    """Counted; an example whose completion lies past max_length has nothing left to learn."""
    tokenizer = ours(backend)
    rows = [{"prompt": words(random.randint(1, 8)), "completion": words(2)} for _ in range(60)]
    limit = 25
    full = [tokenize(row, tokenizer) for row in rows]
    cut = [tokenize(row, tokenizer, limit) for row in rows]
    assert cut == [{key: values[:limit] for key, values in row.items()} for row in full]
    kept = [row for row in cut if any(label != -100 for label in row["labels"][1:])]
    data = tokenize_all(load_examples(rows), tokenizer, limit)
    assert len(data) == len(kept) < 60
    assert data.truncated == sum(len(row["input_ids"]) > limit for row in full) > 0
    assert data.dropped == 60 - len(kept)
    assert f"{data.truncated} of 60 examples were cut to max_length=25" in data.notes[0]
    assert f"{data.dropped} of 60 examples have no token to learn" in data.notes[1]
    assert data.ids.tolist() == sum((row["input_ids"] for row in kept), [])
    assert [data.length(i) for i in range(len(kept))] == [len(row["input_ids"]) for row in kept]
    for i, row in enumerate(kept):
        assert data.labelled[i] == sum(label != -100 for label in row["labels"][1:])


def test_nothing_left_to_learn_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"input_ids": [5], "labels": [5]}\n{"input_ids": [1, 2], "labels": [1, -100]}\n'
    )
    with pytest.raises(DataError, match=f"{path}:1 .*no token is left to learn: 2 of 2 examples"):
        tokenize_all(load_examples(path), None)


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="examples of kind 'text' need a tokenizer; got None"):
        tokenize_all(load_examples([{"text": "a"}]), None)


@pytest.mark.parametrize(
    "empty", [{"text": ""}, {"prompt": "", "completion": ""}, {"prompt": "", "completion": "a b"}]
)
def test_an_empty_text_has_nothing_to_learn(backend, empty):
    tokenizer = ours(backend)
    full = dict.fromkeys(empty, "a sentence")
    found = tokenize_all(load_examples([full, empty, full]), tokenizer)
    kept = tokenize(empty, tokenizer)["input_ids"]
    assert kept == backend.encode(empty.get("completion", "")).ids + [0]
    assert len(found) == (3 if len(kept) > 1 else 2) and found.dropped == 3 - len(found)


def test_ids_that_the_model_does_not_know_are_named(backend, tmp_path):
    path = tmp_path / "data.jsonl"
    for bad in ('{"input_ids": [1, 2, 300]}', '{"input_ids": [1, 2, 3], "labels": [-100, 300, 3]}'):
        path.write_text('{"input_ids": [1, 2, 299]}\n' + bad)
        assert len(tokenize_all(load_examples(path), None, vocab_size=301)) == 2
        with pytest.raises(DataError, match=r"data.jsonl:2: .* below .*vocab_size=300; got 300"):
            tokenize_all(load_examples(path), None, vocab_size=300)
    with pytest.raises(DataError, match="example 0: expected token ids below"):
        tokenize_all(load_examples([{"text": words(9)}]), ours(backend), vocab_size=9)
