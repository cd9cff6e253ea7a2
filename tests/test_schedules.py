"""Schedules against published counts and counts by hand; errors."""

import math

import numpy as np
import pytest

from vit import schedules
from vit.cascade import Cascade


def test_ratios_become_counts_by_flooring_what_is_pruned():
    # 0.29 * 100 is 28.999999999999996 and 0.57 * 100 is 56.99999999999999.
    assert schedules.keep_counts([0.29, 0.57, 0.0, 0.999], 100) == [71, 43, 100, 1]
    # 19.6, 9.9 and 130.666.. pruned of 196, 99 and 196.
    assert schedules.keep_counts([0.1], 196) == [177]
    assert schedules.keep_counts([0.1], 99) == [90]
    assert schedules.keep_counts([2 / 3], 196) == [66]
    for num_patches in (7, 64, 100, 196):
        for pruned in range(num_patches):
            kept = schedules.keep_counts([pruned / num_patches], num_patches)
            assert kept == [num_patches - pruned]


def test_dropped_counts_never_grow_and_others_do():
    ratios, mlp_ratios = [0.5, 0.1, 0.6], [0.2, 0.55, 0.0]
    cascade = schedules.from_ratios(ratios, 20, mlp_ratios)
    assert cascade.counts == ((10, 10), (10, 9), (8, 8))
    cascade = schedules.from_ratios(
        ratios, 20, mlp_ratios, semantics="skip", score="sum"
    )
    assert cascade.counts == ((10, 16), (18, 9), (8, 20))
    assert (cascade.semantics, cascade.score) == ("skip", "sum")
    assert schedules.from_ratios([0.1, 0.5], 20).counts == ((18, 18), (10, 10))


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_ramp_is_the_released_codes_for_12_layers(ratio):
    # 0 for layers 0 to 2, a sixth more each, the plateau from layer 8 on.
    sixths = [0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6]
    expected = [ratio * sixth / 6 for sixth in sixths]
    np.testing.assert_allclose(schedules.ramp_ratios(ratio, 12), expected, rtol=1e-12)
    cascade = schedules.cp_vit(ratio, num_layers=12, num_patches=196, score="sum")
    pruned = [int(ratio * sixth * 196 / 6 + 1e-9) for sixth in sixths]
    assert cascade == Cascade(
        keep=tuple(196 - p for p in pruned),
        keep_mlp=tuple(196 - p for p in pruned),
        score="sum",
    )


def test_ramp_in_proportion_and_by_hand():
    expected = [0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    np.testing.assert_allclose(schedules.ramp_ratios(0.4, 8), expected, rtol=1e-12)
    np.testing.assert_allclose(
        schedules.ramp_ratios(0.6, 4, first_layer=1, length=2),
        [0, 0.3, 0.6, 0.6],
        rtol=1e-12,
    )
    # Before the first layer there are no scores.
    for num_layers in (1, 2, 3):
        assert schedules.ramp_ratios(0.5, num_layers)[0] == 0
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        schedules.ramp_ratios(0.5, 4, length=0)
    cascade = schedules.cp_vit(
        0.5, num_layers=4, num_patches=8, first_layer=1, length=2
    )
    assert cascade.keep == (8, 6, 4, 4)


def test_constant_ratios_spare_the_first_layers():
    assert schedules.constant_ratios(0.3, 4) == [0.0, 0.3, 0.3, 0.3]
    assert schedules.constant_ratios(0.3, 3, first_layer=0) == [0.3, 0.3, 0.3]


def test_range_ratios_by_hand():
    # Deviations -.2, 0, .2 over the largest: -1, 0, 1.
    ratios = schedules.range_ratios(0.4, [0.9, 0.1, 0.3, 0.5])
    np.testing.assert_allclose(ratios, [0, 0.2, 0.4, 0.6], rtol=1e-12)
    ratios = schedules.range_ratios(0.4, [0.1, 0.3, 0.5], gamma=0.25, first_layer=0)
    np.testing.assert_allclose(ratios, [0.3, 0.4, 0.5], rtol=1e-12)
    # Nothing to follow.
    ratios = schedules.range_ratios(0.4, [0.5] * 3)
    np.testing.assert_allclose(ratios, [0, 0.4, 0.4], rtol=1e-12)
    assert schedules.range_ratios(0.0, [0.1, 0.2, 0.7]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "gamma"),
    [(0.1, 0.5), (0.1, 3), (0.5, 1), (0.5, 3), (0.7, 0.9), (0.85, 0.5), (0.9, -0.9)],
)
def test_range_ratios_keep_their_mean_and_bounds(ratio, gamma):
    ranges = np.random.default_rng(1).uniform(size=12)
    ratios = schedules.range_ratios(ratio, ranges, gamma=gamma, first_layer=2)
    assert ratios[:2] == [0, 0] and len(ratios) == 12
    assert 0 <= min(ratios) and max(ratios) <= 0.9
    np.testing.assert_allclose(np.mean(ratios[2:]), ratio, rtol=1e-9)
    # A longer range never prunes less.
    steps = np.diff(np.array(ratios[2:])[np.argsort(ranges[2:])])
    assert np.all(np.sign(gamma) * steps >= -1e-12)


