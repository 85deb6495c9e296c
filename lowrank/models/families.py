"""The table of families: what each has beside, or instead of, what Llama has. One row a family.

Fields and parts go by one vocabulary here, Llama's for fields; a row says what its `config.json`
and its checkpoints call them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lowrank.errors import ConfigError

# What a part of the decoder does, and what Llama's checkpoints call it. Others have also positions,
# and norms of what the attention and the MLP give: attention_out_norm, mlp_out_norm.
PARTS = {
    "body": "model",
    "embedding": "embed_tokens",
    "blocks": "layers",
    "norm": "norm",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "qkv": "qkv_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "out": "o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "gate_up": "gate_up_proj",
    "down": "down_proj",
}

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A row. Its defaults are Llama.

    `reads` are fields of `config.json` beside those that all have; `words` what it calls some of
    them, `defaults` what they are where it does not say. `calls` is what its checkpoints call
    `PARTS`, "" for one it has not, `slides` which of its layers see a window only.
    """

    architecture: str
    reads: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[str, str] = field(default_factory=dict)
    slides: Callable[[Raw, int], bool] | None = None
    window_is_optional: bool = False  # and not there unless `use_sliding_window`
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"  # plus one: y = x / rms(x) * (1 + w)
    block: Literal["sequential", "sandwich", "parallel"] = "sequential"
    qkv: Literal["separate", "joined", "by_head"] = "separate"  # by head: [q k v] of each in turn
    qk_norm: bool = False  # heads of queries and keys are normed before they are turned
    out_bias: bool | None = None  # of the attention's last projection; None: as of the others
    mlp: Literal["gated", "joined", "plain"] = "gated"  # joined: gate and up are one layer
    mlp_ratio: int | None = None  # intermediate_size, in hidden sizes, where it is not said
    must: Mapping[str, Any] = field(default_factory=dict)  # what the decoder has no other of
    stored: Mapping[str, str] = field(default_factory=dict)  # parts that files call otherwise
    transposed: bool = False  # files hold the weights of blocks as [K, N]
    scaled_embedding: bool = False  # embeddings times sqrt(hidden_size)
    learned_positions: bool = False  # instead of rotary ones
    head_bias: bool = False
    # of layers with experts: fields of `config.json` and what they are where it does not say; and
    # what its checkpoints call the mixture, and an expert's gate, up and down
    mixture: Mapping[str, Any] = field(default_factory=dict)
    expert_files: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")

    @cached_property
    def names(self) -> Mapping[str, str]:
        """What its checkpoints call each of `PARTS`."""
        return {part: name for part, name in {**PARTS, **self.calls}.items() if name}

    def path(self, *parts: str) -> str:
        """The name of a part within others: path("body", "norm")."""
        return ".".join(self.names[part] for part in parts)


def every_layer(raw: Raw, layer: int) -> bool:
    """Mistral, Phi-3."""
    return True


def late_layers(raw: Raw, layer: int) -> bool:
    """Qwen."""
    first = raw.get("max_window_layers")
    return layer >= (28 if first is None else first)


def has_rotation(raw: Raw, layer: int) -> bool:
    """SmolLM3, where config.json has no `no_rope_layers`: but for every fourth."""
    return (layer + 1) % (raw.get("no_rope_layer_interval") or 4) != 0


def layers_without_rotation(raw: Raw, layer: int) -> bool:
    """SmolLM3."""
    given = raw.get("no_rope_layers")
    return not (has_rotation(raw, layer) if given is None else given[layer])


def even_layers(raw: Raw, layer: int) -> bool:
    """Gemma 2."""
    return layer % 2 == 0


def but_every_sixth(raw: Raw, layer: int) -> bool:
    """Gemma 3."""
    return (layer + 1) % (raw.get("sliding_window_pattern") or 6) != 0


