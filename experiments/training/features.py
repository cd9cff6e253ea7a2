"""The inputs of a classifier of latents: latents, or their linear controls.

A control is computed from the images of the functaset. It has the order and the grid of
its latents, so the same network reads both:

* `patches`: the pixels of each cell.
* `patch_pca`: the first principal components of the cells, as many as a cell of the
  latents has channels. This is the linear code of the same size.

Axes: N signals, H W C pixels of an image, h w cells of a grid, D values of a cell.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import data
from experiments.training import encoding
from functa import linear
from functa.functaset import Functaset, hash_params, load_functaset

FEATURES = ("latents", "patches", "patch_pca")


def load_features(
    name: str, functaset: Functaset, *, data_dir: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads one of FEATURES for all signals of a functaset.

    Args:
      name: one of FEATURES.
      functaset: the latents. Its config names the data set of the images and, if the
        images were padded by reflection, the number of pixels on each side, `padding`.
      data_dir: directory of the data set, as in `data.load`.

    Returns:
      Features (N, ...) in the order of the functaset, and the mean and deviation of
      their last axis over the training images.

    Raises:
      ValueError: if the latents are not grids over the images, or if the images are not
        those of the functaset.
    """
    if name == "latents":
        if data_dir is not None:
            raise ValueError(
                f"data_dir={data_dir} is not read, because features=latents needs no "
                "images."
            )
        return functaset.latent, functaset.mean, functaset.std
    grid, num_channels = functaset.latent.shape[1:-1], functaset.latent.shape[-1]
    if len(grid) != 2:
        raise ValueError(
            f"features {name} need a functaset of grids (N, h, w, C), but its latents "
            f"have the shape {functaset.latent.shape}."
        )
    train, _ = load_images(functaset, "train", data_dir)
    pca = linear.fit_pca(_pad(functaset, train), grid=grid)
    if name == "patches":
        # The projection to these components changes nothing.
        variance = np.square(pca.components.T) @ pca.variance
        mean, pca = pca.mean, _identity(pca)
    else:
        if num_channels > len(pca.mean):
            raise ValueError(
                f"the latents have {num_channels} channels, but a cell has only "
                f"{len(pca.mean)} principal components."
            )
        variance = pca.variance[:num_channels]
        mean = np.zeros(num_channels)
        pca = pca._replace(components=pca.components[:num_channels], variance=variance)
    values = np.empty((*functaset.latent.shape[:-1], len(pca.components)), np.float32)
    for rows, images in _copies(functaset, data_dir):
        values[rows] = linear.encode(pca, images)
    return values, np.float32(mean), np.float32(np.sqrt(variance))


def load_grids(
    name: str, data_dir: str | None, **how_read: Any
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray, int]:
    """The grids of latents of a functaset, in the place of images.

    Args:
      name: "functaset".
      data_dir: the file, or the folder of a run that holds functaset.npz.
      **how_read: other fields of config.dataset, which must be None.

    Returns:
      {split: (latents (N, h, w, C), labels (N,))} of the images, without copies; the
      mean and deviation of each channel, (1, 1, 1, C); and the number of classes.

    Raises:
      ValueError: if there is no such file, or it has no labeled grids in both splits.
    """
    data.refuse_unread(f"the data set {name}", **how_read)
    if data_dir is None:
        raise ValueError(
            "data set 'functaset' needs a file: --config.dataset.data_dir=PATH.npz"
        )
    path = Path(data_dir).expanduser()
    path = path / "functaset.npz" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"there is no functaset {path}; experiments.meta_learn writes one."
        )
    whole = load_functaset(path)
    if whole.latent.ndim != 4:
        raise ValueError(
            f"{path}: the latents must be grids (N, h, w, C), got {whole.latent.shape}."
        )
    check_config(path, whole)
    splits = {}
    for split in data.SPLITS:
        rows, num_images = _rows_of(whole, split)
        rows = rows[:num_images]
        if not num_images or whole.label[rows].min() < 0:
            raise ValueError(f"{path} has no labeled {split} split.")
        splits[split] = whole.latent[rows].astype(np.float32), whole.label[rows]
    mean, std = (np.float32(x).reshape(1, 1, 1, -1) for x in (whole.mean, whole.std))
    return splits, mean, std, 1 + int(whole.label.max())


