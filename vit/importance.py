"""Importance of patches and heads, computed from attention (CP-ViT, arXiv 2203.04570).

A[h, i, j] is the probability with which query i of head h attends to key j. If a key
represents several tokens (`weights`), A holds the sum of their probabilities.

Axes: B images, H heads, Q queries, N tokens (CLS first).
"""

import chex
import jax
import jax.numpy as jnp

PATCH_FORMS = ("max", "sum")
HEAD_FORMS = ("max", "confidence")


def patch_scores(
    probs: jax.Array,
    weights: jax.Array | None = None,
    *,
    form: str = "max",
    alpha: float = 0.0,
    beta: float = 1.0,
) -> jax.Array:
    """Importance of each token in one layer, summed over the heads.

    P[j] = sum_h (alpha * reduce_i A[h, j, i] + beta * reduce_i A[h, i, j]), where
    `reduce` is a sum (the equation of the report's 2.3.2) or a maximum (the released
    code, with alpha = 0). In the sum form the alpha term is the same constant for every
    token, because each row of A sums to 1.

    Args:
      probs: attention probabilities, (B, H, N, N).
      weights: number of tokens that each row represents, (B, N); None means one each.
        Queries of weight zero do not vote; the probability of a group is divided
        equally among its members.
      form: "max" or "sum".
      alpha: weight of the attention that the token pays.
      beta: weight of the attention that the token receives.

    Returns:
      (B, N), float32; zero for tokens of weight zero.

    Raises:
      ValueError: if the form is unknown.
    """
    _check_form(form, PATCH_FORMS)
    chex.assert_rank(probs, 4)
    probs = _per_member(probs.astype(jnp.float32), weights)
    votes = 1.0 if weights is None else weights[:, None, :, None]
    score = 0.0
    if beta:
        if form == "max":
            column = jnp.max(jnp.where(votes > 0, probs, 0.0), axis=2)
        else:
            column = jnp.sum(probs * votes, axis=2)
        score = score + beta * column  # (B, H, N)
    if alpha:
        if form == "max":
            row = jnp.max(probs, axis=3)
        else:
            counts = 1.0 if weights is None else weights[:, None, None, :]
            row = jnp.sum(probs * counts, axis=3)
        score = score + alpha * row
    score = jnp.sum(jnp.broadcast_to(score, probs.shape[:2] + probs.shape[3:]), axis=1)
    return score if weights is None else jnp.where(weights > 0, score, 0.0)


def cls_scores(probs: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Attention from CLS to each token, mean over the heads (EViT, arXiv 2202.07800).

    Args:
      probs: attention probabilities, (B, H, Q, N); the first query is CLS.
      weights: number of tokens that each row represents, (B, N); None means one each.

    Returns:
      (B, N), float32.
    """
    chex.assert_rank(probs, 4)
    probs = _per_member(probs[:, :, :1].astype(jnp.float32), weights)
    return jnp.mean(probs[:, :, 0], axis=1)


def head_scores(
    probs: jax.Array, weights: jax.Array | None = None, *, form: str = "max"
) -> jax.Array:
    """Importance of each head in one layer, for each image.

    The released code has no score for heads. The report's sum of A[h, i, j] over i and
    j equals the number of tokens for every head, so it cannot rank heads. Two forms
    remain:

    * "max": the sum over j of max_i A[h, i, j], the report's "sum of patch
      informativeness in this head" with its maxima;
    * "confidence": the sum over i of max_j A[h, i, j].

    Args:
      probs: attention probabilities, (B, H, N, N).
      weights: number of tokens that each row represents, (B, N); None means one each.
      form: "max" or "confidence".

    Returns:
      (B, H), float32.

    Raises:
      ValueError: if the form is unknown.
    """
    _check_form(form, HEAD_FORMS)
    chex.assert_rank(probs, 4)
    probs = _per_member(probs.astype(jnp.float32), weights)
    counts = 1.0 if weights is None else weights[:, None, :]
    if form == "max":
        votes = 1.0 if weights is None else weights[:, None, :, None]
        largest = jnp.max(jnp.where(votes > 0, probs, 0.0), axis=2)
    else:
        largest = jnp.max(probs, axis=3)
    return jnp.sum(largest * counts, axis=2)


def attention_range(
    probs: jax.Array, grid: tuple[int, int], *, distance: int = 3
) -> jax.Array:
    """Share of the patches whose strongest key is at least `distance` patches away.

    A long range means that all queries attend to a few informative patches (the
    vertical lines of the report's figure 14), so that more patches can be pruned. CLS
    is excluded as query and as key. Distances on the grid are Chebyshev distances.

    Args:
      probs: attention probabilities of the whole network, (B, H, N, N) with
        N = 1 + grid[0] * grid[1].
      grid: rows and columns of patches.
      distance: smallest distance that counts as long, in patches.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if the tokens are not CLS and the whole grid.
    """
    if probs.shape[-2:] != (1 + grid[0] * grid[1],) * 2:
        raise ValueError(
            f"probs must have {1 + grid[0] * grid[1]} queries and keys, CLS and a grid "
            f"of {grid}, got shape {probs.shape}; measure the range on the whole "
            "network, without a cascade."
        )
    strongest = jnp.argmax(probs[:, :, 1:, 1:], axis=-1)  # (B, H, P)
    patches = jnp.arange(grid[0] * grid[1])
    rows = jnp.abs(strongest // grid[1] - (patches // grid[1])[None, None])
    columns = jnp.abs(strongest % grid[1] - (patches % grid[1])[None, None])
    return jnp.mean((jnp.maximum(rows, columns) >= distance).astype(jnp.float32))


def _per_member(probs, weights):
    if weights is None:
        return probs
    return probs / jnp.maximum(weights, 1.0)[:, None, None, :]


def _check_form(form, forms):
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}; got {form!r}.")
