"""Figures of neural fields: PSNR curves, image grids, classifier accuracy.

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
    A line, named in the legend, marks this level if a value exceeds it.

    Args:
      curves: {label: (x (K,), PSNR (K,) or (B, K))}. Of B signals the mean is drawn,
        and a band of one standard deviation.
      points: {label: (x (K,), PSNR (K,)) or (x, PSNR, deviation (K,))}: measurements,
        drawn as markers with error bars. A label of `curves` keeps its color.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      marks: {text: x}: vertical lines, named in the legend, for example a change of
        resolution.
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
        named = None if label in curves else label
        _points(ax, x, values, *deviation, number=order.index(label), label=named)
        highest = max(highest, np.max(values, initial=-np.inf))
    if log_x is not None:
        ax.set_xscale("symlog", linthresh=log_x)
    elif all(
        np.issubdtype(np.asarray(x).dtype, np.integer) for x, _ in curves.values()
    ):
        ax.locator_params(axis="x", integer=True)  # no half steps
    if highest > EXACT_TO_8_BITS:
        ax.axhline(EXACT_TO_8_BITS, color="0.6", linewidth=1, label="exact to 8 bits")
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
      marks: {text: x}: vertical lines, named in the legend.
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
    """PSNR, or accuracy, of codes and of linear controls against their size.

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
        _points(ax, sizes, values, *deviation, number=number, label=label, size=6)
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
    level_label: str | None = None,
    ax: Any = None,
) -> Any:
    """PSNR, or accuracy, of several codes against their bits.

    Args:
      curves: {label: (bits (P,), values (P,))}, in any order of the points.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      level: value at which the codes are compared, drawn as a horizontal line.
      level_label: name of that line.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes; the x axis is logarithmic.
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
        ax.axhline(level, color="0.4", linestyle=":", linewidth=1, label=level_label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    _finish(ax, x_label, y_label)
    return ax


def measures(
    table: Mapping[str, Mapping[str, float | tuple[float, float]]],
    *,
    levels: Mapping[str, float] | None = None,
    level_label: str | None = None,
    num_columns: int = 4,
) -> Any:
    """Measures of several sources, one panel for each measure.

    Args:
      table: {measure: {source: value or (value, error)}}. A source has the same color
        in all panels.
      levels: {measure: value}: dotted lines, for example what is expected of an ideal
        source.
      level_label: name of these lines, written below the panels.
      num_columns: number of panels in a row.

    Returns:
      The Figure.
    """
    sources = list(dict.fromkeys(name for values in table.values() for name in values))
    num_columns = min(num_columns, len(table))
    num_rows = -(-len(table) // num_columns)
    figure, axes = _panels(
        num_rows,
        num_columns,
        2.6 * num_columns + 0.8,
        (0.3 * len(sources) + 0.9) * num_rows + 0.3,
    )
    for ax in axes.flat[len(table) :]:
        ax.axis("off")
    dotted = None
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
            dotted = ax.axvline(
                levels[measure], color="0.4", linestyle=":", linewidth=1
            )
        ax.set_title(measure, fontsize=8)
        names = [""] * len(sources) if number % num_columns else sources
        ax.set_yticks(range(len(sources)), names)
        ax.set_ylim(len(sources) - 0.5, -0.5)
        ax.tick_params(labelsize=7)
        ax.locator_params(axis="x", nbins=6)
        ax.grid(alpha=0.3)
    if level_label and dotted:
        figure.legend([dotted], [level_label], fontsize=8, loc="outside lower right")
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
      rows: sequences of images (H, W, C) in [0, 1] or uint8, C of 1 or 3; rows may
        differ in length and images in size. Values outside the range are clipped.
      row_labels: text at the left of each row.
      column_titles: text above each column.
      size: inches of an image.

    Returns:
      The Figure.
    """
    num_rows, num_columns = len(rows), max(len(row) for row in rows)
    figure, axes = _panels(
        num_rows, num_columns, size * num_columns + 0.8, size * num_rows + 0.7
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
    channels = np.moveaxis(np.asarray(latent), -1, 0)[:num_channels]
    num_columns = min(8, len(channels))
    num_rows = -(-len(channels) // num_columns)
    figure, axes = _panels(
        num_rows, num_columns, size * num_columns + 1, (size + 0.25) * num_rows
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
      images: (B, H, W, C) in [0, 1] or uint8.
      codes: {label: reconstructions (B, H, W, C)}. The error maps of all codes have one
        color scale.
      size: inches of an image.

    Returns:
      The Figure, one column for each image. The PSNR stands above a reconstruction.
    """
    images = _in_unit_range(images)
    codes = {label: _in_unit_range(values) for label, values in codes.items()}
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
    """Reconstructions after each inner step, with their PSNR, and the images.

    Args:
      steps: (S + 1, B, H, W, C) in [0, 1], from before the first step on.
      images: (B, H, W, C) in [0, 1] or uint8.
      row_labels: text at the left of each image.
      size: inches of an image.

    Returns:
      The Figure, one row for each image.
    """
    steps, images = _in_unit_range(steps), _in_unit_range(images)
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
    """Fitted fields, their images and the magnitude of their gradients.

    Args:
      images: the B images, (B, H, W, C) in [0, 1].
      fields: the fields at any resolution, (B, H', W', C) in [0, 1].
      gradients: norms of the fields' Jacobians, (B, H, W), in values per pixel. The
        square root is shown: edges span orders of magnitude.

    Returns:
      The Figure, one row of three panels for each image.
    """
    figure, axes = _panels(len(fields), 3, 9.5, 3 * len(fields) + 0.4)
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
    """One image.

    Args:
      image: (H, W, C), in [0, 1] or uint8; gray if C is 1.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    ax = _axes(ax, size=(3, 3))
    image = np.clip(_in_unit_range(image), 0, 1)
    gray = image.shape[-1] == 1
    ax.imshow(image[..., 0] if gray else image, cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def globe(
    values: np.ndarray,
    coords: np.ndarray,
    *,
    center: tuple[float, float] = (15.0, -40.0),
    limits: tuple[float, float] | None = None,
    cmap: str = "viridis",
    arrows: np.ndarray | None = None,
    ax: Any = None,
) -> Any:
    """A scalar on the sphere, seen from far away (orthographic projection).

    Args:
      values: (H, W), on a regular grid of latitudes and longitudes.
      coords: points of the unit sphere, (H, W, 3); rows have one latitude.
      center: latitude and longitude in degrees of the middle of the picture.
      limits: the values of the ends of the color scale; by default the extremes.
      cmap: name of the color map.
      arrows: eastward and northward parts of vectors, (H, W, 2), drawn at some points.
      ax: Axes; None makes new ones.

    Returns:
      The Axes, without ticks; `ax.images[0]` is what a color bar needs.
    """
    ax = _axes(ax, size=(4.0, 4.0))
    size = 300
    side = np.linspace(-1, 1, size)
    x, y = np.meshgrid(side, side)
    depth = np.sqrt(np.maximum(1 - x**2 - y**2, 0))
    east, north, out = _view(center)
    points = x[..., None] * east + y[..., None] * north + depth[..., None] * out
    # The nearest row and column: the picture shows the resolution of the values.
    rows = np.abs(points[..., 2].ravel()[:, None] - coords[:, 0, 2]).argmin(1)
    equator = coords[len(coords) // 2, :, :2]
    columns = (points[..., :2].reshape(-1, 2) @ equator.T).argmax(1)
    picture = np.asarray(values)[rows, columns].reshape(size, size)
    picture = np.ma.masked_where(x**2 + y**2 > 1, picture)
    low, high = limits or (None, None)
    ax.imshow(
        picture, extent=(-1, 1, -1, 1), origin="lower", cmap=cmap, vmin=low, vmax=high
    )
    for line in _graticule():
        seen = np.where((line @ out > 0)[:, None], line, np.nan)
        ax.plot(seen @ east, seen @ north, color="0.3", linewidth=0.4, alpha=0.6)
    if arrows is not None:
        every = (slice(2, -2, max(len(coords) // 18, 1)),)
        every += (slice(None, None, max(coords.shape[1] // 36, 1)),)
        at, parts = coords[every], np.asarray(arrows)[every]
        eastward = np.stack([-at[..., 1], at[..., 0], 0 * at[..., 0]], -1)
        eastward /= np.linalg.norm(eastward, axis=-1, keepdims=True)
        vectors = parts[..., :1] * eastward + parts[..., 1:] * np.cross(at, eastward)
        kept = at @ out > 0.2
        at, vectors = at[kept], vectors[kept]
        ax.quiver(
            *(at @ east, at @ north, vectors @ east, vectors @ north),
            **{"color": "white", "scale": 250, "width": 0.004},
        )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_frame_on(False)
    return ax


def globes(
    data: np.ndarray,
    codes: Mapping[str, np.ndarray],
    coords: np.ndarray,
    *,
    row_labels: Sequence[str] | None = None,
    unit: str = "m/s",
    size: float = 2.2,
) -> Any:
    """Vector fields on the sphere, their reconstructions and the errors.

    Args:
      data: eastward and northward parts, (B, H, W, 2).
      codes: {label: reconstructions (B, H, W, 2)}.
      coords: points of the unit sphere, (H, W, 3); rows have one latitude.
      row_labels: text at the left of each row.
      unit: unit of the values.
      size: inches of a globe.

    Returns:
      The Figure, one row for each field. Colors are the length of the vectors and of
      the errors.
    """
    columns = [("data", data, False)]
    for label, code in codes.items():
        columns += [(label, code, False), (f"error of\n{label}", code - data, True)]
    lengths = [np.linalg.norm(values, axis=-1) for _, values, _ in columns]
    tops = {False: np.max(lengths[0]), True: np.max(lengths[2::2], initial=0)}
    figure, axes = _panels(
        len(data), len(columns), size * len(columns), size * len(data) + 0.6
    )
    for number, (title, values, is_error) in enumerate(columns):
        for row, ax in enumerate(axes[:, number]):
            globe(
                lengths[number][row],
                coords,
                limits=(0, tops[is_error]),
                cmap="magma" if is_error else "viridis",
                arrows=None if is_error else values[row],
                ax=ax,
            )
            if row_labels and not number:
                ax.set_ylabel(row_labels[row], fontsize=8)
        axes[0, number].set_title(title, fontsize=8)
        bar = figure.colorbar(
            ax.images[0], ax=axes[:, number], location="bottom", shrink=0.8
        )
        what = "length of the error" if is_error else "speed"
        bar.set_label(f"{what} ({unit})", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    return figure


def waveforms(
    data: np.ndarray,
    codes: Mapping[str, np.ndarray],
    *,
    sample_rate: float,
    window: float = 0.03,
    row_labels: Sequence[str] | None = None,
) -> Any:
    """Sounds, and a short window of each with its reconstructions.

    Args:
      data: samples in [-1, 1], (B, T).
      codes: {label: reconstructions (B, T)}.
      sample_rate: samples per second.
      window: length in seconds of the window around the loudest sample.
      row_labels: text above the windows, one for each sound.

    Returns:
      The Figure: one row for each sound, whole on the left, its window on the right.
    """
    times = np.arange(data.shape[1]) / sample_rate
    figure, axes = _panels(
        len(data), 2, 10, 1.6 * len(data) + 0.4, width_ratios=(1, 1.4)
    )
    length = min(max(round(window * sample_rate), 2), len(times))
    for row, ((whole, part), sound) in enumerate(zip(axes, data, strict=True)):
        start = np.clip(np.abs(sound).argmax() - length // 2, 0, len(times) - length)
        kept = slice(start, start + length)
        _curve(whole, times, sound, 6, "data", markers=None)
        whole.axvspan(times[start], times[kept][-1], color="#E69F00", alpha=0.5)
        _curve(part, 1000 * times[kept], sound[kept], 6, "data", markers=None)
        for number, (label, code) in enumerate(codes.items()):
            _curve(part, 1000 * times[kept], code[row][kept], number, label)
        last = row == len(data) - 1
        _finish(whole, "time (s)" if last else "", "pressure\n(full scale 1)")
        _finish(part, "time (ms)" if last else "", "")
        whole.get_legend().remove()
        if row:
            part.get_legend().remove()
        if row_labels:
            part.set_title(row_labels[row], fontsize=8)
    return figure


def voxels(
    shape: np.ndarray, *, threshold: float = 0.5, color: str = "#0072B2", ax: Any = None
) -> Any:
    """The voxels of a volume above a threshold, Z upward.

    Args:
      shape: the volume, (X, Y, Z).
      threshold: a voxel is drawn if its value is larger.
      color: of the voxels, any color of matplotlib.
      ax: Axes with the projection "3d"; None makes a figure.

    Returns:
      The Axes.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(4, 4)).add_subplot(projection="3d")
    filled = np.asarray(shape) > threshold
    ax.voxels(filled, facecolors=color, edgecolor=(0, 0, 0, 0.3), linewidth=0.2)
    ax.set(xlim=(0, filled.shape[0]), ylim=(0, filled.shape[1]))
    ax.set_zlim(0, filled.shape[2])
    ax.set_box_aspect(filled.shape, zoom=1.3)
    ax.view_init(elev=25, azim=-60)
    ax.set_axis_off()
    return ax


def voxel_grid(
    rows: Mapping[str, np.ndarray],
    *,
    column_titles: Sequence[str] | None = None,
    size: float = 2.2,
) -> Any:
    """Volumes side by side, for example shapes and their reconstructions.

    Args:
      rows: {label: volumes (B, X, Y, Z)}.
      column_titles: text above each column.
      size: inches of a volume.

    Returns:
      The Figure, one row for each entry.
    """
    num = len(next(iter(rows.values())))
    figure, axes = _panels(
        len(rows), num, size * num, size * len(rows), subplot_kw={"projection": "3d"}
    )
    for row, (label, shapes) in enumerate(rows.items()):
        color = _STYLES[row % len(_STYLES)][0]
        for column, shape in enumerate(shapes):
            ax = voxels(shape, color=color, ax=axes[row, column])
            if not column:
                ax.text2D(
                    0,
                    0.5,
                    label,
                    rotation=90,
                    va="center",
                    fontsize=8,
                    transform=ax.transAxes,
                )
            if not row and column_titles:
                ax.set_title(column_titles[column], fontsize=8)
    return figure


def _view(center):
    """Unit vectors to the east, to the north and outward at a place in degrees."""
    latitude, longitude = np.deg2rad(center)
    (s, c), (sin, cos) = ((np.sin(a), np.cos(a)) for a in (latitude, longitude))
    east = np.array([-sin, cos, 0])
    north = np.array([-s * cos, -s * sin, c])
    return east, north, np.array([c * cos, c * sin, s])


def _graticule():
    """Circles of latitude and longitude every 30 degrees, each (K, 3)."""
    turn, half = np.linspace(-np.pi, np.pi, 181), np.linspace(-np.pi / 2, np.pi / 2, 91)
    parallels = [(np.deg2rad(d) + 0 * turn, turn) for d in range(-60, 61, 30)]
    meridians = [(half, np.deg2rad(d) + 0 * half) for d in range(0, 360, 30)]
    for latitude, longitude in parallels + meridians:
        c = np.cos(latitude)
        yield np.stack(
            [c * np.cos(longitude), c * np.sin(longitude), np.sin(latitude)], 1
        )


def confusion_matrix(
    confusion: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    ax: Any = None,
) -> Any:
    """Percent of each true class that is predicted as each class.

    Cells without an example stay empty.

    Args:
      confusion: counts, (true classes, predicted classes).
      class_names: names of the classes, at least as many; None numbers them.
      ax: Axes to draw into; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if a class has no name.
    """
    confusion = np.asarray(confusion)
    num_classes = len(confusion)
    names = range(num_classes) if class_names is None else class_names[:num_classes]
    if len(names) < num_classes:
        raise ValueError(f"{num_classes} classes need names, got {len(names)}.")
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = max(4.0, 0.45 * num_classes + 1)
    ax = _axes(ax, size=(size + 0.8, size))
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    ax.figure.colorbar(image, ax=ax, label="share of the true class (%)", shrink=0.8)
    # Numbers of more classes do not fit into their cells.
    if num_classes <= 30:
        for i, j in np.argwhere(confusion > 0):
            color = "white" if share[i, j] > 50 else "black"
            text = f"{share[i, j]:.0f}" if share[i, j] > 0.5 else "<1"
            ax.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
        rotation = 0 if class_names is None else 90
        ax.set_xticks(range(num_classes), names, rotation=rotation)
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


def _in_unit_range(images):
    """Floats; integers are taken as 8-bit images, as in matplotlib."""
    images = np.asarray(images)
    return images / 255 if images.dtype.kind in "iu" else images


def _panels(num_rows, num_columns, width, height, **options):
    """A figure of so many inches, and its Axes (rows, columns)."""
    import matplotlib.pyplot as plt

    return plt.subplots(
        num_rows,
        num_columns,
        figsize=(width, height),
        layout="constrained",
        squeeze=False,
        **options,
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


def _points(ax, x, values, deviation=None, *, number, label, size=4):
    """Measurements as markers, with error bars if there are deviations."""
    color, marker, _ = _STYLES[number % len(_STYLES)]
    ax.errorbar(
        x,
        values,
        yerr=deviation,
        color=color,
        marker=marker,
        markersize=size,
        linestyle="none",
        capsize=2,
        label=label,
    )


def _finish(ax, x_label, y_label, marks=None):
    """Names, grid, vertical lines, and the legend right of the panel."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    # Named in the legend: text in the panel would cover curves.
    lines = itertools.cycle((":", "--", "-."))
    for (text, x), line in zip((marks or {}).items(), lines, strict=False):
        ax.axvline(x, color="0.4", linestyle=line, linewidth=1, label=text)
    if labels := ax.get_legend_handles_labels()[1]:
        ax.legend(
            # More would be higher than the panel.
            ncols=-(-len(labels) // 20),
            fontsize=7,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            borderaxespad=0,
        )
