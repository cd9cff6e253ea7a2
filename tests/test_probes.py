"""Probes along the gradient against closed forms and NumPy; invariances; errors."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from landscape import probes
from landscape.probes import (
    ConsecutiveChange,
    GradientProbe,
    check_finite,
    consecutive_change,
    effective_beta,
    envelope,
    gradient_predictiveness,
    is_dead,
    loss_variation,
    probe_gradient,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

STEP_SIZES = np.array([0.02, 1.5, 0.3, 0.1])


@functools.cache
def jitted(loss_fn):
    return jax.jit(functools.partial(probe_gradient, loss_fn))


def probe_jitted(loss_fn, params, batch, step_sizes=STEP_SIZES):
    return jitted(loss_fn)(params, batch, step_sizes)


# A quadratic: 1/2 w' A w + b' w.


def quadratic(seed=0, definite=True):
    """(loss_fn, params, {"a": A, "b": b}, w): w the parameters as one vector, (11,)."""
    rng = np.random.default_rng(seed)
    params = {"bias": rng.normal(size=5), "conv": {"kernel": rng.normal(size=(3, 2))}}
    w = np.concatenate([params["bias"], params["conv"]["kernel"].ravel()])
    root = rng.normal(size=(w.size, w.size))
    a = root @ root.T / w.size if definite else root + root.T
    batch = {"a": a, "b": rng.normal(size=w.size)}
    return quadratic_loss, jax.tree.map(jnp.asarray, (params, batch)), w


def quadratic_loss(params, batch):
    w = jnp.concatenate([params["bias"], params["conv"]["kernel"].ravel()])
    return 0.5 * w @ batch["a"] @ w + batch["b"] @ w


@pytest.mark.parametrize("definite", [True, False], ids=["definite", "indefinite"])
def test_quadratic_matches_closed_forms(definite):
    loss_fn, (params, batch), w = quadratic(definite=definite)
    a, b = (np.asarray(batch[name], np.float64) for name in "ab")
    w = np.asarray(w, np.float32).astype(np.float64)
    g = a @ w + b
    norm = np.linalg.norm
    loss = 0.5 * w @ a @ w + b @ w
    losses = loss - STEP_SIZES * (g @ g) + 0.5 * STEP_SIZES**2 * (g @ a @ g)
    moved = g - STEP_SIZES[:, None] * (a @ g)  # (S, 11)
    beta = norm(a @ g) / norm(g)

    probe = probe_jitted(loss_fn, params, batch)
    # Sums of eleven float32; differences of gradients lose two digits at eta = 0.02.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4)
    close(probe.loss, loss)
    close(probe.grad_norm, norm(g))
    close(probe.step_sizes, STEP_SIZES)
    close(probe.losses, losses)
    close(probe.grad_distances, STEP_SIZES * norm(a @ g))
    close(probe.relative_grad_distances, STEP_SIZES * beta)
    close(probe.cosines, moved @ g / norm(moved, axis=1) / norm(g))
    close(probe.betas, np.full(4, beta))
    close(loss_variation(probe), (losses.min(), losses.max()))
    # The step sizes are not in order: the extremes are at places 0 and 1.
    expected = STEP_SIZES[[0, 1]] * norm(a @ g)
    close(gradient_predictiveness(probe), expected)
    close(effective_beta(probe), beta)
    magnitudes = np.abs(np.linalg.eigvalsh(a))
    assert magnitudes.min() < beta < magnitudes.max()


def test_leading_eigenvector_gives_the_largest_eigenvalue():
    loss_fn, (params, batch), _ = quadratic()
    values, vectors = np.linalg.eigh(np.asarray(batch["a"]))
    # At w = -A^-1 b + v the gradient is A v.
    w = -np.linalg.solve(batch["a"], batch["b"]) + vectors[:, -1]
    params = {"bias": w[:5], "conv": {"kernel": w[5:].reshape(3, 2)}}
    probe = probe_jitted(loss_fn, params, batch)
    np.testing.assert_allclose(effective_beta(probe), values[-1], rtol=2e-4)


def test_variation_is_of_the_steps_alone():
    # Descent by small steps: every loss is below the one without a step.
    loss_fn, (params, batch), _ = quadratic()
    probe = probe_jitted(loss_fn, params, batch, np.array([1e-2, 4e-2, 2e-2, 3e-2]))
    low, high = loss_variation(probe)
    assert low == probe.losses[1] < high == probe.losses[0] < probe.loss


# A network of one hidden layer with cross-entropy, and its gradient by hand.


def mlp(seed=0):
    """(params, batch): 6 examples, 3 inputs, 4 hidden units, 5 classes."""
    rng = np.random.default_rng(seed)
    params = {
        "fc1": {"bias": rng.normal(size=4), "kernel": rng.normal(size=(3, 4))},
        "fc2": {"bias": rng.normal(size=5), "kernel": rng.normal(size=(4, 5))},
    }
    batch = {"x": rng.normal(size=(6, 3)), "label": rng.integers(5, size=6)}
    return jax.tree.map(jnp.asarray, (params, batch))


def cross_entropy(logits, labels):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


def mlp_loss(params, batch):
    hidden = batch["x"] @ params["fc1"]["kernel"] + params["fc1"]["bias"][None]
    logits = jnp.tanh(hidden) @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]
    return cross_entropy(logits, batch["label"])


def mlp_numpy(params, batch):
    """Loss and gradient of `mlp_loss`, in the dtype of what it is given."""
    x, label = batch["x"], batch["label"]
    hidden = np.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    logits = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(probs[rows, label]).mean()
    delta = probs.copy()
    delta[rows, label] -= 1
    delta /= len(x)
    back = delta @ params["fc2"]["kernel"].T * (1 - hidden**2)
    grads = {
        "fc1": {"bias": back.sum(0), "kernel": x.T @ back},
        "fc2": {"bias": delta.sum(0), "kernel": hidden.T @ delta},
    }
    return loss, grads


def probe_numpy(params, batch, step_sizes):
    """A loop over the step sizes in float64."""
    params, batch = jax.tree.map(np.asarray, (params, batch))

    def flat(tree):
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    loss, grads = mlp_numpy(params, batch)
    g = flat(grads)
    squares = []
    for layer in ("fc1", "fc2"):
        for column in range(params[layer]["kernel"].shape[1]):
            g_f = grads[layer]["kernel"][:, column]
            w_f = params[layer]["kernel"][:, column]
            squares.append(g_f @ g_f / (w_f @ w_f))
    rows = []
    for eta in step_sizes:
        moved = jax.tree.map(lambda p, g, eta=eta: p - eta * g, params, grads)
        moved_loss, moved_grads = mlp_numpy(moved, batch)
        h = flat(moved_grads)
        distance = np.sqrt(np.sum((h - g) ** 2))
        rows.append(
            (
                moved_loss,
                distance,
                distance / np.sqrt(g @ g),
                h @ g / np.sqrt((h @ h) * (g @ g)),
                distance / eta / np.sqrt(g @ g),
                eta * np.sqrt(np.mean(squares)),
            )
        )
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return GradientProbe(loss, np.sqrt(g @ g), step_sizes, *columns)


def test_probe_matches_a_numpy_loop(float64):
    params, batch = mlp()
    expected = probe_numpy(params, batch, STEP_SIZES)
    probe = probe_jitted(mlp_loss, params, batch)
    assert {leaf.dtype for leaf in probe} == {jnp.dtype("float64")}
    chex.assert_trees_all_close(probe, expected, rtol=1e-10)


def test_single_precision_matches_a_numpy_loop():
    params, batch = mlp()
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.asarray(batch["x"], np.float64)
    expected = probe_numpy(wide, {**batch, "x": x}, STEP_SIZES)
    probe = probe_jitted(mlp_loss, params, batch)
    assert {leaf.dtype for leaf in probe} == {jnp.dtype("float32")}
    # Rounding of 1e-7 against gradients that differ by one part in a hundred.
    chex.assert_trees_all_close(probe, jax.tree.map(np.float32, expected), rtol=2e-4)


def test_small_steps_see_the_hessian(float64):
    params, batch = mlp()
    flat, unravel = ravel_pytree(params)
    loss_fn = jax.jit(lambda w: mlp_loss(unravel(w), batch))
    g, hessian = jax.grad(loss_fn)(flat), jax.jit(jax.hessian(loss_fn))(flat)
    limit = float(jnp.linalg.norm(hessian @ g) / jnp.linalg.norm(g))

    step_sizes = 1e-3 * 0.5 ** np.arange(4)  # as many as STEP_SIZES, one compilation
    probe = probe_jitted(mlp_loss, params, batch, step_sizes)
    error = np.abs(np.asarray(probe.betas) - limit)
    assert limit > 0.1 and error[-1] < 1e-3 * limit
    # ||g' - g|| = eta ||H g|| + O(eta^2), so that beta is eta times more exact.
    distances = np.asarray(probe.grad_distances)
    first_order = step_sizes * float(jnp.linalg.norm(hessian @ g))
    error = np.abs(distances - first_order)
    np.testing.assert_allclose(error[:-1] / error[1:], 4, rtol=0.02)
    # L(w - eta g) to second order, with the Hessian: the rest is of third order.
    slope, curvature = float(g @ g), float(g @ hessian @ g)
    second_order = loss_fn(flat) - step_sizes * slope + step_sizes**2 * curvature / 2
    error = np.abs(probe.losses - second_order)
    np.testing.assert_allclose(error[:-1] / error[1:], 8, rtol=0.02)


# What a probe costs, and what it leaves alone.


class Counts:
    """Compares by identity, as what stays the same argument must."""

    def __init__(self):
        self.passes = []


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def watched(x, counts):
    """x; every forward and every backward pass leaves a note in `counts`."""
    del counts
    return x


def watched_forward(x, counts):
    jax.debug.callback(lambda: counts.passes.append("forward"))
    return x, None


def watched_backward(counts, _, cotangent):
    jax.debug.callback(lambda: counts.passes.append("backward"))
    return (cotangent,)


watched.defvjp(watched_forward, watched_backward)


@pytest.mark.parametrize(
    ("wrap", "num_steps"), [(jax.jit, 8), (lambda f: f, 3)], ids=["jit", "eager"]
)
def test_probe_costs_one_gradient_and_one_for_each_step(num_steps, wrap):
    counts = Counts()

    def loss_fn(w, batch):
        return watched(w @ w, counts)

    step_sizes = np.linspace(0.1, 0.8, num_steps)
    probe = wrap(functools.partial(probe_gradient, loss_fn))
    jax.block_until_ready(probe(jnp.ones(3), None, step_sizes))
    jax.effects_barrier()
    assert counts.passes.count("forward") == counts.passes.count("backward")
    assert counts.passes.count("backward") == 1 + num_steps


def test_probe_compiles_once():
    traced = []

    @jax.jit
    def probe(params, batch, step_sizes):
        traced.append(None)
        return probe_gradient(quadratic_loss, params, batch, step_sizes)

    for seed in range(2):
        _, arguments, _ = quadratic(seed)
        probe(*arguments, STEP_SIZES * (1 + seed))
    assert len(traced) == 1


def test_probe_repeats_and_changes_nothing():
    loss_fn, (params, batch), _ = quadratic()
    before = jax.tree.map(np.array, (params, batch))
    first = probe_gradient(loss_fn, params, batch, STEP_SIZES)
    second = probe_gradient(loss_fn, params, batch, STEP_SIZES)
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_equal((params, batch), before)
    # The same numbers in another order of summation.
    compiled = probe_jitted(loss_fn, params, batch)
    chex.assert_trees_all_close(compiled, first, rtol=1e-4)


def test_matrix_products_run_at_the_highest_precision():
    params, batch = mlp()
    text = jitted(mlp_loss).lower(params, batch, STEP_SIZES).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 5 and all("HIGHEST" in line for line in products)


def test_narrow_parameters_are_probed_in_float32():
    params, batch = mlp()
    # In bfloat16 steps below 1/256 of a weight would round away.
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    step_sizes = 0.1 * STEP_SIZES
    probe = probe_jitted(mlp_loss, narrow, batch, step_sizes)
    expected = probe_jitted(mlp_loss, wide, batch, step_sizes)
    chex.assert_trees_all_equal(probe, expected)
    assert probe.betas.dtype == jnp.float32 and probe.betas.min() > 0


# Stacks of probes.


def stack_of_three():
    """Parameters stacked (3, ...), one batch, and the probe of each."""
    many = [mlp(seed)[0] for seed in range(3)]
    _, batch = mlp()
    probes = [probe_jitted(mlp_loss, params, batch) for params in many]
    return jax.tree.map(lambda *x: jnp.stack(x), *many), batch, probes


def test_vmap_equals_a_loop():
    stacked, batch, probes = stack_of_three()
    probe = jax.jit(
        jax.vmap(lambda params: probe_gradient(mlp_loss, params, batch, STEP_SIZES))
    )(stacked)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *probes)
    chex.assert_trees_all_close(probe, expected, rtol=1e-4)


def test_probes_of_a_scan_reduce_along_their_last_axis():
    stacked, batch, probes = stack_of_three()

    @jax.jit
    def scan(stacked):
        return jax.lax.scan(
            lambda carry, params: (
                carry,
                probe_gradient(mlp_loss, params, batch, STEP_SIZES),
            ),
            0,
            stacked,
        )[1]

    probe = scan(stacked)
    assert isinstance(probe, GradientProbe) and probe.losses.shape == (3, 4)
    check_finite(probe)
    for reduce in (loss_variation, gradient_predictiveness, effective_beta):
        expected = jax.tree.map(lambda *x: jnp.stack(x), *map(reduce, probes))
        chex.assert_trees_all_close(reduce(probe), expected, rtol=1e-4)
    low, high = gradient_predictiveness(probe)
    assert jnp.all(low < high)


# Relative measures.


def test_filter_distance_by_hand():
    # Columns of norm 5, 0, 2 with gradients of norm 10, 7, 2; the second is left out,
    # and so is the bias.
    kernel = jnp.array([[3.0, 0.0, 0.0], [4.0, 0.0, 2.0]])
    slope = {
        "bias": jnp.array([9.0, 9.0]),
        "kernel": jnp.array([[6.0, 7.0, 2.0], [8.0, 0.0, 0.0]]),
    }

    def loss_fn(params, batch):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, params, batch)))

    params = {"bias": jnp.ones(2), "kernel": kernel}
    probe = probe_jitted(loss_fn, params, slope, np.array([1.0, 0.5]))
    expected = np.array([1.0, 0.5]) * math.sqrt((2**2 + 1**2) / 2)
    np.testing.assert_allclose(probe.filter_distances, expected, rtol=1e-6)
    # The loss is linear, and the gradient the same everywhere.
    assert not np.any(probe.grad_distances) and not np.any(probe.betas)
    np.testing.assert_allclose(probe.cosines, 1, rtol=1e-6)

    only_bias = {"bias": params["bias"]}
    probe = probe_jitted(loss_fn, only_bias, {"bias": slope["bias"]})
    assert not np.any(probe.filter_distances) and probe.grad_norm > 0


def test_cosines_stay_within_one():
    # Rounding alone takes a third of these beyond 1.
    def loss_fn(params, slope):
        return jnp.vdot(params, slope)

    slopes = np.random.default_rng(0).normal(size=(50, 7))
    probe = jax.vmap(lambda s: probe_gradient(loss_fn, np.zeros(7), s, STEP_SIZES))
    cosines = jax.jit(probe)(slopes).cosines
    assert cosines.max() <= 1 and cosines.min() > 1 - 1e-6


def scale_invariant_loss(params, batch):
    """A convolution whose outputs are normalized over the batch, without epsilon."""
    outputs = jax.lax.conv_general_dilated(
        batch["image"],
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean = outputs.mean((0, 1, 2), keepdims=True)
    outputs = (outputs - mean) / outputs.std((0, 1, 2), keepdims=True)
    pooled = jnp.tanh(outputs + 0.5).mean((1, 2))  # (B, O)
    return jnp.mean(jnp.square(pooled - batch["target"]))


@pytest.mark.parametrize("scale", [8.0, 0.3])
def test_scale_of_a_normalized_convolution(scale):
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(5, 4, 6, 2)), "target": rng.normal(size=(5, 3))}
    params, batch = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32),
        ({"kernel": rng.normal(size=(3, 3, 2, 3))}, batch),
    )
    scaled = {"kernel": scale * params["kernel"]}
    step_sizes = 30 * STEP_SIZES
    plain = probe_jitted(scale_invariant_loss, params, batch, step_sizes)
    # w and its gradient scale as c and 1 / c: the same step is c^2 as long in eta.
    other = probe_jitted(scale_invariant_loss, scaled, batch, scale**2 * step_sizes)
    assert plain.relative_grad_distances.max() > 0.1  # a step that is felt
    expected = plain._replace(
        grad_norm=plain.grad_norm / scale,
        step_sizes=plain.step_sizes * scale**2,
        grad_distances=plain.grad_distances / scale,
        betas=plain.betas / scale**2,
    )
    chex.assert_trees_all_close(other, expected, rtol=1e-3)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_zero_gradient_gives_no_nan(wrap):
    def loss_fn(kernel, batch):
        return batch + jnp.sum(jnp.square(kernel))

    probe = wrap(functools.partial(probe_gradient, loss_fn))
    probe = probe(np.zeros((2, 3)), np.float32(1.5), STEP_SIZES)
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    expected = GradientProbe(
        loss=np.float32(1.5),
        grad_norm=np.float32(0),
        step_sizes=np.float32(STEP_SIZES),
        losses=1.5 * ones,
        grad_distances=zeros,
        relative_grad_distances=zeros,
        cosines=ones,
        betas=zeros,
        filter_distances=zeros,
    )
    chex.assert_trees_all_equal(probe, expected)


def test_step_into_a_minimum_has_cosine_zero():
    # eta = 1 on a unit quadratic.
    probe = probe_jitted(lambda w, _: 0.5 * w @ w, jnp.array([3.0, 4.0]), None, [1.0])
    assert probe.cosines[0] == 0
    assert probe.relative_grad_distances[0] == probe.betas[0] == 1


# Batch normalization.


class Normalized(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, inputs, train):
        x = nn.Dense(4, name="fc1")(inputs)
        x = nn.BatchNorm(
            use_running_average=not train, momentum=self.momentum, name="bn"
        )(x)
        return nn.Dense(5, name="fc2")(jnp.tanh(x))


def normalized():
    """(params, batch): the batch holds the running statistics as well."""
    params, batch = mlp()
    params["bn"] = {"bias": jnp.linspace(-1, 1, 4), "scale": jnp.linspace(1, 2, 4)}
    stats = {"bn": {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 3.0)}}
    return params, batch | {"stats": stats}


def in_batch_mode(params, batch):
    variables = {"params": params, "batch_stats": batch["stats"]}
    logits, _ = Normalized().apply(variables, batch["x"], True, mutable=["batch_stats"])
    return cross_entropy(logits, batch["label"])


def in_frozen_mode(params, batch):
    variables = {"params": params, "batch_stats": batch["stats"]}
    return cross_entropy(
        Normalized().apply(variables, batch["x"], False), batch["label"]
    )


def in_recalibrated_mode(params, batch):
    model = Normalized(momentum=0.0)
    variables = {"params": params, "batch_stats": batch["stats"]}
    _, fresh = model.apply(variables, batch["others"], True, mutable=["batch_stats"])
    logits = model.apply({"params": params, **fresh}, batch["x"], False)
    return cross_entropy(logits, batch["label"])


def largest_difference(left, right):
    """Of the losses, in proportion."""
    return np.abs(left.losses / right.losses - 1).max()


def test_batch_mode_leaves_the_statistics_alone():
    params, batch = normalized()
    before = jax.tree.map(np.array, batch["stats"])
    first = probe_jitted(in_batch_mode, params, batch)
    chex.assert_trees_all_equal(batch["stats"], before)
    # Nor are they read: the base and every step are normalized by the batch itself.
    others = batch | {"stats": jax.tree.map(lambda s: 2 * s, batch["stats"])}
    second = probe_jitted(in_batch_mode, params, others)
    chex.assert_trees_all_equal(first, second)


def test_frozen_mode_is_another_function():
    params, batch = normalized()
    frozen = probe_jitted(in_frozen_mode, params, batch)
    batch_mode = probe_jitted(in_batch_mode, params, batch)
    assert largest_difference(frozen, batch_mode) > 0.05
    # The running statistics are constants of it.
    x = params["fc1"]["bias"][None] + batch["x"] @ params["fc1"]["kernel"]
    x = (x - 0.5) / jnp.sqrt(3 + 1e-5) * params["bn"]["scale"][None]
    x = jnp.tanh(x + params["bn"]["bias"][None]) @ params["fc2"]["kernel"]
    loss = cross_entropy(x + params["fc2"]["bias"][None], batch["label"])
    np.testing.assert_allclose(frozen.loss, loss, rtol=1e-5)


def test_recalibration_on_the_batch_itself_is_batch_mode():
    params, batch = normalized()
    expected = probe_jitted(in_batch_mode, params, batch)
    own = batch | {"others": batch["x"]}
    probe = probe_jitted(in_recalibrated_mode, params, own)
    chex.assert_trees_all_close(probe, expected, rtol=1e-3)
    probe = probe_jitted(in_recalibrated_mode, params, own | {"others": own["x"] ** 2})
    assert largest_difference(probe, expected) > 0.05


# Consecutive steps.


def consecutive():
    """(w, g, next w, next g): distances (3, 4 -> 5) and (12, 5 -> 13) in two layers."""
    w = {"conv": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 1))}}
    w["fc"] = {"kernel": jnp.ones((1, 4))}
    g = jax.tree.map(lambda p: 2 * p, w)
    next_w = jax.tree.map(jnp.copy, w)
    next_w["conv"]["kernel"] += jnp.array([[1.0], [2.0]])
    next_w["fc"]["kernel"] += jnp.array([[0.0, 2.0, 0.0, 0.0]])
    next_g = jax.tree.map(jnp.copy, g)
    next_g["conv"]["bias"] -= jnp.array([3.0, 0.0, 0.0])
    next_g["fc"]["kernel"] += jnp.array([[0.0, 0.0, 0.0, 4.0]])
    return w, g, next_w, next_g


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("pattern", "grad_distance", "step_norm"),
    [
        (None, 5.0, 3.0),
        ("^fc/", 4.0, 2.0),
        ("kernel$", 4.0, 3.0),
        ("conv", 3.0, math.sqrt(5)),
        ("conv/bias", 3.0, 0.0),
    ],
)
def test_consecutive_change_by_hand(wrap, pattern, grad_distance, step_norm):
    change = wrap(functools.partial(consecutive_change, pattern=pattern))
    beta = grad_distance / step_norm if step_norm else math.inf
    expected = ConsecutiveChange(grad_distance, step_norm, beta)
    actual = change(*consecutive())
    chex.assert_trees_all_close(actual, jax.tree.map(np.float32, expected), rtol=1e-6)


def test_consecutive_change_of_nothing_is_zero():
    w, g, _, _ = consecutive()
    assert consecutive_change(w, g, w, g) == (0, 0, 0)


def test_gradient_descent_on_one_batch_gives_the_probe():
    params, batch = mlp()
    probe = probe_jitted(mlp_loss, params, batch)
    grad_fn = jax.jit(jax.grad(mlp_loss))
    grads = grad_fn(params, batch)
    moved = jax.tree.map(lambda p, g: p - STEP_SIZES[1] * g, params, grads)
    change = consecutive_change(params, grads, moved, grad_fn(moved, batch))
    expected = probe.grad_distances[1], STEP_SIZES[1] * probe.grad_norm, probe.betas[1]
    np.testing.assert_allclose(change, expected, rtol=1e-4)


def test_narrow_gradients_are_subtracted_in_float32():
    w = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
    g = {"kernel": jnp.full((2, 3), 256, jnp.bfloat16)}
    next_g = {"kernel": jnp.full((2, 3), 0.5, jnp.bfloat16)}
    change = consecutive_change(w, g, w, next_g)
    # In bfloat16 256 - 0.5 is 256 again.
    np.testing.assert_allclose(change.grad_distance, 255.5 * math.sqrt(6), rtol=1e-6)


def test_consecutive_change_names_what_does_not_fit():
    w, g, next_w, next_g = consecutive()
    paths = r"\['conv/bias', 'conv/kernel', 'fc/kernel'\]"
    with pytest.raises(ValueError, match="no parameter matches 'head'; .*" + paths):
        consecutive_change(w, g, next_w, next_g, pattern="head")
    with pytest.raises(ValueError, match="^next_params must be a tree like"):
        consecutive_change(w, g, {"fc": next_w["fc"]}, next_g)
    g["fc"]["kernel"] = jnp.ones((1, 1))
    message = re.escape("grads must have the shapes of params, got (1, 1) for (1, 4)")
    with pytest.raises(ValueError, match=message + " at fc/kernel"):
        consecutive_change(w, g, next_w, next_g)
    w["fc"]["kernel"] = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="got int32 at 'fc/kernel'"):
        consecutive_change(w, g, next_w, next_g)


# The band of several runs.

CURVES = np.array([[3.0, 2.0, 1.0], [1.0, 4.0, 0.5], [2.3, 2.3, 2.3]], np.float32)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_envelope_by_hand(wrap):
    low, high = wrap(envelope)(CURVES[:, :2])
    np.testing.assert_array_equal(low, np.float32([1, 2]))
    np.testing.assert_array_equal(high, np.float32([3, 4]))
    low, high = wrap(envelope)(CURVES, np.array([False, False, True]))
    np.testing.assert_array_equal(low, np.float32([1, 2, 0.5]))
    np.testing.assert_array_equal(high, np.float32([3, 4, 1]))


def test_envelope_leaves_out_a_run_that_broke_down():
    broken = CURVES.copy()
    broken[1, 1:] = np.nan
    message = "loss of run 1 is nan at step 1: leave it out with is_dead"
    with pytest.raises(ValueError, match=message):
        envelope(broken)
    low, high = envelope(broken, is_dead(broken, 10))
    # The third run is dead as well: it ends at log(10).
    np.testing.assert_array_equal(low, CURVES[0])
    np.testing.assert_array_equal(high, CURVES[0])


def test_envelope_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="all of the 3 runs are dead"):
        envelope(CURVES, np.ones(3, bool))
    with pytest.raises(ValueError, match=re.escape("must be (R, T), got shape (3,)")):
        envelope(CURVES[0])
    with pytest.raises(ValueError, match=re.escape("bool (3,), got bool (2,)")):
        envelope(CURVES, np.ones(2, bool))
    with pytest.raises(ValueError, match=re.escape("bool (3,), got int32 (3,)")):
        envelope(CURVES, np.ones(3, np.int32))


def at_equal_loss_by_hand(losses, values, levels):
    """A loop over the steps of one run."""
    found = np.full(len(levels), np.nan)
    for k, level in enumerate(levels):
        lowest = losses[0]
        if lowest == level:
            found[k] = values[0]
        for t in range(1, len(losses)):
            if np.isnan(found[k]) and lowest > level >= losses[t]:
                part = (lowest - level) / (lowest - losses[t])
                found[k] = (1 - part) * values[t - 1] + part * values[t]
            lowest = np.fmin(lowest, losses[t])
    return found


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_at_equal_loss_is_the_first_passage(wrap):
    rng = np.random.default_rng(0)
    losses = np.linspace(3, 1, 12) + rng.normal(0, 0.3, (2, 3, 12))
    losses[1, 1, 6:] = np.nan  # diverged
    values = rng.normal(size=(2, 3, 12))
    # The second run of the first group starts below the first level.
    losses[0, 1, 0] = 2.5
    levels = np.array([2.7, 2.0, losses[0, 0].min(), 0.1])
    found = np.asarray(wrap(probes.at_equal_loss)(losses, values, levels))
    expected = [
        [
            at_equal_loss_by_hand(*run, np.float32(levels))
            for run in zip(*rows, strict=True)
        ]
        for rows in zip(np.float32(losses), values, strict=True)
    ]
    # Single precision, and differences of losses in the denominator.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.isnan(found[..., -1]).all() and np.isnan(found[0, 1, 0])
    assert np.isfinite(found[0, 0, :3]).all()


def test_at_equal_loss_of_a_run_that_begins_without_a_loss():
    found = probes.at_equal_loss(
        np.array([np.nan, 2.0, 1.0]), np.array([7.0, 8.0, 9.0]), np.array([2.5, 1.5])
    )
    np.testing.assert_allclose(found, [8, 8.5])


def test_at_equal_loss_takes_no_value_from_before_a_level_that_is_met():
    found = probes.at_equal_loss(
        np.array([3.0, 2.0, 1.0]), np.array([np.inf, 5.0, 7.0]), np.array([2.0, 1.5])
    )
    np.testing.assert_allclose(found, [5, 6])


def test_at_equal_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=re.escape("got (2, 3) and (3,)")):
        probes.at_equal_loss(np.ones((2, 3)), np.ones(3), np.ones(1))
    with pytest.raises(ValueError, match=re.escape("(K,), got shape ()")):
        probes.at_equal_loss(np.ones(3), np.ones(3), 1.0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_dead_runs_end_at_chance_or_not_finite(wrap):
    chance = math.log(4)
    rng = np.random.default_rng(0)
    ends = [chance, chance - 0.1, chance + 3, 0.2, np.nan, np.inf]
    losses = chance + rng.normal(0, 0.03, (len(ends), 50))
    losses[:, 25:] += np.array(ends)[:, None] - chance
    dead = wrap(lambda x: is_dead(x, 4))(losses)
    assert dead.tolist() == [True, False, True, False, True, True]
    # The whole of a shorter curve, here still at chance; and stacks of stacks.
    dead = wrap(lambda x: is_dead(x, 4))(losses[:, :7].reshape(2, 3, 7))
    assert dead.shape == (2, 3) and np.all(dead)


def test_dead_is_judged_by_the_last_losses():
    losses = np.array([0.1, 0.1, 0.1, 1.38, 1.4])
    assert is_dead(losses, 4, num_last=2) and not is_dead(losses, 4, num_last=5)
    assert not is_dead(losses - 0.05, 4, num_last=2)
    assert is_dead(losses - 0.05, 4, num_last=2, tolerance=0.06)
    assert not is_dead(losses, 5, num_last=2)


def test_a_constant_classifier_of_rare_classes_is_dead():
    labels = jnp.array([0] * 18 + [1] * 2)
    # The best constant logits, the logarithms of the frequencies.
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.9, 0.1])), (20, 2))
    losses = jnp.full(5, cross_entropy(logits, labels))
    counts = np.bincount(labels)
    assert is_dead(losses, 2, class_counts=counts) and not is_dead(losses, 2)
    assert not is_dead(losses - 0.1, 2, class_counts=counts)
    assert is_dead(losses, 3, class_counts=[9, 0, 1])
    with pytest.raises(ValueError, match=re.escape("class_counts must be (3,)")):
        is_dead(losses, 3, class_counts=counts)


def test_dead_network_looks_predictive():
    def loss_fn(params, batch):
        logits = jax.nn.relu(batch["x"] @ params["kernel"]) @ params["head"]
        return cross_entropy(logits, batch["label"])

    params, batch = mlp()
    batch["x"] = jnp.abs(batch["x"])
    params = {"kernel": params["fc1"]["kernel"], "head": params["fc2"]["kernel"]}
    alive = probe_jitted(loss_fn, params, batch)
    assert min(gradient_predictiveness(alive)) > 0
    # All rectifiers off: the logits, zero, do not depend on the inputs.
    params["kernel"] = -jnp.abs(params["kernel"])
    probe = probe_jitted(loss_fn, params, batch)
    assert max(gradient_predictiveness(probe)) == effective_beta(probe) == 0
    assert is_dead(probe.losses, 5)


def test_numbers_out_of_range_are_refused():
    for settings, message in (
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 4, "num_last": 0}, "num_last must be at least 1, got 0"),
        ({"num_classes": 4, "tolerance": -1}, "tolerance must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            is_dead(np.ones(3), **settings)
    message = re.escape("losses must be (..., T), T > 0, got shape (2, 0)")
    with pytest.raises(ValueError, match=message):
        is_dead(np.ones((2, 0)), 4)


# Errors of the probe.


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda w, _: jnp.square(w), "float32 of shape (3,)"),
        (lambda w, _: jnp.sum(w).reshape(1), "float32 of shape (1,)"),
        (lambda w, _: jnp.sum(w > 0), "int32 of shape ()"),
        (lambda w, _: (jnp.sum(w), w), "a tuple"),
        (lambda w, _: None, "a NoneType"),
    ],
    ids=["vector", "one entry", "integer", "tuple", "nothing"],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_loss_that_is_no_scalar_is_refused(wrap, loss_fn, got):
    message = re.escape(f"loss_fn must return a floating-point scalar, got {got}.")
    probe = wrap(functools.partial(probe_gradient, loss_fn))
    with pytest.raises(ValueError, match=message):
        probe(jnp.ones(3), None, STEP_SIZES)


@pytest.mark.parametrize(
    ("step_sizes", "message"),
    [
        ([0.1, 0.0], "must be positive and finite, got [0.1"),
        ([-1, 2], "must be positive and finite, got [-1.0, 2.0]"),
        ([0.5, math.nan], "must be positive and finite, got [0.5, nan]"),
        ([math.inf], "must be positive and finite, got [inf]"),
        ([1e-60], "must be positive and finite, got [0.0]"),
        ([], "must be (S,), S > 0, got shape (0,)"),
        (0.5, "must be (S,), S > 0, got shape ()"),
        (np.ones((2, 3)), "must be (S,), S > 0, got shape (2, 3)"),
    ],
)
def test_step_sizes_out_of_range_are_refused(step_sizes, message):
    loss_fn, (params, batch), _ = quadratic()
    for wrap in (lambda f: f, jax.jit):
        # Closed over, the values are known under jit as well.
        probe = wrap(lambda p: probe_gradient(loss_fn, p, batch, step_sizes))
        with pytest.raises(ValueError, match=re.escape("step_sizes " + message)):
            probe(params)


@pytest.mark.parametrize("step_sizes", [[1, 2], (0.5, 0.25), np.float64([0.5, 0.25])])
def test_step_sizes_of_any_kind_are_taken(step_sizes):
    loss_fn, (params, batch), _ = quadratic()
    probe = probe_gradient(loss_fn, params, batch, step_sizes)
    expected = probe_gradient(loss_fn, params, batch, jnp.float32(step_sizes))
    chex.assert_trees_all_equal(probe, expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"w": jnp.ones(2)}, "step": jnp.array(3)}, "got int32 at 'step'"),
        ({"a": [jnp.ones(2), jnp.ones(3, bool)]}, "got bool at 'a/1'"),
        ({"w": jnp.ones(2, jnp.complex64)}, "got complex64 at 'w'"),
        (jnp.arange(3), "got int32 at ''"),
        ({"a": {}, "b": None}, "params contains no arrays"),
    ],
)
def test_parameters_without_gradients_are_refused(params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        probe_gradient(lambda params, _: jnp.float32(1), params, None, STEP_SIZES)


def test_key_among_the_parameters_is_refused():
    with pytest.raises(ValueError, match="got key<fry> at 'key'"):
        params = {"key": jax.random.key(0)}
        probe_gradient(lambda params, _: jnp.float32(1), params, None, STEP_SIZES)


def loss_with_an_edge(w, batch):
    """sqrt of a straight line that turns negative at eta > 1; w = (1,), slope 1."""
    del batch
    return jnp.sum(2 * jnp.sqrt(w))


def test_values_that_are_not_finite_are_named():
    # w - eta = 1 - eta: the loss is nan from eta = 1.5 on, the second step size.
    w = jnp.ones(1)
    with pytest.raises(ValueError, match="losses is nan at step size 1.5"):
        probe_gradient(loss_with_an_edge, w, None, STEP_SIZES)
    # At eta = 1 the loss is 0, and its slope infinite.
    with pytest.raises(ValueError, match="grad_distances is inf at step size 1"):
        probe_gradient(loss_with_an_edge, w, None, [0.25, 1.0])
    with pytest.raises(ValueError, match="loss is nan before any step"):
        probe_gradient(loss_with_an_edge, -w, None, STEP_SIZES)
    with pytest.raises(ValueError, match="grad_norm is inf before any step"):
        probe_gradient(loss_with_an_edge, 0 * w, None, STEP_SIZES)


def test_check_finite_names_the_probe_of_a_stack():
    def probe(w):
        return probe_gradient(loss_with_an_edge, w, None, STEP_SIZES)

    # The slope is 1 / sqrt(w): at w = 4 the steps reach 3.25 at the lowest.
    probe_one = jax.jit(probe)
    check_finite(probe_one(np.full(1, 4.0)))
    with pytest.raises(ValueError, match=re.escape("losses is nan at step size 1.5.")):
        check_finite(probe_one(np.ones(1)))
    probes = jax.jit(jax.vmap(probe))(np.array([[4.0], [5.0], [1.0], [6.0]]))
    with pytest.raises(ValueError, match="losses is nan at step size 1.5 of probe 2"):
        check_finite(probes)
    # Step sizes that the probes share.
    with pytest.raises(ValueError, match="losses is nan at step size 1.5 of probe 2"):
        check_finite(probes._replace(step_sizes=STEP_SIZES))
    grid = np.array([[4.0, 5.0, 6.0], [5.0, -1.0, 7.0]])[:, :, None]
    message = re.escape("loss is nan before any step of probe (1, 1)")
    with pytest.raises(ValueError, match=message):
        check_finite(jax.jit(jax.vmap(jax.vmap(probe)))(grid))


def test_traced_step_of_zero_shows_in_the_check():
    loss_fn, (params, batch), _ = quadratic()
    probe = probe_jitted(loss_fn, params, batch, np.array([0.1, 0.0]))
    with pytest.raises(ValueError, match="betas is (nan|inf) at step size 0"):
        check_finite(probe)


def test_gradients_whose_squares_float32_cannot_hold():
    loss_fn, (params, batch), _ = quadratic()

    def scaled_loss(params, batch):
        return batch["factor"] * loss_fn(params, batch)

    expected = probe_jitted(scaled_loss, params, batch | {"factor": 1.0})
    for factor in (1e-25, 1e22):
        found = probe_jitted(
            scaled_loss, params, batch | {"factor": factor}, STEP_SIZES / factor
        )
        np.testing.assert_allclose(
            found.grad_norm / factor, expected.grad_norm, rtol=1e-5
        )
        for name in ("cosines", "relative_grad_distances", "filter_distances"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5
            )
        change = consecutive_change(
            *[{"w": jnp.float32(factor * np.array(x))} for x in ([0, 1], [0, 1])],
            *[{"w": jnp.float32(factor * np.array(x))} for x in ([3, 5], [6, 9])],
        )
        np.testing.assert_allclose(change.step_norm / factor, 5, rtol=1e-5)
        np.testing.assert_allclose(change.beta, 2, rtol=1e-5)