_WINDOWS = ("sliding_window", "layer_types")
_GEMMA = (*_WINDOWS, "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping")
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_GEMMA_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_CAUSAL = {"use_bidirectional_attention": False}
_BIASED = {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
_LLAMA_BIASES = ("attention_bias", "mlp_bias")
_BALANCE = {"output_router_logits": False, "router_aux_loss_coef": 0.001}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", reads=_LLAMA_BIASES),
    "mistral": Family(
        "MistralForCausalLM",
        reads=("sliding_window",),
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        slides=every_layer,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        reads=_WINDOWS,
        defaults={"sliding_window": 4096, "attention_bias": True},
        slides=late_layers,
        window_is_optional=True,
        out_bias=False,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        reads=("attention_bias", *_WINDOWS),
        defaults={"sliding_window": 4096, "head_dim": 128},
        slides=late_layers,
        window_is_optional=True,
        qk_norm=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        reads=(*_LLAMA_BIASES, *_WINDOWS, "no_rope_layers"),
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4},
        slides=layers_without_rotation,
        window_is_optional=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        reads=("sliding_window", "partial_rotary_factor"),
        defaults={"rms_norm_eps": 1e-5},
        slides=every_layer,
        qkv="joined",
        mlp="joined",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        reads=("sliding_window",),
        words={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        slides=every_layer,
        mixture={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14336,
            "norm_topk_prob": True,
            **_BALANCE,
        },
        expert_files=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        reads=("attention_bias", "sliding_window"),
        defaults={"sliding_window": 4096, "num_key_value_heads": 4},
        slides=every_layer,
        window_is_optional=True,
        qk_norm=True,
        mixture={
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": (),
            **_BALANCE,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        reads=(*_GEMMA, "attn_logit_softcapping"),
        words={"hidden_act": "hidden_activation"},
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        calls=_GEMMA_NORMS,
        slides=even_layers,
        must=_CAUSAL,
        norm="rms_plus_one",
        block="sandwich",
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        reads=(*_GEMMA, "rope_local_base_freq"),
        words={"hidden_act": "hidden_activation"},
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1e6},
        calls=_GEMMA_NORMS,
        slides=but_every_sixth,
        must=_CAUSAL,
        norm="rms_plus_one",
        block="sandwich",
        qk_norm=True,
        scaled_embedding=True,
    ),
    "phi": Family(
        "PhiForCausalLM",
        reads=("partial_rotary_factor",),
        words={"rms_norm_eps": "layer_norm_eps"},
        defaults={**_BIASED, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
        calls={
            "norm": "final_layernorm",
            "out": "dense",
            "up": "fc1",
            "down": "fc2",
            "mlp_norm": "",
        },
        must={"qk_layernorm": False},
        norm="layer",
        block="parallel",
        mlp="plain",
        head_bias=True,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        reads=("attention_bias", "use_parallel_residual", "partial_rotary_factor"),
        words={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        defaults={**_BIASED, "hidden_act": "gelu", "partial_rotary_factor": 0.25},
        calls={
            "body": "gpt_neox",
            "embedding": "embed_in",
            "norm": "final_layer_norm",
            "attention": "attention",
            "qkv": "query_key_value",
            "out": "dense",
            "up": "dense_h_to_4h",
            "down": "dense_4h_to_h",
        },
        stored={"lm_head": "embed_out"},
        norm="layer",
        block="parallel",
        qkv="by_head",
        mlp="plain",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        words={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={
            **_BIASED,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
        },
        calls={
            "body": "transformer",
            "embedding": "wte",
            "positions": "wpe",
            "blocks": "h",
            "norm": "ln_f",
            "attention_norm": "ln_1",
            "attention": "attn",
            "qkv": "c_attn",
            "out": "c_proj",
            "mlp_norm": "ln_2",
            "up": "c_fc",
            "down": "c_proj",
        },
        must={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        norm="layer",
        qkv="joined",
        mlp="plain",
        mlp_ratio=4,
        learned_positions=True,
        transposed=True,
    ),
}


def find_family(model_type: object) -> Family:
    """The row of a `model_type`. Raises ConfigError with those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type: expected one of {', '.join(FAMILIES)}; got {model_type!r}; "
            "build another by its own code and adapt it with lowrank.inject(model, config)"
        )
    return FAMILIES[model_type]
