"""A text in windows: each token predicted once, with all that its window has before it."""

from __future__ import annotations

import random

import pytest
import torch

from lowrank.data import windows
from lowrank.errors import ConfigError, DataError


@pytest.mark.parametrize("begin", [[], [1], [1, 2]])
@pytest.mark.parametrize("stride", [None, 1, 3, 6])
def test_every_token_is_predicted_once(begin, stride):
    ids = random.choices(range(10, 99), k=random.randint(2, 60))
    data = windows(ids, begin, max_length=6 + len(begin), stride=stride)
    step, predicted = stride or 6, []
    for i in range(len(data)):
        span, start = data.span(i), i * step
        row, labels = data.ids[span].tolist(), data.labels[span].tolist()
        assert row == [*begin, *ids[start : start + 6]]
        assert data.labelled[i] == sum(label != -100 for label in labels)
        assert labels[0] == -100
        for place, label in enumerate(labels):
            if label != -100:
                assert label == row[place]
                predicted.append(start + place - len(begin))
    # without a BOS nothing is before a window's first token, unless an earlier window has had it
    first = [] if begin else [0]
    lost = {*first, *(range(0, len(ids), 6) if stride in (None, 6) and not begin else [])}
    assert sorted(predicted) == [i for i in range(len(ids)) if i not in lost]


def test_what_cannot_be():
    ids = torch.arange(20)
    for options, message in [
        ({"max_length": 1}, "max_length: expected at least 2, for two tokens"),
        ({"begin": [1], "max_length": 2}, "max_length: expected at least 3"),
        ({"max_length": 8, "stride": 9}, "stride: expected 1 to 8"),
        ({"max_length": 8, "stride": 0}, "stride: expected 1 to 8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            windows(ids, **options)
    with pytest.raises(DataError, match="expected at least two tokens"):
        windows([5])
