"""Curvature against explicit Hessians, NumPy and closed forms."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from landscape.curvature import (
    Quadrature,
    adam_bound,
    adam_preconditioner,
    gauss_newton_vector_product,
    gradient_descent_bound,
    hessian_vector_product,
    lanczos_quadrature,
    leading_eigenvalues,
    mean_over_batches,
    preconditioned,
    sam_sharpness,
    spectral_density,
    trace,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

# Float32 sums of some ten terms of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_tree(shapes, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


MLP_SHAPES = {"w1": (4, 3), "b1": (3,), "w2": (3, 2), "b2": (2,)}


def mlp(params, inputs):
    hidden = jnp.tanh(inputs @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def cross_entropy(logits, batch):
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probs, batch["label"][:, None], axis=1))


def mlp_logits(params, batch):
    return mlp(params, batch["x"])


def mlp_loss(params, batch):
    return cross_entropy(mlp_logits(params, batch), batch)


def mlp_batch(size=5, dtype=jnp.float32):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(size, 4)), dtype)
    return {"x": x, "label": jnp.asarray(rng.integers(2, size=size))}


@functools.partial(jax.jit, static_argnums=0)
def explicit_hessian(loss_fn, params, batch):
    """(n, n), in the order of ravel_pytree."""
    flat, unravel = ravel_pytree(params)
    with jax.default_matmul_precision("highest"):
        return jax.hessian(lambda x: loss_fn(unravel(x), batch))(flat)


def symmetric(size, seed=0):
    matrix = np.random.default_rng(seed).normal(size=(size, size))
    return matrix + matrix.T


def with_eigenvalues(values, seed=0):
    """A dense matrix with these eigenvalues, and its eigenvectors as columns."""
    size = len(values)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return (q * np.asarray(values)) @ q.T, q


def operator(matrix):
    """A matrix as product of trees of two leaves, and such a tree."""
    size = len(matrix)
    tree = {"a": jnp.ones((size // 2, 1)), "b": jnp.ones(size - size // 2)}
    _, unravel = ravel_pytree(tree)
    matrix = jnp.asarray(matrix, jnp.float32)
    return lambda vector: unravel(matrix @ ravel_pytree(vector)[0]), tree


@functools.partial(jax.jit, static_argnames=("num", "num_smallest", "num_steps"))
def eigenpairs(matrix, start=None, *, seed=0, **numbers):
    """`leading_eigenvalues` of a matrix, with vectors in rows."""
    matvec, tree = operator(matrix)
    if start is not None:
        start = ravel_pytree(tree)[1](start.astype(jnp.float32))
    key = jax.random.key(seed)
    found = leading_eigenvalues(key, matvec, tree, initial_vector=start, **numbers)
    return found._replace(vectors=jax.vmap(lambda v: ravel_pytree(v)[0])(found.vectors))


@functools.partial(jax.jit, static_argnames=("num_matvecs", "method"))
def trace_of(matrix, key, **settings):
    return trace(key, *operator(matrix), **settings)


@functools.partial(jax.jit, static_argnames=("num_samples", "num_steps"))
def quadrature_of(matrix, **numbers):
    return lanczos_quadrature(jax.random.key(0), *operator(matrix), **numbers)


def count_equations(jaxpr):
    """Equations of a jaxpr with those of all that is inside."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count_equations(inner)
    return total


# Products.


def test_hessian_product_equals_explicit_hessian(float64):
    params = random_tree(MLP_SHAPES, dtype=jnp.float64)
    vector = random_tree(MLP_SHAPES, seed=1, dtype=jnp.float64)
    batch = mlp_batch(dtype=jnp.float64)
    product = jax.jit(functools.partial(hessian_vector_product, mlp_loss))
    expected = explicit_hessian(mlp_loss, params, batch) @ ravel_pytree(vector)[0]
    found = product(params, batch, vector)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-12, atol=1e-14)


