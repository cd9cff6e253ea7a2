"""Cascades for a budget: what they cost, and that a larger one costs too much."""

import numpy as np
import pytest

from vit import budget, cost, schedules
from vit import model as models
from vit.budget import for_budget

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
        (0.1, {"mode": "masked"}, "cp_vit needs at least 1.000 of the multiply-adds"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(share, options, message):
    with pytest.raises(ValueError, match=message):
        for_budget(SMALL, 224, share, **options)