def load_renderable(path: str, run: str, learner: encoding.Learner) -> Functaset:
    """A functaset whose latents are those of a run, and whose images are known.

    Args:
      path: the file.
      run: the folder of the run, for errors.
      learner: the weights of the run.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is damaged, has the latents of other weights or of padded
        images, does not name the data set of the images, or lacks a split.
    """
    whole = load_splits(path)
    if whole.params_sha256 != hash_params(learner.params):
        raise ValueError(
            f"the latents of {path} were fitted with other weights than those of {run}."
        )
    if whole.config.get("padding"):
        raise ValueError(
            f"{path} has the latents of padded images; use a functaset without padding."
        )
    if not isinstance(whole.config.get("dataset"), str):
        raise ValueError(f"{path} does not name the data set of its images.")
    check_config(path, whole)
    return whole


def check_labels(source: str, train: np.ndarray, test: np.ndarray) -> None:
    """Raises ValueError if a classifier cannot learn the labels (N,) of two splits."""
    if min(train.min(), test.min()) < 0:
        raise ValueError(f"{source} has signals without a label (-1).")
    if len(np.unique(train)) < 2:
        raise ValueError(f"{source} has signals of one class only.")
    absent = np.setdiff1d(test, train)
    if absent.size:
        raise ValueError(
            f"the test split of {source} has signals of class {absent[0]}, but the "
            "training split has none."
        )


