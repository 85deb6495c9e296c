"""What of an example is learned: instructions, conversations that are asked and answered, tools."""

from __future__ import annotations

import pytest

from lowrank.data import load_examples, tokenize, tokenize_all
from lowrank.data.chat import CHATML, render_spans
from lowrank.errors import DataError, MissingPackageError

from .test_tokens import CHATML as MARKED
from .test_tokens import NO_CUE, SPECIAL, conversation, ours, words
from .test_tokens import backend as backend

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def learned(found: dict, tokenizer) -> str:
    ids = [token for token in found["labels"] if token != -100]
    return tokenizer.decode(ids, skip_special_tokens=False)


def text(found: dict, tokenizer) -> str:
    return tokenizer.decode(found["input_ids"], skip_special_tokens=False)


INSTRUCTION = {"instruction": "add", "input": "1 2", "output": "3"}


def test_an_instruction_without_a_chat_template(backend):
    tokenizer = ours(backend)
    found = tokenize(INSTRUCTION, tokenizer)
    asked = "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"
    assert text(found, tokenizer) == asked + "3" + SPECIAL[0]
    assert learned(found, tokenizer) == "3" + SPECIAL[0]
    for empty in ("", None):
        short = tokenize({**INSTRUCTION, "input": empty}, tokenizer)
        assert text(short, tokenizer) == asked.replace("### Input:\n1 2\n\n", "") + "3" + SPECIAL[0]
    every = tokenize(INSTRUCTION, tokenizer, completion_only_loss=False)
    assert every == {"input_ids": found["input_ids"], "labels": found["input_ids"]}


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_instruction_is_a_conversation_for_a_chat_model(backend, template):
    """Asked as `generate` asks: what is not learned is the prompt with the cue to answer."""
    tokenizer = ours(backend, template)
    asked = [{"role": "user", "content": "add\n\n1 2"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(asked, add_generation_prompt=True))
    found = tokenize(INSTRUCTION, tokenizer)
    assert found["labels"][: len(prompt)] == [-100] * len(prompt)
    assert found["input_ids"][: len(prompt)] == prompt
    assert learned(found, tokenizer) == "3<|im_end|>\n"
    assert text(found, tokenizer).count(SPECIAL[0]) == 0  # a template writes its own end


def test_a_prompt_and_a_completion_of_messages(backend):
    """The same tokens as one conversation; only the completion's are learned, whoever says it."""
    tokenizer = ours(backend, CHATML)
    messages = conversation(3, True)
    row = {"prompt": messages[:5], "completion": messages[5:]}
    found = tokenize(row, tokenizer)
    whole = tokenize({"messages": messages}, tokenizer)
    assert found["input_ids"] == whole["input_ids"]
    said = [f"{message['content']}<|im_end|>\n" for message in messages[5:]]
    told = f"<|im_start|>user\n{said[0]}<|im_start|>assistant\n{said[1]}"
    assert learned(found, tokenizer) == told
    answered = tokenize({"prompt": messages[:-1], "completion": messages[-1:]}, tokenizer)
    assert learned(answered, tokenizer) == said[1]
    every = tokenize(row, tokenizer, completion_only_loss=False)
    assert every["labels"] == every["input_ids"] == whole["input_ids"]


def test_a_prompt_that_changes_once_it_is_answered_is_refused(backend):
    tokenizer = ours(backend, NO_CUE, bos=True)
    messages = conversation(1, False)
    with pytest.raises(DataError, match="shows the prompt otherwise once the completion follows"):
        tokenize({"prompt": messages[:1], "completion": messages[1:]}, tokenizer)


def test_sharegpt(backend):
    tokenizer = ours(backend, CHATML)
    messages = conversation(2, True)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    told = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    assert load_examples([{"conversations": told}])[0] == {"messages": messages}
    found = tokenize({"conversations": told}, tokenizer)
    assert found == tokenize({"messages": messages}, tokenizer)


def test_assistant_only_loss(backend):
    """As completion_only_loss unless it is said; then it insists on a template with turns."""
    row = {"messages": conversation(2, False)}
    tokenizer = ours(backend, CHATML)
    turns, every = (tokenize(row, tokenizer, completion_only_loss=only) for only in (True, False))
    assert turns["labels"] != every["labels"]
    assert tokenize(row, tokenizer, None, False, assistant_only_loss=True) == turns
    assert tokenize(row, tokenizer, None, True, assistant_only_loss=False) == every
    unknown = ours(backend, NO_CUE, bos=True)
    assert len(tokenize_all(load_examples([row]), unknown).notes) == 1
    with pytest.raises(DataError, match="^example 0: .* put {% generation %} and"):
        tokenize_all(load_examples([row]), unknown, assistant_only_loss=True)


def test_a_conversation_in_which_the_assistant_says_nothing_is_dropped(backend):
    rows = [{"messages": conversation(1, False)}, {"messages": [{"role": "user", "content": "a"}]}]
    for template in (CHATML, MARKED):
        data = tokenize_all(load_examples(rows), ours(backend, template))
        assert (len(data), data.dropped) == (1, 1)


def test_marks_say_more_than_turns(backend):
    """Two parts of one turn, an answer that begins with a line break, reasoning left out."""
    template = (
        "{% for m in messages %}{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'].split('|')[0] }}{% endgeneration %} / "
        "{% generation %}{{ m['content'].split('|')[1] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = ours(backend, template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb|\nc"}]
    found = tokenize({"messages": messages}, tokenizer)
    assert learned(found, tokenizer) == "\nb\nc"
    assert text(found, tokenizer) == "user\na<|im_end|>assistant\n\nb / \nc<|im_end|>"
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], chat_template=template
    )
    rendered = oracle.apply_chat_template(messages, tokenize=False)
    assert rendered == text(found, tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}",
        "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}",
        "{% set x %}{% generation %}ab{% endgeneration %}{% endset %}{{ x | reverse }}",
    ],
)
def test_marks_that_cannot_be_trusted(template):
    assert render_spans([{"role": "user", "content": "a"}], template) is None


