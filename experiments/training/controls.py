"""Linear controls: the PSNR of principal components of the size of a latent."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

import functa
from experiments.common import data
from functa import linear, metrics

# Larger images or cells have no control by their own components: their covariance would
# need minutes and gigabytes.
MAX_VALUES = 4096
# Squared rounding error of float32: where a code is exact, the PSNR is finite.
_ROUNDING = 1e-14


def linear_controls(
    dataset: Mapping[str, data.Arrays],
    latent_shape: Sequence[int],
    *,
    num_images: int = 0,
) -> dict[str, float]:
    """Test PSNR of linear codes with the number of values of a latent.

    The basis is that of the training split. The PSNR is the mean over the test images,
    as `functa.mean_psnr`.

    Args:
      dataset: the arrays of both splits.
      latent_shape: (L,), or (h, w, C) for a latent grid.
      num_images: test images that are used, from the first on; 0 uses all.

    Returns:
      "pca_psnr": principal components of whole images. "patch_pca_psnr", for grids
      only: C components of each cell. A control is absent if an image or cell has more
      than MAX_VALUES values, or if there is only one.
    """
    train, test = (dataset[split]["image"] for split in data.SPLITS)
    test = test[: num_images or len(test)]
    *grid, channels = latent_shape
    sizes = {"pca_psnr": ((), math.prod(latent_shape))}
    if grid:
        sizes["patch_pca_psnr"] = (grid, channels)
    psnr = {}
    for name, (cells, size) in sizes.items():
        num_cells = math.prod(cells)
        values = math.prod(train.shape[1:]) // num_cells
        if values <= MAX_VALUES and len(train) * num_cells > 1:
            curve = psnr_per_size(train, test, grid=cells)
            # With as many components as values a code is exact; there are no more.
            psnr[name] = float(curve[min(size, len(curve) - 1)])
    return psnr


def psnr_per_size(
    train: np.ndarray, test: np.ndarray, *, grid: Sequence[int] = ()
) -> np.ndarray:
    """Mean test PSNR (D + 1,) in dB with 0 to D components of each of the cells.

    Args:
      train: uint8 (N, H, W, C), the images that the basis is fitted to.
      test: uint8 (N, H, W, C).
      grid: number of cells along both axes; () is the whole image.
    """
    pca = linear.fit_pca(train, grid=grid)
    mse = np.maximum(linear.truncation_mse(pca, test), _ROUNDING)
    return np.mean(-10 * np.log10(mse), axis=0)


def linear_code(
    train: np.ndarray,
    test: np.ndarray,
    num_components: int,
    grid: Sequence[int] = (),
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Reconstructs test fields from principal components of the training fields.

    With the weights of points these are the empirical orthogonal functions (EOF) of
    meteorology: the components of the fields times the square roots of the weights.

    Args:
      train: (N, *shape, C).
      test: (N', *shape, C).
      num_components: components of a cell, see `count_components`.
      grid: number of cells along each axis; () is the whole field.
      weight: weights > 0 of the points, (*shape), or None.

    Returns:
      float32 (N', *shape, C).
    """
    scale = np.float32(1)
    if weight is not None:
        scale = np.sqrt(np.float32(weight))[..., None]
    num = count_components(train, num_components, grid)
    pca = linear.fit_pca(train * scale, num, grid=grid)
    return linear.decode(pca, linear.encode(pca, test * scale)) / scale


def count_components(
    train: np.ndarray, num_components: int, grid: Sequence[int] = ()
) -> int:
    """How many of the components of a cell that are asked for there are.

    At most as many as values in a cell, and one less than cells in `train`. The
    arguments are those of `linear_code`.
    """
    num_cells = math.prod(grid)
    size = math.prod(train.shape[1:]) // num_cells
    return min(num_components, size, len(train) * num_cells - 1)


def measure(
    train: np.ndarray,
    test: np.ndarray,
    code: np.ndarray,
    weight: np.ndarray | None = None,
) -> dict[str, float]:
    """Quality of reconstructions (N', *shape, C) of test fields.

    Args:
      train: (N, *shape, C); its mean per channel is what the SNR compares with.
      test: the fields, (N', *shape, C).
      code: their reconstructions.
      weight: weights of the points with the mean 1, (*shape), or None.

    Returns:
      "psnr": mean over the fields, "snr", both in dB; for fields of zeros and ones,
      such as voxels, also "iou", the mean overlap of the values above 1/2.
    """
    scale = np.float32(1) if weight is None else np.float32(weight)[..., None]
    axes = tuple(range(1, test.ndim))
    offset = (scale * train).mean(axes[:-1]).mean(0)
    power = (scale * np.square(test - offset)).mean(axes)
    mse = np.maximum((scale * np.square(test - code)).mean(axes), _ROUNDING)
    quality = {"psnr": functa.mean_psnr(mse), "snr": metrics.snr(power, mse)}
    if np.isin(test, (0, 1)).all():
        quality["iou"] = metrics.iou(code, test).mean()
    return {name: float(value) for name, value in quality.items()}
