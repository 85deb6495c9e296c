"""Writing text: against transformers' greedy search, and batches against single prompts."""

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, DataError
from lowrank.models.generate import generate_ids
from lowrank.models.tokenizer import load_tokenizer
from tests.models.helpers import assert_same_greedy, llama, tokens
from tests.models.test_tokenizer import TEMPLATE, write_tokenizer

pytest.importorskip("transformers", reason="the oracle; pip install transformers")


@pytest.fixture
def saved(tmp_path):
    """(our model, transformers' with the same weights, tokenizer)"""
    oracle = llama(vocab_size=600, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    oracle.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, chat_template=TEMPLATE)
    return lowrank.load_model(tmp_path), oracle, load_tokenizer(tmp_path)


def test_greedy_equals_transformers(saved):
    model, oracle, _ = saved
    for S in (1, 7, 40):
        prompt = tokens(1, S, 599)
        expected = oracle.generate(  # without a mask it would leave out its pad token, 0
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False,
            eos_token_id=599,
        )  # fmt: skip
        (written,) = generate_ids(model, prompt.tolist(), 30, ends={599})
        want = expected[0, S:].tolist()
        assert_same_greedy(oracle, prompt[0].tolist(), written, [i for i in want if i != 599])


def test_a_batch_of_different_lengths_equals_one_by_one(saved):
    model, _, tokenizer = saved
    prompts = ["x", "def f(x): return", "Ünï" * 9, "a b c d e f g"]
    ids = [tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    together = generate_ids(model, ids, 25)
    for prompt, written in zip(ids, together, strict=True):
        assert_same_greedy(model, prompt, written, *generate_ids(model, [prompt], 25))
    texts = lowrank.generate(model, tokenizer, prompts, max_new_tokens=25)
    ends = {*model.config.eos_token_ids, tokenizer.eos_token_id}
    assert texts == [tokenizer.decode(row) for row in generate_ids(model, ids, 25, ends=ends)]
    assert len(set(texts)) > 1


def test_writing_ends_at_any_end_token(saved):
    model, _, _ = saved
    (free,) = generate_ids(model, [[5, 6, 7]], 20)
    assert len(free) == 20
    end = free[11]
    first = free.index(end)
    (ended, other) = generate_ids(model, [[5, 6, 7], [9]], 20, ends={end, 601})
    assert ended == free[:first]
    assert end not in other


def test_messages_go_through_the_chat_template(saved):
    model, _, tokenizer = saved
    messages = [{"role": "user", "content": "def?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    (ids,) = generate_ids(model, [tokenizer.encode(text)], 12, ends={2})
    expected = tokenizer.decode(ids)
    assert lowrank.generate(model, tokenizer, messages, max_new_tokens=12) == expected


def test_sampling_follows_the_distribution_it_is_told(saved):
    model, _, _ = saved
    prompt, draws, temperature = [5, 6, 7], 4000, 0.7
    with torch.no_grad():
        probs = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)

    def drawn(**options) -> torch.Tensor:
        written = generate_ids(model, [prompt] * draws, 1, temperature=temperature, **options)
        return torch.bincount(torch.tensor(written).flatten(), minlength=600).double()

    def near(counts, expected):
        # Poisson's tails, which are wider than a binomial's: rare tokens are far from normal
        mean = draws * expected.double()
        as_many = torch.special.gammainc(counts.clamp(min=0.5), mean).where(counts > 0, 1)
        as_few = torch.special.gammaincc(counts + 1, mean)
        assert as_many.min() > 1e-9 and as_few.min() > 1e-9

    near(drawn(), probs)
    top = probs.topk(5)
    expected = torch.zeros(600).scatter(0, top.indices, top.values / top.values.sum())
    near(drawn(top_k=5), expected)
    ordered, index = probs.sort(descending=True)
    n = int((ordered.cumsum(0) < 0.4).sum()) + 1
    expected = torch.zeros(600).scatter(0, index[:n], ordered[:n] / ordered[:n].sum())
    near(drawn(top_p=0.4), expected)


def test_a_seed_repeats_and_the_global_one_is_heeded(saved):
    model, _, tokenizer = saved
    options = dict(max_new_tokens=20, temperature=1.5)
    first = lowrank.generate(model, tokenizer, "def", seed=3, **options)
    state = torch.get_rng_state()
    assert lowrank.generate(model, tokenizer, "def", seed=3, **options) == first
    assert_close(torch.get_rng_state(), state)
    assert lowrank.generate(model, tokenizer, "def", seed=4, **options) != first
    torch.manual_seed(1)
    third = lowrank.generate(model, tokenizer, "def", **options)
    torch.manual_seed(1)
    assert lowrank.generate(model, tokenizer, "def", **options) == third


def test_the_model_is_left_in_its_mode(saved):
    model, _, tokenizer = saved
    lowrank.inject(model, lowrank.LoRAConfig(r=4, lora_dropout=0.9, init_lora_weights=False))
    model.train()
    written = lowrank.generate(model, tokenizer, "def", max_new_tokens=20)
    assert model.training
    assert lowrank.generate(model.eval(), tokenizer, "def", max_new_tokens=20) == written


@pytest.mark.parametrize(
    ("prompt", "options", "error", "says"),
    [
        ("x", {"max_new_tokens": 0}, ConfigError, r"max_new_tokens: expected 1 to .*; got 0"),
        ("x", {"max_new_tokens": 10**30}, ConfigError, r"max_new_tokens: expected 1 to .*; got 10"),
        ("x", {"seed": 2**64}, ConfigError, "seed: expected a whole number of 64 bits; got 18"),
        ("x", {"temperature": -1.0}, ConfigError, "temperature: expected at least 0"),
        ("x", {"top_p": 0.0}, ConfigError, "top_p: expected above 0 and at most 1; got 0.0"),
        ("x", {"top_k": 0}, ConfigError, "top_k: expected at least 1; got 0"),
        ("", {}, DataError, "prompt 0: expected at least one token"),
        ([], {}, DataError, "prompt: expected text, texts or messages"),
        ([1, 2], {}, DataError, "prompt: expected text, texts or messages"),
        (5, {}, DataError, "prompt: expected text, texts or messages; got int"),
    ],
)
def test_bad_arguments_are_named(saved, prompt, options, error, says):
    model, _, tokenizer = saved
    with pytest.raises(error, match=says):
        lowrank.generate(model, tokenizer, prompt, **options)


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-40, 1e-30, 1e-6])
def test_a_low_temperature_is_greedy(saved, temperature):
    model, _, tokenizer = saved
    prompt = tokenizer.encode("def", add_special_tokens=True)
    (greedy,) = generate_ids(model, [prompt], 20)
    (drawn,) = generate_ids(model, [prompt], 20, temperature=temperature)
    assert_same_greedy(model, prompt, greedy, drawn)


def test_ids_of_another_models_tokenizer_are_refused(saved):
    model, _, _ = saved
    with pytest.raises(DataError, match="prompt 1: .*vocab_size=600; got 3 to 600: use the model"):
        generate_ids(model, [[1, 599], [3, 600]], 4)


def test_a_prompt_beyond_the_models_positions_is_refused(saved):
    model, _, _ = saved
    most = model.config.max_position_embeddings
    assert len(generate_ids(model, [[5] * most], 1)) == 1
    says = rf"prompt 1: expected at most max_position_embeddings={most} tokens.*got {most + 1};"
    with pytest.raises(DataError, match=says):
        generate_ids(model, [[5], [5] * (most + 1)], 1)
