"""Proximal maps against their definitions; assignment of penalties to parameters."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbi.penalty import L1, GroupL2, Layer, Layers, assign, named_leaves, with_lam

pytestmark = pytest.mark.usefixtures("unoptimized")

LAM = 0.8
# Penalties, the shape of a parameter, and the axes that a group extends over.
CASES = {
    "l1": (L1(LAM), (4, 3), ()),
    "units": (GroupL2(LAM), (4, 3), (0,)),
    "filters": (GroupL2(LAM), (2, 3, 4, 5), (0, 1, 2)),
    "inputs": (GroupL2(LAM, 0), (4, 3), (1,)),
    "heads": (GroupL2(LAM, 1), (5, 4, 3), (0, 2)),
    "heads_negative": (GroupL2(LAM, -2), (5, 4, 3), (0, 2)),
    "two_axes": (GroupL2(LAM, (0, -1)), (2, 3, 4, 5), (1, 2)),
    "two_axes_reversed": (GroupL2(LAM, (-1, 0)), (2, 3, 4, 5), (1, 2)),
    "whole": (GroupL2(LAM, ()), (4, 3), (0, 1)),
    "scaled": (GroupL2(LAM, size_scaled=True), (4, 3), (0,)),
}
every_penalty = pytest.mark.parametrize(
    ("penalty", "shape", "within"), CASES.values(), ids=CASES.keys()
)


def group_norms(values, within):
    """By NumPy, broadcasting against `values`."""
    return np.sqrt(np.sum(np.square(values), axis=within, keepdims=True))


def effective_lam(penalty, shape, within):
    """sqrt(n) lam for a size-scaled penalty of groups of n entries."""
    scaled = getattr(penalty, "size_scaled", False)
    return LAM * math.sqrt(math.prod(shape[axis] for axis in within)) if scaled else LAM


def draw(shape, within, lam, seed=0):
    """Values whose group norms spread over both sides of lam; one group is zero."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    norms = group_norms(values, within)
    wanted = lam * rng.permutation(np.linspace(2.5, 0, norms.size)).reshape(norms.shape)
    return values / norms * wanted


@every_penalty
def test_prox_is_the_minimiser(penalty, shape, within, float64):
    lam = effective_lam(penalty, shape, within)
    values = draw(shape, within, lam)
    prox = np.asarray(jax.jit(penalty.prox)(values))

    def objective(g):
        return 0.5 * np.sum((g - values) ** 2) + lam * np.sum(group_norms(g, within))

    # The objective is 1-strongly convex, so a point is its minimum if and only if all
    # others lie above it by half the squared distance or more.
    rng = np.random.default_rng(1)
    others = [prox + s * rng.normal(size=shape) for s in np.logspace(-4, 1, 200)]
    others += [s * point for s in np.linspace(-1, 2, 31) for point in (values, prox)]
    # One group at a time, in its own direction and onto zero.
    for index in np.ndindex(group_norms(values, within).shape):
        one = np.zeros(group_norms(values, within).shape)
        one[index] = 1
        others += [prox + s * one * values for s in (-0.1, -0.01, 0.01, 0.1)]
        others += [prox * (1 - one), prox * (1 - one) + values * one]
    for other in others:
        gain = objective(other) - objective(prox)
        # Float64 rounding of sums of order 100.
        assert gain >= 0.5 * np.sum((other - prox) ** 2) - 1e-12


