"""The tokens between two layers: selecting, gathering, fusing, merging, averaging.

Nothing here knows of a cascade: counts are Python ints, scores are arrays.

Token merging follows Bolya et al. 2023 (arXiv 2210.09461), the fused token follows EViT
(Liang et al. 2022, arXiv 2202.07800).

Axes: B images, n current tokens (CLS first), k kept tokens, D width, d width of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FUSIONS = ("sum", "mean")


class Tokens(NamedTuple):
    """The tokens between two layers.

    Attributes:
      x: embeddings, (B, n, D); the CLS token comes first.
      position: position of each token in the input sequence, (B, n): 0 for CLS, -1 for
        a fused token.
      score: importance of each token, (B, n), float32.
      weights: number of tokens that each row represents, (B, n); None means one each.
        Zero hides a row, such as one that pads an image: no row attends to it, and a
        cascade keeps it only where nothing else is left.
      previous: ranking before the attention of this layer, (B, n); only the stale
        threshold of the released code needs it.
    """

    x: jax.Array
    position: jax.Array
    score: jax.Array
    weights: jax.Array | None = None
    previous: jax.Array | None = None


def top_mask(score: jax.Array, count: int) -> jax.Array:
    """Marks the largest scores of each image; ties go to the first.

    Compares all pairs: n is a few hundred, and sorting is slow on the CPU.

    Args:
      score: (B, n).
      count: k, how many are marked.

    Returns:
      Mask, (B, n).
    """
    ahead = score[:, None, :] > score[:, :, None]
    order = jnp.arange(score.shape[1])
    earlier = (order[None, :] < order[:, None])[None]
    ahead |= (score[:, None, :] == score[:, :, None]) & earlier
    return jnp.sum(ahead, axis=2) < count


def mask_to_indices(mask: jax.Array, count: int) -> jax.Array:
    """Indices of the True entries of each row.

    Args:
      mask: (B, n), with k True entries in every row.
      count: k.

    Returns:
      Ascending indices, int32 (B, k).
    """
    place = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    hit = place[:, None, :] == jnp.arange(count)[None, :, None]  # (B, count, n)
    return jnp.sum(jnp.where(hit, jnp.arange(mask.shape[1])[None, None], 0), axis=2)


def take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Takes rows of each image.

    Args:
      x: (B, n, ...).
      indices: (B, k), from 0 to n - 1; they are not checked.

    Returns:
      (B, k, ...).
    """
    # Gathers whole rows; take_along_axis gathers single numbers.
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, indices)


def gather(tokens: Tokens, ranking: jax.Array, count: int) -> Tokens:
    """The `count` tokens that rank highest, in their order.

    Args:
      tokens: n tokens per image.
      ranking: the larger, the more important, (B, n).
      count: k.

    Returns:
      k tokens per image.
    """
    indices = mask_to_indices(top_mask(ranking, count), count)
    return Tokens(
        *(field if field is None else take(field, indices) for field in tokens)
    )


def fuse(
    tokens: Tokens, ranking: jax.Array, count: int, *, form: str = "sum"
) -> Tokens:
    """The `count` - 1 tokens that rank highest and one token fused from the others.

    The fused token comes last and has position -1. In form "sum" it is sum_i a_i x_i
    over the other tokens, where a_i is the ranking, as in the code of EViT's authors
    (youweiliang/evit). Form "mean" divides the sum by sum_i a_i.

    Args:
      tokens: n tokens per image.
      ranking: the larger, the more important, (B, n). It is the weight in the sum.
      count: k, the fused token included.
      form: "sum" or "mean".

    Returns:
      k tokens per image. The score of the fused token is the weighted mean of the
      scores in both forms.

    Raises:
      ValueError: if the form is unknown.
    """
    if form not in FUSIONS:
        raise ValueError(f"form must be one of {', '.join(FUSIONS)}; got {form!r}.")
    count -= 1
    fused = ~top_mask(ranking, count)
    if tokens.weights is not None:
        fused &= tokens.weights > 0
    sums = jnp.where(fused, ranking, 0.0)
    shares = sums / jnp.maximum(sums.sum(1, keepdims=True), 1e-12)
    x = jnp.einsum("bn,bnd->bd", sums if form == "sum" else shares, tokens.x)
    x = x[:, None]  # (B, 1, D)
    score = jnp.sum(shares * tokens.score, axis=1, keepdims=True)
    kept = gather(tokens, ranking, count)
    no_position = jnp.full_like(kept.position[:, :1], -1)
    weights = kept.weights
    if weights is not None:
        # Fused from hidden rows alone, the token is hidden.
        weight = jnp.any(fused, axis=1, keepdims=True).astype(weights.dtype)
        weights = jnp.concatenate([weights, weight], axis=1)
    return kept._replace(
        x=jnp.concatenate([kept.x, x.astype(kept.x.dtype)], axis=1),
        position=jnp.concatenate([kept.position, no_position], axis=1),
        score=jnp.concatenate([kept.score, score], axis=1),
        weights=weights,
    )


