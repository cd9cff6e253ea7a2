"""Schedules: how many tokens each layer keeps, and the cascades of published methods.

A pruning ratio is not a cost saving: `vit.cost.count` gives the multiply-adds of a
cascade.

Sources: CP-ViT (arXiv 2203.04570) and its released code (ok858ok/CP-ViT), EViT (Liang
et al. 2022, arXiv 2202.07800), token merging (Bolya et al. 2023, arXiv 2210.09461), and
the student report whose experiments this project repeats (docs/report.md).

Axes: P patches (CLS not counted), L layers.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit.cascade import Cascade


def from_ratios(
    ratios: Sequence[float],
    num_patches: int,
    mlp_ratios: Sequence[float] | None = None,
    **options: Any,
) -> Cascade:
    """The cascade that prunes the given share of the patches in each layer.

    floor(ratio * num_patches) patches are pruned. With semantics "drop", a layer never
    has more tokens than the layer before, whatever its ratio.

    Args:
      ratios: pruned share in each layer's attention, in [0, 1), (L,).
      num_patches: P.
      mlp_ratios: pruned share in each layer's MLP, in [0, 1), (L,); None uses `ratios`.
      **options: other fields of `Cascade`.

    Returns:
      A `Cascade` of L layers.

    Raises:
      ValueError: if a ratio is outside [0, 1), or the options do not fit together.

    Example:
      >>> from vit import schedules
      >>> cascade = schedules.from_ratios([0.0, 0.25, 0.5], num_patches=16)
      >>> cascade.keep
      (16, 12, 8)
    """
    keep = keep_counts(ratios, num_patches)
    mlp = keep if mlp_ratios is None else keep_counts(mlp_ratios, num_patches)
    if len(mlp) != len(keep):
        raise ValueError(
            "ratios and mlp_ratios must have one entry per layer, got "
            f"{len(keep)} ratios and {len(mlp)} mlp_ratios."
        )
    if options.get("semantics", "drop") == "drop":
        path = np.minimum.accumulate(np.stack([keep, mlp], axis=1).ravel())
        keep, mlp = path.reshape(-1, 2).T.tolist()
    return Cascade(keep=tuple(keep), keep_mlp=tuple(mlp), **options)


def keep_counts(ratios: Sequence[float], num_patches: int) -> list[int]:
    """num_patches - floor(ratio * num_patches) for each ratio.

    Args:
      ratios: share of the patches that each layer leaves out, in [0, 1).
      num_patches: P.

    Raises:
      ValueError: if a ratio is out of range.
    """
    wrong = [ratio for ratio in ratios if not 0 <= ratio < 1]
    if wrong:
        raise ValueError(f"ratios must lie in [0, 1), got {wrong[0]}.")
    # 0.29 * 100 is 28.999999999999996.
    return [num_patches - math.floor(r * num_patches + 1e-9) for r in ratios]


def _start_is_now_first_layer(function):
    """Accepts the old keyword `start` for `first_layer`, for one version."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if "start" in kwargs:
            warnings.warn(
                f"the argument `start` of {function.__name__} is now `first_layer`.",
                DeprecationWarning,
                stacklevel=2,
            )
            kwargs["first_layer"] = kwargs.pop("start")
        return function(*args, **kwargs)

    return wrapped


@_start_is_now_first_layer
def constant_ratios(
    ratio: float, num_layers: int, *, first_layer: int = 1
) -> list[float]:
    """The same ratio in every layer from `first_layer` on, zero before.

    Args:
      ratio: pruned share, in [0, 1).
      num_layers: L.
      first_layer: first layer that prunes.

    Returns:
      L ratios.
    """
    return [ratio if layer >= first_layer else 0.0 for layer in range(num_layers)]