def test_gauss_newton_product_equals_explicit_matrices(float64):
    params = random_tree(MLP_SHAPES, dtype=jnp.float64)
    vector = random_tree(MLP_SHAPES, seed=1, dtype=jnp.float64)
    batch = mlp_batch(dtype=jnp.float64)
    flat, unravel = ravel_pytree(params)
    logits = mlp_logits(params, batch)
    logits_of = lambda x: mlp_logits(unravel(x), batch).ravel()  # noqa: E731
    loss_of = lambda o: cross_entropy(o.reshape(logits.shape), batch)  # noqa: E731
    jacobian = jax.jit(jax.jacobian(logits_of))(flat)
    inner = jax.jit(jax.hessian(loss_of))(logits.ravel())
    expected = jacobian.T @ (inner @ (jacobian @ ravel_pytree(vector)[0]))
    product = functools.partial(gauss_newton_vector_product, mlp_logits, cross_entropy)
    found = jax.jit(product)(params, batch, vector)
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-12, atol=1e-14)


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    shapes = {"w": (4, 2)}
    params, vector = random_tree(shapes), random_tree(shapes, seed=1)
    batch = mlp_batch()
    logits = lambda params, batch: batch["x"] @ params["w"]  # noqa: E731
    loss = lambda params, batch: cross_entropy(logits(params, batch), batch)  # noqa: E731
    found, expected = jax.jit(
        lambda p, v: (
            gauss_newton_vector_product(logits, cross_entropy, p, batch, v),
            hessian_vector_product(loss, p, batch, v),
        )
    )(params, vector)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gauss_newton_passes_outputs_without_derivative_on():
    def outputs(params, batch):
        square = params["w"] ** 2
        return {"square": square, "place": jnp.argmax(square), "is_used": batch > 0}

    def loss(outputs, batch):
        chosen = outputs["is_used"] | (jnp.arange(4) == outputs["place"])
        return jnp.sum(jnp.square(outputs["square"]) * chosen)

    params = {"w": jnp.array([1.0, 2.0, 3.0, -4.0])}
    batch, ones = jnp.array([1, -1, 1, -1]), {"w": jnp.ones(4)}
    found = gauss_newton_vector_product(outputs, loss, params, batch, ones)
    # J = 2 w and H_L = 2 where an entry is used.
    np.testing.assert_allclose(found["w"], [8, 0, 72, 128])


def linear_net_loss(params, target):
    return 0.5 * jnp.sum(jnp.square(params["w2"] @ params["w1"] - target))


def test_deep_linear_network_away_from_a_minimum():
    shapes = {"w1": (3, 4), "w2": (2, 3)}
    params, v = random_tree(shapes), random_tree(shapes, seed=1)
    target = random_tree({"m": (2, 4)}, seed=2)["m"]
    w1, w2, v1, v2 = (np.float64(x[k]) for x in (params, v) for k in ("w1", "w2"))
    # The derivative of the gradients w2^T E and E w1^T, where E = w2 w1 - target.
    error, moved = w2 @ w1 - np.float64(target), v2 @ w1 + w2 @ v1
    expected = {"w1": v2.T @ error + w2.T @ moved, "w2": error @ v1.T + moved @ w1.T}
    product = functools.partial(hessian_vector_product, linear_net_loss)
    found = jax.jit(product)(params, target, v)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_spectrum_of_a_deep_linear_network_at_a_minimum():
    singular, size = np.array([2.0, 1.0, 0.5]), 3
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    params = {"w1": np.sqrt(singular)[:, None] * v.T, "w2": u * np.sqrt(singular)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    target = params["w2"] @ params["w1"]
    matvec = functools.partial(hessian_vector_product, linear_net_loss, params, target)
    # Balanced layers: s_i + s_j for every pair, and as many flat directions.
    sums = np.sort(np.add.outer(singular, singular).ravel())[::-1]
    expected = np.concatenate([sums, np.zeros(size * size)])
    find = functools.partial(
        leading_eigenvalues, matvec=matvec, params=params, num=18, num_steps=18
    )
    found = jax.jit(find)(jax.random.key(0))
    np.testing.assert_allclose(found.values, expected, **CLOSE)


def test_mean_over_batches_equals_the_whole(float64):
    batch = mlp_batch(6, dtype=jnp.float64)
    batches = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), batch)
    params = random_tree(MLP_SHAPES, dtype=jnp.float64)
    vector = random_tree(MLP_SHAPES, seed=1, dtype=jnp.float64)

    def loss_and_product(batch):
        product = hessian_vector_product(mlp_loss, params, batch, vector)
        return mlp_loss(params, batch), product

    found = jax.jit(lambda b: mean_over_batches(loss_and_product, b))(batches)
    expected = jax.jit(loss_and_product)(batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-14)