def test_prox_matches_a_search_on_a_grid():
    axis = np.linspace(-2, 2, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"))
    for vector in ([1.2, -0.9], [0.3, 0.4], [-1.5, 0.1]):
        distance = 0.5 * np.sum((grid - np.reshape(vector, (2, 1, 1))) ** 2, axis=0)
        omegas = {
            L1(LAM): np.abs(grid).sum(axis=0),
            GroupL2(LAM): np.sqrt(np.square(grid).sum(axis=0)),
        }
        for penalty, omega in omegas.items():
            best = np.argmin(distance + LAM * omega)
            found = grid.reshape(2, -1)[:, best]
            prox = penalty.prox(jnp.asarray(vector)[:, None])[:, 0]
            # The spacing of the grid.
            np.testing.assert_allclose(prox, found, atol=0.01)


@every_penalty
def test_prox_and_projection_on_the_dual_ball_add_up(penalty, shape, within, float64):
    lam = effective_lam(penalty, shape, within)
    values = draw(shape, within, lam)
    # Moreau: the conjugate of lam times a norm is the indicator of the dual ball.
    norms = group_norms(values, within)
    projection = values * np.minimum(1, lam / np.where(norms > 0, norms, 1))
    actual = jax.jit(penalty.prox)(values) + projection
    np.testing.assert_allclose(actual, values, rtol=1e-13, atol=1e-14)


@every_penalty
def test_prox_is_firmly_nonexpansive(penalty, shape, within, float64):
    lam = effective_lam(penalty, shape, within)
    prox = jax.jit(penalty.prox)
    for seed in range(10):
        a, b = (draw(shape, within, lam, 2 * seed + i) for i in range(2))
        moved = np.asarray(prox(a)) - np.asarray(prox(b))
        assert 0 < np.sum(moved**2) <= np.sum(moved * (a - b)) + 1e-12
        assert np.linalg.norm(moved) <= np.linalg.norm(a - b)


@every_penalty
def test_groups_leave_zero_beyond_their_threshold(penalty, shape, within):
    lam = effective_lam(penalty, shape, within)
    values = jnp.asarray(draw(shape, within, lam), jnp.float32)

    @jax.jit
    def evaluate(values):
        norms = penalty.norms(values)
        inside = norms > penalty.thresholds(shape)
        spread = [penalty.spread(groups, shape) for groups in (norms, inside)]
        return norms, *spread, penalty.prox(values)

    norms, spread_norms, inside, prox = evaluate(values)
    expected = group_norms(np.float64(values), within)
    assert norms.size == expected.size
    # In the order of the axes in the array, whatever order they are named in.
    np.testing.assert_allclose(norms.ravel(), expected.ravel(), rtol=1e-6)
    expected = np.broadcast_to(expected, shape)
    np.testing.assert_allclose(spread_norms, expected, rtol=1e-6)
    np.testing.assert_array_equal(inside, expected > lam)
    np.testing.assert_array_equal(prox != 0, expected > lam)


def test_norms_have_one_entry_per_group():
    shapes = {
        name: jax.eval_shape(penalty.norms, jnp.zeros(shape)).shape
        for name, (penalty, shape, _) in CASES.items()
    }
    assert shapes == {
        "l1": (4, 3),
        "units": (3,),
        "filters": (5,),
        "inputs": (4,),
        "heads": (4,),
        "heads_negative": (4,),
        "two_axes": (2, 5),
        "two_axes_reversed": (2, 5),
        "whole": (),
        "scaled": (3,),
    }


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 4)])
def test_groups_of_one_entry_are_the_lasso(shape):
    axes = tuple(axis for axis, size in enumerate(shape) if size > 1)
    values = jnp.linspace(-2, 2, math.prod(shape)).reshape(shape)
    for scaled in (False, True):
        group = GroupL2(LAM, axes, size_scaled=scaled)
        lasso = L1(LAM).prox(values)
        # v (1 - lam / |v|) and v - lam round differently: up to an ulp of v.
        chex.assert_trees_all_close(group.prox(values), lasso, rtol=0, atol=3e-7)
        chex.assert_trees_all_close(
            group.norms(values).reshape(shape), jnp.abs(values), rtol=1e-7
        )
        np.testing.assert_array_equal(group.prox(values) != 0, lasso != 0)


@every_penalty
def test_zero_is_safe(penalty, shape, within):
    weights = jnp.arange(1.0, 1 + math.prod(shape)).reshape(shape)

    @jax.jit
    @jax.jacobian
    def derivatives(values):
        lams = (penalty.lam, math.inf, 0.0)
        proxes = [with_lam(penalty, lam).prox(values) for lam in lams]
        return jnp.stack([jnp.sum(weights * prox) for prox in proxes])

    actual = derivatives(jnp.zeros(shape))
    chex.assert_trees_all_equal(actual[:2], jnp.zeros((2, *shape)))
    # At lam 0 the lasso and the group lasso may choose a subgradient each.
    assert np.all(np.isfinite(actual[2]))


