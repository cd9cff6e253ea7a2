"""Linear controls: the PSNR of principal components of the size of a latent."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.common import data
from functa import linear

# Larger images have no control by their own components: their covariance would need
# minutes and gigabytes.
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
      "pca_psnr": principal components of whole images; absent for images of more than
      MAX_VALUES values. "patch_pca_psnr", for grids only: C components of each cell.
    """
    train, test = (dataset[split]["image"] for split in data.SPLITS)
    test = test[: num_images or len(test)]
    *grid, channels = latent_shape
    psnr = {}
    if math.prod(train.shape[1:]) <= MAX_VALUES:
        curve = psnr_per_size(train, test)
        psnr["pca_psnr"] = _at(curve, math.prod(latent_shape))
    if grid:
        curve = psnr_per_size(train, test, grid=grid)
        psnr["patch_pca_psnr"] = _at(curve, channels)
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


def _at(curve, num_components):
    """With as many components as values a code is exact; there are no more."""
    return float(curve[min(num_components, len(curve) - 1)])
