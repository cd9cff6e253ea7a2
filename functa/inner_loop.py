"""The inner loop, which fits a latent to one signal, and the outer gradient through it.

The inner loop updates the latent and keeps the weights fixed (CAVIA; Zintgraf et al.
2019, arXiv 1810.03642). The learning rates can be learned, one per latent entry
(Meta-SGD; Li et al. 2017, arXiv 1707.09835). Functa (Dupont et al. 2022, arXiv
2201.12204, algorithm 1) combines the two. The outer gradient flows through all inner
steps (second order) unless `first_order` is set.

The functions for one signal do not depend on a network: a `field` maps a latent to a
prediction of the signal. `jax.vmap` turns them into functions of a batch.

A latent is an array of any shape, for example a vector (L,) or a grid (h, w, C). The
docstrings write its shape as (*Z). Other axes: B batch, S steps, d coordinates of a
point, C channels.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from functa.varying import vary_latent, vary_like

Field = Callable[[jax.Array], jax.Array]
# The result of `jax.vjp(field, latent)`: the prediction, and the function that maps a
# cotangent of the prediction to one of the latent. It is a pytree, so gradients can
# flow through it.
Evaluation = tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]


class FitInfo(NamedTuple):
    """Losses during a fit of S steps: entry s is before step s, entry S after the last.

    Attributes:
      loss: mean squared error plus l2 penalty, (S + 1,).
      mse: mean squared error without the penalty, (S + 1,).
    """

    loss: jax.Array
    mse: jax.Array


def reconstruction_loss(
    field: Field,
    latent: jax.Array,
    target: jax.Array,
    *,
    l2_weight: float = 0.0,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """mean(w (field(latent) - target)^2) / mean(w) + l2_weight * sum(latent^2).

    Args:
      field: maps a latent to a prediction shaped like `target`.
      latent: (*Z).
      target: the signal, any shape.
      l2_weight: weight of the penalty, >= 0.
      weight: w, a weight >= 0 of each point: the shape of `target` without its last
        axis, the channels. For example the areas that the points of a sphere stand for.
        None weights all points equally.

    Returns:
      The loss and the mean squared error without the penalty, two scalars.

    Raises:
      ValueError: if the prediction and the target differ in shape, the target is not
        floating point, or the weights have another shape, are negative or not finite,
        or are all zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa import reconstruction_loss
      >>> target = jnp.array([[1.0], [3.0]])
      >>> loss, _ = reconstruction_loss(
      ...     lambda z: z * jnp.ones((2, 1)), jnp.zeros(()), target,
      ...     weight=jnp.array([3.0, 1.0]),
      ... )
      >>> print(loss)  # (3 * 1^2 + 1 * 3^2) / (3 + 1)
      3.0
    """
    return _loss(field(latent), latent, target, l2_weight, weight)


def _loss(prediction, latent, target, l2_weight, weight=None):
    if jnp.shape(prediction) != jnp.shape(target):
        raise ValueError(
            f"the field predicts values of shape {jnp.shape(prediction)}, but the "
            f"target has the shape {jnp.shape(target)}; they must be equal, channels "
            "included."
        )
    if not jnp.issubdtype(target.dtype, jnp.floating):
        raise ValueError(
            f"target must be floating point, got {target.dtype}; images of 8 bits are "
            "divided by 255."
        )
    squares = jnp.square(prediction - target)
    if weight is None:
        mse = jnp.mean(squares)
    else:
        _check_weight(weight, target.shape[:-1])
        mse = jnp.mean(weight * squares.mean(-1)) / jnp.mean(weight)
    return mse + l2_weight * jnp.sum(jnp.square(latent)), mse


def _check_weight(weight, shape):
    """Raises ValueError for weights of another shape, or whose mean weighs nothing."""
    if jnp.shape(weight) != shape:
        raise ValueError(
            f"weight must have the shape {shape} of the points, "
            f"got {jnp.shape(weight)}."
        )
    if isinstance(weight, jax.core.Tracer):
        return  # Its values are known when the program runs.
    weight = np.asarray(weight)
    if not (np.isfinite(weight).all() and weight.min() >= 0 and weight.max() > 0):
        raise ValueError(
            "weight must be finite and >= 0, with at least one point above 0."
        )


def fit_latent(
    field: Field,
    latent: jax.Array,
    target: jax.Array,
    *,
    num_steps: int,
    learning_rate: float | jax.Array,
    l2_weight: float = 0.0,
    weight: jax.Array | None = None,
    noise: jax.Array | None = None,
    first_order: bool = False,
    unroll: bool = True,
    start: Evaluation | None = None,
) -> tuple[jax.Array, FitInfo]:
    """Fits a latent to one signal by gradient descent: z <- z - learning_rate * dL/dz.

    Args:
      field: maps a latent to a prediction shaped like `target`.
      latent: initial latent, (*Z).
      target: the signal, any shape.
      num_steps: S, a Python int; 0 returns `latent` unchanged.
      learning_rate: one rate (); one per latent entry (*Z), as in Meta-SGD; or rates
        per step (S, ...), whose axes after the first broadcast to (*Z). A shape
        equal to (*Z) always means one rate per entry.
      l2_weight: see `reconstruction_loss`.
      weight: see `reconstruction_loss`.
      noise: (*Z), added to the fitted latent before the last loss is computed, which
        makes the weights robust to it; None adds nothing.
      first_order: treat each gradient as a constant when differentiating the result.
      unroll: use a Python loop; False uses `lax.scan`, which compiles faster when
        there are many steps.
      start: `jax.vjp(field, latent)`, if many fits share it; the first step then does
        not evaluate the field.

    Returns:
      The fitted latent (*Z) and the losses before each step and after the last.

    Raises:
      ValueError: if `num_steps` is negative, if `target` is not floating point or not
        shaped like the prediction, or if the shape of `learning_rate` does not fit the
        latent and the number of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa import fit_latent
      >>> target = jnp.array([1.0, -2.0])
      >>> latent, info = fit_latent(
      ...     lambda z: z, jnp.zeros(2), target, num_steps=3, learning_rate=0.5
      ... )
      >>> print(latent)  # Each step halves the error.
      [ 0.875 -1.75 ]
      >>> print(info.mse)
      [2.5       0.625     0.15625   0.0390625]
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must be >= 0, got {num_steps}.")
    latent = jnp.asarray(latent)
    rates = _rates_per_step(jnp.asarray(learning_rate), num_steps, latent.shape)
    own = vary_latent(field, latent, target, rates, weight, noise)
    if start is not None and own is not latent:
        raise ValueError(
            "start was evaluated at a latent that is the same on all devices of "
            "jax.shard_map; use jax.lax.pcast(latent, axis_name, to='varying') there."
        )
    latent = own
    if noise is not None:
        chex.assert_equal_shape([noise, latent])
    grad_fn = jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True)

    def step(z, rate, evaluation=None):
        prediction, pullback = evaluation or jax.vjp(field, z)
        losses, (cotangent, grad) = grad_fn(prediction, z, target, l2_weight, weight)
        grad = grad + pullback(cotangent)[0]
        if first_order:
            grad = jax.lax.stop_gradient(grad)
        return (z - rate * grad).astype(z.dtype), losses

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
    last = reconstruction_loss(
        field, latent, target, l2_weight=l2_weight, weight=weight
    )
    return latent, FitInfo(*map(jnp.append, before, last))


