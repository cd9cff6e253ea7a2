"""Figures of vision transformers and their pruning.

Every function takes NumPy arrays and draws with matplotlib, which is imported only when
a function is called. Single-panel functions draw into `ax`, or into a new figure, and
return the Axes. Multi-panel functions return the Figure.

Axis letters: B images, H W C image, N patches, T tokens, L layers, K points of a curve.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colors, each with a marker and a line style of its own; a second round
# of the colors meets other markers.
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    "#000000",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)))


def training_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    y_label: str,
    x_label: str = "epoch",
    marks: Mapping[str, float] | None = None,
    ax: Any = None,
) -> Any:
    """Loss or accuracy against epochs.

    Args:
      curves: {label: (x (K,), values (K,) or (R, K))}. Of R repeats the mean is drawn,
        and a band from the lowest to the highest.
      y_label: name and unit of the y axis.
      x_label: name and unit of the x axis.
      marks: {text: x}: vertical lines, named in the legend, for example a stage of the
        training.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (x, values)) in enumerate(curves.items()):
        color, marker, line = _style(number)
        values = np.asarray(values)
        mean = values.mean(0) if values.ndim == 2 else values
        ax.plot(
            x,
            mean,
            color=color,
            linestyle=line,
            linewidth=1.3,
            marker=marker,
            markersize=4,
            markevery=max(len(mean) // 8, 1),
            label=label,
        )
        if values.ndim == 2 and len(values) > 1:
            low, high = values.min(0), values.max(0)
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    # Named in the legend: text in the panel would cover curves.
    lines = itertools.cycle((":", "--", "-."))
    for (text, x), line in zip((marks or {}).items(), lines, strict=False):
        ax.axvline(x, color="0.4", linestyle=line, linewidth=1, label=text)
    _finish(ax, x_label, y_label)
    return ax


def accuracy_against_cost(
    methods: Mapping[str, tuple[np.ndarray, ...]],
    *,
    x_label: str = "multiply-adds (% of the whole network)",
    y_label: str = "test accuracy (%)",
    styles: Mapping[str, int] | None = None,
    ax: Any = None,
) -> Any:
    """Accuracy of pruned networks against what they cost.

    Args:
      methods: {label: (cost (K,), accuracy (K,)) or (cost, accuracy, deviation (K,))}.
        Points of a method are joined from the cheapest to the dearest; a single point
        stays a point.
      x_label: name and unit of the cost.
      y_label: name and unit of the accuracy.
      styles: {label: number of its color, marker and line}, so that a method looks the
        same in several figures; None counts.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (cost, accuracy, *deviation)) in enumerate(methods.items()):
        color, marker, line = _style((styles or {}).get(label, number))
        order = np.argsort(cost)
        ax.errorbar(
            np.asarray(cost)[order],
            np.asarray(accuracy)[order],
            yerr=np.asarray(deviation[0])[order] if deviation else None,
            color=color,
            marker=marker,
            markersize=5,
            linestyle=line if len(order) > 1 else "none",
            linewidth=1.2,
            capsize=2,
            label=label,
        )
    _finish(ax, x_label, y_label)
    return ax


def speedup(
    methods: Mapping[str, tuple[np.ndarray, ...]],
    *,
    styles: Mapping[str, int] | None = None,
    ax: Any = None,
) -> Any:
    """Measured speed-up against the speed-up that multiply-adds predict.

    Args:
      methods: {label: (predicted (K,), measured (K,)) or (predicted, measured,
        quartiles (K, 2))}, as ratios to the whole network. Every measurement is a
        point; quartiles are drawn as error bars.
      styles: {label: number of its color and marker}; None counts.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes. Its solid line is measured = predicted, its dotted one 0.9 of that.
    """
    ax = _axes(ax)
    highest = 1.0
    for number, (label, (predicted, measured, *quartiles)) in enumerate(
        methods.items()
    ):
        color, marker, _ = _style((styles or {}).get(label, number))
        bars = None
        if quartiles:
            low, high = np.asarray(quartiles[0]).T
            bars = np.clip([measured - low, high - measured], 0, None)
        ax.errorbar(
            predicted,
            measured,
            yerr=bars,
            color=color,
            marker=marker,
            markersize=5,
            linestyle="none",
            capsize=2,
            label=label,
        )
        highest = max(highest, np.max(predicted))
    line = np.array([1.0, 1.05 * highest])
    ax.plot(line, line, color="0.5", linewidth=1, label="measured = predicted")
    ax.plot(line, 0.9 * line, color="0.5", linestyle=":", label="0.9 of predicted")
    _finish(ax, "predicted speed-up (times)", "measured speed-up (times)")
    return ax


def kept_patches(
    images: np.ndarray,
    kept: np.ndarray,
    *,
    grid: tuple[int, int] | None = None,
    ratio_labels: bool = True,
) -> Any:
    """Images over the layers of a cascade; pruned patches are faded to blue.

    Args:
      images: (B, H, W, C) in [0, 1] or uint8, C of 1 or 3.
      kept: True where a patch is computed in a layer, (L, B, N), as
        `vit.observe(model, params, images).kept`. Patches lie in rows.
      grid: rows and columns of patches; None means square patches.
      ratio_labels: writes the share of patches kept above each layer.

    Returns:
      The Figure, one row for each image, one column for each layer.

    Raises:
      ValueError: if the patches do not form the grid, or the arrays do not fit.
    """
    import matplotlib.pyplot as plt

    images = [_in_unit_range(image) for image in images]
    kept = _array("kept", kept, "layers", "images", "patches")
    num_layers, num_images, num_patches = kept.shape
    if len(images) != num_images:
        raise ValueError(
            f"kept is of {num_images} images, but there are {len(images)}."
        )
    height, width = images[0].shape[:2]
    grid = _grid(num_patches, (height, width), grid)
    figure, axes = plt.subplots(
        num_images,
        num_layers + 1,
        figsize=(1.1 * (num_layers + 1), 1.15 * num_images * height / width + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for row, image in enumerate(images):
        _show(axes[row, 0], image)
        for layer in range(num_layers):
            mask = _over_pixels(kept[layer, row], grid, image)
            # White or gray would not differ from the pixels of some images.
            faded = 0.25 * image + np.array([0.15, 0.5, 0.75])
            _show(axes[row, layer + 1], np.where(mask, image, faded))
    axes[0, 0].set_title("image", fontsize=8)
    for layer in range(num_layers):
        share = f"\n{100 * kept[layer].mean():.0f} % kept" if ratio_labels else ""
        axes[0, layer + 1].set_title(f"layer {layer}{share}", fontsize=8)
    return figure


def segments(
    image: np.ndarray, segments: np.ndarray, *, grid: tuple[int, int] | None = None
) -> Any:
    """Segments of the attention over an image: the lighter, the more attended.

    Args:
      image: (H, W, C) in [0, 1] or uint8, C of 1 or 3.
      segments: segment of each patch in each head, from 0, (heads, N), as
        `vit.importance.segments` returns for one image. Patches lie in rows.
      grid: rows and columns of patches; None means square patches.

    Returns:
      The Figure, a panel for the image and for each head, with a legend.

    Raises:
      ValueError: if the patches do not form the grid, or the arrays do not fit.
    """
    import matplotlib.pyplot as plt

    image = _in_unit_range(image)
    segments = _array("segments of one image", segments, "heads", "patches")
    num_heads, num_patches = segments.shape
    height, width = image.shape[:2]
    grid = _grid(num_patches, (height, width), grid)
    num_segments = max(3, segments.max() + 1)
    # From dark blue to yellow, to tell segments apart on dark images, too.
    colors = plt.get_cmap("cividis")(np.linspace(0, 1, num_segments))[:, :3]
    gray = image.mean(-1, keepdims=True)
    num_columns = min(num_heads + 1, 7)
    num_rows = -(-(num_heads + 1) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(1.5 * num_columns, (1.5 * height / width + 0.2) * num_rows + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.set_axis_off()
    _show(axes.flat[0], image)
    axes.flat[0].set_title("image", fontsize=8)
    for head in range(num_heads):
        shown = _over_pixels(segments[head], grid, image)[..., 0]
        _show(axes.flat[head + 1], 0.35 * gray + 0.65 * colors[shown])
        axes.flat[head + 1].set_title(f"head {head}", fontsize=8)
    names = [f"segment {number + 1}" for number in range(num_segments)]
    names[0], names[-1] = f"{names[0]}: least attended", f"{names[-1]}: most attended"
    boxes = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(
        boxes, names, fontsize=8, ncols=num_segments, loc="outside lower center"
    )
    return figure


def attention_maps(
    attention: Sequence[np.ndarray],
    *,
    num_prefix: int = 1,
    layers: Sequence[int] | None = None,
    ranges: np.ndarray | None = None,
) -> Any:
    """Attention between the patches, one panel a layer.

    Args:
      attention: probabilities of one image, mean over the heads, (T, T) for each of
        the L layers, queries first. In a pruned network the numbers on the axes are
        those of the rows, not of the patches.
      num_prefix: number of tokens before the patches, which are left out: 1 for a
        class token, 2 for DeiT with distillation, 0 for patches alone. It is
        `vit.ViT.num_prefix`.
      layers: which to show; None takes the first, the middle and the last.
      ranges: attention range of each layer, (L,), for the titles.

    Returns:
      The Figure.

    Raises:
      ValueError: if a layer to show has no token after the prefix, or its attention is
        not one matrix.
    """
    import matplotlib.pyplot as plt

    if layers is None:
        layers = sorted({0, len(attention) // 2, len(attention) - 1})
    maps = [
        _array("attention of a layer, mean over the heads,", attention[i], "T", "T")
        for i in layers
    ]
    if small := [one.shape for one in maps if len(one) <= num_prefix]:
        raise ValueError(
            f"attention must have more than num_prefix = {num_prefix} tokens, got "
            f"shape {small[0]}."
        )
    figure, axes = plt.subplots(
        1,
        len(layers),
        figsize=(4 * len(layers), 3.8),
        layout="constrained",
        squeeze=False,
    )
    for ax, layer, patches in zip(axes[0], layers, maps, strict=True):
        patches = patches[num_prefix:, num_prefix:]
        # A few very large probabilities would darken the others.
        high = np.quantile(patches, 0.995)
        shown = ax.imshow(100 * patches, vmin=0, vmax=100 * high, cmap="viridis")
        title = f"layer {layer}"
        if ranges is not None:
            title += f", attention range {ranges[layer]:.2f}"
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("key patch (number)")
        ax.set_ylabel("query patch (number)")
        bar = figure.colorbar(shown, ax=ax, extend="max", shrink=0.85)
        bar.set_label("attention probability (%)")
    return figure


def informativeness(scores: np.ndarray, *, layer: int | None = None) -> Any:
    """How unequal the patches are: one layer's histogram, and ranked shares of all.

    Args:
      scores: informativeness of the patches, (L, B, N), not negative.
      layer: of the histogram; None takes the fourth, or the last of fewer.

    Returns:
      The Figure. The ranked curve is the mean over the B images.
    """
    import matplotlib.pyplot as plt

    scores = _array("scores", scores, "layers", "images", "patches")
    if layer is None:
        layer = min(3, len(scores) - 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.hist(scores[layer].ravel(), bins=30, color=_COLORS[0])
    left.set_xlabel(f"informativeness in layer {layer} (sum of column maxima)")
    left.set_ylabel("patches (count)")
    left.grid(alpha=0.3)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(scores)))
    for number, (values, color) in enumerate(zip(scores, colors, strict=True)):
        ranked = -np.sort(-values, axis=1)
        shares = 100 * np.arange(1, ranked.shape[1] + 1) / ranked.shape[1]
        _, marker, line = _style(number)
        right.plot(
            shares,
            (ranked / ranked.mean(1, keepdims=True)).mean(0),
            color=color,
            marker=marker,
            markersize=4,
            markevery=max(len(shares) // 8, 1),
            linestyle=line,
            linewidth=1.2,
            label=f"layer {number}",
        )
    _finish(right, "patches, best first (%)", "informativeness / its mean")
    return figure


def head_scores(scores: np.ndarray, *, ax: Any = None) -> Any:
    """Scores of the attention heads as a heat map.

    Args:
      scores: (L, H), of `vit.importance.head_scores`, mean over images.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    scores = _array("scores, mean over the images,", scores, "layers", "heads")
    ax = _axes(ax)
    shown = ax.imshow(scores, aspect="auto", cmap="viridis")
    ax.figure.colorbar(shown, ax=ax, label="score (sum of column maxima)")
    ax.set_xlabel("head (number)")
    ax.set_ylabel("layer (number)")
    ax.set_xticks(range(scores.shape[1]))
    ax.set_yticks(range(scores.shape[0]))
    return ax


def attention_range(ranges: np.ndarray, *, ax: Any = None) -> Any:
    """Share of the queries of each layer whose strongest key is far away.

    Args:
      ranges: (L,), in [0, 1], of `vit.importance.attention_range` at its distance of 3.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    ax.plot(100 * np.asarray(ranges), color=_COLORS[0], marker="o", linestyle=":")
    ax.set_ylim(bottom=0)
    ax.set_xticks(range(len(ranges)))
    _finish(
        ax,
        "layer (number)",
        "queries whose strongest key is\nat least 3 patches away (%)",
    )
    return ax


def _grid(num_patches, shape, grid):
    """Rows and columns of the patches of an image with shape (height, width)."""
    height, width = shape
    if grid is None:
        rows = max(round((num_patches * height / width) ** 0.5), 1)
        grid = rows, num_patches // rows
        if grid[0] * width != grid[1] * height or grid[0] * grid[1] != num_patches:
            raise ValueError(
                f"{num_patches} patches of an image of {height}x{width} pixels are not "
                "square; give grid=(rows, columns)."
            )
    if grid[0] * grid[1] != num_patches:
        raise ValueError(f"grid must have {num_patches} patches, got {grid}.")
    return grid


def _over_pixels(values, grid, image):
    """Values (N,) of the patches over the pixels of an image, (H, W, 1).

    An image may have other sides than the network's input.
    """
    rows, columns = (
        np.arange(side) * patches // side
        for side, patches in zip(image.shape[:2], grid, strict=True)
    )
    return values.reshape(grid)[rows][:, columns, None]


def _style(number):
    """Color, marker and line of a curve by its number."""
    return (
        _COLORS[number % len(_COLORS)],
        _MARKERS[number % len(_MARKERS)],
        _LINES[number % len(_LINES)],
    )


def _axes(ax):
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5.5, 3.6), layout="constrained")[1]


def _in_unit_range(image):
    """Floats (H, W, C); integers are taken as 8-bit images, as in matplotlib."""
    image = _array("an image", image, "H", "W", "C of 1 or 3")
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"an image must have 1 or 3 channels, got {image.shape}.")
    return image / 255 if image.dtype.kind in "iu" else image


def _array(name, values, *axes):
    """An array with these axes: matplotlib takes some others for colors."""
    array = np.asarray(values)
    if array.ndim != len(axes):
        raise ValueError(f"{name} must be ({', '.join(axes)}), got {array.shape}.")
    return array


def _show(ax, image):
    image = np.clip(image, 0, 1)
    gray = image.shape[-1] == 1
    ax.imshow(image[..., 0] if gray else image, cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])


def _finish(ax, x_label, y_label):
    """Names, grid, and the legend right of the panel."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    if labels := ax.get_legend_handles_labels()[1]:
        ax.legend(
            # More would be higher than the panel.
            ncols=-(-len(labels) // 20),
            fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            borderaxespad=0,
        )
