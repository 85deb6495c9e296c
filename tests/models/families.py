"""A tiny random model of each family, made by transformers."""

from __future__ import annotations

from pathlib import Path

import torch

import lowrank
from lowrank.models.decoder import Decoder

WINDOW = 16
BASE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
LONG_ROPE = dict(
    type="longrope",
    short_factor=[1.0, 1.1, 1.5, 2.0, 3.0],
    long_factor=[1.5, 2.0, 4.0, 6.0, 9.0],
)
# name: model_type, and what its config.json says beside BASE
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(sliding_window=WINDOW, head_dim=10)),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2)),
    "smollm3-window": (
        "smollm3",
        dict(no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=WINDOW),
    ),
    "phi3": ("phi3", dict(sliding_window=WINDOW)),
    "phi3-longrope": (
        "phi3",
        dict(
            rope_scaling=LONG_ROPE,
            original_max_position_embeddings=32,
            partial_rotary_factor=0.84,  # 10 of 12
        ),
    ),
    "mixtral": (
        "mixtral",
        dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=WINDOW),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, mlp_only_layers=[1]),
    ),
    "qwen3_moe-window": (
        "qwen3_moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=2,
            norm_topk_prob=True,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=WINDOW,
        ),
    ),
    "gemma2": ("gemma2", dict(sliding_window=WINDOW, head_dim=10, query_pre_attn_scalar=13)),
    "gemma3": (
        "gemma3_text",
        dict(
            sliding_window=WINDOW,
            sliding_window_pattern=2,
            head_dim=10,
            query_pre_attn_scalar=13,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            final_logit_softcapping=20.0,
        ),
    ),
    "phi": ("phi", dict(num_key_value_heads=4)),
    "gpt_neox": ("gpt_neox", dict(num_key_value_heads=4, rotary_pct=0.5)),
    "gpt_neox-sequential": (
        "gpt_neox",
        dict(
            num_key_value_heads=4,
            rotary_pct=0.5,
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="gelu_fast",
        ),
    ),
    "gpt2": ("gpt2", {}),
}
# what their config.json has in BASE's place
GPT2 = dict(
    n_embd=48,
    n_layer=3,
    n_head=4,
    n_positions=128,
    vocab_size=97,
    initializer_range=0.1,
    eos_token_id=2,
    bos_token_id=1,
)


def make(name: str, **other: object) -> torch.nn.Module:
    """transformers' model, random, biases and norms included.

    With `other`, that is what its config.json says beside BASE.
    """
    import transformers

    model_type, changes = FAMILIES[name] if name in FAMILIES else (name.split("-")[0], {})
    changes = other or changes
    base = GPT2 if model_type == "gpt2" else BASE
    config = transformers.AutoConfig.for_model(model_type, **{**base, **changes})
    # of the ways to attend, the one that has all that families want
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model


def pair(name: str, directory: Path, **options) -> tuple[Decoder, torch.nn.Module]:
    """Our decoder, loaded from what transformers saved, and transformers'."""
    oracle = make(name)
    oracle.save_pretrained(directory)
    return lowrank.load_model(directory, **options), oracle


def targets(model: Decoder) -> dict:
    """What an adapter's config targets: all there is. Weights of experts are parameters."""
    if model.config.mixture is None:
        return {"target_modules": "all-linear"}
    return {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }


def peft_name(name: str) -> str:
    """Of a tensor of ours, what PEFT calls it: on parameters, one adapter is around the other."""
    name = name.replace("experts.gate_up_proj.lora", "experts.base_layer.lora")
    return name.replace("experts.down_proj.lora", "experts.lora")
