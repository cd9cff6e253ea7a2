"""functa.matmul: values and derivatives against plain matrix products."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functa.matmul import matmul as product

pytestmark = pytest.mark.usefixtures("unoptimized")

H = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


def plain(h, w):
    return jnp.einsum("...nk,km->...nm", h, w)


def scalar(multiply):
    """A function whose derivatives of every order in both arguments differ from 0."""
    return lambda h, w: jnp.sum(jnp.sin(multiply(jnp.cos(multiply(h, w)), w.T)))


def differentiate(f, order):
    """The gradient of sums of sines of the derivatives that `order` names."""
    for mode in order:
        jacobian = (jax.jacfwd if mode == "f" else jax.jacrev)(f, argnums=(0, 1))

        def f(h, w, jacobian=jacobian):
            return sum(jnp.sum(jnp.sin(x)) for x in jacobian(h, w))

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("num_leading", "order"),
    [
        *((0, order) for order in ("", "f", "r")),
        *((1, order) for order in ("", "f", "r", "ff", "fr", "rf", "rr")),
    ],
)
def test_derivatives_match_plain_products(num_leading, order):
    h = H if num_leading else H[0]
    actual = differentiate(scalar(product), order)(h, W)
    expected = differentiate(scalar(plain), order)(h, W)
    # Sums over Jacobians of Jacobians: float32 keeps about four digits of them.
    chex.assert_trees_all_close(actual, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("axes", [(0, None), (1, None), (None, 0), (0, 1)])
def test_vmap_matches_plain_products(axes):
    rng = np.random.default_rng(2)
    h, w = rng.standard_normal((2, 5, 3)), rng.standard_normal((3, 4))
    for axis, sizes in (axes[0], "h"), (axes[1], "w"):
        if axis is not None:
            h = np.stack([h, 2 * h], axis) if sizes == "h" else h
            w = np.stack([w, 3 * w], axis) if sizes == "w" else w
    h, w = np.float32(h), np.float32(w)

    def loss_and_grads(multiply):
        grad_fn = jax.value_and_grad(scalar(multiply), argnums=(0, 1))
        return jax.jit(jax.vmap(grad_fn, axes))(h, w)

    def grads_of_sum(multiply):
        def loss_fn(h, w):
            return jax.vmap(scalar(multiply), axes)(h, w).sum()

        return jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(h, w)

    for function in loss_and_grads, grads_of_sum:
        chex.assert_trees_all_close(
            function(product), function(plain), rtol=1e-5, atol=1e-5
        )


def test_bfloat16_rounds_operands_in_gradients_alone_and_sums_in_float32():
    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    h, g = H[0], np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
    value, pullback = jax.vjp(lambda h, w: product(h, w, dtype="bfloat16"), h, W)
    to_h, to_w = pullback(jnp.asarray(g))
    h16, w16, g16 = (np.asarray(rounded(jnp.asarray(x))) for x in (h, W, g))
    chex.assert_trees_all_close(
        (value, to_h, to_w), (h @ W, g16 @ w16.T, h16.T @ g16), rtol=1e-6, atol=1e-6
    )
    assert {x.dtype for x in (value, to_h, to_w)} == {jnp.dtype("float32")}


def test_values_are_rounded_on_demand():
    h, w = jnp.asarray(H, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    exact = np.float32(h) @ np.float32(w)
    actual = product(H, W, dtype="bfloat16", round_values=True)
    np.testing.assert_allclose(actual, exact, rtol=1e-6, atol=1e-6)
    assert np.abs(actual - H @ W).max() > 1e-4
    np.testing.assert_array_equal(product(H, W, round_values=True), product(H, W))


def test_operands_of_a_product_are_of_one_dtype():
    def loss(h, w):
        return jnp.sum(jnp.sin(product(h, w, dtype="bfloat16")))

    def second(h, w):
        return jnp.sum(jnp.square(jax.grad(loss)(h, w)))

    text = jax.jit(jax.grad(second, argnums=(0, 1))).lower(H, W).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    # bfloat16 with float32 would be multiplied in float32.
    counts = {line.count("bf16>") for line in products}
    assert counts == {0, 2}


def test_gradient_of_a_kernel_is_one_product_without_a_transposition():
    grad_fn = jax.grad(lambda w, h: jnp.sum(jnp.sin(product(h, w))))
    assert "transpose" not in jax.jit(grad_fn).lower(W, H).as_text()


def test_precision_of_a_context_reaches_the_gradients():
    def grad(w, h):
        with jax.default_matmul_precision("highest"):
            return jax.grad(lambda w: jnp.sum(jnp.sin(product(h, w))))(w)

    text = jax.jit(grad).lower(W, H).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("HIGHEST" in line for line in products)
