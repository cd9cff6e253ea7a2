"""Grids of patches and their position embeddings."""

import math
import operator

import numpy as np

# Name of the parameter.
POSITIONS = "Transformer/posembed_input/pos_embedding"


def resize_positions(
    positions: np.ndarray,
    grid_size: int | tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    num_prefix: int = 1,
    rule: str = "google",
) -> np.ndarray:
    """Resizes position embeddings to another grid of patches.

    Each axis is interpolated alone, by one of three rules:

    * "google": linear between aligned corners; new row i is old row
      i (g_old - 1) / (g_new - 1), as in `scipy.ndimage.zoom(order=1)`;
    * "timm": cubic (a = -1/2) between aligned borders, widened where the grid shrinks,
      as `torch.nn.functional.interpolate` with antialias;
    * "huggingface": cubic (a = -3/4) between aligned borders, not widened; places
      outside the grid take the value at its border.

    Args:
      positions: (1, num_prefix + P_old, D); the first ones do not change.
      grid_size: rows and columns of the new grid, or one number for both.
      grid: rows and columns of the old grid; None takes a square.
      num_prefix: number of tokens before the patches.
      rule: "google", "timm" or "huggingface".

    Returns:
      (1, num_prefix + P_new, D).

    Raises:
      ValueError: if the rule is unknown, or the patches do not form the grid.
    """
    if not isinstance(rule, str) or rule not in _RESIZING:
        raise ValueError(f"resize must be one of {', '.join(_RESIZING)}; got {rule!r}.")
    old, new = grid_of(positions, grid, num_prefix), pair(grid_size)
    if new == old:
        return positions
    interpolation = _RESIZING[rule]
    prefix, rows = np.split(np.asarray(positions), [num_prefix], axis=1)
    rows = rows.reshape(*old, -1)
    rows = np.einsum("ai,ijd->ajd", interpolation(old[0], new[0]), rows)
    rows = np.einsum("bj,ajd->abd", interpolation(old[1], new[1]), rows)
    rows = rows.reshape(1, new[0] * new[1], -1).astype(prefix.dtype)
    return np.concatenate([prefix, rows], axis=1)


def _linear(old, new):
    """Matrix (new, old) that interpolates linearly between aligned corners."""
    places = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


def _cubic_widened(old, new):
    places = (np.arange(new) + 0.5) * old / new - 0.5
    distances = np.abs(places[:, None] - np.arange(old)) / max(old / new, 1)
    weights = _cubic(distances, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic_replicated(old, new):
    places = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        taps = np.floor(places) + offset
        columns = np.clip(taps, 0, old - 1).astype(int)
        np.add.at(
            matrix, (np.arange(new), columns), _cubic(np.abs(places - taps), -0.75)
        )
    return matrix


def _cubic(x, a):
    """Kernel of cubic convolution (Keys 1981) at distances x >= 0."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_RESIZING = {
    "google": _linear,
    "timm": _cubic_widened,
    "huggingface": _cubic_replicated,
}


def grid_of(
    positions: np.ndarray, grid: tuple[int, int] | None, num_prefix: int
) -> tuple[int, int]:
    """Rows and columns of the patches of position embeddings.

    Args:
      positions: (1, num_prefix + P, D).
      grid: the rows and columns; None takes a square.
      num_prefix: number of tokens before the patches.

    Returns:
      (rows, columns).

    Raises:
      ValueError: if the patches do not form the grid.
    """
    num_patches = positions.shape[1] - num_prefix
    if not is_grid(num_patches, grid):
        expected = "a square number of positions (1, 4, 9, ...)"
        if grid:
            expected = f"a position for each patch of a grid of {grid}"
        raise ValueError(
            f"{POSITIONS} must have {expected} after {num_prefix} of CLS and "
            f"registers, got {num_patches}; set grid."
        )
    return tuple(grid) if grid else (math.isqrt(num_patches),) * 2


def is_grid(number: int, grid: tuple[int, int] | None) -> bool:
    """Whether a number of patches forms the grid, or a square if it is None."""
    if grid:
        return number == grid[0] * grid[1]
    return number > 0 and math.isqrt(number) ** 2 == number


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Both sides of a size, which may be one number, as Python's, which never wrap.

    Raises:
      ValueError: if they are not whole numbers.
    """
    sides = (size, size) if np.ndim(size) == 0 else size
    try:
        return tuple(operator.index(side) for side in sides)
    except TypeError:
        raise ValueError(f"a size must be of whole numbers, got {size!r}.") from None
