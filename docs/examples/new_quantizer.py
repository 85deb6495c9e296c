"""A quantizer of one's own: two functions, and it loads, trains, saves and merges.

Signs and one scale a row: a bit a weight for the codes, were they packed, which here they are not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import lowrank
from lowrank import quant


@quant.register("signs")
@dataclass(frozen=True)
class Signs:
    """w[n, k] = sign[n, k] * mean_k |w[n, k]|.   XNOR-Net, arXiv:1603.05279, §3."""

    row_local = True  # no row needs another: it may be decoded some rows at a time

    def quantize(self, weight: Tensor) -> quant.Storage:
        tensors = {
            "signs": weight.sign().to(torch.int8),  # [N, K]
            "scale": weight.float().abs().mean(dim=1, keepdim=True),  # [N, 1]
        }
        return quant.Storage("signs", tuple(weight.shape), weight.dtype, tensors)

    def dequantize(self, storage: quant.Storage, dtype: torch.dtype) -> Tensor:
        return (storage["signs"] * storage["scale"]).to(dtype)


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = lowrank.load_model(NAME, quantizer="signs")
lowrank.inject(model, lowrank.LoRAConfig(r=8, target_modules="all-linear"))
ids = torch.arange(1, 40)[None]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(8):
    loss = model.loss(ids, ids) / ids.numel()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} over signs")
assert losses[-1] < losses[0]

lowrank.save_adapter(model, "over-signs")
lowrank.merge_and_unload(model)  # dense again, with what the adapter learned
lowrank.save_model(model, "merged")
