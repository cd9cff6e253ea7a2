"""Directions, scans and trajectory planes against NumPy and closed forms."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from landscape.curvature import mean_over_batches
from landscape.filters import entry_axes
from landscape.surface import (
    barrier,
    bezier,
    fill_missing,
    filter_normalized_direction,
    fit_bezier,
    grid,
    line,
    loss_surface,
    losses_along,
    trajectory_pca,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

SHAPES = {"conv": (2, 1, 3, 5), "fc": (4, 6), "one": (1, 7), "bias": (6,), "gain": ()}


def random_tree(seed=0, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def filter_dots(a, b):
    """Inner products of filters, one for each index of the last axis."""
    axes = tuple(range(a.ndim - 1))
    return np.sum(np.float64(a) * np.float64(b), axis=axes)


def quadratic_loss(params, target):
    """Curvature 1, 2, ... for the leaves."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
    terms = [(i + 1) * jnp.sum(jnp.square(p - t)) for i, (p, t) in enumerate(leaves)]
    return 0.5 * sum(terms)


def tree_dot(a, b, weighted=False):
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return sum(
        (i + 1 if weighted else 1) * np.sum(np.float64(x) * np.float64(y))
        for i, (x, y) in enumerate(leaves)
    )


def direction_of(params, orthogonal_to=None, seed=0):
    """One compile for each kind of direction."""
    return _direction(jax.random.key(seed), params, orthogonal_to=orthogonal_to)


_direction = jax.jit(filter_normalized_direction)
plane_of = jax.jit(trajectory_pca)


def difference(a, b):
    return jax.tree.map(jnp.subtract, a, b)


# Directions.


def test_filters_are_as_long_as_those_of_the_weights():
    params = random_tree()
    params["fc"] = params["fc"].at[:, 2].set(0)
    direction = direction_of(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(direction, params)
    for name in ("conv", "fc", "one"):
        np.testing.assert_allclose(
            filter_dots(direction[name], direction[name]),
            filter_dots(params[name], params[name]),
            rtol=1e-5,
        )
        cosines = filter_dots(direction[name], params[name])
        assert len(np.unique(cosines)) > 2
    assert not direction["bias"].any() and not direction["gain"].any()


def test_filters_of_given_axes_are_as_long_as_those_of_the_weights():
    # (D, H, d) of an attention projection, (out, in, w) of Equinox, and a bias (H, d).
    shapes = {"query": (5, 2, 3), "weight": (4, 3, 2), "bias": (2, 3)}
    params = random_tree(shapes=shapes)
    direction = filter_normalized_direction(
        jax.random.key(0), params, filters={"query": (1, 2), "weight": (0,)}
    )
    for name, entries in ("query", 0), ("weight", (1, 2)):
        lengths, expected = (
            np.sum(np.square(np.float64(tree[name])), entries)
            for tree in (direction, params)
        )
        assert lengths.shape == ((2, 3) if name == "query" else (4,))
        np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    assert not direction["bias"].any()


@pytest.mark.parametrize(
    "shapes",
    [
        {"query": {"kernel": (4, 2, 3)}},  # attention
        {"kernel": (3, 4, 5)},  # a convolution in time, or scanned layers
        {"conv": {"weight": (2, 3, 4, 4)}},  # PyTorch and Equinox
        {"weight": (2, 3)},
        {"out": {"kernel": (2, 2, 3, 4)}},  # scanned attention
    ],
)
def test_filters_that_rank_and_name_do_not_tell_are_refused(shapes):
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match="do not tell which axes"):
        filter_normalized_direction(jax.random.key(0), params)
    # The axes given for one parameter leave the others without filters.
    direction = filter_normalized_direction(jax.random.key(0), params, filters={})
    assert not any(x.any() for x in jax.tree.leaves(direction))


def test_biases_and_embeddings_of_any_rank_have_no_filters():
    shapes = {"bias": (2, 3), "pos_embedding": (1, 4, 3), "token": (1, 1, 3)}
    direction = direction_of(random_tree(shapes=shapes))
    assert not any(x.any() for x in jax.tree.leaves(direction))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"fd": (0,)}, "filters name fd, but the parameters are bias, conv"),
        ({"fc": (2,)}, r"filters\['fc'\] must be different axes"),
        ({"fc": (0, -2)}, "must be different axes"),
        ({"fc": 1}, r"as a tuple, got 1"),
    ],
)
def test_filters_that_do_not_fit_are_refused(filters, message):
    with pytest.raises(ValueError, match=message):
        filter_normalized_direction(jax.random.key(0), random_tree(), filters=filters)


