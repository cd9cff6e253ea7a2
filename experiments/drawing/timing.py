"""The figures of time and memory: benchmark and scaling."""

import numpy as np

from experiments.drawing.panels import panels
from experiments.drawing.run import bind

_AXES = {
    "batch_size": "images of a batch",
    "image_size": "side of an image (pixels)",
    "latent_dim": "size of the latent (numbers)",
    "num_steps": "inner steps",
}
_TIME = {"color": "#0072B2", "marker": "o"}
_MEMORY = {"color": "#D55E00", "marker": "s"}


def _measured(ax, x, values, *, x_label, y_label, style, quartiles=None, log_x=False):
    """Measurements (K,) with their quartiles (K, 2) as error bars."""
    low, high = np.transpose(np.array(quartiles or np.stack([values, values], -1)))
    ax.errorbar(
        x,
        values,
        yerr=np.clip([values - low, high - values], 0, None) if quartiles else None,
        **style,
        markersize=5,
        linestyle="none",
        capsize=3,
    )
    if log_x:
        ax.set_xscale("log")
    else:
        ax.set_xlim(0, 1.06 * np.max(x))
    # From zero: proportional measurements are on a line through the origin.
    ax.set_ylim(0, 1.1 * np.max(high))
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)


def _benchmark(run):
    return bind({"scaling": _benchmark_axes}, run) if run.config.get("axes") else {}


def _benchmark_axes(run):
    axes = run.config["axes"]
    figure, drawn = panels(len(axes), rows=2, width=3.4, height=2.6, sharex="col")
    for (top, bottom), (axis, values) in zip(drawn.T, axes.items(), strict=True):
        rows = [run.summary[f"{axis}_{value}"] for value in values]
        _measured(
            top,
            values,
            np.array([row["milliseconds"] for row in rows]),
            x_label="",
            y_label="time of a step (ms)\nmedian and quartiles",
            quartiles=[row["milliseconds_quartiles"] for row in rows],
            style=_TIME,
        )
        _measured(
            bottom,
            values,
            np.array([row["mebibytes"] for row in rows]),
            x_label=_AXES.get(axis, axis),
            y_label="memory (MiB)",
            style=_MEMORY,
        )
    return figure


def _scaling(run):
    figure, axes = panels(2, width=4.6, height=3.2)
    _measured(
        axes[0, 0],
        run.summary["num_devices"],
        np.array(run.summary["images_per_second"]),
        x_label="virtual devices on the same cores",
        y_label="meta-learning (images/s)",
        style=_TIME,
    )
    axes[0, 0].set_xticks(run.summary["num_devices"])
    _measured(
        axes[0, 1],
        run.summary["num_images"],
        np.array(run.summary["peak_mebibytes"]),
        x_label="images encoded into one functaset",
        y_label="peak memory of the process (MiB)",
        style=_MEMORY,
        log_x=True,
    )
    return figure


FIGURES = {"benchmark": _benchmark, "scaling": {"scaling": _scaling}}
