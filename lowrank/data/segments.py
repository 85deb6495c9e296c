"""An example as text cut into what is learned and what is not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lowrank.data.chat import CHATML
from lowrank.errors import DataError, LowrankError, MissingPackageError

Segment = tuple[str, bool]  # text, and whether it is learned


class Tokenizer(Protocol):
    """What tokenization asks of a tokenizer; `apply_chat_template` only for messages.

    One may also have `chat_template`, `assistant_spans(messages, tools)` (the rendered text, and
    the (start, end) of what its template marks as the assistant's, None if it marks nothing), and
    `fingerprint`, without which what it made is not kept on disk.
    """

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
    ) -> str: ...


@dataclass(frozen=True)
class Segments:
    """The text of an example in order.

    rendered: by a chat template, which writes the special tokens itself. turns: which of the
    assistant's turns are learned as such, "all", "some" or, where they cannot be told, "unknown".
    """

    parts: list[Segment]
    rendered: bool = False
    turns: str = "all"


def segments(
    example: Mapping[str, Any],
    kind: str,
    tokenizer: Tokenizer,
    completion_only: bool = True,
    assistant_only: bool | None = None,
) -> Segments:
    """Cut a checked example of `kind` (see `data.kinds`) into what is learned and what is not.

    Completions and outputs are learned, prompts unless `completion_only`. In messages what the
    assistant says is learned, all of it unless `assistant_only`, which is `completion_only` unless
    said otherwise. An instruction is a conversation if the tokenizer has a chat template.
    """
    if kind == "text":
        return Segments([(example["text"], True)])
    if kind == "instruction":
        return _instruction(example, tokenizer, completion_only)
    if kind == "messages":
        messages, tools = example["messages"], example.get("tools")
        if not (completion_only if assistant_only is None else assistant_only):
            return Segments([(_render(tokenizer, messages, False, tools), True)], rendered=True)
        found = _turns(messages, tokenizer, tools)
        if found.turns == "unknown" and assistant_only:
            raise DataError(
                "the chat template does not show where the assistant's turns are, which "
                "assistant_only_loss asks for: put {% generation %} and {% endgeneration %} around "
                "them in the template"
            )
        return found
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        return Segments([(prompt, not completion_only), (completion, True)])
    return _answered(prompt, completion, tokenizer, example.get("tools"), completion_only)


def _instruction(
    example: Mapping[str, Any], tokenizer: Tokenizer, completion_only: bool
) -> Segments:
    instruction, given = example["instruction"], example.get("input")
    if getattr(tokenizer, "chat_template", None):
        asked = f"{instruction}\n\n{given}" if given else instruction
        prompt = [{"role": "user", "content": asked}]
        answer = [{"role": "assistant", "content": example["output"]}]
        return _answered(prompt, answer, tokenizer, None, completion_only)
    titled = {"Instruction": instruction, **({"Input": given} if given else {}), "Response": ""}
    text = "\n\n".join(f"### {title}:\n{part}" for title, part in titled.items())
    return Segments([(text, not completion_only), (example["output"], True)])


def _answered(
    prompt: list[Any],
    completion: list[Any],
    tokenizer: Tokenizer,
    tools: list[Any] | None,
    completion_only: bool,
) -> Segments:
    """Messages of which the last are learned, with the end that the template gives them."""
    whole = _render(tokenizer, [*prompt, *completion], False, tools)
    if not completion_only:
        return Segments([(whole, True)], rendered=True)
    cue = _render(tokenizer, prompt, completion[0]["role"] == "assistant", tools)
    if not whole.startswith(cue):
        raise DataError(
            "the chat template shows the prompt otherwise once the completion follows it: use "
            "'messages', or completion_only_loss=False"
        )
    return Segments([(cue, False), (whole[len(cue) :], True)], rendered=True)


def _turns(messages: list[Any], tokenizer: Tokenizer, tools: list[Any] | None) -> Segments:
    """The conversation with what the assistant wrote learned.

    A template with {% generation %} says what that is. With any other, a turn's place is found by
    rendering the messages before it with the cue to answer, and those up to it: the whole
    conversation must begin with both. A turn that the template shows otherwise once it is past is
    not learned.
    """
    marked = getattr(tokenizer, "assistant_spans", lambda *_: None)(messages, tools)
    if marked is not None:
        whole, spans = marked
        return Segments(_cut(whole, spans), rendered=True)
    whole = _render(tokenizer, messages, False, tools)
    spans, said, done = [], 0, 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        said += 1
        try:
            cue = _render(tokenizer, messages[:i], True, tools)
            turn = _render(tokenizer, messages[: i + 1], False, tools)
        except MissingPackageError:
            raise
        except LowrankError:  # some templates refuse a conversation that stops there
            continue
        if done <= len(cue) < len(turn) and whole.startswith(cue) and whole.startswith(turn):
            spans.append((len(cue), len(turn)))
            done = len(turn)
    if said and not spans:
        return Segments([(whole, True)], rendered=True, turns="unknown")
    return Segments(
        _cut(whole, spans), rendered=True, turns="all" if len(spans) == said else "some"
    )


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """`text` in order, what lies in `spans` learned."""
    parts, done = [], 0
    for start, end in spans:
        parts += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [*parts, (text[done:], False)]


def _render(tokenizer: Tokenizer, messages: list[Any], cue: bool, tools: list[Any] | None) -> str:
    render = tokenizer.apply_chat_template
    taken, options = inspect.signature(render).parameters, {}
    if "tokenize" in taken:  # that of transformers encodes the text unless told not to
        options["tokenize"] = False
    if "chat_template" in taken and not getattr(tokenizer, "chat_template", None):
        options["chat_template"] = CHATML
    try:
        text = render(messages, add_generation_prompt=cue, tools=tools, **options)
    except LowrankError:
        raise
    except ImportError as error:  # of jinja2
        raise MissingPackageError(" ".join(str(error).split())) from error
    except Exception as error:  # whatever a tokenizer that is not ours raises
        reason = " ".join(str(error).split())
        raise DataError(f"messages: the chat template refuses them: {reason}") from error
    if not isinstance(text, str):
        raise DataError(f"apply_chat_template must return text; got {type(text).__name__}")
    return text