def test_filters_of_an_nnx_state_are_those_of_its_dict():
    """The leaves of a state are called "conv/kernel/value"."""
    rngs = nnx.Rngs(0)
    layers = {
        "conv": nnx.Conv(2, 3, (2, 2), rngs=rngs),
        "out": nnx.Linear(4, 3, rngs=rngs),
        "words": nnx.Embed(5, 4, rngs=rngs),
    }
    state = nnx.state(nnx.Dict(layers), nnx.Param)
    expected = {
        "conv/bias": None,
        "conv/kernel": (0, 1, 2),
        "out/bias": None,
        "out/kernel": (0,),
        "words/embedding": None,
    }
    given = {"conv/kernel": (3,), "out/kernel": (1,)}
    for params in (nnx.to_pure_dict(state), state):
        for filters in (None, given):
            assert entry_axes(params, filters) == list(expected.values())


def test_orthogonal_direction_keeps_the_lengths():
    params = random_tree()
    first = random_tree(1)
    # No direction of length zero to be orthogonal to.
    first["fc"] = first["fc"].at[:, 2].set(0)
    second = direction_of(params, orthogonal_to=first)
    for name in ("conv", "fc"):
        lengths = filter_dots(params[name], params[name])
        np.testing.assert_allclose(
            filter_dots(second[name], second[name]), lengths, rtol=1e-5
        )
        np.testing.assert_allclose(filter_dots(second[name], first[name]), 0, atol=1e-5)
    # A filter of one entry has no other direction.
    assert not second["one"].any()
    np.testing.assert_allclose(tree_dot(second, first), 0, atol=1e-5)


def test_orthogonal_to_nearly_the_same_direction():
    params, noise = random_tree(), random_tree(1)
    near = jax.tree.map(lambda d, x: d + 1e-4 * x, direction_of(params), noise)
    second = direction_of(params, orthogonal_to=near)
    for name in ("conv", "fc"):
        lengths = filter_dots(params[name], params[name])
        cosines = filter_dots(second[name], near[name]) / lengths
        np.testing.assert_allclose(cosines, 0, atol=1e-5)


def test_surface_does_not_see_the_scale_before_a_normalization():
    params, x = (
        random_tree(shapes={"w1": (5, 4), "w2": (4, 3)}),
        random_tree(9, {"x": (8, 5)})["x"],
    )

    def loss_fn(params, x):
        hidden = x @ params["w1"]
        # Exactly invariant: no epsilon.
        mean, std = (f(hidden, axis=0, keepdims=True) for f in (jnp.mean, jnp.std))
        return jnp.mean(jnp.square(jnp.tanh((hidden - mean) / std) @ params["w2"]))

    scale = jnp.array([[100.0, 0.01, 3.0, 7.0]])
    scaled = params | {"w1": params["w1"] * scale}
    points = grid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 4))

    @jax.jit
    def surface(params):
        first_key, second_key = jax.random.split(jax.random.key(0))
        first = filter_normalized_direction(first_key, params)
        second = filter_normalized_direction(second_key, params, orthogonal_to=first)
        return loss_surface(loss_fn, params, x, [first, second], points)

    losses = surface(params)
    assert np.std(losses) > 1e-2
    np.testing.assert_allclose(surface(scaled), losses, rtol=1e-4)


# Scans.


