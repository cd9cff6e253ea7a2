"""Principal components of signals or of their cells: the linear control of functa.

A code of K numbers per signal proves little by its PSNR alone, because the first K
principal components of the training signals are often as good. `fit_pca` computes them:

  code = P (x - m),  reconstruction = m + P^T code,

with the mean m and the K orthonormal leading eigenvectors P of the covariance. Among
all affine codes of K numbers this one has the least squared error on the signals that
it is fitted to. With a `grid` the signals are cut into equal cells, which share one
basis. The codes then have the shape of the latents of a field with a latent grid.

The signals are read in blocks, so that the data set is never copied as a whole. uint8
signals are scaled to [0, 1]. Blocks are in float32 (float64 if the signals are); sums
over blocks and eigenvectors are in float64. The code runs in NumPy.

Axes: N signals, D values of a cell (of the whole signal without a grid), K components,
G cells per axis, C channels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from functa import spatial

# Values in a block of signals: 16 MiB in float32.
_BLOCK_VALUES = 2**22


class PCA(NamedTuple):
    """Principal components of the cells of a signal.

    Attributes:
      mean: (D,).
      components: orthonormal rows, the largest variance first, (K, D). The entry of
        the largest magnitude in a row is positive.
      variance: variance of the cells along each component, (K,).
      grid: number of cells along each axis; () is one cell, the whole signal.
      shape: shape of a signal, its channels last.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    grid: tuple[int, ...]
    shape: tuple[int, ...]


def fit_pca(
    signals: np.ndarray,
    num_components: int | None = None,
    *,
    grid: Sequence[int] = (),
) -> PCA:
    """Fits principal components by the eigenvectors of the covariance.

    Args:
      signals: (N, ..., C), any number of axes between the first and the last; uint8 in
        [0, 255], or floats.
      num_components: K, at most D; None keeps all D. The time grows with D^3, and D =
        3,072 takes seconds; with K < N < D, for N cells, it grows with N^2 D.
      grid: number of cells along each axis between the first and the last; () is one
        cell, the whole signal.

    Returns:
      The components, in float64.

    Raises:
      ValueError: if the grid does not divide the signals, if there are fewer than two
        cells or a value that is not finite, or if `num_components` is not between 1
        and D.

    Example:
      >>> import numpy as np
      >>> from functa.linear import encode, fit_pca
      >>> images = np.random.default_rng(0).random((50, 8, 8, 3))
      >>> pca = fit_pca(images, 16, grid=(2, 2))
      >>> encode(pca, images).shape
      (50, 2, 2, 16)
    """
    grid, shape = tuple(grid), tuple(signals.shape[1:])
    if grid:
        spatial.split_cells(signals[:1], grid)  # Checks the grid.
    size = math.prod(shape) // math.prod(grid)
    num_components = size if num_components is None else num_components
    if not 1 <= num_components <= size:
        raise ValueError(
            f"num_components must be from 1 to {size}, the values of a cell; got "
            f"{num_components}."
        )
    count = len(signals) * math.prod(grid)
    if count < 2:
        raise ValueError(f"principal components need two cells, got {count}.")
    if num_components < count < size:
        return _fit_few(signals, num_components, grid)
    # About an offset near the mean, because subtracting the square of a large mean
    # from the second moment would cancel digits.
    offset = next(_blocks(signals, grid)).mean(0)
    total, products = np.zeros(size), np.zeros((size, size))
    for cells in _blocks(signals, grid):
        cells -= offset
        total += cells.sum(0, dtype=np.float64)
        products += cells.T @ cells
    if not np.isfinite(products).all():
        raise ValueError("signals have values that are not finite.")
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    variance, vectors = np.linalg.eigh(covariance)  # in increasing order
    components = vectors.T[::-1][:num_components]
    variance = np.maximum(variance[::-1][:num_components], 0)
    return PCA(offset + mean, _orient(components), variance, grid, shape)


def _fit_few(signals, num_components, grid):
    """Components of fewer cells than a cell has values, by singular vectors."""
    cells = np.concatenate(list(_blocks(signals, grid)), dtype=np.float64)
    if not np.isfinite(cells).all():
        raise ValueError("signals have values that are not finite.")
    mean = cells.mean(0)
    cells -= mean
    _, scales, components = np.linalg.svd(cells, full_matrices=False)
    variance = np.square(scales[:num_components]) / (len(cells) - 1)
    components = _orient(components[:num_components])
    return PCA(mean, components, variance, grid, tuple(signals.shape[1:]))


