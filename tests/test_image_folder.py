"""experiments.common.image_folder: layouts of folders, and pixels of image files."""

import os
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from experiments.common import image_folder


def write(root, *names, color=0):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), color).save(path)


def layout(root, **options):
    """{split: {relative name: class}}, and the notes as one string."""
    found = image_folder.find_images(root, **options)
    names = (*(found.class_names or ()), None)
    splits = {
        split: {
            str(file.relative_to(root)): names[label]
            for file, label in zip(files, found.labels[split], strict=True)
        }
        for split, files in found.files.items()
    }
    return splits, "; ".join(found.notes)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.png"], {"all": [None, None]}),
        (["cat/a.png", "dog/s0/b.png"], {"all": ["cat", "dog"]}),
        (["images/cat/a.png", "images/dog/b.png"], {"all": ["cat", "dog"]}),
        (["x/y/a.png", "x/y/b.png"], {"all": [None, None]}),
        (["train/a.png", "test/b.png"], {"train": [None], "test": [None]}),
        (["train/images/a.png", "test/b.png"], {"train": [None], "test": [None]}),
        (
            ["data/train/cat/a.png", "data/train/dog/b.png", "data/val/dog/c.png"],
            {"train": ["cat", "dog"], "test": ["dog"]},
        ),
        (["train/cat/a.png", "train/dog/b.png"], {"train": ["cat", "dog"]}),
        (
            ["train/train/cat/a.png", "train/train/dog/b.png", "test/test/c.png"],
            {"train": ["cat", "dog"], "test": [None]},
        ),
        # A class may be called train where the splits are known already.
        (
            ["train/bus/a.png", "train/train/b.png", "test/train/c.png"],
            {"train": ["bus", "train"], "test": ["train"]},
        ),
        (
            ["seg_train/seg_train/sea/a.png", "seg_test/seg_test/sea/b.png"],
            {"train": [None], "test": [None]},
        ),
    ],
)
def test_layouts(tmp_path, names, expected):
    write(tmp_path, *names)
    splits, _ = layout(tmp_path)
    assert {split: list(found.values()) for split, found in splits.items()} == expected
    assert sorted(name for found in splits.values() for name in found) == sorted(names)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAINING_SET", "test-set"),
        ("train_images", "validation images"),
        ("train2017", "val2017"),
        ("train", "valid"),
        ("train", "Validation"),
        ("train", "dev"),
    ],
)
def test_spellings_of_splits(tmp_path, train, test):
    for name in ("cat", "dog"):
        write(tmp_path, f"{train}/{name}/0.png", f"{test}/{name}/1.png")
    splits, notes = layout(tmp_path)
    assert list(splits) == ["train", "test"]
    assert set(splits["test"]) == {f"{test}/cat/1.png", f"{test}/dog/1.png"}
    assert f"splits {train}/ and {test}/" in notes


def test_validation_is_read_only_without_a_test_split_or_by_name(tmp_path):
    write(tmp_path, "train/a.png", "test/b.png", "val/c.png", "sample.png")
    splits, notes = layout(tmp_path)
    assert splits["test"] == {"test/b.png": None}
    assert "not read: files (1 images), val/ (1 images)" in notes
    splits, _ = layout(tmp_path, test_split="val")
    assert splits["test"] == {"val/c.png": None}
    with pytest.raises(
        ValueError, match="no train split 'fold'; there are test, train"
    ):
        layout(tmp_path, train_split="fold")
    with pytest.raises(ValueError, match="both 'test'"):
        layout(tmp_path, train_split="test", test_split="test")


def test_splits_with_names_of_the_user(tmp_path):
    write(tmp_path, "x/fold1/cat/a.png", "x/fold1/dog/b.png", "x/fold2/dog/c.png")
    splits, _ = layout(tmp_path, train_split="fold1", test_split="fold2")
    assert splits["test"] == {"x/fold2/dog/c.png": "dog"}
    assert list(splits["train"].values()) == ["cat", "dog"]


def test_both_splits_share_one_numbering(tmp_path):
    write(tmp_path, "train/b/0.png", "train/c/0.png", "test/a/0.png", "test/c/0.png")
    (tmp_path / "test" / "b" / "empty").mkdir(parents=True)
    found = image_folder.find_images(tmp_path)
    assert found.class_names == ("a", "b", "c")
    assert found.labels["train"].tolist() == [1, 2]
    assert found.labels["test"].tolist() == [0, 2]
    assert found.labels["test"].dtype == np.int32
    assert "no images in test/b/" in found.notes


def test_classes_that_are_numbers_are_ordered_by_number(tmp_path):
    write(tmp_path, *(f"{i}/0.png" for i in range(12)))
    assert image_folder.find_images(tmp_path).class_names == tuple(map(str, range(12)))


