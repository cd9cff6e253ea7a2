"""experiments.common.data: arrays of all sources, and one error for each mistake."""

import numpy as np
import pytest
from PIL import Image

from experiments.common import data


def write_images(folder, shapes, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    return images


def test_digits_splits_are_disjoint_and_whole():
    from sklearn.datasets import load_digits

    train, test = (data.load("digits", split) for split in data.SPLITS)
    assert train["image"].shape == (1438, 8, 8, 1) and len(test["label"]) == 359
    # The 16 grey levels of the source map one to one onto bytes.
    ours = np.concatenate([train["image"], test["image"]])[..., 0]
    theirs = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    order = [np.lexsort(x.reshape(len(x), -1).T) for x in (ours, theirs)]
    np.testing.assert_array_equal(ours[order[0]], theirs[order[1]])
    assert set(np.unique(train["label"])) == set(range(10))


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


def test_folder_with_splits_and_classes(tmp_path):
    for split in data.SPLITS:
        for i, name in enumerate(("cat", "dog")):
            images = write_images(tmp_path / split / name, [(5, 7, 3)] * 2, seed=i)
    arrays = data.load("folder", "test", data_dir=str(tmp_path))
    np.testing.assert_array_equal(arrays["image"][2:], images)
    np.testing.assert_array_equal(arrays["label"], [0, 0, 1, 1])


def test_folder_without_classes_is_split_in_nine_to_one(tmp_path):
    images = write_images(tmp_path, [(4, 6)] * 20)
    train, test = (
        data.load("folder", split, data_dir=str(tmp_path)) for split in data.SPLITS
    )
    assert train["image"].shape == (18, 4, 6, 1) and len(test["image"]) == 2
    assert (train["label"] == -1).all()
    found = {x.tobytes() for x in (*train["image"], *test["image"])}
    assert found == {x.tobytes() for x in images}


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 6)])
def test_folder_of_mixed_images_names_both(tmp_path, shape):
    write_images(tmp_path, [(5, 6, 3)] * 3 + [shape])
    # The odd one is the last of four, which the fixed split puts into training.
    with pytest.raises(ValueError, match=r"images differ .*03\.png is"):
        data.load("folder", "train", data_dir=str(tmp_path))


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="needs a directory"):
        data.load("folder", "train")
    with pytest.raises(FileNotFoundError, match="no directory"):
        data.load("folder", "train", data_dir=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="holds 0 PNG or JPEG"):
        data.load("folder", "train", data_dir=str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is not a readable image"):
        data.load("folder", "train", data_dir=str(tmp_path))
    write_images(tmp_path / "cat", [(4, 4)])
    with pytest.raises(ValueError, match="mixes class sub-folders"):
        data.load("folder", "train", data_dir=str(tmp_path))


def test_read_image_keeps_grey_and_rgb(tmp_path):
    grey, rgb = write_images(tmp_path, [(3, 5), (5, 3, 3)])
    np.testing.assert_array_equal(data.read_image(tmp_path / "00.png")[..., 0], grey)
    np.testing.assert_array_equal(data.read_image(tmp_path / "01.png"), rgb)
    Image.fromarray(np.full((3, 5), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png is not a readable .* 8 bits"):
        data.read_image(tmp_path / "deep.png")
    with pytest.raises(FileNotFoundError, match="no image file"):
        data.read_image(tmp_path / "absent.png")


def test_npz_directory(tmp_path):
    image = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    np.savez(tmp_path / "train.npz", image=image, label=np.array([3, 1]))
    np.savez(tmp_path / "test.npz", image=image)
    train, test = (
        data.load("npz", split, data_dir=str(tmp_path)) for split in data.SPLITS
    )
    np.testing.assert_array_equal(train["image"], image)
    np.testing.assert_array_equal(train["label"], [3, 1])
    np.testing.assert_array_equal(test["label"], [-1, -1])
    assert train["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 3, 3, 1))}, "found float64"),
        ({"label": np.zeros(2, np.int32)}, "found nothing"),
        ({"image": np.zeros((2, 3, 3, 1), np.uint8), "label": np.zeros(3)}, "`label`"),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load("npz", "train", data_dir=str(tmp_path))


def test_npz_truncated_or_absent(tmp_path):
    np.savez(tmp_path / "train.npz", image=np.zeros((9, 8, 8, 3), np.uint8))
    whole = (tmp_path / "train.npz").read_bytes()
    (tmp_path / "train.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a readable .npz"):
        data.load("npz", "train", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds train.npz and test.npz"):
        data.load("npz", "test", data_dir=str(tmp_path))


def test_tfds_says_where_it_searched_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", "train", data_dir=str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "download_and_prepare" in str(error.value)
    with pytest.raises(ValueError, match="or a name known to TFDS; got"):
        data.load("no_such_set", "train", data_dir=str(tmp_path))


def test_tfds_mnist():
    try:
        test = data.load("mnist", "test")
    except FileNotFoundError as error:
        pytest.skip(f"MNIST is not prepared: {error}")
    assert test["image"].shape == (10000, 28, 28, 1)
    assert test["image"].dtype == np.uint8 and test["label"].dtype == np.int32
    # Published counts of the ten digits in the test split.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(test["label"]), counts)


def test_unknown_split():
    with pytest.raises(ValueError, match="split must be one of train, test"):
        data.load("digits", "validation")
