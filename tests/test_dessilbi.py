"""DessiLBI against golden trajectories, NumPy replays and limiting cases.

The replays hold W, V and Gamma as NumPy arrays in float64.
"""

import functools
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dessilbi_runs import CURVATURE, coupling_of, quadratic, run, tensors
from flax import linen as nn
from flax import serialization
from goldens.make_dessilbi_goldens import replay as numpy_replay
from numerics import random_like

import lbi
from lbi import L1, GroupL2

pytestmark = pytest.mark.usefixtures("unoptimized")

HERE = Path(__file__).resolve().parent
# Of the NumPy program in goldens/make_dessilbi_goldens.py, and, where they are present,
# of the authors' own program.
OWN_GOLDENS = sorted((HERE / "goldens").glob("dessilbi_*.npz"))
AUTHORS_GOLDENS = sorted(
    (HERE.parents[1] / "shared" / "goldens").glob("dessilbi_*.npz")
)


def start_with(first, path):
    """The values before each step, given the start and the values after each step."""
    return np.concatenate([np.asarray(first)[None], np.asarray(path)[:-1]])


def soft(values, lam):
    return np.sign(values) * np.maximum(np.abs(values) - lam, 0)


def soft_groups(values, lam):
    """Over the last axis."""
    norms = np.sqrt(np.sum(values**2, axis=tuple(range(values.ndim - 1))))
    return values * np.maximum(0, 1 - lam / np.where(norms > 0, norms, lam))


# Golden trajectories.


def to_flax(name, array):
    """From torch's layout, with or without leading axes."""
    if name == "conv":
        return jnp.asarray(np.moveaxis(array, (-4, -3), (-1, -2)))
    return jnp.asarray(np.swapaxes(array, -1, -2) if name == "fc" else array)


def schedule_of(meta):
    rate, drop = meta["learning_rate"], int(meta["lr_divided_by_10_at_step"])
    return optax.piecewise_constant_schedule(rate, {drop: 0.1}) if drop else rate


@functools.cache
def replay_golden(path):
    golden = dict(np.load(path))
    meta = dict(zip(golden["meta_names"], golden["meta"].tolist(), strict=True))
    names = ("conv", "conv_bias", "fc", "fc_bias")
    grads = {name: to_flax(name, golden[f"grads/{name}"]) for name in names}
    optimizer = lbi.dessilbi(
        schedule_of(meta),
        nu=meta["mu"],
        kappa=meta["kappa"],
        momentum=meta["momentum"],
        weight_decay=meta["weight_decay"],
        record_entry=True,
    )
    end, paths = run(
        optimizer,
        {name: to_flax(name, golden[f"init/{name}"]) for name in names},
        lambda params, count: jax.tree.map(lambda g: g[count], grads),
        int(meta["steps"]),
    )
    return golden, meta, end, paths


goldens = pytest.mark.parametrize(
    "path",
    OWN_GOLDENS + AUTHORS_GOLDENS,
    ids=lambda path: f"{path.parents[1].name}_{path.stem}",
)


def test_goldens_are_of_two_kinds():
    for paths in filter(None, (OWN_GOLDENS, AUTHORS_GOLDENS)):
        kinds = {path.stem for path in paths}
        assert {"dessilbi_plain", "dessilbi_momentum_wd"} <= kinds
    assert OWN_GOLDENS


@goldens
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_program_matches_every_golden(path, dtype):
    golden = dict(np.load(path))
    meta = dict(zip(golden["meta_names"], golden["meta"].tolist(), strict=True))
    names = [key.removeprefix("init/") for key in golden if key.startswith("init/")]
    replayed = numpy_replay(
        meta,
        {name: golden[f"init/{name}"] for name in names},
        lambda name, weights, step: golden[f"grads/{name}"][step],
        dtype,
    )
    for key, actual in replayed.items():
        expected = golden[key]
        chex.assert_equal_shape([actual, expected])
        # Measured on the authors' files: at most 1.2e-6 of the largest entry with
        # float32 arithmetic, as theirs, and 1.5e-6 with float64.
        error = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
        assert error < 3e-6, f"{key} differs by {error:.1e}"
    assert replayed.keys() == {
        key for key in golden if not key.startswith(("init/", "meta"))
    }


