"""The parts of a decoder that take tensors of files, and which tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from lowrank.io.quantized import join
from lowrank.models.decoder import Decoder
from lowrank.models.expert_files import in_files
from lowrank.models.experts import Experts


class Holder(NamedTuple):
    """What is read together: the parameters of a module, or rows of the weights of experts.

    `name` is that of the module, or of the weights. `files` are the names of tensors in files by
    those in the module; `shape` is that of the first.
    """

    name: str
    module_name: str
    module: nn.Module
    files: Mapping[str, str]
    shape: tuple[int, ...]

    def packed(self, quantized: Collection[str]) -> str | None:
        """Which of the `quantized` modules of files is this one, or has its weight."""
        if self.name in quantized:
            return self.name
        part = next(iter(self.files.values())).removesuffix(".weight")
        return part if part in quantized else None


def holders_of(model: Decoder, found: Collection[str]) -> list[Holder]:
    """All that takes tensors, of which the files have those `found`; a tied head takes none."""
    holders = []
    for name, module in model.named_modules():
        files = {
            leaf: in_files(model.config.family, join(name, leaf), tuple(p.shape), found)
            for leaf, p in module.named_parameters(recurse=False)
        }
        if isinstance(module, Experts):
            for leaf, parts in files.items():
                weights = join(name, leaf)
                holders += [Holder(weights, name, module, {leaf: p}, s) for p, s in parts.items()]
        elif files and not (name == "lm_head" and model.config.tie_word_embeddings):
            shape = next(iter(next(iter(files.values())).values()))
            own = {leaf: p for leaf, (p,) in files.items()}
            holders.append(Holder(name, name, module, own, shape))
    return holders
