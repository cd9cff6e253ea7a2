"""Image files, and folders of them: which files are read, as which split and class.

A folder is laid out in one of these ways; CLASS stands for the name of a class:

    x.png                    no splits, no classes
    CLASS/x.png              classes; deeper sub-folders belong to their class
    train/x.png              splits without classes
    train/CLASS/x.png        splits with classes

Any of them may lie inside one wrapping folder, as archives often have it.
"""

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SPLIT_NAME = re.compile(
    r"((?P<train>train|training|trn|tr)|(?P<test>test|testing|tst)"
    r"|(?P<validation>val|valid|validation|validate|dev|eval|evaluation|holdout|heldout))"
    r"(set|data|split|images?|imgs?|folder|dir)?((19|20)\d\d)?"
)
_MACHINE_MADE = {
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
# Pillow recognizes these without a reader of its own; for EPS it runs Ghostscript,
# which executes the file.
_UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class ImageFolder(NamedTuple):
    """The images of a folder.

    Attributes:
      files: {split: paths}; the split is `train`, `test` or, without splits, `all`.
      labels: {split: int32 (N,)}; -1 without classes.
      class_names: the names of the classes, or None without classes.
      notes: what the user has to know: the splits used, what was skipped and why.
    """

    files: dict[str, list[Path]]
    labels: dict[str, np.ndarray]
    class_names: tuple[str, ...] | None
    notes: list[str]


def find_images(
    root: Path, *, train_split: str | None = None, test_split: str | None = None
) -> ImageFolder:
    """Finds the images of a folder, their splits and their classes.

    Links are followed, and each folder is read once. Hidden and machine-made entries
    are skipped. Both splits share one numbering of the classes, in the order of their
    names, or of their numbers if all names are numbers.

    Args:
      root: the folder.
      train_split: name of the sub-folder with the training images; None looks for
        `train` in its usual spellings.
      test_split: the same for the test images; None looks for `test`, then for `val`.

    Raises:
      FileNotFoundError: if the folder or a split has no images.
      ValueError: if the layout is ambiguous.
    """
    images, folders, skipped = _walk(root)
    notes = []
    if skipped:
        notes.append(f"skipped {_group(skipped)}")
    if not images:
        what = "; ".join([f"{root} holds no images that can be read", *notes])
        raise FileNotFoundError(f"{what}.")
    filled = {image[:depth] for image in images for depth in range(len(image))}
    # A folder in an empty folder is not named.
    empty = [f for f in folders if f not in filled and f[:-1] in filled]
    if empty:
        named = some("/".join(folder) + "/" for folder in empty)
        notes.append(f"no images in {named}")
    chosen = {train_split, test_split} - {None}
    prefix = _wrapping_folder(images, folders, chosen)
    base, depth = root.joinpath(*prefix), len(prefix)
    inside, splits_note = _divide(
        base,
        [image[depth:] for image in images],
        _children(folders, prefix),
        train_split,
        test_split,
    )
    notes[:0] = splits_note
    files = {
        split: [base.joinpath(*top, *parts) for parts in found]
        for split, (top, found) in inside.items()
    }
    classes = _classes(base, inside)
    names = sorted({name for found in classes.values() for name in found or ()})
    if names and all(re.fullmatch("[0-9]+", name) for name in names):
        names.sort(key=lambda name: (int(name), name))
    numbers = {name: i for i, name in enumerate(names)}
    labels = {
        split: np.array(
            [-1] * len(files[split]) if found is None else [numbers[n] for n in found],
            np.int32,
        )
        for split, found in classes.items()
    }
    return ImageFolder(files, labels, tuple(names) or None, notes)


def choose_splits(
    root: Path, names: set[str], train_split: str | None, test_split: str | None
) -> tuple[str | None, str | None]:
    """The names of the training and the test split among `names`, or None.

    Args:
      root: the folder, for messages.
      names: names of its sub-folders or files.
      train_split: the name that the user chose; None looks for the usual spellings.
      test_split: the same for the test split; without one, validation serves as test.

    Raises:
      ValueError: if a chosen name is absent, or if several names are of one split.
    """
    train = _pick(root, names, "train", train_split)
    test = _pick(root, names, "test", test_split)
    if test is None:
        test = _pick(root, names, "validation", None, without=train)
    if train is not None and train == test:
        raise ValueError(f"train_split and test_split are both {train!r}.")
    return train, test


def is_hidden(name: str) -> bool:
    """Whether an entry is hidden or made by a program, such as .DS_Store."""
    return name.startswith(".") or name.lower() in _MACHINE_MADE


def _walk(root):
    """Relative parts of images and folders, sorted, and {parts: reason} of the rest.

    Real folders are read before linked ones, so that the names of real folders win.
    """
    formats = _suffixes()
    images, folders, skipped = [], [], {}
    seen = {}
    pending, links = [()], []
    while pending or links:
        parts = pending.pop() if pending else links.pop(0)
        folder = root.joinpath(*parts)
        found = os.stat(folder)
        other = seen.setdefault((found.st_dev, found.st_ino), parts)
        if other is not parts:
            pair = f"{'/'.join(parts)} -> {'/'.join(other) or '.'}/"
            skipped[pair,] = "the same folder, read already"
            continue
        folders.append(parts)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = (*parts, entry.name)
            if is_hidden(entry.name):
                skipped[path] = "hidden or made by a program"
            elif os.path.isdir(entry.path):  # false for a link to itself
                (links if entry.is_symlink() else pending).append(path)
            elif not os.path.isfile(entry.path):
                link = entry.is_symlink() and not os.path.exists(entry.path)
                skipped[path] = "a broken link" if link else "not a regular file"
            elif Path(entry.name).suffix.lower() not in formats:
                skipped[path] = "not an image format that Pillow reads"
            else:
                images.append(path)
    return sorted(images), sorted(folders), skipped


def _wrapping_folder(images, folders, chosen):
    """The parts shared by all images, down to the level of the splits or classes."""
    prefix = ()
    while True:
        depth = len(prefix)
        names = _children(folders, prefix)
        heads = {image[depth] for image in images if len(image) > depth + 1}
        if names & chosen or _roles(names) or len(heads) != 1:
            return prefix
        if any(len(image) == depth + 1 for image in images):
            return prefix
        prefix = (*prefix, *heads)


def _children(folders, prefix):
    depth = len(prefix)
    return {f[depth] for f in folders if len(f) > depth and f[:depth] == prefix}


def _divide(base, images, names, train_split, test_split):
    """{split: (parts of its folder, images below)} and a note on the splits."""
    train, test = choose_splits(base, names, train_split, test_split)
    if train is None and test is None:
        alike = sorted(n for n in names if re.match("(?i)train|test", n))
        if len({name[:2].lower() for name in alike}) == 2:
            raise ValueError(
                f"{base} has folders that look like splits: {some(alike)}. Name two: "
                "--config.dataset.train_split=NAME and test_split=NAME; if they are "
                "classes, rename them."
            )
        return {"all": ((), images)}, ["a fixed tenth is the test split"]
    if train is None:
        raise ValueError(
            f"{base} has the split {test}/ but no training split such as train/. "
            f"Name it: --config.dataset.train_split=NAME; if {test} is a class, "
            "rename the folder."
        )
    outside = [image for image in images if image[0] not in (train, test)]
    unread = Counter(f"{i[0]}/" if len(i) > 1 else "files" for i in outside)
    if test is None and outside:
        raise ValueError(
            f"{base} has images outside of its only split {train}/, in "
            f"{some(unread)}. Put all images into train/ and test/; if {train} is a "
            "class, rename the folder."
        )
    inside = {}
    for split, name in {"train": train, "test": test}.items():
        if name is None:
            continue
        inside[split] = (name,), [i[1:] for i in images if len(i) > 1 and i[0] == name]
        if not inside[split][1]:
            raise FileNotFoundError(
                f"{base / name} holds no images that can be read; it is the {split} "
                "split."
            )
    if test is None:
        return inside, [f"a fixed tenth of {train}/ is the test split"]
    notes = [f"splits {train}/ and {test}/"]
    if unread:
        listed = some(f"{name} ({num} images)" for name, num in unread.items())
        notes.append(f"outside of the splits and not read: {listed}")
    return inside, notes


def _pick(base, names, role, wanted, without=None):
    if wanted is not None:
        if wanted not in names:
            raise ValueError(
                f"{base} has no {role} split {wanted!r}; there "
                f"{'are' if len(names) > 1 else 'is'} {some(sorted(names)) or 'none'}."
            )
        return wanted
    roles = _roles(names)
    found = sorted(n for n, r in roles.items() if r == role and n != without)
    if len(found) > 1:
        raise ValueError(
            f"{base} has several {role} splits: {', '.join(found)}. Choose with "
            f"--config.dataset.{'train' if role == 'train' else 'test'}_split=NAME."
        )
    return found[0] if found else None


def _classes(base, inside):
    """{split: the class of each image, or None without classes}."""
    images = {split: found for split, (_, found) in inside.items()}
    stripped = True
    while stripped:
        heads = {
            split: {i[0] if len(i) > 1 else None for i in found}
            for split, found in images.items()
        }
        union = set().union(*heads.values()) - {None}
        stripped = [
            split
            for split, names in heads.items()
            if len(names) == 1
            and None not in names
            # The only folder of all images, or a repeated name such as train/train/.
            and (len(union) == 1 or inside[split][0] == (*names,))
        ]
        for split in stripped:
            images[split] = [i[1:] for i in images[split]]
    classes = {}
    for split, found in images.items():
        where = base if split == "all" else f"the {split} split of {base}"
        depths = {len(i) > 1 for i in found}
        if len(depths) > 1:
            raise ValueError(f"{where} mixes class sub-folders with images outside.")
        for image in found:
            if len(image) > 2 and _role(image[1]):
                raise ValueError(
                    f"{where} has splits inside of classes ({image[0]}/{image[1]}/). "
                    f"Put the splits on top: {image[1]}/{image[0]}/."
                )
        # An archive from macOS may spell the same letters with other code points.
        names = [unicodedata.normalize("NFC", i[0]) for i in found]
        classes[split] = names if True in depths else None
    train, test = classes.get("train"), classes.get("test")
    if train and test and not set(train) & set(test):
        raise ValueError(
            f"the splits of {base} have no class in common: {some(sorted(set(train)))}"
            f" in training, {some(sorted(set(test)))} in test."
        )
    return classes


def _role(name):
    match = _SPLIT_NAME.fullmatch(re.sub(r"[\W_]", "", name.lower()))
    return match and next(k for k, v in match.groupdict().items() if v)


def _roles(names):
    """{name: train, test or validation} of those names that are names of splits."""
    # The names may start alike, as seg_train and seg_test do.
    start = re.match(r".*[\W_]|", os.path.commonprefix(list(names)))[0]
    start = start if len(names) > 1 else ""
    roles = {name: _role(name) or _role(name[len(start) :]) for name in names}
    return {name: role for name, role in roles.items() if role}


def _group(skipped):
    """A summary of {parts: reason}: the first names of each reason."""
    reasons = {}
    for parts, reason in skipped.items():
        reasons.setdefault(reason, []).append("/".join(parts))
    return ", ".join(f"{some(paths)} ({reason})" for reason, paths in reasons.items())


def some(names: Iterable[str], num: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - num} more"] if len(names) > num else []
    return ", ".join([*names[:num], *more])


def _suffixes():
    from PIL import Image

    Image.init()
    readable = {*Image.OPEN, "MPO"} - _UNREAD
    return {s for s, name in Image.registered_extensions().items() if name in readable}


def read_image(
    path: str | Path, *, min_side: int | None = None, notes: Counter | None = None
) -> np.ndarray:
    """Reads an image file of any format that Pillow decodes, as uint8 (H, W, C).

    C is 1 for gray images and 3 (RGB) for all others. The EXIF orientation is applied.
    Transparent pixels are composited on white. CMYK becomes RGB by Pillow's formula,
    without a color profile. Color channels of 16 bits keep their 8 high bits; gray
    images of 16 or more bits are refused, because their range is not known. Of an
    animation the first frame is read.

    Args:
      path: the file.
      min_side: side in pixels that the caller needs. A JPEG file of more pixels than
        PIL.Image.MAX_IMAGE_PIXELS is decoded at 1/2, 1/4 or 1/8 of its size if both
        sides keep this length. Other images of that size are refused.
      notes: counts the images that were composited, cut to a frame, or reduced.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if it is not a readable image.
    """
    from PIL import ImageOps

    notes = Counter() if notes is None else notes
    path = Path(path).expanduser()
    try:
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file.")
        with _open(path) as opened:
            _reduce(opened, min_side, notes)
            if opened.format == "PNG":
                _convert_depth(opened)
            if getattr(opened, "is_animated", False):
                notes["with several frames, the first read"] += 1
            array = _to_array(ImageOps.exif_transpose(opened), notes)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file {path}.") from None
    # The readers of Pillow raise errors of many types for damaged files.
    except Exception as error:
        raise ValueError(f"{path} is not a readable image: {error}") from None
    return array


def is_gray(path: Path) -> bool:
    """Whether `read_image` gives one channel, from the header alone.

    True for a file that is not an image: only `read_image` says what is wrong with it.
    """
    try:
        with _open(path) as opened:
            return opened.mode in _GRAY
    except Exception:  # As in `read_image`.
        return True


# Modes of Pillow.
_GRAY = ("1", "L", "LA", "La")


def _open(path):
    from PIL import Image

    # The size is checked after the reduction, which Pillow does not wait for.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        Image.init()
        image = Image.open(path, formats=sorted(Image.OPEN.keys() - _UNREAD))
        # Pillow would map the pixels of an uncompressed file into memory. It scrambles
        # those of a TIFF that is turned, because it exchanges the sides before.
        image.filename = ""
        return image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reduce(image, min_side, notes):
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        return
    size = image.size
    if min_side is not None:
        image.draft(None, (min_side, min_side))
    if image.width * image.height > limit:
        raise ValueError(
            f"its {size[0]}x{size[1]} pixels are more than the limit of "
            f"{limit / 1e6:.0f} million; reduce it first."
        )
    notes["decoded at a fraction of their size"] += 1


def _convert_depth(image):
    """Makes the transparent color of a PNG file one of 8 bits, as its pixels become.

    Pillow leaves it as it is stored, and so finds no such pixels.
    """
    stored = image.tile[0].args
    if stored == "LA;16B":  # Pillow would read it as a color image.
        _refuse_depth(stored)
    color = image.info.get("transparency")
    if color is None:
        return
    if stored in ("L;2", "L;4"):
        color *= {"L;2": 85, "L;4": 17}[stored]
    elif stored == "RGB;16B":
        color = tuple(value >> 8 for value in color)
    image.info["transparency"] = color


def _refuse_depth(mode):
    raise ValueError(
        f"its gray pixels have more than 8 bits (mode {mode}); scale them and save 8 "
        "bits."
    )


def _to_array(image, notes):
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # Pillow would clip these pixels to 8 bits instead of scaling them.
        _refuse_depth(image.mode)
    gray = image.mode in _GRAY
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes["with transparency, composited on white"] += 1
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("L" if gray else "RGB"))
    return array[..., None] if gray else array


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` (bicubic) and crops the center, (S, S, C)."""
    if image.shape[:2] == (size, size):
        return image
    from PIL import Image

    height, width, channels = image.shape
    if min(height, width) != size:
        scale = size / min(height, width)
        height, width = (max(size, round(side * scale)) for side in (height, width))
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        image = np.asarray(resized).reshape(height, width, channels)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]
