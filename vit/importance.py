"""Importance of patches and heads, computed from attention (CP-ViT, arXiv 2203.04570).

"The report" is the student report whose experiments this project repeats
(docs/report.md). "The released code" is that of CP-ViT's authors (ok858ok/CP-ViT).

A[h, i, j] is the probability with which query i of head h attends to key j. If a key
represents several tokens (`weights`), A holds the sum of their probabilities.

Axes: B images, H heads, Q queries, N tokens (CLS first).
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

PATCH_FORMS = ("max", "sum")
HEAD_FORMS = ("max", "confidence")


class Statistics(NamedTuple):
    """Reductions of the attention probabilities of one layer; None was not requested.

    Attributes:
      column_max: max_i A[h, i, j] over the queries of positive weight, (B, H, N).
      column_sum: sum_i weights[i] A[h, i, j], (B, H, N).
      row_max: max_j A[h, i, j] / max(weights[j], 1), (B, H, N): the largest probability
        of one member of a group.
      cls: A[h, 0, j], (B, H, N).
    """

    column_max: jax.Array | None = None
    column_sum: jax.Array | None = None
    row_max: jax.Array | None = None
    cls: jax.Array | None = None


STATISTICS = Statistics._fields


def statistics(
    probs: jax.Array,
    weights: jax.Array | None = None,
    names: Sequence[str] = STATISTICS,
    *,
    votes: jax.Array | None = None,
) -> Statistics:
    """Reductions of written-out probabilities.

    Args:
      probs: attention probabilities of queries, CLS first, (B, H, Q, N).
      weights: number of tokens that each key represents, (B, N); None means one each.
      names: fields of `Statistics` to compute.
      votes: weights of the queries, (B, Q); None takes `weights`.

    Returns:
      The requested fields, float32; `row_max` is (B, H, Q).
    """
    chex.assert_rank(probs, 4)
    probs = probs.astype(jnp.float32)
    votes = weights if votes is None else votes
    values = dict.fromkeys(names)
    if "column_max" in values:
        voting = probs
        if votes is not None:
            voting = jnp.where(votes[:, None, :, None] > 0, probs, 0.0)
        values["column_max"] = jnp.max(voting, axis=2)
    if "column_sum" in values:
        voting = probs if votes is None else probs * votes[:, None, :, None]
        values["column_sum"] = jnp.sum(voting, axis=2)
    if "row_max" in values:
        shares = probs
        if weights is not None:
            shares = probs / jnp.maximum(weights, 1.0)[:, None, None, :]
        values["row_max"] = jnp.max(shares, axis=3)
    if "cls" in values:
        values["cls"] = probs[:, :, 0]
    return Statistics(**values)


def needed_statistics(form: str, alpha: float, beta: float) -> tuple[str, ...]:
    """The fields of `Statistics` that `score_patches` reads, at least one.

    Args:
      form: "max" or "sum", as in `score_patches`.
      alpha: weight of the row maxima; at 0 they are not read.
      beta: weight of the column maxima; at 0 they are read only if alpha is 0.

    Raises:
      ValueError: if the form is unknown.
    """
    _check_form(form, PATCH_FORMS)
    if form == "sum":
        return ("column_sum",)
    return ("column_max",) * bool(beta or not alpha) + ("row_max",) * bool(alpha)


def patch_scores(
    probs: jax.Array,
    weights: jax.Array | None = None,
    *,
    form: str = "max",
    alpha: float = 0.0,
    beta: float = 1.0,
) -> jax.Array:
    """Importance of each token in one layer; see `score_patches`.

    Args:
      probs: attention probabilities, (B, H, N, N).
      weights: number of tokens that each row represents, (B, N); None means one each.
      form: "max" or "sum".
      alpha: weight of the attention that the token pays.
      beta: weight of the attention that the token receives.

    Returns:
      (B, N), float32; zero for tokens of weight zero.

    Raises:
      ValueError: if the form is unknown.
    """
    found = statistics(probs, weights, needed_statistics(form, alpha, beta))
    shape = probs.shape[:2] + probs.shape[3:]
    return score_patches(found, weights, shape, form=form, alpha=alpha, beta=beta)


def score_patches(
    found: Statistics,
    weights: jax.Array | None,
    shape: tuple[int, int, int],
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
      found: the fields that `needed_statistics` names.
      weights: number of tokens that each row represents, (B, N); None means one each.
        Queries of weight zero do not vote; the probability of a group is divided
        equally among its members.
      shape: (B, H, N).
      form: "max" or "sum".
      alpha: weight of the attention that the token pays.
      beta: weight of the attention that the token receives.

    Returns:
      (B, N), float32; zero for tokens of weight zero.

    Raises:
      ValueError: if the form is unknown.
    """
    _check_form(form, PATCH_FORMS)
    score = jnp.zeros(shape)
    if beta:
        column = found.column_max if form == "max" else found.column_sum
        score = score + beta * _per_member(column, weights)
    if alpha:
        score = score + alpha * (found.row_max if form == "max" else 1.0)
    score = jnp.sum(score, axis=1)
    return score if weights is None else jnp.where(weights > 0, score, 0.0)


