"""Principal components against scikit-learn, closed forms and published numbers."""

import os

import numpy as np
import pytest
from sklearn.decomposition import PCA

import functa
from experiments.common import data
from functa import linear


def correlated(num, *shape):
    """Signals in float64 whose values are mixed with fixed random weights."""
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    mixed = rng.normal(size=(num, size)) @ rng.normal(size=(size, size)) + 3.0
    return mixed.reshape(num, *shape)


def cut(signals, grid):
    """Cells of images (N, H, W, C) by a loop: (N, h, w, p * q * C)."""
    h, w = grid
    p, q = signals.shape[1] // h, signals.shape[2] // w
    return np.stack(
        [
            [
                [
                    image[i * p : (i + 1) * p, j * q : (j + 1) * q].ravel()
                    for j in range(w)
                ]
                for i in range(h)
            ]
            for image in signals
        ]
    )


@pytest.mark.parametrize("grid", [(), (2, 3)])
def test_components_are_those_of_scikit_learn(grid, monkeypatch):
    monkeypatch.setattr(linear, "_BLOCK_VALUES", 1000)  # several blocks
    images = correlated(90, 4, 9, 2)
    cells = cut(images, grid or (1, 1)).reshape(-1, 72 // int(np.prod(grid)))
    oracle = PCA(5, svd_solver="full").fit(cells)
    pca = linear.fit_pca(images, 5, grid=grid)
    np.testing.assert_allclose(pca.mean, oracle.mean_, rtol=1e-10)
    np.testing.assert_allclose(pca.components, oracle.components_, atol=1e-9)
    np.testing.assert_allclose(pca.variance, oracle.explained_variance_, rtol=1e-10)
    codes = linear.encode(pca, images)
    assert codes.shape == (90, *grid, 5) and codes.dtype == np.float32
    expected = oracle.transform(cells)
    np.testing.assert_allclose(codes.reshape(-1, 5), expected, rtol=1e-5, atol=1e-4)
    decoded = oracle.inverse_transform(expected)
    decoded = decoded.reshape(90, *grid, -1) if grid else decoded[:, None, None]
    np.testing.assert_allclose(
        cut(linear.decode(pca, codes), grid or (1, 1)), decoded, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((12, 2), (3,)), ((4, 6, 1), (2, 2)), ((2, 4, 6, 3), (1, 2, 3)), ((5, 3), ())],
)
def test_all_components_reconstruct_exactly(shape, grid):
    signals = correlated(40, *shape)
    pca = linear.fit_pca(signals, grid=grid)
    size = pca.mean.size
    assert size * np.prod(grid) == np.prod(shape)
    np.testing.assert_allclose(
        pca.components @ pca.components.T, np.eye(size), atol=1e-12
    )
    decoded = linear.decode(pca, linear.encode(pca, signals))
    # The codes are rounded to float32.
    np.testing.assert_allclose(decoded, signals, atol=1e-5 * np.abs(signals).max())
    assert np.all(np.diff(pca.variance) <= 0)


def test_truncation_error_is_that_of_decoded_codes():
    train, test = np.split(correlated(60, 4, 6, 2), 2)
    pca = linear.fit_pca(train, 7, grid=(2, 3))
    errors = linear.truncation_mse(pca, test)
    assert errors.shape == (30, 8)
    codes = linear.encode(pca, test)
    for k in range(8):
        decoded = linear.decode(pca, codes[..., :k])
        mse = np.square(decoded - test).mean((1, 2, 3))
        np.testing.assert_allclose(errors[:, k], mse, rtol=1e-4)
    # On the training signals the error is the variance that is left out.
    left = np.trace(np.cov(cut(train, (2, 3)).reshape(-1, 8).T)) - pca.variance.sum()
    fitted = linear.truncation_mse(pca, train)[:, -1].mean()
    cells = 30 * 6
    np.testing.assert_allclose(fitted, left * (cells - 1) / cells / 8, rtol=1e-9)


