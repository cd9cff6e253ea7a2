"""Fitting a latent to one signal, and the meta loss through the fit.

The inner loop adapts the latent alone, weights fixed: CAVIA (Zintgraf et al. 2019,
arXiv 1810.03642), with learned rates per latent entry, Meta-SGD (Li et al. 2017, arXiv
1707.09835), as Functa (Dupont et al. 2022, arXiv 2201.12204, algorithm 1) does. The
outer gradient flows through all inner steps (second order) unless told otherwise.

Everything here is about one signal and knows no network: a `field` maps a latent to a
prediction of the signal, whatever its coordinates. `jax.vmap` makes batches.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

Field = Callable[[jax.Array], jax.Array]


class FitInfo(NamedTuple):
    """Losses along a fit of S steps; entry s is before step s, entry S after the last.

    Attributes:
      loss: mean squared error plus l2 penalty, (S + 1,).
      mse: mean squared error alone, (S + 1,).
    """

    loss: jax.Array
    mse: jax.Array


def reconstruction_loss(
    field: Field, latent: jax.Array, target: jax.Array, *, l2_weight: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """mean((field(latent) - target)^2) + l2_weight * sum(latent^2).

    Args:
      field: maps a latent to a prediction shaped like `target`.
      latent: (L,).
      target: the signal, any shape.
      l2_weight: weight of the penalty, not negative.

    Returns:
      The loss and the mean squared error alone, two scalars.
    """
    prediction = field(latent)
    chex.assert_equal_shape([prediction, target])
    mse = jnp.mean(jnp.square(prediction - target))
    return mse + l2_weight * jnp.sum(jnp.square(latent)), mse


def fit_latent(
    field: Field,
    latent: jax.Array,
    target: jax.Array,
    *,
    num_steps: int,
    learning_rate: float | jax.Array,
    l2_weight: float = 0.0,
    noise: jax.Array | None = None,
    first_order: bool = False,
    unroll: bool = True,
) -> tuple[jax.Array, FitInfo]:
    """Fits a latent to one signal by gradient descent: z <- z - learning_rate * dL/dz.

    Args:
      field: maps a latent to a prediction shaped like `target`.
      latent: start of the fit, (L,).
      target: the signal, any shape.
      num_steps: S, a Python int; 0 returns `latent` unchanged.
      learning_rate: scalar; (L,) for Meta-SGD; (S, 1) or (S, L) for rates per step.
      l2_weight: see `reconstruction_loss`.
      noise: (L,), added to the fitted latent before the last loss is taken, so that the
        weights learn to bear it; None adds nothing.
      first_order: treat each gradient as a constant when differentiating the result.
      unroll: a Python loop (the start, if shared, is then evaluated once under `vmap`)
        instead of `lax.scan` (compiles faster for many steps).

    Returns:
      The fitted latent (L,) and the losses of every step.

    Raises:
      ValueError: if `num_steps` is negative, or rates per step are not as many.
    """
    chex.assert_rank(latent, 1)
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}.")
    rates = jnp.asarray(learning_rate)
    chex.assert_rank(rates, {0, 1, 2})
    if rates.ndim == 2 and rates.shape[0] != num_steps:
        raise ValueError(
            f"learning_rate has rates for {rates.shape[0]} steps, num_steps is "
            f"{num_steps}."
        )
    if rates.ndim < 2:
        rates = jnp.broadcast_to(rates, (num_steps, *rates.shape))
    grad_fn = jax.value_and_grad(
        lambda z: reconstruction_loss(field, z, target, l2_weight=l2_weight),
        has_aux=True,
    )

    def step(z, rate):
        losses, grad = grad_fn(z)
        if first_order:
            grad = jax.lax.stop_gradient(grad)
        return z - rate * grad, losses

    if unroll:
        steps = []
        for rate in rates:
            latent, losses = step(latent, rate)
            steps.append(losses)
        before = [jnp.array(values) for values in zip(*steps, strict=True)]
    else:
        latent, before = jax.lax.scan(step, latent, rates)
    if noise is not None:
        latent = latent + noise
    last = reconstruction_loss(field, latent, target, l2_weight=l2_weight)
    if not num_steps:
        before = [jnp.zeros(0)] * 2
    return latent, FitInfo(*map(jnp.append, before, last))


def optimize_latent(
    field: Field,
    latent: jax.Array,
    target: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    l2_weight: float = 0.0,
) -> tuple[jax.Array, FitInfo]:
    """Fits a latent to one signal with any optax optimizer, for many steps.

    Not meant to be differentiated: a plain fit with the weights fixed, for what a
    latent can express beyond the few steps of the inner loop.

    Args:
      field: maps a latent to a prediction shaped like `target`.
      latent: start of the fit, (L,).
      target: the signal, any shape.
      optimizer: applied to the latent; `optax.lbfgs()` with its line search works too.
      num_steps: S, a Python int.
      l2_weight: see `reconstruction_loss`.

    Returns:
      The fitted latent (L,) and the losses of every step.
    """
    chex.assert_rank(latent, 1)
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_fn(z):
        return reconstruction_loss(field, z, target, l2_weight=l2_weight)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(carry, _):
        z, opt_state = carry
        losses, grad = grad_fn(z)
        # What a line search asks for; other optimizers pass it over.
        search = {"value": losses[0], "grad": grad, "value_fn": lambda z: loss_fn(z)[0]}
        updates, opt_state = optimizer.update(grad, opt_state, z, **search)
        return (optax.apply_updates(z, updates), opt_state), losses

    carry = latent, optimizer.init(latent)
    (latent, _), before = jax.lax.scan(step, carry, length=num_steps)
    return latent, FitInfo(*map(jnp.append, before, loss_fn(latent)))


def fit_batch(
    apply_fn: Callable[..., jax.Array],
    params: chex.ArrayTree,
    latent: jax.Array,
    coords: jax.Array,
    targets: jax.Array,
    *,
    noise: jax.Array | None = None,
    **options,
) -> tuple[jax.Array, FitInfo]:
    """Runs `fit_latent` on a batch of signals that share their coordinates.

    The outer loss of Functa is `info.loss[:, -1].mean()`, differentiated in `params`
    and in the learning rate.

    Args:
      apply_fn: `model.apply` of a modulated SIREN, or its like.
      params: weights, held fixed in the fit.
      latent: common start of all fits, (L,).
      coords: (..., d).
      targets: (B, ..., C).
      noise: (B, L) added to the fitted latents before the last loss, or None.
      **options: further keywords of `fit_latent`.

    Returns:
      Fitted latents (B, L) and losses (B, S + 1).
    """

    def fit(target, noise):
        def field(z):
            return apply_fn({"params": params}, coords, z)

        return fit_latent(field, latent, target, noise=noise, **options)

    return jax.vmap(fit)(targets, noise)
