"""Cascade pruning: the tokens and heads that each layer works on (CP-ViT, 2203.04570).

A `Cascade` is static: token counts are Python ints, so shapes never depend on values
and nothing is recompiled. Which tokens are kept is decided for each image. Both modes
give the same logits: "masked" computes all tokens and hides the pruned ones, "compact"
gathers the kept ones and skips the work. The semantics define what happens to a pruned
token:

  drop   it is removed from all later layers (default; the kept sets are nested);
  skip   this layer does not change it and hides it from the others; it may return;
  zero   the released code: its normalized row is set to zero, so it remains a key and
         receives the constant update of a zero row; it may return.

Both modes are one computation because every row has a weight, the number of tokens it
represents: 0 for a hidden token, m for the one row that replaces m zeroed rows, the
size of the group for a merged token. The logarithm of the weight is added to the logit
of the row's key.

`vit.schedules` constructs cascades. `initial_tokens`, `pruned_attention` and
`pruned_mlp` apply them, in `vit.ViT` and in any other network of blocks.

Axes: B images, n current tokens (CLS first), P patches, D width, L layers.
"""

import dataclasses
import functools
import importlib
import operator
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vit import importance
from vit.attention import Attended, CascadeAttention, Heads
from vit.attention import choose_heads as choose_heads
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

SEMANTICS = ("drop", "skip", "zero")
MODES = ("compact", "masked")
SCORES = ("max", "sum", "cls", "norm", "random", "merge")
SCOPES = ("batch", "image")


