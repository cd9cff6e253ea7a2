"""Self-attention with a choice of heads and with weighted tokens.

Parameters carry the names and shapes of google-research/vision_transformer. Two things
are added to the standard layer: a row may represent several tokens (`weights`), and the
output may use only the most important heads (`Heads`).

Axes: B images, N tokens (CLS first), Q queries, D width, H heads, d width of a head.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit import importance
from vit.tokens import mask_to_indices, top_mask


class Heads(NamedTuple):
    """How one layer chooses its heads.

    Attributes:
      keep: number of heads kept.
      score: "max" or "confidence", a form of `importance.head_scores`.
      scope: "batch" or "image", see `Cascade.head_scope`.
      mode: "compact" or "masked".
    """

    keep: int
    score: str
    scope: str
    mode: str


class Attended(NamedTuple):
    """Output of an attention layer.

    Attributes:
      update: added to the residual path, (B, N, D).
      probs: attention probabilities, float32: (B, H, N, N) for all queries,
        (B, H, 1, N) for the CLS query alone, None if they were not requested.
      keys: mean of the keys over the heads, (B, N, d).
    """

    update: jax.Array
    probs: jax.Array | None
    keys: jax.Array


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention over weighted tokens.

    Attributes:
      num_heads: H.
      head_dim: d.
      heads: how many heads to keep and how to choose them; None keeps all.
      query: queries whose probabilities are returned: "all", "cls" or None. All are
        returned while Flax collects intermediates.
      implementation: argument of `jax.nn.dot_product_attention`.
      dtype: compute dtype of the matrix products.
    """

    num_heads: int
    head_dim: int
    heads: Heads | None
    query: str | None
    implementation: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None) -> Attended:
        """Attends from every token to all tokens.

        Args:
          x: normalized tokens, (B, N, D).
          weights: number of tokens that each row represents, (B, N); its logarithm is
            added to the logit of the row's key, and zero hides the row. None means
            one each.

        Returns:
          The update (B, N, D), the requested probabilities and the mean keys.
        """
        shape = (self.num_heads, self.head_dim)
        x = x.astype(self.dtype)
        query = ToHeads(shape, self.dtype, name="query")(x)
        key = ToHeads(shape, self.dtype, name="key")(x)
        to_value = ToHeads(shape, self.dtype, name="value")
        out = FromHeads(x.shape[-1], shape, self.dtype, name="out")
        bias = None
        if weights is not None:
            bias = jnp.where(weights > 0, jnp.log(jnp.maximum(weights, 1e-9)), _HIDDEN)
            bias = bias[:, None, None, :]  # (B, 1, 1, N)
        requested = self.query
        if self.heads is not None or self.is_mutable_collection("intermediates"):
            requested = "all"
        probs = None
        if requested is not None:
            first = query[:, :1] if requested == "cls" else query
            probs = attention_probs(first, key, bias)
        if requested != "all":
            attended = jax.nn.dot_product_attention(
                query, key, to_value(x), bias, implementation=self.implementation
            )
            return Attended(out(attended), probs, key.mean(2))
        kept = mask = None
        if self.heads is not None:
            scores = importance.head_scores(probs, weights, form=self.heads.score)
            mask = choose_heads(self.heads, scores)  # (B, H)
            if self.heads.mode == "compact":
                # The whole batch keeps the same heads: other values are not computed.
                kept = mask_to_indices(mask[:1], self.heads.keep)[0]
                mask = None
        used = probs if kept is None else probs[:, kept]
        attended = jnp.einsum(
            "bhqk,bkhd->bqhd", used.astype(self.dtype), to_value(x, kept)
        )
        if mask is not None:
            attended = attended * mask[:, None, :, None].astype(self.dtype)
        return Attended(out(attended, kept), probs, key.mean(2))


def choose_heads(heads: Heads, scores: jax.Array) -> jax.Array:
    """Mask (B, H) of the heads with the largest scores (B, H), by batch or by image."""
    if heads.scope == "batch":
        scores = jnp.broadcast_to(scores.mean(0, keepdims=True), scores.shape)
    return top_mask(jax.lax.stop_gradient(scores), heads.keep)


def attention_probs(
    query: jax.Array, key: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Attention probabilities, softmax(query . key / sqrt(d) + bias), in float32.

    Args:
      query: (B, Q, H, d).
      key: (B, N, H, d).
      bias: added to the logits, broadcastable to (B, H, Q, N); None adds nothing.

    Returns:
      (B, H, Q, N), float32; each row over N sums to one.
    """
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    logits = logits / jnp.sqrt(jnp.float32(query.shape[-1]))
    return nn.softmax(logits if bias is None else logits + bias)


class ToHeads(nn.Module):
    """Projects x (B, N, D) to queries, keys or values (B, N, H, d).

    With `heads`, indices of some heads, only those are computed.
    """

    shape: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x, heads=None):
        kernel = self.param("kernel", _flat_init(1), (x.shape[-1], *self.shape))
        bias = self.param("bias", nn.initializers.zeros, self.shape)
        if heads is not None:
            kernel, bias = kernel[:, heads], bias[heads]
        flat = kernel.reshape(kernel.shape[0], -1).astype(self.dtype)
        y = x @ flat + bias.reshape(-1).astype(self.dtype)[None, None]
        return y.reshape(*x.shape[:-1], *bias.shape)


class FromHeads(nn.Module):
    """Projects the outputs of the heads (B, N, H, d) to their sum (B, N, D).

    With `heads`, the input has only the heads of these indices.
    """

    hidden_size: int
    shape: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x, heads=None):
        kernel = self.param("kernel", _flat_init(2), (*self.shape, self.hidden_size))
        bias = self.param("bias", nn.initializers.zeros, (self.hidden_size,))
        if heads is not None:
            kernel = kernel[heads]
        flat = kernel.reshape(-1, self.hidden_size).astype(self.dtype)
        y = x.reshape(*x.shape[:-2], -1) @ flat
        return y + bias.astype(self.dtype)[None, None]


def _flat_init(num_inputs):
    """Xavier-uniform initializer; the first `num_inputs` axes are inputs."""

    def init(key, shape, dtype=jnp.float32):
        flat = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
        return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)

    return init


# A logit this small has probability exactly zero in float32.
_HIDDEN = -1e9
