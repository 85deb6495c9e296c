"""A GGUF file of the llama architecture as a decoder's config and tensors, under their HF names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank.errors import ConfigError, FileFormatError
from lowrank.io.pages import Empty, empty_bytes
from lowrank.models.config import DecoderConfig
from lowrank.models.gguf_file import GGUFFile

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFModel:
    """The config and the tensors of a GGUF file: `shapes` by HF name, `read(name)` as float32."""

    quantization = None  # its blocks are decoded

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = GGUFFile(path)
        self._names = {_hf_name(name): name for name in self._file.tensors}
        self.shapes = {hf: self._file.tensors[name].shape for hf, name in self._names.items()}
        try:
            self.config = _config(self._file, self.shapes)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def read(self, name: str, empty: Empty = empty_bytes) -> Tensor:
        """The tensor as float32 in Hugging Face's order of rows."""
        tensor = self._file.read(self._names[name], empty)
        if ".q_proj." in name:
            return _unpermute(tensor, self.config.num_attention_heads)
        if ".k_proj." in name:
            return _unpermute(tensor, self.config.num_key_value_heads)
        return tensor


def _hf_name(name: str) -> str:
    """The HF name of a GGUF tensor; a name of no known part stays, and is then unexpected."""
    part, _, leaf = name.rpartition(".")
    if part in _TOP:
        return f"{_TOP[part]}.{leaf}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", part)
    if block and block[2] in _IN_BLOCK:
        return f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{leaf}"
    return name


def _config(file: GGUFFile, shapes: dict[str, tuple[int, ...]]) -> DecoderConfig:
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"expected GGUF architecture llama; got {architecture!r}; "
            "build it by its own code and adapt it with lowrank.inject(model, config)"
        )
    if "rope_freqs.weight" in shapes:
        raise ConfigError(
            "rope_freqs: the scaled positions of Llama 3 are not read from GGUF; "
            "load the Hugging Face checkpoint"
        )
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise FileFormatError(f"{file.path}: token_embd.weight missing")
    hidden, heads = _need(file, "embedding_length", int), _need(file, "attention.head_count", int)
    scaling = metadata.get("llama.rope.scaling.type", "none")
    return DecoderConfig(
        vocab_size=embedding[0],
        hidden_size=hidden,
        intermediate_size=_need(file, "feed_forward_length", int),
        num_hidden_layers=_need(file, "block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=metadata.get("llama.attention.key_length") or hidden // max(heads, 1),
        max_position_embeddings=_need(file, "context_length", int),
        # stored as float32: 1e-05 comes back as 9.999999747e-06
        rms_norm_eps=float(f"{_need(file, 'attention.layer_norm_rms_epsilon', float):.6g}"),
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        rope_scaling=None
        if scaling == "none"
        else {"rope_type": scaling, "factor": metadata.get("llama.rope.scaling.factor")},
        tie_word_embeddings="lm_head.weight" not in shapes,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in shapes,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _need(file: GGUFFile, key: str, kind: type) -> Any:
    value = file.metadata.get(f"llama.{key}")
    if not isinstance(value, kind):
        raise FileFormatError(f"{file.path}: llama.{key}: expected {kind.__name__}; got {value!r}")
    return value


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from GGUF's order, rotary pairs side by side, to HF's, halves of a head."""
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
