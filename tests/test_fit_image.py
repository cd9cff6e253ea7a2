"""fit_image: the command, its functaset, its resumption and its errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import functa
from experiments import fit_image
from experiments.common import data, settings
from experiments.configs import fit_image as configs
from experiments.training import loop

pytestmark = pytest.mark.usefixtures("unoptimized")


def tiny_config(**changes):
    config = configs.get_config("smoke")
    config.dataset.name = "digits"
    config.resolution = (8,)
    config.model.update({"width": 8, "depth": 3})
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def images():
    """Of odd size, higher than wide."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (4, 7, 5, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def two_tasks(images, tmp_path_factory):
    """A config of two tasks, the first on random pixels; checkpoints at 8, 12, ..."""
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "train.npz", image=images, label=np.arange(4))
    return lambda: tiny_config(
        dataset={"name": "npz", "data_dir": str(folder)},
        # The names of the tasks sort the other way round.
        resolution=(7, 4),
        num_images=(3, 1),
        num_pixels=20,
        num_steps=(12,),
        snapshot_steps=(4,),
        log_every=4,
        checkpoint_every=8,
    )


@pytest.fixture(scope="module")
def finished(two_tasks, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, fit_image.train_and_evaluate(two_tasks(), workdir)


@pytest.mark.slow
def test_run_leaves_everything_and_is_finished(finished, two_tasks):
    workdir, summary = finished
    for name in ("psnr", "reconstructions_7x5", "field_4x3"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000
    assert summary["7x5_steps"] == [4, 12]
    assert summary["7x5_psnr"][1] > summary["7x5_psnr"][0]
    assert fit_image.train_and_evaluate(two_tasks(), workdir) == summary


@pytest.mark.slow
def test_functaset_gives_the_images_back(finished, images):
    workdir, summary = finished
    written = functa.load_functaset(workdir / "functaset.npz")
    reconstructed = functa.reconstruct(written, {}, (7, 5))[:3]
    mse = np.mean((reconstructed - data.to_float(images[:3])) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(functa.psnr(mse), written.psnr[:3], rtol=1e-4)
    np.testing.assert_array_equal(written.label, [0, 1, 2, 0])
    # The last network is that of the second task.
    assert written.psnr[3] == pytest.approx(summary["4x3_psnr"][-1])


@pytest.mark.slow
def test_resumed_run_ends_like_an_uninterrupted_one(
    finished, two_tasks, tmp_path, monkeypatch
):
    workdir, whole = finished
    check, calls = loop.check_finite, []

    # Step 21 is in the second task, after a checkpoint at 20 and before one at 24.
    def stop_once(losses, *, first_step):
        calls.append(first_step)
        if first_step == 21 and calls.count(21) == 1:
            raise KeyboardInterrupt
        check(losses, first_step=first_step)

    monkeypatch.setattr(loop, "check_finite", stop_once)
    with pytest.raises(KeyboardInterrupt):
        fit_image.train_and_evaluate(two_tasks(), tmp_path)
    resumed = fit_image.train_and_evaluate(two_tasks(), tmp_path)
    assert (calls.count(1), calls.count(21)) == (1, 2)
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    with (
        np.load(workdir / "arrays.npz") as first,
        np.load(tmp_path / "arrays.npz") as second,
    ):
        chex.assert_trees_all_equal(dict(first), dict(second))


@pytest.mark.parametrize("channels", [1, 3])
def test_reads_grey_and_color_files(images, tmp_path, channels):
    pixels = images[0][..., :channels]
    Image.fromarray(pixels.squeeze()).save(tmp_path / "image.png")
    config = tiny_config(image=str(tmp_path / "image.png"), resolution=(7,))
    [task] = fit_image.make_tasks(config)
    np.testing.assert_array_equal(task.images, pixels[None])
    assert (task.name, task.labels) == ("7x5", [-1])


def test_longer_side_gets_the_resolution():
    image = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    assert fit_image.resize(image, 12).shape == (12, 8, 3)
    assert fit_image.resize(image[..., :1], 3).shape == (3, 2, 1)
    np.testing.assert_array_equal(fit_image.resize(image, 6), image)
    # A long thin image keeps at least one row.
    assert fit_image.resize(image[:1].repeat(9, axis=1), 2).shape == (1, 2, 3)


def test_fields_are_drawn_with_at_most_4096_pixels_on_a_side():
    for shape, expected in (
        ((7, 5), (28, 20)),
        ((1024, 512), (4096, 2048)),
        ((1000, 1366), (2000, 2732)),
        ((5000, 9000), (5000, 9000)),
    ):
        assert fit_image.enlarged_shape(shape) == expected
    # Both sides have the same factor, so that the pixels are squares.
    assert fit_image.enlarged_shape((1025, 3)) == (3075, 9)


def test_mosaic_puts_images_side_by_side():
    config = tiny_config(mosaic=(2,))
    [task] = fit_image.make_tasks(config)
    images = data.load_dataset("digits").splits["train"]["image"]
    rows = [np.hstack(images[:2]), np.hstack(images[2:4])]
    np.testing.assert_array_equal(task.images, np.vstack(rows)[None])
    assert task.name == "16x16_mosaic"


def test_folded_parameters_are_the_same_field():
    model = functa.Siren(width=8, depth=3, out_channels=2)
    grid = jnp.asarray(functa.coordinate_grid((4, 5)))
    params = jax.jit(model.init)(jax.random.key(0), grid)["params"]
    params["layer_0"]["bias"] = jnp.linspace(-0.1, 0.1, 8)
    low, high = -1.5, 0.75
    folded = fit_image.fold_range(params, (low, high))
    # omega_0 is 30: a rounding of 1e-7 in a first-layer sum becomes 3e-6.
    chex.assert_trees_all_close(
        model.apply({"params": folded}, grid),
        model.apply({"params": params}, low + (high - low) * grid),
        atol=2e-5,
    )


def test_gradient_magnitude_matches_finite_differences():
    model = functa.Siren(width=8, depth=3, out_channels=2, omega_0=3.0)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2)))["params"]
    stacked = jax.tree.map(lambda x: x[None], params)
    shape, step = (3, 4), 1e-2
    grid = jnp.asarray(functa.coordinate_grid(shape))
    squares = jnp.zeros(shape)
    for axis, size in enumerate(shape):
        shift = jnp.full_like(grid, 0).at[..., axis].set(step)
        values = [model.apply({"params": params}, grid + s * shift) for s in (1, -1)]
        squares += jnp.sum(jnp.square((values[0] - values[1]) / (2 * step * size)), -1)
    # Central differences err by step^2 times the third derivative.
    chex.assert_trees_all_close(
        fit_image.gradient_magnitude(model, stacked, shape)[0],
        jnp.sqrt(squares),
        rtol=1e-2,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resolution": (0,)},
            "resolution must be a non-empty tuple, each value at least 1",
        ),
        ({"num_steps": (1, 2), "mosaic": (1, 2, 3)}, "num_steps must have one value"),
        (
            {"num_images": (2,), "dataset": {"name": "photograph"}},
            "need 2 images",
        ),
        (
            {"dataset": {"name": "photograph", "data_dir": "x"}},
            "dataset.data_dir=x is not read",
        ),
        (
            {"image": "a.png", "dataset": {"data_dir": "x"}},
            "dataset.data_dir=x is not read, because --config.image=a.png",
        ),
        ({"resolution": (8, 8)}, "of the same size"),
        ({"snapshot_steps": (3, 2)}, "snapshot_steps"),
        ({"coord_range": (1.0, 1.0)}, "coord_range"),
        ({"optimizer": {"name": "adamm"}}, "no optimizer 'adamm'"),
        ({"optimizer": {"options": {"b7": 1.0}}}, "optimizer.options"),
        ({"optimizer": {"schedule": "linear"}}, "must be one of constant, cosine"),
        ({"model": {"type": "ModulatedSiren"}}, "model.type must be one of Siren"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit_image.train_and_evaluate(tiny_config(**changes), tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but nothing more")
    config = tiny_config(image=str(broken))
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        fit_image.train_and_evaluate(config, tmp_path / "run")
    config = tiny_config(image=str(tmp_path / "none.png"))
    with pytest.raises(FileNotFoundError, match="no image file .*none.png"):
        fit_image.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_photo_is_not_taken_for_that_of_the_run(tmp_path, monkeypatch):
    photo, workdir = tmp_path / "photo.png", tmp_path / "run"
    config = tiny_config(image=str(photo))
    pixels = np.zeros((8, 8), np.uint8)
    Image.fromarray(pixels).save(photo)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_image, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        fit_image.train_and_evaluate(config, workdir)
    # A run of which something is done already.
    (workdir / "metrics.jsonl").write_text('{"step": 8, "seconds": 1}\n')
    with pytest.raises(KeyboardInterrupt):
        fit_image.train_and_evaluate(config, workdir)
    Image.fromarray(pixels + 1).save(photo)
    with pytest.raises(ValueError, match="the data of task 8x8 of .*run has changed"):
        fit_image.train_and_evaluate(config, workdir)


@pytest.mark.parametrize("variant", configs.VARIANTS)
def test_variants_agree_with_themselves(variant):
    config = configs.get_config(variant)
    settings.check(config, configs.RULES)
    lengths = {len(config[name]) for name in fit_image._PER_TASK}
    assert len(lengths - {1}) <= 1


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'big' must be one of photo"):
        configs.get_config("big")