def test_plane_equals_the_closed_form_of_a_quadratic():
    params, target, first, second = (random_tree(seed) for seed in range(4))
    before = jax.tree.map(np.array, params)
    xs, ys = np.linspace(-1, 1, 3), np.linspace(-2, 1, 4)
    scan = jax.jit(functools.partial(loss_surface, quadratic_loss))
    losses = scan(params, target, [first, second], grid(xs, ys)).reshape(3, 4)
    # |w + x d1 + y d2 - t|^2 / 2 with the inner product of the curvature.
    dot = functools.partial(tree_dot, weighted=True)
    w = difference(params, target)
    x, y = xs[:, None], ys[None, :]
    expected = 0.5 * (
        dot(w, w)
        + x**2 * dot(first, first)
        + y**2 * dot(second, second)
        + 2 * (x * dot(w, first) + y * dot(w, second) + x * y * dot(first, second))
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    chex.assert_trees_all_equal(params, before)


def test_line_equals_a_plain_loop():
    params, target, direction = (random_tree(seed) for seed in range(3))
    points = grid(np.linspace(-1.5, 1, 7))
    assert points.shape == (7, 1)
    losses = loss_surface(quadratic_loss, params, target, [direction], points)
    for (a,), loss in zip(points, losses, strict=True):
        moved = {
            k: np.float64(params[k]) + a * np.float64(direction[k]) for k in SHAPES
        }
        gap = {k: moved[k] - np.float64(target[k]) for k in SHAPES}
        expected = 0.5 * tree_dot(gap, gap, weighted=True)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_points_in_chunks_equal_one_by_one(batch_size):
    params, target, first, second = (random_tree(seed) for seed in range(4))
    points = np.random.default_rng(0).normal(size=(10, 2))
    find = functools.partial(
        loss_surface, quadratic_loss, params, target, [first, second], points
    )
    one_by_one = jax.jit(find)()
    chunked = jax.jit(functools.partial(find, batch_size=batch_size))()
    np.testing.assert_allclose(chunked, one_by_one, rtol=1e-6)


def test_data_in_chunks_equal_the_whole():
    shapes = {"w": (3, 2)}
    params, direction = random_tree(0, shapes), random_tree(1, shapes)
    batch = random_tree(2, {"x": (6, 3), "y": (6, 2)})

    def loss_fn(params, batch):
        return jnp.mean(jnp.square(jnp.tanh(batch["x"] @ params["w"]) - batch["y"]))

    def loss_over(params, batches):
        return mean_over_batches(lambda batch: loss_fn(params, batch), batches)

    points = grid(np.linspace(-1, 1, 5))
    batches = jax.tree.map(lambda x: x.reshape(3, 2, -1), batch)
    whole, chunked = (
        loss_surface(loss, params, data, [direction], points)
        for loss, data in ((loss_fn, batch), (loss_over, batches))
    )
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)


def test_interpolation_starts_and_ends_at_the_networks():
    one, other, target = (random_tree(seed) for seed in range(3))
    fractions = np.array([0.0, 0.25, 1.0])
    losses = loss_surface(
        quadratic_loss, one, target, [difference(other, one)], grid(fractions)
    )
    np.testing.assert_allclose(losses[0], quadratic_loss(one, target), rtol=1e-6)
    np.testing.assert_allclose(losses[2], quadratic_loss(other, target), rtol=1e-6)
    between = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, one, other)
    np.testing.assert_allclose(losses[1], quadratic_loss(between, target), rtol=1e-6)


def test_more_points_take_no_more_memory():
    params, target, direction = (random_tree(s, {"w": (50, 40)}) for s in range(3))

    def temporary(num_points):
        points = jnp.zeros((num_points, 1))
        scan = jax.jit(functools.partial(loss_surface, quadratic_loss))
        compiled = scan.lower(params, target, [direction], points).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Less than one more copy of the parameters for 90 more points.
    assert temporary(100) - temporary(10) < params["w"].nbytes


def test_grid_has_the_last_axis_fastest():
    points = grid([1.0, 2.0], [5.0, 6.0, 7.0])
    assert points.shape == (6, 2)
    np.testing.assert_array_equal(points.reshape(2, 3, 2)[1, 2], [2, 7])
    np.testing.assert_array_equal(points[:3, 1], [5, 6, 7])


# Resumable arrays.


def scan_to_fill(num_points=11):
    """evaluate, which compiles once, and points."""
    params, target, first, second = (random_tree(seed) for seed in range(4))
    traced = []

    @jax.jit
    def evaluate(points):
        traced.append(None)
        assert len(traced) == 1, "compiled again"
        return loss_surface(quadratic_loss, params, target, [first, second], points)

    points = np.random.default_rng(0).normal(size=(num_points, 2)).astype(np.float32)
    return evaluate, points


def test_resumed_equals_uninterrupted():
    evaluate, points = scan_to_fill()
    empty = np.full(11, np.nan, np.float32)
    stages = list(fill_missing(evaluate, points, empty, piece=4))
    assert [int(np.isnan(stage).sum()) for stage in stages] == [7, 3, 0]
    assert np.isnan(empty).all()
    resumed = list(fill_missing(evaluate, points, stages[0], piece=4))
    assert len(resumed) == 2
    np.testing.assert_array_equal(resumed[-1], stages[-1])
    assert list(fill_missing(evaluate, points, stages[-1], piece=4)) == []


