"""experiments.common.data: arrays of all sources, and one error for each mistake."""

import copy
import gzip
import hashlib
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments.common import data

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (6, 4, 5, 3), np.uint8)
IMAGE[0, 0, 0] = 0, 255, 100
LABEL = np.array([0, 1, 2, 0, 1, 2])


def write_npz(folder, test=None, **train):
    np.savez(folder / "train.npz", **train)
    np.savez(folder / "test.npz", **(test or train))


def load_npz(folder, **options):
    return data.load_dataset("npz", data_dir=str(folder), **options)


def test_digits_splits_are_disjoint_and_whole():
    from sklearn.datasets import load_digits

    digits = data.load_dataset("digits")
    train, test = digits.splits["train"], digits.splits["test"]
    assert train["image"].shape == (1438, 8, 8, 1) and len(test["label"]) == 359
    # The 16 grey levels of the source map one to one onto bytes.
    ours = np.concatenate([train["image"], test["image"]])[..., 0]
    theirs = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    order = [np.lexsort(x.reshape(len(x), -1).T) for x in (ours, theirs)]
    np.testing.assert_array_equal(ours[order[0]], theirs[order[1]])
    assert set(np.unique(train["label"])) == set(range(10))
    assert digits.class_names == list("0123456789")
    assert "1438 train + 359 test images, 8x8 gray; 10 classes" in digits.found


@pytest.mark.parametrize(
    "field", [{"data_dir": "/"}, {"train_split": "a"}, {"test_split": "a"}]
)
def test_fields_that_digits_does_not_read_are_refused(field):
    with pytest.raises(ValueError, match=rf"dataset\.{next(iter(field))}=.* not read"):
        data.load_dataset("digits", **field)


def test_digest_in_parts_is_that_of_all_bytes(monkeypatch):
    values = np.random.default_rng(0).random((7, 3))
    expected = hashlib.sha256(values.tobytes()).hexdigest()
    monkeypatch.setattr(data, "_HASHED_AT_ONCE", 3)
    assert data.sha256(values) == data.sha256(values.T.copy().T) == expected


def test_digests_tell_other_signals_and_labels():
    first = data.load_dataset("digits")
    assert data.digests(first.splits) == data.digests(
        data.load_dataset("digits").splits
    )
    for name in ("image", "label"):
        splits = copy.deepcopy(first.splits)
        splits["test"][name][3] += 1
        old, new = data.digests(first.splits), data.digests(splits)
        assert [old[split] != new[split] for split in old] == [False, True]


def test_the_old_name_loads_one_split_and_warns():
    with pytest.warns(DeprecationWarning, match="load_dataset"):
        old = data.load("digits", "test")
    np.testing.assert_array_equal(
        old["image"], data.load_dataset("digits").splits["test"]["image"]
    )


def test_batches_are_shuffled_epochs():
    batches = [
        data.batch_indices(0, step, num_examples=11, batch_size=3) for step in range(6)
    ]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert len(set(first)) == len(set(second)) == 9
    assert not np.array_equal(first, second)
    again = data.batch_indices(0, 4, num_examples=11, batch_size=3)
    np.testing.assert_array_equal(again, batches[4])
    with pytest.raises(ValueError, match="batch_size must be between 1 and the 11"):
        data.batch_indices(0, 0, num_examples=11, batch_size=12)


def test_folder_is_split_in_nine_to_one_and_shares_its_classes(tmp_path):
    images = RNG.integers(0, 256, (20, 4, 6), np.uint8)
    for i, image in enumerate(images):
        name = f"{'ab'[i % 2]}/{i:02d}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    loaded = data.load_dataset("folder", data_dir=str(tmp_path))
    train, test = loaded.splits["train"], loaded.splits["test"]
    assert train["image"].shape == (18, 4, 6, 1) and len(test["image"]) == 2
    assert loaded.class_names == ["a", "b"]
    whole = {image.tobytes(): i % 2 for i, image in enumerate(images)}
    found = {
        image.tobytes(): label
        for split in (train, test)
        for image, label in zip(split["image"], split["label"], strict=True)
    }
    assert found == whole
    # One split alone is the same part.
    only = data.load_dataset("folder", ("test",), data_dir=str(tmp_path))
    np.testing.assert_array_equal(only.splits["test"]["image"], test["image"])


