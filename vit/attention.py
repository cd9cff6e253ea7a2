"""Self-attention with a choice of heads and with weighted tokens.

Parameters carry the names and shapes of google-research/vision_transformer. Four things
are added to the standard layer: a row may represent several tokens (`weights`), the
output may use only the most important heads (`Heads`) or leave out a part of the
attention (`Segment`), and reductions of the probabilities are recorded
(`importance.Statistics`).

Axes: B images, N tokens (CLS first), Q queries, D width, H heads, d width of a head.
"""

import math
from collections.abc import Callable, Sequence
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
    """What the callable of the old `cascade.attention_layer` returns.

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


def _all_heads(num_heads):
    del num_heads


# Arguments of `flax.linen.dot_product_attention` and that of `flax.nnx` that do not
# change what is computed here.
_IGNORED = {
    "broadcast_dropout",
    "dropout_rng",
    "dtype",
    "force_fp32_for_softmax",
    "module",
    "precision",
    "promote_dtype",
}


class CascadeAttention:
    """Dot-product attention in a layer of a cascade, `attend(query, key, value)`.

    A block calls it in place of `flax.linen.dot_product_attention`, once.
    `nn.MultiHeadDotProductAttention` takes it as `attention_fn`. It applies the weights
    of the rows and records what the cascade needs of the attention.

    Attributes:
      position: position of each row in the input sequence, (B, N), for example for
        rotary embeddings; -1 for a fused token and for zeroed rows.
      weights: number of tokens that each row represents, (B, N); None means one each.
      names: fields of `importance.Statistics` that are recorded.
      heads_of: maps H to the `Heads` of this layer, or to None for all heads.
      statistics: the recorded reductions, after the call.
      keys: mean of the keys over the heads, (B, N, d), after the call.
      probs: attention probabilities, float32, (B, H, N, N), if they were written out.
    """

    def __init__(
        self,
        position: jax.Array | None = None,
        weights: jax.Array | None = None,
        names: Sequence[str] = (),
        heads_of: Callable[[int], Heads | None] = _all_heads,
    ):
        self.position = position
        self.weights = weights
        self.names = tuple(names)
        self.heads_of = heads_of
        self.statistics = self.keys = self.probs = None

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: None = None,
        mask: None = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        implementation: str | None = None,
        **options: Any,
    ) -> jax.Array:
        """Attends from every row to all rows.

        Args:
          query: (B, N, H, d), not yet scaled.
          key: (B, N, H, d).
          value: (B, N, H, d).
          bias: None.
          mask: None; the weights hide what is pruned.
          dropout_rate: rate of the attention dropout, which is not supported.
          deterministic: whether there is no dropout.
          implementation: see `attend`. Layers that choose heads always write the
            probabilities.
          **options: other arguments of the attention of Flax. Those that concern
            dropout, dtypes and precision are ignored.

        Returns:
          The attended values, (B, N, H, d). Those of heads that are not chosen are 0.

        Raises:
          ValueError: if there is a bias, a mask, dropout, or another option that would
            change the result, such as is_causal=True.
        """
        if bias is not None or mask is not None:
            raise ValueError("attention in a cascade takes no bias and no mask.")
        changed = [name for name in options.keys() - _IGNORED if options[name]]
        if changed:
            raise ValueError(
                f"attention in a cascade does not have {', '.join(sorted(changed))}."
            )
        if dropout_rate and not deterministic:
            raise ValueError("attention in a cascade has no dropout.")
        if self.heads_of(query.shape[2]) is not None:
            return average(*self.write_probs(query, key), value)
        self.keys = key.mean(2)
        attended, self.statistics = attend(
            *(query, key, value, self.weights, self.names),
            implementation=implementation,
        )
        return attended

    def write_probs(
        self, query: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Computes and keeps the probabilities, and chooses the heads.

        Args:
          query: (B, N, H, d), not yet scaled.
          key: (B, N, H, d).

        Returns:
          The probabilities, (B, H, N, N), and a mask (B, H) of the chosen heads, or
          None for all heads.
        """
        bias = self.weights
        if bias is not None:
            bias = weights_to_bias(bias)[:, None, None, :]
        probs = self.probs = attention_probs(query, key, bias)
        self.keys = key.mean(2)
        self.statistics = importance.statistics(probs, self.weights, self.names)
        heads = self.heads_of(query.shape[2])
        if heads is None:
            return probs, None
        scores = importance.head_scores(probs, self.weights, form=heads.score)
        return probs, choose_heads(heads, scores)