# Eigenvalues.


@pytest.mark.parametrize("sign", [1, -1])
def test_both_ends_of_an_indefinite_matrix(sign):
    matrix = sign * with_eigenvalues([-9, -4, *np.linspace(-1, 1, 14), 3, 5])[0]
    found = eigenpairs(matrix, num=2, num_smallest=2, num_steps=15)
    values, vectors = np.linalg.eigh(matrix)
    places = [-1, -2, 1, 0]
    np.testing.assert_allclose(found.values, values[places], **CLOSE)
    assert (np.asarray(found.residuals) < 1e-3).all()
    rows = np.asarray(found.vectors)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), **CLOSE)
    overlaps = np.abs(np.sum(rows * vectors[:, places].T, axis=1))
    np.testing.assert_allclose(overlaps, 1, rtol=1e-5)


def test_residuals_are_the_true_ones():
    matrix = symmetric(13)
    found = eigenpairs(matrix, num=1, num_smallest=1, num_steps=5)
    values, rows = np.asarray(found.values), np.asarray(found.vectors)
    true = np.linalg.norm(rows @ matrix - values[:, None] * rows, axis=1)
    assert true.min() > 1e-2
    np.testing.assert_allclose(found.residuals, true, rtol=1e-4)
    # No further than that from an eigenvalue, and inside the spectrum.
    eigenvalues = np.linalg.eigvalsh(matrix)
    distances = np.min(np.abs(values[:, None] - eigenvalues), axis=1)
    assert (distances <= true).all()
    assert eigenvalues[0] < values[1] < values[0] < eigenvalues[-1]


@pytest.mark.parametrize("size", [2, 13])
def test_as_many_steps_as_dimensions_give_the_whole_spectrum(size):
    matrix = symmetric(size)
    found = eigenpairs(matrix, num=size, num_steps=size)
    expected = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotated", [False, True])
def test_repeated_eigenvalues(rotated):
    values = np.repeat([3.0, 1.0, -2.0], [2, 5, 6])
    matrix = with_eigenvalues(values)[0] if rotated else np.diag(values)
    # The space closes after three steps: what follows has to be found from new vectors.
    few = eigenpairs(matrix, num=1, num_smallest=1, num_steps=5)
    np.testing.assert_allclose(few.values, [3, -2], **CLOSE)
    assert (np.asarray(few.residuals) < 1e-4).all()
    every = eigenpairs(matrix, num=13, num_steps=13)
    np.testing.assert_allclose(every.values, np.sort(values)[::-1], **CLOSE)
    rows = np.asarray(every.vectors)
    np.testing.assert_allclose(rows @ rows.T, np.eye(13), **CLOSE)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1e-12, 1e12])
def test_multiples_of_the_identity(scale):
    found = eigenpairs(scale * np.eye(13), num=13, num_steps=13)
    np.testing.assert_allclose(found.values, np.full(13, scale), rtol=1e-5)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-5 * abs(scale))
    rows = np.asarray(found.vectors)
    np.testing.assert_allclose(rows @ rows.T, np.eye(13), **CLOSE)


