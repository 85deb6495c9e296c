"""Whether the tensors of a model's files are those that its decoder takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowrank.errors import FileFormatError
from lowrank.io.names import check_shapes, folded, listed
from lowrank.io.pages import Empty, empty_bytes
from lowrank.io.quantized import QuantizedTensors, join
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.expert_files import in_files
from lowrank.models.quantization_config import QuantizationConfig


class Weights(Protocol):
    """Where tensors come from, one at a time, under Hugging Face's names."""

    config: DecoderConfig
    quantization: QuantizationConfig | None
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, empty: Empty = empty_bytes) -> Tensor: ...


def check_tensors(
    model: Decoder, weights: Weights, quantized: Mapping[str, QuantizedTensors], source: str | Path
) -> None:
    """Raises FileFormatError, with all that differs, unless the files have what the model takes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = dict(weights.shapes)
    for module, tensors in quantized.items():
        own = [name for name in (module, f"{module}.weight") if name in expected]
        if own:  # the layer itself checks its own
            for name in (*own, f"{module}.bias"):
                expected.pop(name, None)
            for name in tensors.names:
                del found[join(module, name)]
    family, parts = model.config.family, dict[str, tuple[int, ...]]()
    for name, shape in expected.items():
        own = in_files(family, name, shape, found)
        dense = [part for part in own if part.removesuffix(".weight") not in quantized]
        if 0 < len(dense) < len(own):
            raise FileFormatError(
                f"{source}: {name}: expected all of its tensors quantized, or none; not so: "
                f"{listed(folded(dense))}"
            )
        parts |= own
    for module in quantized:  # an expert's, or a router's
        if parts.pop(f"{module}.weight", None) is not None:
            for name in quantized[module].names:
                del found[join(module, name)]
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    try:
        check_shapes(parts, found, source)
    except FileFormatError as error:
        if "lm_head.weight" in parts.keys() - found.keys():
            raise FileFormatError(
                f"{error}; is the head the embedding? config.json then says tie_word_embeddings"
            ) from error
        raise
    _check_tied(model, weights, source)


def _check_tied(model: Decoder, weights: Weights, source: str | Path) -> None:
    """A tied model may store its head again, which then has to be the embedding."""
    head, embedding = "lm_head.weight", model.config.family.path("body", "embedding") + ".weight"
    if not model.config.tie_word_embeddings or not {head, embedding} <= weights.shapes.keys():
        return
    if weights.shapes[head] != weights.shapes[embedding] or not torch.equal(
        weights.read(head), weights.read(embedding)
    ):
        raise FileFormatError(
            f"{source}: {head}: expected the embedding again, as config.json says "
            "tie_word_embeddings; got another; set that to false if the head is its own"
        )


def check_layers(weights: Weights, source: str | Path) -> None:
    """FileFormatError unless the last layer of the config is there."""
    # before a decoder is made: a damaged number of layers would take for ever
    config = weights.config
    last = f"{config.family.path('body', 'blocks')}.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last) for name in weights.shapes):
        raise FileFormatError(
            f"{source}: missing tensors: {last}*, of the last layer by the config"
        )
