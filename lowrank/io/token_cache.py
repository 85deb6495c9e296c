"""Tokenized data kept on disk, under a name made of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.data.examples import Examples
from lowrank.data.tokens import IGNORED, TokenizedExamples
from lowrank.errors import LowrankError
from lowrank.io.atomic import write_files
from lowrank.io.safetensors import SafetensorsFile, load_safetensors, write_safetensors
from lowrank.io.versions import versions

logger = logging.getLogger("lowrank.data")

_FORMAT = 1  # to be raised when the same examples come to other tokens or to another file
_COUNTS = "counts"
_DTYPES = {
    "ids": torch.int32,
    "labels": torch.int32,
    "offsets": torch.int64,
    "kept": torch.int64,  # the number of each example among those that were tokenized
}


def token_cache_directory() -> Path | None:
    """$LOWRANK_CACHE, or lowrank in the user's folder of caches; None without a home."""
    if given := os.environ.get("LOWRANK_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank"
    except RuntimeError:
        return None


def token_cache_path(directory: str | Path, **depends_on: Any) -> Path:
    """The file for tokens that depend on these values, JSON all of them."""
    named = {"format": _FORMAT, "lowrank": versions()["lowrank"], **depends_on}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return Path(directory) / f"tokens-{digest[:32]}.safetensors"


def load_tokens(path: Path, examples: Examples) -> TokenizedExamples | None:
    """What `save_tokens` wrote; None if there is no such file, or not every bit of it is as it was.

    A damaged one is logged and no error: it is to be made again.
    """
    try:
        if not path.exists():
            return None
        counts = json.loads(SafetensorsFile(path).metadata[_COUNTS])
        tensors = load_safetensors(path)
        if {name: tensor.dtype for name, tensor in tensors.items()} != _DTYPES:
            raise ValueError("other tensors than were written")
        labels, offsets = tensors["labels"], tensors["offsets"]
        learned = torch.cat([torch.zeros(1, dtype=torch.long), (labels != IGNORED).cumsum(0)])
        found = TokenizedExamples(
            tensors["ids"],
            labels,
            offsets.tolist(),
            learned[offsets].diff().tolist(),
            places=[examples.where(i) for i in tensors["kept"].tolist()],
            **counts["notes"],
        )
        if counts["sha256"] != _digest(found, tensors["kept"]):
            raise ValueError("other contents than were written")
    except Exception as error:  # whatever a damaged file leads to
        logger.warning("%s is damaged, and is made again: %s", path, error)
        return None
    return found


def save_tokens(path: Path, data: TokenizedExamples, examples: Examples) -> None:
    """Write what `examples` came to, whole or not at all; if it cannot be, that is only logged."""
    number = {place: i for i, place in enumerate(examples.places)}
    tensors = {
        "ids": data.ids,
        "labels": data.labels,
        "offsets": torch.tensor(data.offsets),
        "kept": torch.tensor([number[place] for place in data.places]),
    }
    counts = {"sha256": _digest(data, tensors["kept"]), "notes": _notes(data)}
    metadata = {_COUNTS: json.dumps(counts)}
    try:
        write_files(
            path.parent, {path.name: lambda aside: write_safetensors(aside, tensors, metadata)}
        )
    except (LowrankError, OSError) as error:
        logger.warning("the tokenized data are not kept for the next run: %s", error)
    else:
        logger.info("the tokenized data are kept for the next run in %s", path)


def _notes(data: TokenizedExamples) -> dict[str, Any]:
    return {"truncated": data.truncated, "dropped": data.dropped, "notes": data.notes}


def _digest(data: TokenizedExamples, kept: Tensor) -> str:
    digest = hashlib.sha256((data.fingerprint + json.dumps(_notes(data))).encode())
    digest.update(kept.numpy())
    return digest.hexdigest()