def _orient(components):
    """Rows whose entries of the largest magnitude are positive."""
    largest = np.argmax(np.abs(components), axis=1, keepdims=True)
    return components * np.sign(np.take_along_axis(components, largest, axis=1))


def encode(pca: PCA, signals: np.ndarray) -> np.ndarray:
    """Projects each cell of the signals on the components.

    Args:
      pca: the components.
      signals: (N, ..., C), with the shape of the signals of `fit_pca`.

    Returns:
      The codes, float32 (N, *grid, K).

    Raises:
      ValueError: if the signals have another shape.
    """
    codes = [np.float32(codes) for _, codes in _project(pca, signals)]
    num_components = len(pca.components)
    return np.concatenate(codes).reshape(len(signals), *pca.grid, num_components)


def decode(pca: PCA, codes: np.ndarray) -> np.ndarray:
    """Returns the signals that codes stand for.

    Args:
      pca: the components.
      codes: (N, *grid, K). If K is smaller than the number of components, the leading
        ones are used.

    Returns:
      float32 (N, ..., C); uint8 signals come back in [0, 1].
    """
    num_components = codes.shape[-1]
    cells = codes.reshape(math.prod(codes.shape[:-1]), num_components)
    cells = cells @ pca.components[:num_components]
    cells = np.float32(cells + pca.mean)
    if pca.grid:
        cell = [n // g for n, g in zip(pca.shape, pca.grid, strict=False)]
        cells = cells.reshape(-1, *pca.grid, *cell, pca.shape[-1])
        return spatial.join_cells(cells)
    return cells.reshape(-1, *pca.shape)


def truncation_mse(pca: PCA, signals: np.ndarray) -> np.ndarray:
    """Mean squared error of each signal if only the leading components are kept.

    Args:
      pca: K components.
      signals: (N, ..., C).

    Returns:
      float64 (N, K + 1): column k is the error with k components per cell. The mean
      over the signals of `functa.psnr` of a column is the PSNR of the control.

    Example:
      >>> import numpy as np
      >>> from functa.linear import fit_pca, truncation_mse
      >>> signals = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 2.0], [2.0, 1.0]])
      >>> pca = fit_pca(signals)
      >>> print(truncation_mse(pca, signals).mean(0).round(6))
      [0.5  0.25 0.  ]
    """
    errors = []
    for cells, codes in _project(pca, signals):
        rest = cells - codes @ pca.components.astype(cells.dtype)
        squares = np.empty((len(cells), 1 + codes.shape[1]))
        squares[:, :-1] = np.square(codes)
        squares[:, -1] = np.square(rest).sum(1)
        # Summed from the last component on, so that small errors keep their digits.
        tails = squares[:, ::-1].cumsum(1)[:, ::-1]
        errors.append(tails.reshape(-1, math.prod(pca.grid), tails.shape[1]).sum(1))
    return np.concatenate(errors) / math.prod(pca.shape)


def _project(pca, signals) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Centered cells (cells, D) of blocks of signals, and their codes (cells, K)."""
    if tuple(signals.shape[1:]) != pca.shape:
        raise ValueError(
            f"signals must have the shape {pca.shape} of the components, got "
            f"{tuple(signals.shape[1:])}."
        )
    for cells in _blocks(signals, pca.grid):
        cells -= pca.mean
        yield cells, cells @ pca.components.T.astype(cells.dtype)


def _blocks(signals, grid) -> Iterator[np.ndarray]:
    """The cells of blocks of signals, new arrays (cells, D) of float32 or float64."""
    size = math.prod(signals.shape[1:])
    rows = max(1, _BLOCK_VALUES // size)
    dtype = np.result_type(signals.dtype, np.float32)
    for start in range(0, max(len(signals), 1), rows):
        block = np.asarray(signals[start : start + rows])
        if grid:
            block = spatial.split_cells(block, grid)
        cells = block.reshape(-1, size // math.prod(grid)).astype(dtype)
        if signals.dtype == np.uint8:
            cells /= 255
        yield cells
