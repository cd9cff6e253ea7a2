"""latent_controls and the linear controls of meta_learn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from experiments import latent_controls
from experiments.common import data, runs
from experiments.configs import latent_controls as configs
from experiments.drawing import figures
from experiments.training import controls


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits").splits


def psnr_by_scikit_learn(train, test, num_components):
    """Mean PSNR (dB) of test signals (N, M, D) of M cells."""
    pca = PCA(num_components, svd_solver="full").fit(train.reshape(-1, train.shape[2]))
    flat = test.reshape(-1, test.shape[2])
    decoded = pca.inverse_transform(pca.transform(flat)).reshape(test.shape)
    return np.mean(-10 * np.log10(np.square(decoded - test).mean((1, 2))))


def test_controls_are_those_of_scikit_learn(digits):
    train, test = (digits[split]["image"][..., 0] / 255 for split in data.SPLITS)
    whole = [x.reshape(len(x), 1, 64) for x in (train, test)]
    # Cells of 4 x 2 pixels.
    cells = [
        x.reshape(-1, 2, 4, 4, 2).swapaxes(2, 3).reshape(-1, 8, 8)
        for x in (train, test)
    ]
    expected = {
        "pca_psnr": psnr_by_scikit_learn(*whole, 24),
        "patch_pca_psnr": psnr_by_scikit_learn(*cells, 3),
    }
    assert controls.linear_controls(digits, (2, 4, 3)) == pytest.approx(
        expected, abs=1e-4
    )
    assert controls.linear_controls(digits, (24,)) == pytest.approx(
        {"pca_psnr": expected["pca_psnr"]}, abs=1e-4
    )
    first = controls.linear_controls(digits, (24,), num_images=10)
    whole[1] = whole[1][:10]
    assert first["pca_psnr"] == pytest.approx(
        psnr_by_scikit_learn(*whole, 24), abs=1e-4
    )


def test_a_latent_as_large_as_the_image_is_exact(digits):
    for shape in ((64,), (256,), (2, 2, 16), (2, 2, 99)):
        psnr = controls.linear_controls(digits, shape)
        assert all(100 < value <= 140 for value in psnr.values())
    assert len(psnr) == 2


def test_large_images_have_patches_only():
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    dataset = {split: {"image": images} for split in data.SPLITS}
    assert controls.linear_controls(dataset, (64,)) == {}
    patches = controls.linear_controls(dataset, (32, 32, 2))
    assert patches.keys() == {"patch_pca_psnr"} and patches["patch_pca_psnr"] > 0
    # A cell of 64 x 32 pixels has 6,144 values.
    assert controls.linear_controls(dataset, (1, 2, 99)) == {}


def test_one_training_image_has_the_components_of_its_cells_only(digits):
    one = digits | {"train": {"image": digits["train"]["image"][:1]}}
    assert controls.linear_controls(one, (16,)) == {}
    patches = controls.linear_controls(one, (4, 4, 1))
    assert patches.keys() == {"patch_pca_psnr"} and patches["patch_pca_psnr"] > 5


def test_smoke_run(tmp_path, digits):
    config = configs.get_config("smoke")
    summary = latent_controls.train_and_evaluate(config, tmp_path)
    first = {
        split: {"image": arrays["image"][:100]} for split, arrays in digits.items()
    }
    expected = controls.linear_controls(first, (2, 2, 2))
    assert summary["pca_psnr_8"] == pytest.approx(expected["pca_psnr"])
    assert summary["patch_pca_psnr_2x2x2"] == pytest.approx(expected["patch_pca_psnr"])
    assert summary["num_train_images"] == summary["num_test_images"] == 100
    assert runs.load_summary(tmp_path) == summary
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert {k: v.shape for k, v in arrays.items()} == {"pca": (65,), "2x2": (17,)}
        # More components are better, on average over the test images.
        assert all(np.all(np.diff(curve) > -0.5) for curve in arrays.values())
    picture = tmp_path / "figures" / "psnr_against_size.png"
    picture.unlink()
    figures.draw(tmp_path)
    assert picture.stat().st_size > 0
    assert latent_controls.train_and_evaluate(config, tmp_path) == summary


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sizes", (8, 65), "sizes must be at most 64, the values of an image, got 65"),
        ("sizes", (), "sizes must be a non-empty tuple"),
        ("grids", ((3, 2, 1),), r"3x2 cells must divide images of 8x8, .* \(3, 2, 1\)"),
        ("grids", ((4, 4, 5),), r"as many channels as a cell has values"),
        ("grids", ((4, 4),), r"each value \(h, w, C\) with integers of at least 1"),
        ("num_images", -1, "num_images must be at least 0"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, field, value, message):
    config = configs.get_config("smoke")
    config[field] = value
    with pytest.raises(ValueError, match=message):
        latent_controls.train_and_evaluate(config, tmp_path)
    assert not list(tmp_path.iterdir())
