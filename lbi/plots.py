"""Figures of DessiLBI: accuracy, the path of the structure, and pruning by it.

Every function takes NumPy arrays and draws with matplotlib, which is imported only when
a function is called. Single-panel functions draw into `ax`, or into a new figure, and
return the Axes. Multi-panel functions return the Figure.

Axis letters: G groups of a layer, R repeats, K points of a curve.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lbi import channels

# Okabe and Ito's colors, each with a marker and a line style of its own.
_STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", (0, (5, 1))),
    ("#56B4E9", "P", (0, (3, 1, 1, 1))),
    ("#000000", "X", (0, (1, 1))),
)


def accuracy_curves(
    methods: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    x_label: str = "epoch",
    y_label: str = "test accuracy (%)",
    ax: Any = None,
) -> Any:
    """Accuracy, or another measure, of several methods during training.

    Args:
      methods: {label: (epochs (K,), values (K,) or (R, K))}. Of R seeds the mean is
        drawn, and a band from the lowest to the highest.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (x, values)) in enumerate(methods.items()):
        color, marker, line = _STYLES[number % len(_STYLES)]
        values = np.asarray(values)
        mean = values.mean(0) if values.ndim == 2 else values
        ax.plot(
            x,
            mean,
            color=color,
            linestyle=line if len(mean) > 1 else "none",
            linewidth=1.3,
            marker=marker,
            markersize=4,
            markevery=max(len(mean) // 8, 1),
            label=label,
        )
        if values.ndim == 2 and len(values) > 1:
            low, high = values.min(0), values.max(0)
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    _finish(ax, x_label, y_label)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def entry_path(
    entries: Mapping[str, np.ndarray],
    *,
    num_steps: int,
    steps_per_epoch: int | None = None,
    ax: Any = None,
) -> Any:
    """Share of each layer's groups that have entered the support so far.

    Args:
      entries: {layer: step at which each group entered (G,), negative if it never did},
        as `lbi.entry_steps` gives them.
      num_steps: steps of the whole training.
      steps_per_epoch: draws epochs; None draws steps.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    unit = steps_per_epoch or 1
    for number, (layer, steps) in enumerate(entries.items()):
        steps = np.ravel(steps)
        entered = np.sort(steps[steps >= 0]) / unit
        shares = 100 * np.arange(len(entered) + 1) / len(steps)
        color, marker, line = _STYLES[number % len(_STYLES)]
        # A second round of the colors must not repeat the first.
        width = 1.3 if number < len(_STYLES) else 2.2
        ax.step(
            np.concatenate([[0], entered, [num_steps / unit]]),
            np.concatenate([shares, shares[-1:]]),
            where="post",
            color=color,
            linestyle=line,
            linewidth=width,
            marker=marker,
            markersize=4,
            markevery=[-1],
            label=layer,
        )
    ax.set_xlim(0, 1.02 * num_steps / unit)
    _finish(ax, "epoch" if steps_per_epoch else "step", "groups that have entered (%)")
    return ax


def filter_norms(
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    num_columns: int = 4,
    entry_label: str = "step of entry",
) -> Any:
    """Norms of the filters at the end of training, colored by when they entered.

    Args:
      layers: {layer: (norms (G,), entry (G,), negative if the filter never entered)}.
      num_columns: panels in a row.
      entry_label: name and unit of the entry.

    Returns:
      The Figure, one panel a layer; a filter that never entered is hatched gray.

    Raises:
      ValueError: if there is no layer.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    if not layers:
        raise ValueError("there is no layer to draw.")
    num_columns = min(num_columns, len(layers))
    num_rows = -(-len(layers) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(2.8 * num_columns + 1.2, 2.4 * num_rows + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(layers) :]:
        ax.axis("off")
    # With batch normalization all enter early: the scale ends with the last of them.
    last = max(np.max(entry) for _, entry in layers.values())
    scale = plt.cm.ScalarMappable(plt.Normalize(0, max(last, 1e-3)), "viridis")
    for ax, (layer, (norms, entry)) in zip(axes.flat, layers.items(), strict=False):
        norms, entry = np.ravel(norms), np.ravel(entry)
        order = np.argsort(-norms)
        never = entry[order] < 0
        colors = scale.to_rgba(entry[order])
        colors[never] = matplotlib.colors.to_rgba("lightgray")
        bars = ax.bar(np.arange(len(order)), norms[order], width=1.0, color=colors)
        for bar in np.array(bars.patches)[never]:
            bar.set_hatch("////")
        ax.set_ylim(bottom=0)
        ax.set_title(f"{layer}: {100 * np.mean(~never):.0f} % entered", fontsize=8)
        ax.set_xlabel("filter (rank by norm)", fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes[:, 0]:
        ax.set_ylabel("norm at the end", fontsize=8)
    figure.colorbar(scale, ax=axes, label=f"{entry_label} (gray: never)", shrink=0.8)
    return figure


def pruned_layer(kernel: np.ndarray, kept: np.ndarray, *, name: str = "layer") -> Any:
    """The weights of a layer before and after its filters are pruned.

    Most weights of a sparse network are near zero, so the scale is logarithmic over
    three decades below the largest weight. Filters are sorted by norm, those kept
    first; the weights within a filter by their mean absolute value.

    Args:
      kernel: weights, (..., filters).
      kept: True, or 1, for the filters that stay, (filters,).
      name: of the layer, for the titles.

    Returns:
      The Figure of two panels.

    Raises:
      ValueError: if the mask has other values than bool or another length.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    flat = np.abs(np.reshape(kernel, (-1, np.shape(kernel)[-1])))
    kept = np.ravel(channels.bool_mask(name, kept))
    if kept.shape != flat.shape[1:]:
        raise ValueError(
            f"{name}: the mask must have shape {flat.shape[1:]}, got {kept.shape}."
        )
    columns = np.lexsort((-np.linalg.norm(flat, axis=0), ~kept))
    rows = np.argsort(-flat.mean(1))
    shown = flat[rows][:, columns]
    top = max(shown.max(), np.finfo(np.float32).tiny)
    norm = matplotlib.colors.LogNorm(top / 1000, top)
    colors = plt.get_cmap("viridis").with_extremes(
        bad="lightgray", under=plt.get_cmap("viridis")(0)
    )
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", sharey=True
    )
    after = np.ma.masked_array(shown, np.broadcast_to(~kept[columns], shown.shape))
    removed = f"{int((~kept).sum())} of {len(kept)} filters removed (gray)"
    for ax, values, title in zip(
        axes, (np.maximum(shown, top / 1e6), after), ("before", removed), strict=True
    ):
        image = ax.imshow(
            np.ma.maximum(values, top / 1e6),
            aspect="auto",
            cmap=colors,
            norm=norm,
            interpolation="none",
        )
        ax.set_title(f"{name}: {title}", fontsize=9)
        ax.set_xlabel("filter (kept first, by norm)")
    axes[0].set_ylabel("weight within the filter (by mean size)")
    figure.colorbar(image, ax=axes, label="absolute weight", extend="min")
    return figure


def accuracy_against_sparsity(
    sparsity: np.ndarray,
    orders: Mapping[str, np.ndarray],
    *,
    x_label: str = "filters removed (%)",
    y_label: str = "test accuracy (%)",
    ax: Any = None,
) -> Any:
    """Accuracy after pruning, for several orders of importance.

    Args:
      sparsity: percent removed, (K,).
      orders: {label: accuracy in percent, (K,) or (R, K)}. Of R networks the mean is
        drawn, with error bars of one standard deviation, cut at 0 and 100 %. The error
        bars of the labels stand side by side.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax, sparsity = _axes(ax), np.asarray(sparsity)
    for number, (label, values) in enumerate(orders.items()):
        color, marker, line = _STYLES[number % len(_STYLES)]
        values = np.atleast_2d(values)
        mean, bars, shift = values.mean(0), None, 0.0
        if len(values) > 1:
            bars = np.clip([mean, 100 - mean], 0, values.std(0, ddof=1))
            shift = 0.006 * np.ptp(sparsity) * (number - (len(orders) - 1) / 2)
        ax.errorbar(
            sparsity + shift,
            mean,
            yerr=bars,
            color=color,
            marker=marker,
            markersize=4,
            linestyle=line,
            linewidth=1.2,
            capsize=2,
            label=label,
        )
    _finish(ax, x_label, y_label)
    return ax


def _axes(ax):
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5.5, 3.6), layout="constrained")[1]


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
