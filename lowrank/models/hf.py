"""A Hugging Face model directory: config.json, and the tensors of its safetensors files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.io.json_files import read_json
from lowrank.io.pages import Empty, empty_bytes
from lowrank.io.quantized import quantized_modules
from lowrank.io.safetensors import Lazy
from lowrank.io.shards import Shards
from lowrank.models.config import DecoderConfig
from lowrank.models.families import FAMILIES, Family
from lowrank.models.quantization_config import QuantizationConfig

# what older files hold that is no parameter: rotary frequencies, and causal masks
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")


class FamilyShards(Shards):
    """The tensors of a directory of a family's model, named and shaped as those of the decoder."""

    def __init__(self, path: str | Path, family: Family) -> None:
        super().__init__(path)
        names = {_in_model(family, name): name for name in self.shapes}
        self._stored = {ours: name for ours, name in names.items() if not _BUFFERS.fullmatch(ours)}
        shapes = {ours: self.shapes[name] for ours, name in self._stored.items()}
        quantized = quantized_modules(shapes)
        self._turned = {name for name in shapes if _is_transposed(family, name, quantized)}
        self.shapes = {n: s[::-1] if n in self._turned else s for n, s in shapes.items()}

    def read(self, name: str, empty: Empty = empty_bytes) -> Tensor:
        """The tensor, in the dtype of the file and memory from `empty`, unless it is transposed."""
        tensor = super().read(self._stored[name], empty)
        return tensor.T.contiguous() if name in self._turned else tensor

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Those rows of it; of one that is transposed all is read."""
        if name in self._turned:
            return self.read(name)[first:last].contiguous()
        return super().read_rows(self._stored[name], first, last)

    def blank(self, name: str) -> Tensor:
        """A tensor of that dtype and shape on the meta device."""
        tensor = super().blank(self._stored[name])
        return tensor.T if name in self._turned else tensor


class HFDirectory(FamilyShards):
    """Those tensors, the decoder's `config`, and its `quantization`, None if dense.

    Raises FileFormatError as Shards does, and ConfigError for a model the decoder cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.config, self.quantization = read_config(Path(path))
        super().__init__(path, self.config.family)


def open_directory(path: str | Path) -> Shards:
    """The tensors of any directory: those of a known family as FamilyShards."""
    config = Path(path) / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FamilyShards(path, FAMILIES[model_type])
    return Shards(path)


def to_files(
    family: Family, tensors: Mapping[str, Tensor | Lazy], quantized: Collection[str]
) -> dict[str, Tensor | Lazy]:
    """The decoder's tensors as files of the family hold them, of `quantized` modules as they are.

    FamilyShards undoes it.
    """
    found: dict[str, Tensor | Lazy] = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        turned = _is_transposed(family, name, quantized)
        stored = f"{family.stored.get(first, first)}{dot}{rest}"
        found[stored] = _turned(tensor) if turned else tensor
    return found


def _is_transposed(family: Family, name: str, quantized: Collection[str]) -> bool:
    """Whether files hold this weight as [K, N]: GPT-2's, but for its tables and its head."""
    if not family.transposed:
        return False
    owner, _, leaf = name.rpartition(".")
    linears = {family.names.get(part) for part in ("qkv", "out", "up", "down")}
    return leaf == "weight" and owner.rpartition(".")[2] in linears and owner not in quantized


def _turned(tensor: Tensor | Lazy) -> Lazy:
    def make() -> Tensor:
        return (tensor.make() if isinstance(tensor, Lazy) else tensor).T.contiguous()

    return Lazy(tensor.dtype, tuple(tensor.shape)[::-1], make)


def _in_model(family: Family, name: str) -> str:
    """The decoder's name of a tensor of a file: of the whole model, or of its body alone."""
    first, dot, rest = name.partition(".")
    for ours, stored in family.stored.items():
        if first == stored:
            return f"{ours}{dot}{rest}"
    below = {family.names.get(part) for part in ("embedding", "positions", "blocks", "norm")}
    return f"{family.names['body']}.{name}" if first in below else name


def read_config(directory: Path) -> tuple[DecoderConfig, QuantizationConfig | None]:
    """What config.json says; generation_config.json's end tokens, being the fuller list, win."""
    place = directory / "config.json"
    raw = read_json(place)
    try:
        config, quantization = DecoderConfig.from_hf(raw), QuantizationConfig.from_hf(raw)
        place = directory / "generation_config.json"
        eos = read_json(place).get("eos_token_id") if place.is_file() else None
        if eos is not None:
            eos = tuple(eos) if isinstance(eos, list) else eos
            config = replace(config, eos_token_id=eos)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return config, quantization