@pytest.mark.parametrize("double_counter", [True, False])
def test_released_code_zeroes_the_documented_counts(double_counter):
    attention = [0, 0, 0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3, 0.3]
    mlp = [0.04 * layer for layer in range(12)]
    schedule = [0, 2, 4, 6, 8, 10] * 2 if double_counter else range(12)
    cascade = schedules.released_code(double_counter=double_counter)
    # 197 tokens compete, CLS among them.
    pruned = [(196 - keep, 196 - keep_mlp) for keep, keep_mlp in cascade.counts]
    assert pruned == [(int(attention[i] * 197), int(mlp[i] * 197)) for i in schedule]
    assert cascade.resets == ((6,) if double_counter else ())
    assert (cascade.semantics, cascade.mode, cascade.score) == ("zero", "masked", "max")
    assert cascade.cumulative and cascade.stale_threshold and not cascade.keep_cls
    assert (cascade.alpha, cascade.beta) == (0.0, 1.0)


def test_evit_has_the_published_counts():
    cascade = schedules.evit(0.7, num_layers=12, num_patches=196, fuse=None)
    # ceil(.7 * 196) = 138, ceil(.7 * 138) = 97, ceil(.7 * 97) = 68.
    assert cascade.keep == (196,) * 4 + (138,) * 3 + (97,) * 3 + (68,) * 2
    assert cascade.keep_mlp == (196,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    assert (cascade.score, cascade.cumulative, cascade.fuse) == ("cls", False, None)
    cascade = schedules.evit(0.7, num_layers=12, num_patches=196)
    # With a fused one: 139, ceil(.7 * 139) + 1 = 99, ceil(.7 * 99) + 1 = 71.
    assert cascade.keep_mlp == (196,) * 3 + (139,) * 3 + (99,) * 3 + (71,) * 3
    assert cascade.fuse == "sum"
    cascade = schedules.evit(0.5, num_layers=4, num_patches=10, layers=[2], fuse=None)
    assert cascade.counts == ((10, 10), (10, 10), (10, 5), (5, 5))
    cascade = schedules.evit(1.0, num_layers=4, num_patches=10)
    assert cascade.counts == ((10, 10),) * 4


@pytest.mark.parametrize(
    ("num_merged", "after"),
    [
        (13, [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]),
        # The last has 21 tokens, of which half of 20 can go.
        (16, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
    ],
)
def test_merging_has_the_published_token_counts(num_merged, after):
    cascade = schedules.token_merging(num_merged, num_layers=12, num_patches=196)
    assert [keep + 1 for keep in cascade.keep_mlp] == after
    assert [keep + 1 for keep in cascade.keep] == [197, *after[:-1]]


# Old names, for one version.


@pytest.mark.parametrize(("num_merged", "num_layers"), [(8, 12), (5, 7), (60, 24)])
def test_decreasing_merging_falls_linearly_from_twice_to_nothing(
    num_merged, num_layers
):
    """The authors' rule, the whole part of 2 r + i step, up to half of the rest."""
    cascade = schedules.token_merging(
        num_merged, num_layers=num_layers, num_patches=196, schedule="decreasing"
    )
    wanted = np.linspace(2 * num_merged, 0, num_layers)
    left = 196
    for (before, after), count in zip(cascade.counts, wanted, strict=True):
        assert before == left
        # The end points of linspace are exact; between them 1e-9 is rounding.
        left -= min(int(count + 1e-9), left // 2)
        assert after == left
    assert cascade.keep[-1] == cascade.keep_mlp[-1]
    assert cascade.score == "merge"


def test_decreasing_merging_of_one_layer_merges_once():
    cascade = schedules.token_merging(
        3, num_layers=1, num_patches=16, schedule="decreasing"
    )
    assert cascade.keep_mlp == (13,)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (schedules.constant_ratios, (0.3, 4)),
        (schedules.ramp_ratios, (0.4, 8)),
        (schedules.range_ratios, (0.4, [0.9, 0.1, 0.3, 0.5])),
    ],
)
def test_start_is_the_old_name_of_first_layer(function, arguments):
    expected = function(*arguments, first_layer=2)
    assert expected != function(*arguments, first_layer=0)
    with pytest.warns(DeprecationWarning, match="`start` of .* is now `first_layer`"):
        assert function(*arguments, start=2) == expected


# Errors.


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: schedules.from_ratios([0.1, 1.0], 9), r"lie in \[0, 1\), got 1.0"),
        (lambda: schedules.from_ratios([-0.1], 9), r"lie in \[0, 1\), got -0.1"),
        (lambda: schedules.from_ratios([0.1], 9, [1.5]), r"lie in \[0, 1\), got 1.5"),
        (lambda: schedules.from_ratios([float("nan")], 9), r"lie in \[0, 1\), got nan"),
        (
            lambda: schedules.from_ratios([0.1, 0.2], 9, [0.1]),
            "got 2 ratios and 1 mlp_ratios",
        ),
        (
            lambda: schedules.cp_vit(1.0, num_layers=4, num_patches=9),
            r"lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: schedules.evit(0.0, num_layers=4, num_patches=9),
            r"keep_rate must lie in \(0, 1\], got 0.0",
        ),
        (
            lambda: schedules.evit(0.7, num_layers=4, num_patches=9, layers=[2, 4]),
            r"layers must be among 0 to 3, got \(2, 4\)",
        ),
        (
            lambda: schedules.evit(1.1, num_layers=4, num_patches=9),
            r"keep_rate must lie in \(0, 1\], got 1.1",
        ),
        (
            lambda: schedules.token_merging(
                1, num_layers=4, num_patches=9, schedule="falling"
            ),
            "schedule must be one of constant, decreasing; got 'falling'",
        ),
        (
            lambda: schedules.token_merging(-1, num_layers=4, num_patches=9),
            "num_merged must be at least 0, got -1",
        ),
        (
            lambda: schedules.range_ratios(0.95, [0.1, 0.2]),
            r"ratio must lie in \[0, 0.9\] .* got 0.95 and 1",
        ),
        (lambda: schedules.range_ratios(-0.1, [0.1, 0.2]), r"got -0.1 and 1"),
        (
            lambda: schedules.range_ratios(0.4, [0.1, math.nan, 0.2]),
            "ranges must be finite, got .*nan",
        ),
        (
            lambda: schedules.range_ratios(0.5, [0.1, 0.2], first_layer=2),
            "first_layer below 2, got 0.5 and 2",
        ),
        (lambda: schedules.range_ratios(0.5, [0.1, 0.2], largest=1.0), "got 0.5 and 1"),
        (
            # One layer prunes nothing, the others at most 0.9.
            lambda: schedules.range_ratios(
                0.7, [0.1, 0.2, 0.3], gamma=3, first_layer=0
            ),
            "mean ratio of 0.7 cannot be reached with gamma 3",
        ),
    ],
)
def test_wrong_ratios_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
