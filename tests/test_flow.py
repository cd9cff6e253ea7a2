"""functa.flow against closed forms of Gaussians, and its guidance and labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functa import flow

pytestmark = pytest.mark.usefixtures("unoptimized")

MEAN, STD = jnp.array([0.7, -1.5, 0.0]), jnp.array([0.3, 1.0, 2.0])


def velocity_of_gaussian(x, time):
    """E[z - e | x_t = x] for z ~ N(MEAN, STD^2)."""
    time = time[:, None]
    variance = (time * STD[None]) ** 2 + (1 - time) ** 2
    slope = (time * STD[None] ** 2 - (1 - time)) / variance
    return MEAN[None] + slope * (x - time * MEAN[None])


def test_path_begins_with_the_noise_and_ends_with_the_latent():
    noise, latents = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2))
    x = flow.interpolate(noise, latents, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(x[0], noise[0], rtol=1e-6)
    np.testing.assert_allclose(
        x[1], 0.75 * noise[1] + 0.25 * latents[1], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(x[2], latents[2], rtol=1e-6)


def test_heun_is_of_second_order_on_a_gaussian(float64):
    noise = jnp.array([[0.5, -1.0, 2.0], [-0.1, 0.4, 1.0]], jnp.float64)
    # x_t = t m + sqrt((1 - t)^2 + t^2 s^2) e solves the equation.
    exact = MEAN[None] + STD[None] * noise
    errors = [
        np.abs(flow.sample(velocity_of_gaussian, noise, num_steps=n) - exact).max()
        for n in (20, 40, 80)
    ]
    order = np.log2(np.array(errors[:-1]) / errors[1:])
    # The first steps see a curvature of third order; 2 is reached from above or below.
    np.testing.assert_allclose(order, 2, atol=0.2)


def test_one_step_is_written_out():
    x, slopes = jnp.ones((1, 1)), {0.0: 2.0, 1.0: 10.0}

    def velocity(x, time):
        # At the end the point is that of an Euler step.
        assert time.shape == (1,)
        return jnp.where(time[:, None] == 0, slopes[0.0], slopes[1.0]) * x

    end = flow.sample(velocity, x, num_steps=1)
    assert end.item() == pytest.approx(1 + (2 + 10 * (1 + 2)) / 2)


def test_loss_of_the_best_velocity_is_the_variance_that_is_left():
    keys = jax.random.split(jax.random.key(0), 3)
    latents = MEAN[None] + STD[None] * jax.random.normal(keys[0], (20000, 3))
    loss = np.asarray(flow.flow_loss(keys[1], velocity_of_gaussian, latents))
    # Var(z - e | x_t) = s^2 / (t^2 s^2 + (1 - t)^2), with t = sigmoid(N(0, 1)).
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    time = 1 / (1 + np.exp(-nodes))[:, None]
    variance = np.square(STD)[None]
    left = variance / (time**2 * variance + (1 - time) ** 2)
    expected = (weights @ left / weights.sum()).mean()
    error = loss.std() / np.sqrt(len(loss))
    assert abs(loss.mean() - expected) < 4 * error
    # Every other velocity is worse, by the square of the difference.
    worse = flow.flow_loss(
        keys[2], lambda x, time: velocity_of_gaussian(x, time) + 0.5, latents
    )
    assert abs(worse.mean() - expected - 0.25) < 4 * error


@pytest.fixture(scope="module")
def correlated():
    """Latents of three classes, the last with a single latent, and their labels."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(2, 6, 6))
    latents = np.concatenate(
        [
            1.5 * number + rng.normal(size=(40, 6)) @ matrix
            for number, matrix in enumerate(mixing)
        ]
    )
    latents = np.concatenate([latents, rng.normal(size=(1, 6))]).reshape(-1, 2, 3)
    return latents, np.repeat([0, 1, 2], [40, 40, 1])


def moments(latents):
    flat = latents.reshape(len(latents), -1)
    return flat.mean(0), np.cov(flat, rowvar=False)