@pytest.mark.parametrize("grid", [(), (2, 3)])
def test_no_signals_have_no_codes(grid):
    images = np.random.default_rng(0).random((20, 4, 6, 2))
    pca = linear.fit_pca(images, 3, grid=grid)
    codes = linear.encode(pca, images[:0])
    assert codes.shape == (0, *grid, 3)
    assert linear.decode(pca, codes).shape == (0, 4, 6, 2)
    assert linear.truncation_mse(pca, images[:0]).shape == (0, 4)


def test_images_of_8_bits_are_scaled_to_one():
    images = data.load_dataset("digits").splits["train"]["image"]
    pca = linear.fit_pca(images, 20)
    exact = linear.fit_pca(np.float64(images) / 255, 20)
    np.testing.assert_allclose(pca.components, exact.components, atol=1e-4)
    errors = [linear.truncation_mse(p, images) for p in (pca, exact)]
    np.testing.assert_allclose(*errors, rtol=1e-4, atol=1e-9)


def test_constant_values_have_no_variance():
    signals = np.ones((5, 3, 2))
    pca = linear.fit_pca(signals)
    assert np.all(pca.variance == 0)
    np.testing.assert_allclose(linear.truncation_mse(pca, signals), 0, atol=1e-30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grid": (3, 2)},
            r"\(3, 2\) cells does not divide signals of \(4, 6\)",
        ),
        ({"grid": (2,)}, "does not divide"),
        ({"grid": (0, 2)}, "does not divide"),
        ({"num_components": 0}, "from 1 to 48, the values of a cell; got 0"),
        ({"num_components": 9, "grid": (2, 3)}, "from 1 to 8"),
    ],
)
def test_impossible_codes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear.fit_pca(np.ones((5, 4, 6, 2)), **options)


def test_signals_of_another_shape_are_refused():
    pca = linear.fit_pca(correlated(5, 4, 6, 2), 3)
    for function in (linear.encode, linear.truncation_mse):
        with pytest.raises(ValueError, match=r"shape \(4, 6, 2\) .* got \(6, 4, 2\)"):
            function(pca, np.ones((5, 6, 4, 2)))
    with pytest.raises(ValueError, match="need two cells, got 1"):
        linear.fit_pca(np.ones((1, 3, 1)))


@pytest.mark.slow
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs CIFAR-10")
@pytest.mark.parametrize(
    ("grid", "num_components", "psnr"),
    [((8, 8), 16, 34.73), ((4, 4), 64, 36.34), ((16, 16), 4, 30.40)],
)
def test_psnr_of_patches_of_cifar10(grid, num_components, psnr, cifar10):
    train, test = cifar10
    pca = linear.fit_pca(train, num_components, grid=grid)
    mse = linear.truncation_mse(pca, test)[:, -1]
    # The numbers were computed with scikit-learn, on the same 12,000 training images.
    assert float(functa.mean_psnr(mse)) == pytest.approx(psnr, abs=0.03)


@pytest.mark.slow
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs CIFAR-10")
def test_psnr_of_whole_images_of_cifar10(cifar10):
    train, test = cifar10
    pca = linear.fit_pca(train, 1024)
    psnr = np.mean(-10 * np.log10(linear.truncation_mse(pca, test)), axis=0)
    np.testing.assert_allclose(psnr[[256, 512, 1024]], [26.41, 30.5, 37.2], atol=0.03)


@pytest.fixture(scope="module")
def cifar10():
    splits = data.load_dataset(
        "cifar10", train_split="train[:12000]", test_split="test[:2000]"
    ).splits
    return [splits[split]["image"] for split in ("train", "test")]


def test_values_that_are_not_finite_are_refused():
    signals = np.random.default_rng(0).random((6, 4, 4, 1))
    signals[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        linear.fit_pca(signals, 2)
