"""Scores of patches and heads and the attention range against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from numerics import run

from vit import attention, importance
from vit.model import check_model, make

pytestmark = pytest.mark.usefixtures("unoptimized")

# 2 images, 4 heads, 6 tokens.
SIZES = np.array([[1, 3, 1, 2, 1, 1], [1, 1, 4, 1, 2, 1]])


def random_probs(num_tokens=6, seed=0):
    logits = np.random.default_rng(seed).normal(0, 2, (2, 4, num_tokens, num_tokens))
    probs = np.exp(logits)
    return probs / probs.sum(-1, keepdims=True)


def group_of(sizes):
    """Which group each member is of."""
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("form", importance.PATCH_FORMS)
@pytest.mark.parametrize(("alpha", "beta"), [(0, 1), (0.5, 0), (0.7, 1.3), (0, 0)])
def test_patch_scores_match_loops(form, alpha, beta):
    probs = random_probs()
    scores = importance.patch_scores(probs, form=form, alpha=alpha, beta=beta)
    assert scores.dtype == jnp.float32
    expected = [vit_oracle.patch_scores(p, form, alpha, beta) for p in probs]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("form", importance.PATCH_FORMS)
@pytest.mark.parametrize("weights", [None, SIZES])
def test_row_sums_rank_nothing(form, weights):
    """A row's sum is one: in the sum form alpha adds a constant."""
    weights = None if weights is None else jnp.asarray(weights, jnp.float32)
    probs = jnp.asarray(random_probs(), jnp.float32)
    without, with_rows = (
        importance.patch_scores(probs, weights, form=form, alpha=alpha)
        for alpha in (0.0, 0.5)
    )
    added = np.asarray(with_rows - without)
    if form == "sum":
        # Half for each of the four heads.
        np.testing.assert_allclose(added, 2, rtol=1e-5)
    else:
        assert np.ptp(added) > 0.1


@pytest.mark.parametrize("form", importance.PATCH_FORMS)
def test_a_groups_score_is_that_of_each_of_its_members(form):
    probs = random_probs()
    options = {"form": form, "alpha": 0.7, "beta": 1.3}
    scores = importance.patch_scores(probs, jnp.asarray(SIZES), **options)
    for image, sizes in enumerate(SIZES):
        members = vit_oracle.members(probs[image], sizes)
        expected = vit_oracle.patch_scores(members, *options.values())
        np.testing.assert_allclose(scores[image][group_of(sizes)], expected, rtol=1e-5)


@pytest.mark.parametrize("form", importance.PATCH_FORMS)
def test_hidden_tokens_do_not_vote_and_score_nothing(form):
    probs = random_probs()
    hidden = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]], bool)
    # Nobody attends to them, but their own rows are there.
    probs[np.broadcast_to(hidden[:, None, None, :], probs.shape)] = 0
    probs /= probs.sum(-1, keepdims=True)
    weights = jnp.asarray(~hidden, jnp.float32)
    options = {"form": form, "alpha": 0.7, "beta": 1.3}
    scores = importance.patch_scores(probs, weights, **options)
    for image, gone in enumerate(hidden):
        left = np.flatnonzero(~gone)
        inner = probs[image][:, left][:, :, left]
        expected = np.zeros(6)
        expected[left] = vit_oracle.patch_scores(inner, *options.values())
        np.testing.assert_allclose(scores[image], expected, rtol=1e-5)


def test_cls_scores_are_the_mean_row_of_cls():
    probs = random_probs()
    expected = [[np.mean([h[0, j] for h in p]) for j in range(6)] for p in probs]
    scores = importance.cls_scores(probs)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # The row of CLS alone is enough, and members share what a group gets.
    scores = importance.cls_scores(probs[:, :, :1], jnp.asarray(SIZES))
    np.testing.assert_allclose(scores, np.array(expected) / SIZES, rtol=1e-5)


@pytest.mark.parametrize("form", importance.HEAD_FORMS)
def test_head_scores_match_loops(form):
    probs = random_probs()
    scores = importance.head_scores(probs, form=form)
    assert scores.shape == (2, 4) and scores.dtype == jnp.float32
    expected = [vit_oracle.head_scores(p, form) for p in probs]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    weighted = importance.head_scores(probs, jnp.asarray(SIZES), form=form)
    for image, sizes in enumerate(SIZES):
        members = vit_oracle.members(probs[image], sizes)
        expected = vit_oracle.head_scores(members, form)
        np.testing.assert_allclose(weighted[image], expected, rtol=1e-5)


@pytest.mark.parametrize("form", importance.HEAD_FORMS)
def test_hidden_tokens_leave_the_head_scores_alone(form):
    probs = random_probs()
    probs[..., 2] = 0
    probs /= probs.sum(-1, keepdims=True)
    weights = jnp.ones((2, 6)).at[:, 2].set(0)
    left = np.array([0, 1, 3, 4, 5])
    expected = importance.head_scores(probs[:, :, left][..., left], form=form)
    scores = importance.head_scores(probs, weights, form=form)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_the_sum_of_a_heads_attention_ranks_no_head():
    """Why there is no sum form for heads: it is the number of tokens."""
    sums = [[sum(map(sum, head)) for head in image] for image in random_probs()]
    np.testing.assert_allclose(sums, 6, rtol=1e-12)
    scores = importance.head_scores(random_probs())
    assert np.all(np.ptp(scores, axis=1) > 0.1)


