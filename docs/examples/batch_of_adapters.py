"""A batch whose rows have adapters of their own, written together: one forward serves all."""

import lowrank
from lowrank.train import TrainConfig, Trainer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GREETINGS = {"french": "Bonjour.", "italian": "Buongiorno."}
PROMPT = "Say hello.\n"

model = lowrank.load_model(NAME, quantizer="nf4")
tokenizer = lowrank.load_tokenizer(NAME)
for name, greeting in GREETINGS.items():
    lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules="all-linear"), adapter=name)
    lowrank.set_adapter(model, name)
    pairs = [{"prompt": PROMPT, "completion": greeting}] * 8
    config = TrainConfig(f"greetings/{name}", learning_rate=1e-2, max_steps=10)
    Trainer(model, config, pairs, tokenizer=tokenizer).train()

rows = ["italian", None, "french", "italian"]  # None is the base
with lowrank.adapter_rows(model, rows):
    texts = lowrank.generate(model, tokenizer, [PROMPT] * len(rows), max_new_tokens=10)
for name, text in zip(rows, texts, strict=True):
    print(f"{name or 'base'}: {text}")
assert [texts[0], texts[2], texts[3]] == [GREETINGS[rows[i]] for i in (0, 2, 3)]
