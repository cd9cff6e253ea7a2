"""Figures of loss landscapes: envelopes, profiles, eigenvalues, surfaces.

Every function takes NumPy arrays and draws with matplotlib, which is imported only when
a function is called. All draw one panel, into `ax` or into a new figure, and return the
Axes.

Axis letters: R repeats (learning rates, step sizes or seeds), K points of a curve,
P probes, S step sizes, E measurements of k eigenvalues.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Okabe and Ito's colors, each with a marker, a line style and a hatch of its own.
_STYLES = (
    ("#D55E00", "s", "--", "////"),
    ("#0072B2", "o", "-", "...."),
    ("#009E73", "^", "-.", "\\\\\\\\"),
    ("#CC79A7", "D", ":", "xx"),
    ("#E69F00", "v", (0, (5, 1)), "++"),
    ("#000000", "X", (0, (1, 1)), "oo"),
)


def envelope(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    y_label: str,
    x_label: str = "epoch",
    log: bool = False,
    ax: Any = None,
) -> Any:
    """Bands from the smallest to the largest of several curves.

    This is how Santurkar et al. (2018, arXiv 1805.11604) show how a loss or a gradient
    varies over learning rates, or over steps along the gradient.

    Args:
      curves: {label: (x (K,), values (K,) or (R, K))}.
      y_label: name and unit of the y axis.
      x_label: name and unit of the x axis.
      log: the y axis is logarithmic, if any value is positive.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (x, values)) in enumerate(curves.items()):
        color, _, line, hatch = _STYLES[number % len(_STYLES)]
        values = np.atleast_2d(values)
        low, high = values.min(0), values.max(0)
        ax.fill_between(
            x,
            low,
            high,
            facecolor=(color, 0.3),
            edgecolor=(color, 0.5),
            hatch=hatch,
            linewidth=0,
            label=label,
        )
        for edge in (low, high):
            ax.plot(x, edge, color=color, linestyle=line, linewidth=0.9)
    if log:
        _set_log_scale(ax)
    _finish(ax, x_label, y_label)
    return ax


