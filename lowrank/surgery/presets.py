"""Which layers people adapt when they name none, or name a strategy."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# What PEFT takes for these families where it is not the query and value projections; and for the
# first Qwen, of which PEFT knows nothing, what tutorials take.
_BY_MODEL_TYPE: dict[str, list[str] | str] = {
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "btlm": ["c_proj", "c_attn"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "qwen": ["c_attn", "c_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
# What families call those projections: LLaMA, Mistral, Qwen, Gemma, OPT, GPT-J; BERT; T5;
# DistilBERT; DeBERTa; diffusers; the papers. Then where one layer makes queries, keys and values:
# GPT-2; GPT-NeoX, BLOOM, Falcon; Phi-3, CodeGen; MPT; ViT in timm; DeBERTa of old.
_QUERY_VALUE = (
    "q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin", "query_proj", "value_proj",
    "to_q", "to_v", "wq", "wv",
    "c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj",
)  # fmt: skip
_ATTENTION = ("attn", "attention")


def default_targets(model: nn.Module) -> list[str] | str:
    """What target_modules=None means: PEFT's choice for the model's family, else "minimal"."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return _BY_MODEL_TYPE.get(str(model_type), "minimal")


def strategy_targets(strategy: str, linears: Iterable[str]) -> list[str]:
    """Of the names of a model's linear layers, those that "minimal" or "attention" means.

    minimal: the query and value projections. attention: all within a module called so.
    """
    if strategy == "minimal":
        return [name for name in linears if name.split(".")[-1] in _QUERY_VALUE]
    return [
        name
        for name in linears
        if any(word in part.lower() for part in name.split(".")[:-1] for word in _ATTENTION)
    ]