def merge(tokens: Tokens, keys: jax.Array, keep: int, *, num_prefix: int = 1) -> Tokens:
    """Bipartite soft matching: merges tokens until CLS and `keep` others remain.

    Tokens are assigned alternately to a set A (which contains CLS) and a set B. The
    tokens of A whose keys are most similar to a key of B are merged into that token of
    B, as means weighted by the number of tokens they represent. CLS and the other
    tokens of the prefix are never merged.

    Args:
      tokens: n tokens per image, with `weights`.
      keys: what similarity is measured on, (B, n, d).
      keep: tokens left, the prefix not counted; at least half of them.
      num_prefix: number of tokens before the patches.

    Returns:
      num_prefix + keep tokens per image: the prefix in its order, then the rest of A,
      then B.
    """
    num_merged = tokens.x.shape[1] - num_prefix - keep
    if not num_merged:
        return tokens
    keys = jax.lax.stop_gradient(keys.astype(jnp.float32))
    keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    similarity = jnp.einsum("bid,bjd->bij", keys[:, ::2], keys[:, 1::2])
    # Hidden rows are merged first, and nothing is merged into them.
    sizes = tokens.weights
    similarity = jnp.where(sizes[:, None, 1::2] > 0, similarity, -2.0)
    # Of the prefix, every second token is in A, from the first on.
    in_a, in_b = (num_prefix + 1) // 2, num_prefix // 2
    similarity = similarity.at[:, :, :in_b].set(-jnp.inf)
    best = jnp.max(similarity, axis=2)  # (B, A)
    best = jnp.where(sizes[:, ::2] > 0, best, jnp.inf)
    best = best.at[:, :in_a].set(-jnp.inf)
    merged = top_mask(best, num_merged)
    onto = jax.nn.one_hot(jnp.argmax(similarity, axis=2), similarity.shape[2])
    onto = onto * merged[..., None]  # (B, A, B)
    rest = mask_to_indices(~merged, best.shape[1] - num_merged)

    def join(x, of_b):
        return jnp.concatenate(
            [x[:, :num_prefix], take(x[:, ::2], rest)[:, in_a:], of_b[:, in_b:]], axis=1
        )

    size = sizes[:, 1::2] + jnp.einsum("bij,bi->bj", onto, sizes[:, ::2])
    weighted = tokens.x * sizes[..., None]
    x = weighted[:, 1::2] + jnp.einsum("bij,bid->bjd", onto, weighted[:, ::2])
    x = (x / jnp.where(size > 0, size, 1.0)[..., None]).astype(tokens.x.dtype)
    x = jnp.where(size[..., None] > 0, x, tokens.x[:, 1::2])
    return Tokens(
        x=join(tokens.x, x),
        position=join(tokens.position, tokens.position[:, 1::2]),
        score=join(tokens.score, tokens.score[:, 1::2]),
        weights=join(sizes, size),
    )


def mean_of_patches(tokens: Tokens, *, num_prefix: int = 1) -> jax.Array:
    """Mean of the patches, each counted as often as its weight says.

    Args:
      tokens: prefix and patches of each image.
      num_prefix: number of tokens before the patches, which do not count.

    Returns:
      (B, D).
    """
    x = tokens.x[:, num_prefix:]
    if tokens.weights is None:
        return jnp.mean(x, axis=1)
    weights = tokens.weights[:, num_prefix:]
    total = jnp.sum(weights, axis=1, keepdims=True)
    shares = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bn,bnd->bd", shares, x)