def curves(
    values: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    y_label: str,
    x_label: str = "epoch",
    log: bool = False,
    legend_title: str | None = None,
    ax: Any = None,
) -> Any:
    """Curves of several settings, for example the loss at each learning rate.

    Args:
      values: {label: (x (K,), values (K,) or (R, K))}. Of R seeds the mean is drawn,
        and a band from the smallest to the largest.
      y_label: name and unit of the y axis.
      x_label: name and unit of the x axis.
      log: the y axis is logarithmic, if any value is positive.
      legend_title: what the labels are, with the unit.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (x, runs)) in enumerate(values.items()):
        color, marker, line, _ = _STYLES[number % len(_STYLES)]
        runs = np.asarray(runs)
        mean = runs.mean(0) if runs.ndim == 2 else runs
        ax.plot(
            x,
            mean,
            color=color,
            linestyle=line,
            linewidth=1.2,
            marker=marker,
            markersize=4,
            markevery=max(len(mean) // 6, 1),
            label=label,
        )
        if runs.ndim == 2 and len(runs) > 1:
            low, high = runs.min(0), runs.max(0)
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    if log:
        _set_log_scale(ax)
    _finish(ax, x_label, y_label, legend_title)
    return ax


def step_profile(
    step_sizes: np.ndarray,
    betas: Mapping[str, np.ndarray],
    *,
    y_label: str = "beta\n(gradient distance / step length)",
    ax: Any = None,
) -> Any:
    """A measure against the step along the gradient: the median and 10 to 90 %.

    Args:
      step_sizes: multiples of the gradient, (S,).
      betas: {label: values (S,) or (P, S)} of P probes, for example
        `landscape.probes.GradientProbe.betas`. Probes that are not finite, those of a
        run that diverged, do not count.
      y_label: name and unit of the y axis.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes; both axes are logarithmic.
    """
    ax = _axes(ax)
    for number, (label, values) in enumerate(betas.items()):
        color, marker, line, _ = _STYLES[number % len(_STYLES)]
        values = np.atleast_2d(values)
        finite = values[np.isfinite(values).all(axis=1)]
        if not len(finite):
            finite = np.full((1, len(step_sizes)), np.nan)  # an empty line
        low, middle, high = np.quantile(finite, [0.1, 0.5, 0.9], axis=0)
        ax.plot(
            step_sizes,
            middle,
            color=color,
            linestyle=line,
            marker=marker,
            markersize=4,
            label=label,
        )
        ax.fill_between(step_sizes, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set_xlim(np.min(step_sizes) / 1.1, np.max(step_sizes) * 1.1)
    ax.set_xscale("log", subs=(2, 5))
    # Over about a decade the powers of ten alone are too few labels.
    if np.max(step_sizes) < 20 * np.min(step_sizes):
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
    _set_log_scale(ax)
    _finish(ax, "step size (multiples of the gradient)", y_label)
    return ax


def eigenvalues(
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    x_label: str = "epoch",
    ax: Any = None,
) -> Any:
    """The largest eigenvalues of the Hessian during training.

    Args:
      measured: {label: (x (E,), eigenvalues (E,) or (E, k), largest first)}. The
        largest is a full line with markers, the others are thin.
      x_label: name and unit of the x axis.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes; its y axis is linear below 0.001 and logarithmic above.
    """
    ax = _axes(ax)
    for number, (label, (x, values)) in enumerate(measured.items()):
        color, marker, line, _ = _STYLES[number % len(_STYLES)]
        for rank, column in enumerate(np.reshape(values, (len(values), -1)).T):
            first = rank == 0
            ax.plot(
                x,
                column,
                color=color,
                linestyle=line,
                linewidth=1.4 if first else 0.6,
                marker=marker if first else None,
                markersize=4,
                label=label if first else None,
            )
    ax.set_yscale("symlog", linthresh=1e-3)
    _finish(ax, x_label, "eigenvalue of the Hessian\n(bold: largest)")
    return ax


def stability(
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    x_label: str = "epoch",
    y_label: str = "learning rate x\nlargest eigenvalue",
    bound: float | None = 2.0,
    optimizer: str = "gradient descent",
    ax: Any = None,
) -> Any:
    """Learning rate times largest eigenvalue, with the bound of stable training.

    Args:
      measured: {label: (x (E,), products (E,) or (R, E))}. Of R seeds the mean is
        drawn, and a band from the smallest to the largest.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      bound: 2 for gradient descent. For Adam give products with the preconditioned
        sharpness and `landscape.curvature.adam_bound(b1)`. None draws no bound.
      optimizer: what the bound belongs to.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes; its y axis is linear below 0.001 and logarithmic above.
    """
    ax = _axes(ax)
    curves(measured, y_label=y_label, x_label=x_label, ax=ax)
    if bound is not None:
        ax.axhline(bound, color="0.3", linewidth=0.9, linestyle=":")
        ax.text(
            0.02,
            bound,
            f"bound of {optimizer}, {bound:g}",
            transform=ax.get_yaxis_transform(),
            fontsize=7,
            va="bottom",
        )
    ax.set_yscale("symlog", linthresh=1e-3)
    return ax


def spectral_density(
    densities: Mapping[str, tuple[np.ndarray, np.ndarray]], *, ax: Any = None
) -> Any:
    """The density of all eigenvalues of the Hessian.

    Args:
      densities: {label: (eigenvalues (G,), density (G,))}, for example of
        `landscape.curvature.spectral_density`.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes; its y axis is logarithmic and covers seven decades, so that a single
      large eigenvalue of a network of a million parameters is seen.
    """
    ax = _axes(ax)
    for number, (label, (x, values)) in enumerate(densities.items()):
        color, _, line, _ = _STYLES[number % len(_STYLES)]
        ax.plot(x, values, color=color, linestyle=line, linewidth=1.2, label=label)
    everything = np.concatenate([[0.0], *(np.ravel(y) for _, y in densities.values())])
    highest = np.max(everything[np.isfinite(everything)])
    if highest > 0:
        ax.set_yscale("log")
        ax.set_ylim(1e-7 * highest, 2 * highest)
    _finish(ax, "eigenvalue of the Hessian", "density (1 / eigenvalue)")
    return ax


def surface_contours(
    losses: np.ndarray,
    first: np.ndarray,
    second: np.ndarray | None = None,
    *,
    limits: tuple[float, float] | None = None,
    path: np.ndarray | None = None,
    labels: tuple[str, str] = (
        "first direction (filter norms)",
        "second direction (filter norms)",
    ),
    loss_label: str = "loss",
    ax: Any = None,
) -> Any:
    """Contours of a loss over two directions (Li et al. 2018, arXiv 1712.09913).

    Args:
      losses: (A, B); entry [i, j] lies at first[i], second[j].
      first: coordinates along the first direction, (A,).
      second: coordinates along the second, (B,); None takes `first`.
      limits: smallest and largest loss of the colors, which are logarithmic if both
        are positive; None takes those of `robust_limits`. Give the same to figures that
        are compared.
      path: coordinates of a trajectory, (T, 2), for example of
        `landscape.surface.trajectory_pca`.
      labels: names and units of the two axes.
      loss_label: name and unit of the loss.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes. The network itself is the cross at (0, 0).

    Raises:
      ValueError: if the losses are not one for each pair of coordinates, or none is
        finite.
    """
    import matplotlib

    ax = _axes(ax)
    losses, second = _surface(losses, first, second)
    low, high = robust_limits(losses) if limits is None else limits
    is_log = low > 0
    normalize = matplotlib.colors.LogNorm if is_log else matplotlib.colors.Normalize
    filled = ax.contourf(
        first,
        second,
        np.clip(losses, low, high).T,
        levels=(np.geomspace if is_log else np.linspace)(low, high, 25),
        cmap="viridis",
        norm=normalize(low, high),
    )
    ax.plot(0, 0, "w+", markersize=10, markeredgewidth=2)
    if path is not None:
        ax.plot(*np.transpose(path), color="w", linewidth=1, marker=".", markersize=4)
    ax.set_aspect("equal")
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.figure.colorbar(
        filled,
        ax=ax,
        label=loss_label,
        # Not at the levels of the contours, which are no round numbers.
        ticks=matplotlib.ticker.LogLocator(subs=(1, 2, 5))
        if is_log
        else matplotlib.ticker.AutoLocator(),
        format=matplotlib.ticker.StrMethodFormatter("{x:g}"),
        shrink=0.8,
    )
    return ax


def surface_3d(
    losses: np.ndarray,
    first: np.ndarray,
    second: np.ndarray | None = None,
    *,
    limits: tuple[float, float] | None = None,
    loss_label: str = "loss",
    ax: Any = None,
) -> Any:
    """The surface of `surface_contours` in three dimensions.

    Args:
      losses: (A, B); entry [i, j] lies at first[i], second[j].
      first: coordinates along the first direction, (A,).
      second: coordinates along the second, (B,); None takes `first`.
      limits: smallest and largest loss shown; None takes those of `robust_limits`.
      loss_label: name and unit of the loss.
      ax: Axes with projection "3d"; None makes a figure.

    Returns:
      The Axes; the height is logarithmic if both limits are positive.

    Raises:
      ValueError: as `surface_contours`.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        figure = plt.figure(figsize=(5, 4.4), layout="constrained")
        ax = figure.add_subplot(projection="3d")
    losses, second = _surface(losses, first, second)
    low, high = robust_limits(losses) if limits is None else limits
    x, y = np.meshgrid(first, second, indexing="ij")
    heights, name = np.clip(losses, low, high), loss_label
    if low > 0:
        low, high, heights = np.log10(low), np.log10(high), np.log10(heights)
        name = f"log10 of the {name}"
    ax.plot_surface(
        x,
        y,
        heights,
        cmap="viridis",
        vmin=low,
        vmax=high,
        rstride=1,
        cstride=1,
        linewidth=0,
    )
    ax.set_zlim(low, high)
    ax.set_xlabel("first direction", fontsize=8)
    ax.set_ylabel("second direction", fontsize=8)
    ax.set_zlabel(name, fontsize=8)
    ax.tick_params(labelsize=7)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(plt.MaxNLocator(4))
    ax.set_box_aspect(None, zoom=0.82)  # room for the name of the z axis
    return ax


