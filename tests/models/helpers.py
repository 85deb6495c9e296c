"""Tiny random models in the formats that others write."""

from __future__ import annotations

from pathlib import Path

import torch

TINY = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.1,
)


def llama(**changes) -> torch.nn.Module:
    """transformers' model, random, biases and norms included."""
    import transformers

    config = transformers.LlamaConfig(**{**TINY, **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def tokens(B: int, S: int, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, (B, S))


@torch.no_grad()
def assert_same_greedy(model: torch.nn.Module, prompt: list[int], one: list, other: list) -> None:
    """Both go on alike after the prompt, till rounding alone tells the two largest logits apart."""
    for n, pair in enumerate(zip(one, other, strict=False)):
        if len({*pair}) > 1:
            logits = model(torch.tensor([prompt + one[:n]]))
            last = getattr(logits, "logits", logits)[0, -1]
            assert last.max() - last[list(pair)].min() < 1e-5, n
            return
    assert len(one) == len(other)


def write_gguf(path: Path, model: torch.nn.Module, kind: str = "F32", **metadata) -> None:
    """The model as llama.cpp's converter writes it, by the gguf package's own writer."""
    import gguf

    config, quant = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # as convert_hf_to_gguf.py: the two halves of a head become pairs side by side
            halves = tensor.reshape(heads, 2, -1, tensor.shape[-1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        values = tensor.float().numpy()
        as_is = tensor.ndim == 1 or kind == "F32"
        data = values if as_is else gguf.quants.quantize(values, quant)
        raw = None if as_is else quant
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
