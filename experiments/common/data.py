"""Data sets of images and of other fields as arrays in memory.

* `digits`: the 1,797 gray 8x8 images of scikit-learn; needs no download.
* `folder`: a directory of image files, with splits and classes or without
  (`experiments.common.image_folder`).
* `npz`: a directory with `train.npz` and `test.npz`, each with `image` and optionally
  `label`.
* `fashion_mnist`: the files of the Debian package `dataset-fashion-mnist`, where they
  are installed or in a directory; without them that of TensorFlow Datasets.
* `winds`, `speech`, `furniture` and their synthetic twins: fields over other points
  than pixels (`experiments.common.fields`), for the commands that read them.
* any other name: an image data set of TensorFlow Datasets, read without TensorFlow.
"""

import functools
import gzip
import hashlib
import itertools
import math
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common import devices, fields, image_folder
from experiments.common.image_folder import read_image, resize_and_crop, some
from functa import npz

__all__ = ["read_image"]

SPLITS = ("train", "test")
# Arguments of `load_dataset` that decide which images and pixels are read.
HOW_READ = ("image_size", "train_split", "test_split")

# Where the Debian package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

# Signals of which a digest is computed at once.
_HASHED_AT_ONCE = 4096

Arrays = dict[str, np.ndarray]


class Dataset(NamedTuple):
    """A data set.

    Attributes:
      splits: {split: {"image": uint8 (N, H, W, C), "label": int32 (N,)}}; C is 1 (gray)
        or 3 (RGB). All splits have the same (H, W, C). Without labels they are -1. A
        data set of fields has "value", float32 (N, *grid, C), in place of "image".
      class_names: the name of each label, or None if they have no names.
      found: one line that says what was read, for the user.
      coords: positions of the points of a field, float32 (*grid, d). None for images,
        which have `functa.coordinate_grid`.
      weight: weights of these points with the mean 1, (*grid), or None.
      bounds: the physical values of 0 and 1.
    """

    splits: dict[str, Arrays]
    class_names: list[str] | None
    found: str
    coords: np.ndarray | None = None
    weight: np.ndarray | None = None
    bounds: tuple[float, float] = (0.0, 1.0)


def load_dataset(
    name: str,
    splits: Sequence[str] = SPLITS,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    with_fields: bool = False,
) -> Dataset:
    """Loads a data set.

    Args:
      name: `digits`, `folder`, `npz`, or the name of a TFDS image data set, among them
        `fashion_mnist`.
      splits: which of `train` and `test` to read.
      data_dir: directory of the data. `folder` and `npz` need it. For TFDS, None means
        TFDS_DATA_DIR or the TFDS default.
      image_size: S; resizes the shorter side of every image to S pixels and crops the
        center. None keeps the size, which must then be the same for all images.
      train_split: name of the training split in the source: a sub-folder, the stem of a
        .npz file, or a split of TFDS such as "train[:90%]". None means `train`, for
        folders and files in any usual spelling.
      test_split: the same for the test split. None means `test`; folders and files
        without `test` use `val`.
      with_fields: whether the caller can use data sets of `experiments.common.fields`.

    Raises:
      ValueError: if an argument is wrong or would not be read, or if the files are not
        an image data set.
      FileNotFoundError: if the data are missing; the message states how to get them.

    Example:
      >>> digits = load_dataset("digits")
      >>> digits.splits["train"]["image"].shape
      (1438, 8, 8, 1)
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(
                f"split must be one of {', '.join(SPLITS)}; got {split!r}."
            )
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}.")
    source = name
    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
        source = f"{name} {data_dir}"
    if name == "digits":
        refuse_unread(
            "the data set digits",
            data_dir=data_dir,
            train_split=train_split,
            test_split=test_split,
        )
        loaded, class_names, notes = _load_digits(splits)
    elif name in fields.NAMES:
        if not with_fields:
            raise ValueError(
                f"data set {name} holds fields that are not images; only "
                "meta_learn and make_functaset read them."
            )
        refuse_unread(
            f"the data set {name}",
            image_size=image_size,
            train_split=train_split,
            test_split=test_split,
        )
        found = fields.load_fields(name, data_dir, say=devices.say)
        loaded = {split: found.splits[split] for split in splits}
        line = _describe(source, loaded, found.class_names, found.notes)
        points = found.coords, found.weight, found.bounds
        return Dataset(loaded, found.class_names, line, *points)
    else:
        if name in ("folder", "npz") and data_dir is None:
            raise ValueError(
                f"data set {name!r} needs a directory: --config.dataset.data_dir=PATH"
            )
        if data_dir is not None and not data_dir.is_dir():
            raise FileNotFoundError(f"there is no directory {data_dir}.")
        read = {
            "folder": _load_folder,
            "npz": _load_npz,
            "fashion_mnist": _load_fashion_mnist,
        }.get(name, functools.partial(_load_tfds, name))
        loaded, class_names, notes = read(
            data_dir, splits, image_size, {"train": train_split, "test": test_split}
        )
    if image_size is not None:
        for arrays in loaded.values():
            *_, channels = arrays["image"].shape
            resized = image_size, image_size, channels
            check_memory(len(arrays["image"]), resized, source)
            arrays["image"] = np.stack(
                [resize_and_crop(image, image_size) for image in arrays["image"]]
            )
    _check_shapes(source, loaded)
    if name in ("folder", "npz") and loaded.keys() == set(SPLITS):
        known = set(_image_digests(loaded["train"]))
        shared = sum(digest in known for digest in _image_digests(loaded["test"]))
        if shared:
            notes = [*notes, f"{shared} of the test images are also training images"]
    return Dataset(loaded, class_names, _describe(source, loaded, class_names, notes))


def describe_source(fields: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What a functaset keeps of its data set: the name, the classes, how it was read.

    Args:
      fields: the arguments of `load_dataset`. `data_dir` is left out: a file may be
        passed on, and the directory of its author means nothing elsewhere.
      dataset: what `load_dataset` returned.
    """
    kept = {name: fields.get(name) for name in HOW_READ}
    return {"dataset": fields["name"], "class_names": dataset.class_names, **kept}


