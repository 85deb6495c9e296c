"""LoRA in a transformer of one's own: pre-trained, then adapted to another task, two files in all.

The model learns to continue a walk through the alphabet upwards; an adapter of 4 % of its size then
teaches it to walk downwards, and can be taken out again.
"""

import torch
import torch.nn.functional as F
from torch import nn

import lowrank

LETTERS, WIDTH, HEADS, LENGTH = 26, 64, 4, 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x):  # [B, S, WIDTH]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        seen = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, ids):  # [B, S] -> logits [B, S, LETTERS]
        return self.head(self.blocks(self.letters(ids) + self.places.weight[: ids.shape[1]]))


def walks(step, count=32):
    """Walks of `step` letters at a time, from anywhere: [count, LENGTH]."""
    return (torch.randint(LETTERS, (count, 1)) + step * torch.arange(LENGTH)) % LETTERS


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model, step, steps, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, walks(step)).backward()
        optimizer.step()


torch.manual_seed(0)
model = Transformer()
train(model, step=1, steps=60, lr=3e-3)
upwards = loss_of(model, walks(1)).item()

# the frozen weights may be quantized: about 4.5 bits each
lowrank.quantize(model, "nf4", skip=["head"])
config = lowrank.LoRAConfig(r=8, lora_alpha=16, target_modules=["qkv", "out", "up", "down"])
lowrank.inject(model, config)
lowrank.print_trainable_parameters(model)
before = loss_of(model, walks(-1)).item()
train(model, step=-1, steps=100, lr=1e-2)
after = loss_of(model, walks(-1)).item()
with lowrank.disable_adapters(model):
    again = loss_of(model, walks(1)).item()
print(f"upwards {upwards:.3f}; downwards {before:.3f} before the adapter, {after:.3f} with it")
print(f"upwards without the adapter: {again:.3f}")
assert after < before / 4 and again < 0.5

lowrank.save_adapter(model, "downwards")  # PEFT's two files
