"""Chat templates: messages to the text a chat model was trained on.

A template is untrusted code from a model's files, so it runs in jinja2's immutable sandbox, with
the functions that Hugging Face's templates expect:
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from lowrank.errors import ConfigError, DataError, MissingPackageError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_START, _END = "\ufdd0", "\ufdd1"  # noncharacters, which no text has


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str = CHATML,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The conversation as text; with `add_generation_prompt`, up to where the answer begins.

    Raises DataError where the template refuses the messages, ConfigError for a broken template.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{i}]: expected an object with a role; got {message!r}")
    return _render(messages, template, add_generation_prompt, tools, bos_token, eos_token)


def render_spans(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> tuple[str, list[tuple[int, int]]] | None:
    """The conversation as text, and the (start, end) of what {% generation %} marks in it.

    None where the template has no such mark, or does something else with the text inside.
    """
    if not re.search(r"{%[-+]?\s*generation\b", template):
        return None
    settings = (messages, template, False, tools, bos_token, eos_token)
    text, marked = _render(*settings), _render(*settings, generation=_START, end=_END)
    marks = re.findall(f"[{_START}{_END}]", marked)
    if re.sub(f"[{_START}{_END}]", "", marked) != text or marks != [_START, _END] * (
        len(marks) // 2
    ):
        return None
    spans, at = [], 0
    for i, part in enumerate(re.split(f"[{_START}{_END}]", marked)):
        if i % 2:
            spans.append((at, at + len(part)))
        at += len(part)
    return text, spans


def _render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    cue: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    bos_token: str | None,
    eos_token: str | None,
    **marks: str,
) -> str:
    compiled = _compile(template)
    # transformers leaves tokens that a tokenizer lacks undefined, and templates test for that
    special = {"bos_token": bos_token, "eos_token": eos_token}
    try:
        return compiled.render(
            messages=list(messages),
            tools=tools,
            documents=None,
            add_generation_prompt=cue,
            **{name: token for name, token in special.items() if token is not None},
            **{f"{name}_mark": mark for name, mark in marks.items()},
        )
    except DataError:  # by raise_exception
        raise
    except Exception as error:  # a template is code, and may fail as any code does
        raise DataError(f"messages: the chat template refuses them: {error}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingPackageError("chat templates need jinja2: pip install jinja2") from error

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} prints what the model wrote, between two marks.

        The marks are variables of the template, which are empty unless `render_spans` sets them.
        """

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (
                jinja2.nodes.Output([jinja2.nodes.Name(f"{name}_mark", "load")], lineno=line)
                for name in ("generation", "end")
            )
            return jinja2.nodes.Scope([start, *body, end], lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML, which no model was trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise DataError(f"messages: the chat template refuses them: {message}")
