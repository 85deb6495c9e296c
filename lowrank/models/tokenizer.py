"""Text to token ids and back, with the special tokens and the chat template of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.data.chat import CHATML, render_chat, render_spans
from lowrank.errors import ConfigError, DataError, FileFormatError, MissingPackageError
from lowrank.io.atomic import write_files
from lowrank.io.hub import fetch_tokenizer, is_repo_id
from lowrank.io.json_files import read_json
from lowrank.models.origin import origin_of

if TYPE_CHECKING:
    import tokenizers

_FILE = "tokenizer.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a model adds to it.

    `config` is tokenizer_config.json: the special tokens by name, and whatever else it says, which
    `save` writes back. Without a `chat_template`, conversations are rendered as ChatML.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.config = dict(config or {})
        self.chat_template = chat_template
        if chat_template is not None and not _is_text(chat_template):
            raise FileFormatError(f"chat_template: expected text; got {chat_template!r}")
        for name in _SPECIAL:
            token = self.token(name)
            if token is not None and not _is_text(token):
                raise FileFormatError(f"{name}: expected text; got {token!r}")
            if token is not None and backend.token_to_id(token) is None:
                raise FileFormatError(f"{name}: {token!r} is not in the vocabulary")

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def token(self, name: str) -> str | None:
        """The text of a special token by its name in tokenizer_config.json, such as eos_token."""
        value = self.config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids; special tokens written out in the text become their ids."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # tokenizers' word for it
            if not isinstance(text, str) or _is_text(text):
                raise
            raise DataError(
                f"text: expected no lone surrogate, which no tokenizer reads; got {text!a:.80}"
            ) from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the text the model was trained on; see `data.chat.render_chat`."""
        return render_chat(
            messages,
            self.chat_template or CHATML,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            bos_token=self.token("bos_token"),
            eos_token=self.token("eos_token"),
        )

    def assistant_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The conversation as text, and where in it the template marks what the assistant wrote.

        None if it marks nothing; see `data.chat.render_spans`.
        """
        return render_spans(
            messages,
            self.chat_template or CHATML,
            tools=tools,
            bos_token=self.token("bos_token"),
            eos_token=self.token("eos_token"),
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides which tokens a text becomes."""
        special = {name: self.token(name) for name in _SPECIAL}
        said = json.dumps([self.backend.to_str(), special, self.chat_template])
        return hashlib.sha256(said.encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        texts = {
            _FILE: self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        write = partial(Path.write_text, encoding="utf-8")
        write_files(directory, {name: partial(write, data=text) for name, text in texts.items()})

    def _id(self, name: str) -> int | None:
        token = self.token(name)
        return None if token is None else self.backend.token_to_id(token)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> Tokenizer:
    """The tokenizer in a Hugging Face directory, a hub repository `owner/name`, or a .gguf file.

    That of an adapter is in its own directory or repository, or else its base's.
    """
    origin = origin_of(source, revision, token)
    if origin.adapter is not None:
        own = _of_adapter(origin.adapter, source, revision, token)
        if own is not None:
            return _from_directory(own)
    source, path = origin.model, Path(origin.model)
    if path.is_dir():
        return _from_directory(path)
    if path.is_file() and path.suffix == ".gguf":
        from lowrank.models.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(path)
    if path.exists() or path.suffix == ".gguf" or not is_repo_id(str(source)):
        raise ConfigError(
            f"{source}: no such directory or .gguf file, and no hub repository 'owner/name'"
        )
    return _from_directory(fetch_tokenizer(str(source), origin.revision, token))


def _is_text(value: object) -> bool:
    """Whether it is text that has a UTF-8; half a surrogate pair, which JSON can say, has none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def import_tokenizers() -> Any:
    """The `tokenizers` package; MissingPackageError says how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingPackageError("text needs tokenizers: pip install tokenizers") from error
    return tokenizers


def _of_adapter(
    adapter: Path, source: str | Path, revision: str | None, token: str | None
) -> Path | None:
    """Where an adapter's own tokenizer is, fetched if the adapter was; None if it has none."""
    if Path(source).is_dir():
        return adapter if (adapter / _FILE).is_file() else None
    try:
        return fetch_tokenizer(str(source), revision, token)
    except (FileFormatError, ConfigError):  # the repository has none or, offline, the cache
        return None


def _from_directory(directory: Path) -> Tokenizer:
    tokenizers = import_tokenizers()
    path = directory / _FILE
    if not path.is_file():
        raise FileFormatError(
            f"{directory}: expected {_FILE}; save the tokenizer with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(directory) to have one"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise FileFormatError(f"{path}: not a tokenizer: {error}") from error
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= read_json(directory / name)
    template = config.pop("chat_template", None)
    if isinstance(template, list):  # several by name; "default" is the one for conversations
        try:
            template = {item["name"]: item["template"] for item in template}.get("default")
        except (TypeError, KeyError) as error:
            raise FileFormatError(
                f"{directory}: chat_template: expected objects with name and template; "
                f"got {template!r:.80}"
            ) from error
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            template = jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{jinja}: not UTF-8: {error}") from error
    try:
        return Tokenizer(backend, config, template)
    except FileFormatError as error:
        raise FileFormatError(f"{directory}: {error}") from error