def test_start_in_an_invariant_space_does_not_hide_the_rest():
    matrix = np.diag([5.0, 4.0, 3.0, 2.0, 1.0, -1.0, -2.0, -6.0])
    for start in (np.eye(8)[2], np.zeros(8)):
        found = eigenpairs(matrix, start, num_smallest=1, num_steps=8)
        np.testing.assert_allclose(found.values, [5, -6], **CLOSE)


def test_warm_start_needs_fewer_steps():
    matrix, vectors = with_eigenvalues([*np.linspace(-5, 5, 39), 5.3])
    # As after a step of training: the leading eigenvector has moved a little.
    moved = matrix + 0.003 * symmetric(40, seed=1)
    expected = np.linalg.eigvalsh(moved)[-1]
    # Any norm will do.
    warm = eigenpairs(moved, 20 * vectors[:, -1], num_steps=4)
    cold = eigenpairs(moved, np.random.default_rng(2).normal(size=40), num_steps=4)
    assert warm.residuals[0] < 0.2 * cold.residuals[0]
    assert abs(expected - warm.values[0]) < 0.01 * (expected - cold.values[0])


def test_basis_stays_orthogonal_in_float32():
    # Converged ends make Lanczos without reorthogonalisation find them over again.
    values = np.concatenate([np.linspace(0, 1, 60), [10, 100, 1000]])
    found = eigenpairs(with_eigenvalues(values)[0], num=5, num_steps=40)
    np.testing.assert_allclose(found.values[:3], [1000, 100, 10], rtol=1e-4)
    assert (np.asarray(found.values[3:]) < 1.001).all()


def test_matrices_side_by_side():
    matrices = np.stack([symmetric(13, seed) for seed in range(3)])
    find = functools.partial(eigenpairs, num=1, num_smallest=1, num_steps=5)
    together = jax.vmap(find)(matrices)
    for i, matrix in enumerate(matrices):
        alone = find(matrix)
        np.testing.assert_allclose(together.values[i], alone.values, **CLOSE)
        np.testing.assert_allclose(together.residuals[i], alone.residuals, **CLOSE)


def test_sharpness_of_a_small_network():
    params, batch = random_tree(MLP_SHAPES), mlp_batch()
    matvec = functools.partial(hessian_vector_product, mlp_loss, params, batch)
    find = functools.partial(
        leading_eigenvalues, matvec=matvec, params=params, num_smallest=1, num_steps=20
    )
    found = jax.jit(find)(jax.random.key(0))
    eigenvalues = np.linalg.eigvalsh(explicit_hessian(mlp_loss, params, batch))
    assert eigenvalues[0] < -1e-3  # indefinite
    np.testing.assert_allclose(found.values, eigenvalues[[-1, 0]], **CLOSE)


def test_bfloat16_parameters_get_a_float32_recurrence():
    params = random_tree({"w": (4, 3)}, dtype=jnp.bfloat16)
    matvec = lambda vector: jax.tree.map(lambda x: 2 * x, vector)  # noqa: E731
    find = functools.partial(
        leading_eigenvalues, matvec=matvec, params=params, num_steps=3
    )
    found = jax.jit(find)(jax.random.key(0))
    assert found.values.dtype == jnp.float32
    assert found.vectors["w"].dtype == jnp.bfloat16
    # Products are rounded to 8 bits.
    np.testing.assert_allclose(found.values, [2], rtol=2e-2)


def test_product_that_is_not_finite_shows():
    found = eigenpairs(np.full((13, 13), np.nan), num=13, num_steps=13)
    assert np.isnan(found.values).all()


def test_more_steps_do_not_compile_more():
    matvec, tree = operator(symmetric(40))

    def equations(num_steps):
        find = functools.partial(
            leading_eigenvalues, matvec=matvec, params=tree, num_steps=num_steps
        )
        return count_equations(jax.make_jaxpr(find)(jax.random.key(0)).jaxpr)

    assert 20 < equations(3) == equations(39)


