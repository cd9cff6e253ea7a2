"""Cascade pruning: which tokens and heads each layer works on (CP-ViT, 2203.04570).

A `Cascade` is a static description: token counts are Python ints, so that nothing
compiles anew; which tokens they are is chosen for every image. Two modes give the same
logits: "masked" works on all tokens and hides the pruned ones, "compact" gathers the
kept ones and leaves out the work. The semantics say what becomes of a pruned token:

  drop   it is gone for all following layers (default; nested sets);
  skip   this layer leaves it as it is and hides it from the others; it may return;
  zero   the authors' released code: its normalised row is set to zero, so that it still
         is a key and still gets the constant update of a zero row; it may return.

What makes the modes one computation is the multiplicity of a token, `weights`: 0 for a
hidden one, m for the one row that stands for m zeroed rows, the group's size for merged
ones. A key's logit gets its logarithm.

Axes: B images, n tokens at hand (CLS first), P patches, D width, L layers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit import importance

SEMANTICS = ("drop", "skip", "zero")
MODES = ("compact", "masked")
SCORES = ("max", "sum", "cls", "norm", "random", "merge")
SCOPES = ("batch", "image")


@dataclasses.dataclass(frozen=True)
class Cascade:
    """What each layer of a Vision Transformer works on.

    Attributes:
      keep: patches that each layer's attention works on, (L,). CLS comes on top.
      keep_mlp: patches that each layer's MLP works on, (L,); None: those of `keep`.
      semantics: what becomes of a pruned token: "drop", "skip" or "zero".
      mode: "compact" or "masked".
      score: what ranks the patches: "max" or "sum" (`importance.patch_scores`), "cls"
        (EViT's), "norm" (of the token), "random", or "merge": tokens are not pruned but
        merged with similar ones before the MLP (token merging, arXiv 2210.09461).
      alpha: of `importance.patch_scores`.
      beta: likewise.
      cumulative: whether the scores of the layers are added up. The attention of layer
        l prunes by what the layers before it gave, its MLP by that with its own.
      fuse: keep the pruned tokens' mean, weighted by their scores, as one of the kept
        tokens (EViT); only for compact drop.
      keep_heads: heads whose values are used, (L,); None: all. They are chosen anew for
        every batch or image; for a fixed choice see `vit.slicing`.
      head_score: form of `importance.head_scores`.
      head_scope: "batch": the same heads for the whole batch; "image": each its own,
        masked only.
      keep_cls: whether CLS is always kept; the released code lets it compete.
      resets: layers before which the scores start again from zero.
      stale_threshold: the released code's mistake: the MLP's threshold is taken from
        the scores before its layer and compared with those after; only for masked zero.
      seed: of the random scores, one draw for each place in the batch, where `apply`
        is given no rng "cascade".
    """

    keep: tuple[int, ...]
    keep_mlp: tuple[int, ...] | None = None
    semantics: str = "drop"
    mode: str = "compact"
    score: str = "max"
    alpha: float = 0.0
    beta: float = 1.0
    cumulative: bool = True
    fuse: bool = False
    keep_heads: tuple[int, ...] | None = None
    head_score: str = "max"
    head_scope: str = "batch"
    keep_cls: bool = True
    resets: tuple[int, ...] = ()
    stale_threshold: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (
            ("semantics", SEMANTICS),
            ("mode", MODES),
            ("score", SCORES),
            ("head_score", importance.HEAD_FORMS),
            ("head_scope", SCOPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}."
                )
        for name in ("keep", "keep_mlp", "keep_heads"):
            counts = getattr(self, name)
            if counts is None:
                continue
            lowest = 1 if name == "keep_heads" else 0
            if len(counts) != len(self.keep) or min(counts) < lowest:
                raise ValueError(
                    f"{name} must be one count of at least {lowest} for each of the "
                    f"{len(self.keep)} layers, got {counts}."
                )
        self._check_combinations()

    def _check_combinations(self):
        path = [count for pair in self.counts for count in pair]
        if self.semantics == "drop" and any(np.diff(path) > 0):
            raise ValueError(
                "a dropped token does not return: the counts must not grow from layer "
                f"to layer, attention before MLP, got {path}."
            )
        if not self.keep_cls and (self.semantics == "drop" or self.score == "cls"):
            raise ValueError(
                "keep_cls=False is for semantics 'skip' and 'zero', where CLS is not "
                "lost, and not for score 'cls', which CLS gives."
            )
        compact_drop = self.semantics == "drop" and self.mode == "compact"
        if self.score == "merge":
            attention_only = [pair[0] for pair in self.counts]
            before = [attention_only[0], *[pair[1] for pair in self.counts[:-1]]]
            if not compact_drop or self.fuse or attention_only != before:
                raise ValueError(
                    "merging is compact drop without fuse, and happens before the MLP: "
                    "each `keep` must be the `keep_mlp` of the layer before."
                )
            if any(before - after > before // 2 for before, after in self.counts):
                raise ValueError(
                    f"a layer can merge at most half of its patches, got {path}."
                )
        if self.fuse and (not compact_drop or min(path) < 1):
            raise ValueError("fuse is for compact drop only, with a patch to keep.")
        if self.head_scope == "image" and self.mode == "compact" and self.keep_heads:
            raise ValueError(
                "heads of each image's own (head_scope='image') save nothing; take "
                "mode='masked'."
            )
        if self.stale_threshold and (self.semantics, self.mode) != ("zero", "masked"):
            raise ValueError(
                "stale_threshold prunes a number of tokens that is not known before: "
                "semantics='zero', mode='masked' only."
            )

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """Patches in the attention and the MLP of each layer, (L, 2)."""
        mlp = self.keep if self.keep_mlp is None else self.keep_mlp
        return tuple(zip(self.keep, mlp, strict=True))


def from_ratios(
    ratios: Sequence[float],
    num_patches: int,
    mlp_ratios: Sequence[float] | None = None,
    **options: Any,
) -> Cascade:
    """The cascade that prunes these shares of the patches in each layer.

    floor(ratio * num_patches) patches are pruned. Under "drop" a layer never has more
    tokens than the one before, whatever its ratio.

    Args:
      ratios: of each layer's attention, in [0, 1), (L,).
      num_patches: P, CLS not counted.
      mlp_ratios: of each layer's MLP; None: those of the attention.
      **options: further fields of `Cascade`.

    Raises:
      ValueError: if a ratio is outside [0, 1), or the options do not fit.
    """
    keep = keep_counts(ratios, num_patches)
    mlp = keep if mlp_ratios is None else keep_counts(mlp_ratios, num_patches)
    if len(mlp) != len(keep):
        raise ValueError(f"{len(keep)} ratios do not go with {len(mlp)} mlp_ratios.")
    if options.get("semantics", "drop") == "drop":
        path = np.minimum.accumulate(np.stack([keep, mlp], axis=1).ravel())
        keep, mlp = path.reshape(-1, 2).T.tolist()
    return Cascade(keep=tuple(keep), keep_mlp=tuple(mlp), **options)


def keep_counts(ratios: Sequence[float], num_patches: int) -> list[int]:
    """num_patches - floor(ratio * num_patches) for each ratio."""
    wrong = [ratio for ratio in ratios if not 0 <= ratio < 1]
    if wrong:
        raise ValueError(f"ratios must lie in [0, 1), got {wrong[0]}.")
    # 0.29 * 100 is 28.999999999999996.
    return [num_patches - math.floor(r * num_patches + 1e-9) for r in ratios]


def constant_ratios(ratio: float, num_layers: int, *, start: int = 1) -> list[float]:
    """The same ratio from layer `start` on."""
    return [ratio if layer >= start else 0.0 for layer in range(num_layers)]


def ramp_ratios(
    ratio: float,
    num_layers: int,
    *,
    start: int | None = None,
    length: int | None = None,
) -> list[float]:
    """The released code's form: a ramp of `length` layers from `start`, then `ratio`.

    The default is its 3 and 6 layers of 12, in proportion for other depths.
    """
    start = num_layers // 4 if start is None else start
    length = max(num_layers // 2, 1) if length is None else length
    return [
        ratio * min(max(layer - start + 1, 0) / length, 1.0)
        for layer in range(num_layers)
    ]


def range_ratios(
    ratio: float,
    ranges: Sequence[float],
    *,
    gamma: float = 0.5,
    largest: float = 0.9,
    start: int = 1,
) -> list[float]:
    """Ratios that follow the measured attention range of each layer.

    r_l = ratio * (1 + gamma * z_l), with z_l the range minus the mean range over the
    largest deviation, all over the layers from `start` on; clipped to [0, largest] and
    scaled so that their mean is `ratio` again. The paper has a formula of this purpose
    that could not be read; this one is ours.

    Args:
      ratio: mean over the pruned layers.
      ranges: of each layer, (L,); see `importance.attention_range`.
      gamma: how much the layers differ.
      largest: no layer prunes more.
      start: the first layer that prunes.

    Raises:
      ValueError: if the ratio is above `largest`, no layer is left, or the mean cannot
        be reached, as may be where gamma is 1 or more.
    """
    values = np.asarray(ranges[start:], np.float64)
    if not 0 <= ratio <= largest < 1 or not len(values):
        raise ValueError(
            f"ratio must lie in [0, {largest}] and start below {len(ranges)}, got "
            f"{ratio} and {start}."
        )
    deviation = values - values.mean()
    z = deviation / max(np.abs(deviation).max(), 1e-12)
    ratios = np.clip(ratio * (1 + gamma * z), 0, largest)
    # Scaling may push a layer over the edge; what it loses the others take.
    for _ in range(len(values)):
        free = ratios < largest
        missing = ratio * len(ratios) - ratios.sum()
        if abs(missing) < 1e-12 or not free.any() or not ratios[free].sum():
            break
        ratios[free] *= 1 + missing / ratios[free].sum()
        ratios = np.minimum(ratios, largest)
    if abs(ratios.mean() - ratio) > 1e-9:
        raise ValueError(
            f"a mean of {ratio} is out of reach with gamma {gamma}: layers that prune "
            f"nothing stay so, and {largest} is the most; take a smaller gamma."
        )
    return [0.0] * start + ratios.tolist()


def report(
    ratio: float, *, num_layers: int, num_patches: int, **options: Any
) -> Cascade:
    """The setting of the report's Tables 6 and 7: `ratio` is the plateau of the ramp.

    Cumulative maxima, one set of tokens for attention and MLP, CLS kept, dropped for
    good. Further fields of `Cascade` may be given.
    """
    ratios = ramp_ratios(ratio, num_layers)
    return from_ratios(ratios, num_patches, **options)


def released_code(
    *,
    num_layers: int = 12,
    num_patches: int = 196,
    plateau: float = 0.3,
    mode: str = "masked",
    stale_threshold: bool = True,
    double_counter: bool = True,
) -> Cascade:
    """The authors' released code (ok858ok/CP-ViT) as written, its mistakes as flags.

    Rows are zeroed after the normalisation, CLS competes with the rest, the MLP has a
    larger ratio of its own, 2/15 of the plateau for each layer.

    Args:
      num_layers: L; its schedule is meant for 12.
      num_patches: P.
      plateau: of the attention's ratios: 0.3 in the source.
      mode: "masked" or "compact".
      stale_threshold: compare the MLP's new scores with a threshold of the old ones.
      double_counter: its layer counter advances twice a block, so that the second half
        of the network repeats the first, scores reset.
    """
    slope = plateau * 2 / 15
    largest = 1 / max(1, (num_layers - 1) * 2 / 15)
    if not 0 <= plateau < largest:
        raise ValueError(
            f"plateau must lie in [0, {largest:.3f}) with {num_layers} layers, for the "
            f"MLP prunes more, got {plateau}."
        )
    schedule = [
        2 * layer % num_layers if double_counter else layer
        for layer in range(num_layers)
    ]
    # Shares of all tokens, CLS among them.
    num_tokens = num_patches + 1
    ramp = ramp_ratios(plateau, num_layers, start=3, length=6)
    attention = [math.floor(ramp[i] * num_tokens + 1e-9) for i in schedule]
    mlp = [math.floor(slope * i * num_tokens + 1e-9) for i in schedule]
    return Cascade(
        keep=tuple(num_patches - pruned for pruned in attention),
        keep_mlp=tuple(num_patches - pruned for pruned in mlp),
        semantics="zero",
        mode=mode,
        keep_cls=False,
        resets=(num_layers - num_layers // 2,) if double_counter else (),
        stale_threshold=stale_threshold,
    )


def evit(
    keep_rate: float,
    *,
    num_layers: int,
    num_patches: int,
    layers: Sequence[int] | None = None,
    fuse: bool = True,
) -> Cascade:
    """EViT (Liang et al. 2022): some layers drop all but a share between their halves.

    Args:
      keep_rate: share kept, in (0, 1].
      num_layers: L.
      num_patches: P.
      layers: which; None: a quarter, a half and three quarters (3, 6, 9 of 12).
      fuse: keep the mean of the dropped as one token more.
    """
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate must lie in (0, 1], got {keep_rate}.")
    if layers is None:
        layers = [num_layers * i // 4 for i in (1, 2, 3)]
    keep, keep_mlp, left = [], [], num_patches
    for layer in range(num_layers):
        keep.append(left)
        if layer in layers and keep_rate < 1:
            left = min(math.ceil(keep_rate * left - 1e-9) + fuse, left)
        keep_mlp.append(left)
    return Cascade(
        keep=tuple(keep),
        keep_mlp=tuple(keep_mlp),
        score="cls",
        cumulative=False,
        fuse=fuse,
    )


def token_merging(num_merged: int, *, num_layers: int, num_patches: int) -> Cascade:
    """Token merging (Bolya et al. 2023): every layer merges `num_merged` tokens away.

    At most half of a layer's tokens, CLS left out, can be merged; later layers then
    merge fewer.
    """
    if num_merged < 0:
        raise ValueError(f"num_merged must be at least 0, got {num_merged}.")
    keep, keep_mlp, left = [], [], num_patches
    for _ in range(num_layers):
        keep.append(left)
        left -= min(num_merged, left // 2)
        keep_mlp.append(left)
    return Cascade(keep=tuple(keep), keep_mlp=tuple(keep_mlp), score="merge")


def check_fits(cascade: Cascade, num_patches: int, num_layers: int) -> None:
    """Raises ValueError if a cascade is not for a network of this size."""
    largest = max(max(pair) for pair in cascade.counts)
    if len(cascade.keep) != num_layers or largest > num_patches:
        raise ValueError(
            f"the cascade is for {len(cascade.keep)} layers and at least {largest} "
            f"patches; the network has {num_layers} and {num_patches}."
        )
    if cascade.score == "merge" and cascade.keep[0] != num_patches:
        raise ValueError(
            f"merging starts with {cascade.keep[0]} patches, the network with "
            f"{num_patches}."
        )


class Tokens(NamedTuple):
    """The tokens between two layers.

    Attributes:
      x: (B, n, D), CLS first.
      position: original number of each, 0 for CLS, -1 for a fused one, (B, n).
      score: what ranks them, (B, n), float32.
      weights: how many each stands for, (B, n); None is one.
      previous: what ranked them before the layer's attention, for the stale threshold.
    """

    x: jax.Array
    position: jax.Array
    score: jax.Array
    weights: jax.Array | None = None
    previous: jax.Array | None = None


class Heads(NamedTuple):
    """A choice of heads for one layer's attention: see `Cascade`."""

    keep: int
    score: str
    scope: str
    mode: str


def start(
    cascade: Cascade | None, x: jax.Array, key: jax.Array | None = None
) -> Tokens:
    """The tokens (B, 1 + P, D) before the first layer; `key` is for random scores."""
    batch, num_tokens, _ = x.shape
    score = jnp.zeros((batch, num_tokens))
    if cascade is not None and cascade.score == "random":
        key = jax.random.key(cascade.seed) if key is None else key
        score = jax.random.uniform(key, score.shape)
    position = jnp.broadcast_to(jnp.arange(num_tokens), score.shape)
    weights = None
    if cascade is not None and cascade.score == "merge":
        weights = jnp.ones_like(score)
    return Tokens(x, position, score, weights)


def heads_of(cascade: Cascade | None, layer: int, num_heads: int) -> Heads | None:
    """Which heads the layer chooses; None if it keeps all `num_heads`."""
    if cascade is None or cascade.keep_heads is None:
        return None
    keep = cascade.keep_heads[layer]
    if keep > num_heads:
        raise ValueError(f"layer {layer} has {num_heads} heads, keep_heads is {keep}.")
    if keep == num_heads:
        return None
    return Heads(keep, cascade.head_score, cascade.head_scope, cascade.mode)


def scored_query(cascade: Cascade | None, layer: int, num_patches: int) -> str | None:
    """Whose attention probabilities layer `layer` must give: "all", "cls" or None.

    None also where no later choice of tokens depends on them: then the layer can run
    its attention fused.
    """
    if cascade is None or cascade.score in ("norm", "random", "merge"):
        return None
    if not any(_chooses(cascade, layer, num_patches)):
        return None
    return "cls" if cascade.score == "cls" else "all"


def _chooses(cascade, layer, num_patches):
    """Whether each choice after the attention of `layer` leaves a token out."""
    path = [count for pair in cascade.counts for count in pair]
    for point in range(2 * layer + 1, len(path)):
        if point % 2 == 0 and point // 2 in cascade.resets:
            # What was scored before is forgotten here.
            return
        if cascade.semantics == "drop":
            # A choice of all that are left is none.
            yield path[point] < path[point - 1]
        else:
            yield path[point] < num_patches


def attention_layer(
    cascade: Cascade | None,
    layer: int,
    tokens: Tokens,
    norm: Callable[[jax.Array], jax.Array],
    attend: Callable[[jax.Array, jax.Array | None], Any],
) -> Tokens:
    """The first half of a block: prunes by the layers before, attends, scores.

    Args:
      cascade: what to work on; None is everything.
      layer: its number.
      tokens: before it.
      norm: the normalisation before the attention.
      attend: (normalised tokens, weights) -> record with `update` (B, n, D), `probs`
        and `keys`, as `model.Attended`.
    """
    if cascade is None:
        return tokens._replace(x=tokens.x + attend(norm(tokens.x), None).update)
    if layer in cascade.resets:
        tokens = tokens._replace(score=jnp.zeros_like(tokens.score))
    if cascade.stale_threshold:
        tokens = tokens._replace(previous=_ranking(cascade, tokens))
    query = scored_query(cascade, layer, tokens.x.shape[1] - 1)
    keys = None

    def apply(x, weights):
        nonlocal keys
        attended = attend(x, weights)
        keys = attended.keys
        if query is None:
            return attended.update, None
        if query == "cls":
            return attended.update, importance.cls_scores(attended.probs, weights)
        gained = importance.patch_scores(
            attended.probs,
            weights,
            form=cascade.score,
            alpha=cascade.alpha,
            beta=cascade.beta,
        )
        return attended.update, gained

    tokens = _half_layer(cascade, tokens, cascade.counts[layer][0], norm, apply)
    if cascade.score == "merge":
        tokens = _merge(tokens, keys, cascade.counts[layer][1])
    return tokens


def mlp_layer(
    cascade: Cascade | None,
    layer: int,
    tokens: Tokens,
    norm: Callable[[jax.Array], jax.Array],
    mlp: Callable[[jax.Array], jax.Array],
) -> Tokens:
    """The second half of a block: prunes by the scores so far, applies the MLP."""
    if cascade is None:
        return tokens._replace(x=tokens.x + mlp(norm(tokens.x)))
    keep = cascade.counts[layer][1]
    if cascade.stale_threshold:
        threshold = jnp.sort(tokens.previous, axis=1)
        pruned = tokens.score.shape[1] - 1 - keep
        selected = _ranking(cascade, tokens) >= threshold[:, pruned, None]
        update = mlp(norm(tokens.x) * selected[..., None])
        return tokens._replace(x=tokens.x + update)
    return _half_layer(cascade, tokens, keep, norm, lambda x, _: (mlp(x), None))


def _half_layer(cascade, tokens, keep, norm, apply):
    """Applies half a layer to the `keep` best patches and CLS, as the semantics say.

    apply(normalised x, weights) -> update like x, gained scores (B, n) or None.
    """
    num_tokens = tokens.x.shape[1]
    rank_by = _ranking(cascade, tokens)
    if keep + 1 >= num_tokens:
        update, gained = apply(norm(tokens.x), tokens.weights)
        everything = jnp.ones(tokens.score.shape, bool)
        return _advance(cascade, tokens, update, gained, everything)
    selected = top_mask(rank_by, keep + 1)
    if cascade.mode == "masked":
        if cascade.semantics == "zero":
            x = norm(tokens.x) * selected[..., None]
            update, gained = apply(x, None)
            everything = jnp.ones_like(selected)
            return _advance(cascade, tokens, update, gained, everything)
        weights = selected.astype(jnp.float32)
        update, gained = apply(norm(tokens.x), weights)
        if cascade.semantics == "drop":
            tokens = tokens._replace(weights=weights)
        update = update * selected[..., None]
        return _advance(cascade, tokens, update, gained, selected)
    if cascade.semantics == "drop":
        tokens = _drop(cascade, tokens, selected, rank_by, keep + 1)
        update, gained = apply(norm(tokens.x), tokens.weights)
        everything = jnp.ones(tokens.score.shape, bool)
        return _advance(cascade, tokens, update, gained, everything)
    indices = mask_to_indices(selected, keep + 1)
    x = norm(take(tokens.x, indices))
    weights = None
    if cascade.semantics == "zero":
        # The zeroed rows are all alike: one row stands for them.
        batch, _, width = x.shape
        x = jnp.concatenate([x, jnp.zeros((batch, 1, width), x.dtype)], axis=1)
        weights = jnp.ones(x.shape[:2]).at[:, -1].set(num_tokens - keep - 1)
    update, gained = apply(x, weights)
    # The place of each kept token among the kept ones; the others take the last row,
    # which is that of the zeroed tokens, or are left alone.
    places = jnp.cumsum(selected, axis=1) - 1
    places = jnp.where(selected, places, x.shape[1] - 1)
    touched = selected
    if cascade.semantics == "zero":
        touched = jnp.ones_like(selected)
    update = jnp.where(touched[..., None], take(update, places), 0)
    if gained is not None:
        gained = jnp.where(touched, take(gained, places), 0)
    return _advance(cascade, tokens, update, gained, touched)


def _advance(cascade, tokens, update, gained, scored):
    """Adds the update, and the gained scores of the tokens that were scored."""
    tokens = tokens._replace(x=tokens.x + update)
    if gained is None:
        return tokens
    gained = jax.lax.stop_gradient(gained)
    if cascade.cumulative:
        score = tokens.score + jnp.where(scored, gained, 0)
    else:
        score = jnp.where(scored, gained, tokens.score)
    return tokens._replace(score=score)


def _ranking(cascade, tokens):
    """What ranks the tokens: CLS first if it is kept, those that are gone last."""
    score = tokens.score
    if cascade.score == "norm":
        score = jnp.linalg.norm(tokens.x.astype(jnp.float32), axis=-1)
        score = jax.lax.stop_gradient(score)
    if cascade.mode == "masked" and tokens.weights is not None:
        score = jnp.where(tokens.weights > 0, score, -jnp.inf)
    if cascade.keep_cls:
        score = score.at[:, 0].set(jnp.inf)
    return score


def _drop(cascade, tokens, selected, rank_by, count):
    """The selected tokens alone; with `fuse` the last of them is the others' mean."""
    fused = None
    if cascade.fuse:
        count -= 1
        selected = top_mask(rank_by, count)
        shares = jnp.where(selected, 0.0, rank_by)
        shares = shares / jnp.maximum(shares.sum(1, keepdims=True), 1e-12)
        fused = jnp.einsum("bn,bnd->bd", shares, tokens.x)[:, None]
        score = jnp.sum(shares * tokens.score, axis=1, keepdims=True)
    indices = mask_to_indices(selected, count)
    kept = Tokens(*(x if x is None else take(x, indices) for x in tokens))
    if fused is None:
        return kept
    nowhere = jnp.full_like(kept.position[:, :1], -1)
    return kept._replace(
        x=jnp.concatenate([kept.x, fused.astype(kept.x.dtype)], axis=1),
        position=jnp.concatenate([kept.position, nowhere], axis=1),
        score=jnp.concatenate([kept.score, score], axis=1),
    )


def _merge(tokens, keys, keep):
    """Bipartite soft matching: merges tokens until CLS and `keep` are left.

    Alternate tokens form the sides A (with CLS) and B; the tokens of A whose keys are
    most like one of B are merged into it, as means weighted by the groups' sizes.
    """
    batch, num_tokens, _ = tokens.x.shape
    num_merged = num_tokens - 1 - keep
    if not num_merged:
        return tokens
    keys = jax.lax.stop_gradient(keys.astype(jnp.float32))
    keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    likeness = jnp.einsum("bid,bjd->bij", keys[:, ::2], keys[:, 1::2])
    best = jnp.max(likeness, axis=2).at[:, 0].set(-jnp.inf)  # (B, A)
    merged = top_mask(best, num_merged)
    onto = jax.nn.one_hot(jnp.argmax(likeness, axis=2), likeness.shape[2])
    onto = onto * merged[..., None]  # (B, A, B)
    left = mask_to_indices(~merged, best.shape[1] - num_merged)

    def split(x):
        return take(x[:, ::2], left), x[:, 1::2]

    sizes = tokens.weights
    size = sizes[:, 1::2] + jnp.einsum("bij,bi->bj", onto, sizes[:, ::2])
    weighted = tokens.x * sizes[..., None]
    x = weighted[:, 1::2] + jnp.einsum("bij,bid->bjd", onto, weighted[:, ::2])
    x = (x / size[..., None]).astype(tokens.x.dtype)
    return Tokens(
        x=jnp.concatenate([split(tokens.x)[0], x], axis=1),
        position=jnp.concatenate(split(tokens.position), axis=1),
        score=jnp.concatenate(split(tokens.score), axis=1),
        weights=jnp.concatenate([split(sizes)[0], size], axis=1),
    )


def choose_heads(heads: Heads, scores: jax.Array) -> jax.Array:
    """Mask (B, H) of the heads with the largest scores (B, H), by batch or by image."""
    if heads.scope == "batch":
        scores = jnp.broadcast_to(scores.mean(0, keepdims=True), scores.shape)
    return top_mask(jax.lax.stop_gradient(scores), heads.keep)


def top_mask(score: jax.Array, count: int) -> jax.Array:
    """Mask (B, n) of the `count` largest of each row; of equals the first ones.

    Ranks by comparing all pairs: n is some hundreds, and sorting is slow on the CPU.
    """
    ahead = score[:, None, :] > score[:, :, None]
    order = jnp.arange(score.shape[1])
    earlier = (order[None, :] < order[:, None])[None]
    ahead |= (score[:, None, :] == score[:, :, None]) & earlier
    return jnp.sum(ahead, axis=2) < count


def mask_to_indices(mask: jax.Array, count: int) -> jax.Array:
    """Indices (B, count), rising, of the `count` True entries of each row (B, n)."""
    place = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    hit = place[:, None, :] == jnp.arange(count)[None, :, None]  # (B, count, n)
    return jnp.sum(jnp.where(hit, jnp.arange(mask.shape[1])[None, None], 0), axis=2)


def take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of each image: x (B, n, ...), indices (B, k) -> (B, k, ...)."""
    # Whole rows at a time, unlike take_along_axis.
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, indices)
