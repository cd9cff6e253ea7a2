"""How loss and gradient change along the gradient and between training steps.

Santurkar et al. 2018 (arXiv 1805.11604), section 3.1: at parameters w with gradient g
of a batch, evaluate w - eta g for a range of step sizes eta, on the same batch and with
respect to all parameters. `probe_gradient` measures the whole profile over eta. The
three quantities of the paper are ranges of this profile:

    loss variation             min and max over eta of  L(w - eta g)
    gradient predictiveness    min and max over eta of  ||grad L(w - eta g) - g||
    effective beta-smoothness  max over eta of  ||grad L(w - eta g) - g|| / (eta ||g||)

Some authors use the same names for two other quantities. Here they have their own
names: `consecutive_change` compares the gradients of two training steps on two batches,
and `envelope` is the band of the losses of runs with different learning rates.
`at_equal_loss` reads such runs at equal training loss in place of equal steps.

All functions need only a `loss_fn(params, batch)` that returns a scalar. This function
defines what else the loss depends on, in particular the mode of batch normalization:

    def batch_mode(params, batch):  # as in training; discards the new statistics
        variables = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(
            variables, batch["image"], train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch["label"])

    def frozen_mode(params, batch):  # the running statistics, a constant
        variables = {"params": params, "batch_stats": batch_stats}
        return cross_entropy(model.apply(variables, batch["image"]), batch["label"])

    def recalibrated_mode(params, batch):  # statistics of other images, at each w
        variables = {"params": params, "batch_stats": batch_stats}
        _, fresh = model.apply(  # a model with bn_momentum=0
            variables, calibration_images, train=True, mutable=["batch_stats"]
        )
        variables = {"params": params, **fresh}
        return cross_entropy(model.apply(variables, batch["image"]), batch["label"])

The paper uses the mode of training; the frozen mode hides the coupling of the examples
by the normalization. A random loss, for example with dropout, should take its key from
the batch, so that all points use the same draw.

Axes: S step sizes, R runs, T training steps, K levels of the loss.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from landscape.checks import check_floating, check_scalar, path_name
from landscape.filters import Filters, entry_axes
from landscape.norms import dot, norm, rescale, widen


class GradientProbe(NamedTuple):
    """Loss and gradient along the gradient; probes stack along leading axes.

    All values are float32, or wider if the parameters are. Norms are over all
    parameters together; g is the gradient at w, g' the gradient at w - eta g.

    If g is zero, no step moves the parameters: distances and betas are 0 and cosines 1.
    The cosine is 0 if only g' is zero.

    Attributes:
      loss: L(w), ().
      grad_norm: ||g||, ().
      step_sizes: eta, (S,).
      losses: L(w - eta g), (S,).
      grad_distances: ||g' - g||, (S,).
      relative_grad_distances: ||g' - g|| / ||g||, (S,).
      cosines: cosine of the angle between g' and g, (S,).
      betas: ||g' - g|| / (eta ||g||), (S,). Tends to ||H g|| / ||g|| with the Hessian H
        as eta tends to 0.
      filter_distances: size of the step relative to the weights, (S,): the root mean
        square over the filters f of ||eta g_f|| / ||w_f||. Filters with zero norm are
        excluded; the distance is 0 if none remains.
    """

    loss: Array
    grad_norm: Array
    step_sizes: Array
    losses: Array
    grad_distances: Array
    relative_grad_distances: Array
    cosines: Array
    betas: Array
    filter_distances: Array


class ConsecutiveChange(NamedTuple):
    """Change between two training steps.

    Attributes:
      grad_distance: ||g_next - g||, ().
      step_norm: ||w_next - w||, ().
      beta: ||g_next - g|| / ||w_next - w||, (); 0 if neither changed, inf if only the
        gradient did.
    """

    grad_distance: Array
    step_norm: Array
    beta: Array


def probe_gradient(
    loss_fn: Callable[[Any, Any], Array],
    params: Any,
    batch: Any,
    step_sizes: Array,
    *,
    filters: Filters | None = None,
) -> GradientProbe:
    """Measures loss and gradient at w - eta g for every step size eta.

    The cost is 1 + S gradients, computed one after the other; the memory is that of a
    gradient descent step and one more gradient. Matrix products use the highest
    precision unless `loss_fn` sets its own, because at a lower precision rounding hides
    differences of gradients. Compile the function once and call it throughout training:

        probe = jax.jit(functools.partial(probe_gradient, loss_fn))
        result = probe(params, batch, step_sizes)

    With rectifiers beta jumps as a function of eta, so the largest beta depends on the
    range of step sizes as much as on the loss. If a normalization makes the loss
    invariant to the scale c of a weight, the gradient scales as 1 / c and beta as 1 /
    c^2. Compare such networks by the relative measures and at equal filter distances.

    Example:
      >>> import jax.numpy as jnp
      >>> from landscape import probes
      >>> loss_fn = lambda params, batch: 0.5 * jnp.sum(batch * params["w"] ** 2)
      >>> params, curvature = {"w": jnp.ones(2)}, jnp.array([1.0, 3.0])
      >>> etas = jnp.array([0.1, 0.2])
      >>> probe = probes.probe_gradient(loss_fn, params, curvature, etas)
      >>> print(f"{probes.effective_beta(probe):.3f}")  # at most the curvature 3
      2.864

    Args:
      loss_fn: maps (params, batch) to a scalar.
      params: w, a tree of floating-point arrays. Arrays narrower than float32 reach
        `loss_fn` as float32.
      batch: passed to `loss_fn`, the same at every point.
      step_sizes: eta > 0, (S,). Values are checked unless they are traced.
      filters: {path: axes that index the filters}, for example
        `lbi.groups(...).filters()`; they only affect `filter_distances`. None decides
        by name and rank, see `landscape.filters`.

    Returns:
      The profile over the step sizes. Under a transformation it can contain values that
      are not finite; pass its result to `check_finite`.

    Raises:
      ValueError: if the loss is not a scalar, a step size is not positive, a parameter
        is not floating point, its filters are not known, or, outside of
        transformations, a result is not finite.
    """
    check_floating(params)
    axes = entry_axes(params, filters)
    step_sizes = _checked_step_sizes(step_sizes)
    params = jax.tree.map(widen, params)

    @jax.value_and_grad
    def loss_and_grads(params):
        loss = loss_fn(params, batch)
        check_scalar(loss)
        return widen(loss)

    with jax.default_matmul_precision("highest"):
        loss, grads = loss_and_grads(params)
        scaled, power = rescale(grads)
        scaled_norm = norm(scaled)
        grad_norm = power * scaled_norm

        def measure(step_size):
            moved = jax.tree.map(
                lambda p, g: p - step_size.astype(p.dtype) * g, params, grads
            )
            moved_loss, moved_grads = loss_and_grads(moved)
            distance = norm(jax.tree.map(jnp.subtract, moved_grads, grads))
            moved_scaled, _ = rescale(moved_grads)
            cosine = _divide(
                dot(moved_scaled, scaled),
                norm(moved_scaled) * scaled_norm,
                otherwise=jnp.where(grad_norm == 0, 1, 0),
            )
            return moved_loss, distance, jnp.clip(cosine, -1, 1)

        losses, grad_distances, cosines = jax.lax.map(measure, step_sizes)
        relative = _divide(grad_distances, grad_norm, otherwise=0)
        probe = GradientProbe(
            loss=loss,
            grad_norm=grad_norm,
            step_sizes=step_sizes,
            losses=losses,
            grad_distances=grad_distances,
            relative_grad_distances=relative,
            cosines=cosines,
            betas=relative / step_sizes,
            filter_distances=step_sizes * power * _filter_ratio(scaled, params, axes),
        )
    if _is_known(probe):
        check_finite(probe)
    return probe


def check_finite(probe: GradientProbe) -> None:
    """Raises ValueError if a probe, or one probe of a stack, contains nan or inf.

    The message names the quantity, the step size and, in a stack, the index.
    """
    rank = np.ndim(probe.loss)
    for name, values in probe._asdict().items():
        values = np.asarray(values)
        bad = np.argwhere(~np.isfinite(values))
        if not len(bad):
            continue
        index = tuple(bad[0].tolist())
        where = "before any step"
        if len(index) > rank:
            step_sizes = np.broadcast_to(np.asarray(probe.step_sizes), values.shape)
            where = f"at step size {step_sizes[index]:g}"
        if rank:
            where += f" of probe {index[0] if rank == 1 else index[:rank]}"
        raise ValueError(f"not finite: {name} is {values[index]} {where}.")


def loss_variation(probe: GradientProbe) -> tuple[Array, Array]:
    """Smallest and largest loss over the step sizes, (), (); leading axes stay.

    As in the paper the range covers the steps only. It excludes `probe.loss`, the loss
    without a step.
    """
    return jnp.min(probe.losses, axis=-1), jnp.max(probe.losses, axis=-1)


def gradient_predictiveness(probe: GradientProbe) -> tuple[Array, Array]:
    """Smallest and largest ||g' - g|| over the step sizes, (), (); leading axes stay.

    A small value means a predictive gradient, but it scales with the gradient: a dead
    run (`is_dead`), whose gradient is nearly zero, has an excellent value. Compare it
    with `probe.grad_norm`, or use the range of `probe.relative_grad_distances`.
    """
    distances = probe.grad_distances
    return jnp.min(distances, axis=-1), jnp.max(distances, axis=-1)


def effective_beta(probe: GradientProbe) -> Array:
    """Largest ||g' - g|| / (eta ||g||) over the step sizes, (); leading axes stay."""
    return jnp.max(probe.betas, axis=-1)


