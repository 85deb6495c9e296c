"""Cards by the names that people type, and what is left of their memory."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from lowrank.errors import ConfigError

GIB = 1 << 30
# MiB as the driver reports them; on T4, A10, L4 and the like those that error correction leaves
_MIB = {
    "gtx 1080 ti": 11264, "titan rtx": 24576,
    "rtx 2060": 6144, "rtx 2070": 8192, "rtx 2080": 8192, "rtx 2080 ti": 11264,
    "rtx 3050": 8192, "rtx 3060": 12288, "rtx 3060 ti": 8192, "rtx 3070": 8192,
    "rtx 3080": 10240, "rtx 3080 12gb": 12288, "rtx 3080 ti": 12288,
    "rtx 3090": 24576, "rtx 3090 ti": 24564,
    "rtx 4060": 8188, "rtx 4060 ti": 8188, "rtx 4060 ti 16gb": 16380, "rtx 4070": 12282,
    "rtx 4070 super": 12282, "rtx 4070 ti": 12282, "rtx 4070 ti super": 16376,
    "rtx 4080": 16376, "rtx 4080 super": 16376, "rtx 4090": 24564,
    "rtx 5060": 8151, "rtx 5060 ti": 8151, "rtx 5060 ti 16gb": 16311, "rtx 5070": 12227,
    "rtx 5070 ti": 16303, "rtx 5080": 16303, "rtx 5090": 32607,
    "rtx a2000": 12282, "rtx a4000": 16376, "rtx a5000": 24564, "rtx a6000": 49140,
    "rtx 6000 ada": 49140, "rtx pro 6000": 97887,
    "t4": 15360, "p100": 16384, "v100": 16384, "v100 32gb": 32768,
    "a2": 15356, "a10": 23028, "a10g": 23028, "a16": 15356, "a30": 24576, "a40": 46068,
    "l4": 23034, "l40": 46068, "l40s": 46068,
    "a100": 40960, "a100 80gb": 81920, "h100": 81559, "h100 nvl": 95830, "h200": 143771,
    "gh200": 97871, "b200": 183359,
}  # fmt: skip


class Card(NamedTuple):
    """A card, or so much memory without a name: `total` bytes."""

    name: str
    total: int


def find_card(name: str | float) -> Card:
    """The card of this name, however it is spelled ("4090", "RTX4090", "A100-80GB"); or "12 GB".

    A number is so many GB, of 2^30 bytes, as cards are sold. Raises ConfigError.
    """
    if isinstance(name, int | float) and not isinstance(name, bool):
        if not 0 < name < 1e6:
            raise ConfigError(f"card: expected a positive number of GB; got {name!r}")
        return Card(f"{name:g} GB", int(name * GIB))
    if not isinstance(name, str):
        raise ConfigError(f"card: expected a name or a number of GB; got {name!r}")
    text = name.strip().lower()
    if size := re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*(?:gb|gib|g)", text):
        return find_card(float(size[1]))
    known = {_plain(name): name for name in _MIB}
    known = {key.removeprefix("rtx"): name for key, name in known.items()} | known
    # "A100-80GB" is a card's name and memory, "RTX 3080 12GB" is also all of a name
    parts = re.fullmatch(r"(.*?)[\s_-]+(\d{1,6})\s*gb", text)
    found = known.get(_plain(text)) or (parts and known.get(_plain(parts[1])))
    if not found:
        near = [known[k] for k in difflib.get_close_matches(_plain(text), known, n=3)]
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "pass its memory"
        raise ConfigError(
            f"card: expected a card's name or its memory, '24 GB'; got {name!r}: {hint}"
        )
    card = Card(found.upper(), _MIB[found] << 20)
    if parts and abs(card.total / GIB - int(parts[2])) > 2:
        raise ConfigError(
            f"card: {card.name} has {card.total / GIB:.0f} GB; got {name!r}; "
            f"pass '{parts[2]} GB' for one that has those"
        )
    return card


def card_names() -> list[str]:
    """Those that `find_card` knows."""
    return [name.upper() for name in _MIB]


def _plain(name: str) -> str:
    """In lower case, without makers and what is between words."""
    words = re.sub(r"[\s_\-]+", "", name.lower())
    words = re.sub(r"nvidia|geforce|tesla|quadro|sxm\d?|pcie", "", words)
    return words
