"""Classes by name: those that registered themselves, and those of other packages when asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from lowrank.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

_T = TypeVar("_T")
_C = TypeVar("_C", bound=type)


class Registry(Generic[_T]):
    """`kind`s by name, classes with the functions of `protocol`.

    A name that is not registered is looked up among the entry points `group` of the installed
    packages: a class, or a module that registers it.
    """

    def __init__(self, kind: str, group: str, protocol: type) -> None:
        self.kind, self.group, self.protocol = kind, group, protocol
        *first, last = [name for name in vars(protocol) if not name.startswith("_")]
        self._needs = f"{', '.join(first)} and {last}"
        self.classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[_C], _C]:
        """Class decorator: `get(name, **options)` makes `cls(**options)`; `cls.name` is the name.

        Raises ConfigError for a name that is another's, and for a class that lacks a function.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"register: expected the name of a {self.kind}; got {name!r}")

        def add(cls: _C) -> _C:
            if not self._is_one(cls):
                raise ConfigError(
                    f"{self.kind} {name!r}: expected a class with {self._needs}; got {cls!r}"
                )
            if self.classes.get(name, cls) is not cls:
                raise ConfigError(
                    f"{self.kind} {name!r} is registered, by {self.classes[name]}; "
                    "choose another name"
                )
            self.classes[name] = cls
            cls.name = name
            return cls

        return add

    def names(self) -> list[str]:
        """Names of what is registered, sorted."""
        return sorted(self.classes)

    def known(self) -> list[str]:
        """Names that `get` takes, sorted: the registered ones, and those of other packages."""
        return sorted({*self.classes, *(point.name for point in self._entry_points())})

    def get(self, name: str, **options) -> _T:
        """What is registered as `name`, made with its own explicit options."""
        cls = self.find(name)
        try:
            return cls(**options)
        except TypeError as error:
            self._check_options(name, cls, options)
            raise ConfigError(f"{self.kind} {name!r}: {error}") from error

    def find(self, name: str) -> type:
        """The class registered as `name`."""
        if not isinstance(name, str) or name not in self.classes:
            self._load(name)
        return self.classes[name]

    def _check_options(self, name: str, cls: type, options: dict) -> None:
        parameters = inspect.signature(cls).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for option in set() if takes_any else options.keys() - parameters.keys():
            takes = ", ".join(parameters) or "none"
            raise ConfigError(
                f"{self.kind} {name!r}: expected its own options, {takes}; got {option!r}"
            )
        for option, parameter in parameters.items():
            optional = parameter.default is not parameter.empty or "VAR_" in parameter.kind.name
            if not optional and option not in options:
                raise ConfigError(
                    f"{self.kind} {name!r}: expected its option {option}, which has no default; in "
                    f"Python, get({name!r}, {option}=...) makes one"
                )

    def _is_one(self, cls: object) -> bool:
        return isinstance(cls, type) and issubclass(cls, self.protocol)

    def _entry_points(self) -> EntryPoints:
        from importlib.metadata import entry_points  # only here: it reads the disk

        return entry_points(group=self.group)

    def _load(self, name: str) -> None:
        found = [point for point in self._entry_points() if point.name == name]
        if not found:
            known = ", ".join(self.known())
            raise ConfigError(f"{self.kind}: expected one of {known}; got {name!r}")
        if len({point.value for point in found}) > 1:
            owners = ", ".join(sorted(point.value for point in found))
            raise ConfigError(f"{self.kind} {name!r}: expected one entry point; got {owners}")
        try:
            loaded = found[0].load()
        except Exception as error:  # whatever somebody else's module raises
            raise ConfigError(
                f"{self.kind} {name!r}: its entry point {found[0].value} fails to load: {error!r}"
            ) from error
        if name not in self.classes and self._is_one(loaded):
            self.register(name)(loaded)
        if name not in self.classes:
            raise ConfigError(
                f"{self.kind} {name!r}: expected its entry point {found[0].value} to be a class "
                f"with {self._needs}; got {loaded!r}"
            )