def test_velocity_of_gaussians_with_whole_covariances(correlated):
    latents, labels = correlated
    gaussians = flow.fit_gaussians(latents, labels, 3)
    asked = np.array([0, 1, 2, 3, 1])
    # A class of one latent, and the label of no class, have the Gaussian of all.
    sets = [latents[labels == 0], latents[labels == 1], latents, latents]
    x = np.random.default_rng(1).normal(size=(5, 2, 3))
    times = np.array([0.0, 0.3, 0.7, 1.0, 0.95])
    velocity = flow.gaussian_velocity(gaussians, jnp.asarray(asked))
    found = velocity(jnp.float32(x), jnp.float32(times))
    assert found.shape == x.shape
    for value, row, label, t in zip(found, x, asked, times, strict=True):
        mean, covariance = moments(sets[label])
        # E[z - e | x_t] = m + Cov(z - e, x_t) Cov(x_t)^-1 (x_t - t m).
        cross = t * covariance - (1 - t) * np.eye(6)
        total = t**2 * covariance + (1 - t) ** 2 * np.eye(6)
        expected = mean + cross @ np.linalg.solve(total, row.ravel() - t * mean)
        np.testing.assert_allclose(value.ravel(), expected, rtol=2e-3, atol=2e-3)


def test_latents_of_no_class_belong_to_the_gaussian_of_all(correlated):
    latents, labels = correlated
    expected = flow.fit_gaussians(latents, labels, 3)
    found = flow.fit_gaussians(latents, np.where(labels == 1, 3, labels), 3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.delete(one, 1, 0), np.delete(other, 1, 0))
        np.testing.assert_array_equal(one[1], other[3])
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"labels must be from 0 to 3, .*{wrong}"):
            flow.fit_gaussians(latents, np.where(labels == 1, wrong, labels), 3)


def test_flow_of_gaussians_ends_on_samples_of_them(correlated):
    latents, labels = correlated
    gaussians = flow.fit_gaussians(latents, labels, 3)
    noise = np.random.default_rng(2).normal(size=(2, 2, 3))
    velocity = flow.gaussian_velocity(gaussians, jnp.array([0, 1]))
    ends = flow.sample(velocity, jnp.float32(noise), num_steps=400)
    for end, start, number in zip(ends, noise, (0, 1), strict=True):
        mean, covariance = moments(latents[labels == number])
        variance, axes = np.linalg.eigh(covariance)
        root = (axes * np.sqrt(np.maximum(variance, 0))) @ axes.T
        np.testing.assert_allclose(
            end.ravel(), mean + root @ start.ravel(), rtol=0.01, atol=0.01
        )


def test_latents_on_a_plane_have_a_finite_velocity():
    latents = np.random.default_rng(0).normal(size=(3, 8))
    gaussians = flow.fit_gaussians(latents, np.zeros(3), 1)
    velocity = flow.gaussian_velocity(gaussians, jnp.zeros(1, jnp.int32))
    for time in (0.0, 1.0):
        assert np.isfinite(velocity(jnp.ones((1, 8)), jnp.array([time]))).all()
    with pytest.raises(ValueError, match="at least two latents, got 1"):
        flow.fit_gaussians(latents[:1], np.zeros(1), 1)


def test_loss_of_no_velocity_is_two():
    keys = jax.random.split(jax.random.key(1))
    latents = jax.random.normal(keys[0], (4000, 2, 2, 3))
    loss = flow.flow_loss(keys[1], lambda x, time: jnp.zeros_like(x), latents)
    assert loss.shape == (4000,)
    loss = np.asarray(loss)
    assert abs(loss.mean() - 2) < 4 * loss.std() / np.sqrt(4000)


def test_labels_are_dropped_at_the_rate():
    labels = jnp.arange(10000) % 7
    kept = flow.drop_labels(jax.random.key(0), labels, 7, 0.2)
    dropped = np.asarray(kept == 7)
    assert abs(dropped.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 10000)
    np.testing.assert_array_equal(kept[~dropped], labels[~dropped])
    keys = jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(flow.drop_labels(keys[0], labels, 7, 0.0), labels)
    assert (flow.drop_labels(keys[1], labels, 7, 1.0) == 7).all()


@pytest.mark.parametrize("weight", [0.0, 1, 1.0, 2.5])
def test_guidance_moves_from_no_class_through_the_class(weight):
    calls = []

    def velocity(x, time, labels):
        calls.append(len(x))
        return x * (1.0 + labels[:, None]) + time[:, None]

    x, time = jnp.array([[1.0], [2.0]]), jnp.array([0.5, 0.25])
    labels, null = jnp.array([0, 2]), 3
    guided = flow.guide(velocity, labels, null, weight)(x, time)
    of_class, of_all = np.array([1.5, 6.25]), np.array([4.5, 8.25])
    np.testing.assert_allclose(guided[:, 0], of_all + weight * (of_class - of_all))
    assert calls == [2 if weight == 1 else 4]
    traced = jax.jit(lambda weight: flow.guide(velocity, labels, null, weight)(x, time))
    np.testing.assert_allclose(traced(weight), guided, rtol=1e-6)


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        flow.sample(lambda x, time: x, jnp.zeros((1, 2)), num_steps=0)
