"""Modules that train whole and token rows, against PEFT: logits, gradients, files, merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError, LowrankError, TargetError
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, transformers, words
from tests.io.adapters import adapted, shake
from tests.surgery.models import assert_unchanged, refused, state

FILE = "adapter_model.safetensors"


def tied_llama() -> nn.Module:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.eval()


CASES = {
    "a head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "a head that was tied": (tied_llama, {"modules_to_save": ["lm_head"]}),
    "both ends": (tied_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a norm and a whole block": (tiny_llama, {"modules_to_save": ["model.norm", "layers.1.mlp"]}),
    "both ends as one": (
        tied_llama,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "token rows": (tiny_llama, {"trainable_token_indices": [7, 3, 40]}),
    "rows by name": (tiny_llama, {"trainable_token_indices": {"embed_tokens": [0, 47]}}),
    "rows of both ends": (tied_llama, {"trainable_token_indices": [7, 3, 40]}),
}
each_case = pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)


def theirs_of(base: nn.Module, **options) -> nn.Module:
    # PEFT appends to the lists it is given
    return peft_model(base, target_modules=["q_proj"], r=4, **copy.deepcopy(options))


@each_case
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_logits_gradients_and_the_line_are_pefts(make, options, tmp_path, generator, capsys):
    base, ids = make(), words(generator)
    theirs = theirs_of(base, **options)
    theirs.print_trainable_parameters()
    line = capsys.readouterr().out
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = lowrank.inject(
        copy.deepcopy(base), LoRAConfig(r=4, target_modules=["q_proj"], **options)
    )
    torch.testing.assert_close(fresh(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    lowrank.print_trainable_parameters(fresh)
    assert capsys.readouterr().out == line

    ours = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    grads = []
    for model in (ours, theirs):
        out = model(ids, labels=ids)
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert (ours(ids).logits - base(ids).logits).abs().max() > 1e-2
    assert len(grads[0]) == len(grads[1])

    def norms(of: dict) -> list:
        return sorted((tuple(g.shape), g.norm().item()) for g in of.values())

    for (shape, norm), (shape_of_theirs, their_norm) in zip(*map(norms, grads), strict=True):
        assert shape == shape_of_theirs and norm == pytest.approx(their_norm, rel=1e-4, abs=1e-6)

    lowrank.save_adapter(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / FILE).read_bytes() == (tmp_path / "theirs" / FILE).read_bytes()


@each_case
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@torch.no_grad()
def test_files_go_both_ways(make, options, tmp_path, generator):
    base, ids = make(), words(generator)
    model = adapted(base, target_modules=["q_proj"], **options)
    lowrank.save_adapter(model, tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not any(p.requires_grad for p in again.parameters())
    lowrank.load_adapter(again, tmp_path)  # into the adapter that is there
    assert torch.equal(again(ids).logits, model(ids).logits)


@each_case
@torch.no_grad()
def test_switching_disabling_and_merging(make, options, generator):
    base, ids = make(), words(generator)
    plain = base(ids).logits
    model = adapted(base, adapter="a", target_modules=["q_proj"], **options)
    lowrank.inject(model, LoRAConfig(target_modules=["v_proj"], **options), adapter="b")
    first = model(ids).logits
    lowrank.set_adapter(model, "b")
    assert all(".b." in n for n, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(model(ids).logits, plain)
    shake(model)
    second = model(ids).logits
    assert (second - plain).abs().max() > 1e-2
    before = state(model)
    with pytest.raises(ConfigError, match="one at most"):
        lowrank.set_adapter(model, ["a", "b"])
    assert_unchanged(model, before)
    lowrank.set_adapter(model, "a")
    assert torch.equal(model(ids).logits, first)
    with lowrank.disable_adapters(model):
        assert torch.equal(model(ids).logits, plain)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    for adapter, wanted in (("a", first), ("b", second)):
        lowrank.merge(model, [adapter])
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        with lowrank.disable_adapters(model):
            assert torch.equal(model(ids).logits, plain)
        lowrank.unmerge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)

    lowrank.delete_adapter(model, "b")
    assert not any(".b." in name or "_b" in name for name in model.state_dict())
    merged = lowrank.merge_and_unload(model)
    torch.testing.assert_close(merged(ids).logits, first, rtol=1e-4, atol=1e-5)
    assert type(merged.lm_head) is nn.Linear
    assert type(merged.model.embed_tokens) is nn.Embedding
    assert {n for n, _ in merged.named_modules()} == {n for n, _ in base.named_modules()}
    one = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert one == merged.config.tie_word_embeddings
    kept = "modules_to_save" not in options or options.get("ensure_weight_tying")
    assert one == bool(make is tied_llama and kept)


@torch.no_grad()
def test_over_a_quantized_model(generator, tmp_path):
    base, ids = lowrank.quantize(tiny_llama(), "nf4", skip=[], embeddings=True), words(generator)
    model = adapted(base, target_modules=["q_proj"], modules_to_save=["lm_head", "layers.0.mlp"])
    assert type(model.lm_head.modules_to_save["default"]) is nn.Linear
    lowrank.save_adapter(model, tmp_path / "saved")
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    rows = adapted(base, target_modules=["q_proj"], trainable_token_indices=[5, 2])
    said = rows(ids).logits
    lowrank.save_adapter(rows, tmp_path / "rows")
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "rows")
    assert torch.equal(again(ids).logits, said)
    merged = lowrank.merge_and_unload(rows)
    torch.testing.assert_close(merged(ids).logits, said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_rows_of_our_decoder(tied, generator, tmp_path):
    from lowrank.models.config import DecoderConfig
    from lowrank.models.decoder import Decoder

    config = DecoderConfig.from_hf({**tiny_llama().config.to_dict(), "tie_word_embeddings": tied})
    base, ids = Decoder(config).eval(), words(generator)
    model = adapted(base, target_modules=["q_proj"], trainable_token_indices=[int(ids[0, 0]), 5])
    changed = (model(ids) != base(ids)).any(0).any(0)
    assert changed.all()
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(ids), model(ids))
    with torch.enable_grad():
        model.loss(ids, ids).backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert "model.embed_tokens.trainable_tokens_delta.default.weight" in trained


@pytest.mark.filterwarnings("ignore:.*T5")
def test_t5_whose_embeddings_are_three(generator):
    config = transformers.T5Config(
        vocab_size=48, d_model=24, d_kv=12, d_ff=40, num_layers=1, num_heads=2,
        tie_word_embeddings=True, decoder_start_token_id=0,
    )  # fmt: skip
    base, ids = transformers.T5ForConditionalGeneration(config).eval(), words(generator)
    options = {"target_modules": ["q"], "trainable_token_indices": {"shared": [4, 9]}}
    model = adapted(base, **options)
    merged = lowrank.merge_and_unload(copy.deepcopy(model))
    with torch.no_grad():
        here, there = (m(input_ids=ids, labels=ids).logits for m in (model, merged))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert merged.shared.weight is merged.lm_head.weight
    assert merged.encoder.embed_tokens.weight is merged.shared.weight
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
        ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ("LlamaForSequenceClassification", "SEQ_CLS", "score"),
    ],
)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_heads_of_tasks_train_whole(kind, task, head, targets, generator, tmp_path, capsys):
    sizes = {
        "vocab_size": 48, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 40, "num_key_value_heads": 1, "pad_token_id": 0,
    }  # fmt: skip
    name = "BertConfig" if "Bert" in kind else "LlamaConfig"
    base = getattr(transformers, kind)(getattr(transformers, name)(**sizes)).eval()
    options = {"target_modules": targets, "task_type": task, "r": 4}
    model = lowrank.inject(copy.deepcopy(base), LoRAConfig(**options))
    if task == "SEQ_CLS" or targets is None:  # of other heads, theirs takes them as linears first
        peft_model(base, **options).print_trainable_parameters()
        line = capsys.readouterr().out
        lowrank.print_trainable_parameters(model)
        assert capsys.readouterr().out == line
    shake(model)
    lowrank.save_adapter(model, tmp_path)
    with quiet():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    ids = words(generator)
    with torch.no_grad():
        for ours, other in zip(model(ids).values(), again(ids).values(), strict=False):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    assert any(n.startswith(f"{head}.modules_to_save") for n, _ in model.named_modules())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"modules_to_save": ["lm_heda"]}, TargetError, "'lm_heda' matches nothing.*lm_head"),
        ({"modules_to_save": ["zzz"]}, TargetError, "'zzz' matches nothing.*its modules are"),
        ({"modules_to_save": ["self_attn"]}, TargetError, "has all of what target_modules"),
        ({"modules_to_save": ["q_proj"]}, ConfigError, "expected none of target_modules"),
        ({"trainable_token_indices": [48]}, ConfigError, "below 48.*got 48"),
        ({"trainable_token_indices": [-1]}, ConfigError, "at least 0"),
        ({"trainable_token_indices": [1, 1]}, ConfigError, "none of them twice"),
        ({"trainable_token_indices": []}, ConfigError, "expected token ids"),
        ({"trainable_token_indices": {"wte": [1]}}, TargetError, "'wte' matches nothing"),
        ({"trainable_token_indices": {"up_proj": [1]}}, TargetError, "to be an embedding"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            ConfigError,
            "got in both",
        ),
    ],
)
def test_wrong_requests_change_nothing(options, error, says):
    model = tiny_llama()
    with refused(model, error, says):
        lowrank.inject(model, LoRAConfig(target_modules=["q_proj"], **options))


def test_what_has_adapters_of_another_kind_is_left_alone():
    model = tied_llama()
    lowrank.inject(model, LoRAConfig(target_modules=["lm_head"]), adapter="a")
    before = state(model)
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}):
        with pytest.raises(ConfigError, match="adapters of another kind"):
            lowrank.inject(model, LoRAConfig(target_modules=["q_proj"], **options), adapter="b")
        assert_unchanged(model, before)
    with pytest.raises(LowrankError, match="also|a target"):
        lowrank.inject(
            model, LoRAConfig(target_modules=["lm_head"], trainable_token_indices=[1]), adapter="b"
        )
    assert_unchanged(model, before)


def test_a_plain_state_dict_loads_beneath(generator):
    base, ids = tiny_llama(), words(generator)
    model = adapted(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    copies = model.lm_head.modules_to_save["default"].weight.clone()
    model.load_state_dict(base.state_dict())
    with torch.no_grad(), lowrank.disable_adapters(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(model.lm_head.modules_to_save["default"].weight, copies)


def test_names_end_at_a_dot():
    model = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q_proj", "score", "my_score")})
    lowrank.inject(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"]))
    assert type(model["my_score"]) is nn.Linear and type(model["score"]) is not nn.Linear


def test_the_config_that_is_passed_stays_as_it_was():
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    config = LoRAConfig(target_modules=["q_proj"], task_type="SEQ_CLS", **copy.deepcopy(options))
    before = copy.deepcopy(config)
    lowrank.inject(tied_llama(), config)
    assert config == before
