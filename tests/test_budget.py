"""Cascades for a budget: what they cost, and that a larger one costs too much."""

import dataclasses
import json
import math

import numpy as np
import pytest

from vit import budget, cost, schedules
from vit import model as models
from vit.budget import for_budget, for_latency, predict_latency
from vit.cascade import Cascade

SMALL = models.make("S", 10, 16)


RANGES = {"ranges": tuple(np.linspace(0.1, 0.6, 12))}
# Methods with their options; the coarsest step of a method as a share of the cost.
# One merged token more in each of 12 layers is 3 %, one head less in each is 4 %.
METHODS = [
    ("cp_vit", {}, 0.01),
    ("cp_vit", {"first_layer": 1, "length": 2, "score": "random"}, 0.01),
    ("cp_vit", {"semantics": "zero", "score": "norm", "cumulative": False}, 0.01),
    ("constant", {"first_layer": 2}, 0.01),
    ("range", RANGES, 0.01),
    ("released_code", {}, 0.01),
    ("evit", {"fuse": "mean"}, 0.01),
    ("token_merging", {}, 0.04),
    ("token_merging", {"schedule": "decreasing"}, 0.04),
    ("heads", {"head_score": "confidence"}, 0.04),
]


def test_every_method_is_tested():
    assert {method for method, *_ in METHODS} == set(budget.METHODS)


@pytest.mark.parametrize(("method", "options", "step"), METHODS)
def test_the_budget_is_used_and_not_exceeded(method, options, step):
    whole = cost.count(SMALL, 224).total
    for share in (0.9, 0.7, 0.5):
        if share < {"heads": 0.841, "released_code": 0.59}.get(method, 0.5):
            message = f"{method} needs at least 0.*got a budget of {share}"
            with pytest.raises(ValueError, match=message):
                for_budget(SMALL, 224, share, method=method, **options)
            continue
        cascade = for_budget(SMALL, 224, share, method=method, **options)
        used = cost.count(SMALL.clone(cascade=cascade), 224).total / whole
        assert share - step < used <= share


def test_the_whole_budget_merges_nothing():
    # One merged token in each layer costs more than none: its similarities do.
    model = models.ViT(10, 4, 32, num_layers=3, num_heads=2, mlp_dim=64)
    whole = cost.count(model, 128).total
    one = schedules.token_merging(1, num_layers=3, num_patches=1024)
    assert cost.count(model.clone(cascade=one), 128).total > whole
    cascade = for_budget(model, 128, 1.0, method="token_merging")
    assert cascade == schedules.token_merging(0, num_layers=3, num_patches=1024)


