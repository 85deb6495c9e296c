"""`lowrank generate`: one prompt as it is written, several at once, and what ends them."""

from __future__ import annotations

import json

import lowrank

OPTIONS = {"max_new_tokens": 20, "repetition_penalty": 1.3}


def words(tiny, **options) -> list:
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**OPTIONS, **options}.items()
    ]
    return ["generate", "--model", tiny, *flags]


def test_several_prompts_and_stop_strings(run, tiny):
    model, tokenizer = lowrank.load_model(tiny), lowrank.load_tokenizer(tiny)
    prompts = ["What is 3?\n", "def f(x, y):"]
    texts = lowrank.generate(model, tokenizer, prompts, **OPTIONS)
    given = [f"--prompt={prompt}" for prompt in prompts]
    assert run(*words(tiny), *given).out == "\n\n".join(map(str.__add__, prompts, texts)) + "\n"
    outcome = run(*words(tiny), *given, "--json")
    assert json.loads(outcome.out) == {"prompts": prompts, "texts": texts}

    stop = texts[0][4:6]
    cut = texts[0][: texts[0].index(stop)]
    one = [*words(tiny), given[0], "--stop", "never there", "--stop", stop]
    assert run(*one).out == cut + "\n"
    assert json.loads(run(*one, "--json").out) == {"prompt": prompts[0], "text": cut}


def test_several_questions(run, tiny):
    model, tokenizer = lowrank.load_model(tiny), lowrank.load_tokenizer(tiny)
    asked = [[{"role": "user", "content": text}] for text in ("Who?", "Why is it so?")]
    texts = lowrank.generate(model, tokenizer, asked, **OPTIONS)
    outcome = run(*words(tiny), "--chat", "--prompt=Who?", "--prompt=Why is it so?", "--json")
    assert json.loads(outcome.out)["texts"] == texts


def test_a_prompt_longer_than_the_model_reads(run, tiny):
    outcome = run(*words(tiny), "--prompt", "word " * 600)
    assert outcome.status == 2 and outcome.out == ""
    assert "max_position_embeddings=512" in outcome.err and "shorten it" in outcome.err