def test_folder_of_other_sizes_is_refused_or_cropped(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (4, 8), (8, 16)]):
        Image.new("RGB", size[::-1], (10, 20, i)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"is 8x8, .* is .*image_size=N"):
        data.load_dataset("folder", data_dir=str(tmp_path))
    splits = data.load_dataset("folder", data_dir=str(tmp_path), image_size=4).splits
    images = np.concatenate([splits["train"]["image"], splits["test"]["image"]])
    assert images.shape == (4, 4, 4, 3)
    assert sorted(images[:, 0, 0, 2]) == [0, 1, 2, 3]
    assert (images == images[:, :1, :1]).all()


def test_folder_with_gray_and_color_is_read_as_color(tmp_path):
    for split, shape in {"train": (5, 6, 3), "val": (5, 6)}.items():
        (tmp_path / split).mkdir()
        for i in range(2):
            pixels = np.full(shape, 40 + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
    loaded = data.load_dataset("folder", data_dir=str(tmp_path))
    assert loaded.splits["test"]["image"].shape == (2, 5, 6, 3)
    assert (loaded.splits["test"]["image"][1] == 41).all()
    assert "splits train/ and val/" in loaded.found
    assert "2 gray, read as RGB like the others" in loaded.found
    alone = data.load_dataset("folder", ["test"], data_dir=str(tmp_path)).splits["test"]
    np.testing.assert_array_equal(alone["image"], loaded.splits["test"]["image"])


def test_one_split_of_a_folder_without_splits_has_the_channels_of_both(tmp_path):
    for i in range(5):
        Image.new("L", (5, 6), i).save(tmp_path / f"{i}.png")
    both = data.load_dataset("folder", data_dir=str(tmp_path)).splits
    _, *others = sorted(int(image[0, 0, 0]) for image in both["train"]["image"])
    for i in others:  # The image of the test split and one of training are left gray.
        Image.new("RGB", (5, 6), (i, i, i)).save(tmp_path / f"{i}.png")
    both = data.load_dataset("folder", data_dir=str(tmp_path)).splits
    for split, images in both.items():
        alone = data.load_dataset("folder", [split], data_dir=str(tmp_path)).splits
        assert images["image"].shape[-1] == 3
        np.testing.assert_array_equal(alone[split]["image"], images["image"])


def test_found_names_a_class_without_images_in_a_split(tmp_path):
    for level, name in enumerate(("train/cat", "train/do\ng", "test/do\ng")):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (3, 3), level).save(tmp_path / name / "0.png")
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    loaded = data.load_dataset("folder", data_dir=str(tmp_path))
    np.testing.assert_array_equal(loaded.splits["test"]["label"], [1])
    assert loaded.found == (
        rf"folder {tmp_path}: 2 train + 1 test images, 3x3 gray; 2 classes "
        r"(train + test): cat 1 + 0, do\ng 1 + 1; no test images of cat; splits train/ "
        "and test/; skipped train/cat/notes.txt (not an image format that Pillow reads)"
    )


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="needs a directory"):
        data.load_dataset("folder")
    with pytest.raises(FileNotFoundError, match="no directory"):
        data.load_dataset("folder", data_dir=str(tmp_path / "absent"))
    Image.new("L", (3, 3)).save(tmp_path / "0.png")
    with pytest.raises(FileNotFoundError, match="1 image; two are needed"):
        data.load_dataset("folder", data_dir=str(tmp_path))
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"1\.png is not a readable image"):
        data.load_dataset("folder", data_dir=str(tmp_path))


