"""Paged optimizers are their resident twins to the bit, whatever their budgets, on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.optim import (
    AdamW,
    AdamW8bit,
    Budget,
    Lion,
    Lion8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
)

from .support import assert_same, assert_same_state, give_gradients, parameters, twins

PAIRS = [(PagedAdamW8bit, AdamW8bit), (PagedAdamW, AdamW)]
PAIRS += [(PagedLion8bit, Lion8bit), (PagedLion, Lion)]
LEAST = 2 * 64 * 1024  # bytes: two chunks
BUDGETS = {
    "none": {},
    "least": {"host_budget": LEAST},
    "a part": {"device_budget": 1_000_000},
    "ample": {"device_budget": 1 << 30, "host_budget": 1 << 30},
}
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}


@pytest.fixture(params=PAIRS, ids=lambda pair: pair[0].__name__)
def pair(request):
    return request.param


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_steps_and_states_are_those_of_the_resident_twin(pair, budget, tmp_path):
    paged, resident = pair
    ours = parameters()
    theirs = twins(ours)
    a, b = paged(ours, page_dir=tmp_path, **budget, **OPTIONS), resident(theirs, **OPTIONS)
    for step in range(4):
        give_gradients(ours, theirs, none=(2, 4) if step in (0, 2) else ())
        a.step()
        b.step()
        assert_same(ours, theirs)
        if step == 1:
            a.evict()
    assert_same_state(a.state_dict(), b.state_dict())
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_sixteen_bits(pair, dtype, tmp_path):
    paged, resident = pair
    ours = parameters([(900, 256), (130_000,)], dtype)
    theirs = twins(ours)
    a = paged(ours, host_budget=LEAST, page_dir=tmp_path, **OPTIONS)
    b = resident(theirs, **OPTIONS)
    for _ in range(3):
        give_gradients(ours, theirs)
        a.step()
        b.step()
    assert_same(ours, theirs)
    assert_same_state(a.state_dict(), b.state_dict())


def test_groups_closures_and_later_groups(pair, tmp_path):
    paged, resident = pair
    ours = parameters()
    theirs = twins(ours)
    a, b = (
        made(
            [{"params": params[:3], "lr": 3e-2}, {"params": params[3:6], "weight_decay": 0.0}],
            **OPTIONS,
            **budget,
        )
        for made, params, budget in (
            (paged, ours, {"host_budget": LEAST, "page_dir": tmp_path}),
            (resident, theirs, {}),
        )
    )
    give_gradients(ours, theirs)
    for optimizer, params in ((a, ours), (b, theirs)):
        optimizer.step()
        optimizer.add_param_group({"params": params[6:], "lr": 1e-3})
    give_gradients(ours, theirs)
    assert a.step(lambda: 3.5) == b.step(lambda: 3.5) == 3.5
    assert_same(ours, theirs)
    assert_same_state(a.state_dict(), b.state_dict())


def test_parameters_and_gradients_that_are_not_contiguous(tmp_path):
    ours = [nn.Parameter(torch.randn(600, 500).t()), nn.Parameter(torch.randn(40, 50).t())]
    theirs = [nn.Parameter(p.detach().contiguous()) for p in ours]
    a = PagedAdamW8bit(ours, host_budget=LEAST, page_dir=tmp_path, **OPTIONS)
    b = AdamW8bit(theirs, **OPTIONS)
    for _ in range(2):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape[1], p.shape[0])
            p.grad, q.grad = g.t(), g.t().contiguous()
        a.step()
        b.step()
    assert_same(ours, theirs)
    assert not ours[0].is_contiguous()


def test_state_dicts_load_across_budgets_and_from_the_resident_twin(pair, tmp_path):
    paged, resident = pair
    ours = parameters()
    theirs = twins(ours)
    b = resident(theirs, **OPTIONS)
    for _ in range(2):
        give_gradients(ours, theirs)
        b.step()
    saved = copy.deepcopy(b.state_dict())
    for budget in BUDGETS.values():
        fresh = twins(theirs)
        a = paged(fresh, page_dir=tmp_path, **budget)
        give_gradients(fresh)
        a.step()  # what it had is forgotten
        with torch.no_grad():
            for p, q in zip(fresh, theirs, strict=True):
                p.copy_(q)
        a.load_state_dict(saved)
        assert_same_state(a.state_dict(), saved)
        back = twins(theirs)
        c = resident(back)
        c.load_state_dict(a.state_dict())
        give_gradients(fresh, back)
        a.step()
        c.step()
        assert_same(fresh, back)
        assert_same_state(a.state_dict(), c.state_dict())


def test_a_saved_state_is_no_view_of_the_pages(tmp_path):
    ours = parameters([(900, 256)])
    a = PagedAdamW8bit(ours, host_budget=LEAST, page_dir=tmp_path)
    give_gradients(ours)
    a.step()
    saved = a.state_dict()
    before = copy.deepcopy(saved)
    give_gradients(ours)
    a.step()
    assert_same_state(saved, before)


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    ours = parameters([(900, 256), (40, 50)])
    a = PagedAdamW(ours, host_budget=LEAST, page_dir=tmp_path)
    give_gradients(ours)
    a.step()
    before = a.state_dict()
    wrong = copy.deepcopy(before)
    wrong["state"][1]["v"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected \[40, 50\]"):
        a.load_state_dict(wrong)
    assert_same_state(a.state_dict(), before)


def test_zero_gradients_move_nothing_and_nan_shows(tmp_path):
    ours = parameters([(900, 256)])
    before = twins(ours)
    a = PagedAdamW8bit(ours, host_budget=LEAST, page_dir=tmp_path, weight_decay=0.0)
    ours[0].grad = torch.zeros_like(ours[0])
    for _ in range(3):
        a.step()
    assert_same(ours, before)
    ours[0].grad[899, 255] = torch.nan
    a.step()
    assert ours[0][899, 255].isnan() and ours[0].isnan().sum() == 1


@pytest.mark.parametrize("name", ["device_budget", "host_budget"])
@pytest.mark.parametrize("given", [LEAST - 1, 0, -1, 1.5, True, "1GB"])
def test_budgets_that_cannot_be_are_refused(name, given):
    with pytest.raises(ConfigError, match=r"budget: expected .*; got "):
        PagedAdamW8bit(parameters([(4, 4)]), **{name: given})


def test_it_is_not_copied(tmp_path):
    a = PagedAdamW8bit(parameters([(4, 4)]))
    with pytest.raises(ConfigError, match="state_dict"):
        copy.deepcopy(a)


def test_two_share_one_budget(tmp_path):
    limit = 12 * 64 * 1024
    budget = Budget(limit)
    lists = [parameters([(400, 512)]) for _ in range(2)]
    resident = [twins(params) for params in lists]
    pagers = [PagedAdamW8bit(p, host_budget=budget, page_dir=tmp_path) for p in lists]
    twin_pagers = [AdamW8bit(p) for p in resident]
    for _ in range(3):
        for a, b, ours, theirs in zip(pagers, twin_pagers, lists, resident, strict=True):
            give_gradients(ours, theirs)
            a.step()
            b.step()
            assert_same(ours, theirs)
            assert 0 < budget.taken <= limit
    held = budget.taken
    del a, pagers[1]
    assert budget.taken < held  # what is no more holds nothing


def test_a_budget_with_no_room_left_is_refused_before_anything_moves(tmp_path):
    budget = Budget(LEAST)
    first, second = parameters([(900, 256)]), parameters([(900, 256)])
    a = PagedAdamW8bit(first, host_budget=budget, page_dir=tmp_path)
    b = PagedAdamW8bit(second, host_budget=budget, page_dir=tmp_path)
    give_gradients(first, second)
    a.step()
    before = twins(second)
    with pytest.raises(ConfigError, match="host_budget: expected room for two chunks"):
        b.step()
    assert_same(second, before)
    give_gradients(first)
    a.step()
