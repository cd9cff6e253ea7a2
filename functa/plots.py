"""Figures of implicit representations: PSNR curves, image grids, classifier accuracy.

Every function takes NumPy arrays and draws with matplotlib, which is imported only when
a function is called. Single-panel functions draw into `ax`, or into a new figure, and
return the Axes. Multi-panel functions return the Figure.

Axis letters: B signals, K points of a curve, R repeats, S steps, H W C image.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# PSNR of rounding to 8 bits: the error is uniform over one level, 1/255.
EXACT_TO_8_BITS = 10 * np.log10(12 * 255**2)

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


def psnr_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    points: Mapping[str, tuple[np.ndarray, ...]] | None = None,
    x_label: str = "step",
    y_label: str = "PSNR (dB)",
    marks: Mapping[str, float] | None = None,
    log_x: float | None = None,
    ax: Any = None,
) -> Any:
    """PSNR against steps or seconds.

    Above `EXACT_TO_8_BITS` an image is reproduced exactly once it is rounded to 8 bits.
    The axis ends there, with a labelled line.

    Args:
      curves: {label: (x (K,), PSNR (K,) or (B, K))}. Of B signals the mean is drawn,
        and a band of one standard deviation.
      points: {label: (x (K,), PSNR (K,)) or (x, PSNR, deviation (K,))}: measurements,
        drawn as markers with error bars. A label of `curves` keeps its color.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      marks: {text: x}: labelled vertical lines, for example a change of resolution.
      log_x: the x axis is linear up to this value and logarithmic above it.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.

    Example:
      >>> import numpy as np
      >>> from functa import plots
      >>> ax = plots.psnr_curves({"width 32": (np.arange(3), np.array([9., 20., 24.]))})
      >>> ax.get_ylabel()
      'PSNR (dB)'
    """
    ax = _axes(ax)
    points = points or {}
    order = list(dict.fromkeys([*curves, *points]))
    highest = -np.inf
    for label, (x, values) in curves.items():
        style = order.index(label)
        # Measured points are marked below, where there are any.
        markers = None if label in points else len(x) <= 12
        _curve(ax, x, values, style, label, markers=markers)
        highest = max(highest, np.max(_mean(values), initial=-np.inf))
    for label, (x, values, *deviation) in points.items():
        color, marker, _ = _STYLES[order.index(label) % len(_STYLES)]
        ax.errorbar(
            x,
            values,
            yerr=deviation[0] if deviation else None,
            color=color,
            marker=marker,
            markersize=4,
            linestyle="none",
            capsize=2,
            label=None if label in curves else label,
        )
        highest = max(highest, np.max(values, initial=-np.inf))
    if log_x is not None:
        ax.set_xscale("symlog", linthresh=log_x)
    if highest > EXACT_TO_8_BITS:
        ax.axhline(EXACT_TO_8_BITS, color="0.4", linestyle=":", linewidth=1)
        ax.text(
            0.01,
            EXACT_TO_8_BITS,
            "exact to 8 bits",
            transform=ax.get_yaxis_transform(),
            va="bottom",
            fontsize=7,
        )
        low = ax.get_ylim()[0]
        ax.set_ylim(top=EXACT_TO_8_BITS + 0.06 * (EXACT_TO_8_BITS - low))
    _finish(ax, x_label, y_label, marks)
    return ax


def accuracy_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    x_label: str = "epoch",
    y_label: str = "accuracy (%)",
    marks: Mapping[str, float] | None = None,
    ax: Any = None,
) -> Any:
    """Accuracy, or another measure, against epochs.

    Args:
      curves: {label: (x (K,), values (K,) or (R, K))}. Of R repeats the mean is drawn,
        and a band from the lowest to the highest.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      marks: {text: x}: labelled vertical lines.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (x, values)) in enumerate(curves.items()):
        _curve(ax, x, values, number, label, band="range", markers=len(x) <= 12)
    _finish(ax, x_label, y_label, marks)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def against_num_values(
    controls: Mapping[str, tuple[np.ndarray, np.ndarray]],
    codes: Mapping[str, tuple[np.ndarray, ...]] | None = None,
    *,
    y_label: str = "PSNR (dB)",
    ax: Any = None,
) -> Any:
    """PSNR, or accuracy, of codes against their size, beside that of linear controls.

    Args:
      controls: {label: (numbers per signal (K,), values (K,))}, drawn as lines.
      codes: {label: (numbers per signal (K,), values (K,)) or (numbers, values,
        deviation (K,))}, drawn as markers with error bars.
      y_label: name and unit of the y axis.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes; the x axis is logarithmic.
    """
    ax = _axes(ax)
    for number, (label, (sizes, values)) in enumerate(controls.items()):
        _curve(ax, sizes, values, number, label)
        # Evenly spaced on the logarithmic axis.
        spaced = np.geomspace(1, max(len(sizes), 1), 6).astype(int) - 1
        ax.lines[-1].set_markevery(sorted(set(spaced.tolist())))
        ax.lines[-1].set_markerfacecolor("white")
    for number, (label, (sizes, values, *deviation)) in enumerate(
        (codes or {}).items(), start=len(controls)
    ):
        color, marker, _ = _STYLES[number % len(_STYLES)]
        ax.errorbar(
            sizes,
            values,
            yerr=deviation[0] if deviation else None,
            color=color,
            marker=marker,
            markersize=6,
            linestyle="none",
            capsize=2,
            label=label,
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    _finish(ax, "numbers per signal", y_label)
    return ax


def rate_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    x_label: str = "bits per pixel",
    y_label: str = "PSNR (dB)",
    level: float | None = None,
    ax: Any = None,
) -> Any:
    """PSNR, or accuracy, of several codes against their bits.

    Args:
      curves: {label: (bits (P,), values (P,))}, in any order of the points.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      level: value at which the codes are compared, drawn as a horizontal line.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax)
    for number, (label, (bits, values)) in enumerate(curves.items()):
        order = np.argsort(bits)
        _curve(
            ax,
            np.asarray(bits)[order],
            np.asarray(values)[order],
            number,
            label,
            markers=True,
        )
    if level is not None:
        ax.axhline(level, color="0.4", linestyle=":", linewidth=1)
    ax.set_xlim(left=0)
    _finish(ax, x_label, y_label)
    return ax


def measures(
    table: Mapping[str, Mapping[str, float | tuple[float, float]]],
    *,
    levels: Mapping[str, float] | None = None,
    num_columns: int = 4,
) -> Any:
    """Measures of several sources, one panel for each measure.

    Args:
      table: {measure: {source: value or (value, error)}}. A source has the same color
        in all panels.
      levels: {measure: value}: dotted lines, for example what is expected of an ideal
        source.
      num_columns: number of panels in a row.

    Returns:
      The Figure.
    """
    import matplotlib.pyplot as plt

    sources = list(dict.fromkeys(name for values in table.values() for name in values))
    num_columns = min(num_columns, len(table))
    num_rows = -(-len(table) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(2.6 * num_columns + 0.8, (0.3 * len(sources) + 0.9) * num_rows + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(table) :]:
        ax.axis("off")
    for number, (ax, (measure, values)) in enumerate(
        zip(axes.flat, table.items(), strict=False)
    ):
        for place, source in enumerate(sources):
            if source not in values:
                continue
            value, error = np.broadcast_to(values[source], 2) * 1.0
            color, marker, _ = _STYLES[place % len(_STYLES)]
            ax.errorbar(
                value,
                place,
                xerr=error if np.size(values[source]) == 2 else None,
                color=color,
                marker=marker,
                linestyle="none",
                capsize=2,
            )
        if measure in (levels or {}):
            ax.axvline(levels[measure], color="0.4", linestyle=":", linewidth=1)
        ax.set_title(measure, fontsize=8)
        names = [""] * len(sources) if number % num_columns else sources
        ax.set_yticks(range(len(sources)), names)
        ax.set_ylim(len(sources) - 0.5, -0.5)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    return figure


def image_grid(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    row_labels: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    size: float = 1.1,
) -> Any:
    """Images in rows, for example originals above reconstructions.

    Args:
      rows: sequences of images (H, W, C) in [0, 1], C of 1 or 3; rows may differ in
        length and images in size. Values outside [0, 1] are clipped.
      row_labels: text at the left of each row.
      column_titles: text above each column.
      size: inches of an image.

    Returns:
      The Figure.
    """
    import matplotlib.pyplot as plt

    num_rows, num_columns = len(rows), max(len(row) for row in rows)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(size * num_columns + 0.8, size * num_rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for row_axes, row in zip(axes, rows, strict=True):
        for ax in row_axes[len(row) :]:
            ax.axis("off")
        for ax, image in zip(row_axes, row, strict=False):
            show_image(image, ax=ax)
    for ax, label in zip(axes[:, 0], row_labels or (), strict=False):
        ax.set_ylabel(label, fontsize=8)
    for ax, title in zip(axes[0], column_titles or (), strict=False):
        ax.set_title(title, fontsize=8)
    return figure


def latent_channels(
    latent: np.ndarray, *, num_channels: int | None = None, size: float = 1.1
) -> Any:
    """The channels of a latent grid as pictures, on one symmetric scale.

    Args:
      latent: (h, w, L), for example one signal of a functaset.
      num_channels: channels to show, from the first on; None shows all.
      size: inches of a picture.

    Returns:
      The Figure.
    """
    import matplotlib.pyplot as plt

    channels = np.moveaxis(np.asarray(latent), -1, 0)[:num_channels]
    num_columns = min(8, len(channels))
    num_rows = -(-len(channels) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(size * num_columns + 1, (size + 0.25) * num_rows),
        squeeze=False,
        layout="constrained",
    )
    limit = np.max(np.abs(channels)) or 1
    for number, ax in enumerate(axes.flat):
        ax.axis("off")
        if number < len(channels):
            ax.set_title(f"channel {number}", fontsize=7)
            shown = ax.imshow(channels[number], cmap="PuOr", vmin=-limit, vmax=limit)
    figure.colorbar(shown, ax=axes, label="latent value", shrink=0.8)
    return figure


def reconstructions(
    images: np.ndarray, codes: Mapping[str, np.ndarray], *, size: float = 1.1
) -> Any:
    """Images, their reconstructions by one or more codes, and maps of the error.

    Args:
      images: (B, H, W, C) in [0, 1].
      codes: {label: reconstructions (B, H, W, C)}. The error maps of all codes have one
        color scale.
      size: inches of an image.

    Returns:
      The Figure, one column for each image. The PSNR stands above a reconstruction.
    """
    codes = {label: np.asarray(values) for label, values in codes.items()}
    errors = {label: np.abs(values - images) for label, values in codes.items()}
    rows, labels = [images], ["image"]
    for label, values in codes.items():
        rows += [values, values]  # The second is replaced by its error map.
        labels += [label, "error"]
    figure = image_grid(rows, row_labels=labels, size=size)
    axes = np.reshape(figure.axes, (len(rows), len(images)))
    limit = max(np.max(error.mean(-1)) for error in errors.values()) or 1
    for above, below, error in zip(
        axes[1::2], axes[2::2], errors.values(), strict=True
    ):
        for number, ax in enumerate(below):
            above[number].set_title(_psnr_text(error[number]), fontsize=7)
            ax.images[0].remove()
            shown = ax.imshow(error[number].mean(-1), cmap="magma", vmin=0, vmax=limit)
    label = "absolute error\n(mean over channels)"
    bar = figure.colorbar(shown, ax=axes, shrink=0.5)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def over_inner_steps(
    steps: np.ndarray,
    images: np.ndarray,
    *,
    row_labels: Sequence[str] | None = None,
    size: float = 1.1,
) -> Any:
    """Reconstructions after each inner step, with their PSNR, beside the images.

    Args:
      steps: (S + 1, B, H, W, C) in [0, 1], from before the first step on.
      images: (B, H, W, C) in [0, 1].
      row_labels: text at the left of each image.
      size: inches of an image.

    Returns:
      The Figure, one row for each image.
    """
    steps, images = np.asarray(steps), np.asarray(images)
    titles = [f"inner step {number}" for number in range(len(steps))]
    figure = image_grid(
        [*zip(*steps, images, strict=True)],
        row_labels=row_labels,
        column_titles=[*titles, "image"],
        size=size,
    )
    axes = np.reshape(figure.axes, (len(images), len(steps) + 1))
    for row, image, fields in zip(axes, images, steps.swapaxes(0, 1), strict=True):
        for ax, field in zip(row, fields, strict=False):
            ax.set_xlabel(_psnr_text(field - image), fontsize=7)
    return figure


def super_resolution(
    columns: Mapping[str, np.ndarray],
    *,
    window: tuple[float, float, float, float] = (0.25, 0.25, 0.5, 0.5),
    size: float = 1.8,
) -> Any:
    """Renderings of the same images side by side, and a window of each enlarged.

    Args:
      columns: {title: images (B, H, W, C) in [0, 1]}, for example the original, its
        bicubic interpolation and the fields of two models. H and W may differ.
      window: (top, left, height, width) as fractions of the image.
      size: inches of an image.

    Returns:
      The Figure, two rows for each image: whole, and its window.
    """
    import matplotlib.pyplot as plt

    columns = {title: np.asarray(images) for title, images in columns.items()}
    rows = []
    for images in zip(*columns.values(), strict=True):
        rows += [images, [image[_window(image, window)] for image in images]]
    sizes = ["{} x {}".format(*images.shape[1:3]) for images in columns.values()]
    titles = [f"{title}\n{text}" for title, text in zip(columns, sizes, strict=True)]
    figure = image_grid(rows, column_titles=titles, size=size)
    axes = np.reshape(figure.axes, (len(rows), len(columns)))
    for ax, image in zip(axes[::2].flat, itertools.chain(*rows[::2]), strict=True):
        down, across = _window(image, window)
        frame = plt.Rectangle(
            (across.start - 0.5, down.start - 0.5),
            across.stop - across.start,
            down.stop - down.start,
            fill=False,
            edgecolor="#D55E00",
        )
        ax.add_patch(frame)
    return figure


def field_and_gradient(
    images: Sequence[np.ndarray],
    fields: Sequence[np.ndarray],
    gradients: Sequence[np.ndarray],
) -> Any:
    """Fitted fields beside their images and the magnitude of their gradients.

    Args:
      images: the B images, (B, H, W, C) in [0, 1].
      fields: the fields at any resolution, (B, H', W', C) in [0, 1].
      gradients: norms of the fields' Jacobians, (B, H, W), in values per pixel. The
        square root is shown: edges span orders of magnitude.

    Returns:
      The Figure, one row of three panels for each image.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(fields),
        3,
        figsize=(9.5, 3 * len(fields) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for row, image, field, gradient in zip(
        axes, images, fields, gradients, strict=False
    ):
        show_image(image, ax=row[0])
        show_image(field, ax=row[1])
        shown = row[2].imshow(np.sqrt(gradient), cmap="magma", vmin=0)
        row[2].set_xticks([])
        row[2].set_yticks([])
        ticks = np.linspace(0, np.sqrt(np.max(gradient)), 4)
        bar = figure.colorbar(shown, ax=row[2], ticks=ticks, shrink=0.85)
        bar.ax.set_yticklabels([f"{tick**2:.2g}" for tick in ticks])
        bar.set_label("gradient norm (value per pixel)", fontsize=8)
    named = {"image": images[0], "field": fields[0]}
    for ax, (name, shown) in zip(axes[0], named.items(), strict=False):
        height, width = np.shape(shown)[:2]
        ax.set_title(f"{name}, {height} x {width}", fontsize=9)
    axes[0, 2].set_title("gradient of the field", fontsize=9)
    return figure


def show_image(image: np.ndarray, *, ax: Any = None) -> Any:
    """One image (H, W, C) in [0, 1], gray if C is 1; returns the Axes."""
    ax = _axes(ax, size=(3, 3))
    image = np.clip(image, 0, 1)
    gray = image.shape[-1] == 1
    ax.imshow(image[..., 0] if gray else image, cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def confusion_matrix(
    confusion: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Percent of each true class that is predicted as each class.

    Args:
      confusion: counts, (true classes, predicted classes).
      class_names: names of the classes; None numbers them.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    confusion = np.asarray(confusion)
    num_classes = len(confusion)
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = max(4.0, 0.45 * num_classes + 1)
    ax = _axes(ax, size=(size + 0.8, size))
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    ax.figure.colorbar(image, ax=ax, label="share of the true class (%)", shrink=0.8)
    # Numbers of more classes do not fit into their cells.
    if num_classes <= 30:
        for i, j in np.argwhere(confusion > 0):
            color = "white" if share[i, j] > 50 else "black"
            text = f"{share[i, j]:.0f}" if share[i, j] >= 0.5 else "<1"
            ax.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
        names = range(num_classes) if class_names is None else class_names
        ax.set_xticks(range(num_classes), names, rotation=90 if class_names else 0)
        ax.set_yticks(range(num_classes), names)
    kind = "number" if class_names is None else "name"
    ax.set_xlabel(f"predicted class ({kind})")
    ax.set_ylabel(f"true class ({kind})")
    accuracy = 100 * np.trace(confusion) / max(confusion.sum(), 1)
    ax.set_title(f"accuracy {accuracy:.2f} %", fontsize=9)
    return ax


def _psnr_text(error):
    mse = np.mean(np.square(error))
    return "exact" if mse == 0 else f"{-10 * np.log10(mse):.1f} dB"


def _window(image, window):
    """The slices of rows and columns of a window given by fractions of an image."""
    top, left, height, width = window
    rows, columns = image.shape[:2]
    return (
        slice(round(top * rows), round((top + height) * rows)),
        slice(round(left * columns), round((left + width) * columns)),
    )


def _axes(ax, size=(5.5, 3.4)):
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def _mean(values):
    values = np.asarray(values)
    return values.mean(0) if values.ndim == 2 else values


def _curve(ax, x, values, number, label, *, band="deviation", markers=False):
    """The mean over repeats as a line, their deviation or range as a band.

    `markers` is True for one at every point, False for a few, None for none.
    """
    color, marker, line = _STYLES[number % len(_STYLES)]
    values = np.asarray(values)
    mean = _mean(values)
    every = 1 if markers else max(len(mean) // 8, 1)
    ax.plot(
        x,
        mean,
        color=color,
        linestyle=line if len(mean) > 1 else "none",
        linewidth=1.3,
        marker=None if markers is None else marker,
        markersize=4,
        markevery=every,
        label=label,
    )
    if values.ndim == 2 and len(values) > 1:
        low, high = values.min(0), values.max(0)
        if band == "deviation":
            deviation = values.std(0, ddof=1)
            low, high = mean - deviation, mean + deviation
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _finish(ax, x_label, y_label, marks=None):
    """Names, grid, labelled vertical lines, and the legend right of the panel."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    for text, x in (marks or {}).items():
        ax.axvline(x, color="0.4", linestyle=":", linewidth=1)
        ax.annotate(
            text,
            (x, 0.02),
            xycoords=ax.get_xaxis_transform(),
            xytext=(2, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=7,
            va="bottom",
            color="0.3",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0
        )
