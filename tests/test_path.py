"""Measurements of a DessiLBI path against NumPy replays; recovery of known supports."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbi
from lbi import L1, GroupL2
from lbi.penalty import assign, named_leaves

pytestmark = pytest.mark.usefixtures("unoptimized")

RATE, NU, KAPPA = 0.2, 1.5, 2.0
# By path, as what `assign` returns; also a mapping of patterns.
PENALTY = {"conv/kernel": GroupL2(0.7), "fc/kernel": L1(0.25)}


def tensors(seed=0):
    """A convolution kernel, a matrix and a bias; float32."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": {"kernel": (2, 1, 3, 5)}, "fc": {"bias": (6,), "kernel": (4, 6)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def coupled(penalty=PENALTY, learning_rate=RATE, nu=NU, **settings):
    settings = {"kappa": KAPPA, "momentum": 0} | settings
    return lbi.dessilbi(learning_rate, nu=nu, penalty=penalty, **settings)


def freeze(optimizer, params, num_steps):
    """The state after steps that leave the weights where they are."""
    grads = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def advance(opt_state):
        def step(opt_state, _):
            return optimizer.update(grads, opt_state, params)[1], None

        return jax.lax.scan(step, opt_state, length=num_steps)[0]

    return advance(optimizer.init(params))


def shrink(dual, penalty):
    """The prox, and the norms of the groups: of entries, or over the last axis."""
    if isinstance(penalty, L1):
        return np.sign(dual) * np.maximum(np.abs(dual) - penalty.lam, 0), np.abs(dual)
    norms = np.sqrt(np.sum(dual**2, axis=tuple(range(dual.ndim - 1))))
    scale = np.sqrt(dual[..., 0].size) if penalty.size_scaled else 1
    with np.errstate(divide="ignore"):
        return dual * np.maximum(0, 1 - scale * penalty.lam / norms), norms / scale


def replay(weights, penalty, rates=RATE, nus=NU, kappa=KAPPA):
    """Gamma and the steps of entry, from the weights before each step (S, ...)."""
    num_steps = len(weights)
    rates, nus = (np.broadcast_to(x, num_steps) for x in (rates, nus))
    dual, gamma, first = 0.0, 0.0, None
    for step, (w, rate, nu) in enumerate(zip(weights, rates, nus, strict=True)):
        dual = dual + rate / nu * (np.float64(w) - gamma)
        gamma, norms = shrink(dual, penalty)
        gamma = kappa * gamma
        first = np.full(norms.shape, -1) if first is None else first
        first = np.where((first < 0) & (norms > penalty.lam), step + 1, first)
    return gamma, first


def replay_frozen(params, penalty, num_steps, **settings):
    """`replay` of each layer with weights that stay: {layer: (Gamma, entries)}."""
    leaves = named_leaves(params)
    return {
        path: replay([leaves[path]] * num_steps, chosen, **settings)
        for path, chosen in penalty.items()
    }


@functools.cache
def train(num_steps=6):
    """Weights before each step and after the last, and the state at the end."""
    params, target = tensors(0), tensors(1)
    optimizer = coupled(record_entry=True)
    opt_state = optimizer.init(params)
    path = [params]

    @jax.jit
    def step(params, opt_state):
        grads = jax.tree.map(lambda p, t: p - t, params, target)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(num_steps):
        params, opt_state = step(params, opt_state)
        path.append(params)
    return path, opt_state


@pytest.fixture
def trained():
    """Parameters, state, and what a replay says of each layer."""
    path, opt_state = train()
    leaves = [named_leaves(params) for params in path]
    expected = {
        name: replay([leaf[name] for leaf in leaves[:-1]], penalty)
        for name, penalty in PENALTY.items()
    }
    return path[-1], opt_state, expected


def test_replay_has_groups_on_both_sides(trained):
    *_, expected = trained
    for gamma, first in expected.values():
        assert 0 < np.count_nonzero(gamma) < gamma.size
        assert len(set(first.ravel())) > 2 and first.min() == -1


def test_gamma_is_kappa_times_the_prox_of_the_dual(trained):
    _, opt_state, expected = trained
    gamma = lbi.gamma(opt_state)
    for name, actual in named_leaves(gamma).items():
        if name in expected:
            # Six steps of float32.
            np.testing.assert_allclose(actual, expected[name][0], rtol=1e-5, atol=1e-6)
    assert gamma["fc"]["bias"].shape == (6,) and not np.any(gamma["fc"]["bias"])


def test_entry_steps_match_the_replay(trained):
    _, opt_state, expected = trained
    steps = lbi.entry_steps(opt_state)
    assert all(step.dtype == np.int32 for step in steps.values())
    chex.assert_trees_all_equal(steps, {k: first for k, (_, first) in expected.items()})


def test_support_and_density_are_where_gamma_is_not_zero(trained):
    _, opt_state, expected = trained
    conv, fc = (expected[name][0] for name in ("conv/kernel", "fc/kernel"))
    inside = {"conv/kernel": np.any(conv, axis=(0, 1, 2)), "fc/kernel": fc != 0}
    chex.assert_trees_all_equal(lbi.in_support(opt_state), inside)
    shares = {name: np.mean(groups) for name, groups in inside.items()}
    chex.assert_trees_all_close(lbi.density(opt_state), shares, rtol=1e-6)


def test_sparse_params_keep_the_weights_of_the_support(trained):
    params, opt_state, expected = trained
    sparse = named_leaves(lbi.sparse_params(params, opt_state))
    for name, (gamma, _) in expected.items():
        weights = np.asarray(named_leaves(params)[name])
        assert np.all(weights)
        np.testing.assert_array_equal(sparse[name], np.where(gamma, weights, 0))
    # It has no penalty: not zero, though its Gamma is.
    np.testing.assert_array_equal(sparse["fc/bias"], params["fc"]["bias"])


def test_readouts_compile(trained):
    params, opt_state, _ = trained

    def read(opt_state, params):
        return (
            lbi.gamma(opt_state),
            lbi.gamma(opt_state, params),
            lbi.in_support(opt_state),
            lbi.density(opt_state),
            lbi.sparse_params(params, opt_state),
            lbi.clock(opt_state),
        )

    compiled = jax.jit(read)(opt_state, params)
    chex.assert_trees_all_close(compiled, read(opt_state, params), rtol=1e-6)


def test_masked_chain():
    params, num_steps = tensors(), 4
    mask = {"conv": {"kernel": True}, "fc": {"bias": False, "kernel": False}}
    optimizer = optax.masked(coupled("auto", record_entry=True), mask)
    opt_state = freeze(optimizer, params, num_steps)
    auto = {"conv/kernel": GroupL2()}
    expected, first = replay_frozen(params, auto, num_steps)["conv/kernel"]
    assert 0 < np.count_nonzero(first > 0) < 5
    bare, filled = lbi.gamma(opt_state), lbi.gamma(opt_state, params)
    np.testing.assert_allclose(bare["conv"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert bare["fc"] == {"bias": optax.MaskedNode(), "kernel": optax.MaskedNode()}
    chex.assert_trees_all_equal_shapes_and_dtypes(filled, params)
    chex.assert_trees_all_equal(filled["conv"], bare["conv"])
    assert not np.any(filled["fc"]["kernel"]) and not np.any(filled["fc"]["bias"])
    # What the chain never saw counts as unpenalised.
    assert lbi.in_support(opt_state).keys() == {"conv/kernel"}
    np.testing.assert_array_equal(lbi.entry_steps(opt_state)["conv/kernel"], first)
    sparse = lbi.sparse_params(params, opt_state)
    chex.assert_trees_all_equal(sparse["fc"], params["fc"])
    np.testing.assert_array_equal(sparse["conv"]["kernel"] != 0, expected != 0)


def test_partitioned_chain():
    params, num_steps = tensors(), 6
    # Each coupling with its own rules, nu and kappa.
    makers = {
        "filters": ("conv/kernel", GroupL2(0.6), {"nu": 3.0, "kappa": 1.0}),
        "weights": ("fc/kernel", L1(0.3), {"nu": 2.0, "kappa": 4.0}),
    }
    optimizer = optax.partition(
        {
            label: coupled(penalty, record_entry=True, **settings)
            for label, (_, penalty, settings) in makers.items()
        }
        | {"rest": optax.sgd(RATE)},
        {"conv": {"kernel": "filters"}, "fc": {"bias": "rest", "kernel": "weights"}},
    )
    opt_state = freeze(optimizer, params, num_steps)
    assert len(lbi.find_states(opt_state)) == 2
    gamma = named_leaves(lbi.gamma(opt_state, params))
    sparse = named_leaves(lbi.sparse_params(params, opt_state))
    for path, penalty, settings in makers.values():
        expected, first = replay_frozen(
            params,
            {path: penalty},
            num_steps,
            nus=settings["nu"],
            kappa=settings["kappa"],
        )[path]
        assert len(set(first.ravel())) > 2
        np.testing.assert_allclose(gamma[path], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(lbi.entry_steps(opt_state)[path], first)
        share = np.mean(first > 0)
        np.testing.assert_allclose(lbi.density(opt_state)[path], share, rtol=1e-6)
        np.testing.assert_array_equal(sparse[path] != 0, expected != 0)
    assert lbi.gamma(opt_state)["fc"]["bias"] == optax.MaskedNode()
    assert not np.any(gamma["fc/bias"])
    chex.assert_trees_all_equal(sparse["fc/bias"], params["fc"]["bias"])


def test_partition_by_subtrees():
    """Labels of whole subtrees hide them as one leaf."""
    params = tensors()
    labels = {"conv": "first", "fc": "second"}
    couplings = {name: coupled(L1(0.1)) for name in ("first", "second")}
    state = optax.partition(couplings, labels).init(params)
    chex.assert_trees_all_equal(lbi.gamma(state), jax.tree.map(jnp.zeros_like, params))
    hidden = optax.masked(coupled(L1(0.1)), {"conv": True, "fc": False}).init(params)
    assert lbi.gamma(hidden)["fc"] == optax.MaskedNode()
    chex.assert_trees_all_equal_structs(lbi.gamma(hidden, params), params)


def test_state_without_record_of_entries_is_refused():
    optimizer = coupled()
    with pytest.raises(ValueError, match="record_entry=True"):
        lbi.entry_steps(optimizer.init(tensors()))


READOUTS = {
    "gamma": lbi.gamma,
    "in_support": lbi.in_support,
    "density": lbi.density,
    "sparse_params": lambda state: lbi.sparse_params(tensors(), state),
    "entry_steps": lbi.entry_steps,
    "clock": lbi.clock,
}


@pytest.mark.parametrize("read", READOUTS.values(), ids=READOUTS.keys())
def test_state_without_coupling_is_refused(read):
    opt_state = optax.adam(0.1).init(tensors())
    assert lbi.find_states(opt_state) == []
    with pytest.raises(ValueError, match="contains no lbi.structural_coupling"):
        read(opt_state)


# The clock and what it foretells.

NUM_STEPS = 20
STEPS = np.arange(NUM_STEPS)
# The rate and nu, and their values at each step.
SCHEDULES = {
    "numbers": (RATE, NU, np.full(NUM_STEPS, RATE), np.full(NUM_STEPS, NU)),
    "rate": (
        optax.piecewise_constant_schedule(0.3, {5: 0.5, 12: 0.1}),
        NU,
        np.repeat([0.3, 0.15, 0.015], [5, 7, 8]),
        np.full(NUM_STEPS, NU),
    ),
    "both": (
        optax.cosine_decay_schedule(0.4, 20),
        optax.linear_schedule(1.0, 3.0, 10),
        0.2 * (1 + np.cos(np.pi * STEPS / 20)),
        1 + np.minimum(STEPS, 10) / 5,
    ),
}
every_schedule = pytest.mark.parametrize(
    ("learning_rate", "nu", "rates", "nus"), SCHEDULES.values(), ids=SCHEDULES.keys()
)


@every_schedule
def test_final_clock_is_that_of_the_run(learning_rate, nu, rates, nus):
    for num_steps in (7, NUM_STEPS):
        actual = lbi.final_clock(learning_rate, nu, num_steps)
        # Schedules are float32.
        expected = np.sum((rates / nus)[:num_steps])
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    optimizer = coupled(learning_rate=learning_rate, nu=nu)
    opt_state = freeze(optimizer, tensors(), NUM_STEPS)
    np.testing.assert_allclose(lbi.clock(opt_state), expected, rtol=1e-6)


@every_schedule
def test_forecast_is_what_frozen_weights_do(learning_rate, nu, rates, nus):
    params = tensors(2)
    # Among the norms times the clocks of these schedules, 1.8 to 2.7.
    rules = {"conv": GroupL2(2.12, size_scaled=True), "fc/kernel": L1(2.0)}
    forecast = lbi.forecast_entries(params, learning_rate, nu, NUM_STEPS, rules)
    replayed = replay_frozen(
        params, assign(rules, params), NUM_STEPS, rates=rates, nus=nus
    )
    shares = {path: np.mean(first > 0) for path, (_, first) in replayed.items()}
    assert all(0 < share < 1 for share in shares.values()), shares
    chex.assert_trees_all_close(forecast, shares, rtol=1e-12)
    optimizer = coupled(rules, learning_rate, nu, record_entry=True)
    steps = lbi.entry_steps(freeze(optimizer, params, NUM_STEPS))
    observed = {path: np.mean(first > 0) for path, first in steps.items()}
    chex.assert_trees_all_close(forecast, observed, rtol=1e-12)


# The duals end larger with a smaller kappa, and so must the thresholds be.
@pytest.mark.parametrize(("kappa", "scale"), [(1.0, 1.0), (0.7, 1.25)])
def test_forecast_of_decaying_weights_is_what_they_do(kappa, scale):
    params, num_steps, rate, nu = tensors(2), 200, 0.02, 2.0
    rules = {"conv": GroupL2(2.0 * scale), "fc/kernel": L1(0.8 * scale)}
    forecasts = [
        lbi.forecast_entries(
            params, rate, nu, num_steps, rules, decaying=decaying, kappa=kappa
        )
        for decaying in (False, True)
    ]
    optimizer = coupled(rules, rate, nu, kappa=kappa, record_entry=True)

    @jax.jit
    def decay(params):
        def step(carry, _):
            params, opt_state = carry
            grads = jax.tree.map(jnp.zeros_like, params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, length=num_steps)[0][1]

    steps = lbi.entry_steps(decay(params))
    observed = {path: np.mean(first > 0) for path, first in steps.items()}
    # T = 2: with kappa 1 duals end at 0.865 ||W||, in steps at 1 - 0.99^200 = 0.866.
    assert all(0 < share < 1 for share in observed.values()), observed
    chex.assert_trees_all_close(forecasts[1], observed, rtol=1e-12)
    assert all(forecasts[0][path] > share for path, share in observed.items())


def test_open_groups_are_those_that_enter_later():
    """After 2 of 12 steps at frozen weights, against the steps of entry."""
    params, num_steps, half = tensors(2), 12, 2
    optimizer = coupled(record_entry=True)
    total = lbi.final_clock(RATE, NU, num_steps)
    count = jax.jit(lbi.open_groups)
    expected = {
        path: int(np.sum(first > half))
        for path, first in lbi.entry_steps(freeze(optimizer, params, num_steps)).items()
    }
    assert all(number > 0 for number in expected.values()), expected
    left = count(params, freeze(optimizer, params, half), total)
    chex.assert_trees_all_equal(jax.tree.map(int, left), expected)
    # The clock has stopped: what is out stays out.
    state = freeze(optimizer, params, half)
    assert not any(count(params, state, lbi.clock(state)).values())
    with pytest.raises(ValueError, match="lack fc/kernel"):
        lbi.open_groups({"conv": params["conv"]}, state, total)


def test_nan_is_refused_by_forecasts():
    params = tensors() | {"fc": {"kernel": jnp.full((4, 6), jnp.nan)}}
    with pytest.raises(ValueError, match="fc/kernel contains NaN"):
        lbi.forecast_entries(params, RATE, NU, 5, PENALTY)


def test_forecast_knows_when_nothing_enters():
    shares = [
        lbi.forecast_entries(tensors(), rate, 20.0, 100, "auto") for rate in (1e-3, 1e3)
    ]
    assert shares == [
        {"conv/kernel": 0.0, "fc/kernel": 0.0},
        {"conv/kernel": 1.0, "fc/kernel": 1.0},
    ]


def odd_tensors():
    """An odd number of groups each, so that the median is one of them."""
    rng = np.random.default_rng(3)
    shapes = {"conv": (2, 1, 3, 5), "fc": (3, 7), "units": (4, 9), "bias": (5,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


MEDIANS = {
    "conv": GroupL2(123.0),
    "fc": L1(0.5),
    "units": GroupL2(1.0, size_scaled=True),
}


@pytest.mark.slow_after(2)
@every_schedule
@pytest.mark.parametrize("enter_at", [0.05, 0.4, 0.9])
def test_median_group_enters_at_the_suggested_time(
    learning_rate, nu, rates, nus, enter_at
):
    del rates, nus
    params = odd_tensors()
    rules = MEDIANS | {"bias": None}
    suggested = lbi.suggest_lambda(
        params, learning_rate, nu, NUM_STEPS, rules, enter_at=enter_at
    )
    assigned = assign(suggested, params)
    assert assigned.keys() == MEDIANS.keys()
    for path, penalty in assigned.items():
        # Only lambda is new.
        assert lbi.penalty.with_lam(penalty, MEDIANS[path].lam) == MEDIANS[path]
    optimizer = coupled(suggested, learning_rate, nu, record_entry=True)
    steps = lbi.entry_steps(freeze(optimizer, params, NUM_STEPS))
    for path, first in steps.items():
        _, norms = shrink(np.float64(params[path]), MEDIANS[path])
        median = first.ravel()[np.argsort(norms.ravel())[norms.size // 2]]
        # It reaches lambda then, up to a rounding, and passes it at the next step.
        assert 0 <= median - round(enter_at * NUM_STEPS) <= 1
        # Larger norms enter before, smaller ones after.
        order = np.where(first > 0, first, NUM_STEPS + 1).ravel()
        assert np.all(np.diff(order[np.argsort(norms.ravel())]) <= 0)


def test_suggested_lambda_by_hand():
    # T = 3 * 0.5 / 2 after half of the run; norms 5, 1, 2, and entries 3, 4, ....
    params = {"kernel": jnp.array([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]])}
    settings = (0.5, 2.0, 6)
    assert lbi.suggest_lambda(params, *settings, GroupL2(), enter_at=0.5) == {
        "^kernel$": GroupL2(1.5)
    }
    (scaled,) = lbi.suggest_lambda(
        params, *settings, GroupL2(size_scaled=True), enter_at=0.5
    ).values()
    np.testing.assert_allclose(scaled.lam, 1.5 / np.sqrt(2), rtol=1e-12)
    # Median of 3, 1, 0, 4, 0, 2.
    lasso = lbi.suggest_lambda(params, *settings, L1(), enter_at=0.5)
    assert lasso == {"^kernel$": L1(0.75 * 1.5)}


@pytest.mark.parametrize("enter_at", [0, -0.1, 1.01])
def test_time_of_entry_out_of_range_is_refused(enter_at):
    message = re.escape(f"enter_at must be in (0, 1], got {enter_at}")
    with pytest.raises(ValueError, match=message):
        lbi.suggest_lambda(tensors(), RATE, NU, 10, enter_at=enter_at)


def test_rate_of_zero_is_refused():
    warmup = optax.linear_schedule(0.0, 1.0, 100)
    with pytest.raises(ValueError, match="the learning rate is zero up to"):
        lbi.suggest_lambda(tensors(1), warmup, 2.0, 100, enter_at=0.01)


def test_median_of_zero_is_refused():
    params = {"head": {"kernel": jnp.zeros((3, 4)).at[0].set(1)}}
    with pytest.raises(ValueError, match="head/kernel: the median norm"):
        lbi.suggest_lambda(params, RATE, NU, 10)


def test_empty_parameters_have_no_groups():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((0, 3))}}
    penalty = lbi.suggest_lambda(params, RATE, NU, 10)
    assert list(penalty) == ["^a/kernel$"]
    assert lbi.forecast_entries(params, RATE, NU, 10, penalty) == {"a/kernel": 1.0}
    state = lbi.dessilbi(RATE, NU).init(params)
    assert list(lbi.metrics(state)) == ["clock", "density/a/kernel", "entered/a/kernel"]


@pytest.mark.parametrize(
    "learning_rate",
    [
        lambda count: 0.4 if count < 3 else 0.1,
        lambda count: [0.4, 0.4, 0.4, 0.1, 0.1][count],
        lambda count: 0.4 * math.exp(-math.log(4) * (count // 3)),
    ],
    ids=["if", "table", "math"],
)
def test_final_clock_of_a_schedule_in_python(learning_rate):
    np.testing.assert_allclose(lbi.final_clock(learning_rate, 2.0, 5), 0.7, rtol=1e-6)


def test_two_couplings_of_different_parameters_are_read_together():
    params = {"a": jnp.full((1, 2), 3.0), "b": jnp.full((1, 2), 5.0)}
    links = [
        lbi.structural_coupling(1.0, 1.0, penalty={name: lbi.L1(lam)})
        for name, lam in (("a", 1.0), ("b", 2.0))
    ]
    optimizer = optax.chain(*links)
    _, state = optimizer.update(params, optimizer.init(params), params)
    # V is W after one step.
    expected = {"a": jnp.full((1, 2), 2.0), "b": jnp.full((1, 2), 3.0)}
    chex.assert_trees_all_close(lbi.gamma(state), expected)
    both = optax.chain(links[0], links[0])
    with pytest.raises(ValueError, match="a has two couplings"):
        lbi.gamma(both.init(params))


@pytest.mark.parametrize(
    ("learning_rate", "nu", "num_steps", "message"),
    [
        (RATE, NU, 0, "num_steps must be at least 1, got 0"),
        (RATE, NU, 2.5, "num_steps must be an integer, got 2.5"),
        (float("nan"), NU, 5, "learning_rate must be finite and >= 0, got nan at"),
        (lambda count: 1.0 - count, NU, 5, "learning_rate .* got -1.0 at update 2"),
        (RATE, lambda count: 2.0 - count, 5, "nu .* > 0, got 0.0 at update 2"),
        (lambda count: jnp.ones(2), NU, 5, r"learning_rate .*one number .*\(5, 2\)"),
    ],
)
def test_a_clock_of_impossible_numbers_is_refused(
    learning_rate, nu, num_steps, message
):
    with pytest.raises(ValueError, match=message):
        lbi.final_clock(learning_rate, nu, num_steps)


def test_couplings_out_of_range_are_refused():
    for function in (lbi.forecast_entries, lbi.suggest_lambda):
        with pytest.raises(ValueError, match="nu must be > 0, got 0"):
            function(tensors(), RATE, 0, 10)


# Sparse regression: signals enter before noise (Huang et al. 2016, Split LBI).

NUM_EXAMPLES, NUM_FEATURES, NOISE = 200, 400, 0.5


def regression(seed, group_size, num_active):
    """(inputs, targets, which groups are active); features of a group are adjacent."""
    rng = np.random.default_rng(seed)
    num_groups = NUM_FEATURES // group_size
    inputs = rng.normal(size=(NUM_EXAMPLES, NUM_FEATURES))
    active = np.zeros(num_groups, bool)
    active[rng.choice(num_groups, num_active, replace=False)] = True
    signs = rng.choice([-1, 1], (group_size, num_groups))
    weights = np.where(active, signs * rng.uniform(1, 2, signs.shape), 0)
    noise = NOISE * rng.normal(size=NUM_EXAMPLES)
    return inputs, inputs @ weights.T.ravel() + noise, active


def entries(data, penalty, shape, nu, kappa, num_steps):
    """When each group of weights of this shape entered; features in Fortran order."""
    inputs, targets, _ = data
    lipschitz = np.linalg.eigvalsh(inputs @ inputs.T / NUM_EXAMPLES)[-1]
    # Half of the step bound 2 / (kappa (L + 1 / nu)).
    learning_rate = 1 / (kappa * (lipschitz + 1 / nu))
    optimizer = lbi.dessilbi(
        learning_rate, nu, kappa, 0, penalty=penalty, record_entry=True
    )
    inputs, targets = (
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(targets, jnp.float32),
    )

    @jax.jit
    def train(weights):
        def step(carry, _):
            weights, opt_state = carry
            residual = inputs @ weights.T.ravel() - targets
            grads = (residual @ inputs / NUM_EXAMPLES).reshape(weights.T.shape).T
            updates, opt_state = optimizer.update(grads, opt_state, weights)
            return (optax.apply_updates(weights, updates), opt_state), None

        carry = weights, optimizer.init(weights)
        (_, opt_state), _ = jax.lax.scan(step, carry, length=num_steps)
        return opt_state

    return lbi.entry_steps(train(jnp.zeros(shape)))[""].ravel()


def is_recovered(first, active):
    """Whether the active groups entered, all of them before any other."""
    order = np.where(first > 0, first, np.iinfo(np.int32).max)
    return bool(order[active].max() < order[~active].min())


# The last signal enters after some 1,200 to 1,600 steps, or 9,000 with the larger nu.
@pytest.mark.parametrize(("nu", "num_steps"), [(1.0, 2500), (10.0, 10_000)])
@pytest.mark.parametrize("seed", range(3))
def test_true_weights_enter_first(seed, nu, num_steps):
    data = regression(seed, group_size=1, num_active=20)
    shape = (NUM_FEATURES, 1)
    first = entries(data, L1(), shape, nu, kappa=50.0, num_steps=num_steps)
    assert is_recovered(first, data[-1])


@pytest.mark.parametrize("seed", range(3))
def test_damping_that_is_too_small_lets_noise_in(seed):
    # Gamma then moves as fast as W, which has not yet told signals from noise.
    data = regression(seed, group_size=1, num_active=20)
    first = entries(data, L1(), (NUM_FEATURES, 1), 1.0, kappa=1.0, num_steps=100)
    assert np.sum(first > 0) > 20
    assert not is_recovered(first, data[-1])


@pytest.mark.parametrize("seed", range(3))
def test_true_groups_enter_first(seed):
    data = regression(seed, group_size=5, num_active=8)
    first = entries(data, GroupL2(), (5, 80), nu=1.0, kappa=50.0, num_steps=1000)
    assert is_recovered(first, data[-1])