def test_more_images_than_memory_are_refused_before_they_are_read(
    tmp_path, monkeypatch
):
    for i in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match="2 images of 8x8 pixels .* need .*image_size"):
        data.load_dataset("folder", data_dir=str(tmp_path))
    loaded = data.load_dataset("folder", data_dir=str(tmp_path), image_size=4)
    assert loaded.splits["train"]["image"].shape == (2, 4, 4, 1)
    # Enlarged images are refused before the first of them is made.
    with pytest.raises(ValueError, match="images of 999999x999999 pixels in digits"):
        data.load_dataset("digits", image_size=999_999)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    write_npz(tmp_path, image=IMAGE)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    loaded = data.load_dataset("npz", data_dir=f"~/{tmp_path.name}")
    np.testing.assert_array_equal(loaded.splits["test"]["image"], IMAGE)


def test_npz_directory(tmp_path):
    write_npz(tmp_path, image=IMAGE, label=LABEL, test={"image": IMAGE[:2]})
    loaded = load_npz(tmp_path)
    train, test = loaded.splits["train"], loaded.splits["test"]
    np.testing.assert_array_equal(train["image"], IMAGE)
    np.testing.assert_array_equal(train["label"], LABEL)
    np.testing.assert_array_equal(test["label"], [-1, -1])
    assert train["label"].dtype == np.int32 and loaded.class_names is None
    assert "3 classes (train): 0 2, 1 2, 2 2; no labels in test" in loaded.found


def test_found_names_shared_images_and_binary_pixels(tmp_path):
    write_npz(tmp_path, image=IMAGE[:4], test={"image": IMAGE[2:]})
    found = load_npz(tmp_path).found
    assert "2 of the test images are also training images" in found
    assert "of 255" not in found
    write_npz(tmp_path, image=IMAGE[:4] % 2, test={"image": IMAGE[4:] % 2})
    loaded = load_npz(tmp_path)
    assert loaded.splits["train"]["image"].max() == 1  # as the file has it
    assert "no pixel is above 1 of 255" in loaded.found
    assert "also training images" not in loaded.found
    # Numbers in [0, 1] of another type are scaled.
    write_npz(tmp_path, image=IMAGE[:4] > 99, test={"image": IMAGE[4:] > 99})
    assert "of 255" not in load_npz(tmp_path).found


def test_npz_splits_in_other_spellings(tmp_path):
    for i, name in enumerate(("Training", "valid", "extra")):
        np.savez(tmp_path / f"{name}.npz", image=IMAGE[i : i + 1])
    splits = load_npz(tmp_path).splits
    np.testing.assert_array_equal(splits["test"]["image"], IMAGE[1:2])
    splits = load_npz(tmp_path, train_split="extra", test_split="Training").splits
    np.testing.assert_array_equal(splits["train"]["image"], IMAGE[2:3])
    np.testing.assert_array_equal(splits["test"]["image"], IMAGE[:1])
    with pytest.raises(ValueError, match="no test split 'nosuch'; there are Training"):
        load_npz(tmp_path, test_split="nosuch")


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: np.float16(image / 255),
        lambda image: np.float64(image) / 255,
        lambda image: np.float32(image),
        lambda image: image.astype(">i8"),
        np.asfortranarray,
    ],
)
def test_npz_of_other_dtypes_has_the_same_pixels(tmp_path, convert):
    write_npz(tmp_path, image=convert(IMAGE), label=LABEL[:, None])
    splits = load_npz(tmp_path).splits
    assert splits["test"]["image"].dtype == np.uint8
    np.testing.assert_array_equal(splits["test"]["image"], IMAGE)
    np.testing.assert_array_equal(splits["test"]["label"], LABEL)


def test_npz_of_booleans_is_black_and_white(tmp_path):
    write_npz(tmp_path, image=IMAGE > 100)
    found = load_npz(tmp_path).splits["train"]["image"]
    np.testing.assert_array_equal(found, np.where(IMAGE > 100, 255, 0))


