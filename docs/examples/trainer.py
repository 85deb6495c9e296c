"""The trainer from Python: conversations, a metric and a callback of one's own, going on later."""

import lowrank
from lowrank.train import Callback, TrainConfig, Trainer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
COLOURS = {"apple": "red", "sky": "blue", "grass": "green", "coal": "black"}


def conversation(thing):
    return {
        "messages": [
            {"role": "user", "content": f"What is the colour of {thing}?"},
            {"role": "assistant", "content": COLOURS[thing]},
        ]
    }


model, tokenizer = lowrank.load_model(NAME), lowrank.load_tokenizer(NAME)
lowrank.inject(model, lowrank.LoRAConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))


def right_answers(model):
    """The share of the questions that the model answers; becomes eval_right."""
    asked = [conversation(thing)["messages"][:1] for thing in COLOURS]
    said = lowrank.generate(model, tokenizer, asked, max_new_tokens=6)
    right = sum(a.strip() == b for a, b in zip(said, COLOURS.values(), strict=True))
    return {"right": right / len(COLOURS)}


class StopWhenLow(Callback):
    """Ends the run when a step's loss is low enough."""

    def on_step_end(self, loop):
        if loop.history.losses[-1] < 0.05:
            loop.stop()


data = [conversation(thing) for thing in COLOURS] * 4
settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 10}


def trainer(steps, **options):
    config = TrainConfig("colours", max_steps=steps, **settings, **options)
    measured = {"eval_data": data[:4], "compute_metrics": right_answers}
    return Trainer(model, config, data, tokenizer=tokenizer, callbacks=[StopWhenLow()], **measured)


first = trainer(10).train()
longer = trainer(30, resume="auto").train()  # the newest checkpoint: step 10
assert longer.losses[:10] == first.losses
print(f"held-out loss {longer.eval_losses[0][1]:.3f} → {longer.eval_losses[-1][1]:.3f}")
print(longer.metrics)