def average(probs: jax.Array, heads: jax.Array | None, value: jax.Array) -> jax.Array:
    """Averages the values of each head with its attention probabilities.

    Args:
      probs: (B, H, N, N), queries first.
      heads: mask (B, H) of the heads to keep; the others give 0. None keeps all.
      value: (B, N, H, d).

    Returns:
      (B, N, H, d), in the dtype of `value`.
    """
    attended = jnp.einsum("bhqk,bkhd->bqhd", probs.astype(value.dtype), value)
    if heads is None:
        return attended
    return attended * heads[:, None, :, None].astype(value.dtype)


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention over weighted tokens.

    Attributes:
      num_heads: H.
      head_dim: d.
      segment: the segment to leave out; None leaves out nothing.
      num_prefix: number of tokens before the patches, for the segment.
      implementation: see `attend`.
      dtype: compute dtype of the matrix products.
    """

    num_heads: int
    head_dim: int
    segment: Segment | None = None
    num_prefix: int = 1
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, attend: CascadeAttention | None = None
    ) -> jax.Array:
        """Attends from every token to all tokens.

        The probabilities are written out if heads are chosen, for a segment, and while
        Flax collects intermediates.

        Args:
          x: normalized tokens, (B, N, D).
          attend: the attention of a layer of a cascade; None is ordinary attention.

        Returns:
          The update of the residual path, (B, N, D).
        """
        attend = CascadeAttention() if attend is None else attend
        shape = (self.num_heads, self.head_dim)
        x = x.astype(self.dtype)
        query = ToHeads(shape, self.dtype, name="query")(x)
        key = ToHeads(shape, self.dtype, name="key")(x)
        to_value = ToHeads(shape, self.dtype, name="value")
        out = FromHeads(x.shape[-1], shape, self.dtype, name="out")
        heads = attend.heads_of(self.num_heads)
        is_read = self.is_mutable_collection("intermediates")
        if heads is None and self.segment is None and not is_read:
            return out(
                attend(query, key, to_value(x), implementation=self.implementation)
            )
        probs, mask = attend.write_probs(query, key)
        kept = None
        if heads is not None and heads.mode == "compact":
            # The whole batch keeps the same heads: other values are not computed.
            kept = mask_to_indices(mask[:1], heads.keep)[0]
            probs, mask = probs[:, kept], None
        if self.segment is not None:
            probs = without_segment(probs, self.segment, self.num_prefix)
        return out(average(probs, mask, to_value(x, kept)), kept)


def without_segment(probs: jax.Array, segment: Segment, num_prefix: int) -> jax.Array:
    """Sets the attention probabilities of a segment to zero.

    Args:
      probs: (B, H, N, N), queries first.
      segment: the segment.
      num_prefix: number of tokens before the patches, which belong to no segment.

    Returns:
      (B, H, N, N); the rows no longer sum to 1.
    """
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
    """Chooses the heads with the largest scores.

    Args:
      heads: how many heads, and whether the whole batch keeps the same ones.
      scores: (B, H); no gradient passes.

    Returns:
      Mask, (B, H).
    """
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
        "pallas" for statistics of all queries in bfloat16 with heads of width 64 and at
        most 1,024 tokens on an NVIDIA GPU, otherwise "xla". cuDNN's kernel is faster
        where there are no statistics, but it does not train with every number of
        tokens.

    Returns:
      The attended values (B, N, H, d), and the statistics (B, H, N) in float32, which
      carry no gradient.

    Raises:
      ValueError: if the implementation is unknown or needs a GPU.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fusable = set(statistics) <= {"cls"}
    if implementation is None:
        measured = not fusable and _was_measured(query) and _on_nvidia()
        implementation = "pallas" if measured else "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(
            f"implementation must be one of {known}; got {implementation!r}."
        )
    if implementation in ("cudnn", "pallas") and not _on_nvidia():
        raise ValueError(
            f"attention_implementation {implementation!r} needs an NVIDIA GPU; "
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


def _was_measured(query):
    """Whether the kernel was run and measured on an H200 for such queries."""
    _, num_tokens, _, width = query.shape
    return query.dtype == jnp.bfloat16 and num_tokens <= 1024 and width == 64


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
            # NumPy's arrays take no traced indices.
            kernel, bias = jnp.asarray(kernel)[:, heads], jnp.asarray(bias)[heads]
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
            kernel = jnp.asarray(kernel)[heads]
        flat = kernel.reshape(-1, self.hidden_size).astype(self.dtype)
        y = x.reshape(*x.shape[:-2], len(flat)) @ flat
        return y + bias.astype(self.dtype)[None, None]


def _flat_init(num_inputs):
    """Xavier-uniform initializer; the first `num_inputs` axes are inputs."""

    def init(key, shape, dtype=jnp.float32):
        flat = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
        return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)

    return init
