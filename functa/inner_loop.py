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
# What `jax.vjp(field, latent)` returns: the prediction, and the map of its cotangent to
# the latent's. A pytree, so that gradients may flow through it too.
Evaluation = tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]


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
    return _loss(field(latent), latent, target, l2_weight)


def _loss(prediction, latent, target, l2_weight):
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
    start: Evaluation | None = None,
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
      unroll: a Python loop instead of `lax.scan` (compiles faster for many steps).
      start: `jax.vjp(field, latent)`, if many fits share it; the first step then does
        not evaluate the field.

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
    grad_fn = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)

    def step(z, rate, evaluation=None):
        prediction, pullback = evaluation or jax.vjp(field, z)
        losses, (cotangent, grad) = grad_fn(prediction, z, target, l2_weight)
        grad = grad + pullback(cotangent)[0]
        if first_order:
            grad = jax.lax.stop_gradient(grad)
        return z - rate * grad, losses

    steps = []
    for rate in rates if unroll else rates[: start is not None]:
        latent, losses = step(latent, rate, None if steps else start)
        steps.append(losses)
    before = [jnp.array(values) for values in zip(*steps, strict=True)]
    before = before or [jnp.zeros(0)] * 2
    if len(steps) < num_steps:
        latent, later = jax.lax.scan(step, latent, rates[len(steps) :])
        before = map(jnp.append, before, later)
    if noise is not None:
        latent = latent + noise
    last = reconstruction_loss(field, latent, target, l2_weight=l2_weight)
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
    start: Evaluation | None = None,
    **options,
) -> tuple[jax.Array, FitInfo]:
    """Runs `fit_latent` on a batch of signals that share their coordinates.

    The outer loss of Functa is `info.loss[:, -1].mean()`; `meta_gradient` is that and
    its gradient.

    Args:
      apply_fn: `model.apply` of a modulated SIREN, or its like.
      params: weights, held fixed in the fit.
      latent: common start of all fits, (L,).
      coords: (..., d).
      targets: (B, ..., C).
      noise: (B, L) added to the fitted latents before the last loss, or None.
      start: `evaluate` of the common start, if more batches share it.
      **options: further keywords of `fit_latent`.

    Returns:
      Fitted latents (B, L) and losses (B, S + 1).
    """
    if start is None:
        start = evaluate(apply_fn, params, latent, coords)

    def field(z):
        return apply_fn({"params": params}, coords, z)

    def fit(target, noise):
        return fit_latent(field, latent, target, noise=noise, start=start, **options)

    return jax.vmap(fit)(targets, noise)


def evaluate(
    apply_fn: Callable[..., jax.Array],
    params: chex.ArrayTree,
    latent: jax.Array,
    coords: jax.Array,
) -> Evaluation:
    """The field at a latent that many fits start from, for them to share."""
    return jax.vjp(lambda z: apply_fn({"params": params}, coords, z), latent)


def meta_gradient(
    apply_fn: Callable[..., jax.Array],
    params: chex.ArrayTree,
    latent: jax.Array,
    coords: jax.Array,
    targets: jax.Array,
    *,
    learning_rate: jax.Array,
    noise: jax.Array | None = None,
    num_groups: int = 1,
    **options,
) -> tuple[tuple[chex.ArrayTree, jax.Array], FitInfo]:
    """Gradient of the outer loss, the mean over a batch of the losses after the fits.

    The batch is worked through in groups, one after the other: memory is that of one
    group, and on a CPU a group that fits the cache takes less time. What all fits have
    in common, the field at their start, is computed and differentiated once.

    Args:
      apply_fn: `model.apply` of a modulated SIREN, or its like.
      params: weights, which the gradient is taken in.
      latent: common start of all fits, (L,).
      coords: (..., d).
      targets: (B, ..., C). Group g holds the signals g, g + num_groups, ..., so that
        each group is spread over devices as the batch is.
      learning_rate: as in `fit_latent`; the gradient is taken in it too.
      noise: (B, L) added to the fitted latents before the last loss, or None.
      num_groups: a divisor of B.
      **options: further keywords of `fit_latent`.

    Returns:
      Gradients in `params` and in `learning_rate`; the losses (B, S + 1).

    Raises:
      ValueError: if `num_groups` does not divide B.
    """
    batch_size = len(targets)
    if num_groups < 1 or batch_size % num_groups:
        raise ValueError(
            f"num_groups must divide the batch of {batch_size}, got {num_groups}."
        )

    def start_from(params):
        # Masks of a ReLU, say, have no gradient.
        return _split_floats(evaluate(apply_fn, params, latent, coords))

    def loss_fn(params, learning_rate, start, targets, noise):
        _, info = fit_batch(
            apply_fn,
            params,
            latent,
            coords,
            targets,
            learning_rate=learning_rate,
            noise=noise,
            start=_join(start, masks),
            **options,
        )
        return jnp.sum(info.loss[:, -1]) / batch_size, info

    start, pull_back_start, masks = jax.vjp(start_from, params, has_aux=True)
    grad_fn = jax.grad(loss_fn, argnums=(0, 1, 2), has_aux=True)

    def add_group(grads, group):
        group_grads, info = grad_fn(params, learning_rate, start, *group)
        return jax.tree.map(jnp.add, grads, group_grads), info

    groups = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, num_groups, *x.shape[1:]), 1, 0),
        (targets, noise),
    )
    zeros = jax.tree.map(jnp.zeros_like, (params, learning_rate, start))
    (grads, rate_grads, start_grads), info = jax.lax.scan(add_group, zeros, groups)
    [through_start] = pull_back_start(start_grads)
    grads = jax.tree.map(jnp.add, grads, through_start)
    info = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch_size, *x.shape[2:]), info
    )
    return (grads, rate_grads), info


def _split_floats(tree):
    """A tree as two, of its floating-point leaves and of the others; else None."""

    def is_float(x):
        return jnp.issubdtype(x.dtype, jnp.floating)

    floats = jax.tree.map(lambda x: x if is_float(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, tree)


def _join(floats, others):
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, others, is_leaf=lambda x: x is None
    )
