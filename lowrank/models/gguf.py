"""A GGUF file as a decoder's config and tensors, under their HF names: a row an architecture.

What llama.cpp's converter changed on the way into the file is undone: the order of rows of queries
and keys, and of those of each head in turn, and the one that it adds to Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError, FileFormatError
from lowrank.io.pages import Empty, empty_bytes
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.models.expert_files import in_files
from lowrank.models.families import Family, find_family
from lowrank.models.gguf_file import GGUFFile

Undo = Callable[[Tensor, str, DecoderConfig], Tensor]  # (tensor, its HF name, config)

# what every architecture says: key -> field
_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_NEEDED = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
_WINDOW = {"attention.sliding_window": "sliding_window"}
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}
# tensors that are read with the config, or not at all
_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def _unpermuted(tensor: Tensor, name: str, config: DecoderConfig) -> Tensor:
    """Rows of q or k from GGUF's order, rotary pairs side by side, to HF's, halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    of = heads.get(name.split(".")[-2])
    if of is None:
        return tensor
    return tensor.unflatten(0, (of, -1, 2)).transpose(1, 2).flatten(0, 2)


def _without_one(tensor: Tensor, name: str, config: DecoderConfig) -> Tensor:
    return tensor.sub_(1) if name.endswith("norm.weight") else tensor


def _by_head(tensor: Tensor, name: str, config: DecoderConfig) -> Tensor:
    """All queries, then all keys, all values: to those of each head in turn."""
    if "query_key_value" not in name:
        return tensor
    return tensor.unflatten(0, (3, config.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Architecture:
    """A row: HF's `model_type`, the `keys` it has beside those of all, and what to `undo`.

    `means`: fields that no key says.
    """

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    undo: Undo | None = None
    means: Mapping[str, Any] = field(default_factory=dict)


_CAPS = {f"{which}_logit_softcapping": f"{which}_logit_softcapping" for which in ("attn", "final")}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_MIXTRAL = Architecture(
    "mixtral", _EXPERTS | {"feed_forward_length": "moe_intermediate_size"}, _unpermuted
)
ARCHITECTURES = {
    "llama": Architecture("llama", undo=_unpermuted),  # Mistral's too, and with experts Mixtral's
    "smollm3": Architecture("smollm3", undo=_unpermuted),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        means={"norm_topk_prob": True},
    ),
    "phi3": Architecture("phi3", _WINDOW),
    "phi2": Architecture("phi"),
    "gemma2": Architecture("gemma2", _WINDOW | _CAPS, _without_one),
    "gemma3": Architecture(
        "gemma3_text", _WINDOW | {"rope.freq_base_swa": "rope_local_base_freq"}, _without_one
    ),
    "gptneox": Architecture(
        "gpt_neox", {"use_parallel_residual": "use_parallel_residual"}, _by_head
    ),
    "gpt2": Architecture("gpt2"),
}


class GGUFModel:
    """The config and the tensors of a GGUF file: `shapes` by HF name, `read(name)` as float32."""

    quantization = None  # its blocks are decoded

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = GGUFFile(path)
        try:
            name, self._row = _architecture(self._file.metadata)
            self.config = _config(self._file, name, self._row)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        self._names = _names(self._file, name, self.config)
        self.shapes = {hf: self._file.tensors[name].shape for hf, name in self._names.items()}

    def read(self, name: str, empty: Empty = empty_bytes) -> Tensor:
        """The tensor as float32, as Hugging Face's files have it."""
        tensor = self._file.read(self._names[name], empty)
        undo = self._row.undo
        return tensor if undo is None else undo(tensor, name, self.config)


def _architecture(metadata: Mapping[str, Any]) -> tuple[str, Architecture]:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"expected a GGUF architecture of {', '.join(ARCHITECTURES)}; got {name!r}; "
            "build it by its own code and adapt it with lowrank.inject(model, config)"
        )
    has_experts = name == "llama" and metadata.get("llama.expert_count")
    return name, _MIXTRAL if has_experts else ARCHITECTURES[name]


