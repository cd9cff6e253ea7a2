"""The inputs of a classifier of latents: latents, or their linear controls.

The controls are computed from the images of the functaset, in its order and on its
grid, so that the same head can be trained on them:

* `patches`: the pixels of each cell.
* `patch_pca`: their first principal components, as many as a cell has channels. This is
  the linear code of the same size.

Axes: N signals, H W C pixels of an image, h w cells of a grid, D numbers of a cell.
"""

from collections.abc import Sequence

import numpy as np

from experiments.common import data
from experiments.training import encoding
from functa.functaset import Functaset

FEATURES = ("latents", "patches", "patch_pca")


def load_features(
    name: str, functaset: Functaset, *, data_dir: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads one of FEATURES for all signals of a functaset.

    Args:
      name: one of FEATURES.
      functaset: the latents; its config names the data set of the images.
      data_dir: directory of the data set, as in `data.load`.

    Returns:
      Features (N, ...) in the order of the functaset, and the mean and deviation of
      their last axis over the training split.

    Raises:
      ValueError: if the latents are not grids over the images, or if the images are not
        those of the functaset.
    """
    if name == "latents":
        return functaset.latent, functaset.mean, functaset.std
    values = cut_patches(functaset, data_dir)
    train = functaset.split == "train"
    if name == "patch_pca":
        num_channels = functaset.latent.shape[-1]
        if num_channels > values.shape[-1]:
            raise ValueError(
                f"patch_pca cannot have {num_channels} components, as the latents: a "
                f"patch has {values.shape[-1]} numbers."
            )
        # The first copy, which is not augmented.
        num_images = train.sum() // functaset.config.get("copies", 1)
        values = project(
            values, values[np.flatnonzero(train)[:num_images]], num_channels
        )
    mean, covariance = _moments(values[train])
    return values, np.float32(mean), np.float32(np.sqrt(np.diag(covariance)))


def cut_patches(functaset: Functaset, data_dir: str | None = None) -> np.ndarray:
    """The pixels of each cell: uint8 (N, h, w, D), see `load_features`."""
    config = functaset.config
    grid = functaset.latent.shape[1:-1]
    if len(grid) != 2:
        raise ValueError(
            "patches need a functaset of grids (N, h, w, C), but its latents have the "
            f"shape {functaset.latent.shape}."
        )
    # A larger grid than that of the model is the encoding of a padded image.
    model_grid = config["model"].get("grid", grid)
    values = None
    for split in np.unique(functaset.split):
        rows = np.flatnonzero(functaset.split == split)
        copies = config.get("copies", 1) if split == "train" else 1
        num_images = len(rows) // copies
        arrays = data.load(config["dataset"], str(split), data_dir=data_dir)
        labels = arrays["label"][:num_images]
        if not np.array_equal(labels, functaset.label[rows[:num_images]]):
            raise ValueError(
                f"the {split} images of {config['dataset']} are not those of the "
                "functaset: their labels differ."
            )
        images = arrays["image"][:num_images]
        for copy in range(copies):
            for start in range(0, num_images, encoding.SHARD_SIZE):
                shard = encoding.copy_images(
                    images[start : start + encoding.SHARD_SIZE],
                    copy * len(functaset.label) + start if copy else None,
                    seed=config.get("seed", 0),
                    flip=config.get("flip", False),
                )
                patches = split_cells(shard, grid, model_grid)
                if values is None:
                    shape = (len(functaset.label), *patches.shape[1:])
                    values = np.empty(shape, np.uint8)
                first = copy * num_images + start
                values[rows[first : first + len(patches)]] = patches
    return values


def split_cells(
    images: np.ndarray, grid: Sequence[int], model_grid: Sequence[int]
) -> np.ndarray:
    """Cuts images into the cells of a grid.

    Args:
      images: (N, H, W, C).
      grid: (h, w).
      model_grid: the grid that covers an image; if `grid` is larger, the images are
        padded by reflection.

    Returns:
      (N, h, w, D) with the pixels of each cell in the order of its rows.

    Raises:
      ValueError: if the cells do not divide the images, or the padding is not even.
    """
    sides = images.shape[1:3]
    cell = [side // cells for side, cells in zip(sides, model_grid, strict=True)]
    padding = [n * p - side for n, p, side in zip(grid, cell, sides, strict=True)]
    if any(side % cells for side, cells in zip(sides, model_grid, strict=True)) or any(
        pad < 0 or pad % 2 for pad in padding
    ):
        raise ValueError(
            f"images of {sides[0]}x{sides[1]} pixels cannot be cut into the cells of a "
            f"{grid[0]}x{grid[1]} grid, where {model_grid[0]}x{model_grid[1]} cells "
            "cover an image."
        )
    pads = [(0, 0), *((pad // 2, pad // 2) for pad in padding), (0, 0)]
    images = np.pad(images, pads, mode="reflect")
    cells = images.reshape(len(images), grid[0], cell[0], grid[1], cell[1], -1)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), *grid, -1)


def project(values: np.ndarray, train: np.ndarray, num_components: int) -> np.ndarray:
    """The first principal components of all cells, fitted to those of `train`.

    Args:
      values: (N, h, w, D).
      train: (M, h, w, D).
      num_components: number of components.

    Returns:
      float32 (N, h, w, num_components).
    """
    mean, covariance = _moments(train)
    _, vectors = np.linalg.eigh(covariance)
    basis = np.float32(vectors[:, ::-1][:, :num_components])
    projected = np.empty((*values.shape[:-1], num_components), np.float32)
    for start in range(0, len(values), 1000):
        part = slice(start, start + 1000)
        projected[part] = (np.float32(values[part]) - np.float32(mean)) @ basis
    return projected


def _moments(values):
    """Mean (D,) and covariance (D, D) of all cells, float64."""
    size = values.shape[-1]
    total, products, count = np.zeros(size), np.zeros((size, size)), 0
    for start in range(0, len(values), 1000):  # limits the memory of float64
        cells = np.float64(values[start : start + 1000]).reshape(-1, size)
        total += cells.sum(0)
        products += cells.T @ cells
        count += len(cells)
    mean = total / count
    return mean, products / count - np.outer(mean, mean)