def test_uniform_attention_scores_lowest_and_sharp_attention_highest():
    uniform, sharp = np.full((5, 5), 0.2), np.eye(5)
    probs = np.stack([uniform, sharp])[None]
    for form in importance.HEAD_FORMS:
        scores = importance.head_scores(probs, form=form)
        np.testing.assert_allclose(scores, [[1, 5]], rtol=1e-6)


def pointing(targets, num_tokens):
    """Attention (N, N) of one head in which each patch looks mostly at its target."""
    probs = np.full((num_tokens, num_tokens), 0.5 / num_tokens)
    for query, target in enumerate(targets):
        probs[1 + query, 1 + target] += 0.5
    return probs


def test_attention_range_by_hand():
    # A grid of 2 x 5; numbers are row by row.
    nearby = pointing(range(10), 11)
    column = pointing([0] * 10, 11)  # columns 3 and 4 of both rows are 3 or 4 away
    probs = np.stack([nearby, column])[None]
    for distance, far in ((1, 9), (2, 6), (3, 4), (4, 2), (5, 0)):
        share = importance.attention_range(probs, (2, 5), distance=distance)
        np.testing.assert_allclose(share, far / 20, rtol=1e-6)
    np.testing.assert_allclose(importance.attention_range(probs, (2, 5)), 0.2)
    # CLS counts neither as a key nor as a query.
    probs[..., 0] = 9
    probs[..., 0, :] = np.linspace(0, 1, 11)
    np.testing.assert_allclose(importance.attention_range(probs, (2, 5)), 0.2)


def test_attention_range_matches_loops():
    rows, columns = 3, 4
    probs = random_probs(1 + rows * columns)
    far = total = 0
    for matrix in probs.reshape(-1, 13, 13):
        for query in range(12):
            key = max(range(12), key=lambda j: matrix[1 + query, 1 + j])
            vertical = abs(query // columns - key // columns)
            horizontal = abs(query % columns - key % columns)
            far += max(vertical, horizontal) >= 2
            total += 1
    share = importance.attention_range(probs, (rows, columns), distance=2)
    np.testing.assert_allclose(share, far / total, rtol=1e-6)
    assert 0 < far < total


def test_wrong_forms_and_grids_are_refused():
    probs = jnp.ones((2, 4, 6, 6)) / 6
    with pytest.raises(ValueError, match="form must be one of max, sum; got 'mean'"):
        importance.patch_scores(probs, form="mean")
    with pytest.raises(ValueError, match="one of max, confidence; got 'sum'"):
        importance.head_scores(probs, form="sum")
    with pytest.raises(ValueError, match=r"CLS and a grid of \(2, 3\)"):
        importance.attention_range(probs, (2, 3))
    with pytest.raises(ValueError, match="measure the range on the whole network"):
        importance.attention_range(probs[:, :, :1], (1, 5))
    with pytest.raises(AssertionError):
        importance.patch_scores(probs[0])


def test_scores_have_float32_whatever_the_attention():
    probs = jnp.asarray(random_probs(), jnp.bfloat16)
    for scores in (
        importance.patch_scores(probs),
        importance.head_scores(probs),
        importance.cls_scores(probs),
        importance.attention_range(probs, (1, 5)),
    ):
        assert scores.dtype == jnp.float32


def test_segments_are_thirds_of_the_ranked_regions():
    probs = random_probs(7)[:, :3]
    found = np.asarray(run(importance.segments, probs))
    assert found.shape == (2, 3, 6)
    for image in range(2):
        means = [
            (np.mean(probs[image, head, :, 1 + patch]), head, patch)
            for head in range(3)
            for patch in range(6)
        ]
        for rank, (_, head, patch) in enumerate(sorted(means)):
            assert found[image, head, patch] == rank // 6
    heads = run(importance.head_segments, probs)
    scores = importance.head_scores(probs)
    np.testing.assert_array_equal(heads, np.argsort(np.argsort(scores, 1), 1))


@pytest.mark.parametrize("of", ["regions", "heads"])
def test_attention_without_a_segment_is_a_sum_over_the_others(of):
    layer = attention.MultiHeadDotProductAttention(
        num_heads=3, head_dim=4, segment=attention.Segment(1, of), num_prefix=2
    )
    x = np.float32(np.random.default_rng(0).normal(size=(2, 7, 12)))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    found = run(lambda p: layer.apply({"params": p}, x), params)
    query, key, value = (
        np.einsum("bnd,dhk->bnhk", x, params[name]["kernel"])
        for name in ("query", "key", "value")
    )
    probs = attention.attention_probs(query, key)
    if of == "heads":
        pruned = np.asarray(importance.head_segments(probs) == 1)[:, :, None]
    else:
        pruned = np.zeros((2, 3, 7), bool)
        pruned[:, :, 2:] = importance.segments(probs, num_prefix=2) == 1
    assert 0 < pruned.mean() < 0.5
    left = np.where(np.broadcast_to(pruned, (2, 3, 7))[:, :, None], 0, probs)
    attended = np.einsum("bhqk,bkhd->bqhd", left, value)
    expected = np.einsum("bqhd,hdo->bqo", attended, params["out"]["kernel"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (attention.Segment(3), "a number from 0 to 2"),
        (attention.Segment(0, "rows"), "of regions or heads"),
    ],
)
def test_segments_that_do_not_exist_are_refused(segment, message):
    model = make("cifar_128", 4, 2, segment=segment)
    with pytest.raises(ValueError, match=message):
        check_model(model)
