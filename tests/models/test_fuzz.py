"""Whatever stands in a model's files, loading gives a model that computes, or one LowrankError.

Each soon, and without much memory: a number in a file is no reason to allocate.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from contextlib import contextmanager

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import lowrank
from lowrank.errors import LowrankError
from tests.models.gguf_models import write_gguf
from tests.models.helpers import llama, tokens
from tests.models.test_tokenizer import write_tokenizer

pytest.importorskip("transformers", reason="writes the models; pip install transformers")
pytest.importorskip("gguf", reason="writes the models; pip install gguf")

SEED = int(os.environ.get("LOWRANK_TEST_SEED", 0)) or int.from_bytes(os.urandom(4))
EXAMPLES = hypothesis.settings(
    max_examples=50,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
MOST_BYTES = 20 * 2**20  # of Python's objects; the models have 300 KB
MANY = hypothesis.settings(EXAMPLES, max_examples=100)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 1e308, 1e-320, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["llama", "linear", "yarn", "silu", "a\nb", "../x", "\ud800"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope"]) | scalars,
        **{
            name: values
            for name in (
                "factor", "low_freq_factor", "high_freq_factor", "rope_theta", "short_factor",
                "original_max_position_embeddings", "long_factor", "partial_rotary_factor",
            )
        },
    },
)  # fmt: skip
MORE = {  # beside what the file has
    "rope_scaling": values | ROPE,
    "rope_parameters": values | ROPE,
    "sliding_window": values,
    "layer_types": values,
    "use_sliding_window": values,
    "quantization_config": values
    | st.fixed_dictionaries({"quant_method": st.sampled_from(["bitsandbytes", "lowrank", "gptq"])}),
    "model_type": scalars | st.sampled_from(["mistral", "qwen2", "qwen3", "phi3", "smollm3"]),
}


@contextmanager
def small_and_refused():
    """Inside, a LowrankError of one line or none; and little memory."""
    tracemalloc.start()
    try:
        yield
    except LowrankError as error:
        assert "\n" not in str(error) and len(str(error)) < 10_000, error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with a tokenizer, in shards, and the same in one file."""
    folder = tmp_path_factory.mktemp("whole")
    model = llama(initializer_range=0.1)
    model.save_pretrained(folder / "shards", max_shard_size="50KB")
    model.save_pretrained(folder / "single")
    write_tokenizer(folder / "single")
    write_gguf(folder / "m.gguf", model, "Q8_0")
    return folder


def mutated(data: st.DataObject, value: dict, more: dict[str, st.SearchStrategy]) -> dict:
    """With one to three entries, at any depth, gone, new, or of another value."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        at = value
        while True:
            key = data.draw(st.sampled_from([*at, *more] if at is value else [*at, "new"]))
            if isinstance(at.get(key), dict) and at[key] and data.draw(st.booleans()):
                at = at[key]
                continue
            break
        if data.draw(st.integers(0, 3)) == 0:
            at.pop(key, None)
        else:
            at[key] = data.draw(more.get(key, values))
        if not value:
            break
    return value


def load(path) -> None:
    model = lowrank.load_model(path)
    with torch.no_grad():
        model(tokens(1, 5, model.config.vocab_size))


@hypothesis.seed(SEED)
@MANY
@hypothesis.given(st.data())
def test_configs(whole, data):
    name = data.draw(st.sampled_from(["config.json"] * 4 + ["generation_config.json"]))
    place = whole / "single" / name
    text = place.read_text()
    try:
        place.write_text(json.dumps(mutated(data, json.loads(text), MORE)))
        with small_and_refused():
            load(whole / "single")
    finally:
        place.write_text(text)


@hypothesis.seed(SEED)
@EXAMPLES
@hypothesis.given(st.data())
def test_indexes(whole, data):
    place = whole / "shards" / "model.safetensors.index.json"
    text = place.read_text()
    try:
        place.write_text(json.dumps(mutated(data, json.loads(text), {"weight_map": values})))
        with small_and_refused():
            load(whole / "shards")
    finally:
        place.write_text(text)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
@hypothesis.seed(SEED)
@EXAMPLES
@hypothesis.given(st.data())
def test_tokenizers(whole, name, data):
    place = whole / "single" / name
    text = place.read_text()
    try:
        place.write_text(json.dumps(mutated(data, json.loads(text), {"chat_template": values})))
        with small_and_refused():
            lowrank.load_tokenizer(whole / "single").encode("return 1")
    finally:
        place.write_text(text)


@hypothesis.seed(SEED)
@EXAMPLES
@hypothesis.given(st.data())
def test_safetensors_headers(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("st")
    shutil.copy(whole / "single" / "config.json", folder)
    raw = (whole / "single" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = mutated(data, json.loads(raw[8 : 8 + length]), {"__metadata__": values})
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + raw[8 + length :]
    )
    with small_and_refused():
        load(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["single/model.safetensors", "m.gguf"])
@hypothesis.seed(SEED)
@MANY
@hypothesis.given(st.data())
def test_bytes_of_headers(whole, tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("bytes")
    raw = bytearray((whole / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 2500))
        new = data.draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8)])
        )
        raw[at : at + len(new)] = new
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw), 2000, 100]))]
    shutil.copy(whole / "single" / "config.json", folder)
    path = folder / name.split("/")[-1]
    path.write_bytes(raw)
    with small_and_refused():
        load(path if path.suffix == ".gguf" else folder)
    shutil.rmtree(folder)


GGUF_KEYS = [
    "general.architecture",
    "llama.block_count",
    "llama.embedding_length",
    "llama.context_length",
    "llama.attention.head_count",
    "llama.rope.freq_base",
    "llama.rope.dimension_count",
    "llama.attention.layer_norm_rms_epsilon",
]
ARRAY = 9
PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@st.composite
def gguf_values(draw) -> bytes:
    """A value of metadata with its type, whole or not."""
    kind = draw(st.sampled_from([*PACKED, 8, ARRAY, 13]))
    raw = draw(st.binary(max_size=8)) if kind in (13, 7) else None
    if kind in PACKED and raw is None:
        size = struct.calcsize("<" + PACKED[kind])
        raw = draw(st.binary(min_size=size, max_size=size))
    if kind == 8:
        text = draw(st.text(max_size=12)).encode("utf-8", "surrogatepass")
        raw = struct.pack("<Q", draw(st.sampled_from([len(text), 2**62]))) + text
    if kind == ARRAY:
        count = draw(st.sampled_from([0, 1, 2, 2**40, 2**63]))
        raw = struct.pack("<IQ", draw(st.sampled_from([4, 6, 8, ARRAY])), count) + bytes(16)
    return struct.pack("<I", kind) + (raw or b"")


@hypothesis.seed(SEED)
@MANY
@hypothesis.given(st.data())
def test_gguf_metadata(whole, tmp_path_factory, data):
    """A value of another type in place of one that is there, and all behind it moved."""
    raw = (whole / "m.gguf").read_bytes()
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    key = data.draw(st.sampled_from(GGUF_KEYS)).encode()
    start = raw.index(key) + len(key)
    kind = int.from_bytes(raw[start : start + 4], "little")
    size = 4 + (8 + raw[start + 4] if kind == 8 else struct.calcsize("<" + PACKED[kind]))
    path.write_bytes(raw[:start] + data.draw(gguf_values()) + raw[start + size :])
    with small_and_refused():
        load(path)
    path.unlink()
