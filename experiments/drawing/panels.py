"""Figures of several panels, without a window."""

from collections.abc import Iterable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")


def panels(
    num: int,
    *,
    width: float = 5.4,
    height: float = 3.5,
    rows: int = 1,
    titles: Iterable[str] = (),
    **options: Any,
) -> tuple[plt.Figure, np.ndarray]:
    """A figure with Axes (rows, num), and titles above the first of them.

    Args:
      num: number of columns.
      width: of a panel, in inches; a figure has at least 5.4.
      height: of a panel, in inches.
      rows: number of rows.
      titles: of the first panels.
      **options: those of `plt.subplots`.
    """
    figure, axes = plt.subplots(
        rows,
        num,
        # A single panel shares its width with the legend.
        figsize=(max(width * num, 5.4), height * rows + 0.3),
        layout="constrained",
        squeeze=False,
        **options,
    )
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(title, fontsize=9)
    return figure, axes


def share_labels(axes: np.ndarray) -> None:
    """Keeps the last legend of the first row, and the first label of equal ones."""
    for ax in axes.flat:
        if ax is not axes[0, -1] and ax.get_legend():
            ax.get_legend().remove()
    for first, *others in axes:
        for ax in others:
            if ax.get_ylabel() == first.get_ylabel():
                ax.set_ylabel("")
