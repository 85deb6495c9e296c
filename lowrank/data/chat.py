"""Chat templates: messages to the text a chat model was trained on.

A template is untrusted code from a model's files, so it runs in jinja2's immutable sandbox, with
the functions that Hugging Face's templates expect:
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import json
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
    compiled = _compile(template)
    # transformers leaves tokens that a tokenizer lacks undefined, and templates test for that
    special = {"bos_token": bos_token, "eos_token": eos_token}
    try:
        return compiled.render(
            messages=list(messages),
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{name: token for name, token in special.items() if token is not None},
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
        """{% generation %} … {% endgeneration %} marks what the model wrote, and prints it."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

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
