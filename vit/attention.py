"""Self-attention with a choice of heads and with weighted tokens.

Parameters carry the names and shapes of google-research/vision_transformer. Two things
are added to the standard layer: a row may represent several tokens (`weights`), and the
output may use only the most important heads (`Heads`).

Axes: B images, N tokens (CLS first), Q queries, D width, H heads, d width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit import importance
from vit.attention_kernels import (
    attention_probs,
    blocked_attention,
    pallas_attention,
    plain_attention,
    weights_to_bias,
)
from vit.importance import Statistics
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


class Segment(NamedTuple):
    """Attention without one of the segments of `importance.segments`, in all layers.

    The probabilities in the segment are set to zero, and the others stay as they are.
    This shows what the regions contribute; no work is saved.

    Attributes:
      number: the segment, from 0, the least attended.
      of: "regions" (patches in heads) or "heads" (`importance.head_segments`).
    """

    number: int
    of: str = "regions"


class Attended(NamedTuple):
    """Output of an attention layer.

    Attributes:
      update: added to the residual path, (B, N, D).
      statistics: the requested reductions of the attention probabilities.
      keys: mean of the keys over the heads, (B, N, d).
      probs: attention probabilities, float32, (B, H, N, N), if they were written out.
    """

    update: jax.Array
    statistics: Statistics
    keys: jax.Array
    probs: jax.Array | None = None


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention over weighted tokens.

    Attributes:
      num_heads: H.
      head_dim: d.
      heads: how many heads to keep and how to choose them; None keeps all. The choice
        needs the probabilities, so they are written out.
      segment: the segment to leave out; None leaves out nothing.
      num_prefix: number of tokens before the patches.
      statistics: fields of `importance.Statistics` to return. The probabilities are
        written out and returned too while Flax collects intermediates.
      implementation: see `attend`.
      dtype: compute dtype of the matrix products.
    """

    num_heads: int
    head_dim: int
    heads: Heads | None
    segment: Segment | None
    num_prefix: int
    statistics: tuple[str, ...]
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
          The update (B, N, D), the requested statistics and the mean keys.
        """
        shape = (self.num_heads, self.head_dim)
        x = x.astype(self.dtype)
        query = ToHeads(shape, self.dtype, name="query")(x)
        key = ToHeads(shape, self.dtype, name="key")(x)
        to_value = ToHeads(shape, self.dtype, name="value")
        out = FromHeads(x.shape[-1], shape, self.dtype, name="out")
        is_read = self.is_mutable_collection("intermediates")
        if self.heads is None and self.segment is None and not is_read:
            attended, found = attend(
                *(query, key, to_value(x), weights, self.statistics),
                implementation=self.implementation,
            )
            return Attended(out(attended), found, key.mean(2))
        bias = None if weights is None else weights_to_bias(weights)[:, None, None, :]
        probs = attention_probs(query, key, bias)
        found = importance.statistics(probs, weights, self.statistics)
        kept = mask = None
        if self.heads is not None:
            scores = importance.head_scores(probs, weights, form=self.heads.score)
            mask = choose_heads(self.heads, scores)  # (B, H)
            if self.heads.mode == "compact":
                # The whole batch keeps the same heads: other values are not computed.
                kept = mask_to_indices(mask[:1], self.heads.keep)[0]
                mask = None
        used = probs if kept is None else probs[:, kept]
        if self.segment is not None:
            used = without_segment(probs, self.segment, self.num_prefix)
        attended = jnp.einsum(
            "bhqk,bkhd->bqhd", used.astype(self.dtype), to_value(x, kept)
        )
        if mask is not None:
            attended = attended * mask[:, None, :, None].astype(self.dtype)
        return Attended(out(attended, kept), found, key.mean(2), probs)


def without_segment(probs: jax.Array, segment: Segment, num_prefix: int) -> jax.Array:
    """Attention probabilities (B, H, N, N) with those of a segment set to zero."""
    if segment.of == "heads":
        pruned = importance.head_segments(probs) == segment.number  # (B, H)
        pruned = pruned[:, :, None]
    else:
        regions = importance.segments(probs, num_prefix=num_prefix)
        pruned = jnp.pad(
            regions == segment.number, ((0, 0), (0, 0), (num_prefix, 0))
        )  # (B, H, N)
    return jnp.where(pruned[:, :, None], 0.0, probs)


def choose_heads(heads: Heads, scores: jax.Array) -> jax.Array:
    """Mask (B, H) of the heads with the largest scores (B, H), by batch or by image."""
    if heads.scope == "batch":
        scores = jnp.broadcast_to(scores.mean(0, keepdims=True), scores.shape)
    return top_mask(jax.lax.stop_gradient(scores), heads.keep)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weights: jax.Array | None = None,
    statistics: Sequence[str] = (),
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, Statistics]:
    """Attention over weighted tokens, with reductions of its probabilities.

    Args:
      query: (B, N, H, d).
      key: (B, N, H, d).
      value: (B, N, H, d).
      weights: number of tokens that each row represents, (B, N); its logarithm is added
        to the logit of the row's key, and zero hides the row. None means one each.
      statistics: fields of `importance.Statistics` to return.
      implementation: a key of `IMPLEMENTATIONS`. None is the fastest that was measured:
        "pallas" for statistics of all queries in half precision with heads of width 64
        on an NVIDIA GPU, otherwise "xla". cuDNN's kernel is faster where there are no
        statistics, but it does not train with every number of tokens.

    Returns:
      The attended values (B, N, H, d), and the statistics (B, H, N) in float32, which
      carry no gradient.

    Raises:
      ValueError: if the implementation is unknown or needs a GPU.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fusable = set(statistics) <= {"cls"}
    if implementation is None:
        # Where the kernel was run and measured.
        measured = half and query.shape[-1] == 64 and not fusable
        implementation = "pallas" if measured and _on_nvidia() else "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(
            f"implementation must be one of {known}; got {implementation!r}."
        )
    if implementation == "pallas" and not _on_nvidia():
        raise ValueError(
            "attention_implementation 'pallas' needs an NVIDIA GPU; "
            f"the backend is {jax.default_backend()}."
        )
    fused = implementation == "cudnn" or (implementation == "pallas" and half)
    if not fused or not fusable:
        return IMPLEMENTATIONS[implementation](query, key, value, weights, statistics)
    bias = None if weights is None else weights_to_bias(weights)[:, None, None, :]
    attended = jax.nn.dot_product_attention(
        query, key, value, bias, implementation="cudnn"
    )
    if not statistics:
        return attended, Statistics()
    probs = jax.lax.stop_gradient(attention_probs(query[:, :1], key, bias))
    return attended, Statistics(cls=probs[:, :, 0])


def _on_nvidia():
    return jax.devices()[0].device_kind.startswith("NVIDIA")


# How a layer attends. Where no statistics of all queries are needed, "cudnn" and, in
# half precision, "pallas" use cuDNN's kernel.
IMPLEMENTATIONS = {
    "xla": blocked_attention,
    "cudnn": blocked_attention,
    "pallas": pallas_attention,
    "plain": plain_attention,
}


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
