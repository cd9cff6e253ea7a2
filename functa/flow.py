"""Rectified flow: an ordinary differential equation that turns noise into latents.

Sources: Liu et al. 2023 (arXiv 2209.03003) and Lipman et al. 2023 (arXiv 2210.02747).
Noise e ~ N(0, I) and a latent z are joined by a straight path,

  x_t = (1 - t) e + t z,   dx_t / dt = z - e,   t from 0 to 1.

A network v(x, t) is fitted to z - e by least squares. Its optimum is the mean velocity
E[z - e | x_t = x], and the solution of dx / dt = v(x, t) has the distribution of x_t at
all times. A sample is the solution at t = 1 that starts from noise. Times of training
are logit-normal (Esser et al. 2024, arXiv 2403.03206). Labels are dropped in training
and classes amplified in sampling as in Ho and Salimans 2022 (arXiv 2207.12598).

The velocity of Gaussian latents is known in closed form (`gaussian_velocity`), and that
of other latents is close to it where there is much noise (Wang and Vastola 2024, arXiv
2412.09726). A network that is added to it has only the difference to learn.

Latents should have zero mean and unit variance.

Axes: B latents, *Z shape of a latent, D its number of entries, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

# (x (B, *Z), time (B,)) -> velocity (B, *Z).
Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def interpolate(noise: jax.Array, latents: jax.Array, time: jax.Array) -> jax.Array:
    """Computes x_t = (1 - t) noise + t latents.

    Args:
      noise: (B, *Z).
      latents: (B, *Z).
      time: t of each latent, in [0, 1], (B,).

    Returns:
      (B, *Z).
    """
    chex.assert_equal_shape([noise, latents])
    chex.assert_shape(time, noise.shape[:1])
    time = time.reshape(-1, *[1] * (noise.ndim - 1))
    return (1 - time) * noise + time * latents


def flow_loss(key: jax.Array, velocity: Velocity, latents: jax.Array) -> jax.Array:
    """The squared error of the velocity at a random time of each latent.

    Args:
      key: PRNG key of the times and the noise.
      velocity: the network.
      latents: normalized latents, (B, *Z).

    Returns:
      The mean over the entries of each latent, (B,). The velocity zero has a loss of 2.

    Example:
      >>> import jax
      >>> from functa.flow import flow_loss
      >>> latents = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
      >>> flow_loss(jax.random.key(1), lambda x, time: 0 * x, latents).shape
      (4,)
    """
    latents = jnp.asarray(latents)
    key_time, key_noise = jax.random.split(key)
    time = jax.random.normal(key_time, latents.shape[:1], latents.dtype)
    time = jax.nn.sigmoid(time)
    noise = jax.random.normal(key_noise, latents.shape, latents.dtype)
    error = velocity(interpolate(noise, latents, time), time) - (latents - noise)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, latents.ndim)))


class Gaussians(NamedTuple):
    """The Gaussians of K classes of latents, and of all latents as number K.

    Attributes:
      mean: (K + 1, D).
      variance: along the principal axes, (K + 1, D).
      axes: the principal axes as columns, (K + 1, D, D).
    """

    mean: jax.Array
    variance: jax.Array
    axes: jax.Array


def fit_gaussians(
    latents: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    min_variance: float = 1e-4,
) -> Gaussians:
    """Means and covariances of the latents of each class, and of all latents.

    Args:
      latents: normalized latents, (N, *Z).
      labels: integers from 0 to K, (N,); K means no class.
      num_classes: K. Label K and a class of fewer than two latents have the
        Gaussian of all.
      min_variance: smaller variances are raised to it, because the velocity would be
        infinite at t = 1.

    Returns:
      The Gaussians of the K classes, and of all latents at index K.

    Raises:
      ValueError: if there are fewer than two latents, or a label is out of range.

    Example:
      >>> import numpy as np
      >>> from functa.flow import fit_gaussians
      >>> latents = np.random.default_rng(0).normal(size=(20, 2, 2, 3))
      >>> fit_gaussians(latents, np.arange(20) % 4, 4).axes.shape
      (5, 12, 12)
    """
    if len(latents) < 2:
        raise ValueError(f"a Gaussian needs at least two latents, got {len(latents)}.")
    labels = np.asarray(labels)
    if labels.min() < 0 or labels.max() > num_classes:
        raise ValueError(
            f"labels must be from 0 to {num_classes}, got {labels.min()} to "
            f"{labels.max()}."
        )
    flat = np.float64(latents).reshape(len(latents), -1)
    means, variances, axes = [], [], []
    for number in range(num_classes + 1):
        values = flat[labels == number]
        values = values if number < num_classes and len(values) > 1 else flat
        centered = values - values.mean(0)
        covariance = centered.T @ centered / (len(values) - 1)
        variance, vectors = np.linalg.eigh(covariance)
        means.append(values.mean(0))
        variances.append(np.maximum(variance, min_variance))
        axes.append(vectors)
    return Gaussians(*(jnp.float32(x) for x in (means, variances, axes)))


def gaussian_velocity(gaussians: Gaussians, labels: jax.Array) -> Velocity:
    """The velocity E[z - e | x_t = x] of latents z that are Gaussian in each class.

    Along a principal axis with mean m and variance s it is

      m + (t s - (1 - t)) / (t^2 s + (1 - t)^2) (x - t m).

    Args:
      gaussians: those of the classes.
      labels: the class of each latent, or K for all latents, (B,).

    Returns:
      The velocity as a function of x and time.

    Example:
      Its solution has the variance of the latents:

      >>> import numpy as np, jax.numpy as jnp
      >>> from functa.flow import fit_gaussians, gaussian_velocity, sample
      >>> latents = np.random.default_rng(0).normal(size=(1000, 1)) * 0.5
      >>> gaussians = fit_gaussians(latents, np.zeros(1000), 1)
      >>> velocity = gaussian_velocity(gaussians, jnp.zeros(3, jnp.int32))
      >>> end = sample(velocity, jnp.array([[-1.0], [0.0], [1.0]]), num_steps=50)
      >>> print(f"{np.std(latents):.2f} {float(end[2, 0] - end[1, 0]):.2f}")
      0.49 0.49
    """
    mean = gaussians.mean[labels]
    # The products with the axes of all classes need less memory than those of a latent.
    of_label = jax.nn.one_hot(labels, len(gaussians.mean), dtype=mean.dtype)
    of_label = of_label[..., None]  # (B, K + 1, 1)

    def velocity(x, time):
        flat, time = x.reshape(len(x), -1), time[:, None]
        variance = gaussians.variance[None]
        along = jnp.einsum("bd,kde->bke", flat - time * mean, gaussians.axes)
        time = time[..., None]
        slope = time * variance - (1 - time)
        slope = slope / (time**2 * variance + (1 - time) ** 2) * of_label
        back = jnp.einsum("bke,kde->bd", slope * along, gaussians.axes)
        return (mean + back).reshape(x.shape)

    return velocity


def drop_labels(
    key: jax.Array, labels: jax.Array, null_label: int, rate: float
) -> jax.Array:
    """Replaces labels at random, so that one network also learns the flow without them.

    Args:
      key: draws the labels that are replaced.
      labels: integers, (B,).
      null_label: the label of no class, usually the number of classes.
      rate: probability of a replacement, in [0, 1].

    Returns:
      The labels, (B,).
    """
    dropped = jax.random.bernoulli(key, rate, labels.shape)
    return jnp.where(dropped, null_label, labels)


def guide(
    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    labels: jax.Array,
    null_label: int,
    weight: float,
) -> Velocity:
    """The velocity v_0 + weight (v_y - v_0) of classifier-free guidance.

    Args:
      velocity: (x (B, *Z), time (B,), labels (B,)) -> (B, *Z).
      labels: the class y of each latent, (B,).
      null_label: the label of v_0, which `drop_labels` set in training.
      weight: 1 samples the classes; more makes samples more typical and less varied.
        It may be traced.

    Returns:
      The velocity as a function of x and time. If the weight is the number 1 it
      evaluates the network once, otherwise for both labels in one batch.
    """
    if not isinstance(weight, jax.core.Tracer) and weight == 1:
        return lambda x, time: velocity(x, time, labels)
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def guided(x, time):
        x, time = (jnp.concatenate([value, value]) for value in (x, time))
        of_class, of_all = jnp.split(velocity(x, time, both), 2)
        return of_all + weight * (of_class - of_all)

    return guided


def sample(velocity: Velocity, noise: jax.Array, *, num_steps: int) -> jax.Array:
    """Solves dx / dt = v(x, t) from t = 0 to 1 by Heun's method, in equal steps.

    Args:
      velocity: the network; it is evaluated twice in a step.
      noise: x at t = 0, (B, *Z).
      num_steps: number of steps, at least 1.

    Returns:
      x at t = 1, (B, *Z).

    Raises:
      ValueError: if there is no step.

    Example:
      A flow towards a single point ends on it:

      >>> import jax.numpy as jnp
      >>> from functa.flow import sample
      >>> point = jnp.array([[1.0, 2.0]])
      >>> end = sample(lambda x, time: point - 0 * x, 0 * point, num_steps=3)
      >>> print(end)
      [[1. 2.]]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}.")
    size = 1 / num_steps

    def step(x, number):
        start, end = (
            jnp.full(len(x), time * size, x.dtype) for time in (number, number + 1)
        )
        slope = velocity(x, start)
        corrected = velocity(x + size * slope, end)
        return x + size / 2 * (slope + corrected), None

    return jax.lax.scan(step, noise, jnp.arange(num_steps))[0]