def load_splits(path: str) -> Functaset:
    """A functaset with training and test signals.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is damaged or lacks a split.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"there is no functaset {path}; experiments.meta_learn and "
            "experiments.make_functaset write one (--config.functaset=PATH)."
        )
    whole = load_functaset(path)
    for split in data.SPLITS:
        if not (whole.split == split).any():
            raise ValueError(f"{path} has no {split} split.")
    return whole


# What `encoding.encode_dataset` writes, and what a missing field stands for.
_COUNTS = {"copies": 1, "padding": 0, "seed": 0}
_TYPES = {"dataset": str, "image_size": int, "flip": bool} | {
    f"{split}_split": str for split in data.SPLITS
}


def check_config(path: str | Path, functaset: Functaset) -> None:
    """Checks what a functaset says of its making, which other programs may write.

    Raises:
      ValueError: if a field has another type, if the training signals are not the
        copies of images, or if classes lack a name.
    """
    config = functaset.config
    for field, smallest in _COUNTS.items():
        value = config.get(field, smallest)
        if type(value) is not int or not smallest <= value < 2**32:
            raise ValueError(
                f"{path}: {field} must be an integer of at least {smallest}, got "
                f"{value!r:.80}."
            )
    for field, kind in _TYPES.items():
        value = config.get(field)
        if value is not None and type(value) is not kind:
            raise ValueError(
                f"{path}: {field} must be of type {kind.__name__}, got {value!r:.80}."
            )
    inner = config.get("inner", {})
    num_steps = inner.get("num_steps", 0) if isinstance(inner, dict) else None
    if type(num_steps) is not int or num_steps < 0:
        raise ValueError(
            f"{path}: inner must hold num_steps, an integer of at least 0, got "
            f"{inner!r:.80}."
        )
    copies = config.get("copies", 1)
    labels = functaset.label[functaset.split == "train"]
    if len(labels) % copies:
        raise ValueError(
            f"{path}: {len(labels)} training signals are not {copies} copies."
        )
    # In another order, copies of validation images would be among those of training.
    by_copy = labels.reshape(copies, len(labels) // copies)
    if (by_copy != by_copy[:1]).any():
        raise ValueError(
            f"{path}: the labels of its {copies} copies differ; the training signals "
            "must be ordered by copy, and within a copy by image."
        )
    num_classes, names = 1 + int(functaset.label.max()), config.get("class_names")
    if names is not None and not (
        isinstance(names, list)
        and len(names) >= num_classes
        and all(isinstance(name, str | int) for name in names)
    ):
        raise ValueError(
            f"{path}: class_names must be a list of at least {num_classes} names, got "
            f"{names!r:.80}."
        )


def check_grid(path: str, functaset: Functaset, learner: encoding.Learner, images):
    """Compares the latents with those that a field has for images (N, H, W, C).

    Raises:
      ValueError: if their shapes differ.
    """
    expected = tuple(learner.for_shape(images.shape[1:3]).model.latent_shape)
    if functaset.latent.shape[1:] != expected:
        raise ValueError(
            f"{path} has latents {functaset.latent.shape[1:]}, but those of the field "
            f"are {expected} for images of {images.shape[1]}x{images.shape[2]}."
        )


def load_images(functaset, split, data_dir):
    """The images of a split of a functaset.

    Args:
      functaset: its config names the data set.
      split: "train" or "test".
      data_dir: directory of the data set, as in `data.load`.

    Returns:
      The images without copies, uint8 (N, H, W, C), and the rows of the split in the
      functaset, the N images first and then their copies.

    Raises:
      ValueError: if the images are not those of the functaset.
    """
    rows, num_images = _rows_of(functaset, split)
    name = functaset.config.get("dataset")
    if name is None:
        raise ValueError("the functaset does not name the data set of its images.")
    if name in ("folder", "npz") and data_dir is None:
        raise ValueError(
            f"the images of the functaset are of the data set {name!r}; set their "
            "directory: --config.data_dir=PATH"
        )
    how_read = {field: functaset.config.get(field) for field in data.HOW_READ}
    dataset = data.load_dataset(name, (split,), data_dir=data_dir, **how_read)
    arrays = dataset.splits[split]
    labels = arrays["label"][:num_images]
    if not np.array_equal(labels, functaset.label[rows[:num_images]]):
        raise ValueError(
            f"the {split} images of {name} are not those of the functaset: their "
            "labels differ."
        )
    images = arrays["image"][:num_images]
    # Functasets of older versions have no digest.
    digests = functaset.config.get("signals_sha256", {})
    digest = digests.get(split) if isinstance(digests, dict) else "unknown"
    if digest not in (None, data.sha256(images)):
        raise ValueError(
            f"the {split} images of {name} are not those of the functaset: their "
            "values differ."
        )
    return images, rows


def _rows_of(functaset, split):
    """Rows of a split, the images first and then their copies; number of images."""
    rows = np.flatnonzero(functaset.split == split)
    copies = functaset.config.get("copies", 1) if split == "train" else 1
    return rows, len(rows) // copies


def _identity(pca):
    size = len(pca.mean)
    return pca._replace(mean=np.zeros(size), components=np.eye(size))


def _pad(functaset, images):
    padding = functaset.config.get("padding", 0)
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return np.pad(images, widths, mode="reflect")


def _copies(functaset, data_dir):
    """Yields the rows of each shard of the functaset and its images."""
    config = functaset.config
    padding, grid = config.get("padding", 0), functaset.latent.shape[1:3]
    for split in map(str, np.unique(functaset.split)):
        images, rows = load_images(functaset, split, data_dir)
        for copy in range(len(rows) // len(images)):
            for start in range(0, len(images), encoding.SHARD_SIZE):
                shard = encoding.copy_images(
                    images[start : start + encoding.SHARD_SIZE],
                    copy,
                    number=copy * len(functaset.label) + start,
                    seed=config.get("seed", 0),
                    flip=config.get("flip", False),
                    padding=padding,
                    cell=[
                        (side + 2 * padding) // cells
                        for side, cells in zip(images.shape[1:3], grid, strict=True)
                    ],
                )
                first = copy * len(images) + start
                yield rows[first : first + len(shard)], shard
