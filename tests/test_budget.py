"""Cascades for a budget: what they cost, and that a larger one costs too much."""

import dataclasses

import numpy as np
import pytest

from vit import budget, cost, schedules
from vit import model as models
from vit.budget import for_budget, for_latency, predict_latency

SMALL = models.make("S", 10, 16)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("method", budget.METHODS)
def test_the_budget_is_used_and_not_exceeded(method, share):
    if method == "cp_vit" and share == 0.5:
        with pytest.raises(ValueError, match="cp_vit needs at least 0.46.* got a budg"):
            for_budget(SMALL, 224, 0.45, method=method)
    cascade = for_budget(SMALL, 224, share, method=method)
    whole = cost.count(SMALL, 224).total
    used = cost.count(SMALL.clone(cascade=cascade), 224).total / whole
    # One merged token more in each of 12 layers is 3 %; the others have finer steps.
    assert share - (0.04 if method == "token_merging" else 0.01) < used <= share


def test_the_ratio_is_the_smallest_that_fits():
    cascade = for_budget(SMALL, (160, 224), 0.8, semantics="skip", score="sum")
    whole = cost.count(SMALL, (160, 224)).total
    sizes = {"num_layers": 12, "num_patches": 140, "semantics": "skip", "score": "sum"}
    costs = [
        cost.count(
            SMALL.clone(cascade=schedules.cp_vit(ratio, **sizes)), (160, 224)
        ).total
        for ratio in np.arange(1000) / 1000
    ]
    fitting = next(i for i, one in enumerate(costs) if one <= 0.8 * whole)
    assert cascade == schedules.cp_vit(fitting / 1000, **sizes)


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (0.0, {}, r"multiply_adds must lie in \(0, 1\], got 0.0"),
        (1.1, {}, r"multiply_adds must lie in \(0, 1\], got 1.1"),
        (0.7, {"method": "max"}, "one of cp_vit, constant, evit, .*; got 'max'"),
        (0.1, {"mode": "masked"}, "cp_vit needs at least 1.000 of the cost"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(share, options, message):
    with pytest.raises(ValueError, match=message):
        for_budget(SMALL, 224, share, **options)


TABLE = {50: 6.0, 100: 10.0, 150: 15.0, 197: 21.0}


def test_predicted_time_is_the_mean_over_the_layers():
    model = models.make("S", 10, 16, num_layers=2)
    assert predict_latency(model, 224, TABLE) == 21.0
    # 196 and 99 patches in the attention, 149 and 49 in the MLP, and CLS.
    cascade = schedules.from_ratios([0.0, 0.5], 196)
    cascade = dataclasses.replace(cascade, keep=(196, 99), keep_mlp=(149, 49))
    pruned = model.clone(cascade=cascade)
    assert predict_latency(pruned, 224, TABLE) == (21 + 15 + 10 + 6) / 4
    linear = {tokens: 3.0 * tokens for tokens in (50, 197)}
    assert predict_latency(pruned, 224, linear) == 3 * (197 + 150 + 100 + 50) / 4


@pytest.mark.parametrize("method", budget.METHODS)
def test_the_time_is_used_and_not_exceeded(method):
    cascade = for_latency(SMALL, 224, 0.75, TABLE, method=method)
    share = predict_latency(SMALL.clone(cascade=cascade), 224, TABLE) / 21
    assert 0.75 - (0.04 if method == "token_merging" else 0.01) < share <= 0.75


@pytest.mark.parametrize(
    ("share", "table", "message"),
    [
        (0.0, TABLE, r"latency must lie in \(0, 1\], got 0.0"),
        (0.7, {}, "times up to 197 tokens, got none"),
        (0.7, {50: 1.0, 100: 2.0}, "times up to 197 tokens, got 50, 100"),
        (0.2, TABLE, "cp_vit needs at least 0.5.* of the cost"),
    ],
)
def test_tables_that_do_not_fit_are_refused(share, table, message):
    with pytest.raises(ValueError, match=message):
        for_latency(SMALL, 224, share, table)
