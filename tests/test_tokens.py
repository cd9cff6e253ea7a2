"""Selecting, fusing and merging tokens against NumPy loops and by hand."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from numerics import run

from vit.tokens import (
    FUSIONS,
    Tokens,
    fuse,
    gather,
    mask_to_indices,
    merge,
    take,
    top_mask,
)

pytestmark = pytest.mark.usefixtures("unoptimized")


def tokens_of(x, scores):
    x = jnp.asarray(x, jnp.float32)
    position = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return Tokens(x, position, jnp.asarray(scores, jnp.float32))


def test_top_mask_and_indices_match_loops_and_ties_go_to_the_first():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 4, (5, 11)).astype(np.float32)
    score[0, 3], score[1, 4], score[2] = np.inf, -np.inf, 1.0
    values = rng.normal(size=(5, 11, 2)).astype(np.float32)

    def choose(score, values, count):
        mask = top_mask(score, count)
        indices = mask_to_indices(mask, count)
        return mask, indices, take(values, indices)

    counts = 0, 1, 4, 10, 11
    chosen = run(lambda *x: [choose(*x, count) for count in counts], score, values)
    for count, (mask, indices, taken) in zip(counts, chosen, strict=True):
        for row in range(5):
            order = sorted(range(11), key=lambda i: (-score[row, i], i))
            kept = sorted(order[:count])
            assert np.flatnonzero(mask[row]).tolist() == kept
            assert indices[row].tolist() == kept
            np.testing.assert_array_equal(taken[row], values[row][kept])


def test_gathering_keeps_the_order_and_every_field():
    rng = np.random.default_rng(0)
    x, scores = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5))
    ranking = np.array([[9.0, 1.0, 5.0, 0.0, 7.0], [9.0, 8.0, 0.0, 7.0, 1.0]])
    tokens = tokens_of(x, scores)
    kept = run(lambda *arrays: gather(*arrays, 3), tokens, ranking)
    np.testing.assert_array_equal(kept.position, [[0, 2, 4], [0, 1, 3]])
    for image, rows in enumerate(kept.position):
        np.testing.assert_array_equal(kept.x[image], tokens.x[image, rows])
        np.testing.assert_array_equal(kept.score[image], tokens.score[image, rows])
    assert kept.weights is None and kept.previous is None
    weighted = tokens._replace(weights=jnp.arange(10.0).reshape(2, 5))
    kept = run(lambda *arrays: gather(*arrays, 3), weighted, ranking)
    np.testing.assert_array_equal(kept.weights, [[0, 2, 4], [5, 6, 8]])


def test_fused_token_is_evits_sum_or_the_mean_weighted_by_the_scores():
    x = np.random.default_rng(0).normal(size=(1, 6, 3))
    scores = np.array([[9.0, 0.1, 0.5, 0.3, 0.2, 0.6]])
    tokens = tokens_of(x, scores)
    ranking = tokens.score.at[:, 0].set(jnp.inf)
    fused = run(
        lambda *arrays: [fuse(*arrays, 4, form=form) for form in FUSIONS],
        *(tokens, ranking),
    )
    # Numbers 1, 3 and 4, of the weights 0.1, 0.3 and 0.2.
    total = 0.1 * x[0, 1] + 0.3 * x[0, 3] + 0.2 * x[0, 4]
    score = (0.1**2 + 0.3**2 + 0.2**2) / 0.6
    for after, expected in zip(fused, (total, total / 0.6), strict=True):
        # CLS and the two best come first.
        np.testing.assert_array_equal(after.position, [[0, 2, 5, -1]])
        np.testing.assert_allclose(after.x[:, :3], x[:, [0, 2, 5]], rtol=1e-6)
        np.testing.assert_allclose(after.x[0, 3], expected, rtol=1e-5)
        np.testing.assert_allclose(after.score, [[9, 0.5, 0.6, score]], rtol=1e-5)
    with pytest.raises(ValueError, match="form must be one of sum, mean; got 'max'"):
        fuse(tokens, ranking, 4, form="max")


def test_merging_by_hand():
    # Angles of the keys: 2 is like 1, 4 is like 5 but less so, 6 is like 5 and not by
    # much; CLS is exactly like 3 and stays.
    degrees = np.radians([90, 0, 4, 90, 180, 190, 220])
    keys = np.stack([np.cos(degrees), np.sin(degrees)], axis=1)[None]
    x = np.arange(14.0).reshape(1, 7, 2) ** 2
    sizes = jnp.array([[1.0, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0]])
    tokens = tokens_of(x, np.zeros((1, 7)))._replace(weights=sizes)
    keys = jnp.asarray(keys, jnp.float32)
    tokens = run(lambda *arrays: merge(*arrays, 4), tokens, keys)
    np.testing.assert_array_equal(tokens.position, [[0, 6, 1, 3, 5]])
    np.testing.assert_array_equal(tokens.weights, [[1, 1, 3, 1, 4]])
    expected = [
        x[0, 0],
        x[0, 6],
        (x[0, 1] + 2 * x[0, 2]) / 3,
        x[0, 3],
        (x[0, 4] + 3 * x[0, 5]) / 4,
    ]
    np.testing.assert_allclose(tokens.x[0], expected, rtol=1e-6)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("num_tokens", [9, 10])
@pytest.mark.parametrize("num_merged", [1, 3, 4])
def test_merging_matches_numpy(num_tokens, num_merged):
    rng = np.random.default_rng(num_tokens + num_merged)
    x, keys = rng.normal(size=(2, 2, num_tokens, 3))
    sizes = rng.integers(1, 5, (2, num_tokens))
    tokens = tokens_of(x, np.zeros((2, num_tokens)))
    tokens = tokens._replace(weights=jnp.asarray(sizes, jnp.float32))
    keep = num_tokens - 1 - num_merged
    merged = run(
        lambda *arrays: merge(*arrays, keep), tokens, jnp.asarray(keys, jnp.float32)
    )
    for image in range(2):
        expected = vit_oracle.merge(
            [
                vit_oracle.Token(x[image, i], i, size=int(sizes[image, i]))
                for i in range(num_tokens)
            ],
            keys[image],
            num_merged,
        )
        positions = [token.position for token in expected]
        assert merged.position[image].tolist() == positions
        assert merged.weights[image].tolist() == [token.size for token in expected]
        x_expected = np.stack([token.x for token in expected])
        np.testing.assert_allclose(merged.x[image], x_expected, rtol=0, atol=1e-6)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("num_prefix", [2, 0, 5])
def test_tokens_before_the_patches_stay_first_and_are_never_merged(num_prefix):
    # All keys are equal: only the prefix tells tokens apart.
    num_patches = 8
    x = np.arange(2.0 * (num_prefix + num_patches)).reshape(1, -1, 2)
    tokens = tokens_of(x, np.zeros(x.shape[:2]))
    tokens = tokens._replace(weights=jnp.ones(x.shape[:2]))
    for keep in (6, 4):  # Two layers: the second one reads what the first one wrote.
        keys = jnp.ones((*tokens.position.shape, 3))
        layer = functools.partial(merge, keep=keep, num_prefix=num_prefix)
        tokens = run(layer, tokens, keys)
        assert tokens.x.shape == (1, num_prefix + keep, 2)
        prefix = np.arange(num_prefix)
        np.testing.assert_array_equal(tokens.position[0, :num_prefix], prefix)
        np.testing.assert_array_equal(tokens.weights[0, :num_prefix], 1)
        np.testing.assert_array_equal(tokens.x[0, :num_prefix], x[0, :num_prefix])
        assert tokens.weights.sum() == num_prefix + num_patches