@_start_is_now_first_layer
def ramp_ratios(
    ratio: float,
    num_layers: int,
    *,
    first_layer: int | None = None,
    length: int | None = None,
) -> list[float]:
    """A linear ramp of `length` layers, then a plateau, as in the released code.

    Args:
      ratio: pruned share of the plateau, in [0, 1).
      num_layers: L.
      first_layer: first layer that prunes; None is a quarter of L, 3 of 12 as in the
        released code, but at least 1: the first layer has no scores yet.
      length: layers of the ramp; None is a half of L, 6 of 12.

    Returns:
      L ratios.

    Raises:
      ValueError: if `length` is less than 1.
    """
    first_layer = max(num_layers // 4, 1) if first_layer is None else first_layer
    length = max(num_layers // 2, 1) if length is None else length
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}.")
    return [
        ratio * min(max(layer - first_layer + 1, 0) / length, 1.0)
        for layer in range(num_layers)
    ]


@_start_is_now_first_layer
def range_ratios(
    ratio: float,
    ranges: Sequence[float],
    *,
    gamma: float = 0.5,
    largest: float = 0.9,
    first_layer: int = 1,
) -> list[float]:
    """Ratios that follow the measured attention range of each layer.

    r_l = ratio * (1 + gamma * z_l), where z_l is the deviation of the range from its
    mean, divided by the largest absolute deviation. Mean and maximum are taken over the
    layers from `first_layer` on. The ratios are clipped to [0, largest] and rescaled to
    the mean `ratio`. This formula is our own; CP-ViT's formula for the same purpose
    is illegible in the copy that we have.

    Args:
      ratio: mean over the layers that prune, in [0, largest].
      ranges: attention range of each layer, (L,); see `importance.attention_range`.
      gamma: how much the layers differ.
      largest: upper limit of a ratio, below 1.
      first_layer: first layer that prunes.

    Returns:
      L ratios.

    Raises:
      ValueError: if the ratio is above `largest`, no layer prunes, a range is not
        finite, or the mean cannot be reached, which may happen with gamma >= 1.
    """
    values = np.asarray(ranges[first_layer:], np.float64)
    if not 0 <= ratio <= largest < 1 or not len(values):
        raise ValueError(
            f"ratio must lie in [0, {largest}] and first_layer below {len(ranges)}, "
            f"got {ratio} and {first_layer}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"ranges must be finite, got {list(ranges)}.")
    deviation = values - values.mean()
    z = deviation / max(np.abs(deviation).max(), 1e-12)
    ratios = np.clip(ratio * (1 + gamma * z), 0, largest)
    # Rescaling may push a layer above the limit; the other layers take the excess.
    for _ in range(len(values)):
        free = ratios < largest
        missing = ratio * len(ratios) - ratios.sum()
        if abs(missing) < 1e-12 or not free.any() or not ratios[free].sum():
            break
        ratios[free] *= 1 + missing / ratios[free].sum()
        ratios = np.minimum(ratios, largest)
    if abs(ratios.mean() - ratio) > 1e-9:
        raise ValueError(
            f"a mean ratio of {ratio} cannot be reached with gamma {gamma}: rescaling "
            f"leaves ratios of 0 at 0 and no ratio exceeds {largest}; choose a smaller "
            "gamma."
        )
    return [0.0] * first_layer + ratios.tolist()


def cp_vit(
    ratio: float,
    *,
    num_layers: int,
    num_patches: int,
    first_layer: int | None = None,
    length: int | None = None,
    **options: Any,
) -> Cascade:
    """CP-ViT as in Tables 6 and 7 of the student report.

    The ratios are those of `ramp_ratios`. By default scores are cumulative maxima,
    attention and MLP of a layer work on the same tokens, CLS is always kept, and pruned
    tokens are dropped for good.

    Args:
      ratio: pruned share on the plateau of the ramp, in [0, 1).
      num_layers: L.
      num_patches: P.
      first_layer: see `ramp_ratios`.
      length: see `ramp_ratios`.
      **options: other fields of `Cascade`, such as `score` or `semantics`.

    Returns:
      A `Cascade` of L layers.

    Raises:
      ValueError: if the ratio is outside [0, 1), or the options do not fit together.

    Example:
      >>> from vit import schedules
      >>> cascade = schedules.cp_vit(0.5, num_layers=4, num_patches=16)
      >>> cascade.keep, cascade.score
      ((16, 12, 8, 8), 'max')
    """
    ratios = ramp_ratios(ratio, num_layers, first_layer=first_layer, length=length)
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
    """CP-ViT as its released code computes it (ok858ok/CP-ViT), errors included.

    Rows are set to zero after the normalization, CLS competes with the patches, and the
    MLP has its own ratio, which grows by 2/15 of the plateau per layer.

    Args:
      num_layers: L; the schedule of the released code is meant for 12.
      num_patches: P.
      plateau: largest ratio of the attention; 0.3 in the released code.
      mode: "masked" or "compact".
      stale_threshold: whether the MLP compares its scores with a threshold that was
        taken from older ones (an error of the released code).
      double_counter: whether the layer counter advances twice per block, so that the
        second half of the network repeats the schedule of the first half with fresh
        scores (an error of the released code).

    Returns:
      A `Cascade` of L layers with semantics "zero".

    Raises:
      ValueError: if the plateau makes the MLP of the last layer prune every token, or
        `stale_threshold` is combined with mode "compact".
    """
    slope = plateau * 2 / 15
    largest = largest_plateau(num_layers)
    if not 0 <= plateau < largest:
        raise ValueError(
            f"plateau must lie in [0, {largest:.3f}) with {num_layers} layers, because "
            f"the MLP prunes more than the attention; got {plateau}."
        )
    schedule = [
        2 * layer % num_layers if double_counter else layer
        for layer in range(num_layers)
    ]
    # Here the ratios are shares of all tokens, CLS included.
    num_tokens = num_patches + 1
    ramp = ramp_ratios(plateau, num_layers, first_layer=3, length=6)
    attention = [math.floor(ramp[i] * num_tokens + 1e-9) for i in schedule]
    mlp = [math.floor(slope * i * num_tokens + 1e-9) for i in schedule]
    return Cascade(
        keep=tuple(num_patches - pruned for pruned in attention),
        keep_mlp=tuple(num_patches - pruned for pruned in mlp),
        semantics="zero",
        mode=mode,
        keep_cls=False,
        # A single layer has no second half.
        resets=(num_layers - num_layers // 2,)
        if double_counter and num_layers > 1
        else (),
        stale_threshold=stale_threshold,
    )


def largest_plateau(num_layers: int) -> float:
    """Upper limit of the plateau of `released_code`, not included."""
    return 1 / max(1, (num_layers - 1) * 2 / 15)


def evit(
    keep_rate: float,
    *,
    num_layers: int,
    num_patches: int,
    layers: Sequence[int] | None = None,
    fuse: str | None = "sum",
) -> Cascade:
    """EViT: a few layers drop patches between their attention and their MLP.

    Args:
      keep_rate: share of the patches that such a layer keeps, in (0, 1].
      num_layers: L.
      num_patches: P.
      layers: the layers that drop patches; None means those at a quarter, a half and
        three quarters of the depth (3, 6 and 9 of 12).
      fuse: how the dropped patches stay as an extra token: "sum", weighted by the
        attention of CLS, as in the authors' code, or "mean", the sum divided by the sum
        of these weights; None removes them.

    Returns:
      A `Cascade` of L layers with score "cls".

    Raises:
      ValueError: if the keep rate is outside (0, 1], or a layer does not exist.

    Example:
      >>> from vit import schedules
      >>> cascade = schedules.evit(0.5, num_layers=4, num_patches=16)
      >>> cascade.keep_mlp  # ceil(16 / 2) and the fused token, and so on
      (16, 9, 6, 4)
    """
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate must lie in (0, 1], got {keep_rate}.")
    if layers is None:
        layers = [num_layers * i // 4 for i in (1, 2, 3)]
    if not set(layers) <= set(range(num_layers)):
        raise ValueError(
            f"layers must be among 0 to {num_layers - 1}, got {tuple(layers)}."
        )
    keep, keep_mlp, left = [], [], num_patches
    for layer in range(num_layers):
        keep.append(left)
        if layer in layers and keep_rate < 1:
            left = min(math.ceil(keep_rate * left - 1e-9) + bool(fuse), left)
        keep_mlp.append(left)
    return Cascade(
        keep=tuple(keep),
        keep_mlp=tuple(keep_mlp),
        score="cls",
        cumulative=False,
        fuse=fuse,
    )


MERGE_SCHEDULES = ("constant", "decreasing")


def token_merging(
    num_merged: int,
    *,
    num_layers: int,
    num_patches: int,
    schedule: str = "constant",
) -> Cascade:
    """Token merging: every layer merges tokens into similar ones.

    The schedule "constant" merges `num_merged` = r tokens in each layer. "decreasing"
    merges floor(2 r (1 - l / (L - 1))) in layer l, from 2 r in the first layer to 0 in
    the last. It merges about as many in all, but earlier, so that it saves more
    multiply-adds. Both are options of the authors' program. A layer can merge at most
    half of its tokens, CLS not counted; it then merges fewer than its schedule says.

    Args:
      num_merged: r, tokens that disappear in each layer, or on average; at least 0.
      num_layers: L.
      num_patches: P.
      schedule: one of `MERGE_SCHEDULES`.

    Returns:
      A `Cascade` of L layers with score "merge".

    Raises:
      ValueError: if `num_merged` is negative, or the schedule is unknown.

    Example:
      >>> from vit import schedules
      >>> sizes = {"num_layers": 4, "num_patches": 16}
      >>> schedules.token_merging(3, **sizes).keep_mlp
      (13, 10, 7, 4)
      >>> schedules.token_merging(3, **sizes, schedule="decreasing").keep_mlp
      (10, 6, 4, 4)
    """
    if num_merged < 0:
        raise ValueError(f"num_merged must be at least 0, got {num_merged}.")
    if schedule not in MERGE_SCHEDULES:
        raise ValueError(
            f"schedule must be one of {', '.join(MERGE_SCHEDULES)}; got {schedule!r}."
        )
    merged = [num_merged] * num_layers
    if schedule == "decreasing" and num_layers > 1:
        last = num_layers - 1
        merged = [2 * num_merged * (last - i) // last for i in range(num_layers)]
    keep, keep_mlp, left = [], [], num_patches
    for count in merged:
        keep.append(left)
        left -= min(count, left // 2)
        keep_mlp.append(left)
    return Cascade(keep=tuple(keep), keep_mlp=tuple(keep_mlp), score="merge")