def consecutive_change(
    params: Any,
    grads: Any,
    next_params: Any,
    next_grads: Any,
    *,
    pattern: str | None = None,
) -> ConsecutiveChange:
    """Compares the gradients of two consecutive training steps.

    This is not a measure of Santurkar et al. The two gradients are of different
    batches, so their distance contains batch noise in addition to curvature, and the
    step is the optimizer's, not a step along the gradient.

    Args:
      params: w, a tree of floating-point arrays.
      grads: g, the gradient at w on the batch of the step; a tree like `params`.
      next_params: w after the step.
      next_grads: the gradient at `next_params` on the next batch.
      pattern: selects the parameters whose path "block/layer/kernel" matches by
        `re.search`, for example those of the last layer; None selects all.

    Returns:
      The two distances and their ratio.

    Raises:
      ValueError: if the trees do not match, a parameter is not floating point, or no
        path matches.
    """
    check_floating(params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    others = {"grads": grads, "next_params": next_params, "next_grads": next_grads}
    flat = {"params": [leaf for _, leaf in leaves]}
    for name, tree in others.items():
        flat[name], structure = jax.tree.flatten(tree)
        if structure != treedef:
            raise ValueError(
                f"{name} must be a tree like params, {treedef}, got {structure}."
            )
        for (path, leaf), other in zip(leaves, flat[name], strict=True):
            if jnp.shape(other) != jnp.shape(leaf):
                raise ValueError(
                    f"{name} must have the shapes of params, got {jnp.shape(other)} "
                    f"for {jnp.shape(leaf)} at {path_name(path)}."
                )
    paths = [path_name(path) for path, _ in leaves]
    chosen = [
        i for i, p in enumerate(paths) if pattern is None or re.search(pattern, p)
    ]
    if not chosen:
        raise ValueError(f"no parameter matches {pattern!r}; there are {paths}.")

    def distance(name, next_name):
        pairs = [(flat[name][i], flat[next_name][i]) for i in chosen]
        return norm([widen(later) - widen(earlier) for earlier, later in pairs])

    grad_distance = distance("grads", "next_grads")
    step_norm = distance("params", "next_params")
    still = jnp.where(grad_distance == 0, 0, jnp.inf)
    return ConsecutiveChange(
        grad_distance=grad_distance,
        step_norm=step_norm,
        beta=_divide(grad_distance, step_norm, otherwise=still),
    )


def envelope(losses: Array, is_dead: Array | None = None) -> tuple[Array, Array]:
    """The band between the smallest and the largest loss of several runs, per step.

    This is not a slice of a loss landscape, since runs with different learning rates
    are at different points. Its width shows how much the learning rate matters. A
    single dead run (`is_dead`) can account for the whole width.

    Args:
      losses: losses of R runs over T steps, (R, T).
      is_dead: runs to exclude, bool (R,); None excludes none.

    Returns:
      The smallest and the largest loss at each step, (T,) and (T,).

    Raises:
      ValueError: if the shapes do not fit or, unless traced, if all runs are dead or a
        run that is not dead has a loss that is not finite.
    """
    losses = jnp.asarray(losses)
    if losses.ndim != 2:
        raise ValueError(f"losses must be (R, T), got shape {losses.shape}.")
    num_runs = losses.shape[0]
    dead = jnp.zeros(num_runs, bool) if is_dead is None else jnp.asarray(is_dead)
    if dead.shape != (num_runs,) or dead.dtype != bool:
        raise ValueError(
            f"is_dead must be bool ({num_runs},), got {dead.dtype} {dead.shape}."
        )
    dead = dead[:, None]  # (R, 1)
    if _is_known(dead) and np.all(dead):
        raise ValueError(f"all of the {num_runs} runs are dead: no envelope is left.")
    if _is_known((losses, dead)):
        bad = np.argwhere(~np.isfinite(losses) & ~np.asarray(dead))
        if len(bad):
            run, step = bad[0].tolist()
            raise ValueError(
                f"the loss of run {run} is {losses[run, step]} at step {step}: leave "
                "it out with is_dead."
            )
    low = jnp.min(jnp.where(dead, jnp.inf, losses), axis=0)
    high = jnp.max(jnp.where(dead, -jnp.inf, losses), axis=0)
    return low, high


def at_equal_loss(losses: Array, values: Array, levels: Array) -> Array:
    """Values of runs where their training loss first reaches given levels.

    Runs that learn at different speeds are compared at equal progress, not at equal
    steps. The loss of a run is the smallest so far, and the values are linear in it
    between two steps.

    Args:
      losses: training losses, (..., T); those that are not finite count as no progress.
      values: a value of each run at each step, (..., T), for example the step itself.
      levels: losses, (K,).

    Returns:
      The values at the levels, (..., K); nan where a run starts below a level or does
      not reach it.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> import numpy as np
      >>> from landscape.probes import at_equal_loss
      >>> losses = np.array([[4.0, 2.0, 1.0], [4.0, 3.0, 2.0]])
      >>> at_equal_loss(losses, np.array([[0, 1, 2], [0, 1, 2]]), np.array([3.0, 1.5]))
      Array([[0.5, 1.5],
             [1. , nan]], dtype=float32)
    """
    losses, values, levels = (widen(x) for x in (losses, values, levels))
    if losses.ndim == 0 or losses.shape[-1] == 0 or losses.shape != values.shape:
        raise ValueError(
            "losses and values must be (..., T), T > 0, of the same shape, got "
            f"{losses.shape} and {values.shape}."
        )
    if levels.ndim != 1:
        raise ValueError(f"levels must be (K,), got shape {levels.shape}.")
    levels = jnp.broadcast_to(levels, (*losses.shape[:-1], *levels.shape))  # (..., K)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    lowest = jax.lax.cummin(losses, axis=losses.ndim - 1)[..., None, :]  # (..., 1, T)
    is_reached = lowest <= levels[..., None]  # (..., K, T)
    after = jnp.argmax(is_reached, axis=-1)
    before = jnp.maximum(after - 1, 0)
    (low_before, low_after), (value_before, value_after) = (
        [jnp.take_along_axis(array, i, axis=-1) for i in (before, after)]
        for array in (lowest[..., 0, :], values)
    )
    # From no finite loss to a finite one, or at the first step, nothing lies between.
    is_between = jnp.isfinite(low_before) & (low_before > low_after)
    weight = _divide(low_before - levels, low_before - low_after, otherwise=1)
    # A level that is a loss of the run takes its value, whatever the one before is.
    is_exact = ~is_between | (low_after == levels)
    found = value_before + weight * (value_after - value_before)
    found = jnp.where(is_exact, value_after, found)
    starts_below = (after == 0) & (low_after < levels)
    return jnp.where(is_reached.any(-1) & ~starts_below, found, jnp.nan)


def is_dead(
    losses: Array,
    num_classes: int,
    *,
    num_last: int = 20,
    tolerance: float = 0.02,
    class_counts: Any = None,
) -> Array:
    """Whether a run ended as a constant classifier or diverged.

    A run is dead if the mean of its last training losses is at least chance level less
    the tolerance, or if any loss is not finite. The outputs of such a network no longer
    depend on its inputs and its gradient is nearly zero. Its loss variation and
    gradient predictiveness therefore look better than those of a network that learns.

    The loss at chance level is the entropy of the class frequencies, log(num_classes)
    if they are equal. A run that has not yet begun to learn is flagged too, so call
    this at the end of training.

    Args:
      losses: training cross-entropies in nats, (..., T).
      num_classes: K >= 2.
      num_last: number of final losses to average, >= 1; all of them if T is smaller.
      tolerance: in nats, >= 0.
      class_counts: training examples of each class, (K,); None means equally many.

    Returns:
      bool (...).

    Raises:
      ValueError: if there are no losses, a number is out of range, or the counts are
        not those of K classes.
    """
    losses = jnp.asarray(losses)
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses must be (..., T), T > 0, got shape {losses.shape}.")
    for name, number, smallest in (
        ("num_classes", num_classes, 2),
        ("num_last", num_last, 1),
        ("tolerance", tolerance, 0),
    ):
        if not number >= smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {number}.")
    end = jnp.mean(widen(losses[..., -num_last:]), axis=-1)
    is_finite = jnp.all(jnp.isfinite(losses), axis=-1)
    return ~is_finite | (end >= _entropy(class_counts, num_classes) - tolerance)


def _entropy(counts, num_classes):
    """Of the frequencies of the classes, in nats."""
    if counts is None:
        return math.log(num_classes)
    counts = np.asarray(counts, np.float64)
    if counts.shape != (num_classes,) or not (counts.sum() > 0 <= counts.min()):
        raise ValueError(
            f"class_counts must be ({num_classes},), >= 0 and not all zero, got "
            f"{counts.tolist()}."
        )
    shares = counts[counts > 0] / counts.sum()
    return -float(np.sum(shares * np.log(shares)))


def _checked_step_sizes(step_sizes):
    """The step sizes as a float array (S,)."""
    array = jnp.asarray(step_sizes, float)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"step_sizes must be (S,), S > 0, got shape {array.shape}.")
    if _is_known(step_sizes):
        # In the dtype in which they are used, where small values may round to zero.
        values = np.asarray(step_sizes).astype(array.dtype)
        if not np.all((values > 0) & np.isfinite(values)):
            raise ValueError(
                f"step_sizes must be positive and finite, got {values.tolist()}."
            )
    return array


def _is_known(tree):
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _divide(numerator, denominator, *, otherwise):
    """The ratio, or `otherwise` where the denominator is zero; nan stays nan."""
    is_zero = denominator == 0
    return jnp.where(is_zero, otherwise, numerator / jnp.where(is_zero, 1, denominator))


def _filter_ratio(grads, params, axes):
    """Root mean square over the filters of ||g_f|| / ||w_f||, ()."""
    total, count = 0.0, 0
    for grad, param, inside in zip(
        jax.tree.leaves(grads), jax.tree.leaves(params), axes, strict=True
    ):
        if inside is None:
            continue
        weights = jnp.sum(jnp.square(param), axis=inside)
        ratios = _divide(jnp.sum(jnp.square(grad), axis=inside), weights, otherwise=0)
        total += jnp.sum(ratios)
        count += jnp.sum(weights != 0)
    return jnp.sqrt(total / jnp.maximum(count, 1))
