"""A step of every family, beside torch's own record of what it allocated."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.plan import model as models
from lowrank.plan.step import backward_peaks
from tests.models.families import BASE, FAMILIES, GPT2, targets
from tests.plan.test_step import LENGTH, ROWS, allocated

transformers = pytest.importorskip("transformers", reason="it completes a config.json")
FEW = ("mixtral", "gemma2")  # the others are slow together


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(name, i % 2 == 0, marks=[] if name in FEW else [pytest.mark.slow])
        for i, name in enumerate(FAMILIES)
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_takes_what_torch_allocates(name, checkpointing):
    model_type, changes = FAMILIES[name]
    raw = {**(GPT2 if model_type == "gpt2" else BASE), **changes}
    raw = transformers.AutoConfig.for_model(model_type, **raw).to_dict()
    config = DecoderConfig.from_hf({**raw, "model_type": model_type})
    real = Decoder(config)
    lora = lowrank.LoRAConfig(r=4, **targets(real))
    lowrank.quantize(real, "nf4", skip=["lm_head"])
    lowrank.inject(real, lora).train()
    real.gradient_checkpointing = checkpointing
    length = min(LENGTH, config.max_position_embeddings)
    measured = allocated(real, torch.randint(0, config.vocab_size, (ROWS, length)))
    planned = models.build(
        config, lora, lowrank.quant.get("nf4"), torch.float32, ("lm_head",), False
    )
    peaks = backward_peaks(
        planned, config.num_hidden_layers, batch_size=ROWS, length=length,
        checkpointing=checkpointing, accumulates=False, device="cpu",
    )  # fmt: skip
    assert max(sum(p.values()) for p in peaks) == pytest.approx(measured, rel=0.04)