@pytest.mark.slow_after(1)
@goldens
def test_every_step_matches_the_golden(path):
    golden, meta, _, (params, dual, gamma) = replay_golden(path)
    for kind, actual in [("params", params), ("z", dual), ("gamma", gamma)]:
        for name in actual if kind == "params" else ("conv", "fc"):
            expected = to_flax(name, golden[f"{kind}/{name}"])
            assert len(expected) == meta["steps"]
            chex.assert_equal_shape([actual[name], expected])
            largest = np.max(np.abs(expected))
            assert largest > 0
            error = np.max(np.abs(actual[name] - expected)) / largest
            # 300 additions of float32, in another order: some tens of roundings.
            assert error < 1e-5, f"{kind} {name} is off by {error:.1e}"


@goldens
def test_entries_match_the_golden(path):
    golden, _, (_, opt_state), _ = replay_golden(path)
    steps = lbi.entry_steps(opt_state)
    assert steps.keys() == {"conv", "fc"}
    for name in steps:
        gamma = np.asarray(to_flax(name, golden[f"gamma/{name}"]))
        inside = gamma != 0
        if name == "conv":
            inside = inside.any(axis=(1, 2, 3))
        expected = np.where(inside.any(axis=0), inside.argmax(axis=0) + 1, -1)
        assert len(set(expected.ravel())) > 2
        # A group whose norm passes the threshold by a rounding may come a step apart.
        apart = np.abs(steps[name] - expected)
        assert np.all(apart <= 1) and np.mean(apart == 0) > 0.95
        np.testing.assert_array_equal(steps[name] < 0, expected < 0)


# Sums of trajectories of a float64 transcription of the authors' rule:
# (learning rate, kappa, nu, momentum, weight decay),
# (sum, sum of squares) of conv and of fc, sum |V| of both, nonzeros of both, bias.
TRAJECTORIES = {
    "plain": (
        (0.1, 1.0, 2.0, 0.0, 0.0),
        (3.856460007499, 7.939872326266),
        (-1.883811957355, 9.377203354180),
        (14.055195287, 11.907353005),
        (16, 5),
        3.219323994025,
    ),
    "momentum": (
        (0.1, 1.0, 2.0, 0.9, 0.0),
        (5.823176068935, 16.537940617661),
        (-2.351025110204, 14.824742218015),
        (18.303323516, 15.137549959),
        (16, 7),
        3.320258283506,
    ),
    "momentum_decay": (
        (0.1, 1.0, 2.0, 0.9, 5e-4),
        (5.816722580786, 16.503063049375),
        (-2.349739738573, 14.808717470526),
        (18.289976266, 15.132906036),
        (16, 7),
        3.320258283506,
    ),
    "kappa": (
        (0.05, 2.0, 4.0, 0.0, 0.0),
        (3.842833241533, 7.351462555318),
        (-1.857077445672, 9.281178413361),
        (5.888393757, 4.176453138),
        (8, 0),
        3.219323994025,
    ),
}