# Trace.


def test_hutchinson_is_exact_for_a_diagonal_matrix():
    diagonal = np.linspace(-1, 4, 11)
    found = trace_of(np.diag(diagonal), jax.random.key(0), num_matvecs=2)
    np.testing.assert_allclose(found.mean, diagonal.sum(), rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-5)


def test_hutchinson_has_no_bias_and_knows_its_error():
    matrix, count = symmetric(12), 3000
    found = trace_of(matrix, jax.random.key(0), num_matvecs=count)
    # The variance with random signs is 2 sum of A_ij^2 off the diagonal.
    beside = matrix - np.diag(np.diag(matrix))
    error = np.sqrt(2 * np.sum(beside**2) / count)
    np.testing.assert_allclose(found.standard_error, error, rtol=0.1)
    assert abs(found.mean - np.trace(matrix)) < 3 * error


def test_hutch_plus_plus_is_exact_for_low_rank():
    matrix = with_eigenvalues([7.0, 3.0, -2.0] + [0.0] * 17)[0]
    plain, found = (
        trace_of(matrix, jax.random.key(0), num_matvecs=12, method=method)
        for method in ("hutchinson", "hutch++")
    )
    np.testing.assert_allclose(found.mean, 8, rtol=1e-5)
    assert found.standard_error < 1e-5 < 1e-2 < plain.standard_error


def test_hutch_plus_plus_has_no_bias():
    matrix = symmetric(12)
    keys = jax.random.split(jax.random.key(0), 500)
    estimate = functools.partial(trace_of, num_matvecs=10, method="hutch++")
    found = jax.vmap(lambda key: estimate(matrix, key).mean)(keys)
    error = np.std(found) / np.sqrt(len(keys))
    assert abs(np.mean(found) - np.trace(matrix)) < 3 * error


def test_hutch_plus_plus_counts_its_products():
    matvec, tree = operator(symmetric(30))
    calls = []

    def counted(vector):
        jax.debug.callback(lambda: calls.append(None))
        return matvec(vector)

    estimate = functools.partial(
        trace, matvec=counted, params=tree, num_matvecs=11, method="hutch++"
    )
    jax.block_until_ready(jax.jit(estimate)(jax.random.key(0)))
    jax.effects_barrier()
    assert len(calls) == 11


# Spectral density.


def test_quadrature_moments_are_exact_for_a_diagonal_matrix():
    diagonal = np.random.default_rng(0).normal(size=30)
    found = quadrature_of(np.diag(diagonal), num_samples=4, num_steps=3)
    assert found.nodes.shape == found.weights.shape == (4, 3)
    assert (np.asarray(found.weights) >= 0).all()
    # Three nodes integrate polynomials up to degree 5; signs see a diagonal exactly.
    for degree in range(6):
        moment = np.sum(np.float64(found.weights) * np.float64(found.nodes) ** degree)
        np.testing.assert_allclose(moment, np.mean(diagonal**degree), **CLOSE)


def test_quadrature_moments_of_a_dense_matrix():
    matrix, count = symmetric(12), 2000
    found = quadrature_of(matrix, num_samples=count, num_steps=5)
    np.testing.assert_allclose(np.sum(found.weights), 1, rtol=1e-5)
    for power in (matrix, matrix @ matrix):
        degree = 1 if power is matrix else 2
        samples = np.sum(found.weights * found.nodes**degree, axis=1) * count
        error = np.std(samples) / np.sqrt(count)
        assert abs(np.mean(samples) - np.trace(power) / 12) < 3 * error


