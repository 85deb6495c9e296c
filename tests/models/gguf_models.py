"""Models as llama.cpp's converter writes them, by the gguf package's own writer and names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

# model_type: GGUF's architecture
ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "smollm3": "SMOLLM3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "mixtral": "LLAMA",
    "phi3": "PHI3",
    "phi": "PHI2",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt_neox": "GPTNEOX",
    "gpt2": "GPT2",
}


def write_gguf(path: Path, model: torch.nn.Module, kind: str = "F32", **metadata) -> None:
    """The model with its matrices stored as `kind`; `metadata` goes to the writer's add_* functions
    after what the config says, and wins.
    """
    import gguf

    config, quant = model.config, gguf.GGMLQuantizationType[kind]
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in {**_metadata(config), **metadata}.items():
        if value is not None:
            getattr(writer, f"add_{key}")(*(value if isinstance(value, tuple) else [value]))
    for name, factors in _factors(config).items():
        writer.add_tensor(name, factors.numpy())
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in _apart(model.state_dict()):
        if tied and name in ("lm_head.weight", "embed_out.weight"):
            continue
        tensor = _converted(config, name, tensor.float())
        values = tensor.contiguous().numpy()
        as_is = tensor.ndim == 1 or kind == "F32"
        data = values if as_is else gguf.quants.quantize(values, quant)
        raw = None if as_is else quant
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _apart(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """With gate and up of experts, which transformers holds in one, for themselves."""
    for name, tensor in state.items():
        start, fused, _ = name.partition("gate_up_proj")
        if fused and ".experts." in name:
            gate, up = tensor.chunk(2, dim=1)
            yield from ((f"{start}gate_proj.weight", gate), (f"{start}up_proj.weight", up))
        else:
            yield name + ".weight" * (".experts." in name), tensor


def _metadata(config) -> dict[str, object]:
    """What the converter writes of a config: {name of the writer's function: value}."""
    import gguf

    kind, heads = config.model_type, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    wide = config.n_inner if kind == "gpt2" else config.intermediate_size
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "head_count": heads,
        "head_count_kv": None if kind in ("gpt2", "gpt_neox") else config.num_key_value_heads,
        "feed_forward_length": wide or 4 * config.hidden_size,
        "rope_freq_base": rope.get("rope_theta"),
    }
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if hasattr(config, name):
            key = "layer_norm_rms_eps" if name == "rms_norm_eps" else "layer_norm_eps"
            said[key] = getattr(config, name)
    if kind not in ("gpt2", "gpt_neox", "phi", "phi3"):
        said |= {"key_length": width, "value_length": width}
    if kind in ("mixtral", "qwen3_moe"):
        number = "num_local_experts" if kind == "mixtral" else "num_experts"
        said["expert_count"] = getattr(config, number)
        said["expert_used_count"] = config.num_experts_per_tok
        said["expert_feed_forward_length"] = getattr(config, "moe_intermediate_size", None)
    if kind in ("llama", "mistral", "mixtral", "smollm3"):
        said["rope_dimension_count"] = width
    if kind in ("phi", "phi3", "gpt_neox"):
        share = rope.get("partial_rotary_factor", 1.0)
        said["rope_dimension_count"] = int(share * width)
    if kind == "phi3":  # 0 says that nothing slides
        said["sliding_window"] = config.sliding_window or 0
    if kind in ("gemma2", "gemma3_text"):
        said["sliding_window"] = config.sliding_window
    if kind == "gemma2":
        said["attn_logit_softcapping"] = config.attn_logit_softcapping
        said["final_logit_softcapping"] = config.final_logit_softcapping
    if kind == "gpt_neox":
        said["parallel_residual"] = config.use_parallel_residual
    scaling = rope.get("rope_type", "default")
    if scaling in ("linear", "yarn"):
        said["rope_scaling_type"] = gguf.RopeScalingType(scaling)
        said["rope_scaling_factor"] = rope["factor"]
    if scaling == "yarn":
        said["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
    if scaling == "longrope":
        original = rope["original_max_position_embeddings"]
        growth = torch.tensor(config.max_position_embeddings / original)
        attention = (1 + growth.log() / torch.tensor(float(original)).log()).sqrt().item()
        said["rope_scaling_orig_ctx_len"] = original
        said["rope_scaling_attn_factors"] = attention
    return said


def _factors(config) -> dict[str, torch.Tensor]:
    """Divisors of each frequency: LongRoPE's two sets, and Llama 3's, worked out."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"])
            for which in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    return {"rope_freqs.weight": plain / frequencies}


def _converted(config, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as its architecture in llama.cpp wants it."""
    kind, leaf = config.model_type, name.split(".")[-2]
    if kind in ("llama", "mistral", "mixtral", "smollm3") and leaf in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
        # the two halves of a head become pairs side by side
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if kind in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return tensor + 1
    if leaf == "query_key_value":  # those of each head to all queries, keys, values
        heads = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return heads.swapaxes(0, 1).reshape(tensor.shape)
    if kind == "gpt2" and leaf in ("c_attn", "c_proj", "c_fc") and tensor.ndim == 2:
        return tensor.T
    return tensor