def robust_limits(*losses: np.ndarray) -> tuple[float, float]:
    """Smallest loss, and the 98th percentile or 30 medians, whichever is lower.

    A few losses far above chance would flatten everything else. Losses that are not
    finite do not count. Without negative losses the smallest is at least 1e-6; with
    them, medians are measured from the smallest.

    Raises:
      ValueError: if no loss is finite.
    """
    values = np.concatenate([np.ravel(x) for x in losses])
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("no loss is finite.")
    base = float(values.min())
    if base >= 0:
        base, values = 0.0, np.clip(values, 1e-6, None)
    low = float(values.min())
    above = 30 * (np.median(values) - base)
    high = float(min(np.quantile(values, 0.98), base + above))
    return low, max(high, low + 0.001 * abs(low))


def _surface(losses, first, second):
    """The losses (A, B) as an array, and the coordinates (B,)."""
    second = first if second is None else second
    losses = np.asarray(losses)
    shape = len(first), len(second)
    if losses.shape != shape or min(shape) < 2:
        raise ValueError(
            "losses must be (A, B), with A, B >= 2 coordinates along the directions, "
            f"got {losses.shape} for {shape[0]} and {shape[1]} coordinates."
        )
    return losses, second


def _axes(ax):
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5.5, 3.6), layout="constrained")[1]


def _set_log_scale(ax):
    if np.isfinite(ax.dataLim.minposy):  # the smallest positive value
        ax.set_yscale("log")


def _finish(ax, x_label, y_label, legend_title=None):
    """Names, grid, and the legend right of the panel."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    if labels := ax.get_legend_handles_labels()[1]:
        ax.legend(
            # More would be higher than the panel.
            ncols=-(-len(labels) // 20),
            fontsize=7,
            title=legend_title,
            title_fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            borderaxespad=0,
        )