def _rates_per_step(rates, num_steps, latent_shape):
    """Learning rates of each step, (S, ...), the rest of rank 0 or of the latent's."""
    if rates.shape in ((), latent_shape):
        return jnp.broadcast_to(rates, (num_steps, *rates.shape))
    entry = rates.shape[1:]
    shape = (1,) * (len(latent_shape) - len(entry)) + entry
    if (
        not entry
        or len(shape) != len(latent_shape)
        or any(n not in (1, size) for n, size in zip(shape, latent_shape, strict=True))
    ):
        raise ValueError(
            f"learning_rate must have shape (), {latent_shape}, or (num_steps, ...) "
            f"with axes that broadcast to {latent_shape}; got {rates.shape}."
        )
    if len(rates) != num_steps:
        raise ValueError(
            f"learning_rate has rates for {len(rates)} steps, but num_steps is "
            f"{num_steps}."
        )
    return rates.reshape(num_steps, *shape)


def optimize_latent(
    field: Field,
    latent: jax.Array,
    target: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    l2_weight: float = 0.0,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, FitInfo]:
    """Fits a latent to one signal with any optax optimizer, for many steps.

    The weights are fixed and the result is not meant to be differentiated. Use it to
    measure the best reconstruction that a latent can reach without the limit of a few
    inner steps.

    Args:
      field: maps a latent to a prediction shaped like `target`.
      latent: initial latent, (*Z).
      target: the signal, any shape.
      optimizer: applied to the latent; `optax.lbfgs()` with its line search works too.
      num_steps: S, a Python int.
      l2_weight: see `reconstruction_loss`.
      weight: see `reconstruction_loss`.

    Returns:
      The fitted latent (*Z) and the losses before each step and after the last.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    latent = vary_latent(field, latent, target, weight)

    def loss_fn(z):
        return reconstruction_loss(field, z, target, l2_weight=l2_weight, weight=weight)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(carry, _):
        z, opt_state = carry
        losses, grad = grad_fn(z)
        # A line search needs these arguments; other optimizers ignore them.
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

    The outer loss of Functa is `info.loss[:, -1].mean()`; `meta_gradient` computes its
    gradient.

    Args:
      apply_fn: `model.apply` of a modulated SIREN, or any function
        (variables, coords, latent) -> values.
      params: weights, fixed during the fit.
      latent: initial latent of every fit, (*Z).
      coords: (..., d).
      targets: (B, ..., C).
      noise: (B, *Z), added to the fitted latents before the last loss, or None.
      start: `field_vjp` at the initial latent, if several batches share it.
      **options: other keywords of `fit_latent`; all signals have the same `weight`.

    Returns:
      Fitted latents (B, *Z) and losses (B, S + 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functa import LatentModulatedSiren, coordinate_grid
      >>> from functa import fit_batch
      >>> model = LatentModulatedSiren(width=8, depth=3, latent_dim=4)
      >>> coords, latent = coordinate_grid((6, 5)), model.initial_latent()
      >>> params = model.init(jax.random.key(0), coords, latent)["params"]
      >>> images = jnp.zeros((2, 6, 5, 3))
      >>> latents, info = fit_batch(
      ...     model.apply, params, latent, coords, images,
      ...     num_steps=3, learning_rate=0.1,
      ... )
      >>> latents.shape, info.loss.shape
      ((2, 4), (2, 4))
    """

    def field(z):
        return apply_fn({"params": params}, coords, z)

    if start is None:
        latent = vary_latent(field, latent, targets, noise, options)
        start = field_vjp(apply_fn, params, latent, coords, num_fits=len(targets))

    def fit(target, noise):
        return fit_latent(field, latent, target, noise=noise, start=start, **options)

    return jax.vmap(fit)(targets, noise)