@pytest.mark.parametrize("num_heads", [6, (6, 3, 2)])
@pytest.mark.parametrize("units", ["heads", "neurons"])
def test_units_are_the_most_that_fit(units, num_heads):
    model = models.make("S", 10, 16, num_layers=3, num_heads=num_heads, head_dim=64)
    field = {"heads": "num_heads", "neurons": "mlp_dim"}[units]
    totals = np.array([models.per_layer(getattr(model, field), i) for i in range(3)])
    counts = budget.units_for_budget(model, (160, 224), 0.85, units=units)

    def share(counts):
        smaller = model.clone(**{field: counts})
        return (
            cost.count(smaller, (160, 224)).total / cost.count(model, (160, 224)).total
        )

    assert share(counts) <= 0.85
    # All layers lose one share: that of one unit less in the widest layer is too small.
    removed = totals.max() - max(counts)
    share_left = 1 - (removed - 1) / totals.max()
    more = tuple(int(count) for count in np.ceil(totals * share_left - 1e-9))
    assert share(more) > 0.85
    assert counts == tuple(
        int(count) for count in np.ceil(totals * (1 - removed / totals.max()) - 1e-9)
    )


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
        (0.7, {"method": "max"}, "one of cp_vit, constant, range, .*; got 'max'"),
        (0.45, {}, "cp_vit needs at least 0.46.* got a budget of 0.45"),
        (0.1, {"mode": "masked"}, "cp_vit needs at least 1.000 of the cost"),
        (
            0.9,
            {"method": "released_code", "mode": "masked"},
            "released_code needs at least 1.000 of the cost",
        ),
        (0.7, {"method": "range"}, "needs `ranges`, .* of the 12 layers .* got 0"),
        (0.7, {"method": "neurons"}, "a cascade cannot leave out neurons"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(share, options, message):
    with pytest.raises(ValueError, match=message):
        for_budget(SMALL, 224, share, **options)


def test_layers_with_fewer_heads_keep_them():
    model = SMALL.clone(num_layers=3, num_heads=(6, 2, 3), head_dim=64)
    cascade = for_budget(model, np.int64(224), 1.0, method="heads")
    assert cascade.keep_heads == (6, 2, 3)
    shares = {}
    for keep in (4, 3):
        one = Cascade(keep=(196,) * 3, keep_heads=(keep, 2, 3))
        shares[keep] = cost.count(model.clone(cascade=one), 224).total
        shares[keep] /= cost.count(model, 224).total
    cascade = for_budget(model, 224, np.mean(list(shares.values())), method="heads")
    assert cascade.keep_heads == (3, 2, 3)


TABLE = {50: 6.0, 100: 10.0, 150: 15.0, 197: 21.0}


def test_predicted_time_is_the_mean_over_the_layers():
    model = models.make("S", 10, 16, num_layers=2)
    assert predict_latency(model, 224, TABLE) == 21.0
    # 196 and 99 patches in the attention, 149 and 49 in the MLP, and CLS.
    cascade = schedules.from_ratios([0.0, 0.5], 196)
    cascade = dataclasses.replace(cascade, keep=(196, 99), keep_mlp=(149, 49))
    pruned = model.clone(cascade=cascade)
    assert predict_latency(pruned, 224, TABLE) == (21 + 15 + 10 + 6) / 4
    stored = json.loads(json.dumps(TABLE))
    assert predict_latency(pruned, 224, stored) == (21 + 15 + 10 + 6) / 4
    linear = {tokens: 3.0 * tokens for tokens in (50, 197)}
    assert predict_latency(pruned, 224, linear) == 3 * (197 + 150 + 100 + 50) / 4


@pytest.mark.parametrize(("method", "options", "step"), METHODS[:-1])
def test_the_time_is_used_and_not_exceeded(method, options, step):
    cascade = for_latency(SMALL, 224, 0.75, TABLE, method=method, **options)
    share = predict_latency(SMALL.clone(cascade=cascade), 224, TABLE) / 21
    assert 0.75 - step < share <= 0.75


def test_heads_and_unknown_units_are_refused():
    with pytest.raises(ValueError, match="which the method heads does not change"):
        for_latency(SMALL, 224, 0.75, TABLE, method="heads")
    with pytest.raises(ValueError, match="one of heads, neurons; got 'patches'"):
        budget.units_for_budget(SMALL, 224, 0.7, units="patches")
    with pytest.raises(ValueError, match="heads needs at least 0.68"):
        budget.units_for_budget(SMALL, 224, 0.5, units="heads")


@pytest.mark.parametrize(
    ("share", "table", "message"),
    [
        (0.0, TABLE, r"latency must lie in \(0, 1\], got 0.0"),
        (0.7, {}, "times up to 197 tokens, got none"),
        (0.7, {50: 1.0, 100: 2.0}, "times up to 197 tokens, got 50, 100"),
        (0.7, TABLE | {100: 0.0}, "times of the table must be > 0, got .* 0.0"),
        (0.7, TABLE | {100: math.inf}, "times of the table must be > 0, got .* inf"),
        (0.2, TABLE, "cp_vit needs at least 0.5.* of the cost"),
    ],
)
def test_tables_that_do_not_fit_are_refused(share, table, message):
    with pytest.raises(ValueError, match=message):
        for_latency(SMALL, 224, share, table)


def test_noise_of_a_table_does_not_make_fewer_tokens_slower():
    # 60 tokens took longer than 100: noise.
    noisy = {50: 6.0, 60: 12.0, 100: 10.0, 197: 21.0}
    smooth = noisy | {100: 12.0}
    assert predict_latency(SMALL, 224, noisy) == 21.0
    for share in (0.65, 0.7, 0.8):
        found = for_latency(SMALL, 224, share, noisy, method="constant")
        assert found == for_latency(SMALL, 224, share, smooth, method="constant")
