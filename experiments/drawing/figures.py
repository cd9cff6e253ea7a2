"""Draws the figures of a run from its files: python -m experiments.figures WORKDIR.

A figure is a function of `config.json`, `metrics.jsonl`, `summary.json` and
`arrays.npz`; no network is trained. The public functions of `functa.plots`,
`vit.plots`, `landscape.plots` and `lbi.plots` draw the figures; the modules of this
package pass them the numbers, names and titles of a run. Most folders of `results/`
have no `arrays.npz`: figures that need it are skipped, and those that only need logged
numbers are drawn.

Each module has a table FIGURES, {experiment: {name: function of the run}}; the
functions return a figure or its Axes. Where the figures depend on the run, a function
of it returns {name: function of no arguments}.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.common import devices, files
from experiments.drawing import (
    classification,
    compression,
    functa,
    generation,
    landscape,
    lbi,
    timing,
    vit,
)
from experiments.drawing.run import MissingError, bind, describe, read_run
from functa import plots

_MODULES = functa, classification, compression, generation, vit, landscape, lbi, timing
_FIGURES = {
    name: figures for module in _MODULES for name, figures in module.FIGURES.items()
}


def draw(workdir: Path, summary: Mapping[str, Any] | None = None) -> None:
    """Draws all figures of the run into `<workdir>/figures`.

    One line names the figures that cannot be drawn because arrays are missing. A figure
    that fails gives a warning.

    Args:
      workdir: the folder of the run.
      summary: replaces `summary.json`, which a run writes after its figures.

    Raises:
      FileNotFoundError: if the folder does not contain a run.
    """
    if not devices.is_main():
        return
    run = read_run(Path(workdir))
    if summary is not None:
        run = run._replace(summary=files.plain(summary))
    experiment = run.config.get("experiment")
    if experiment not in _FIGURES:
        raise ValueError(f"{workdir} is a run of {experiment}, which has no figures.")
    figures = _FIGURES[experiment]
    try:
        makers = figures(run) if callable(figures) else bind(figures, run)
    # Arrays of another program, for example.
    except Exception as error:  # noqa: BLE001
        devices.say(f"warning: the figures are not drawn: {error!r}")
        return
    missing = []
    for name, make in makers.items():
        try:
            _save(make(), run.workdir, name, describe(run))
        except MissingError as error:
            missing.append(f"{name} ({error})")
        # An error in one figure must not stop the run or the other figures.
        except Exception as error:  # noqa: BLE001
            devices.say(f"warning: figure {name} is not drawn: {error!r}")
        finally:
            plt.close("all")
    if missing:
        devices.say(
            f"{workdir}: not drawn, because the array in parentheses is missing: "
            f"{', '.join(missing)}"
        )


def compare(workdir: Path, other: Path) -> None:
    """Draws test images enlarged by the fields of two runs of meta_learn, side by side.

    Into `<workdir>/figures/super_resolution_compared.png`; for example of cells with
    interpolation "nearest" and "bilinear".

    Raises:
      FileNotFoundError: if a folder does not contain a run.
      ValueError: if a run has no enlarged images, or their images differ.
    """
    runs = [read_run(Path(folder)) for folder in (workdir, other)]
    columns, images = {}, []
    for run in runs:
        if not _has_enlarged(run):
            raise ValueError(
                f"{run.workdir} has no enlarged images of a run of meta_learn."
            )
        images.append(run.arrays["over_steps"][-1])
        label = run.config["model"].get("interpolation", "one latent")
        label = f"{run.workdir.name}, {label}" if label in columns else label
        columns[label] = run.arrays["super_resolved"]
    if not np.array_equal(*images):
        raise ValueError(f"{workdir} and {other} have other test images.")
    figure = plots.super_resolution({"image": images[0], **columns})
    title = "\n".join(map(describe, runs))
    _save(figure, runs[0].workdir, "super_resolution_compared", title)
    plt.close("all")


def _has_enlarged(run):
    """Whether a run has the images (B, H, W, C) of `compare` and their originals."""
    is_model = isinstance(run.config.get("model"), dict)
    empty = np.empty(0)
    steps, enlarged = (
        run.arrays.get(name, empty) for name in ("over_steps", "super_resolved")
    )
    return (
        is_model
        and (steps.dtype.kind, enlarged.dtype.kind) == ("f", "f")
        and (steps.ndim, enlarged.ndim) == (5, 4)
        and 0 < steps.shape[1] == len(enlarged)
        and len(steps) > 0
    )


def _save(drawn, workdir, name, title):
    figure = drawn.figure  # of a figure, itself
    figure.suptitle(title, fontsize=9)
    files.write_atomic(
        workdir / "figures" / f"{name}.png",
        functools.partial(figure.savefig, dpi=130, bbox_inches="tight"),
        mode="wb",
    )
