"""Chat templates against transformers' own rendering."""

import pytest

from lowrank.data.chat import CHATML, render_chat
from lowrank.errors import ConfigError, DataError

pytest.importorskip("jinja2", reason="needs jinja2; pip install jinja2")

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "What's 2 + 2? Ünï"},
    {
        "role": "assistant",
        "content": "4",
        "tool_calls": [{"name": "f", "arguments": {"é": [1, "<"]}}],
    },
    {"role": "user", "content": "Thanks\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {}}}]
TEMPLATES = {
    "chatml": CHATML,
    "blocks and whitespace": """
{%- if bos_token is defined %}{{ bos_token }}{% endif -%}
{% for message in messages %}
    {% if loop.first and message.role == 'system' %}
<<SYS>>{{ message['content'] | trim }}<</SYS>>
    {% elif message.role == 'user' -%}
        [INST] {{ message.content }} [/INST]
    {%- else %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}""",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}|{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{% if pad_token is defined %}pad{% endif %}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("cue", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_equals_transformers(name, cue):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="the oracle")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = render_chat(MESSAGES, TEMPLATES[name], add_generation_prompt=cue, tools=TOOLS, **tokens)
    (theirs,), _ = utils.render_jinja_template(
        [MESSAGES],
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=cue,
        **tokens,
    )
    assert ours == theirs


def test_chatml_is_what_it_says():
    assert render_chat(MESSAGES[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\nWhat's 2 + 2? Ünï<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_refuses_says_why():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses them: roles must alternate"):
        render_chat(MESSAGES, template)
    with pytest.raises(DataError, match="refuses them"):
        render_chat([{"role": "user"}], "{{ messages[0]['content'] + 'x' }}")
    with pytest.raises(DataError, match=r"messages\[1\]: expected an object with a role"):
        render_chat([MESSAGES[0], {"content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 'x'.encode('nonsense') }}",
    ],
)
def test_a_template_that_fails_is_named_and_no_crash(template):
    with pytest.raises(DataError, match="the chat template refuses them: "):
        render_chat(MESSAGES, template)


def test_a_broken_template_names_its_line():
    with pytest.raises(ConfigError, match="chat template, line 2"):
        render_chat(MESSAGES, "\n{% for %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_can_neither_reach_out_nor_change_the_messages(attack):
    before = [dict(message) for message in MESSAGES]
    with pytest.raises(DataError):
        render_chat(MESSAGES, attack)
    assert before == MESSAGES
