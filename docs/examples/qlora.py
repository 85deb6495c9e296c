"""QLoRA on a model of the hub: 4-bit weights, an adapter on every linear layer, in a few lines."""

import json

import lowrank
from lowrank.train import TrainConfig, Trainer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

pairs = [{"prompt": f"What is {n} + {n}?\n", "completion": f"It is {2 * n}."} for n in range(24)]
with open("sums.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(pair) + "\n" for pair in pairs)

model = lowrank.load_model(NAME, quantizer="nf4")  # quantized tensor by tensor as it is read
tokenizer = lowrank.load_tokenizer(NAME)
config = lowrank.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.05)
lowrank.inject(model, config)
lowrank.print_trainable_parameters(model)

settings = TrainConfig(
    "sums",
    learning_rate=5e-3,
    max_steps=12,
    gradient_checkpointing=True,
    optim="paged_adamw_8bit",
)
result = Trainer(model, settings, "sums.jsonl", tokenizer=tokenizer).train()
assert result.losses[-1] < result.losses[0]
print(lowrank.generate(model, tokenizer, "What is 7 + 7?\n", max_new_tokens=12))

# anywhere else: the adapter names its base, which is fetched and quantized again
again = lowrank.load_model("sums", quantizer="nf4")
print(lowrank.generate(again, tokenizer, "What is 7 + 7?\n", max_new_tokens=12))
