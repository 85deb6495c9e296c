"""Writing text: against transformers' greedy search, and batches against single prompts."""

import copy

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, DataError, WeightError
from lowrank.models.generate import generate_ids
from lowrank.models.sampling import Sampling
from lowrank.models.tokenizer import Tokenizer, load_tokenizer
from tests.models.helpers import assert_same_greedy, llama, tokens
from tests.models.test_tokenizer import TEMPLATE, write_tokenizer

pytest.importorskip("transformers", reason="the oracle; pip install transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """(a directory, transformers' model of it)"""
    folder = tmp_path_factory.mktemp("saved")
    oracle = llama(vocab_size=600, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    oracle.save_pretrained(folder)
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder, oracle


@pytest.fixture
def saved(directory):
    """(our model, transformers' with the same weights, tokenizer)"""
    folder, oracle = directory
    return lowrank.load_model(folder), oracle, load_tokenizer(folder)


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


@pytest.mark.parametrize("options", [
    dict(repetition_penalty=1.4),
    dict(temperature=1.0),
    dict(temperature=0.8, top_k=20),
    dict(temperature=1.2, top_k=300, top_p=0.7, repetition_penalty=1.2),
])  # fmt: skip
def test_token_for_token_as_transformers(saved, options):
    """Both draw from torch's generator, whose state then is all that a token depends on."""
    model, oracle, _ = saved
    prompts, tried = tokens(3, 9, 599), 0
    drawn = {k: v for k, v in options.items() if k != "repetition_penalty"}
    torch.manual_seed(1)
    ours = generate_ids(model, prompts.tolist(), 40, sampling=Sampling(**options))
    torch.manual_seed(1)
    found = oracle.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, eos_token_id=None,
        do_sample=bool(drawn), **({"top_k": 0} | drawn if drawn else {}),
        repetition_penalty=options.get("repetition_penalty", 1.0),
    )  # fmt: skip
    for row, expected in zip(ours, found[:, 9:].tolist(), strict=True):
        # rounding may decide between two, once: the texts then go apart
        tried += next((i for i in range(40) if row[i] != expected[i]), 40)
    assert tried > 100


@pytest.mark.parametrize("options", [
    {},
    dict(repetition_penalty=1.4),
    dict(temperature=1.0),
    dict(temperature=1.2, top_k=300, top_p=0.7, repetition_penalty=1.2),
])  # fmt: skip
def test_rows_that_have_ended_leave_and_change_no_other(saved, options):
    """transformers goes on with them: what the others draw is the same."""
    model, oracle, _ = saved
    prompts, ends = tokens(9, 6, 599), range(3, 599, 12)
    sizes, drawn = [], {k: v for k, v in options.items() if k != "repetition_penalty"}
    with model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
        torch.manual_seed(1)
        ours = generate_ids(
            model, prompts.tolist(), 60, ends={*ends}, sampling=Sampling(**options)
        )  # fmt: skip
    left = [sum(n <= len(row) for row in ours) for n in range(max(map(len, ours)) + 1)]
    assert sizes == left[: len(sizes)] and len(sizes) == min(60, len(left))
    assert sizes[0] == 9 and len({*sizes}) > 3
    torch.manual_seed(1)
    found = oracle.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=60,
        eos_token_id=[*ends], pad_token_id=3, do_sample=bool(drawn),
        **({"top_k": 0} | drawn if drawn else {}),
        repetition_penalty=options.get("repetition_penalty", 1.0),
    )  # fmt: skip
    alike = 0
    for row, expected in zip(ours, found[:, 6:].tolist(), strict=True):
        expected = expected[: next((i for i, t in enumerate(expected) if t in ends), None)]
        alike += row == expected
    assert alike >= 7  # rounding may decide between two, once


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
    never = next(t for t in range(600) if t not in free)
    (ended, other) = generate_ids(model, [[5, 6, 7], [9]], 20, ends={end, never})
    assert ended == free[:first]
    assert end not in other


def test_text_ends_before_a_stop_string(saved):
    model, oracle, tokenizer = saved
    prompts = ["def f(x):", "x", "return a b c"]
    free = lowrank.generate(model, tokenizer, prompts, max_new_tokens=40)
    stops = [free[0][9:12] or "nor", free[1][20:21] or "this", "is written"]
    texts = lowrank.generate(model, tokenizer, prompts, max_new_tokens=40, stop=stops)
    for text, whole in zip(texts, free, strict=True):
        assert whole.startswith(text) and not any(stop in text for stop in stops)
        rest = whole[len(text) :]
        assert not rest or rest.startswith(tuple(stops))
    assert texts[0] == free[0].partition(stops[0])[0] or stops[1] in free[0]
    alone = lowrank.generate(model, tokenizer, prompts[1], max_new_tokens=40, stop=stops[1])
    assert alone == free[1].partition(stops[1])[0]


def test_a_stream_is_the_text_in_pieces(saved):
    model, _, tokenizer = saved
    messages = [{"role": "user", "content": "def?"}]
    for prompt in ("def f", messages):
        for options in ({}, {"temperature": 1.5, "seed": 3}, {"stop": ["e", "a"]}):
            expected = lowrank.generate(model, tokenizer, prompt, max_new_tokens=30, **options)
            pieces = lowrank.stream(model, tokenizer, prompt, max_new_tokens=30, **options)
            found = list(pieces)
            assert "".join(found) == expected and all(found)


def test_a_stream_leaves_the_caller_its_modes(saved):
    model, _, tokenizer = saved
    model.train()
    pieces = lowrank.stream(model, tokenizer, "def f(x)", max_new_tokens=30)
    assert model.training  # nothing is done before a piece is asked for
    next(pieces, None)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    pieces.close()
    assert model.training


def test_writing_ends_with_the_positions_of_the_model(saved):
    model, _, _ = saved
    most = model.config.max_position_embeddings
    prompts = [tokens(1, S, 599)[0].tolist() for S in (most - 3, most, 5)]
    together = generate_ids(model, prompts, 10**6, ends=frozenset())
    assert [len(row) for row in together] == [4, 1, most - 4]
    for prompt, written in zip(prompts, together, strict=True):
        assert_same_greedy(model, prompt, written, *generate_ids(model, [prompt], 10**6))


def test_rows_with_adapters_of_their_own(saved):
    model, _, tokenizer = saved
    lowrank.quantize(model, "nf4")
    for name, r in (("a", 4), ("b", 8)):
        config = lowrank.LoRAConfig(r=r, init_lora_weights=False, target_modules="all-linear")
        lowrank.inject(model, config, adapter=name)
        lowrank.scale_adapter(model, name, 8.0)
    prompts = ["def f(x)", "x", "a b c d e", "def"]
    names = ["b", None, "a", "b"]
    with lowrank.adapter_rows(model, names):
        together = lowrank.generate(model, tokenizer, prompts, max_new_tokens=20)
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        lowrank.set_adapter(model, [name] if name else [])
        alone.append(lowrank.generate(model, tokenizer, prompt, max_new_tokens=20))
    assert together == alone
    ids = [tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    with lowrank.adapter_rows(model, names):
        whole = generate_ids(model, ids, 20)
        ends = {whole[1][4], whole[3][9], whole[0][14]}  # rows end, and leave, one after another
        written = [generate_ids(model, ids, 20, ends=ends) for _ in range(2)]
    cut = [row[: next((i for i, t in enumerate(row) if t in ends), None)] for row in whole]
    assert written == [cut, cut] and len({*map(len, cut)}) > 1
    with lowrank.adapter_copies(model, ["b", "a"]):
        expected = [generate_ids(model, [p, p], 20)[i] for i in (0, 1) for p in (ids[0], ids[3])]
        ends = {expected[0][3], expected[2][9]}
        found = generate_ids(model, [ids[0], ids[3]] * 2, 20, ends=ends)
    cut = [row[: next((i for i, t in enumerate(row) if t in ends), None)] for row in expected]
    assert found == cut
    lowrank.set_adapter(model, ["a"])
    assert lowrank.generate(model, tokenizer, prompts[0], max_new_tokens=20) != together[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks
def test_a_quantized_model_with_its_adapter_writes_what_peft_writes(directory, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle; pip install peft")
    folder, oracle = directory
    model = lowrank.load_model(folder, quantizer="nf4")
    config = lowrank.LoRAConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    lowrank.inject(model, config)
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.save_model(lowrank.unload(copy.deepcopy(model)), tmp_path / "dense")
    dense = type(oracle).from_pretrained(tmp_path / "dense")
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    for S in (1, 12):
        prompt = tokens(1, S, 599)
        expected = theirs.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=25,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        (written,) = generate_ids(model, prompt.tolist(), 25)
        assert_same_greedy(theirs, prompt[0].tolist(), written, expected[0, S:].tolist())


def test_messages_without_a_chat_template(saved):
    model, _, tokenizer = saved
    messages = [{"role": "user", "content": "def?"}]
    tokenizer.chat_template = None  # the vocabulary has ChatML's tokens
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ends = {*model.config.eos_token_ids, tokenizer.backend.token_to_id("<|im_end|>")}
    (ids,) = generate_ids(model, [tokenizer.encode(text)], 12, ends=ends)
    answer = lowrank.generate(model, tokenizer, messages, max_new_tokens=12)
    assert answer == tokenizer.decode(ids)
    two = lowrank.generate(model, tokenizer, [messages, messages[:1]], max_new_tokens=12)
    assert two == [answer, answer]
    import tokenizers

    plain = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    for call in (lowrank.generate, lowrank.stream):
        with pytest.raises(DataError, match="prompt: expected a chat model.*no chat template"):
            call(model, plain, messages)


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
        sampling = Sampling(temperature, **options)
        written = generate_ids(model, [prompt] * draws, 1, sampling=sampling)
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
        ("x", {"temperature": float("inf")}, ConfigError, "temperature: expected .* finite; got"),
        ("x", {"temperature": float("nan")}, ConfigError, "temperature: expected at least 0"),
        ("x", {"repetition_penalty": 0.0}, ConfigError, "repetition_penalty: expected above 0"),
        ("x", {"stop": ["a", ""]}, ConfigError, "stop: expected strings of at least one char"),
        ("x", {"stop": [3]}, ConfigError, r"stop: expected strings .*; got \[3\]"),
        (["x", ""], {}, DataError, "prompt 1: expected at least one token; got none"),
        (
            "a\ud800",
            {},
            DataError,
            r"text: expected no lone surrogate, .*; got 'a.ud800'",
        ),
        ([], {}, DataError, "prompt: expected text, messages, or a list of either; got none"),
        ([1, 2], {}, DataError, "prompt: expected text, messages, or a list of either; got int"),
        ([["x"]], {}, DataError, "prompt: expected text, messages, or a list .*; got list"),
        (5, {}, DataError, "prompt: expected text, messages, or a list of either; got int"),
    ],
)
def test_bad_arguments_are_named(saved, prompt, options, error, says):
    model, _, tokenizer = saved
    with pytest.raises(error, match=says):
        lowrank.generate(model, tokenizer, prompt, **options)
    if not isinstance(prompt, list):
        with pytest.raises(error, match=says):  # at once, not with the first piece
            lowrank.stream(model.train(), tokenizer, prompt, **options)
        assert model.training


def test_several_prompts_are_not_streamed(saved):
    model, _, tokenizer = saved
    with pytest.raises(DataError, match="prompt: expected one text, or messages, .*; got 2; gener"):
        lowrank.stream(model, tokenizer, ["a", "b"])


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-40, 1e-30, 1e-6])
def test_a_low_temperature_is_greedy(saved, temperature):
    model, _, tokenizer = saved
    prompt = tokenizer.encode("def", add_special_tokens=True)
    (greedy,) = generate_ids(model, [prompt], 20)
    (drawn,) = generate_ids(model, [prompt], 20, sampling=Sampling(temperature))
    assert_same_greedy(model, prompt, greedy, drawn)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_no_numbers_writes_nothing(saved, temperature, value):
    model, _, tokenizer = saved
    with torch.no_grad():
        model.body.norm.weight[3] = value
    for call in (lowrank.generate, lowrank.stream):
        with pytest.raises(WeightError, match="prompt 0: expected finite logits; got (nan|inf): "):
            list(call(model, tokenizer, "def", temperature=temperature))
    free = tokens(2, 5, 599).tolist()
    with pytest.raises(WeightError, match="prompt 0: "):
        generate_ids(model, free, 3, sampling=Sampling(temperature))


def test_ids_of_another_models_tokenizer_are_refused(saved, monkeypatch):
    model, _, tokenizer = saved
    with pytest.raises(DataError, match="prompt 1: .*vocab_size=600; got 3 to 600: use the model"):
        generate_ids(model, [[1, 599], [3, 600]], 4)
    for end in (600, -1):
        with pytest.raises(ConfigError, match=f"^ends: .*vocab_size=600; got {end}, which no text"):
            generate_ids(model, [[5]], 4, ends={2, end})
        monkeypatch.setattr(Tokenizer, "eos_token_id", end)
        with pytest.raises(ConfigError, match=f"^eos_token_id: expected .* got {end}, "):
            lowrank.generate(model, tokenizer, "def")


def test_a_prompt_beyond_the_models_positions_is_refused(saved):
    model, _, _ = saved
    most = model.config.max_position_embeddings
    assert len(generate_ids(model, [[5] * most], 1)) == 1
    says = rf"prompt 1: expected at most max_position_embeddings={most} tokens.*got {most + 1};"
    with pytest.raises(DataError, match=says):
        generate_ids(model, [[5], [5] * (most + 1)], 1)