def field_vjp(
    apply_fn: Callable[..., jax.Array],
    params: chex.ArrayTree,
    latent: jax.Array,
    coords: jax.Array,
    *,
    num_fits: int = 1,
) -> Evaluation:
    """Evaluates the field at a latent, for the fits that start there to share.

    If more fits share it than the latent has entries, the whole Jacobian is computed.
    The first step of each fit is then one product with it, instead of a pass through
    the network.

    Args:
      apply_fn: see `fit_batch`.
      params: weights.
      latent: initial latent, (*Z).
      coords: (..., d).
      num_fits: number of fits that start there.

    Returns:
      The prediction (..., C), and the function that maps a cotangent of the prediction
      to a tuple of one cotangent of the latent, as `jax.vjp` returns them.
    """

    def field(z):
        return apply_fn({"params": params}, coords, z)

    if num_fits <= latent.size:
        return jax.vjp(field, latent)
    prediction, push = jax.linearize(field, latent)
    basis = jnp.eye(latent.size, dtype=latent.dtype).reshape(-1, *latent.shape)
    jacobian = jax.vmap(push)(vary_like(basis, latent))  # (size, ..., C)
    pullback = jax.tree_util.Partial(_pull_back, jacobian, jnp.zeros_like(latent))
    return prediction, pullback


def _pull_back(jacobian, latent, cotangent):
    product = jnp.tensordot(jacobian, cotangent, axes=cotangent.ndim)  # (size,)
    return (product.reshape(latent.shape),)