def test_code_points_of_one_name_are_one_class(tmp_path):
    write(tmp_path, "train/\u00e4/0.png", "train/b/0.png", "test/a\u0308/0.png")
    found = image_folder.find_images(tmp_path)
    assert found.class_names == ("b", "\u00e4")
    assert found.labels["test"].tolist() == [1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], r"holds no images .* skipped notes.txt \(not an image format"),
        (["a.png", "cat/b.png"], "mixes class sub-folders with images outside"),
        (["test/cat/a.png", "test/dog/b.png"], "split test/ but no training split"),
        (["bus/a.png", "train/b.png"], "outside of its only split train/, in bus/"),
        (["Train/a.png", "training/b.png"], "several train splits: Train, training"),
        (["train/a.png", "test/b.txt"], "test holds no images that can be read"),
        (["cat/train/a.png", "dog/val/b.png"], "splits inside of classes"),
        (["trainA/a.png", "testA/b.png", "trainB/c.png"], "look like splits: testA"),
        (["train/a/0.png", "train/b/0.png", "test/c/0.png"], "no class in common"),
    ],
)
def test_an_ambiguous_layout_is_refused(tmp_path, names, message):
    write(tmp_path, *(name for name in names if name.endswith("png")))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        image_folder.find_images(tmp_path)


def test_hidden_and_machine_made_entries_are_skipped_and_named(tmp_path):
    images = {"cat/a.png": "cat", "dog/b.PNG": "dog", "dog/c.webp": "dog"}
    write(
        tmp_path,
        *images,
        ".ipynb_checkpoints/a-checkpoint.png",
        "cat/.ipynb_checkpoints/a-checkpoint.png",
        "__MACOSX/cat/a.png",
        "@eaDir/a.png",
        "cat/._a.png",
    )
    for name in ("Thumbs.db", "cat/.DS_Store", "desktop.ini", "labels.csv"):
        (tmp_path / name).touch()
    splits, notes = layout(tmp_path)
    assert splits == {"all": images}
    assert "labels.csv (not an image format that Pillow reads)" in notes
    assert "and 5 more (hidden or made by a program)" in notes


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    write(tmp_path, "store/a.png", "set/dog/b.png")
    root = tmp_path / "set"
    (root / "cat").symlink_to(tmp_path / "store")
    (root / "again").symlink_to(root / "dog")
    (root / "dog" / "loop").symlink_to(root)
    (root / "dog" / "c.png").symlink_to(tmp_path / "store" / "a.png")
    (root / "dog" / "broken.png").symlink_to(tmp_path / "absent.png")
    (root / "dog" / "self.png").symlink_to(root / "dog" / "self.png")
    os.mkfifo(root / "dog" / "pipe.png")
    splits, notes = layout(root)
    assert splits["all"] == {"cat/a.png": "cat", "dog/b.png": "dog", "dog/c.png": "dog"}
    for words in (
        "dog/broken.png, dog/self.png (a broken link)",
        "dog/pipe.png (not a regular file)",
        "again -> dog/, dog/loop -> ./ (the same folder, read already)",
    ):
        assert words in notes


def test_a_test_split_that_is_the_training_split_is_not_read(tmp_path):
    write(tmp_path, *(f"train/{name}.png" for name in "abc"))
    (tmp_path / "test").symlink_to(tmp_path / "train")
    splits, notes = layout(tmp_path)
    assert list(splits) == ["train"] and "test -> train/ (the same" in notes


RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GRAY = RGB[..., 0]


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.png", Image.fromarray(RGB), RGB),
        ("a.webp", Image.fromarray(RGB), RGB),
        ("a.tif", Image.fromarray(RGB), RGB),
        ("a.bmp", Image.fromarray(RGB), RGB),
        ("a.ppm", Image.fromarray(RGB), RGB),
        ("gray.png", Image.fromarray(GRAY), GRAY[..., None]),
        ("bit.png", Image.fromarray(GRAY > 99), 255 * np.uint8(GRAY > 99)[..., None]),
        (
            "palette.png",
            Image.fromarray(GRAY).convert("P"),
            np.repeat(GRAY[..., None], 3, -1),
        ),
        # Pillow's formula, without a color profile: R = 255 - C where K is 0.
        ("cmyk.tif", Image.fromarray(RGB).convert("CMYK"), RGB),
    ],
)
def test_pixels_of_each_format(tmp_path, name, image, expected):
    options = {"lossless": True} if name.endswith("webp") else {}
    image.save(tmp_path / name, **options)
    notes = Counter()
    found = image_folder.read_image(tmp_path / name, notes=notes)
    assert found.dtype == np.uint8 and not notes
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "RGB", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, 4:] = 255
    options = {}
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([RGB, alpha]))
    elif mode == "LA":
        image = Image.merge("LA", [Image.fromarray(x) for x in (GRAY, alpha)])
    else:
        # One color, or one entry of the palette, is transparent.
        pixels = np.where(alpha[..., None] == 255, RGB // 2, 200)
        image = Image.fromarray(pixels if mode == "RGB" else pixels[..., 0])
        image = image if mode != "P" else image.convert("P")
        options["transparency"] = (200, 200, 200) if mode == "RGB" else 200
    image.save(tmp_path / "a.png", **options)
    notes = Counter()
    found = image_folder.read_image(tmp_path / "a.png", notes=notes)
    assert (found[:, :4] == 255).all()
    opaque = np.asarray(image.convert("RGB"))[:, 4:]
    np.testing.assert_array_equal(found[:, 4:], opaque[..., : found.shape[-1]])
    assert notes == {"with transparency, composited on white": 1}


def _write_png(path, rows, *, depth, kind, transparent=b""):
    """Writes rows of packed pixels by the specification of PNG (ISO 15948)."""

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    width = 8 * len(rows[0]) // (depth * {0: 1, 2: 3, 4: 2}[kind])
    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": transparent}
    chunks |= {b"IDAT": zlib.compress(b"".join(b"\0" + r for r in rows)), b"IEND": b""}
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(chunk(*c) for c in chunks.items() if c[1] or c[0] == b"IEND")
    )