def _config(file: GGUFFile, name: str, row: Architecture) -> DecoderConfig:
    """The config that the file's metadata and the names of its tensors tell."""
    metadata, tensors = file.metadata, file.tensors
    for key in _NEEDED:
        if not isinstance(value := metadata.get(f"{name}.{key}"), int):
            raise FileFormatError(f"{file.path}: {name}.{key}: expected int; got {value!r}")
    if "token_embd.weight" not in tensors:
        raise FileFormatError(f"{file.path}: token_embd.weight missing")
    last = f"blk.{metadata[f'{name}.block_count'] - 1}."
    if not any(tensor.startswith(last) for tensor in tensors):
        raise FileFormatError(
            f"{file.path}: missing tensors: {last}*, of the last layer by {name}.block_count"
        )
    fields: dict[str, Any] = {
        **row.means,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(f"blk.0.attn_{q}.bias" in tensors for q in ("q", "qkv")),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    for key, of in {**_KEYS, **row.keys}.items():
        if (value := metadata.get(f"{name}.{key}")) is not None:
            # stored as float32: 1e-05 comes back as 9.999999747e-06
            fields[of] = float(f"{value:.7g}") if isinstance(value, float) else value
    for theirs, ours in _TOKENS.items():
        fields[f"{ours}_token_id"] = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    if not fields.get("sliding_window"):  # 0 is Phi-4's word for none
        fields["sliding_window"] = None
    heads = max(fields["num_attention_heads"], 1)
    width = fields.get("head_dim") or fields["hidden_size"] // heads
    turned = metadata.get(f"{name}.rope.dimension_count")
    if isinstance(turned, int) and isinstance(width, int) and 0 < turned < width:
        fields["partial_rotary_factor"] = turned / width
    if row.model_type.startswith("gemma"):
        # which llama.cpp, too, tells by the number of layers: the 27B ones differ
        large = fields["num_hidden_layers"] in (46, 62)
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // heads if large else width
    family = find_family(row.model_type)
    raw = {family.words.get(word, word): value for word, value in fields.items()}
    scaling = _rope_scaling(file, name, fields)
    return DecoderConfig.from_hf({"model_type": row.model_type, "rope_scaling": scaling, **raw})


def _rope_scaling(file: GGUFFile, name: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """As in a config.json."""

    def said(key: str) -> Any:
        return file.metadata.get(f"{name}.rope.scaling.{key}")

    original = said("original_context_length") or fields.get("max_position_embeddings")
    own, short, long = (
        file.read(tensor).flatten().tolist() if tensor in file.tensors else None
        for tensor in _FACTORS
    )
    if own is not None:  # Llama 3's scaling, worked out: each frequency has a divisor
        short, long = own, own
    if short is not None and long is not None:
        length = 1.0 if own is not None else said("attn_factor")
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
            **({} if length is None else {"attention_factor": length}),
        }
    kind = said("type")
    if kind in (None, "none"):
        return None
    scaling = {"rope_type": kind, "factor": said("factor")}
    return scaling | ({"original_max_position_embeddings": original} if kind == "yarn" else {})


def _names(file: GGUFFile, architecture: str, config: DecoderConfig) -> dict[str, str]:
    """HF name -> the file's; what has no place in such a model stays, and is then unexpected."""
    import gguf

    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(archs[architecture], config.num_hidden_layers)
    with torch.device("meta"):
        model = Decoder(config)
    if config.mixture is not None:
        file.split_experts()
    theirs = {}
    for name, parameter in model.named_parameters():
        parts = in_files(config.family, name, tuple(parameter.shape))
        if len(parts) > 1:
            theirs |= {part: _of_expert(part, config.family) for part in parts}
        else:
            theirs[name] = table.get_name(name, (".weight", ".bias"))
    names = {hf: name for hf, name in theirs.items() if name in file.tensors}
    taken = {*names.values(), *_FACTORS}
    return names | {name: name for name in file.tensors if name not in taken}


def _of_expert(name: str, family: Family) -> str:
    """GGUFFile's name of a tensor of one expert."""
    before, _, after = name.partition(".experts.")
    layer, (e, projection, _) = before.split(".")[-2], after.split(".")
    words = dict(zip(family.expert_files[1:], ("ffn_gate", "ffn_up", "ffn_down"), strict=True))
    return f"blk.{layer}.{words[projection]}_exps.weight[{e}]"
