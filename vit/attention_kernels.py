"""Attention that returns reductions of its probabilities without writing them.

The scores of CP-ViT are column maxima of the attention probabilities
A = softmax(Q K^T / sqrt(d) + bias). Fused attention kernels never form A, so a layer
that needs the maxima would have to write (B, H, N, N) numbers. The functions here
compute the attended values and the fields of `importance.Statistics` together, with the
same numbers:

  plain_attention    writes A; the oracle of the others.
  blocked_attention  one block of queries after the other, for XLA on any backend. A
                     block has all its keys, so its softmax is exact; the maxima and
                     sums run over the blocks.
  pallas_attention   one kernel for NVIDIA GPUs (Pallas, lowered to Triton). Each
                     program has a block of queries and passes twice over the keys:
                     first for the maximum and the sum of the softmax (Milakov and
                     Gimelshein 2018, arXiv 1805.02867), then for the values and the
                     reductions.

A row may represent several tokens: the logarithm of its weight is added to the logit of
its key, and weight zero hides it. The statistics carry no gradient.

Axes: B images, N tokens (CLS first), H heads, d width of a head, Q queries of a block.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vit.importance import Statistics, statistics

Output = tuple[jax.Array, Statistics]


def attention_probs(
    query: jax.Array, key: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Attention probabilities, softmax(query . key / sqrt(d) + bias).

    Args:
      query: (B, Q, H, d).
      key: (B, N, H, d).
      bias: added to the logits, broadcastable to (B, H, Q, N); None adds nothing.

    Returns:
      (B, H, Q, N), float32, or float64 for such queries; each row over N sums to one.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=dtype)
    logits = logits / jnp.sqrt(jnp.asarray(query.shape[-1], dtype))
    return jax.nn.softmax(logits if bias is None else logits + bias)


def weights_to_bias(weights: jax.Array) -> jax.Array:
    """Logarithm of the weights, very negative for weight zero; any shape."""
    return jnp.where(weights > 0, jnp.log(jnp.maximum(weights, 1e-9)), _HIDDEN)


# A logit this small has probability exactly zero in float32.
_HIDDEN = -1e9


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weights: jax.Array | None = None,
    names: Sequence[str] = (),
) -> Output:
    """Attention that writes its probabilities.

    Args:
      query: (B, N, H, d).
      key: (B, N, H, d).
      value: (B, N, H, d).
      weights: number of tokens that each row represents, (B, N); None means one each.
      names: fields of `importance.Statistics` to return.

    Returns:
      As `blocked_attention`.
    """
    size = query.shape[1]
    return blocked_attention(query, key, value, weights, names, block_size=size)


def blocked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weights: jax.Array | None = None,
    names: Sequence[str] = (),
    *,
    block_size: int = 128,
) -> Output:
    """Attention by blocks of queries, with reductions of its probabilities.

    Args:
      query: (B, N, H, d).
      key: (B, N, H, d).
      value: (B, N, H, d).
      weights: number of tokens that each row represents, (B, N); None means one each.
      names: fields of `importance.Statistics` to return.
      block_size: largest number of queries in a block; the blocks are of equal size, up
        to one.

    Returns:
      The attended values (B, N, H, d) in the dtype of `value`, and the statistics
      (B, H, N) in float32.
    """
    num_tokens = query.shape[1]
    num_blocks = -(-num_tokens // block_size)
    bias = None if weights is None else weights_to_bias(weights)[:, None, None, :]
    outputs, parts = [], []
    for block in range(num_blocks):
        rows = slice(
            num_tokens * block // num_blocks, num_tokens * (block + 1) // num_blocks
        )
        probs = attention_probs(query[:, rows], key, bias)  # (B, H, Q, N)
        used = probs.astype(value.dtype)
        outputs.append(jnp.einsum("bhqk,bkhd->bqhd", used, value))
        votes = None if weights is None else weights[:, rows]
        probs = jax.lax.stop_gradient(probs)
        parts.append(statistics(probs, weights, names, votes=votes))
    return jnp.concatenate(outputs, axis=1), _combine(parts)


def _combine(parts):
    """Statistics of all queries from those of the blocks."""
    if len(parts) == 1:
        return parts[0]
    combine = Statistics(
        column_max=lambda values: functools.reduce(jnp.maximum, values),
        column_sum=sum,
        row_max=lambda values: jnp.concatenate(values, axis=2),
        cls=lambda values: values[0],
    )
    fields = zip(combine, zip(*parts, strict=True), strict=True)
    return Statistics(
        *(None if values[0] is None else join(values) for join, values in fields)
    )


class Tiles(NamedTuple):
    """Sizes of the programs of `pallas_attention`.

    Attributes:
      queries: queries of a program, a power of two, at least 16.
      keys: keys of a step, a power of two, at least 16.
      num_warps: warps of a program.
      num_stages: loads in flight.
    """

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2


def default_tiles(width: int) -> Tiles:
    """Tiles for heads of this width.

    On an H200, for 128 images with 12 heads of width 64 in bfloat16, (128, 32) was the
    fastest of seven shapes at 197 tokens and (64, 32) at 140. Wider heads have fewer
    queries in a program, as its registers hold the attended values.
    """
    return Tiles(128 if width <= 64 else 64, 32)


def pallas_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weights: jax.Array | None = None,
    names: Sequence[str] = (),
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Output:
    """Attention in one kernel for NVIDIA GPUs, with reductions of its probabilities.

    Heads are padded to a power of two. The gradient is that of `blocked_attention`,
    which computes the probabilities again. Products of float32 run in the precision of
    `jax.default_matmul_precision`, on GPUs TF32 by default.

    Args:
      query: (B, N, H, d), float32, bfloat16 or float16; measured for N up to 1,024 and
        d from 16 to 128.
      key: (B, N, H, d).
      value: (B, N, H, d).
      weights: number of tokens that each row represents, (B, N); None means one each.
      names: fields of `importance.Statistics` to return.
      tiles: sizes of the programs; by default `default_tiles`.
      interpret: whether to emulate the kernel, on any backend and slowly.

    Returns:
      As `blocked_attention`.

    Raises:
      ValueError: if the dtype is another.
    """
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            "attention_implementation 'pallas' takes float32, bfloat16 or float16, got "
            f"{query.dtype}."
        )
    names = tuple(names)
    if weights is None:
        weights = jnp.ones(query.shape[:2])
    if tiles is None:
        tiles = default_tiles(query.shape[-1])
    return _pallas_attention(names, tiles, interpret, query, key, value, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pallas_attention(names, tiles, interpret, query, key, value, weights):
    # Slow to import, and only this kernel needs it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, num_tokens, num_heads, width = query.shape
    num_blocks = pl.cdiv(num_tokens, tiles.queries)
    depth = max(pl.next_power_of_2(width), 16)  # What a tensor core takes.
    arrays = query, key, value
    if depth > width:
        padding = ((0, 0), (0, 0), (0, 0), (0, depth - width))
        arrays = [jnp.pad(x, padding) for x in arrays]
    # Of each block of queries there is one row of partial reductions.
    columns = jax.ShapeDtypeStruct(
        (batch, num_heads, num_blocks, num_tokens), jnp.float32
    )
    whole_rows = jax.ShapeDtypeStruct((batch, num_heads, num_tokens), jnp.float32)
    reduced = [name for name in names if name != "cls"]
    output, *found = pl.pallas_call(
        functools.partial(_kernel, names=reduced, scale=width**-0.5, tiles=tiles),
        grid=(num_blocks, batch, num_heads),
        out_shape=[
            jax.ShapeDtypeStruct(arrays[2].shape, value.dtype),
            *(whole_rows if name == "row_max" else columns for name in reduced),
        ],
        compiler_params=triton.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="attention_with_statistics",
    )(*arrays, weights.astype(jnp.float32))
    reduce = {
        "column_max": lambda x: jnp.max(x, axis=2),
        "column_sum": lambda x: jnp.sum(x, axis=2),
        "row_max": lambda x: x,
    }
    values = {name: reduce[name](x) for name, x in zip(reduced, found, strict=True)}
    if "cls" in names:
        bias = weights_to_bias(weights)[:, None, None, :]
        values["cls"] = attention_probs(query[:, :1], key, bias)[:, :, 0]
    return output[..., :width], Statistics(**values)


def _kernel(query_ref, key_ref, value_ref, weights_ref, *refs, names, scale, tiles):
    """A block of queries (Q, d) against all keys (N, d) of one head."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    block, image, head = (pl.program_id(axis) for axis in range(3))
    num_tokens = key_ref.shape[1]
    num_steps = pl.cdiv(num_tokens, tiles.keys)
    out_ref, *refs = refs
    refs = dict(zip(names, refs, strict=True))

    def rows(start, size):
        """A block of rows, and which of them exist."""
        return pl.ds(start, size), start + jnp.arange(size) < num_tokens

    def load(ref, rows):
        rows, exist = rows
        at = ref.at[image, rows, head, :]
        return triton.load(at, mask=exist[:, None], other=0.0)

    queries = rows(block * tiles.queries, tiles.queries)
    query = load(query_ref, queries)
    # Rows beyond the last one are queries without a vote and hidden keys.
    votes = triton.load(weights_ref.at[image, queries[0]], mask=queries[1], other=0.0)

    def logits_of(step):
        keys = rows(step * tiles.keys, tiles.keys)
        logits = _product(query, load(key_ref, keys).T) * scale  # (Q, block)
        weights = triton.load(weights_ref.at[image, keys[0]], mask=keys[1], other=0.0)
        return keys, weights, logits + weights_to_bias(weights)[None, :]

    # With one step both passes have the same logits.
    only = logits_of(jnp.int32(0)) if num_steps == 1 else None

    def normalize(step, carry):
        largest, total = carry
        _, _, logits = only or logits_of(step)
        new = jnp.maximum(largest, jnp.max(logits, axis=1))
        total = total * jnp.exp(largest - new)
        return new, total + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)

    start = jnp.full(tiles.queries, _LOWEST, jnp.float32), jnp.zeros(tiles.queries)
    largest, total = _repeat(num_steps, normalize, start)
    log_total = largest + jnp.log(total)

    def attend(step, carry):
        attended, row_max = carry
        keys, weights, logits = only or logits_of(step)
        probs = jnp.exp(logits - log_total[:, None])

        def write(name, values):
            at = refs[name].at[image, head, block, keys[0]]
            triton.store(at, values, mask=keys[1])

        if "column_max" in refs:
            voting = jnp.where(votes[:, None] > 0, probs, 0.0)
            write("column_max", jnp.max(voting, axis=0))
        if "column_sum" in refs:
            write("column_sum", jnp.sum(probs * votes[:, None], axis=0))
        if "row_max" in refs:
            shares = probs / jnp.maximum(weights, 1.0)[None, :]
            row_max = jnp.maximum(row_max, jnp.max(shares, axis=1))
        used = probs.astype(value_ref.dtype)
        return attended + _product(used, load(value_ref, keys)), row_max

    start = jnp.zeros(query.shape, jnp.float32), jnp.zeros(tiles.queries)
    attended, row_max = _repeat(num_steps, attend, start)
    at = out_ref.at[image, queries[0], head, :]
    triton.store(at, attended.astype(out_ref.dtype), mask=queries[1][:, None])
    if "row_max" in refs:
        at = refs["row_max"].at[image, head, queries[0]]
        triton.store(at, row_max, mask=queries[1])


def _repeat(num_steps, step, carry):
    if num_steps == 1:
        return step(0, carry)
    return jax.lax.fori_loop(0, num_steps, step, carry)


# Below every logit, that of a hidden key included.
_LOWEST = -2e9


def _product(left, right):
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(
        left, right, dimensions, preferred_element_type=jnp.float32
    )


def _forward(names, tiles, interpret, *arrays):
    return _pallas_attention(names, tiles, interpret, *arrays), arrays


def _backward(names, tiles, interpret, arrays, cotangents):
    _, pull_back = jax.vjp(lambda *x: blocked_attention(*x)[0], *arrays)
    return pull_back(cotangents[0])


_pallas_attention.defvjp(_forward, _backward)