def largest_eigenvalue(
    field: Field,
    latent: jax.Array,
    *,
    weight: jax.Array | None = None,
    num_iterations: int = 50,
) -> jax.Array:
    """Largest eigenvalue of the Gauss-Newton matrix 2 J^T W J of the squared error.

    J is the Jacobian of the n predicted values at `latent`, and W is 1/n, or the
    weights of the values divided by their sum. The matrix does not depend on the
    signal. A step of the inner loop contracts the error of the linearized field
    if its learning rate is below 2 / eigenvalue.

    Args:
      field: maps a latent to a prediction.
      latent: (*Z).
      weight: see `reconstruction_loss`.
      num_iterations: steps of the power iteration.

    Returns:
      A scalar. It approaches the eigenvalue from below.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa import largest_eigenvalue
      >>> field = lambda z: jnp.array([3.0, 1.0]) * z
      >>> print(largest_eigenvalue(field, jnp.zeros(2)))
      9.0
    """
    latent = vary_latent(field, latent, weight)
    prediction, pullback = jax.vjp(field, latent)
    if weight is not None:
        _check_weight(weight, prediction.shape[:-1])

    def multiply(vector):
        _, tangent = jax.jvp(field, (latent,), (vector,))
        if weight is not None:
            tangent = tangent * (weight / jnp.mean(weight))[..., None]
        return pullback(tangent)[0] * (2 / prediction.size)

    def iterate(vector, _):
        product = multiply(vector)
        norm = jnp.sqrt(jnp.vdot(product, product))
        return product / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny), norm

    # A fixed vector that is orthogonal to no eigenvector, except by accident.
    vector = jnp.cos(jnp.arange(latent.size, dtype=latent.dtype)).reshape(latent.shape)
    vector = vary_like(vector / jnp.linalg.norm(vector), latent)
    _, norms = jax.lax.scan(iterate, vector, length=num_iterations)
    return norms[-1]


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
    """Gradient of the outer loss: the mean over a batch of the loss after the fit.

    The batch is processed in groups, one after the other. Memory is needed for one
    group only, and on a CPU a group that fits into the cache is faster. All fits share
    the field at their initial latent, which is computed and differentiated once.

    Args:
      apply_fn: see `fit_batch`.
      params: weights; the gradient with respect to them is returned.
      latent: initial latent of every fit, (*Z).
      coords: (..., d).
      targets: (B, ..., C). Group g holds the signals g, g + num_groups, ..., so that
        each group is distributed over the devices like the batch.
      learning_rate: as in `fit_latent`; the gradient with respect to it is returned.
      noise: (B, *Z), added to the fitted latents before the last loss, or None.
      num_groups: number of groups, a divisor of B.
      **options: other keywords of `fit_latent`.

    Returns:
      (gradient in `params`, gradient in `learning_rate`), and losses (B, S + 1).

    Raises:
      ValueError: if `num_groups` does not divide B.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functa import LatentModulatedSiren, coordinate_grid
      >>> from functa import meta_gradient
      >>> model = LatentModulatedSiren(width=8, depth=3, latent_dim=4)
      >>> coords, latent = coordinate_grid((6, 5)), model.initial_latent()
      >>> params = model.init(jax.random.key(0), coords, latent)["params"]
      >>> (grads, rate_grads), info = meta_gradient(
      ...     model.apply, params, latent, coords, jnp.zeros((2, 6, 5, 3)),
      ...     learning_rate=jnp.full(4, 0.1), num_steps=3,
      ... )
      >>> jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
      True
      >>> rate_grads.shape, info.loss.shape
      ((4,), (2, 4))
    """
    batch_size = len(targets)
    if num_groups < 1 or batch_size % num_groups:
        raise ValueError(
            f"num_groups must divide the batch of {batch_size}, got {num_groups}."
        )

    def field(z):
        return apply_fn({"params": params}, coords, z)

    latent = vary_latent(field, latent, targets, noise, learning_rate, options)

    def start_from(params):
        # Integers and Booleans, such as the masks of a ReLU, have no gradient.
        return _split_floats(
            field_vjp(apply_fn, params, latent, coords, num_fits=batch_size)
        )

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
    """Splits a tree into its floating-point leaves and its other leaves, else None."""

    def is_float(x):
        return jnp.issubdtype(x.dtype, jnp.floating)

    floats = jax.tree.map(lambda x: x if is_float(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, tree)


def _join(floats, others):
    """Inverse of `_split_floats`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, others, is_leaf=lambda x: x is None
    )


def __getattr__(name):
    # The old name of `field_vjp`, for one version.
    if name == "evaluate":
        warnings.warn(
            "inner_loop.evaluate is now inner_loop.field_vjp.",
            DeprecationWarning,
            stacklevel=2,
        )
        return field_vjp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