@pytest.mark.parametrize("row", TRAJECTORIES.values(), ids=TRAJECTORIES.keys())
def test_sums_after_fifty_steps(row, float64):
    settings, conv_sums, fc_sums, dual_sums, num_nonzero, bias_sum = row
    learning_rate, kappa, nu, momentum, weight_decay = settings

    def cosine(shape, amplitude, frequency):
        index = np.arange(math.prod(shape)).reshape(shape)
        return amplitude * np.cos(frequency * index + 0.3)

    shapes = {"conv": (3, 2, 2, 2), "fc": (4, 3), "bias": (4,)}
    starts = {"conv": (0.8, 0.7), "fc": (0.9, 1.3), "bias": (0.5, 0.9)}
    targets = {"conv": (1.5, 0.35), "fc": (2, 0.45), "bias": (1, 0.2)}
    start = {k: cosine(shape, *starts[k]) for k, shape in shapes.items()}
    target = {k: cosine(shape, *targets[k]) for k, shape in shapes.items()}
    target["conv"][1] *= 0.05
    target["fc"][:, 1] *= 0.02
    start, target = (
        {k: to_flax(k, v) for k, v in tree.items()} for tree in (start, target)
    )
    assert start["conv"].dtype == jnp.float64
    optimizer = lbi.dessilbi(learning_rate, nu, kappa, momentum, weight_decay)
    curvature = {"conv": 0.5, "fc": 1.0, "bias": 2.0}
    (params, opt_state), _ = run(optimizer, start, quadratic(curvature, target), 50)

    sums = {k: (np.sum(v), np.sum(v**2)) for k, v in params.items()}
    dual, gamma = coupling_of(opt_state).dual, lbi.gamma(opt_state)
    # As many digits as are written above.
    np.testing.assert_allclose(sums["conv"], conv_sums, rtol=0, atol=2e-12)
    np.testing.assert_allclose(sums["fc"], fc_sums, rtol=0, atol=2e-12)
    np.testing.assert_allclose(sums["bias"][0], bias_sum, rtol=0, atol=2e-12)
    actual = [np.sum(np.abs(dual[k])) for k in ("conv", "fc")]
    np.testing.assert_allclose(actual, dual_sums, rtol=0, atol=1e-9)
    assert tuple(np.count_nonzero(gamma[k]) for k in ("conv", "fc")) == num_nonzero
    assert not np.any(gamma["bias"]) and not np.any(dual["bias"])


# The rows of the table of `structural_coupling`, each replayed in NumPy.

RATE, NU, KAPPA = 0.25, 1.25, 1.5
LAM = 0.3
B1, B2, EPSILON = 0.8, 0.9, 1e-3


def heavy_ball(decay):
    """g -> the momentum buffer with g."""
    buffer = [0.0]

    def smooth(g):
        buffer[0] = decay * buffer[0] + g
        return buffer[0]

    return smooth


def nesterov_ball(decay):
    smooth = heavy_ball(decay)
    return lambda g: g + decay * smooth(g)


def adam():
    """g -> Adam's direction (Kingma and Ba 2015)."""
    m, v, t = [0.0], [0.0], [0]

    def scale(g):
        t[0] += 1
        m[0] = B1 * m[0] + (1 - B1) * g
        v[0] = B2 * v[0] + (1 - B2) * g**2
        m_hat, v_hat = m[0] / (1 - B1 ** t[0]), v[0] / (1 - B2 ** t[0])
        return m_hat / (np.sqrt(v_hat) + EPSILON)

    return scale


def clip(g):
    return g / max(1, np.linalg.norm(g) / 0.5)