def test_transparent_color_of_another_depth(tmp_path):
    # The gray levels 0, 1, 2, 3 of 2 bits, of which level 1 is transparent.
    gray = {"depth": 2, "kind": 0, "transparent": struct.pack(">H", 1)}
    _write_png(tmp_path / "gray.png", [bytes([0b00011011])], **gray)
    found = image_folder.read_image(tmp_path / "gray.png")
    assert found[0, :, 0].tolist() == [0, 255, 170, 255]
    colors = struct.pack(">6H", 0x0102, 0x2000, 0, 0x0302, 0x2000, 0)
    deep = {"depth": 16, "kind": 2, "transparent": colors[:6]}
    _write_png(tmp_path / "color.png", [colors], **deep)
    found = image_folder.read_image(tmp_path / "color.png")
    assert found[0].tolist() == [[255, 255, 255], [3, 32, 0]]


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 255, 128)).save(tmp_path / "a.png")
    expected = 255 + (np.array([0, 100, 255]) - 255) * 128 / 255
    found = image_folder.read_image(tmp_path / "a.png")
    np.testing.assert_allclose(found[0, 0], expected, atol=1)


# What a viewer does with each orientation of Exif.
_UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
}


# Pillow maps uncompressed gray pixels of TIFF into memory, but not colors.
@pytest.mark.parametrize("image", [RGB, GRAY], ids=["rgb", "gray"])
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_orientation_of_a_camera_is_applied(tmp_path, image, suffix):
    for orientation, turn in _UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(image).save(path, exif=exif)
        found = image_folder.read_image(path)
        np.testing.assert_array_equal(found, turn(np.atleast_3d(image)))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(x) for x in (GRAY, 255 - GRAY)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    notes = Counter()
    found = image_folder.read_image(tmp_path / "a.tif", notes=notes)
    np.testing.assert_array_equal(found[..., 0], GRAY)
    assert notes == {"with several frames, the first read": 1}


def test_files_that_are_refused(tmp_path):
    Image.fromarray(np.uint16(GRAY) * 257).save(tmp_path / "deep.png")
    with_alpha = np.stack([np.uint16(GRAY) * 257, np.full_like(GRAY, 65535, ">u2")], -1)
    rows = [row.astype(">u2").tobytes() for row in with_alpha]
    _write_png(tmp_path / "deep_alpha.png", rows, depth=16, kind=4)
    Image.fromarray(np.float32(GRAY)).save(tmp_path / "float.tif")
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    # Pillow would start Ghostscript, which executes the file.
    Image.fromarray(RGB).save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        "deep.png": r"more than 8 bits \(mode I;16\)",
        "deep_alpha.png": r"more than 8 bits \(mode LA;16B\)",
        "float.tif": r"more than 8 bits \(mode F\)",
        "truncated.png": "truncated",
        "empty.png": "cannot identify",
        "program.png": "cannot identify",
        "pipe.png": "not a regular file",
    }.items():
        with pytest.raises(ValueError, match=f"{name} is not a readable .*{message}"):
            image_folder.read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image file"):
        image_folder.read_image(tmp_path / "absent.png")


def test_an_image_of_too_many_pixels_is_reduced_or_refused(tmp_path, monkeypatch):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    large = Image.fromarray(np.tile(ramp, (48, 1)))
    large.save(tmp_path / "a.jpg", quality=100)
    large.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    notes = Counter()
    # A quarter is the smallest size of at least 10 pixels.
    found = image_folder.read_image(tmp_path / "a.jpg", min_side=10, notes=notes)
    assert found.shape == (12, 16, 1)
    assert notes == {"decoded at a fraction of their size": 1}
    np.testing.assert_allclose(found[0, :, 0], ramp.reshape(16, 4).mean(1), atol=4)
    for name, side in (("a.jpg", None), ("a.jpg", 40), ("a.png", 10)):
        with pytest.raises(ValueError, match="64x48 pixels are more than the limit"):
            image_folder.read_image(tmp_path / name, min_side=side)


def test_resize_and_crop():
    image = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    # The shorter side has the size already: only the crop remains.
    np.testing.assert_array_equal(image_folder.resize_and_crop(image, 4), image[:, 3:7])
    # A ramp stays a ramp; its ends are out of the crop.
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], 8, 1)
    found = image_folder.resize_and_crop(ramp, 4)  # of 12 rows, 4 to 7
    np.testing.assert_allclose(found[:, 0, 0], 10 * (0.5 + 2 * np.arange(4, 8)), atol=1)