def test_density_is_a_gaussian_on_each_eigenvalue():
    # The space closes early: repeated values carry their share of the weight.
    values, sigma = np.repeat([-1.0, 0.5, 2.0], [1, 5, 4]), 0.2
    quadrature = quadrature_of(np.diag(values), num_samples=2, num_steps=6)
    grid = np.linspace(-3, 4, 701)
    density = np.asarray(spectral_density(quadrature, grid, sigma=sigma))
    bells = np.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2)
    expected = np.mean(bells, axis=1) / (sigma * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-5)
    # The width may depend on the nodes under jit.
    of_range = jax.jit(lambda q: spectral_density(q, grid, sigma=jnp.ptp(q.nodes) / 15))
    np.testing.assert_allclose(of_range(quadrature), density, rtol=1e-3, atol=1e-5)


# SAM.


def test_sam_sharpness_of_a_quadratic():
    curvature = np.array([3.0, -1.0, 0.5, 2.0, 0.0])
    start = np.array([1.0, 2.0, -1.0, 0.5, 3.0])
    loss = lambda params, scale: 0.5 * jnp.sum(scale * params["w"] ** 2)  # noqa: E731
    rise = jax.jit(functools.partial(sam_sharpness, loss, radius=0.3))
    found = rise(params={"w": jnp.float32(start)}, batch=jnp.float32(curvature))
    step = 0.3 * curvature * start / np.linalg.norm(curvature * start)
    expected = 0.5 * np.sum(curvature * ((start + step) ** 2 - start**2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert rise(params={"w": jnp.zeros(5)}, batch=jnp.float32(curvature)) == 0


# Errors.


def test_loss_that_is_no_scalar_is_refused():
    params, batch = random_tree(MLP_SHAPES), mlp_batch()
    message = re.escape(
        "must return a floating-point scalar, got float32 of shape (5, 2)"
    )
    with pytest.raises(ValueError, match=message):
        hessian_vector_product(mlp_logits, params, batch, params)
    with pytest.raises(ValueError, match=message):
        sam_sharpness(mlp_logits, params, batch, 0.1)
    with pytest.raises(ValueError, match=message):
        gauss_newton_vector_product(
            mlp_logits, lambda logits, batch: logits, params, batch, params
        )


def test_vector_unlike_the_parameters_is_refused():
    params, batch = random_tree(MLP_SHAPES), mlp_batch()
    with pytest.raises(ValueError, match="vector must have the structure of params"):
        hessian_vector_product(mlp_loss, params, batch, {"w1": params["w1"]})
    message = re.escape("vector['b1'] must have the shape (3,) of params, got (4,)")
    with pytest.raises(ValueError, match=message):
        hessian_vector_product(mlp_loss, params, batch, params | {"b1": jnp.ones(4)})
    matvec, tree = operator(symmetric(9))
    with pytest.raises(ValueError, match="initial_vector must have the struct"):
        leading_eigenvalues(
            jax.random.key(0), matvec, tree, num_steps=3, initial_vector=params
        )
    with pytest.raises(ValueError, match="the result of matvec must have"):
        trace(jax.random.key(0), lambda v: v["a"], tree, num_matvecs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, r"num_steps must be between 1 and .* \(9\), got 0"),
        ({"num_steps": 10}, r"num_steps must be between 1 and .* \(9\), got 10"),
        ({"num": 0, "num_steps": 5}, "got 0 and 0"),
        ({"num": 3, "num_smallest": 3, "num_steps": 5}, "got 3 and 3"),
        ({"num": 2, "num_smallest": -1, "num_steps": 5}, "got 2 and -1"),
    ],
)
def test_numbers_of_eigenvalues_out_of_range_are_refused(settings, message):
    matvec, tree = operator(symmetric(9))
    with pytest.raises(ValueError, match=message):
        leading_eigenvalues(jax.random.key(0), matvec, tree, **settings)


