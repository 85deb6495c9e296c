"""What each side of the decoding benchmark writes, on a tiny model, and what its rows say."""

from __future__ import annotations

import json

import pytest

from benchmarks import decoding, decoding_worker, table
from benchmarks.training_data import IGNORED
from tests.models.helpers import llama

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is compared with")
pytest.importorskip("peft", reason="needs peft, which is compared with")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks
def test_all_sides_write_as_many_tokens_and_dense_ones_the_same(tmp_path):
    llama(
        hidden_size=128, intermediate_size=256, vocab_size=200, tie_word_embeddings=True
    ).save_pretrained(tmp_path)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED] * n + [8] * (5 - n)} for n in (4, 2)]
    (tmp_path / "batches.json").write_text(json.dumps([rows]))
    prompts = decoding_worker.prompts_of(tmp_path)
    assert prompts == [[5, 6, 7, 8], [5, 6]]
    written = {side: make(tmp_path)(prompts, 7) for side, make in decoding_worker.SIDES.items()}
    assert all([len(ids) for ids in found] == [7, 7] for found in written.values())
    assert written["lowrank, dense fp32"] == written[decoding.DENSE]
    assert set(decoding.OURS) | {decoding.DENSE, decoding.NF4, decoding.NF4_ADAPTER} == set(written)


class Loaded:
    loaded = {"load_peak_bytes": 10**7}


def test_rows():
    def answers(seconds, ids):
        return [{"seconds": s, "ids": ids, "peak_bytes": 10**6} for s in (9.0, seconds, seconds)]

    count = decoding.NEW_TOKENS
    done = {
        "lowrank": answers(count * 0.01, [[1]]),
        "lowrank, dense fp32": answers(count * 0.02, [[1]]),
        decoding.DENSE: answers(count * 0.05, [[2]]),
        decoding.NF4: answers(count * 0.1, [[3]]),
    }
    rows = decoding.rows_of(4, done, [Loaded()] * 4)
    assert [row["written_per_second"] for row in rows] == pytest.approx([400, 200, 80, 40])
    assert [row["speed"] for row in rows] == pytest.approx([10, 5, 2, 1])
    assert [row["over_dense"] for row in rows] == pytest.approx([5, 2.5, 1, 0.5])
    assert ["wrong" in row for row in rows] == [False, True, False, False]
    shown = table.titled(rows)
    assert "after 4 prompts" in shown and "| 400.0 " in shown and "WRONG: lowrank, dense" in shown