def cls_scores(probs: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Attention from CLS to each token, mean over the heads (EViT, arXiv 2202.07800).

    Args:
      probs: attention probabilities, (B, H, Q, N); the first query is CLS.
      weights: number of tokens that each row represents, (B, N); None means one each.

    Returns:
      (B, N), float32.
    """
    return score_by_cls(statistics(probs, weights, ("cls",)), weights)


def score_by_cls(found: Statistics, weights: jax.Array | None = None) -> jax.Array:
    """`cls_scores` without the probabilities.

    Args:
      found: statistics with `cls`.
      weights: number of tokens that each row represents, (B, N); None means one each.

    Returns:
      (B, N), float32.
    """
    return jnp.mean(_per_member(found.cls, weights), axis=1)


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
    if form == "max":
        found = statistics(probs, weights, ("column_max",))
        largest = _per_member(found.column_max, weights)
    else:
        largest = statistics(probs, weights, ("row_max",)).row_max
    return jnp.sum(largest if weights is None else largest * weights[:, None], axis=2)


def segments(
    probs: jax.Array, *, num_segments: int = 3, num_prefix: int = 1
) -> jax.Array:
    """Divides the patch-and-head regions of a layer into segments of equal size.

    A region is one patch, as a key, in one head. The regions of an image are ranked by
    their average attention probability over the queries (section 2.3.1 of the report).
    Segment 0 has the smallest averages.

    Args:
      probs: attention probabilities, (B, H, N, N), queries first.
      num_segments: number of segments; their sizes differ by at most one.
      num_prefix: number of tokens before the patches, which belong to no segment.

    Returns:
      The segment of each region, int32 (B, H, P) with P = N - num_prefix.
    """
    means = probs.mean(2)[:, :, num_prefix:]  # (B, H, P)
    flat = means.reshape(means.shape[0], means.shape[1] * means.shape[2])
    ranks = jnp.argsort(jnp.argsort(flat, axis=1), axis=1)
    return (ranks * num_segments // flat.shape[1]).reshape(means.shape)


def head_segments(probs: jax.Array, *, num_segments: int = 3) -> jax.Array:
    """Divides the heads of a layer into segments of equal size by `head_scores`.

    Args:
      probs: attention probabilities, (B, H, N, N), queries first.
      num_segments: number of segments; their sizes differ by at most one.

    Returns:
      The segment of each head, int32 (B, H). Segment 0 has the smallest scores.
    """
    ranks = jnp.argsort(jnp.argsort(head_scores(probs), axis=1), axis=1)
    return ranks * num_segments // probs.shape[1]


def attention_range(
    probs: jax.Array,
    grid: tuple[int, int],
    *,
    distance: int = 3,
    num_prefix: int = 1,
) -> jax.Array:
    """Share of the patches whose strongest key is at least `distance` patches away.

    A long range means that all queries attend to a few informative patches (the
    vertical lines of the report's figure 14), so that more patches can be pruned. CLS
    is excluded as query and as key. Distances on the grid are Chebyshev distances.

    Args:
      probs: attention probabilities of the whole network, (B, H, N, N) with
        N = num_prefix + grid[0] * grid[1].
      grid: rows and columns of patches.
      distance: smallest distance that counts as long, in patches.
      num_prefix: number of tokens before the patches.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if the tokens are not CLS and the whole grid.
    """
    num_tokens = num_prefix + grid[0] * grid[1]
    if probs.shape[-2:] != (num_tokens,) * 2:
        raise ValueError(
            f"probs must have {num_tokens} queries and keys, CLS and a grid "
            f"of {grid}, got shape {probs.shape}; measure the range on the whole "
            "network, without a cascade."
        )
    strongest = jnp.argmax(probs[:, :, num_prefix:, num_prefix:], axis=-1)  # (B, H, P)
    patches = jnp.arange(grid[0] * grid[1])
    rows = jnp.abs(strongest // grid[1] - (patches // grid[1])[None, None])
    columns = jnp.abs(strongest % grid[1] - (patches % grid[1])[None, None])
    return jnp.mean((jnp.maximum(rows, columns) >= distance).astype(jnp.float32))


def _per_member(columns, weights):
    """The share of one member of each group: (B, H, N) by weights (B, N)."""
    if weights is None:
        return columns
    return columns / jnp.maximum(weights, 1.0)[:, None, :]


def _check_form(form, forms):
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}; got {form!r}.")