def load(name: str, split: str, *, data_dir: str | None = None) -> Arrays:
    """Deprecated: `load_dataset(name, data_dir=data_dir).splits[split]`."""
    warnings.warn(
        "data.load is deprecated; use data.load_dataset(...).splits[split].",
        DeprecationWarning,
        stacklevel=2,
    )
    return load_dataset(name, (split,), data_dir=data_dir).splits[split]


def refuse_unread(what: str, **fields: Any) -> None:
    """Raises ValueError if a given field of config.dataset has no effect."""
    for field, value in fields.items():
        if value is not None:
            raise ValueError(
                f"dataset.{field}={value} is not read, because {what} does not use it. "
                "To read your own images: --config.dataset.name=folder (or npz, or a "
                "TFDS name)."
            )


def signals(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The images or the values of the fields of a split, (N, *shape, C)."""
    return arrays["image"] if "image" in arrays else arrays["value"]


def sha256(values: np.ndarray) -> str:
    """Digest of the values of images or fields, to tell them from others."""
    digest = hashlib.sha256()
    for start in range(0, len(values), _HASHED_AT_ONCE):  # They may lie in a file.
        part = values[start : start + _HASHED_AT_ONCE]
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def digests(splits: Mapping[str, Arrays]) -> dict[str, str]:
    """Digests of the signals and labels of each split, for `runs.open_run`."""
    return {
        f"{split} split of the data set": sha256(signals(arrays))
        + sha256(arrays["label"])
        for split, arrays in splits.items()
    }


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images -> float32 in [0, 1]; the values of fields are left as they are."""
    if images.dtype != np.uint8:
        return images
    return np.float32(images) / np.float32(255)


def count_batches(
    num_examples: int, batch_size: int, *, what: str = "training images"
) -> int:
    """Batches of an epoch; a remainder that does not fill a batch is dropped.

    Raises:
      ValueError: if there is none.
    """
    if not 0 < batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be between 1 and the {num_examples} {what}, got "
            f"{batch_size}."
        )
    return num_examples // batch_size