# An optax chain around the coupling, and the direction of W's step by NumPy, a maker of
# functions of the gradient, W and the pull (W - Gamma) / nu.
def make_chains():
    couple = lbi.structural_coupling(RATE, NU, KAPPA, L1(LAM))
    decay = optax.add_decayed_weights(0.2)
    scale_by_adam = optax.scale_by_adam(b1=B1, b2=B2, eps=EPSILON)
    by_kappa = optax.scale_by_learning_rate(KAPPA * RATE)
    by_rate = optax.scale_by_learning_rate(RATE)
    alias = {"nu": NU, "kappa": KAPPA, "penalty": L1(LAM)}
    adam_alias = alias | {"b1": B1, "b2": B2, "eps": EPSILON}

    def plain():
        return lambda g, w, pull: g + pull

    def authors(ball, weight_decay):
        def make():
            smooth = ball(0.7)
            return lambda g, w, pull: smooth(g + weight_decay * w) + pull

        return make

    def augmented():
        smooth = heavy_ball(0.7)
        return lambda g, w, pull: smooth(g + pull)

    def decoupled(weight_decay=0.0):
        def make():
            scale = adam()
            return lambda g, w, pull: scale(g) + pull + weight_decay * w

        return make

    def coupled(weight_decay=0.0):
        def make():
            scale = adam()
            return lambda g, w, pull: scale(g + pull) + weight_decay * w

        return make

    def clipped():
        return lambda g, w, pull: clip(g) + pull

    def clipped_sign():
        return lambda g, w, pull: np.sign(clip(g)) + pull

    return {
        "paper": (optax.chain(couple, by_kappa), KAPPA, plain),
        "paper_alias": (lbi.dessilbi(RATE, momentum=0, **alias), KAPPA, plain),
        "authors": (
            optax.chain(decay, optax.trace(0.7), couple, by_kappa),
            KAPPA,
            authors(heavy_ball, 0.2),
        ),
        "authors_alias": (
            lbi.dessilbi(RATE, momentum=0.7, weight_decay=0.2, **alias),
            KAPPA,
            authors(heavy_ball, 0.2),
        ),
        "nesterov_alias": (
            lbi.dessilbi(RATE, momentum=0.7, nesterov=True, **alias),
            KAPPA,
            authors(nesterov_ball, 0.0),
        ),
        "augmented_heavy_ball": (
            optax.chain(couple, optax.trace(0.7), by_kappa),
            KAPPA,
            augmented,
        ),
        "adam_decoupled": (
            optax.chain(scale_by_adam, couple, by_rate),
            1,
            decoupled(),
        ),
        "adam_decoupled_alias": (
            lbi.dessilbi_adam(RATE, weight_decay=0.2, **adam_alias),
            KAPPA,
            decoupled(0.2),
        ),
        "adam_coupled": (optax.chain(couple, scale_by_adam, by_rate), 1, coupled()),
        "adam_coupled_alias": (
            lbi.dessilbi_adam(RATE, weight_decay=0.2, mode="coupled", **adam_alias),
            KAPPA,
            coupled(0.2),
        ),
        "clipped": (
            optax.chain(optax.clip_by_global_norm(0.5), couple, by_rate),
            1,
            clipped,
        ),
        "sign": (
            optax.chain(
                optax.clip_by_global_norm(0.5), optax.scale_by_sign(), couple, by_rate
            ),
            1,
            clipped_sign,
        ),
    }


@pytest.mark.parametrize("name", list(make_chains()))
def test_place_in_the_chain_decides_the_method(name, float64):
    optimizer, primal, make_direction = make_chains()[name]
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(2, 3)), rng.normal(size=(4, 2, 3))
    num_steps = len(grads)
    (_, opt_state), paths = run(
        optimizer, jnp.asarray(start), lambda w, count: jnp.asarray(grads)[count], 4
    )

    direction = make_direction()
    w, v, gamma, expected = start, np.zeros((2, 3)), np.zeros((2, 3)), []
    for g in grads:
        pull = (w - gamma) / NU
        w = w - primal * RATE * direction(g, w, pull)
        v = v + RATE * pull
        gamma = KAPPA * soft(v, LAM)
        expected.append((w, v, gamma))
    # Gamma has to matter before the last step, and not everywhere.
    assert 0 < np.count_nonzero(expected[-2][2]) < gamma.size
    for actual, of_kind in zip(paths, zip(*expected, strict=True), strict=True):
        # optax takes powers of Adam's decays in float32: 1e-7 relative.
        tolerance = 1e-6 if "adam" in name else 1e-13
        np.testing.assert_allclose(actual, of_kind, rtol=tolerance, atol=tolerance)
    state = coupling_of(opt_state)
    assert state.count == num_steps
    np.testing.assert_allclose(state.clock, num_steps * RATE / NU, rtol=1e-6)