def test_only_missing_points_are_worked_on():
    evaluate, points = scan_to_fill()
    known = np.arange(100.0, 111.0, dtype=np.float32)
    holes = known.copy()
    holes[[2, 5, 6, 9]] = np.nan
    (filled,) = fill_missing(evaluate, points, holes, piece=4)
    kept = np.isfinite(holes)
    np.testing.assert_array_equal(filled[kept], known[kept])
    np.testing.assert_allclose(filled[~kept], evaluate(points[~kept]), rtol=1e-6)


def test_loss_that_is_not_a_number_is_done_once():
    evaluate = lambda points: np.where(points[:, 0] > 1, np.nan, 2.0)  # noqa: E731
    points = np.arange(4.0)[:, None]
    (filled,) = fill_missing(evaluate, points, np.full(4, np.nan), piece=5)
    np.testing.assert_array_equal(filled, [2, 2, np.inf, np.inf])
    assert list(fill_missing(evaluate, points, filled, piece=5)) == []


# Trajectories.


def flat_rows(tree):
    """Leaves (T, ...) -> (T, n)."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.float64(x).reshape(len(x), -1) for x in leaves], axis=1)


def random_trajectory(num_steps=5):
    """A walk, so that few directions explain most."""
    rng = np.random.default_rng(0)
    return {
        k: jnp.asarray(np.cumsum(rng.normal(size=(num_steps, *s)), axis=0), jnp.float32)
        for k, s in SHAPES.items()
    }


@pytest.mark.parametrize("around", ["last", "mean"])
def test_trajectory_plane_equals_the_svd(around):
    trajectory = random_trajectory()
    if around == "last":
        origin = jax.tree.map(lambda x: x[-1], trajectory)
    else:
        origin = jax.tree.map(lambda x: jnp.mean(x, axis=0), trajectory)
    plane = plane_of(trajectory, origin)
    rows = flat_rows(trajectory) - flat_rows(jax.tree.map(lambda x: x[None], origin))
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    signs = np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(len(s))])[:2]
    np.testing.assert_allclose(plane.explained, s[:2] ** 2 / np.sum(s**2), rtol=1e-4)
    np.testing.assert_allclose(
        plane.coordinates, u[:, :2] * s[:2] * signs, rtol=1e-4, atol=1e-4
    )
    for direction, expected, sign in zip(plane.directions, vt, signs, strict=False):
        chex.assert_trees_all_equal_shapes_and_dtypes(direction, origin)
        flat = flat_rows(jax.tree.map(lambda x: x[None], direction))[0]
        np.testing.assert_allclose(flat, sign * expected, rtol=1e-4, atol=1e-5)


def test_trajectory_inside_a_plane_is_recovered():
    origin, first, second = (random_tree(seed) for seed in range(3))
    path = np.array([[3.0, 1.0], [2.0, -1.0], [1.0, 0.5], [0.5, 0.0], [0.0, 0.0]])
    trajectory = {
        k: jnp.asarray(
            origin[k][None] + np.tensordot(path, np.stack([first[k], second[k]]), 1),
            jnp.float32,
        )
        for k in SHAPES
    }
    plane = plane_of(trajectory, origin)
    np.testing.assert_allclose(np.sum(plane.explained), 1, rtol=1e-5)
    for k in SHAPES:
        directions = np.stack([direction[k] for direction in plane.directions])
        rebuilt = origin[k][None] + np.tensordot(plane.coordinates, directions, 1)
        np.testing.assert_allclose(rebuilt, trajectory[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_trajectory_whose_squares_float32_cannot_hold(scale):
    steps = {"w": scale * jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])}
    plane = plane_of(steps, {"w": jnp.zeros(2)})
    np.testing.assert_allclose(plane.explained, [0.64, 0.36], rtol=1e-5)
    expected = scale * np.array([[0, 3], [4, 0], [0, 0]])
    np.testing.assert_allclose(plane.coordinates, expected, rtol=1e-5)


@pytest.mark.parametrize("num_directions", [0, 1])
def test_straight_trajectory_has_no_second_direction(num_directions):
    origin, first = random_tree(0), random_tree(1)
    path = num_directions * np.array([2.0, 1.0, 0.5, -1.0, 0.0])
    trajectory = {
        k: jnp.asarray(origin[k][None] + np.multiply.outer(path, first[k]), jnp.float32)
        for k in SHAPES
    }
    plane = plane_of(trajectory, origin)
    np.testing.assert_allclose(plane.explained, [num_directions, 0], atol=1e-5)
    length = np.sqrt(tree_dot(first, first))
    expected = np.stack([length * path, np.zeros(5)], axis=1)
    np.testing.assert_allclose(plane.coordinates, expected, rtol=1e-5, atol=1e-6)
    assert not any(x.any() for x in jax.tree.leaves(plane.directions[1]))


# Errors.


def test_scans_that_do_not_fit_are_refused():
    params, target, direction = (random_tree(seed) for seed in range(3))
    scan = functools.partial(loss_surface, quadratic_loss, params, target)
    message = re.escape("directions[0] must have the structure of params")
    with pytest.raises(ValueError, match=message):
        scan([{"fc": params["fc"]}], np.zeros((2, 1)))
    message = re.escape("directions[1]['bias'] must have the shape (6,)")
    with pytest.raises(ValueError, match=message):
        scan([direction, direction | {"bias": jnp.zeros(5)}], np.zeros((2, 2)))
    message = re.escape("must be (N, 1), one column for each direction, got (2, 2)")
    with pytest.raises(ValueError, match=message):
        scan([direction], np.zeros((2, 2)))
    with pytest.raises(
        ValueError, match=re.escape("scalar, got float32 of shape (6,)")
    ):
        loss_surface(
            lambda p, batch: p["bias"], params, target, [direction], np.zeros((2, 1))
        )
    with pytest.raises(ValueError, match="orthogonal_to must have the structure"):
        filter_normalized_direction(jax.random.key(0), params, orthogonal_to={})


def test_arrays_that_cannot_be_filled_are_refused():
    points, losses = np.zeros((4, 2)), np.full(4, np.nan)
    fill = functools.partial(fill_missing, lambda points: points[:, 0])
    with pytest.raises(ValueError, match=re.escape("got (4, 2) and (3,)")):
        next(fill(points, losses[:3], piece=2))
    with pytest.raises(ValueError, match="coordinates must be finite"):
        next(fill(points + np.nan, losses, piece=2))
    with pytest.raises(ValueError, match="piece must be >= 1, got 0"):
        next(fill(points, losses, piece=0))


def test_trajectories_that_do_not_fit_are_refused():
    trajectory = random_trajectory()
    origin = jax.tree.map(lambda x: x[0], trajectory)
    with pytest.raises(ValueError, match=re.escape("leaves (T, ...) with one T >= 2")):
        trajectory_pca(trajectory | {"bias": jnp.zeros((4, 6))}, origin)
    with pytest.raises(ValueError, match=re.escape("leaves (T, ...) with one T >= 2")):
        trajectory_pca(origin, origin)
    with pytest.raises(ValueError, match=re.escape("trajectory[0] must have the str")):
        trajectory_pca({"bias": trajectory["bias"]}, origin)


# Paths between two networks.


def test_line_and_curve_by_hand():
    start, middle, end = (random_tree(seed) for seed in (0, 1, 2))
    t = 0.3
    weights = {"line": (1 - t, 0, t), "curve": ((1 - t) ** 2, 2 * t * (1 - t), t**2)}
    for name, path in ("line", line(start, end)), ("curve", bezier(start, middle, end)):
        expected = jax.tree.map(
            lambda *w, c=weights[name]: sum(a * x for a, x in zip(c, w, strict=True)),
            *(start, middle, end),
        )
        chex.assert_trees_all_close(path(t), expected, rtol=1e-5, atol=1e-6)
        # Exactly the two networks at the ends.
        chex.assert_trees_all_equal(path(0.0), start)
        chex.assert_trees_all_equal(path(1.0), end)
    target = random_tree(3)
    losses = losses_along(quadratic_loss, line(start, end), target, [0.0, t, 1.0])
    for loss, fraction in zip(losses, (0.0, t, 1.0), strict=True):
        moved = line(start, end)(fraction)
        np.testing.assert_allclose(loss, quadratic_loss(moved, target), rtol=1e-5)


def test_barrier_is_above_the_line_between_the_ends():
    assert barrier(jnp.array([1.0, 4.0, 3.0]), [0.0, 0.5, 1.0]) == 2.0
    # A loss that falls all the way has no barrier.
    assert barrier(jnp.array([3.0, 1.0, 0.0]), [0.0, 0.5, 1.0]) == 0.0
    # The line joins the first and the last loss, wherever they lie.
    assert barrier(jnp.array([1.0, 4.0, 3.0]), [0.5, 0.75, 1.0]) == 2.0
    assert barrier(jnp.array([3.0, 4.0, 1.0]), [1.0, 0.5, 0.0]) == 2.0
    with pytest.raises(ValueError, match=r"N >= 2, got shapes \(1,\) and \(1,\)"):
        barrier(jnp.ones(1), [0.0])


@pytest.mark.parametrize("fractions", [[0.5] * 3, [0, 1, 0], [0, 2, 1], [0, 1, np.nan]])
def test_fractions_outside_of_their_ends_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions must be between the first and the"):
        barrier(jnp.array([1.0, 2.0, 1.0]), fractions)


def test_curve_goes_around_a_barrier():
    ring = lambda w, batch: batch * (jnp.sum(w["w"] ** 2) - 1) ** 2  # noqa: E731
    start, end = {"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}
    middle, losses = fit_bezier(
        jax.random.key(0),
        ring,
        start,
        end,
        lambda key: jax.random.uniform(key, minval=0.5, maxval=1.5),
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 400)),
        num_steps=400,
    )
    fractions = jnp.linspace(0, 1, 21)
    straight = losses_along(ring, line(start, end), 1.0, fractions)
    curved = losses_along(ring, bezier(start, middle, end), 1.0, fractions)
    assert barrier(straight, fractions) == 1.0
    assert barrier(curved, fractions) < 0.1 and losses.shape == (400,)
    # By symmetry the middle lies above or below the center, at (0, h). The loss is
    # (4 u (u h^2 - 1))^2 with u = t (1 - t), its mean over t least at
    # h^2 = E[u^3] / E[u^4] = 630 / 140.
    np.testing.assert_allclose(np.abs(middle["w"]), [0, 4.5**0.5], atol=0.1)


def test_paths_between_other_trees_are_refused():
    with pytest.raises(ValueError, match="end"):
        line(random_tree(), {})
    with pytest.raises(ValueError, match=r"fractions must be \(N,\)"):
        losses_along(quadratic_loss, line(*[random_tree()] * 2), None, 0.5)


def test_steps_below_the_spacing_of_bfloat16_are_taken():
    origin = {"w": jnp.ones(2, jnp.bfloat16)}
    end = {"w": jnp.full(2, 1.5, jnp.bfloat16)}

    def loss_fn(params, batch):
        return jnp.sum(params["w"])

    points = np.array([[0.001], [0.002]])
    expected = 2 + 2 * points[:, 0]
    losses = loss_surface(loss_fn, origin, None, [origin], points)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    path = line(origin, end)
    losses = losses_along(loss_fn, path, None, 2 * points[:, 0])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # Squares of these weights underflow in float16.
    small = {"kernel": jnp.full((3, 2), 1e-4, jnp.float16)}
    direction = filter_normalized_direction(jax.random.key(0), small)["kernel"]
    assert direction.dtype == jnp.float16
    norms = np.linalg.norm(np.float64(direction), axis=0)
    np.testing.assert_allclose(norms, 1e-4 * np.sqrt(3), rtol=1e-2)
    # The decomposition of a trajectory has no kernel for 16 bits.
    plane = trajectory_pca({"w": jnp.array([[3, 4], [0, 0]], jnp.bfloat16)}, end)
    moves = np.array([[1.5, 2.5], [-1.5, -1.5]])
    rebuilt = sum(
        np.outer(plane.coordinates[:, i], plane.directions[i]["w"]) for i in range(2)
    )
    np.testing.assert_allclose(rebuilt, moves, rtol=1e-5)


def test_integers_are_refused_or_measured_as_floats():
    params = {"w": jnp.zeros(2, int)}
    with pytest.raises(ValueError, match="floating point .* got int32 at 'w'"):
        loss_surface(lambda p, b: 0.0, params, None, [params], np.zeros((1, 1)))
    with pytest.raises(ValueError, match="floating point .* got int32 at 'w'"):
        line(params, params)
    # A count of steps is longer than any step of the weights.
    steps = {"w": jnp.ones((3, 2)), "count": jnp.arange(3)}
    with pytest.raises(ValueError, match="floating point .* got int32 at 'count'"):
        trajectory_pca(steps, {"w": jnp.ones(2), "count": jnp.array(2)})
    assert barrier(jnp.array([1, 5, 2]), [0, 0.5, 1]) == 3.5
