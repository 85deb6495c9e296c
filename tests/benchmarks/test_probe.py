"""Known rows among many: a wrong one is found, and any element that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.harness import relative_error
from benchmarks.linear_cross_entropy import InChunks, all_logits, exact_loss, loss_and_gradient
from benchmarks.probe import CHECKED_ROWS, Probe, places


@pytest.mark.parametrize("M", [1, 2, 63, 64, 65, 200, 8192])
def test_places_are_apart_and_reach_from_the_first_row_to_the_last(M):
    where = places(M).tolist()
    assert len(set(where)) == len(where) == min(M, CHECKED_ROWS)
    assert where[0] == 0 and where[-1] == (M - 1 if M > 1 else 0)


@pytest.mark.parametrize("M", [1, 5, 64, 300])
def test_products_of_the_known_rows(M):
    weight = torch.randn(24, 40, dtype=torch.float64)
    probe = Probe.of(weight, torch.float64)
    x, dy = probe.inputs(M)
    y, dx = x @ weight.T, dy @ weight
    assert x.shape == (M, 40) and dy.shape == (M, 24)
    assert probe.error(y, dx) < 1e-14
    row = int(places(M)[-1])
    wrong = dx.clone()
    wrong[row] *= 1.5
    assert probe.error(y, wrong) == pytest.approx(
        float(0.5 * dx[row].norm() / dx[places(M)].norm()), rel=1e-6
    )
    y[M // 2, 3] = math.inf  # wherever it is
    assert math.isnan(probe.error(y)) and math.isnan(probe.error(y, dx))


def test_every_side_is_asked_the_same():
    weight = torch.randn(24, 40, dtype=torch.float64)
    one, other = (Probe.of(weight * scale, torch.float32) for scale in (1.0, 2.0))
    assert torch.equal(one.x, other.x) and torch.equal(one.dy, other.dy)


@pytest.mark.parametrize("loss", [all_logits, InChunks.apply])
def test_losses_and_gradients_of_a_head(loss):
    x, head = torch.randn(120, 16), torch.randn(90_000, 16)  # 93 rows of it are a chunk
    labels = torch.randint(90_000, (120,))
    labels[::3] = -100
    exact, exact_dx = exact_loss(x, head, labels)
    direct = torch.nn.functional.cross_entropy(
        x.double() @ head.double().T, labels, reduction="sum"
    )
    assert float(exact) == pytest.approx(float(direct), rel=1e-12)
    value, dx = loss_and_gradient(loss, x, head, labels)
    assert float(value) == pytest.approx(float(exact), rel=1e-6)
    assert relative_error(dx, exact_dx) < 1e-5  # float32: exp of a logsumexp near 20
    assert (dx[::3] == 0).all()
