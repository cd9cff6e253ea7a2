"""Loss along a path or over a plane through the parameters, and their directions.

Li et al. 2018 (arXiv 1712.09913). A plane of two filter-normalized directions:

    first_key, second_key = jax.random.split(key)
    first = filter_normalized_direction(first_key, params)
    second = filter_normalized_direction(second_key, params, orthogonal_to=first)
    points = grid(np.linspace(-1, 1, 51), np.linspace(-1, 1, 51))
    scan = jax.jit(functools.partial(loss_surface, loss_fn))
    losses = scan(params, batch, [first, second], points).reshape(51, 51)

`losses_along(loss_fn, line(start, end), batch, fractions)` goes from one network to
another, and `fit_bezier` finds a curve between them along which the loss stays low. To
draw the path of a training run, use the directions of `trajectory_pca` and its `origin`
as `params`.

Axes: N points, D directions, T steps of a trajectory, K batches, S steps of a fit.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from landscape.checks import (
    LossFn,
    check_floating,
    check_like,
    check_values,
    scalar_loss,
)
from landscape.filters import Filters, entry_axes, filter_size
from landscape.norms import rescale, widen

Path = Callable[[Array], Any]


def filter_normalized_direction(
    key: Array,
    params: Any,
    *,
    orthogonal_to: Any = None,
    filters: Filters | None = None,
) -> Any:
    """A random direction in which each filter has the norm of the filter in `params`.

    d_f <- d_f / |d_f| |w_f| for a Gaussian d (Li et al. 2018, section 4). The surface
    is then invariant to the scale of a filter before a normalization. A filter is the
    set of weights of one output. The direction is zero for parameters without filters:
    biases, normalizations, embeddings.

    Args:
      key: draws the direction.
      params: the weights.
      orthogonal_to: a direction, a tree like `params`. Each filter is made orthogonal
        to its counterpart and then scaled, so that both its norm and the orthogonality
        are exact. A filter with a single entry has no orthogonal direction and gets
        zero.
      filters: {path: axes that index the filters}, for example
        `lbi.groups(...).filters()`. None decides by name and rank, see
        `landscape.filters`.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if a parameter is not floating point, `orthogonal_to` is not a tree
        like `params`, or the filters of a parameter are not known.
    """
    check_floating(params)
    leaves, structure = jax.tree.flatten(params)
    others = [None] * len(leaves)
    if orthogonal_to is not None:
        check_like("orthogonal_to", orthogonal_to, params)
        others = jax.tree.leaves(orthogonal_to)
    directions = [
        _direction_of_leaf(*each)
        for each in zip(
            jax.random.split(key, len(leaves)),
            leaves,
            others,
            entry_axes(params, filters),
            strict=True,
        )
    ]
    return jax.tree.unflatten(structure, directions)


def grid(*axes: Any) -> np.ndarray:
    """All points with coordinates from D axes, the last axis fastest.

    Reshape losses to a surface with `losses.reshape([len(axis) for axis in axes])`.

    Args:
      *axes: the coordinates along each direction, (N_d,).

    Returns:
      (N, D), where N is the product of all N_d.
    """
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def loss_surface(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    directions: Sequence[Any],
    coordinates: Any,
    *,
    batch_size: int | None = None,
) -> Array:
    """Losses at params + sum_d coordinates[:, d] directions[d].

    The parameters of a point exist only during its evaluation, so memory does not grow
    with the number of points. For a data set in K batches use the `loss_fn`
    `lambda p, batches: mean_over_batches(lambda b: loss(p, b), batches)` with
    `landscape.curvature.mean_over_batches`.

    Example:
      >>> import jax.numpy as jnp
      >>> from landscape import surface
      >>> loss_fn = lambda params, batch: jnp.sum(params**2)
      >>> direction = jnp.array([1.0, 0.0])
      >>> points = surface.grid([-1.0, 0.0, 2.0])
      >>> print(surface.loss_surface(loss_fn, jnp.zeros(2), None, [direction], points))
      [1. 0. 4.]

    Args:
      loss_fn: maps (params, batch) to a scalar.
      params: the origin, a tree of floating-point arrays. Arrays narrower than float32
        reach `loss_fn` as float32, because their rounding hides small steps.
      batch: passed to `loss_fn`.
      directions: D trees like `params`.
      coordinates: (N, D).
      batch_size: number of points evaluated at once; None evaluates one at a time.
        Larger values use a GPU better for small networks and need proportionally more
        memory.

    Returns:
      (N,). Far from the origin losses may overflow to inf or nan.

    Raises:
      ValueError: if the loss is not a scalar, a parameter is not floating point, a
        direction is not like `params`, or `coordinates` do not fit the directions.
    """
    check_floating(params)
    for i, direction in enumerate(directions):
        check_like(f"directions[{i}]", direction, params)
    coordinates = jnp.asarray(coordinates)
    if coordinates.ndim != 2 or coordinates.shape[1] != len(directions):
        raise ValueError(
            f"coordinates must be (N, {len(directions)}), one column for each "
            f"direction, got {coordinates.shape}."
        )

    def loss_at(point):
        def shift(param, *steps):
            point_like = point.astype(param.dtype)
            return param + sum(
                a * jnp.asarray(step, param.dtype)
                for a, step in zip(point_like, steps, strict=True)
            )

        shifted = jax.tree.map(shift, jax.tree.map(widen, params), *directions)
        return scalar_loss(loss_fn, shifted, batch)

    with jax.default_matmul_precision("highest"):
        return lax.map(loss_at, coordinates, batch_size=batch_size)


def fill_missing(
    evaluate: Callable[[np.ndarray], Any],
    coordinates: np.ndarray,
    losses: np.ndarray,
    *,
    piece: int,
) -> Iterator[np.ndarray]:
    """Evaluates the points of a surface that are still nan, one piece at a time.

    A caller that saves each yielded array can stop and later resume from the last one,
    with the same final result:

        losses = np.full(len(points), np.nan, np.float32)  # or an array saved before
        for losses in fill_missing(evaluate, points, losses, piece=25):
            save(losses)

    Args:
      evaluate: maps points (piece, D) to losses (piece,): a jitted `loss_surface`.
        Every call has this shape, so it compiles once.
      coordinates: (N, D).
      losses: (N,), nan where not yet evaluated.
      piece: number of points per call, >= 1.

    Yields:
      A new array (N,) after each piece. A loss that is nan is stored as inf, which
      marks it as evaluated.

    Raises:
      ValueError: if the shapes do not fit or a coordinate is not finite.
    """
    coordinates, losses = np.asarray(coordinates), np.array(losses)
    if coordinates.ndim != 2 or losses.shape != coordinates.shape[:1]:
        raise ValueError(
            "coordinates must be (N, D) and losses (N,), got "
            f"{coordinates.shape} and {losses.shape}."
        )
    if not np.isfinite(coordinates).all():
        raise ValueError("coordinates must be finite.")
    if piece < 1:
        raise ValueError(f"piece must be >= 1, got {piece}.")
    missing = np.flatnonzero(np.isnan(losses))
    for first in range(0, len(missing), piece):
        places = missing[first : first + piece]
        # The last piece is padded with its last point.
        padded = np.pad(places, (0, piece - len(places)), mode="edge")
        found = np.asarray(evaluate(coordinates[padded]))[: len(places)]
        losses[places] = np.where(np.isnan(found), np.inf, found)
        yield losses.copy()


def line(start: Any, end: Any) -> Path:
    """The straight path (1 - t) start + t end.

    Args:
      start: parameters at t = 0, a tree.
      end: parameters at t = 1, a tree like `start`.

    Returns:
      A function of the fraction t, (), to parameters, for `losses_along`. Arrays
      narrower than float32 become float32.

    Raises:
      ValueError: if `end` is not like `start`, or one of them not floating point.
    """
    check_like("end", end, start)
    check_floating(start)
    check_floating(end)
    start, end = jax.tree.map(widen, (start, end))

    def point(t):
        t = jnp.asarray(t, float)
        return jax.tree.map(
            lambda a, b: (1 - t).astype(a.dtype) * a + t.astype(a.dtype) * b, start, end
        )

    return point


def bezier(start: Any, middle: Any, end: Any) -> Path:
    """The path (1 - t)^2 start + 2 t (1 - t) middle + t^2 end (Garipov et al. 2018).

    arXiv 1802.10026, section 3.2.

    Args:
      start: parameters at t = 0, a tree.
      middle: the control point, a tree like `start`; see `fit_bezier`. The path in
        general does not pass through it, so it need not be a good network.
      end: parameters at t = 1, a tree like `start`.

    Returns:
      A function of the fraction t, (), to parameters, for `losses_along`.

    Raises:
      ValueError: if `middle` or `end` is not like `start`.
    """
    first, second = line(start, middle), line(middle, end)
    return lambda t: line(first(t), second(t))(t)


def losses_along(loss_fn: LossFn, path: Path, batch: Any, fractions: Any) -> Array:
    """Losses at path(t) for every t.

    Args:
      loss_fn: maps (params, batch) to a scalar. With batch normalization it should
        measure the statistics at each point.
      path: maps t, (), to parameters: `line`, `bezier`, or a function of your own.
      batch: passed to `loss_fn`.
      fractions: t, (N,), usually from 0 to 1.

    Returns:
      (N,).

    Raises:
      ValueError: if the loss is not a scalar, or `fractions` are not (N,).
    """
    fractions = jnp.asarray(fractions, float)
    if fractions.ndim != 1:
        raise ValueError(f"fractions must be (N,), got shape {fractions.shape}.")
    with jax.default_matmul_precision("highest"):
        return lax.map(lambda t: scalar_loss(loss_fn, path(t), batch), fractions)


def barrier(losses: Array, fractions: Any) -> Array:
    """Largest loss above the line between the losses of both ends, ().

    The error barrier of Frankle et al. 2020 (arXiv 1912.05671): near zero if the two
    networks are connected.

    Args:
      losses: of `losses_along`, (N,), N >= 2. The first and the last are the ends.
      fractions: t of each loss, (N,), between those of the two ends, which differ.

    Raises:
      ValueError: if there are fewer than two losses, other shapes, or other fractions.
    """
    losses = widen(losses)
    fractions = jnp.asarray(fractions, losses.dtype)
    if losses.shape != fractions.shape or losses.ndim != 1 or len(losses) < 2:
        raise ValueError(
            "losses and fractions must be (N,), N >= 2, got shapes "
            f"{losses.shape} and {fractions.shape}."
        )
    share = (fractions - fractions[0]) / (fractions[-1] - fractions[0])
    check_values(
        "fractions",
        share,
        lambda x: (x >= 0) & (x <= 1),
        "between the first and the last, which differ",
    )
    return jnp.max(losses - ((1 - share) * losses[0] + share * losses[-1]))


def fit_bezier(
    key: Array,
    loss_fn: LossFn,
    start: Any,
    end: Any,
    batch_of: Callable[[Array], Any],
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    noise: float = 1e-3,
) -> tuple[Any, Array]:
    """The middle of a `bezier` path between two networks with a low mean loss.

    Each step takes one t, uniform in [0, 1], and one batch (Garipov et al. 2018, arXiv
    1802.10026, eq. 4 to 6). The middle starts halfway on the line.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from landscape import surface
      >>> ring = lambda w, batch: (jnp.sum(w**2) - 1) ** 2  # minima on a circle
      >>> start, end = jnp.array([-1.0, 0.0]), jnp.array([1.0, 0.0])
      >>> middle, _ = surface.fit_bezier(
      ...     jax.random.key(0), ring, start, end, lambda key: None,
      ...     optimizer=optax.adam(0.05), num_steps=300,
      ... )
      >>> ts = jnp.linspace(0, 1, 11)
      >>> straight = surface.losses_along(ring, surface.line(start, end), None, ts)
      >>> curve = surface.bezier(start, middle, end)
      >>> curved = surface.losses_along(ring, curve, None, ts)
      >>> print(f"{surface.barrier(straight, ts):.2f}", curved.max() < 0.1)
      1.00 True

    Args:
      key: draws the noise, the fractions and the keys of the batches.
      loss_fn: maps (params, batch) to a scalar.
      start: parameters of one network.
      end: parameters of the other.
      batch_of: maps a key to a batch.
      optimizer: of the middle.
      num_steps: S.
      noise: deviation of what is added to the first middle. On a symmetric landscape
        the gradient at exactly halfway would be zero.

    Returns:
      The middle, and the loss before each step, (S,).
    """
    check_floating(start)
    noise_key, key = jax.random.split(key)
    halfway = line(start, end)(jnp.asarray(0.5))
    leaves, structure = jax.tree.flatten(halfway)
    keys = jax.random.split(noise_key, len(leaves))
    middle = jax.tree.unflatten(
        structure,
        [
            leaf + noise * jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ],
    )

    def step(carry, number):
        middle, opt_state = carry
        t_key, batch_key = jax.random.split(jax.random.fold_in(key, number))
        t, batch = jax.random.uniform(t_key), batch_of(batch_key)
        loss, grads = jax.value_and_grad(
            lambda m: scalar_loss(loss_fn, bezier(start, m, end)(t), batch)
        )(middle)
        updates, opt_state = optimizer.update(grads, opt_state, middle)
        return (optax.apply_updates(middle, updates), opt_state), loss

    carry = middle, optimizer.init(middle)
    (middle, _), losses = lax.scan(step, carry, jnp.arange(num_steps))
    return middle, losses


class TrajectoryPlane(NamedTuple):
    """The plane found by `trajectory_pca`.

    Attributes:
      directions: two trees like the parameters, orthonormal; zero if the trajectory has
        no such direction.
      coordinates: the trajectory in the plane, (T, 2).
      explained: fraction of the squared distances from the origin along each direction,
        (2,).
    """

    directions: tuple[Any, Any]
    coordinates: Array
    explained: Array


def trajectory_pca(trajectory: Any, origin: Any) -> TrajectoryPlane:
    """The plane through `origin` that is closest to a trajectory.

    Li et al. 2018, section 7.2, applied to the matrix X of theta_t - origin, with the
    last parameters as origin. The authors' code centers X; this function does not, so
    that the plane contains the origin around which its surface is drawn. With the mean
    as origin the result is the usual PCA. X has few rows and many columns, so the
    function decomposes its T x T Gram matrix.

    Args:
      trajectory: parameters of T >= 2 steps, stacked; a tree of leaves (T, ...).
      origin: a tree like the parameters of one step.

    Returns:
      The plane. The sign of each direction makes its largest coordinate positive.

    Raises:
      ValueError: if the trees do not fit, or a leaf is not floating point.
    """
    steps = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(trajectory)}
    if len(steps) != 1 or () in steps or steps.pop()[0] < 2:
        raise ValueError("trajectory must have leaves (T, ...) with one T >= 2.")
    check_like("trajectory[0]", jax.tree.map(lambda x: x[0], trajectory), origin)
    check_floating(trajectory)
    moves = jax.tree.map(lambda x, o: widen(x) - widen(o)[None], trajectory, origin)
    moves, power = rescale(moves)
    with jax.default_matmul_precision("highest"):
        rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(moves)]
        gram = sum(row @ row.T for row in rows)
        values, vectors = jnp.linalg.eigh(gram)
        values, vectors = values[:-3:-1], vectors[:, :-3:-1]
        largest = jnp.argmax(jnp.abs(vectors), axis=0)
        vectors = vectors * jnp.sign(vectors[largest, jnp.arange(2)])[None, :]
        total = jnp.trace(gram)
        # Eigenvalues below this bound are rounding errors.
        real = values > len(gram) * jnp.finfo(gram.dtype).eps * total
        lengths = jnp.sqrt(jnp.where(real, values, 1))
        weights = jnp.where(real, 1 / lengths, 0)[None, :] * vectors  # (T, 2)
        directions = tuple(
            jax.tree.map(lambda x, w=weight: jnp.tensordot(w, x, axes=1), moves)
            for weight in weights.T
        )
    return TrajectoryPlane(
        directions=directions,
        coordinates=power * jnp.where(real, lengths, 0)[None, :] * vectors,
        explained=jnp.where(real, values / jnp.where(total > 0, total, 1), 0),
    )


def _direction_of_leaf(key, param, other, axes):
    if axes is None or (other is not None and filter_size(param.shape, axes) == 1):
        return jnp.zeros_like(param)
    dtype, param = param.dtype, widen(param)
    direction = jax.random.normal(key, param.shape, dtype).astype(param.dtype)
    if other is not None:
        other = _unit_filters(jnp.asarray(other, param.dtype), axes)
        # The second pass removes the rounding error of the first.
        for _ in range(2):
            along = jnp.sum(direction * other, axis=axes, keepdims=True)
            direction = direction - along * other
    return (_unit_filters(direction, axes) * _filter_norms(param, axes)).astype(dtype)


def _unit_filters(leaf, axes):
    norms = _filter_norms(leaf, axes)
    return leaf / jnp.where(norms > 0, norms, 1)


def _filter_norms(leaf, axes):
    return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes, keepdims=True))


def __getattr__(name):
    # The old name, for one version.
    if name != "filter_normalised_direction":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    warnings.warn(
        f"{__name__}.{name} is now {__name__}.filter_normalized_direction.",
        DeprecationWarning,
        stacklevel=2,
    )
    return filter_normalized_direction
