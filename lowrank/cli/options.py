"""Dataclass fields as command-line flags, and a run's settings as a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lowrank.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

# what a TOML file may have: every command takes its own tables
TABLES = ("run", "train", "lora", "sweep", "eval", "report")


def add_fields(parser: argparse.ArgumentParser, config: type, prefix: str, title: str) -> None:
    """A flag for every field of the dataclass `config`, with the help text of its docstring.

    Only those given come out of parsing, as `<prefix>.<field>`. `title` stands above them.
    """
    group = parser.add_argument_group(title)
    texts, hints = field_help(config), get_type_hints(config)
    for field in dataclasses.fields(config):
        kinds = _kinds(hints[field.name])
        default = "required" if _is_required(field) else f"default: {_shown(_default(field))}"
        text = f"{texts.get(field.name, '').rstrip('.')} ({default})".strip().replace("%", "%%")
        others = [other for other, name in _spellings(config).items() if name == field.name]
        flags = ["--" + name.replace("_", "-") for name in (field.name, *others)]
        options: dict[str, Any] = {
            "dest": f"{prefix}.{field.name}",
            "default": argparse.SUPPRESS,
            "help": text,
        }
        if bool in kinds and not set(kinds) - {bool, None}:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
            continue
        words = _word_kinds(hints[field.name])
        if bool in kinds and field.default is False:
            negative = [flag.replace("--", "--no-", 1) for flag in flags]
            off = {**options, "action": "store_const", "const": False, "help": argparse.SUPPRESS}
            group.add_argument(*negative, **off)
            options |= {"nargs": "?", "const": True}
        many = list in kinds or dict in kinds
        pair = "NAME=START:STOP" if "tuple[" in str(hints[field.name]) else "NAME=N"
        metavar = "|".join(pair if kind is dict else _metavar(kind) for kind in words)
        if many:
            lone = [word for word in words if isinstance(word, str)]  # one of these is no list
            parts = (hints[field.name], *get_args(hints[field.name]))
            lists = any(list in map(get_origin, get_args(part)) for part in parts)
            single = str in kinds
            options |= {"nargs": "+", "action": _Collect, "single": single, "lone": lone}
            options["lists"] = lists
        group.add_argument(*flags, type=Reader(words, pair), metavar=metavar, **options)


def given_fields(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The flags of `add_fields` that were given: {field: value}."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in vars(args).items() if k.startswith(start)}


def make(config: type[T], values: Mapping[str, Any], elsewhere: str = "") -> T:
    """The dataclass of these fields. ConfigError if a required one is missing; `elsewhere` is where
    it could be set but for its flag.
    """
    for field in dataclasses.fields(config):
        if _is_required(field) and field.name not in values:
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(f"{field.name} is needed: pass {flag}{elsewhere}")
    return config(**values)


def field_help(config: type) -> dict[str, str]:
    """{field: text} from the entries `field: text` or `a, b: text` of a dataclass's docstring.

    An entry goes on to the next one, also after three spaces on the same line, or to an empty line.
    """
    names = "|".join(field.name for field in dataclasses.fields(config))
    entry = re.compile(rf"((?:{names})(?:, (?:{names}))*): (.*)")
    found: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(config.__doc__ or "").splitlines():
        if not line.strip():
            current = []
        for part in re.split(r"\s{3,}(?=\w+:)", line.strip()):
            if start := entry.fullmatch(part):
                current = start[1].split(", ")
                found |= dict.fromkeys(current, start[2])
            else:
                found |= {name: f"{found[name]} {part}" for name in current if part}
    return found


def check_types(settings: Any) -> None:
    """ConfigError for a field of the dataclass that is not of its annotated type."""
    for name, hint in get_type_hints(type(settings)).items():
        value, kinds = getattr(settings, name), _kinds(hint)
        if value not in [kind for kind in kinds if not isinstance(kind, type)] and (
            type(value) not in kinds
        ):
            expected = " or ".join(_metavar(kind) for kind in kinds)
            raise ConfigError(f"{name}: expected {expected}; got {value!r}")


def add_config(parser: argparse.ArgumentParser) -> None:
    """The flag --config."""
    parser.add_argument(
        "--config", type=Reader([Path]), metavar="FILE", help="a TOML file of all this"
    )


def tables_of(args: argparse.Namespace, tables: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """{table: {field: value}} of the file of --config, and over it the flags of `add_fields`."""
    found = read_toml(args.config, tables) if args.config else {}
    return {name: found.get(name, {}) | given_fields(args, name) for name in tables}


def read_toml(path: Path, tables: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """{table: {field: value}} of a TOML file; ConfigError for what the dataclasses do not have.

    Tables of other commands may be there too.
    """
    try:
        loaded = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    _refuse_unknown(f"{path}", loaded, dict.fromkeys([*tables, *TABLES]))
    for name, table in loaded.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: expected [{name}] to be a table; got {table!r}")
        if name not in tables:
            continue
        known = [field.name for field in dataclasses.fields(tables[name])]
        _refuse_unknown(f"{path}: [{name}]", table, [*known, *_spellings(tables[name])])
    return {name: _respelled(loaded.get(name, {}), tables[name], path) for name in tables}


def dump_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The text that `read_toml` reads back; what is None is left out."""
    parts = []
    for name, table in tables.items():
        lines = [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
        parts.append("\n".join([f"[{name}]", *lines]) + "\n")
    return "\n".join(parts)


def _refuse_unknown(place: str, found: Iterable[str], known: Iterable[str]) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ConfigError(f"{place} has an unknown key {name!r}: {hint}")


def _spellings(config: type) -> dict[str, str]:
    """{other name: field} of a dataclass whose fields have some."""
    return getattr(config, "SPELLINGS", {})


def _respelled(table: Mapping[str, Any], config: type, path: Path) -> dict[str, Any]:
    """The table under the names of the fields."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = _spellings(config).get(key, key)
        if name in found:
            raise ConfigError(f"{path} has {name} under two names: leave one out")
        found[name] = value
    return found


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


class Reader:
    """Reads one word as the first of `kinds` that takes it; an empty one is refused."""

    def __init__(self, kinds: list[Any], pair: str = "NAME=N") -> None:
        self.kinds, self.pair = kinds, pair

    def __call__(self, word: str) -> Any:
        if not word:  # an unset variable of a script; as a path it would be the current directory
            raise argparse.ArgumentTypeError("expected a value; got ''")
        for kind in self.kinds:
            try:
                return _READ[kind](word) if kind in _READ else _choice(kind, word)
            except ValueError:
                continue
        expected = " or ".join(self.pair if k is dict else _metavar(k) for k in self.kinds)
        raise argparse.ArgumentTypeError(f"expected {expected}; got {word!r}")


class _Collect(argparse.Action):
    """Several words: a dict, of lists with `lists`, or a list.

    One of `lone` stays a word, and so does with `single` one that is no plain name.
    """

    def __init__(
        self, *args: Any, single: bool, lone: list[str], lists: bool, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.single, self.lone, self.lists = single, lone, lists

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = [value for value in values if isinstance(value, tuple)]
        if pairs and len(pairs) < len(values):
            raise argparse.ArgumentError(self, "expected NAME=N for all or for none of them")
        if pairs and self.lists:
            values = {name: [v for n, v in pairs if n == name] for name, _ in pairs}
        elif pairs:
            values = dict(pairs)
        elif len(values) == 1 and (
            values[0] in (None, *self.lone) or self.single and not _is_name(values[0])
        ):
            values = values[0]
        setattr(namespace, self.dest, values)


def _pair(word: str) -> tuple[str, int | float | tuple[int, int]]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError
    if ":" in value:  # a range
        start, stop = value.split(":")
        return name, (int(start), int(stop))
    try:
        return name, int(value)
    except ValueError:
        return name, float(value)


def _choice(choice: Any, word: str) -> Any:
    if word != str(choice).lower():
        raise ValueError
    return choice


# The order of trial is that of `_word_kinds`.
_READ: dict[Any, Callable[[str], Any]] = {int: int, float: float, dict: _pair, Path: Path, str: str}


def _is_name(word: str) -> bool:
    return re.fullmatch(r"[\w.]+", word) is not None


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of an annotation: plain types, None, and the values of a Literal."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    if origin is Literal:
        return list(get_args(hint))
    return [None if hint is type(None) else origin or hint]


def _word_kinds(hint: Any) -> list[Any]:
    """What one word of a flag can be, a list's elements included; the strictest first."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    found: list[Any] = []
    for part in parts:
        found += _kinds(get_args(part)[0]) if get_origin(part) is list else _kinds(part)
    if Path in found:
        found.remove(str)
    found = [choice for kind in found for choice in ((True, False) if kind is bool else (kind,))]
    return sorted(
        dict.fromkeys(found), key=lambda kind: [*_READ].index(kind) + 1 if kind in _READ else 0
    )


def _metavar(kind: Any) -> str:
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH", dict: "NAME=N", bool: "true|false"}
    return names[kind] if kind in names else str(kind).lower()


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