@every_penalty
def test_lam_zero_is_the_identity_and_infinite_lam_is_zero(penalty, shape, within):
    values = jnp.asarray(draw(shape, within, LAM), jnp.float32)
    chex.assert_trees_all_equal(with_lam(penalty, 0.0).prox(values), values)
    everything = with_lam(penalty, math.inf).prox(values)
    chex.assert_trees_all_equal(everything, jnp.zeros(shape))


def test_derivative_of_the_group_prox_is_its_closed_form(float64):
    vector = np.array([1.2, -0.9, 0.5])
    derivative = jax.jit(jax.jacobian(lambda v: GroupL2(LAM, ()).prox(v)))
    jacobian = derivative(jnp.asarray(vector))
    norm = np.linalg.norm(vector)
    expected = (1 - LAM / norm) * np.eye(3)
    expected += LAM / norm**3 * vector[:, None] * vector
    np.testing.assert_allclose(jacobian, expected, rtol=1e-12, atol=1e-14)


def test_size_scaled_is_the_root_of_the_size_times_lam():
    shape = (2, 3, 4, 5)
    values = jnp.asarray(draw(shape, (0, 1, 2), 4.0), jnp.float32)
    scaled = GroupL2(LAM, size_scaled=True)
    plain = GroupL2(LAM * math.sqrt(2 * 3 * 4))
    assert scaled.thresholds(shape) == plain.thresholds(shape)
    chex.assert_trees_all_equal(scaled.prox(values), plain.prox(values))
    # Repeating the entries of a group leaves who is inside as it was.
    doubled = jnp.concatenate([values, values])
    np.testing.assert_array_equal(
        scaled.prox(doubled)[:2] != 0, scaled.prox(values) != 0
    )


def test_penalties_are_hashable_values():
    listed, tupled = GroupL2(2, [0, -1]), GroupL2(2.0, (0, -1))
    assert listed == tupled and hash(listed) == hash(tupled)
    assert hash(L1(1)) == hash(L1(1.0)) and L1() != GroupL2()
    assert with_lam(GroupL2(1, 0, size_scaled=True), 3) == GroupL2(
        3.0, 0, size_scaled=True
    )


@pytest.mark.parametrize("penalty", [L1, GroupL2])
@pytest.mark.parametrize("lam", [-0.5, math.nan])
def test_lam_out_of_range_is_refused(penalty, lam):
    with pytest.raises(ValueError, match=f"lam must be >= 0, got {lam}"):
        penalty(lam)


@pytest.mark.parametrize("axes", [2, -3, (0, 2), (0, 0), (1, -1)])
def test_axes_that_do_not_fit_are_refused(axes):
    message = re.escape(f"group_axes {axes} does not fit a parameter of shape (4, 3)")
    with pytest.raises(ValueError, match=message):
        GroupL2(group_axes=axes).check((4, 3))


# Which parameter gets which penalty.


