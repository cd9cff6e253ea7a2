"""Data sets as arrays in memory: {"image": uint8 (N, H, W, C), "label": int32 (N,)}.

* `digits`: the 1,797 gray 8x8 images of scikit-learn; needs no download.
* `folder`: a directory of PNG or JPEG files, with class sub-folders or without.
* `npz`: a directory with `train.npz` and `test.npz`, each with `image` and optionally
  `label`.
* any other name: an image data set of TensorFlow Datasets, read without TensorFlow.

In a data set without labels all labels are -1.
"""

import functools
import os
import zipfile
from pathlib import Path

import numpy as np

SPLITS = ("train", "test")
_SUFFIXES = {".png", ".jpg", ".jpeg"}

Arrays = dict[str, np.ndarray]


def load(name: str, split: str, *, data_dir: str | None = None) -> Arrays:
    """Loads one split of a data set.

    Args:
      name: `digits`, `folder`, `npz`, or the name of a TFDS image data set.
      split: `train` or `test`.
      data_dir: directory of the data. `folder` and `npz` need it. For TFDS, None means
        TFDS_DATA_DIR or the TFDS default.

    Returns:
      {"image": uint8 (N, H, W, C), "label": int32 (N,)}.

    Raises:
      ValueError: if the split is unknown, or if the files are not an image data set.
      FileNotFoundError: if the data are missing; the message states how to get them.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if name == "digits":
        return _load_digits(split)
    if name not in ("folder", "npz"):
        return _load_tfds(name, split, data_dir)
    if not data_dir:
        raise ValueError(
            f"data set {name!r} needs a directory: --config.dataset.data_dir=PATH"
        )
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"there is no directory {data_dir}.")
    load_directory = _load_folder if name == "folder" else _load_npz
    return load_directory(Path(data_dir), split)


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images -> float32 in [0, 1]."""
    return np.float32(images) / np.float32(255)


def batch_indices(
    seed: int, step: int, *, num_examples: int, batch_size: int
) -> np.ndarray:
    """Indices (batch_size,) of the batch at `step`, in shuffled epochs.

    The result depends only on the arguments: a resumed run needs no state to continue
    with the same batches. A remainder that does not fill a batch is dropped.
    """
    if not 0 < batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be between 1 and the {num_examples} examples of the "
            f"training split, got {batch_size}."
        )
    epoch, batch = divmod(step, num_examples // batch_size)
    order = _epoch_order(seed, epoch, num_examples)
    return order[batch * batch_size : (batch + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed, epoch, num_examples):
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def _train_test(num_examples, split, test_fraction):
    """Sorted indices of a fixed random partition, for data sets without splits."""
    order = np.random.default_rng(0).permutation(num_examples)
    num_test = max(1, round(num_examples * test_fraction))
    return np.sort(order[:num_test] if split == "test" else order[num_test:])


def _load_digits(split):
    from sklearn.datasets import load_digits

    digits = load_digits()
    indices = _train_test(len(digits.images), split, test_fraction=0.2)
    image = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
    return {
        "image": image[..., None],  # (N, 8, 8, 1)
        "label": digits.target[indices].astype(np.int32),
    }


def _load_folder(root, split):
    """Reads root/<split>/... if both exist; otherwise a fixed tenth is the test split.

    The labels are the indices of the class sub-folders, if any, sorted by name.
    """
    has_splits = all((root / name).is_dir() for name in SPLITS)
    top = root / split if has_splits else root
    files = sorted(p for p in top.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if len(files) < (1 if has_splits else 2):
        raise FileNotFoundError(
            f"{top} holds {len(files)} PNG or JPEG files; at least "
            f"{'one is' if has_splits else 'two are'} needed."
        )
    class_names = [p.relative_to(top).parts[0] for p in files if p.parent != top]
    if class_names and len(class_names) < len(files):
        raise ValueError(f"{top} mixes class sub-folders with images outside of them.")
    labels = np.full(len(files), -1, np.int32)
    if class_names:
        labels = np.unique(class_names, return_inverse=True)[1].astype(np.int32)
    if not has_splits:
        kept = _train_test(len(files), split, test_fraction=0.1)
        files, labels = [files[i] for i in kept], labels[kept]
    first = read_image(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        image = read_image(file)
        if image.shape != first.shape:
            raise ValueError(
                f"images differ in (height, width, channels): {files[0]} is "
                f"{first.shape}, {file} is {image.shape}. Resize them first."
            )
        images[i] = image
    return {"image": images, "label": labels}


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image file as uint8 (H, W, C); C is 1 for gray, otherwise 3 (RGB)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                # Pillow would clip these pixels to 8 bits instead of scaling them.
                raise ValueError(
                    f"the mode of its pixels is {image.mode}; save it with 8 bits."
                )
            grey = image.mode in ("1", "L", "LA")
            array = np.asarray(image.convert("L" if grey else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"there is no image file {path}.") from None
        raise ValueError(f"{path} is not a readable image: {error}") from None
    return array[..., None] if grey else array


def _load_npz(root, split):
    path = root / f"{split}.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; the directory of an npz data set holds "
            "train.npz and test.npz."
        )
    try:
        # Open the file here: np.load does not close a truncated file that it has opened
        # itself.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {k: file[k] for k in ("image", "label") if k in file.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    image = arrays.get("image")
    if image is None or image.ndim != 4 or image.dtype != np.uint8 or not len(image):
        found = "nothing" if image is None else f"{image.dtype} {image.shape}"
        raise ValueError(f"{path} needs `image` uint8 (N, H, W, C), found {found}.")
    label = arrays.get("label", np.full(len(image), -1, np.int32))
    if label.shape != (len(image),) or label.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: `label` must be integers ({len(image)},), one per image, "
            f"found {label.dtype} {label.shape}."
        )
    return {"image": image, "label": label.astype(np.int32)}


def _load_tfds(name, split, data_dir):
    import tensorflow_datasets as tfds

    searched = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    searched = str(Path(searched).expanduser())
    try:
        builder = tfds.builder(name, data_dir=searched, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(
            f"data set must be digits, folder, npz or a name known to TFDS; got "
            f"{name!r}."
        ) from None
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"data set {name!r} is not prepared under {searched} (set by "
            "--config.dataset.data_dir or TFDS_DATA_DIR). To prepare it: "
            'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{searched}', "
            "file_format='array_record').download_and_prepare()\""
        )
    # tfds.data_source is not used, because it would start a download.
    source = builder.as_data_source(split=split)
    if "image" not in source.dataset_info.features:
        raise ValueError(f"data set {name!r} is not a data set of images.")
    images, labels = [], []
    # In chunks: decoding is batched, and the records are not all in memory at once.
    for start in range(0, len(source), 1000):
        chunk = range(start, min(start + 1000, len(source)))
        for example in source.__getitems__(chunk):
            images.append(example["image"])
            labels.append(example.get("label", -1))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"the images of {name!r} differ in shape: {sorted(shapes)[:3]}, ..."
        )
    return {"image": np.stack(images), "label": np.array(labels, np.int32)}
