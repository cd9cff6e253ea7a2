"""Fits of a latent against closed forms, and outer gradients against differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from functa import inner_loop
from functa.inner_loop import (
    fit_batch,
    fit_latent,
    meta_gradient,
    optimize_latent,
    reconstruction_loss,
)
from functa.siren import LatentModulatedSiren, coordinate_grid

pytestmark = pytest.mark.usefixtures("unoptimized")

TARGET = jnp.array([1.0, -2.0, 0.5])
START = jnp.array([0.25, 1.0, -1.5])
unrolled_or_scanned = pytest.mark.parametrize(
    "unroll", [True, False], ids=["unroll", "scan"]
)


def identity(latent):
    """The field whose loss is quadratic: its gradient is 2 (latent - target) / L."""
    return latent


def tiny_siren(grid=(3, 2), **kwargs):
    """(model, params, coords, start of the latent), all of them random."""
    sizes = {"width": 6, "depth": 3, "latent_dim": 4, "out_channels": 2, "omega_0": 5.0}
    model = LatentModulatedSiren(**(sizes | kwargs))
    coords = jnp.asarray(coordinate_grid(grid))
    latent = model.initial_latent()
    shapes = jax.eval_shape(model.init, jax.random.key(0), coords, latent)["params"]
    rng = np.random.default_rng(0)
    params, latent = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        (shapes, latent),
    )
    return model, params, coords, latent


def signal(model, coords, seed=0):
    """A random target in [0, 1] for the coordinates."""
    shape = (*coords.shape[:-1], model.out_channels)
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def test_reconstruction_loss_by_hand():
    loss, mse = reconstruction_loss(identity, START, TARGET, l2_weight=0.1)
    # Errors -0.75, 3, -2: squares 0.5625, 9, 4. Latent squares 0.0625, 1, 2.25.
    np.testing.assert_allclose(mse, 13.5625 / 3, rtol=1e-6)
    np.testing.assert_allclose(loss, 13.5625 / 3 + 0.33125, rtol=1e-6)


def test_prediction_of_the_wrong_shape_is_refused():
    message = r"predicts values of shape \(3,\).*target has the shape \(3, 1\)"
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(identity, START, TARGET[:, None])
    with pytest.raises(ValueError, match=message):
        jax.jit(
            lambda y: fit_latent(identity, START, y, num_steps=1, learning_rate=0.1)
        )(TARGET[:, None])


RATES = {
    "scalar": 0.3,
    "per_entry": np.array([0.1, 0.6, 0.3]),
    "per_step": np.array([[0.1], [0.2], [0.7], [0.4]]),
    "per_step_and_entry": np.linspace(0.1, 0.6, 12).reshape(4, 3),
}


@pytest.mark.slow_after(1)
@unrolled_or_scanned
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
def test_fit_matches_closed_form(rates, unroll):
    num_steps = 4
    fitted, info = fit_latent(
        identity,
        START,
        TARGET,
        num_steps=num_steps,
        learning_rate=rates if np.ndim(rates) == 0 else jnp.asarray(rates, jnp.float32),
        unroll=unroll,
    )
    # Each step contracts each entry's error by 1 - 2 rate / L.
    factors = np.broadcast_to(1 - 2 * np.asarray(rates) / 3, (num_steps, 3))
    factors = np.concatenate([np.ones((1, 3)), np.cumprod(factors, axis=0)])
    errors = factors * np.float64(START - TARGET)
    np.testing.assert_allclose(fitted, TARGET + errors[-1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(info.mse, np.mean(errors**2, axis=1), rtol=1e-5)
    chex.assert_trees_all_equal(info.loss, info.mse)


@unrolled_or_scanned
def test_l2_weight_matches_closed_form(unroll):
    num_steps, rate, l2_weight = 5, 0.2, 0.05
    fitted, info = fit_latent(
        identity,
        START,
        TARGET,
        num_steps=num_steps,
        learning_rate=rate,
        l2_weight=l2_weight,
        unroll=unroll,
    )
    # The optimum of mean((z - t)^2) + w sum(z^2) is t / (1 + L w), its curvature
    # 2 / L + 2 w in every direction.
    optimum = np.float64(TARGET) / (1 + 3 * l2_weight)
    factor = 1 - rate * (2 / 3 + 2 * l2_weight)
    path = [
        optimum + factor**step * (np.float64(START) - optimum)
        for step in range(num_steps + 1)
    ]
    mse = np.array([np.mean((z - np.float64(TARGET)) ** 2) for z in path])
    penalty = l2_weight * np.array([np.sum(z**2) for z in path])
    np.testing.assert_allclose(fitted, path[-1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(info.mse, mse, rtol=1e-5)
    np.testing.assert_allclose(info.loss, mse + penalty, rtol=1e-5)


@unrolled_or_scanned
def test_zero_steps_are_the_identity(unroll):
    fitted, info = fit_latent(
        identity, START, TARGET, num_steps=0, learning_rate=0.3, unroll=unroll
    )
    chex.assert_trees_all_equal(fitted, START)
    chex.assert_shape([info.loss, info.mse], (1,))
    expected = np.mean(np.square(START - TARGET))
    np.testing.assert_allclose(info.mse[0], expected, rtol=1e-6)


def test_noise_moves_the_fitted_latent_and_the_last_loss_only():
    noise = jnp.array([0.5, -0.25, 1.0])
    settings = {"num_steps": 3, "learning_rate": 0.3}
    clean, clean_info = fit_latent(identity, START, TARGET, **settings)
    noisy, info = fit_latent(identity, START, TARGET, **settings, noise=noise)
    chex.assert_trees_all_equal(noisy, clean + noise)
    chex.assert_trees_all_equal(info.mse[:-1], clean_info.mse[:-1])
    expected = np.mean(np.square(noisy - TARGET))
    np.testing.assert_allclose(info.mse[-1], expected, rtol=1e-6)


@pytest.mark.parametrize("num_rates", [2, 4])
def test_wrong_number_of_rates_per_step_is_refused(num_rates):
    rates = jnp.full((num_rates, 1), 0.1)
    with pytest.raises(ValueError, match=f"rates for {num_rates} steps"):
        fit_latent(identity, START, TARGET, num_steps=3, learning_rate=rates)


def test_scan_equals_unrolled_with_its_outer_gradient():
    weights = jnp.array([[0.5, -1.0, 0.25], [1.5, 0.75, -0.5]])
    rates = jnp.array([[0.1], [0.4], [0.2]])
    target = jnp.array([0.3, -0.8])

    def outer(weights, rates, unroll):
        fitted, info = fit_latent(
            lambda z: jnp.tanh(weights @ z),
            START,
            target,
            num_steps=3,
            learning_rate=rates,
            unroll=unroll,
        )
        return info.loss[-1], (fitted, info)

    grad_fn = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)
    grad_fn = jax.jit(grad_fn, static_argnames="unroll")
    # The same operations, fused differently: float32 rounding.
    chex.assert_trees_all_close(
        grad_fn(weights, rates, unroll=True),
        grad_fn(weights, rates, unroll=False),
        rtol=1e-5,
        atol=1e-6,
    )


GRID_RATES = {
    "scalar": 0.3,
    "per_entry": np.linspace(0.1, 0.9, 24).reshape(2, 3, 4),
    "per_step": np.array([[0.1], [0.5], [0.3]]),
    "per_step_and_channel": np.linspace(0.1, 0.8, 12).reshape(3, 4),
    "per_step_and_entry": np.linspace(0.1, 0.8, 72).reshape(3, 2, 3, 4),
}


@pytest.mark.slow_after(1)
@unrolled_or_scanned
@pytest.mark.parametrize("rates", GRID_RATES.values(), ids=GRID_RATES.keys())
def test_grid_of_latents_matches_closed_form_with_its_outer_gradient(rates, unroll):
    """The field (params + latent) is quadratic: each step contracts each error."""
    rng = np.random.default_rng(0)
    shape, num_signals, num_steps = (2, 3, 4), 2, 3
    offset, start = rng.normal(size=(2, *shape))
    targets = rng.normal(size=(num_signals, *shape))
    noise = rng.normal(size=(num_signals, *shape))
    size = offset.size
    (grad, rate_grad), info = meta_gradient(
        lambda variables, coords, latent: variables["params"] + latent,
        jnp.float32(offset),
        jnp.float32(start),
        jnp.zeros(()),
        jnp.float32(targets),
        learning_rate=jnp.asarray(rates, jnp.float32),
        noise=jnp.float32(noise),
        num_steps=num_steps,
        unroll=unroll,
    )
    per_step = rates
    if np.shape(rates) in ((), shape):
        per_step = np.broadcast_to(rates, (num_steps, *np.shape(rates)))
    factors = [
        1 - 2 / size * np.broadcast_to(per_step[step], shape)
        for step in range(num_steps)
    ]
    error = offset + start - targets
    expected = [np.mean(error**2, axis=(1, 2, 3))]
    for factor in factors:
        error = factor * error
        expected.append(np.mean(error**2, axis=(1, 2, 3)))
    contracted, error = error, error + noise
    expected[-1] = np.mean(error**2, axis=(1, 2, 3))
    np.testing.assert_allclose(info.mse, np.stack(expected, axis=1), rtol=1e-5)
    # d loss / d offset = 2 error prod(factors) / size, averaged over the signals.
    np.testing.assert_allclose(
        grad, np.mean(2 * error * np.prod(factors, axis=0) / size, 0), atol=1e-6
    )
    # d error / d rate_s = -2 / size * contracted / factor_s.
    by_step = np.stack(
        [
            np.mean(2 * error * -2 / size * contracted / factor / size, axis=0)
            for factor in factors
        ]
    )
    if np.shape(rates) == ():
        by_rate = by_step.sum()
    elif np.shape(rates) == shape:
        by_rate = by_step.sum(0)
    else:
        axes = tuple(range(1, 1 + by_step.ndim - np.ndim(rates)))
        by_rate = by_step.sum(axes)
        if np.shape(rates)[1:] == (1,):
            by_rate = by_rate.sum(-1, keepdims=True)
    np.testing.assert_allclose(rate_grad, by_rate, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rates_shape", [(4,), (3,), (3, 3), (3, 1, 2, 3, 4)])
def test_rates_that_do_not_fit_the_latent_are_refused(rates_shape):
    latent = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="learning_rate must have shape"):
        fit_latent(
            identity,
            latent,
            latent,
            num_steps=3,
            learning_rate=jnp.ones(rates_shape),
        )


def test_optimize_latent_fits_a_grid():
    start, target = np.random.default_rng(0).normal(size=(2, 2, 3, 4))
    fitted, info = optimize_latent(
        identity,
        jnp.float32(start),
        jnp.float32(target),
        optimizer=optax.sgd(3.0),
        num_steps=2,
    )
    factor = 1 - 2 * 3.0 / 24
    np.testing.assert_allclose(
        fitted, target + factor**2 * (start - target), rtol=1e-5, atol=1e-6
    )
    chex.assert_shape(info.mse, (3,))


def test_old_name_of_field_vjp_warns():
    with pytest.warns(DeprecationWarning, match="field_vjp"):
        assert inner_loop.evaluate is inner_loop.field_vjp


def test_first_order_matches_closed_form():
    w, start, target, rate = 1.5, 0.4, 2.0, 0.1

    def outer(w, rate, start, first_order):
        _, info = fit_latent(
            lambda z: w * z,
            start,
            jnp.array([target]),
            num_steps=1,
            learning_rate=rate,
            first_order=first_order,
        )
        return info.loss[-1]

    grad_fn = jax.value_and_grad(outer, argnums=(0, 1, 2))
    grad_fn = jax.jit(grad_fn, static_argnames="first_order")
    arguments = jnp.array(w), jnp.array(rate), jnp.array([start])
    first_loss, first = grad_fn(*arguments, first_order=True)
    second_loss, second = grad_fn(*arguments, first_order=False)
    chex.assert_trees_all_equal(first_loss, second_loss)

    # One step: z = start - rate * inner, inner = 2 w (w start - target).
    inner = 2 * w * (w * start - target)
    z = start - rate * inner
    residual = 2 * (w * z - target)
    through_step = residual * w * -rate * (4 * w * start - 2 * target)
    np.testing.assert_allclose(first[0], residual * z, rtol=1e-5)
    np.testing.assert_allclose(second[0], residual * z + through_step, rtol=1e-5)
    # The rate enters outside the inner gradient, the start both ways.
    np.testing.assert_allclose([first[1], second[1]], -residual * w * inner, rtol=1e-5)
    np.testing.assert_allclose(first[2][0], residual * w, rtol=1e-5)
    expected = residual * w * (1 - rate * 2 * w * w)
    np.testing.assert_allclose(second[2][0], expected, rtol=1e-5)


def test_second_order_gradient_matches_finite_differences():
    model, params, coords, latent = tiny_siren(modulate_scale=True)
    target = signal(model, coords)
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        point = {
            **params,
            "rates": rng.uniform(0.2, 0.8, size=(2, *model.latent_shape)),
            "start": latent,
        }
        point = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), point)
        x = jnp.asarray(coords, jnp.float64)
        y = jnp.asarray(target, jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def outer(point):
            params = {k: v for k, v in point.items() if k not in ("rates", "start")}
            _, info = fit_latent(
                lambda z: model.apply({"params": params}, x, z),
                point["start"],
                y,
                num_steps=2,
                learning_rate=point["rates"],
                l2_weight=0.01,
            )
            return info.loss[-1]

        value, grads = outer(point)
        assert value.dtype == jnp.float64
        leaves, treedef = jax.tree.flatten(point)
        grads = jax.tree.leaves_with_path(grads)
        epsilon = 1e-5
        for i, (path, grad) in enumerate(grads):
            direction = rng.normal(size=leaves[i].shape)

            def along(t, i=i, direction=direction):
                moved = [*leaves[:i], leaves[i] + t * direction, *leaves[i + 1 :]]
                return float(outer(treedef.unflatten(moved))[0])

            difference = (along(epsilon) - along(-epsilon)) / (2 * epsilon)
            # Truncation is O(epsilon^2) = 1e-10 and cancellation 1e-16 / epsilon =
            # 1e-11, times derivatives of up to order 100.
            np.testing.assert_allclose(
                np.sum(np.asarray(grad) * direction),
                difference,
                rtol=1e-6,
                atol=1e-8,
                err_msg=jax.tree_util.keystr(path),
            )


def test_signals_of_a_batch_do_not_touch_each_other():
    model, params, coords, latent = tiny_siren()
    targets = jnp.stack([signal(model, coords, seed) for seed in range(3)])
    noise = jnp.linspace(-0.2, 0.2, 3 * model.latent_dim).reshape(3, -1)
    options = {"num_steps": 2, "learning_rate": 0.5}

    @jax.jit
    def fit_all(targets):
        return fit_batch(
            model.apply, params, latent, coords, targets, noise=noise, **options
        )

    @jax.jit
    def fit_one(target, noise):
        return fit_latent(
            lambda z: model.apply({"params": params}, coords, z),
            latent,
            target,
            noise=noise,
            **options,
        )

    batch = fit_all(targets)
    alone = [fit_one(*pair) for pair in zip(targets, noise, strict=True)]
    alone = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    # Matrix products of a batch sum in another order: float32 rounding.
    chex.assert_trees_all_close(batch, alone, rtol=1e-4, atol=1e-6)

    other = fit_all(targets.at[1].add(0.5))
    assert not np.allclose(other[0][1], batch[0][1])
    for i in (0, 2):
        chex.assert_trees_all_equal(
            *[jax.tree.map(lambda leaf, i=i: leaf[i], x) for x in (other, batch)]
        )


@pytest.mark.parametrize(
    ("grid", "out_channels"),
    [((11,), 1), ((5, 4), 3), ((3, 4, 2), 1)],
    ids=["sound", "image", "voxels"],
)
def test_signals_of_every_dimension_are_fitted(grid, out_channels):
    model, params, coords, latent = tiny_siren(grid, out_channels=out_channels)
    target = signal(model, coords)

    @jax.jit
    def fit(params):
        return fit_latent(
            lambda z: model.apply({"params": params}, coords, z),
            latent,
            target,
            num_steps=5,
            learning_rate=0.05,
            unroll=False,
        )

    _, info = fit(params)
    chex.assert_shape([info.loss, info.mse], (6,))
    assert np.all(np.diff(info.mse) < 0), info.mse


def test_optimize_latent_with_sgd_equals_fit_latent():
    settings = {"num_steps": 4, "l2_weight": 0.05}
    by_fit = fit_latent(identity, START, TARGET, learning_rate=0.3, **settings)
    by_optax = optimize_latent(
        identity, START, TARGET, optimizer=optax.sgd(0.3), **settings
    )
    chex.assert_trees_all_close(by_optax, by_fit, rtol=1e-6)


def test_optimize_latent_keeps_the_state_of_its_optimizer():
    num_steps, rate, decay = 3, 0.1, 0.9
    fitted, info = optimize_latent(
        identity,
        START,
        TARGET,
        optimizer=optax.sgd(rate, momentum=decay),
        num_steps=num_steps,
    )
    z, trace = np.float64(START), 0.0
    for _ in range(num_steps):
        trace = decay * trace + 2 * (z - np.float64(TARGET)) / 3
        z = z - rate * trace
    np.testing.assert_allclose(fitted, z, rtol=1e-6)
    chex.assert_shape([info.loss, info.mse], (num_steps + 1,))


def test_optimize_latent_serves_a_line_search():
    # L-BFGS with its line search solves a quadratic in a few steps.
    fitted, info = optimize_latent(
        identity, START, TARGET, optimizer=optax.lbfgs(), num_steps=4
    )
    np.testing.assert_allclose(fitted, TARGET, atol=1e-4)
    assert info.mse[-1] < 1e-8 < info.mse[0]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((), {}),
        # The masks of a ReLU at the common start have no gradient.
        ((4,), {"unroll": False, "l2_weight": 0.1}),
        ((), {"first_order": True}),
    ],
)
def test_meta_gradient_is_that_of_the_mean_loss(sizes, options, num_groups):
    model, params, coords, latent = tiny_siren(layer_sizes=sizes)
    rates = jnp.array([[0.5], [0.3]])
    keys = jax.random.split(jax.random.key(1))
    targets = jax.random.uniform(keys[0], (6, *coords.shape[:-1], model.out_channels))
    noise = 0.1 * jax.random.normal(keys[1], (6, *model.latent_shape))
    fixed = {"num_steps": 2, "noise": noise, **options}

    def loss_fn(params, rates):
        def fit(target, noise):
            return fit_latent(
                lambda z: model.apply({"params": params}, coords, z),
                latent,
                target,
                learning_rate=rates,
                **fixed | {"noise": noise},
            )

        _, info = jax.vmap(fit)(targets, noise)
        return info.loss[:, -1].mean(), info

    expected = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=True))(params, rates)
    actual = jax.jit(
        lambda params, rates: meta_gradient(
            model.apply,
            params,
            latent,
            coords,
            targets,
            learning_rate=rates,
            num_groups=num_groups,
            **fixed,
        )
    )(params, rates)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_groups_that_do_not_divide_the_batch_are_refused():
    model, params, coords, latent = tiny_siren()
    targets = jnp.zeros((6, *coords.shape[:-1], model.out_channels))
    with pytest.raises(ValueError, match="must divide the batch of 6, got 4"):
        meta_gradient(
            model.apply,
            params,
            latent,
            coords,
            targets,
            learning_rate=0.1,
            num_steps=1,
            num_groups=4,
        )


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_targets_that_are_not_floating_point_are_refused(dtype):
    target = np.ones(3, dtype)
    message = f"target must be floating point, got {dtype}"
    with pytest.raises(ValueError, match=message):
        fit_latent(lambda z: z, jnp.zeros(3), target, num_steps=1, learning_rate=0.1)
    with pytest.raises(ValueError, match=message):
        optimize_latent(
            lambda z: z, jnp.zeros(3), target, optimizer=optax.sgd(0.1), num_steps=1
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@unrolled_or_scanned
def test_a_latent_keeps_its_type(dtype, unroll):
    target = jnp.asarray(TARGET, dtype)
    with jax.enable_x64(True):
        options = {"num_steps": 2, "learning_rate": np.full(3, 0.1), "unroll": unroll}
        latent, _ = fit_latent(identity, jnp.zeros(3, dtype), target, **options)
        model = LatentModulatedSiren(width=3, depth=2, latent_dim=4)
        inputs = jnp.zeros((5, 2)), model.initial_latent()
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert latent.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def two_devices(axis_type):
    return jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))


def on_two_devices(function):
    """The function of weights (all devices have the same) and of parts of signals."""
    return jax.jit(
        jax.shard_map(
            function,
            mesh=two_devices(jax.sharding.AxisType.Auto),
            in_specs=(jax.P(), jax.P("batch")),
            out_specs=jax.P("batch"),
        )
    )


def gradients(model, params, coords, latent, targets, **options):
    """Of the mean outer loss of this device, by `jax.grad` and by `meta_gradient`."""
    options |= {"num_steps": 2, "learning_rate": 0.3 * jnp.ones_like(latent)}
    fields = model.apply, params, latent, coords, targets
    (grads, _), _ = meta_gradient(*fields, **options)

    options.pop("num_groups", None)

    def loss(params):
        _, info = fit_batch(model.apply, params, *fields[2:], **options)
        return info.loss[:, -1].mean()

    return jax.grad(loss)(params), grads


def test_each_device_of_shard_map_fits_its_own_signals():
    # The default, check_vma, adds the gradients in a latent that is the same on all
    # devices over the devices, unless the latent is made to differ.
    model, params, coords, latent = tiny_siren(depth=2, width=3)
    targets = jnp.stack([signal(model, coords, seed) for seed in range(4)])

    def fit(params, targets):
        fields = model.apply, params, latent, coords, targets
        fitted, _ = fit_batch(*fields, num_steps=2, learning_rate=0.3)
        further, _ = optimize_latent(
            lambda z: model.apply({"params": params}, coords, z),
            latent,
            targets[0],
            optimizer=optax.sgd(0.3),
            num_steps=2,
        )
        return fitted, further[None]

    fitted, further = on_two_devices(fit)(params, targets)
    expected, _ = jax.jit(fit)(params, targets)
    np.testing.assert_allclose(fitted, expected, atol=1e-6)
    np.testing.assert_allclose(further, expected[::2], atol=1e-6)

    def of_both(params, targets):
        found = gradients(model, params, coords, latent, targets)
        # The gradient in weights that all devices share is the sum of theirs.
        return jax.tree.map(lambda x: x[None] / 2, found)

    found = on_two_devices(of_both)(params, targets)
    fields = model, params, coords, latent, targets
    [expected, _] = jax.jit(lambda: gradients(*fields))()
    for grads in jax.tree.map(lambda x: x[0], found):
        chex.assert_trees_all_close(grads, expected, atol=1e-6)


def test_signals_on_an_explicit_mesh():
    # The axes of a mesh of `jax.make_mesh` are explicit by default: the types of arrays
    # say how they are divided.
    model, params, coords, latent = tiny_siren(depth=2, width=3)
    targets = jnp.stack([signal(model, coords, seed) for seed in range(4)])

    @jax.jit
    def both(params, latent, targets):
        fields = model, params, coords, latent, targets
        return gradients(*fields, num_groups=2)

    expected = both(params, latent, targets)
    with jax.set_mesh(two_devices(jax.sharding.AxisType.Explicit)):
        fields = (params, latent, targets), (jax.P(), jax.P(), jax.P("batch"))
        actual = both(*jax.device_put(*fields))
    chex.assert_trees_all_close(actual, expected, atol=1e-6)


def test_a_start_that_all_devices_share_is_refused():
    def fit(latent, target):
        start = jax.vjp(identity, latent)
        options = {"num_steps": 1, "learning_rate": 1.0, "start": start}
        return fit_latent(identity, latent, target[0], **options)[0][None]

    with pytest.raises(ValueError, match="start was evaluated at a latent that is the"):
        on_two_devices(fit)(jnp.zeros(3), jnp.ones((2, 3)))