PARAMS = {
    "attention": {"kernel": jnp.zeros((6, 2, 3)), "bias": jnp.zeros((2, 3))},
    "conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
    "dense": {"kernel": jnp.zeros((5, 6)), "bias": jnp.zeros(6)},
    "scale": jnp.zeros(()),
}
UNITS = GroupL2(0.5)
LAYERS = Layers(
    {
        "attention/kernel": Layer("product", output=(1, 2), input=(0,), heads=(1,)),
        "attention/bias": Layer("bias"),
        "conv/kernel": Layer("convolution", output=(3,), input=(2,), window=(0, 1)),
        "conv/bias": Layer("bias"),
        "dense/kernel": Layer("convolution", output=(1,), input=(0,), stacked=(0,)),
        "dense/bias": Layer("bias"),
        "scale": Layer("scale"),
    }
)
RULES = {
    "layers": (
        LAYERS,
        {
            "attention/kernel": L1(),
            "conv/kernel": GroupL2(group_axes=(3,)),
            "dense/kernel": GroupL2(group_axes=(0, 1)),
        },
    ),
    "layers_for_the_rest": (
        {"attention": GroupL2(group_axes=0), "dense": None, "": LAYERS},
        {
            "attention/bias": GroupL2(group_axes=0),
            "attention/kernel": GroupL2(group_axes=0),
            "conv/kernel": GroupL2(group_axes=(3,)),
        },
    ),
    "none": (None, {}),
    "empty": ({}, {}),
    # Every kernel of rank 2 or more.
    "one": (
        UNITS,
        dict.fromkeys(["attention/kernel", "conv/kernel", "dense/kernel"], UNITS),
    ),
    "first_match_wins": (
        {"conv": L1(2), "kernel": UNITS, "dense/kernel": L1(3)},
        {
            "attention/kernel": UNITS,
            "conv/bias": L1(2),
            "conv/kernel": L1(2),
            "dense/kernel": UNITS,
        },
    ),
    "none_excludes": (
        {"attention": None, "bias": None, "": "auto"},
        {"conv/kernel": GroupL2(), "dense/kernel": L1()},
    ),
    "none_excludes_all": ({"": None, "kernel": L1()}, {}),
    "auto_for_the_rest": (
        {"attention/kernel": GroupL2(group_axes=1), "bias": None, ".*": "auto"},
        {
            "attention/kernel": GroupL2(group_axes=1),
            "conv/kernel": GroupL2(),
            "dense/kernel": L1(),
        },
    ),
    "nested": (
        {"conv": {"kernel": UNITS, "bias": None}, "dense|scale": "auto"},
        {"conv/kernel": UNITS, "dense/kernel": L1()},
    ),
    "anchored": ({"^dense/kernel$": UNITS}, {"dense/kernel": UNITS}),
    # By its own pattern also a parameter of rank 1 or 0.
    "bias": ({"conv/bias|scale": L1()}, {"conv/bias": L1(), "scale": L1()}),
}


@pytest.mark.parametrize(("rules", "expected"), RULES.values(), ids=RULES.keys())
def test_rules(rules, expected):
    assigned = assign(rules, PARAMS)
    assert assigned == expected
    assert list(assigned) == [name for name in named_leaves(PARAMS) if name in expected]
    # Shapes are all that is needed.
    assert assign(rules, jax.eval_shape(lambda: PARAMS)) == expected


def test_names_of_leaves_in_other_trees():
    leaf = jnp.zeros(2)
    chex.assert_trees_all_equal(
        named_leaves([leaf, {"kernel": (leaf,)}]), {"0": leaf, "1/kernel/0": leaf}
    )
    assert list(named_leaves(PARAMS)) == [
        "attention/bias",
        "attention/kernel",
        "conv/bias",
        "conv/kernel",
        "dense/bias",
        "dense/kernel",
        "scale",
    ]


@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.bfloat16, 0.05), (jnp.float16, 1e-4), (jnp.float16, 40.0)]
)
def test_norms_of_half_precision_are_those_of_float64(dtype, scale):
    draws = np.random.default_rng(0).normal(size=(3, 3, 64, 32))
    values = jnp.asarray(scale * draws, dtype)
    exact = np.linalg.norm(np.asarray(values, np.float64).reshape(-1, 32), axis=0)
    np.testing.assert_allclose(GroupL2().norms(values), exact, rtol=1e-5)
    assert GroupL2(0.0).prox(values).dtype == dtype


def test_two_leaves_of_one_path_are_refused():
    leaf = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="two parameters have the path a/b"):
        assign("auto", {"a": {"b": leaf}, "a/b": leaf})


def test_axes_that_do_not_fit_name_the_layer():
    rules = {"conv": GroupL2(group_axes=3), "dense": "auto"}
    message = re.escape(
        "conv/bias: group_axes 3 does not fit a parameter of shape (4,)"
    )
    with pytest.raises(ValueError, match=message):
        assign(rules, PARAMS)


@pytest.mark.parametrize("rules", ["lasso", 1.0, [L1()], {"kernel": "lasso"}], ids=str)
def test_unknown_rules_are_refused(rules):
    unknown = rules["kernel"] if isinstance(rules, dict) else rules
    message = f'a penalty must be "auto", .*, got {re.escape(repr(unknown))}'
    with pytest.raises(ValueError, match=message):
        assign(rules, PARAMS)


def test_integer_parameters_are_refused():
    params = {"layer": {"kernel": jnp.ones((3, 3), int)}}
    with pytest.raises(ValueError, match="layer/kernel has the dtype int32"):
        assign("auto", params)
