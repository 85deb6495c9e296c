"""LoRA-FA: LoRA with A frozen as it was drawn, which x need not be kept for.   arXiv:2308.03303."""

from __future__ import annotations

from .lora import LoRA
from .registry import register


@register("lora_fa")
class LoRAFA(LoRA):
    """ΔW = s·B A, B alone trained; its files are LoRA's."""

    frozen = ("lora_A",)