def test_tools_of_json(backend):
    template = "{{ tools | tojson if tools else 'none' }} " + CHATML
    tokenizer = ours(backend, template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": conversation(1, False)}
    listed, written = (
        tokenize({**row, "tools": given}, tokenizer)
        for given in (tools, '[{"type": "function", "function": {"name": "f"}}]')
    )
    assert listed == written and '"name": "f"' in text(listed, tokenizer)
    assert text(tokenize({**row, "tools": None}, tokenizer), tokenizer).startswith("none")
    for bad, message in {"[": "'tools' is not JSON", '"f"': "'tools' must be a list"}.items():
        with pytest.raises(DataError, match=f"^example 0: {message}"):
            load_examples([{**row, "tools": bad}])


def test_a_tokenizer_of_transformers(backend):
    """Its apply_chat_template encodes unless told not to; its marks are not known to us."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], chat_template=CHATML
    )
    for row in ({"messages": conversation(2, True)}, {"text": words(5)}, INSTRUCTION):
        assert tokenize(row, theirs) == tokenize(row, ours(backend, CHATML))
    theirs.chat_template = None  # ChatML stands in for none, and an instruction has headings
    for row in ({"messages": conversation(2, True)}, INSTRUCTION):
        assert tokenize(row, theirs) == tokenize(row, ours(backend, None))
    theirs.chat_template = "{{ raise_exception('roles\\n must alternate') }}"
    with pytest.raises(DataError, match="messages: the chat template refuses them: roles must alt"):
        tokenize({"messages": conversation(2, True)}, theirs)


def test_a_package_that_templates_need_is_no_template_that_refuses(backend, monkeypatch):
    def apply_chat_template(messages, add_generation_prompt=False, tools=None):
        raise ImportError("apply_chat_template requires jinja2\n to be installed.")

    tokenizer = ours(backend, CHATML)
    monkeypatch.setattr(tokenizer, "apply_chat_template", apply_chat_template)
    monkeypatch.setattr(tokenizer, "assistant_spans", lambda *_: None)
    with pytest.raises(MissingPackageError, match="^apply_chat_template requires jinja2 to be"):
        tokenize({"messages": conversation(2, True)}, tokenizer)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "'completion' "),
        ({"prompt": [], "completion": []}, "'prompt' is empty"),
        (
            {"prompt": [{"role": "user"}], "completion": []},
            r"prompt\[0\] lacks the field 'content'",
        ),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] lacks the field 'content'"),
        ({"conversations": "a"}, "'conversations' must be a list"),
        ({"instruction": "a"}, "has 'instruction' but lacks the field 'output'"),
        ({"instruction": "a", "output": 3}, "'output' must be text; got int"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be text; got int"),
        ({"instruction": "a", "output": "b", "text": "c"}, "has fields of 2 kinds"),
    ],
)
def test_what_is_wrong_is_named(row, message):
    with pytest.raises(DataError, match=f"^example 0: {message}"):
        load_examples([row])


def test_a_formatting_func_makes_examples():
    rows = [{"q": "1 + 1?", "a": "2"}, {"q": "2 + 2?", "a": "4"}]
    texts = load_examples(rows, formatting_func=lambda row: f"{row['q']} {row['a']}")
    assert texts.kind == "text" and list(texts) == [{"text": "1 + 1? 2"}, {"text": "2 + 2? 4"}]
    pairs = load_examples(
        rows, formatting_func=lambda row: {"prompt": row["q"], "completion": row["a"]}
    )
    assert pairs.kind == "completion" and pairs[1]["completion"] == "4"
    with pytest.raises(DataError, match="^example 0: formatting_func fails: KeyError"):
        load_examples(rows, formatting_func=lambda row: row["text"])
    with pytest.raises(DataError, match="^example 0: formatting_func must return text, .*got list"):
        load_examples(rows, formatting_func=lambda row: [row["q"]])
    with pytest.raises(DataError, match="got Examples: pass it to load_examples"):
        load_examples(texts, formatting_func=lambda row: row["q"])


def test_a_text_field_of_another_name():
    """It says which of several kinds is meant, too."""
    rows = [{"content": "a", "prompt": "b", "completion": "c"}]
    assert load_examples(rows, "content")[0] == {"text": "a"}
    with pytest.raises(DataError, match="^example 0: lacks the field 'body' of dataset_text_field"):
        load_examples(rows, "body")
