"""The polynomial sine against float64 NumPy, and its derivatives to third order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functa import sine

# What the docstring of `sine.sin` promises for |x| <= 1000.
TOLERANCE = 2e-7


def angles():
    """float32 in [-1000, 1000]: random, small, and around all multiples of pi/2."""
    rng = np.random.default_rng(0)
    quadrants = np.arange(-636, 637) * (np.pi / 2)
    offsets = np.array([-1e-2, -1e-4, -1e-6, 0.0, 1e-6, 1e-4, 1e-2])
    small = np.concatenate([[0.0], np.geomspace(1e-30, 1.0, 50)])
    # Midway between two multiples the quadrant changes.
    around = (quadrants[:, None] + offsets).ravel()
    midway = (quadrants[:-1, None] + np.pi / 4 + offsets).ravel()
    parts = [rng.uniform(-1000, 1000, 100_000), around, midway, small, -small]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sincos_matches_float64(transform):
    x = angles()
    sin, cos = transform(sine.sincos)(x)
    assert sin.dtype == cos.dtype == jnp.float32
    assert np.abs(sin - np.sin(np.float64(x))).max() <= TOLERANCE
    assert np.abs(cos - np.cos(np.float64(x))).max() <= TOLERANCE
    np.testing.assert_array_equal(transform(sine.sin)(x), sin)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_rounded_once(dtype):
    x = jnp.asarray(angles(), dtype)
    y = np.float64(x)
    slope = jax.vmap(jax.grad(sine.sin))(x)
    for found, expected in (sine.sin(x), np.sin(y)), (slope, np.cos(y)):
        assert found.dtype == dtype
        # Half a unit in the last place of 1, and the error of the polynomial.
        largest = float(jnp.finfo(dtype).eps) / 4 + TOLERANCE
        assert np.abs(np.float64(found) - expected).max() <= largest


def test_derivatives_match_closed_forms():
    x = angles()
    y = np.float64(x)
    expected = [np.cos(y), -np.sin(y), -np.cos(y)]
    derivative = sine.sin
    for order, closed_form in enumerate(expected, start=1):
        derivative = jax.grad(derivative)
        error = np.abs(jax.jit(jax.vmap(derivative))(x) - closed_form).max()
        assert error <= TOLERANCE, f"order {order}: {error}"


def test_jvp_and_jacobians_match_closed_forms():
    x = jnp.array([-7.5, -0.25, 0.5, 1.75, 99.0])
    dx = jnp.array([2.0, -1.0, 0.5, 3.0, -0.125])
    y, dy = np.float64(x), np.float64(dx)
    out, tangent = jax.jvp(sine.sin, (x,), (dx,))
    np.testing.assert_allclose(out, np.sin(y), atol=TOLERANCE)
    # The tangent scales the error of the cosine.
    np.testing.assert_allclose(tangent, np.cos(y) * dy, atol=3 * TOLERANCE)

    def total(x):
        return jnp.sum(sine.sin(3.0 * x))

    hessian = jax.jit(jax.jacfwd(jax.jacrev(total)))(x)
    # 3 x is rounded to float32 before the sine: half an ulp of 297 is 1.5e-5.
    np.testing.assert_allclose(hessian, np.diag(-9 * np.sin(3 * y)), atol=9 * 2e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_matches_float64(axis):
    x = jnp.linspace(-40.0, 40.0, 6).reshape(2, 3)
    mapped = jax.jit(jax.vmap(sine.sin, in_axes=axis, out_axes=axis))
    np.testing.assert_allclose(mapped(x), np.sin(np.float64(x)), atol=TOLERANCE)


def test_derivatives_reuse_the_pair():
    def num_evaluations(function):
        lowered = jax.jit(function).lower(1.0).as_text()
        return lowered.count("optimization_barrier")  # one in each evaluation

    assert num_evaluations(lambda x: sine.sin(x) + sine.sin(2 * x)) == 2
    assert num_evaluations(jax.value_and_grad(sine.sin)) == 1
    assert num_evaluations(jax.jacfwd(jax.value_and_grad(sine.sin))) == 1


def test_non_finite_angles_give_nan():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    assert jnp.isnan(sine.sin(x)).all()
    assert jnp.isnan(jax.vmap(jax.grad(sine.sin))(x)).all()