def test_a_small_test_split_may_have_the_classes_of_the_training_split(tmp_path):
    pixels = np.zeros((3000, 1, 1, 1), np.uint8)
    np.savez(tmp_path / "train.npz", image=pixels, label=np.arange(3000) % 1500)
    np.savez(tmp_path / "test.npz", image=pixels[:2], label=np.array([0, 1499]))
    splits = load_npz(tmp_path).splits
    assert splits["test"]["label"].tolist() == [0, 1499]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": np.moveaxis(IMAGE, -1, 1)},
            r"found uint8 \(6, 3, 4, 5\); transpose",
        ),
        ({"image": IMAGE[..., :2]}, r"C = 1 or 3, found uint8 \(6, 4, 5, 2\)"),
        ({"image": IMAGE[..., 0]}, r"image\[\.\.\., None\]"),
        ({"image": IMAGE[:0]}, r"found uint8 \(0, 4, 5, 3\)"),
        ({"image": IMAGE.astype(object)}, "holds Python objects"),
        ({"image": IMAGE.astype(str)}, "found <U3"),
        ({"image": np.uint16(IMAGE) * 257}, "whole numbers are from 0 to 65535"),
        ({"image": IMAGE / 127.5 - 1}, "numbers are from -1 to 1"),
        ({"image": IMAGE / 2}, "numbers are from 0 to 127.5"),
        ({"image": np.where(IMAGE > 9, IMAGE / 255, np.nan)}, "not finite"),
        ({"images": IMAGE, "labels": LABEL}, "found images, labels"),
        ({"image": IMAGE, "labels": LABEL}, "no `label`; rename `labels`"),
        ({"image": IMAGE, "Label": LABEL}, "no `label`; rename `Label`"),
        ({"image": IMAGE, "label": np.float32(LABEL)}, "must be integers"),
        ({"image": IMAGE, "label": np.eye(3)[LABEL]}, "must be integers"),
        ({"image": IMAGE, "label": LABEL[:3]}, r"integers \(6,\)"),
        ({"image": IMAGE, "label": np.uint32(LABEL) - np.uint32(3)}, "from 4294967293"),
        ({"image": IMAGE, "label": LABEL - 1}, "or all -1"),
        ({"image": IMAGE, "label": LABEL + 999}, "from 0 to 999"),
        ({"label": LABEL}, "found label"),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    write_npz(tmp_path, **arrays)
    with pytest.raises(ValueError, match=rf"train\.npz.*{message}"):
        load_npz(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (IMAGE, IMAGE[:, :3], r"differ in .* train 4x5x3, test 3x5x3\. To resize"),
        (IMAGE, IMAGE[..., :1], r"train 4x5x3, test 4x5x1\. Convert"),
        (IMAGE / 255, np.float32(IMAGE), "different scales"),
    ],
)
def test_npz_whose_splits_differ(tmp_path, train, test, message):
    write_npz(tmp_path, image=train, test={"image": test})
    with pytest.raises(ValueError, match=message):
        load_npz(tmp_path)


def test_npz_of_two_sizes_can_be_resized(tmp_path):
    write_npz(tmp_path, image=IMAGE, test={"image": IMAGE[:, :3]})
    splits = load_npz(tmp_path, image_size=4).splits
    assert splits["test"]["image"].shape == (6, 4, 4, 3)
    # 4 x 5 pixels need no resizing, and the crop of an odd remainder is on the left.
    np.testing.assert_array_equal(splits["train"]["image"], IMAGE[:, :, :4])


def test_npz_damaged_or_absent(tmp_path):
    np.savez(tmp_path / "train.npz", image=np.zeros((9, 8, 8, 3), np.uint8))
    whole = (tmp_path / "train.npz").read_bytes()
    with pytest.raises(FileNotFoundError, match="holds train.npz and test.npz"):
        load_npz(tmp_path)
    (tmp_path / "test.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"test\.npz is not a readable .npz"):
        load_npz(tmp_path)
    (tmp_path / "test.npz").unlink()
    os.mkfifo(tmp_path / "test.npz")
    with pytest.raises(ValueError, match=r"test\.npz is not a regular file"):
        load_npz(tmp_path)


@pytest.mark.parametrize("shape", [(10**12, 8, 8, 3), (1, 1, 1, 1)])
def test_npz_whose_header_lies_allocates_nothing(tmp_path, shape):
    write_npz(tmp_path, image=IMAGE)
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        with archive.open("image.npy", "w") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(64))
    with pytest.raises(
        ValueError, match=r"192 bytes, which do not hold an array .*\(1"
    ):
        load_npz(tmp_path)