def batch_indices(
    seed: int, step: int, *, num_examples: int, batch_size: int
) -> np.ndarray:
    """Indices (batch_size,) of the batch at `step`, in shuffled epochs.

    The result depends only on the arguments: a resumed run needs no state to continue
    with the same batches. A remainder that does not fill a batch is dropped.
    """
    what = "examples of the training split"
    epoch, batch = divmod(step, count_batches(num_examples, batch_size, what=what))
    order = _epoch_order(seed, epoch, num_examples)
    return order[batch * batch_size : (batch + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed, epoch, num_examples):
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def hold_out(num_examples: int, num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of examples that are held out, in random order, and of the others.

    They are independent of a seed: runs of several seeds are compared on the same ones.
    """
    order = np.random.default_rng(0).permutation(num_examples)
    return order[:num_held_out], np.sort(order[num_held_out:])


def _train_test(num_examples, split, test_fraction):
    """Sorted indices of a fixed random partition, for data sets without splits."""
    num_test = max(1, round(num_examples * test_fraction))
    test, train = hold_out(num_examples, num_test)
    return np.sort(test) if split == "test" else train


def _load_digits(splits):
    from sklearn.datasets import load_digits

    digits = load_digits()
    loaded = {}
    for split in splits:
        indices = _train_test(len(digits.images), split, test_fraction=0.2)
        image = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
        loaded[split] = {
            "image": image[..., None],  # (N, 8, 8, 1)
            "label": digits.target[indices].astype(np.int32),
        }
    return loaded, [str(name) for name in digits.target_names], []


def _load_folder(root, splits, image_size, names):
    found = image_folder.find_images(
        root, train_split=names["train"], test_split=names["test"]
    )
    loaded, seen = {}, Counter()
    for split in splits:
        [whole] = found.files if len(found.files) == 1 else [split]
        files, labels = found.files[whole], found.labels[whole]
        if len(found.files) == 1:
            if len(files) < 2:
                raise FileNotFoundError(
                    f"{root} holds 1 image; two are needed for the two splits."
                )
            kept = _train_test(len(files), split, test_fraction=0.1)
            files, labels = [files[i] for i in kept], labels[kept]
        loaded[split] = {"image": _read_files(files, image_size, seen), "label": labels}
    channels = {arrays["image"].shape[-1] for arrays in loaded.values()}
    if channels == {1} and len(splits) < len(SPLITS):
        # One split alone gets the channels that it has together with the other.
        unread = itertools.chain(*found.files.values())
        channels |= set() if all(map(image_folder.is_gray, unread)) else {3}
    if len(channels) > 1:
        for arrays in loaded.values():
            arrays["image"] = _as_rgb(arrays["image"], seen)
    notes = [*found.notes, *(f"{num} {what}" for what, num in seen.items())]
    names = found.class_names
    return loaded, None if names is None else list(names), notes


def _read_files(files, image_size, seen):
    """Reads images of one size as one array; RGB if any of them is."""
    images = []
    for file in files:
        image = read_image(file, min_side=image_size, notes=seen)
        if image_size is not None:
            image = resize_and_crop(image, image_size)
        if not images:
            check_memory(len(files), image.shape, str(files[0].parent))
        elif image.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"images differ in size: {files[0]} is {_size(images[0].shape)}, "
                f"{file} is {_size(image.shape)}. Set --config.dataset.image_size=N to "
                "resize all to N x N pixels."
            )
        images.append(image)
    if len({image.shape[-1] for image in images}) > 1:
        images = [_as_rgb(image, seen) for image in images]
    return np.stack(images)


def _as_rgb(image, seen):
    if image.shape[-1] == 3:
        return image
    seen["gray, read as RGB like the others"] += len(image) if image.ndim == 4 else 1
    return np.repeat(image, 3, axis=-1)


def _load_npz(root, splits, image_size, names):
    del image_size
    stems = {
        path.stem
        for path in root.iterdir()
        if path.suffix == ".npz" and not image_folder.is_hidden(path.name)
    }
    chosen = dict(
        zip(
            SPLITS,
            image_folder.choose_splits(root, stems, names["train"], names["test"]),
            strict=True,
        )
    )
    read, unread = {}, {}
    for split in splits:
        if chosen[split] is None:
            raise FileNotFoundError(
                f"there is no {root / split}.npz; the directory of an npz data set "
                f"holds train.npz and test.npz. It has {some(sorted(stems)) or 'none'}."
            )
        path = root / f"{chosen[split]}.npz"
        read[path], ignored = _read_npz(path)
        unread |= dict.fromkeys(ignored)
    scaling = _scaling({path: arrays["image"] for path, arrays in read.items()})
    loaded = {}
    # A test split of few images may have as many classes as the training split.
    num_classes = max(1000, *(len(arrays["image"]) for arrays in read.values()))
    for split, (path, arrays) in zip(splits, read.items(), strict=True):
        image = arrays["image"]
        if image.dtype != np.uint8:
            image = np.rint(np.float32(image) * np.float32(scaling)).astype(np.uint8)
        labels = arrays.get("label", np.full(len(image), -1))
        labels = _check_labels(labels.reshape(-1), path, num_classes)
        loaded[split] = {"image": image, "label": labels}
    notes = [f"files {chosen['train']}.npz and {chosen['test']}.npz"]
    if any(arrays["image"].dtype != np.uint8 for arrays in read.values()):
        notes.append(f"pixels multiplied by {scaling} and rounded to uint8")
    if max(arrays["image"].max() for arrays in loaded.values()) <= 1:
        notes.append("no pixel is above 1 of 255: if 1 is white, multiply by 255")
    if unread:
        notes.append(f"not read: {some(unread)}")
    return loaded, None, notes


def _read_npz(path):
    """The arrays `image` and `label` of a file, and the names of the others."""
    members = npz.read_names(path)
    headers = npz.read_headers(path, ("image", "label"))
    # What is wrong in the headers is said before anything is allocated.
    _check_headers(path, headers, members)
    return npz.read_arrays(path, headers), sorted(set(members) - headers.keys())


def _check_headers(path, headers, members):
    if "image" not in headers:
        raise ValueError(
            f"{path} needs `image` (N, H, W, C), found {some(members) or 'nothing'}."
        )
    shape, dtype = headers["image"].shape, headers["image"].dtype
    found = f"found {dtype} {shape}"
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        found += "; transpose (N, C, H, W) to (N, H, W, C)"
    elif len(shape) == 3:
        found += "; gray images need a last axis of 1: image[..., None]"
    if (
        len(shape) != 4
        or shape[3] not in (1, 3)
        or 0 in shape
        or dtype.kind not in "buif"
    ):
        raise ValueError(
            f"{path} needs `image` (N, H, W, C) of numbers with C = 1 or 3, {found}."
        )
    check_memory(shape[0], shape[1:], str(path))
    names = ("label", "labels", "y", "target", "targets")
    likely = [name for name in members if name.lower() in names]
    if "label" not in headers:
        if likely:
            raise ValueError(
                f"{path} has no `label`; rename `{likely[0]}` if these are the labels."
            )
        return
    label = headers["label"]
    if label.shape not in (shape[:1], (*shape[:1], 1)) or label.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: `label` must be integers ({shape[0]},), one per image, found "
            f"{label.dtype} {label.shape}."
        )


def _scaling(images):
    """1 if the numbers of all arrays are 0, 1, ..., 255; 255 if they are in [0, 1]."""
    ranges = {}
    for path, image in images.items():
        if image.dtype == np.uint8:
            continue
        low, high = float(image.min()), float(image.max())
        if not math.isfinite(low + high):  # NaN if any number is
            raise ValueError(f"{path}: `image` holds numbers that are not finite.")
        whole = image.dtype.kind in "ui" or bool((image == np.round(image)).all())
        if not (low >= 0 and high <= (255 if whole else 1)):
            raise ValueError(
                f"{path}: `image` of {image.dtype} must be in [0, 1], or whole numbers "
                f"from 0 to 255; its {'whole ' if whole else ''}numbers are from "
                f"{low:.9g} to {high:.9g}."
            )
        ranges[path] = image.dtype.kind in "bf" and high <= 1
    if len(set(ranges.values())) > 1:
        raise ValueError(
            f"{' and '.join(map(str, ranges))} have different scales: one is in "
            "[0, 1], the other in [0, 255]."
        )
    return 255 if any(ranges.values()) else 1


def _check_labels(labels, where, num_classes):
    """Labels as int32, after a check of their range."""
    low, high = int(labels.min()), int(labels.max())
    # Numbers far beyond the number of images are not classes.
    allowed = max(num_classes, len(labels))
    if high >= allowed or low < (-1 if high == -1 else 0):
        raise ValueError(
            f"{where}: labels must be from 0 to {allowed - 1}, or all -1 (no label); "
            f"they are from {low} to {high}."
        )
    return labels.astype(np.int32)


def _load_fashion_mnist(data_dir, splits, image_size, names):
    """Reads the four files of the data set (Xiao et al. 2017, arXiv 1708.07747)."""
    root = data_dir or FASHION_MNIST
    if not any(root.glob("*-ubyte.gz")):
        try:
            return _load_tfds("fashion_mnist", data_dir, splits, image_size, names)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no data set fashion_mnist in {root} or prepared for TFDS; "
                "to get it: apt-get install dataset-fashion-mnist"
            ) from None
    refuse_unread(
        "the data set fashion_mnist",
        **{f"{split}_split": value for split, value in names.items()},
    )
    loaded = {}
    for split in splits:
        prefix, num = {"train": ("train", 60000), "test": ("t10k", 10000)}[split]
        image = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", (num, 28, 28))
        path = root / f"{prefix}-labels-idx1-ubyte.gz"
        label = _read_idx(path, (num,))
        if label.max() >= len(_FASHION_CLASSES):
            raise ValueError(f"{path}: labels must be from 0 to 9, got {label.max()}.")
        loaded[split] = {"image": image[..., None], "label": label.astype(np.int32)}
    return loaded, list(_FASHION_CLASSES), []


def _read_idx(path, shape):
    """A gzipped IDX file of bytes of this shape."""
    # Two zeros, the type of uint8, the number of axes, and their sizes.
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
    size = len(header) + math.prod(shape)
    try:
        with gzip.open(path) as file:
            content = file.read(size + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file: {error}") from None
    if len(content) != size or not content.startswith(header):
        raise ValueError(f"{path} must hold bytes {shape} in the IDX format.")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _load_tfds(name, data_dir, splits, image_size, names):
    import tensorflow_datasets as tfds

    searched = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    searched = str(Path(searched).expanduser())
    try:
        builder = tfds.builder(name, data_dir=searched, file_format="array_record")
    # A wrong version is an AssertionError; some names need packages of their own.
    except (ValueError, AssertionError, ImportError) as error:
        known = isinstance(error, (AssertionError, ImportError))
        why = f" ({str(error).splitlines()[0]})" if known else ""
        raise ValueError(
            f"data set must be digits, folder, npz or a name known to TFDS; got "
            f"{name!r}{why}."
        ) from None
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"data set {name!r} is not prepared under {searched} (set by "
            "--config.dataset.data_dir or TFDS_DATA_DIR). To prepare it: "
            'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{searched}', "
            "file_format='array_record').download_and_prepare()\""
        )
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"data set {name!r} is not a data set of images.")
    chosen = {split: names[split] or split for split in splits}
    _check_tfds_splits(name, builder.info.splits, chosen)
    label = features["label"] if "label" in features else None
    class_names = getattr(label, "names", None)
    loaded = {}
    for split, spec in chosen.items():
        images, labels = _read_tfds(name, builder, spec, image_size)
        labels = _check_labels(
            labels, name, getattr(label, "num_classes", None) or 1000
        )
        loaded[split] = {"image": images, "label": labels}
    notes = [f"{split} split: {spec}" for split, spec in chosen.items() if names[split]]
    return loaded, class_names, notes


def _check_tfds_splits(name, available, chosen):
    ranges = {}
    for split, spec in chosen.items():
        try:
            ranges[split] = {
                (file.filename, file.skip, file.skip + file.take)
                for file in available[spec].file_instructions
                if file.take > 0  # It is negative for "train[5:2]".
            }
        except (KeyError, ValueError):
            raise ValueError(
                f"{name!r} has no split {spec!r}; it has {', '.join(available)}. "
                f"Choose with --config.dataset.{split}_split=NAME; a part of a split "
                "is written as 'train[90%:]'."
            ) from None
        if not ranges[split]:
            raise ValueError(f"the split {spec!r} of {name!r} holds no images.")
    for file, start, stop in ranges.get("train", ()):
        for other, other_start, other_stop in ranges.get("test", ()):
            if file == other and max(start, other_start) < min(stop, other_stop):
                raise ValueError(
                    f"the splits {chosen['train']!r} and {chosen['test']!r} of "
                    f"{name!r} share images. Choose others with "
                    "--config.dataset.train_split and test_split."
                )


def _read_tfds(name, builder, spec, image_size):
    # tfds.data_source is not used, because it would start a download.
    source = builder.as_data_source(split=spec)
    images, labels = [], []
    # In chunks: decoding is batched, and the records are not all in memory at once.
    for start in range(0, len(source), 1000):
        chunk = range(start, min(start + 1000, len(source)))
        for example in source.__getitems__(chunk):
            image = example["image"]
            if image.dtype != np.uint8 or image.ndim != 3:
                raise ValueError(
                    f"the images of {name!r} must be uint8 (H, W, C), found "
                    f"{image.dtype} {image.shape}."
                )
            if image_size is not None and image.shape[-1] in (1, 3):
                image = resize_and_crop(image, image_size)
            if not images:
                check_memory(len(source), image.shape, name)
            images.append(image)
            labels.append(example.get("label", -1))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"the images of {name!r} differ in shape: {sorted(shapes)[:3]}, ... Set "
            "--config.dataset.image_size=N to resize all to N x N pixels."
        )
    labels = np.array(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"the labels of {name!r} must be one integer per image, found "
            f"{labels.dtype} {labels.shape[1:]}."
        )
    return np.stack(images), labels


def check_memory(num: int, shape: Sequence[int], where: str) -> None:
    """Raises ValueError if uint8 images of one shape do not fit into the memory."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = num * math.prod(shape)
    if needed > memory:
        raise ValueError(
            f"{num} images of {_size(shape)} pixels in {where} need "
            f"{needed / 2**30:.0f} GiB, and the machine has {memory / 2**30:.0f} GiB. "
            "Choose a smaller size, such as --config.dataset.image_size=N."
        )


def _check_shapes(source, loaded):
    """Raises ValueError unless all splits have one shape that the networks take."""
    shapes = {split: arrays["image"].shape[1:] for split, arrays in loaded.items()}
    for split, shape in shapes.items():
        if shape[-1] not in (1, 3):
            raise ValueError(
                f"the {split} images of {source} have {shape[-1]} channels, not 1 "
                "(gray) or 3 (RGB)."
            )
    if len(set(shapes.values())) > 1:
        sizes = ", ".join(
            f"{split} {_size(shape)}x{shape[-1]}" for split, shape in shapes.items()
        )
        hint = " To resize all images, set --config.dataset.image_size=N."
        if len({shape[:2] for shape in shapes.values()}) == 1:
            hint = " Convert the images of one split."
        raise ValueError(
            f"the splits of {source} differ in (height x width x channels): "
            f"{sizes}.{hint}"
        )


def _size(shape):
    return "x".join(map(str, shape[:2]))


def _image_digests(arrays):
    return (hashlib.sha256(image.tobytes()).digest() for image in arrays["image"])


def _describe(
    source: str,
    loaded: Mapping[str, Arrays],
    class_names: Sequence[str] | None,
    notes: Sequence[str],
) -> str:
    """One line: images, size, classes with their counts, and notes."""
    first = next(iter(loaded.values()))
    shape = signals(first).shape[1:]
    numbers = " + ".join(f"{len(a['label'])} {split}" for split, a in loaded.items())
    if "image" in first:
        kind = "gray" if shape[-1] == 1 else "RGB"
        parts = [f"{source}: {numbers} images, {_size(shape)} {kind}"]
    else:
        points = "x".join(map(str, shape[:-1]))
        values = "1 value" if shape[-1] == 1 else f"{shape[-1]} values"
        parts = [f"{source}: {numbers} fields of {points} points with {values}"]
    labels = {split: a["label"] for split, a in loaded.items() if a["label"].max() >= 0}
    if not labels:
        parts.append("no labels")
    else:
        num_classes = 1 + max(int(values.max()) for values in labels.values())
        names = class_names or [str(label) for label in range(num_classes)]
        counts = {
            split: np.bincount(values, minlength=len(names))
            for split, values in labels.items()
        }
        each = zip(names, *counts.values(), strict=True)
        listed = some((f"{n} {' + '.join(map(str, c))}" for n, *c in each), 12)
        parts.append(f"{len(names)} classes ({' + '.join(labels)}): {listed}")
        for split in loaded:
            if split not in labels:
                parts.append(f"no labels in {split}")
            elif not counts[split].all():
                missing = [names[i] for i in np.flatnonzero(counts[split] == 0)]
                parts.append(f"no {split} images of {some(missing, 12)}")
    line = "; ".join([*parts, *notes])
    # Names of files may hold line breaks and bytes that are not text.
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in line
    )