def test_one_step_of_adam_by_hand():
    # Adam's first step is sign(g) up to epsilon; Gamma is zero. nu = 4.
    w, g = jnp.array([[0.8, -0.4]]), jnp.array([[0.5, -0.15]])
    steps = {}
    for mode in ("decoupled", "coupled"):
        optimizer = lbi.dessilbi_adam(0.1, nu=4.0, kappa=2.0, eps=1e-8, mode=mode)
        updates, state = optimizer.update(g, optimizer.init(w), w)
        steps[mode] = updates
        np.testing.assert_allclose(
            coupling_of(state).dual, [[0.02, -0.01]], rtol=1e-6, atol=0
        )
    # -kappa alpha (sign(g) + w / nu), and -kappa alpha sign(g + w / nu).
    np.testing.assert_allclose(steps["decoupled"], [[-0.24, 0.22]], rtol=1e-5)
    np.testing.assert_allclose(steps["coupled"], [[-0.2, 0.2]], rtol=1e-5)
    small = jnp.array([[-0.15, 0.15]])
    updates, _ = optimizer.update(small, optimizer.init(w), w)
    # The pull 0.2, -0.1 outweighs -0.15 and loses to 0.15.
    np.testing.assert_allclose(updates, [[-0.2, -0.2]], rtol=1e-5)