def test_other_numbers_out_of_range_are_refused():
    matvec, tree = operator(symmetric(9))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match='"hutchinson" or "hutch..", got \'xtrace\''):
        trace(key, matvec, tree, num_matvecs=9, method="xtrace")
    with pytest.raises(ValueError, match="hutchinson needs num_matvecs >= 2"):
        trace(key, matvec, tree, num_matvecs=1)
    with pytest.raises(ValueError, match=r"hutch\+\+ needs num_matvecs >= 4"):
        trace(key, matvec, tree, num_matvecs=3, method="hutch++")
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
        lanczos_quadrature(key, matvec, tree, num_samples=0, num_steps=3)
    quadrature = Quadrature(jnp.zeros((1, 2)), jnp.full((1, 2), 0.5))
    with pytest.raises(ValueError, match="sigma must be > 0"):
        spectral_density(quadrature, np.zeros(2), sigma=0)
    with pytest.raises(ValueError, match=r"grid must be \(G,\), got shape \(2, 2\)"):
        spectral_density(quadrature, np.zeros((2, 2)), sigma=1)
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\); use jax.vmap"):
        sam_sharpness(lambda params, _: jnp.sum(params), jnp.ones(2), None, jnp.ones(2))


# The preconditioned Hessian.


def test_preconditioned_eigenvalues_are_those_of_the_quotient():
    params, batch = random_tree(MLP_SHAPES, seed=3), mlp_batch(6)
    diagonal = jax.tree.map(lambda x: 0.1 + jnp.square(x), random_tree(MLP_SHAPES, 4))
    matvec = functools.partial(hessian_vector_product, mlp_loss, params, batch)
    size = ravel_pytree(params)[0].size
    found = leading_eigenvalues(
        jax.random.key(0),
        preconditioned(matvec, diagonal),
        params,
        num=3,
        num_smallest=1,
        num_steps=size,
    )
    # An eigenvalue of P^-1 H, which is not symmetric.
    quotient = (
        explicit_hessian(mlp_loss, params, batch)
        / np.asarray(ravel_pytree(diagonal)[0], np.float64)[:, None]
    )
    expected = np.sort(np.linalg.eigvals(quotient).real)[::-1]
    np.testing.assert_allclose(
        found.values, [*expected[:3], expected[-1]], rtol=2e-4, atol=2e-4
    )


def test_adam_preconditioner_is_that_of_optax():
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "eps_root": 0.3}
    optimizer = optax.scale_by_adam(**options)
    params = random_tree({"w": (2, 3), "b": (3,)})
    state = optimizer.init(params)
    for seed in range(3):
        grads = random_tree({"w": (2, 3), "b": (3,)}, seed)
        updates, state = optimizer.update(grads, state)
    found = adam_preconditioner(state.nu, state.count, **options)
    jitted = jax.jit(lambda nu: adam_preconditioner(nu, 1, **options))
    eager = adam_preconditioner(state.nu, 1, **options)
    chex.assert_trees_all_close(jitted(state.nu), eager, rtol=1e-6)
    expected = jax.tree.map(jnp.divide, state.mu, updates)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("b1", "nesterov"), [(0.0, 0), (0.9, 0), (0.9, 1)])
def test_adam_bound_divides_stable_from_unstable_steps(b1, nesterov):
    bound = adam_bound(b1, nesterov=bool(nesterov))
    # Steps -m on the quadratic with curvature `bound * (1 -+ 1 %)`: P and eta are 1.
    for factor, is_stable in ((0.99, True), (1.01, False)):
        position, mean = 1.0, 0.0
        for _ in range(3000):
            grad = factor * bound * position
            mean = b1 * mean + (1 - b1) * grad
            position -= b1 * mean + (1 - b1) * grad if nesterov else mean
        assert (abs(position) < 1e-6) == is_stable
        assert np.isfinite(position) or not is_stable


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradient_descent_bound_divides_stable_from_unstable_steps(nesterov):
    bound = gradient_descent_bound(0.9, nesterov=nesterov)
    optimizer = optax.sgd(1.0, momentum=0.9, nesterov=nesterov)
    for factor, is_stable in ((0.98, True), (1.02, False)):

        def step(_, carry, curvature=factor * bound):
            position, state = carry
            update, state = optimizer.update(curvature * position, state)
            return position + update, state

        start = jnp.float32(1), optimizer.init(jnp.float32(1))
        position, _ = jax.lax.fori_loop(0, 2000, step, start)
        assert (abs(position) < 1e-6) == is_stable


