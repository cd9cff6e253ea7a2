"""The outer loss with labels: a task trains the field through the fitted latents.

The inner loop reconstructs a signal and sees no label. The outer loss adds the loss of
a task on the fitted latents, such as the cross-entropy of a classifier. Its gradient
passes through all inner steps (second order) into the weights and the learning rates.
The network thus learns to put into the latents what the task needs.

Sources: MWT (Gielisse and van Gemert 2025, arXiv 2503.18123) trains a field and a
classifier of its weights end to end. MetaLF does so for latents and divides each loss
by its own value.

Axes: B batch, (*Z) shape of a latent, S steps, d coordinates of a point, C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from functa import inner_loop
from functa.varying import vary_latent

# (latents (B, *Z), labels: a tree (B, ...)) -> losses (B,), other values: (B, ...).
TaskLoss = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class JointInfo(NamedTuple):
    """The parts of the outer loss with labels.

    Attributes:
      latents: fitted latents, (B, *Z).
      fit: losses of the inner loop, (B, S + 1).
      task_loss: (B,).
      aux: the other values of the task loss, (B, ...).
    """

    latents: jax.Array
    fit: inner_loop.FitInfo
    task_loss: jax.Array
    aux: Any


def normalized_sum(losses: Sequence[jax.Array], weights: Sequence[float]) -> jax.Array:
    """sum_i w_i L_i / sg(L_i), where sg stops the gradient (MetaLF).

    The value is the sum of the weights, and the gradient is sum_i w_i grad log L_i. The
    gradient does not depend on the scales of the losses, so that no weights are needed
    to balance them.

    Args:
      losses: positive scalars. A loss of zero has no gradient.
      weights: one weight per loss, >= 0, a number or traced. A loss whose weight is the
        number 0 is left out.

    Returns:
      A scalar.

    Example:
      >>> import jax
      >>> from functa.joint import normalized_sum
      >>> loss = lambda x: normalized_sum([3 * x**2, 500 * x], [1.0, 2.0])
      >>> x = 4.0  # The gradient is 2 / x + 2 * 1 / x.
      >>> print(loss(x), jax.grad(loss)(x))
      3.0 1.0
    """
    total = jnp.zeros(())
    for loss, weight in zip(losses, weights, strict=True):
        if not _is_number_zero(weight):
            scale = jax.lax.stop_gradient(loss)
            tiny = jnp.finfo(jnp.result_type(loss)).tiny
            total += weight * loss / jnp.maximum(scale, tiny)
    return total


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns x, with another gradient.

    Args:
      x: any shape.
      factor: multiplies the gradient, a number or traced; at 0 no gradient passes.
    """
    stopped = jax.lax.stop_gradient(x)
    return stopped if _is_number_zero(factor) else stopped + factor * (x - stopped)


def _is_number_zero(weight):
    """Whether it is known to be 0 when the function is traced."""
    return not isinstance(weight, jax.core.Tracer) and weight == 0


def joint_loss(
    apply_fn: Callable[..., jax.Array],
    params: chex.ArrayTree,
    latent: jax.Array,
    coords: jax.Array,
    targets: jax.Array,
    task_loss: TaskLoss,
    labels: Any,
    *,
    reconstruction_weight: float = 1.0,
    label_weight: float = 1.0,
    normalize: bool = True,
    num_groups: int = 1,
    **options,
) -> tuple[jax.Array, JointInfo]:
    """Computes the outer loss of reconstruction and of a task on the fitted latents.

        w_rec L_rec / sg(L_rec) + L_task / sg(L_task)

    L_rec is the mean reconstruction loss after the inner loop, L_task the mean loss of
    the task; both are means over the whole batch. The gradient of L_task is multiplied
    by `label_weight` where it enters the latents. The weight thus acts on the network
    of the fields only; the gradient of the network of the task does not depend on it.

    This differs from MetaLF: the source has no weights, and the weight of MWT (0.01)
    belongs to a sum of losses that are not divided.

    Args:
      apply_fn: see `functa.fit_batch`.
      params: weights of the network of the fields.
      latent: initial latent of every fit, (*Z).
      coords: (..., d).
      targets: signals, (B, ..., C).
      task_loss: maps latents (B', *Z) and the labels of their signals to losses (B',)
        and a tree of other values (B', ...). B' is B / num_groups.
      labels: tree of arrays (B, ...).
      reconstruction_weight: w_rec >= 0; at 0 only labels train the network. Both
        weights may be traced, for schedules.
      label_weight: at 0 no label reaches the network of the fields.
      normalize: whether the losses are divided by their values.
      num_groups: number of parts of the batch that are computed one after the other, a
        divisor of B. Memory is needed for one part; each is computed twice. Group g
        holds the signals g, g + num_groups, ..., as in `functa.meta_gradient`.
      **options: other keywords of `functa.fit_latent`, such as `learning_rate`.

    Returns:
      The loss, a scalar, and its parts.

    Raises:
      ValueError: if `num_groups` does not divide B.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functa import LatentModulatedSiren, coordinate_grid
      >>> from functa.joint import joint_loss
      >>> model = LatentModulatedSiren(width=8, depth=3, latent_dim=4)
      >>> coords, latent = coordinate_grid((6, 5)), model.initial_latent()
      >>> params = model.init(jax.random.key(0), coords, latent)["params"]
      >>> def task_loss(latents, labels):
      ...     return jnp.square(latents.sum(-1) - labels), None
      >>> loss, info = joint_loss(
      ...     model.apply, params, latent, coords, jnp.zeros((2, 6, 5, 3)),
      ...     task_loss, jnp.arange(2.0), num_steps=3, learning_rate=0.1,
      ... )
      >>> print(loss)
      2.0
      >>> info.latents.shape, info.task_loss.shape
      ((2, 4), (2,))
    """
    batch_size = len(targets)
    if num_groups < 1 or batch_size % num_groups:
        raise ValueError(
            f"num_groups must divide the batch of {batch_size}, got {num_groups}."
        )

    def field(z):
        return apply_fn({"params": params}, coords, z)

    latent = vary_latent(field, latent, targets, options)
    start = inner_loop.field_vjp(apply_fn, params, latent, coords, num_fits=batch_size)

    def compute(group):
        targets, labels = group
        latents, fit = inner_loop.fit_batch(
            apply_fn, params, latent, coords, targets, start=start, **options
        )
        losses, aux = task_loss(scale_gradient(latents, label_weight), labels)
        return JointInfo(latents, fit, losses, aux)

    if num_groups == 1:
        info = compute((targets, labels))
    else:
        groups = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, num_groups, *x.shape[1:]), 1, 0),
            (targets, labels),
        )
        # The losses of all groups are needed before the gradient of any of them.
        info = jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, 1).reshape(batch_size, *x.shape[2:]),
            jax.lax.map(jax.checkpoint(compute), groups),
        )
    losses = info.fit.loss[:, -1].mean(), info.task_loss.mean()
    weights = reconstruction_weight, 1.0
    if normalize:
        return normalized_sum(losses, weights), info
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)), info