def test_tfds_says_where_it_searched_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("mnist", data_dir=str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "download_and_prepare" in str(error.value)
    for name in ("no_such_set", "mnist:9.9.9"):
        with pytest.raises(ValueError, match=f"or a name known to TFDS; got '{name}'"):
            data.load_dataset(name, data_dir=str(tmp_path))


def load_mnist(*args, **options):
    try:
        return data.load_dataset("mnist", *args, **options)
    except FileNotFoundError as error:
        pytest.skip(f"MNIST is not prepared: {error}")


def test_tfds_mnist():
    loaded = load_mnist(("test",))
    test = loaded.splits["test"]
    assert test["image"].shape == (10000, 28, 28, 1)
    assert test["image"].dtype == np.uint8 and test["label"].dtype == np.int32
    # Published counts of the ten digits in the test split.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(test["label"]), counts)
    assert loaded.class_names == list("0123456789")


def test_tfds_splits_are_named_by_the_user():
    loaded = load_mnist(train_split="train[:40]", test_split="train[40:50]")
    both = load_mnist(("train",), train_split="train[:50]", image_size=28)
    for name in ("image", "label"):
        np.testing.assert_array_equal(
            np.concatenate([loaded.splits[split][name] for split in data.SPLITS]),
            both.splits["train"][name],
        )
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        load_mnist(test_split="val")
    with pytest.raises(ValueError, match="share images"):
        load_mnist(test_split="train[90%:]")
    with pytest.raises(ValueError, match="holds no images"):
        load_mnist(test_split="test[5:5]")
    with pytest.raises(ValueError, match=r"split 'train\[5:2\]' .* holds no images"):
        load_mnist(train_split="train[5:2]")


def test_unknown_split():
    with pytest.raises(ValueError, match="split must be one of train, test"):
        data.load_dataset("digits", ("validation",))


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + array.tobytes())


@pytest.fixture
def fashion_mnist(tmp_path):
    """The test files, with images that are gray and labels in turn."""
    shades = np.arange(10000) % 256
    image = np.broadcast_to(np.uint8(shades)[:, None, None], (10000, 28, 28))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", image)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.uint8(shades % 10))
    return tmp_path


def load_fashion_mnist(folder, **options):
    return data.load_dataset("fashion_mnist", ("test",), data_dir=folder, **options)


def test_fashion_mnist_of_the_debian_package(fashion_mnist):
    dataset = load_fashion_mnist(fashion_mnist)
    test = dataset.splits["test"]
    assert test["image"].shape == (10000, 28, 28, 1)
    assert test["label"].dtype == np.int32
    np.testing.assert_array_equal(test["image"][:300, 5, 7, 0], np.arange(300) % 256)
    np.testing.assert_array_equal(test["label"][:10], np.arange(10))
    assert dataset.class_names[9] == "Ankle boot"


def test_damaged_fashion_mnist_is_refused(fashion_mnist):
    with pytest.raises(ValueError, match="test_split=val is not read"):
        load_fashion_mnist(fashion_mnist, test_split="val")
    with pytest.raises(FileNotFoundError, match="no file .*/train-images"):
        data.load_dataset("fashion_mnist", data_dir=fashion_mnist)
    path = fashion_mnist / "t10k-labels-idx1-ubyte.gz"
    for content, message in (
        (np.full(10000, 10, np.uint8), "labels must be from 0 to 9, got 10"),
        (np.zeros(9999, np.uint8), r"must hold bytes \(10000,\) in the IDX format"),
        (b"text", "is not a readable gzip file"),
        (path.read_bytes()[:-20], "is not a readable gzip file"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write_idx(path, content)
        with pytest.raises(ValueError, match=message) as caught:
            load_fashion_mnist(fashion_mnist)
        assert "\n" not in str(caught.value)


def test_missing_fashion_mnist_names_the_package(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="apt-get install dataset-fashion-mnist"
    ):
        load_fashion_mnist(tmp_path)