def test_kappa_nu_and_rate_may_be_schedules(float64):
    rates, nus, kappas = [0.5, 0.25, 0.125, 0.5], [1, 2, 4, 2], [2, 1.5, 1, 0.5]

    def schedule(values):
        return lambda count: jnp.asarray(values, jnp.float64)[count]

    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(2, 3)), rng.normal(size=(4, 2, 3))
    optimizer = lbi.dessilbi(
        schedule(rates), schedule(nus), schedule(kappas), 0, penalty=L1(LAM)
    )
    (_, opt_state), paths = run(
        optimizer, jnp.asarray(w), lambda _, count: jnp.asarray(grads)[count], 4
    )
    v, gamma, expected = np.zeros((2, 3)), np.zeros((2, 3)), []
    for g, rate, nu, kappa in zip(grads, rates, nus, kappas, strict=True):
        pull = (w - gamma) / nu
        w, v = w - kappa * rate * (g + pull), v + rate * pull
        gamma = kappa * soft(v, LAM)
        expected.append((w, v, gamma))
    assert np.count_nonzero(expected[0][2])
    for actual, of_kind in zip(paths, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(actual, of_kind, rtol=1e-13, atol=1e-13)
    state = coupling_of(opt_state)
    np.testing.assert_allclose(state.clock, 0.5 + 0.125 + 0.03125 + 0.25, rtol=1e-6)
    assert state.kappa == 0.5


# Limits and identities.


BASES = {
    "sgd": optax.identity,
    "momentum": functools.partial(optax.trace, 0.9),
    "adam": optax.scale_by_adam,
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def without_coupling(optimizer, params, num_steps):
    grad_fn = quadratic(CURVATURE, tensors(1))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, count):
        updates, opt_state = optimizer.update(grad_fn(params, count), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for count in range(num_steps):
        params, opt_state = step(params, opt_state, count)
    return params


@every_base
def test_infinite_lam_is_decoupled_weight_decay(base):
    penalty = {"conv": GroupL2(math.inf), "fc": L1(math.inf)}
    rate = optax.scale_by_learning_rate(0.1)
    optimizer = optax.chain(
        base(), lbi.structural_coupling(0.1, 4.0, penalty=penalty), rate
    )
    (params, opt_state), _ = run(
        optimizer, tensors(), quadratic(CURVATURE, tensors(1)), 20
    )
    decay = optax.add_decayed_weights(
        1 / 4, mask={"conv": True, "fc": True, "bias": False}
    )
    expected = without_coupling(optax.chain(base(), decay, rate), tensors(), 20)
    # Dividing by a power of two and multiplying by its inverse round alike.
    chex.assert_trees_all_equal(params, expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(lbi.gamma(opt_state)))


@every_base
def test_infinite_nu_is_the_base_optimizer(base):
    rate = optax.scale_by_learning_rate(0.1)
    coupling = lbi.structural_coupling(0.1, math.inf)
    optimizer = optax.chain(base(), coupling, rate)
    (params, opt_state), _ = run(
        optimizer, tensors(), quadratic(CURVATURE, tensors(1)), 20
    )
    expected = without_coupling(optax.chain(base(), rate), tensors(), 20)
    chex.assert_trees_all_equal(params, expected)
    assert lbi.clock(opt_state) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(lbi.gamma(opt_state)))


@every_base
def test_parameters_without_penalty_get_the_base_updates(base):
    rate = optax.scale_by_learning_rate(0.1)
    coupling = lbi.structural_coupling(0.1, 2.0, penalty={"conv": GroupL2(0.1)})
    (params, opt_state), _ = run(
        optax.chain(base(), coupling, rate),
        tensors(),
        quadratic(CURVATURE, tensors(1)),
        20,
    )
    expected = without_coupling(optax.chain(base(), rate), tensors(), 20)
    for name in ("fc", "bias"):
        np.testing.assert_array_equal(params[name], expected[name])
        assert not np.any(coupling_of(opt_state).dual[name])
        assert not np.any(lbi.gamma(opt_state)[name])
    assert np.any(params["conv"] != expected["conv"])


def test_auto_is_filters_and_single_weights():
    # Large enough that each has groups inside after one step.
    params = tensors()
    coupling = lbi.structural_coupling(1.0, 1.0)
    _, state = coupling.update(params, coupling.init(params), params)
    chex.assert_trees_all_equal(state.dual["fc"], params["fc"])
    assert not np.any(state.dual["bias"])
    gamma = lbi.gamma(state)
    assert np.any(gamma["conv"]) and np.any(gamma["fc"])
    for name, prox in (("conv", soft_groups), ("fc", soft)):
        expected = prox(np.float64(params[name]), 1)
        np.testing.assert_allclose(gamma[name], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(gamma["bias"])


@pytest.mark.parametrize("penalty", [L1(0.0), GroupL2(0.0)], ids=["l1", "group"])
def test_zero_lam_averages_the_weights(penalty, float64):
    rate, nu, kappa, num_steps = 0.2, 2.0, 1.5, 12
    start = np.random.default_rng(0).normal(size=(3, 4))
    optimizer = lbi.dessilbi(rate, nu, kappa, 0.5, penalty=penalty)
    _, (params, _, gamma) = run(
        optimizer, jnp.asarray(start), quadratic(0.7, 1.0), num_steps
    )
    # Gamma_K = r sum_k (1 - r)^(K - 1 - k) W_k, r = kappa alpha / nu.
    r = kappa * rate / nu
    weights = r * (1 - r) ** np.arange(num_steps)[::-1]
    expected = np.tensordot(weights, start_with(start, params), axes=1)
    np.testing.assert_allclose(gamma[-1], expected, rtol=1e-12, atol=1e-14)


def test_scale_of_the_dual_is_free(float64):
    rng = np.random.default_rng(0)
    start, target = (jnp.asarray(x) for x in rng.normal(size=(2, 3, 4)))
    results = []
    # Powers of two, since the state keeps kappa in float32.
    for c in (1.0, 0.25, 8.0):
        penalty = GroupL2(2.0 * c)
        coupling = lbi.structural_coupling(c * 0.2, 1.3, 2.0 / c, penalty)
        optimizer = optax.chain(coupling, optax.sgd(0.3))
        _, (params, dual, gamma) = run(optimizer, start, quadratic(1.0, target), 15)
        results.append((params, dual / c, gamma))
    assert 0 < np.count_nonzero(results[0][2][-1]) < 12
    chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-14)


def test_dual_sums_the_weights_before_entry(float64):
    schedule = optax.cosine_decay_schedule(0.2, 30)
    rng = np.random.default_rng(0)
    start, target = rng.normal(size=(2, 3, 4))
    optimizer = lbi.dessilbi(schedule, 3.0, penalty=GroupL2(1.0), record_entry=True)
    (_, opt_state), (params, dual, _) = run(
        optimizer, jnp.asarray(start), quadratic(1.0, jnp.asarray(target)), 30
    )
    rates = np.array([float(schedule(k)) for k in range(30)])
    weights = start_with(start, params)
    sums = np.cumsum(rates[:, None, None] / 3 * weights, axis=0)
    # The first step at which the norm of the sum is over lambda.
    over = np.linalg.norm(sums, axis=1) > 1
    first = np.where(over.any(axis=0), over.argmax(axis=0) + 1, -1)
    assert len(set(first)) >= 3
    np.testing.assert_array_equal(lbi.entry_steps(opt_state)[""], first)
    for group, step in enumerate(first):
        step = step if step > 0 else 30
        # Up to and with the update of the entry, and no further.
        np.testing.assert_allclose(
            dual[:step, :, group], sums[:step, :, group], rtol=1e-6, atol=1e-8
        )
        if step + 1 < 30:
            assert not np.allclose(dual[step + 1, :, group], sums[step + 1, :, group])


@pytest.mark.parametrize("penalty", [L1(0.4), GroupL2(1.0)], ids=["l1", "group"])
@pytest.mark.parametrize(("nu", "kappa"), [(0.5, 1.0), (5.0, 1.0), (1.0, 20.0)])
def test_augmented_loss_falls_within_the_step_bound(penalty, nu, kappa, float64):
    rng = np.random.default_rng(0)
    curvature = rng.uniform(0.1, 4.0, size=(5, 6))
    target = 2 * rng.normal(size=(5, 6))
    # Gamma steps by the mirror map of a 1 / kappa strongly convex function, so W and
    # Gamma together descend while kappa alpha < 2 / the largest curvature of
    # L + ||W - Gamma||^2 / (2 nu) in both; once all is inside, only then.
    steepest = curvature.max()
    joint = [[steepest + 1 / nu, -1 / nu], [-1 / nu, 1 / nu]]
    bound = 2 / (kappa * np.linalg.eigvalsh(joint)[-1])
    grad_fn = quadratic(jnp.asarray(curvature), jnp.asarray(target))

    @jax.jit
    def augmented_losses(learning_rate):
        optimizer = lbi.dessilbi(learning_rate, nu, kappa, 0, penalty=penalty)
        _, (params, _, gamma) = run(optimizer, jnp.zeros((5, 6)), grad_fn, 300)
        losses = jnp.sum(curvature[None] * (params - target[None]) ** 2, axis=(1, 2))
        coupling = jnp.sum((params - gamma) ** 2, axis=(1, 2)) / nu
        return (losses + coupling) / 2, jnp.count_nonzero(gamma, axis=(1, 2))

    losses, entered = augmented_losses(0.95 * bound)
    assert entered[0] == 0 and entered[-1] > 20
    # Down to the rounding of sums of order 100.
    assert np.all(np.diff(losses) <= 1e-12), np.max(np.diff(losses))
    assert losses[-1] < 1e-3 * losses[0]
    losses, _ = augmented_losses(1.05 * bound)
    assert losses[-1] > 1e3 * losses[0]


# Layout.


def test_group_axis_may_lie_anywhere(float64):
    rng = np.random.default_rng(0)
    start, target = rng.normal(size=(2, 2, 3, 4, 5))
    ends = []
    for axis in (-1, 0):
        optimizer = lbi.dessilbi(
            0.3, 1.0, penalty=GroupL2(6.0, axis), record_entry=True
        )
        moved = [jnp.asarray(np.moveaxis(x, -1, axis)) for x in (start, target)]
        end, _ = run(optimizer, moved[0], quadratic(1.0, moved[1]), 12)
        back = [np.moveaxis(x, axis, -1) for x in (end[0], lbi.gamma(end[1]))]
        ends.append((*back, lbi.entry_steps(end[1])[""]))
    assert len(set(ends[0][2])) > 1
    # Sums of squares in another order.
    chex.assert_trees_all_close(*ends, rtol=1e-13, atol=1e-14)


def test_permuted_groups_give_permuted_results():
    rng = np.random.default_rng(0)
    start, target = np.float32(rng.normal(size=(2, 3, 7)))
    order = rng.permutation(7)
    optimizer = lbi.dessilbi(0.3, 1.0, penalty=GroupL2(0.8), record_entry=True)

    @jax.jit
    def train(start, target):
        (params, opt_state), _ = run(optimizer, start, quadratic(1.0, target), 12)
        return params, lbi.gamma(opt_state), coupling_of(opt_state).first_entry

    expected = jax.tree.map(lambda x: x[..., order], train(start, target))
    assert len(set(np.asarray(expected[2]))) > 2
    permuted = train(start[:, order], target[:, order])
    chex.assert_trees_all_close(permuted, expected, rtol=1e-6)


class Block(nn.Module):
    """Attention and an MLP, as in a transformer."""

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(4, qkv_features=8, name="attention")
        x = x + attention(x)
        hidden = nn.relu(nn.Dense(10, name="up")(x))
        return x + nn.Dense(6, name="down")(hidden)


def test_heads_and_neurons_are_groups():
    x = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
    shapes = jax.eval_shape(Block().init, jax.random.key(0), x)["params"]
    params = random_like(shapes)
    # One head and two neurons made large, on both of their sides.
    params["attention"]["value"]["kernel"][:, 2] *= 9
    params["attention"]["out"]["kernel"][2] *= 9
    params["up"]["kernel"][:, [1, 7]] *= 9
    params["down"]["kernel"][[1, 7]] *= 9
    params = jax.tree.map(jnp.asarray, params)
    # Groups of 6 or 12 entries: norms of about 3, or 30.
    penalty = {
        "bias": None,
        "(query|key|value)/kernel": GroupL2(10.0, 1),
        "out/kernel": GroupL2(10.0, 0),
        "up/kernel": GroupL2(10.0, -1),
        "down/kernel": GroupL2(10.0, 0),
    }
    coupling = lbi.structural_coupling(1.0, 1.0, penalty=penalty)

    @jax.jit
    def after_one_step(params):
        _, state = coupling.update(params, coupling.init(params), params)
        return lbi.in_support(state), lbi.gamma(state)

    inside, gamma = after_one_step(params)
    assert {name: groups.shape for name, groups in inside.items()} == {
        "attention/key/kernel": (4,),
        "attention/out/kernel": (4,),
        "attention/query/kernel": (4,),
        "attention/value/kernel": (4,),
        "up/kernel": (10,),
        "down/kernel": (10,),
    }
    assert {
        name: np.flatnonzero(groups).tolist() for name, groups in inside.items()
    } == {
        "attention/key/kernel": [],
        "attention/out/kernel": [2],
        "attention/query/kernel": [],
        "attention/value/kernel": [2],
        "up/kernel": [1, 7],
        "down/kernel": [1, 7],
    }
    nonzero = np.asarray(gamma["attention"]["value"]["kernel"] != 0)
    assert nonzero[:, 2].all() and nonzero.sum() == 6 * 2
    nonzero = np.asarray(gamma["attention"]["out"]["kernel"] != 0)
    assert nonzero[2].all() and nonzero.sum() == 2 * 6


def _recording(penalty):
    return lbi.dessilbi(0.1, nu=1.0, penalty={"kernel$": penalty}, record_entry=True)


def test_state_survives_flax_serialization():
    params = {"a": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}}
    optimizer = _recording(lbi.L1(0.1))
    _, state = optimizer.update(params, optimizer.init(params), params)
    restored = serialization.from_bytes(
        optimizer.init(params), serialization.to_bytes(state)
    )
    chex.assert_trees_all_equal(restored, state)
    assert lbi.find_states(restored)[0].spec == lbi.find_states(state)[0].spec


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("penalty", [lbi.L1(0.1), lbi.GroupL2(0.1)])
@pytest.mark.parametrize(
    "wrap", [lambda o: o, lambda o: optax.MultiSteps(o, 2), lambda o: _finite(o)]
)
def test_record_of_entries_keeps_its_sharding(penalty, wrap):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        params = {
            "kernel": jax.device_put(jnp.ones((3, 4)), spec(None, "x")),
            "bias": jax.device_put(jnp.zeros(4), spec("x")),
        }
        optimizer = wrap(_recording(penalty))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        jitted = jax.jit(lambda params, state: step((params, state), None)[0])
        carry = jitted(params, optimizer.init(params))
        carry = jitted(*carry)
        assert jitted._cache_size() == 1
        jax.eval_shape(lambda c: jax.lax.scan(step, c, length=2), carry)


def _finite(optimizer):
    return optax.apply_if_finite(optimizer, 3)