def test_preconditioner_of_another_tree_is_refused():
    matvec = preconditioned(lambda v: v, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="preconditioner"):
        matvec({"w": jnp.ones(2)})


def test_preconditioners_that_are_none_are_refused():
    fresh = optax.scale_by_adam().init(jnp.ones(2))
    with pytest.raises(ValueError, match="count must be at least 1"):
        adam_preconditioner(fresh.nu, fresh.count)
    for wrong in (1.0, -0.1, np.array([0.9, 1.0])):
        with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\)"):
            adam_bound(wrong)
        with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\)"):
            adam_preconditioner(fresh.nu, 1, b2=wrong)
    for wrong in ([1.0, -4.0], [1.0, 0.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="preconditioner must be positive"):
            preconditioned(lambda v: v, jnp.array(wrong))


@pytest.mark.parametrize("batches", [[], jnp.zeros((0, 3)), (jnp.ones(2), jnp.ones(3))])
def test_mean_over_no_or_unequal_batches_is_refused(batches):
    with pytest.raises(ValueError, match="the number of batches"):
        mean_over_batches(lambda batch: jnp.sum(batch[0]), batches)


def test_curvature_far_from_one_is_measured_as_well():
    # The squares of these eigenvalues and gradients are outside of float32.
    diagonal = np.array([3.0, -2.0, 1.0, 0.5])

    @jax.jit
    def leading(scaled):
        return leading_eigenvalues(
            jax.random.key(0),
            lambda v: scaled * v,
            jnp.zeros(4),
            num=1,
            num_smallest=1,
            num_steps=4,
        ).values

    for factor in (1e-30, 1e30):
        found = leading(jnp.float32(factor * diagonal))
        np.testing.assert_allclose(found / factor, [3, -2], rtol=1e-5)
    for factor in (1e-25, 1e25):
        # Linear: the increase is radius |g|.
        increase = sam_sharpness(
            lambda p, b, factor=factor: factor * jnp.sum(b * p),
            jnp.zeros(2),
            jnp.array([3.0, 4.0]),
            0.5,
        )
        np.testing.assert_allclose(increase / factor, 2.5, rtol=1e-5)


def test_parameters_that_are_not_floating_point_are_refused():
    key, params = jax.random.key(0), {"w": jnp.zeros(3, int)}
    for call in (
        lambda: leading_eigenvalues(key, lambda v: v, params, num_steps=3),
        lambda: trace(key, lambda v: v, params, num_matvecs=4),
        lambda: lanczos_quadrature(key, lambda v: v, params, num_steps=3),
        lambda: sam_sharpness(lambda p, b: jnp.sum(p["w"] ** 2.0), params, None, 1.0),
    ):
        with pytest.raises(ValueError, match="floating point .* got int32 at 'w'"):
            call()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_and_steps_of_16_bits_are_those_of_float32(dtype):
    # 3,000 batches: the sum outgrows the spacing of bfloat16 and the range of float16.
    mean = mean_over_batches(jnp.mean, jnp.full((3000, 2), 100, dtype))
    assert mean == 100 and mean.dtype == dtype
    # (1 + r / 2)^2 - 1 in each of 4 parameters; the step is below the spacing at 1.
    increase = sam_sharpness(
        lambda p, b: jnp.sum(jnp.square(p)), jnp.ones(4, dtype), None, 2e-4
    )
    np.testing.assert_allclose(increase, 4 * (1.0001**2 - 1), rtol=1e-2)


def test_mean_of_integers_is_not_rounded():
    assert mean_over_batches(jnp.sum, jnp.array([[1, 1], [1, 2]])) == 2.5