@dataclasses.dataclass(frozen=True)
class Cascade:
    """The tokens and heads that each layer of a Vision Transformer works on.

    Attributes:
      keep: patches in each layer's attention, (L,). CLS is added.
      keep_mlp: patches in each layer's MLP, (L,); None uses `keep`.
      semantics: what happens to a pruned token: "drop", "skip" or "zero".
      mode: "compact" or "masked".
      score: what ranks the patches: "max" or "sum" (forms of
        `importance.patch_scores`), "cls" (attention of CLS, as in EViT), "norm" (norm
        of the token), "random", or "merge" (no ranking: tokens are merged into similar
        ones before the MLP, as in token merging, arXiv 2210.09461).
      alpha: weight of what a token attends to, see `importance.patch_scores`.
      beta: weight of what attends to a token, see `importance.patch_scores`.
      cumulative: whether scores are summed over the layers. The attention of layer l
        uses the scores of the layers before it, its MLP those of layer l too.
      fuse: how the pruned tokens stay as one of the kept tokens: "sum", weighted by
        their scores, as EViT's authors wrote it, or "mean", the sum divided by the sum
        of the scores; None removes them. Only with semantics "drop" in mode "compact".
      keep_heads: heads used in each layer, (L,); None uses all. They are chosen again
        for every batch or image; `vit.slicing` removes a fixed choice for good.
      head_score: "max" or "confidence", a form of `importance.head_scores`.
      head_scope: "batch" chooses the same heads for the whole batch, "image" chooses
        for each image (only in mode "masked").
      keep_cls: whether CLS is always kept; in the released code it competes.
      resets: layers before which the scores are set back to zero.
      stale_threshold: an error of the released code: the threshold of the MLP is taken
        from the scores before the layer and compared with those after it; only with
        semantics "zero" in mode "masked".
      seed: seed of the random scores, which differ by place in the batch; unused if
        `apply` is given the rng "cascade".

    Raises:
      ValueError: if a field is out of range, or the fields do not fit together.
    """

    keep: tuple[int, ...]
    keep_mlp: tuple[int, ...] | None = None
    semantics: str = "drop"
    mode: str = "compact"
    score: str = "max"
    alpha: float = 0.0
    beta: float = 1.0
    cumulative: bool = True
    fuse: str | None = None
    keep_heads: tuple[int, ...] | None = None
    head_score: str = "max"
    head_scope: str = "batch"
    keep_cls: bool = True
    resets: tuple[int, ...] = ()
    stale_threshold: bool = False
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.fuse, bool):
            fuse = "mean" if self.fuse else None
            warnings.warn(
                f"fuse={self.fuse} is now fuse={fuse!r}; EViT's own is fuse='sum'.",
                DeprecationWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "fuse", fuse)
        for name, allowed in (
            ("semantics", SEMANTICS),
            ("mode", MODES),
            ("score", SCORES),
            ("head_score", importance.HEAD_FORMS),
            ("head_scope", SCOPES),
            ("fuse", (None, *FUSIONS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {names}; got {value!r}.")
        self._to_python_numbers()
        for name in ("keep", "keep_mlp", "keep_heads"):
            counts = getattr(self, name)
            if counts is None:
                continue
            lowest = 1 if name == "keep_heads" else 0
            if len(counts) != len(self.keep) or min(counts, default=-1) < lowest:
                raise ValueError(
                    f"{name} must have one count of at least {lowest} for each of the "
                    f"{len(self.keep)} layers, got {counts}."
                )
        self._check_combinations()

    def _to_python_numbers(self):
        """JSON, in which a file keeps the cascade, does not know NumPy's numbers."""
        for name in ("keep", "keep_mlp", "keep_heads", "resets", "seed"):
            value = getattr(self, name)
            try:
                if name == "seed":
                    value = operator.index(value)
                elif value is not None:
                    value = tuple(operator.index(count) for count in value)
            except TypeError:
                raise ValueError(
                    f"{name} must be whole numbers, got {value}."
                ) from None
            object.__setattr__(self, name, value)
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def _check_combinations(self):
        if not set(self.resets) <= set(range(len(self.keep))):
            raise ValueError(
                f"resets must be among the layers 0 to {len(self.keep) - 1}, got "
                f"{self.resets}."
            )
        path = [count for pair in self.counts for count in pair]
        if self.semantics == "drop" and any(np.diff(path) > 0):
            raise ValueError(
                "a dropped token cannot return: counts must not grow from layer to "
                f"layer, attention before MLP, got {path}."
            )
        if not self.keep_cls and (self.semantics == "drop" or self.score == "cls"):
            raise ValueError(
                "keep_cls=False requires semantics 'skip' or 'zero', which never lose "
                "CLS, and a score other than 'cls'."
            )
        compact_drop = self.semantics == "drop" and self.mode == "compact"
        if self.score == "merge":
            attention_only = [pair[0] for pair in self.counts]
            before = [attention_only[0], *[pair[1] for pair in self.counts[:-1]]]
            if not compact_drop or self.fuse or attention_only != before:
                raise ValueError(
                    "score 'merge' requires semantics 'drop', mode 'compact' and "
                    "fuse=None, and merges before the MLP only: each `keep` must "
                    "equal the `keep_mlp` of the layer before."
                )
            if any(before - after > before // 2 for before, after in self.counts):
                raise ValueError(
                    f"a layer can merge at most half of its patches, got {path}."
                )
        if self.fuse and (not compact_drop or min(path) < 1):
            raise ValueError(
                "fuse requires semantics 'drop', mode 'compact' and at least one patch "
                "in every layer."
            )
        if self.head_scope == "image" and self.mode == "compact" and self.keep_heads:
            raise ValueError(
                "head_scope='image' cannot save work in mode 'compact'; use "
                "mode='masked'."
            )
        if self.stale_threshold and (self.semantics, self.mode) != ("zero", "masked"):
            raise ValueError(
                "stale_threshold prunes a number of tokens that depends on the image: "
                "it requires semantics='zero' and mode='masked'."
            )

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """Patches in the attention and in the MLP of each layer, (L, 2)."""
        mlp = self.keep if self.keep_mlp is None else self.keep_mlp
        return tuple(zip(self.keep, mlp, strict=True))


def check_fits(cascade: Cascade, num_patches: int, num_layers: int) -> None:
    """Checks that a cascade fits a network.

    Args:
      cascade: the cascade.
      num_patches: P of the network.
      num_layers: L of the network.

    Raises:
      ValueError: if it does not.
    """
    largest = max(max(pair) for pair in cascade.counts)
    if len(cascade.keep) != num_layers or largest > num_patches:
        raise ValueError(
            f"the cascade is for {len(cascade.keep)} layers and at least {largest} "
            f"patches; the network has {num_layers} and {num_patches}."
        )
    if cascade.score == "merge" and cascade.keep[0] != num_patches:
        raise ValueError(
            f"the cascade merges from {cascade.keep[0]} patches on, but the network "
            f"has {num_patches}."
        )


def initial_tokens(
    cascade: Cascade | None, x: jax.Array, key: jax.Array | None = None
) -> Tokens:
    """The tokens before the first layer.

    Args:
      cascade: how the network is pruned, or None.
      x: embeddings of prefix and patches, (B, n, D).
      key: PRNG key of the random scores; None uses the cascade's seed.

    Returns:
      n tokens per image.
    """
    batch, num_tokens, _ = x.shape
    score = jnp.zeros((batch, num_tokens), jnp.float32)
    if cascade is not None and cascade.score == "random":
        key = jax.random.key(cascade.seed) if key is None else key
        # Other dtypes have other random numbers.
        score = jax.random.uniform(key, score.shape, score.dtype)
    position = jnp.broadcast_to(jnp.arange(num_tokens), score.shape)
    weights = None
    if cascade is not None and cascade.score == "merge":
        weights = jnp.ones_like(score)
    return Tokens(x, position, score, weights)


def heads_of(cascade: Cascade | None, layer: int, num_heads: int) -> Heads | None:
    """How a layer chooses its heads.

    Args:
      cascade: how the network is pruned, or None.
      layer: index of the layer.
      num_heads: H of this layer.

    Returns:
      The choice; None if the layer uses all its heads.

    Raises:
      ValueError: if the cascade keeps more heads than the layer has.
    """
    if cascade is None or cascade.keep_heads is None:
        return None
    keep = cascade.keep_heads[layer]
    if keep > num_heads:
        raise ValueError(
            f"keep_heads must be at most {num_heads} in layer {layer}, got {keep}."
        )
    if keep == num_heads:
        return None
    return Heads(keep, cascade.head_score, cascade.head_scope, cascade.mode)


def needed_statistics(
    cascade: Cascade | None, layer: int, num_patches: int
) -> tuple[str, ...]:
    """What the scores of a layer need of its attention.

    Args:
      cascade: how the network is pruned, or None.
      layer: index of the layer.
      num_patches: P of the network for semantics "skip" and "zero"; for "drop" it does
        not matter.

    Returns:
      Fields of `importance.Statistics`; none if no later selection depends on these
      scores.
    """
    if cascade is None or cascade.score in ("norm", "random", "merge"):
        return ()
    if not any(_selects(cascade, layer, num_patches)):
        return ()
    if cascade.score == "cls":
        return ("cls",)
    return importance.needed_statistics(cascade.score, cascade.alpha, cascade.beta)


def scored_query(cascade: Cascade | None, layer: int, num_patches: int) -> str | None:
    """Old form of `needed_statistics`, for one version: "all", "cls" or None."""
    warnings.warn(
        "vit.cascade.scored_query is now vit.cascade.needed_statistics.",
        DeprecationWarning,
        stacklevel=2,
    )
    names = needed_statistics(cascade, layer, num_patches)
    return None if not names else "cls" if names == ("cls",) else "all"


def _selects(cascade, layer, num_patches):
    """For each selection after the attention of `layer`: does it prune a token?"""
    path = [count for pair in cascade.counts for count in pair]
    for point in range(2 * layer + 1, len(path)):
        if point % 2 == 0 and point // 2 in cascade.resets:
            # Earlier scores are discarded here.
            return
        if cascade.semantics == "drop":
            # Keeping all remaining tokens needs no scores.
            yield path[point] < path[point - 1]
        else:
            yield path[point] < num_patches


def pruned_attention(
    cascade: Cascade | None,
    layer: int,
    tokens: Tokens,
    norm: Callable[[jax.Array], jax.Array],
    attention: Callable[[jax.Array, CascadeAttention], jax.Array],
    *,
    num_prefix: int = 1,
) -> Tokens:
    """Attention of a block and its residual path, on the tokens that a cascade keeps.

    Prunes by the scores of the layers before, adds the update of the attention, and
    updates the scores. The block of any network can call it: `norm` and `attention` may
    be modules of Linen or NNX.

    Args:
      cascade: how the network is pruned; None computes everything.
      layer: index of the layer.
      tokens: tokens before the block.
      norm: normalization before the attention, (B, n, D) -> (B, n, D).
      attention: (normalized tokens (B, n, D), `attend`) -> their update (B, n, D). It
        calls `attend(query, key, value)` once, as its dot-product attention; see
        `attention.CascadeAttention`.
      num_prefix: number of tokens before the patches, which are always kept: CLS and
        registers.

    Returns:
      The tokens after the attention; with score "merge" also merged.

    Raises:
      ValueError: if the cascade is for fewer layers or for more patches, or needs what
        `attend` records and it was not called.

    Example:
      >>> import jax.numpy as jnp
      >>> import vit
      >>> from vit.cascade import initial_tokens, pruned_attention
      >>> cascade = vit.schedules.from_ratios([0.0, 0.5], num_patches=4)
      >>> tokens = initial_tokens(cascade, jnp.linspace(0, 1, 15).reshape(1, 5, 3))
      >>> def attention(x, attend):
      ...     heads = x[:, :, None]  # one head, and no projections
      ...     return attend(heads, heads, heads)[:, :, 0]
      >>> for layer in range(2):
      ...     tokens = pruned_attention(cascade, layer, tokens, jnp.tanh, attention)
      >>> tokens.position.tolist()  # CLS and two of four patches
      [[0, 3, 4]]
    """
    if cascade is None:
        attend = CascadeAttention(tokens.position, tokens.weights)
        update = attention(norm(tokens.x), attend)
        return tokens._replace(x=tokens.x + update)
    if cascade.score == "cls" and not num_prefix:
        raise ValueError("the score 'cls' requires a CLS token; num_prefix is 0.")
    before, after = _counts(cascade, layer)
    _warn_if_unscored(cascade, layer, tokens.x.shape[1] - num_prefix)
    if layer in cascade.resets:
        tokens = tokens._replace(score=jnp.zeros_like(tokens.score))
    if cascade.stale_threshold:
        tokens = tokens._replace(previous=_ranking(cascade, tokens, num_prefix))
    names = needed_statistics(cascade, layer, tokens.x.shape[1] - num_prefix)
    attend = None

    def apply(x, position, weights):
        nonlocal attend
        choose = functools.partial(heads_of, cascade, layer)
        attend = CascadeAttention(position, weights, names, choose)
        update = attention(x, attend)
        if attend.keys is None and (names or cascade.score == "merge"):
            raise ValueError(
                f"the attention of layer {layer} must call attend(query, key, value), "
                f"which the score {cascade.score!r} needs."
            )
        return update, _scores(cascade, attend) if names else None

    tokens = _half_layer(cascade, tokens, before, norm, apply, num_prefix)
    if cascade.score == "merge":
        tokens = merge(tokens, attend.keys, after, num_prefix=num_prefix)
    return tokens


def _counts(cascade, layer):
    """Patches that attention and MLP of a layer keep."""
    if isinstance(layer, jax.core.Tracer):
        raise ValueError(
            "layer must be a Python int, because the numbers of tokens depend on it: "
            "call the layers of a cascade in a Python loop, not in a scan."
        )
    if not 0 <= layer < len(cascade.keep):
        raise ValueError(
            f"the cascade is for the layers 0 to {len(cascade.keep) - 1}, got {layer}."
        )
    return cascade.counts[layer]


def _warn_if_unscored(cascade, layer, num_patches):
    """Warns if the attention of `layer` prunes while all scores are zero."""
    reset = layer in cascade.resets
    first = layer == 0 and cascade.score != "random"
    if cascade.score in ("norm", "merge") or not (reset or first):
        return
    keep = cascade.counts[layer][0]
    if cascade.semantics == "drop" and layer > 0:
        num_patches = cascade.counts[layer - 1][1]
    if keep < num_patches:
        reason = "`resets` erased the scores" if reset else "no layer gave scores yet"
        warnings.warn(
            f"the attention of layer {layer} keeps {keep} of {num_patches} patches, "
            f"but {reason}: the first ones are kept, whatever the image shows. Keep "
            "all of them there, or use the score 'norm'.",
            stacklevel=3,
        )


def _scores(cascade, attend):
    """Scores (B, n) of the rows of one layer."""
    if cascade.score == "cls":
        return importance.score_by_cls(attend.statistics, attend.weights)
    [reduced, *_] = [value for value in attend.statistics if value is not None]
    return importance.score_patches(
        attend.statistics,
        attend.weights,
        reduced.shape,
        form=cascade.score,
        alpha=cascade.alpha,
        beta=cascade.beta,
    )


def pruned_mlp(
    cascade: Cascade | None,
    layer: int,
    tokens: Tokens,
    norm: Callable[[jax.Array], jax.Array],
    mlp: Callable[[jax.Array], jax.Array],
    *,
    num_prefix: int = 1,
) -> Tokens:
    """MLP of a block and its residual path, on the tokens that a cascade keeps.

    Args:
      cascade: how the network is pruned; None computes everything.
      layer: index of the layer.
      tokens: tokens after the attention.
      norm: normalization before the MLP, (B, n, D) -> (B, n, D).
      mlp: (B, n, D) -> (B, n, D), for each token separately.
      num_prefix: number of tokens before the patches.

    Returns:
      The tokens after the block.

    Raises:
      ValueError: if the cascade is for fewer layers or for more patches.
    """
    if cascade is None:
        return tokens._replace(x=tokens.x + mlp(norm(tokens.x)))
    _, keep = _counts(cascade, layer)
    if cascade.stale_threshold:
        threshold = jnp.sort(tokens.previous, axis=1)
        pruned = tokens.score.shape[1] - num_prefix - keep
        selected = _ranking(cascade, tokens, num_prefix)
        selected = selected >= threshold[:, pruned, None]
        update = mlp(norm(tokens.x) * selected[..., None])
        return tokens._replace(x=tokens.x + update)

    def apply(x, position, weights):
        del position, weights
        return mlp(x), None

    return _half_layer(cascade, tokens, keep, norm, apply, num_prefix)


def attention_layer(
    cascade: Cascade | None,
    layer: int,
    tokens: Tokens,
    norm: Callable[[jax.Array], jax.Array],
    attend: Callable[[jax.Array, jax.Array | None], Attended],
    *,
    num_prefix: int = 1,
) -> Tokens:
    """Old form of `pruned_attention`, for one version.

    Its `attend` maps the normalized tokens and their weights to `Attended`.
    """
    warnings.warn(
        "vit.cascade.attention_layer is now vit.cascade.pruned_attention.",
        DeprecationWarning,
        stacklevel=2,
    )

    def attention(x, record):
        update, record.statistics, record.keys, _ = attend(x, record.weights)
        return update

    return pruned_attention(
        cascade, layer, tokens, norm, attention, num_prefix=num_prefix
    )


def _half_layer(cascade, tokens, keep, norm, apply, num_prefix):
    """Applies half a layer to the prefix and the `keep` patches that rank highest.

    apply(normalized x, positions, weights) returns an update like x, and scores (B, n)
    or None.
    """
    num_patches = tokens.x.shape[1] - num_prefix
    if keep > num_patches:
        raise ValueError(
            f"the cascade keeps {keep} patches, but after {num_prefix} tokens of the "
            f"prefix there are {num_patches}: make it for as many, and give num_prefix."
        )
    ranking = _ranking(cascade, tokens, num_prefix)
    count = keep + num_prefix
    if count < 1 and cascade.semantics != "zero":
        raise ValueError("a cascade must keep at least one token, CLS or a patch.")
    keeps_all = count >= tokens.x.shape[1]
    if not keeps_all and (cascade.semantics, cascade.mode) == ("drop", "compact"):
        if cascade.fuse:
            tokens = fuse(tokens, ranking, count, form=cascade.fuse)
        else:
            tokens = gather(tokens, ranking, count)
        keeps_all = True
    if keeps_all:
        update, scores = apply(norm(tokens.x), tokens.position, tokens.weights)
        return _advance(cascade, tokens, update, scores)
    selected = top_mask(ranking, count)
    half_layer = _masked if cascade.mode == "masked" else _compact
    return half_layer(cascade, tokens, selected, count, norm, apply)


def _masked(cascade, tokens, selected, count, norm, apply):
    """Half a layer on all tokens: those not selected are hidden or set to zero."""
    del count
    if cascade.semantics == "zero":
        position = jnp.where(selected, tokens.position, -1)
        x = norm(tokens.x) * selected[..., None]
        update, scores = apply(x, position, tokens.weights)
        return _advance(cascade, tokens, update, scores)
    weights = selected.astype(jnp.float32)
    if tokens.weights is not None:
        weights = weights * tokens.weights
    update, scores = apply(norm(tokens.x), tokens.position, weights)
    if cascade.semantics == "drop":
        tokens = tokens._replace(weights=weights)
    update = update * selected[..., None]
    return _advance(cascade, tokens, update, scores, selected)


def _compact(cascade, tokens, selected, count, norm, apply):
    """Half a layer on the gathered rows, for tokens that may return."""
    indices = mask_to_indices(selected, count)
    x, position = norm(take(tokens.x, indices)), take(tokens.position, indices)
    weights = tokens.weights
    if cascade.semantics == "zero":
        # All zeroed rows are equal: one row represents them.
        batch, _, width = x.shape
        x = jnp.concatenate([x, jnp.zeros((batch, 1, width), x.dtype)], axis=1)
        weights = jnp.ones_like(tokens.score) if weights is None else weights
        zeroed = jnp.sum(weights * ~selected, axis=1, keepdims=True)
        weights = jnp.concatenate([take(weights, indices), zeroed], axis=1)
        position = jnp.pad(position, ((0, 0), (0, 1)), constant_values=-1)
    elif weights is not None:
        weights = take(weights, indices)
    update, scores = apply(x, position, weights)
    # The row of each kept token among the kept ones. The other tokens point at the last
    # row: with "zero" it is the row of the zeroed tokens, with "skip" it is not used.
    rows = jnp.cumsum(selected, axis=1) - 1
    rows = jnp.where(selected, rows, x.shape[1] - 1)
    touched = selected
    if cascade.semantics == "zero":
        touched = jnp.ones_like(selected)
    update = jnp.where(touched[..., None], take(update, rows), 0)
    if scores is not None:
        scores = jnp.where(touched, take(scores, rows), 0)
    return _advance(cascade, tokens, update, scores, touched)


def _advance(cascade, tokens, update, new_scores, scored=None):
    """Adds the update and the new scores; `scored` (B, n) masks tokens, None is all."""
    tokens = tokens._replace(x=tokens.x + update)
    if new_scores is None:
        return tokens
    new_scores = jax.lax.stop_gradient(new_scores)
    scored = jnp.ones(new_scores.shape, bool) if scored is None else scored
    if cascade.cumulative:
        score = tokens.score + jnp.where(scored, new_scores, 0)
    else:
        score = jnp.where(scored, new_scores, tokens.score)
    return tokens._replace(score=score)


def _ranking(cascade, tokens, num_prefix):
    """Ranks the tokens, (B, n): the prefix first if it is kept, hidden tokens last."""
    score = tokens.score
    if cascade.score == "norm":
        score = jnp.linalg.norm(tokens.x.astype(jnp.float32), axis=-1)
        score = jax.lax.stop_gradient(score)
    if tokens.weights is not None:
        score = jnp.where(tokens.weights > 0, score, -jnp.inf)
    if cascade.keep_cls:
        score = score.at[:, :num_prefix].set(jnp.inf)
    return score


# The constructors of `vit.schedules`, which imports this module, are also found here.
_IN_SCHEDULES = {
    "constant_ratios",
    "evit",
    "from_ratios",
    "keep_counts",
    "ramp_ratios",
    "range_ratios",
    "released_code",
    "token_merging",
}
# Old names, for one version.
_RENAMED = {
    "mlp_layer": ("vit.cascade", "pruned_mlp"),
    "report": ("vit.schedules", "cp_vit"),
    "start": ("vit.cascade", "initial_tokens"),
}


def __getattr__(name):
    if name in _IN_SCHEDULES:
        return getattr(importlib.import_module("vit.schedules"), name)
    if name in _RENAMED:
        module, new = _RENAMED[name]
        warnings.warn(
            f"vit.cascade.{name} is now {module}.{new}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(module), new)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
