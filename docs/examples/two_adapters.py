"""Two adapters over one frozen model: trained in turn, switched, summed, and without both."""

import lowrank
from lowrank.train import TrainConfig, Trainer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ANSWERS = {"polite": "Certainly, with pleasure.", "terse": "No."}

model = lowrank.load_model(NAME, quantizer="nf4")
tokenizer = lowrank.load_tokenizer(NAME)
for name, answer in ANSWERS.items():
    lowrank.inject(model, lowrank.LoRAConfig(r=8, target_modules="all-linear"), adapter=name)
    lowrank.set_adapter(model, name)  # the one that trains; the other stays as it is
    pairs = [{"prompt": f"Would you do task {n}?\n", "completion": answer} for n in range(16)]
    settings = TrainConfig(f"runs/{name}", learning_rate=1e-2, max_steps=15)
    Trainer(model, settings, pairs, tokenizer=tokenizer).train()

prompt = "Would you do task 5?\n"
said = {}
for name in ANSWERS:
    lowrank.set_adapter(model, name)
    said[name] = lowrank.generate(model, tokenizer, prompt, max_new_tokens=12)
    print(f"{name}: {said[name]}")
assert said == ANSWERS

lowrank.combine_adapters(model, list(ANSWERS), [0.5, 0.5], into="both")
lowrank.set_adapter(model, "both")
print("both:", lowrank.generate(model, tokenizer, prompt, max_new_tokens=12))
with lowrank.disable_adapters(model):
    print("neither:", lowrank.generate(model, tokenizer, prompt, max_new_tokens=12))

for name in ANSWERS:
    lowrank.save_adapter(model, "two", adapter=name)  # two/polite, two/terse
fresh = lowrank.load_model(NAME, quantizer="nf4")
for name in ANSWERS:
    lowrank.load_adapter(fresh, "two", adapter=name, subfolder=name)
lowrank.set_adapter(fresh, "terse")
assert lowrank.generate(fresh, tokenizer, prompt, max_new_tokens=12) == ANSWERS["terse"]
