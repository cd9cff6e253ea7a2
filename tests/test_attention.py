"""The attention layer: weighted tokens and the choice of heads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from numerics import run

from vit import attention


def test_heads_are_chosen_by_batch_or_image_and_ties_go_to_the_first():
    scores = jnp.array([[3.0, 1.0, 2.0, 2.0], [0.0, 6.0, 1.0, 1.0]])
    heads = attention.Heads(keep=2, score="max", scope="image", mode="masked")
    mask = attention.choose_heads(heads, scores)
    np.testing.assert_array_equal(mask, [[1, 0, 1, 0], [0, 1, 1, 0]])
    # Means 1.5, 3.5, 1.5, 1.5.
    mask = attention.choose_heads(heads._replace(scope="batch"), scores)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0]] * 2)


def test_a_weighted_key_counts_as_that_many_equal_keys():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    sizes = np.array([1, 3, 2])
    bias = np.log(sizes)[None, None, None].astype(np.float32)
    grouped, repeated = run(
        lambda query, key, bias: (
            attention.attention_probs(query, key, bias),
            attention.attention_probs(query, jnp.repeat(key, sizes, axis=1)),
        ),
        *(query, key, bias),
    )
    expected = np.add.reduceat(repeated, [0, 1, 4], axis=-1)
    np.testing.assert_allclose(grouped, expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(grouped, axis=-1), 1, rtol=1e-5)


def test_double_precision_stays_and_scores_are_float32():
    """Against Flax's attention, which the cascade replaces."""
    with jax.enable_x64(True):
        shape = (3, 2, 5, 3, 6)
        query, key, value = jax.random.normal(jax.random.key(0), shape, jnp.float64)
        attend = attention.CascadeAttention(names=("column_max",))
        attended = attend(query, key, value)
        expected = nn.dot_product_attention(query, key, value)
    assert attended.dtype == jnp.float64
    np.testing.assert_allclose(attended, expected, rtol=0, atol=1e-14)
    assert attend.statistics.column_max.dtype == jnp.float32
