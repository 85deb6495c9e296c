"""The README.md of an adapter's directory."""

from __future__ import annotations

import json

from lowrank.adapters.config import LoRAConfig


def card(config: LoRAConfig) -> str:
    """A model card in Markdown: what the adapter is, and how to load it."""
    base = config.base_model_name_or_path
    named = config.target_modules
    targets = [named] if isinstance(named, str) else [*named]
    targets += config.target_parameters or []
    stabilized = ", rank-stabilized" if config.use_rslora else ""
    text = [f"Rank {config.r}, alpha {config.lora_alpha:g}{stabilized}, on {', '.join(targets)}."]
    if config.modules_to_save:
        text.append(f"Trained whole: {', '.join(config.modules_to_save)}.")
    if config.trainable_token_indices:
        text.append("Some tokens have embeddings of their own.")
    head = [
        "library_name: peft",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "tags:",
        "- lora",
        "- lowrank",
    ]
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# LoRA adapter{f' for {base}' if base else ''}",
            "",
            " ".join(text),
            "",
            "```python",
            'lowrank.load_adapter(model, "path/to/this/directory")',
            "```",
            "",
        ]
    )
