"""Schemes as they are written: names, names with options, quantizers under a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lowrank import quant
from lowrank.errors import ConfigError
from lowrank.nn import quant_weight
from lowrank.quant import Quantizer
from lowrank.quant.registry import known

# The first needs a table, the second is nf4 in the order of bitsandbytes' files, and the third what
# all are compared with.
_NOT_BY_DEFAULT = ("codebook", "flat", "none")

Schemes = Iterable[str] | Mapping[str, str | Quantizer]


def resolve(schemes: Schemes | None) -> dict[str, Quantizer | ConfigError]:
    """{label: quantizer} of what the caller wrote; see `parse`. Raises ConfigError.

    None means every scheme that is registered or installed, by its defaults; of these, one that
    cannot be made is there as its error.
    """
    if schemes is None:
        return {name: _try(name) for name in known() if name not in _NOT_BY_DEFAULT}
    if isinstance(schemes, str):
        raise ConfigError(f"schemes: expected a sequence of names; got the string {schemes!r}")
    if isinstance(schemes, Mapping):
        pairs = list(schemes.items())
    else:
        pairs = [(scheme, scheme) for scheme in schemes]
    found: dict[str, Quantizer | ConfigError] = {}
    for label, scheme in pairs:
        if not isinstance(label, str):
            raise ConfigError(
                f"schemes: expected names; got {label!r}; pass {{label: quantizer}} for an object"
            )
        if label in found:
            raise ConfigError(f"schemes: expected each once; got {label!r} twice")
        quantizer = parse(scheme) if isinstance(scheme, str) else scheme
        found[label] = quant_weight.resolve(quantizer, f"schemes: {label}")
    if not found:
        raise ConfigError("schemes: expected at least one; got none")
    return found


def parse(text: str) -> Quantizer:
    """The quantizer written as `name` or `name:option=value,option=value`.

    `nf4:block_size=128,double_quant=false` is `quant.get("nf4", block_size=128,
    double_quant=False)`. Raises ConfigError.
    """
    name, colon, written = text.partition(":")
    options: dict[str, int | float | bool | str] = {}
    for pair in written.split(",") if colon else ():
        option, equals, value = pair.partition("=")
        if not option.isidentifier() or not equals or not value or option in options:
            raise ConfigError(
                f"scheme {text!r}: expected name:option=value,option=value, each option once; "
                f"got {pair!r}"
            )
        options[option] = _value(value)
    return quant.get(name, **options)


def _value(word: str) -> int | float | bool | str:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _try(name: str) -> Quantizer | ConfigError:
    try:
        return quant.get(name)
    except ConfigError as error:
        return error
