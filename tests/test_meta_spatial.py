"""Meta-learning of grids of latents: cells, warm start, calibration, recovery."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functa_runs import make_runs

import functa
from experiments import meta_learn
from experiments.common import data, files, runs
from experiments.configs import meta_learn as configs
from experiments.training import encoding, meta

pytestmark = pytest.mark.usefixtures("unoptimized")


def small_config(**changes):
    config = configs.get_config("smoke_spatial")
    config.model.out_channels = 1
    config.cell = (4, 4)
    config.inner.num_steps = 2
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        (config[group] if group else config)[field] = value
    return config


def start(config):
    model = functa.make_model(config.model.to_dict()).cell()
    optimizer = meta.make_optimizer(config)
    return model, optimizer, meta.init_state(config, model, optimizer)


def test_the_cells_share_rates_per_step_and_channel():
    _, _, state = start(small_config())
    assert state.weights["learning_rate"].shape == (2, 3)
    assert state.latent.shape == (1, 1, 3)


@pytest.mark.parametrize(
    "grid, rates_per_step",
    [
        # As many steps as cells: the rates are those of the steps, not of the cells.
        ((2,), True),
        pytest.param((2, 2), False, marks=pytest.mark.slow),
    ],
)
def test_whole_grids_are_trained_with_the_rates_of_their_encoding(grid, rates_per_step):
    config = small_config(
        model__grid=grid, model__kernel_size=3, inner__rates_per_step=rates_per_step
    )
    model = functa.make_model(config.model.to_dict())
    optimizer = meta.make_optimizer(config)
    state = meta.init_state(config, model, optimizer, num_coords=len(grid))
    rates = np.linspace(0.01, 0.5, state.weights["learning_rate"].size)
    rates = np.float32(rates.reshape(state.weights["learning_rate"].shape))
    state = state.replace(weights=state.weights | {"learning_rate": rates})
    learner = encoding.make_learner(config, jax.device_get(vars(state)))
    shape = tuple(4 * n for n in grid)
    learner = learner._replace(cell=(4,) * len(grid)).with_steps(2)
    rng = np.random.default_rng(0)
    signals = rng.random((2, *shape, 1), dtype=np.float32)
    [(_, mse)] = encoding.encode(learner, signals, batch_size=2)
    update = meta.make_update(config, model, optimizer)
    coords = functa.coordinate_grid(shape)
    state, _, psnr = update(state, coords, signals, jax.random.key(0))
    np.testing.assert_allclose(psnr, functa.psnr(mse).mean(0), rtol=1e-4)
    assert np.ptp(psnr) > 0.01  # The rates matter.
    assert state.weights["learning_rate"].shape == rates.shape


def test_calibrated_rate_contracts_the_linearized_field():
    model, _, state = start(small_config())
    params = state.weights["params"]
    rate = meta.calibrated_rate(model, params, (4, 4), 0.8)
    coords = functa.coordinate_grid((4, 4))
    jacobian = jax.jit(
        jax.jacobian(lambda z: model.apply({"params": params}, coords, z))
    )(state.latent).reshape(16, 3)
    largest = np.linalg.eigvalsh(2 / 16 * jacobian.T @ jacobian)[-1]
    np.testing.assert_allclose(rate * largest, 0.8, rtol=1e-3)


def test_a_whole_grid_has_the_rate_of_one_of_its_cells():
    config = small_config()
    model, _, state = start(config)
    params = state.weights["params"]
    whole = functa.make_model(config.model.to_dict())
    np.testing.assert_allclose(
        meta.calibrated_rate(whole, params, (8, 8), 0.8),
        meta.calibrated_rate(model, params, (4, 4), 0.8),
        rtol=1e-2,
    )


def test_warm_start_has_the_codes_and_the_rate_of_the_linear_control():
    images = data.load_dataset("digits").splits["train"]["image"]
    cells = functa.spatial.split_cells(images, (2, 2)).reshape(-1, 4, 4, 1)
    warm = meta.make_warm_start(cells, 5)
    targets = data.to_float(cells[:100]).reshape(100, 16, 1)
    codes = warm.codes(targets, (1, 1, 5))
    assert codes.shape == (100, 1, 1, 5)
    # One step of gradient descent at `rate` for the linear field m + s V z, from zero.
    jacobian = meta._warm_scale(16) * warm.components  # (5, 16)
    error = targets.reshape(100, 16) - warm.mean
    step = warm.rate * (2 / 16) * error @ jacobian.T
    np.testing.assert_allclose(step, codes.reshape(100, 5), atol=1e-6)
    # Latents with more entries than the signal has values are filled up with zeros.
    more = meta.make_warm_start(cells, 20).codes(targets, (1, 1, 20))
    assert not more[..., 16:].any()
    assert more[..., 15].any()


def test_warm_start_learns_to_decode():
    config = small_config(optimizer__schedule="constant")
    images = data.load_dataset("digits").splits["train"]["image"]
    cells = functa.spatial.split_cells(images, (2, 2)).reshape(-1, 4, 4, 1)
    model, optimizer, state = start(config)
    update = meta.make_warm_update(config, model, optimizer)
    warm = meta.make_warm_start(cells, 3)
    losses = []
    for step in range(20):
        coords, targets = meta.make_batch(config, cells, step)
        codes = warm.codes(targets, model.latent_shape)
        state, loss, psnr = update(state, coords, targets, codes)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert psnr.shape == (3,)


def test_whole_images_are_trained_by_cells_like_by_points():
    config = small_config(by_cells=False, model__kernel_size=3, inner__num_steps=1)
    images = data.load_dataset("digits").splits["train"]["image"][:4]
    model = functa.make_model(config.model.to_dict())
    optimizer = optax.sgd(1.0)
    view = functa.spatial.layout(model, (8, 8), separate=False)
    pixels = data.to_float(images)
    losses, weights = [], []
    for apply_fn, coords, targets in (
        (None, functa.coordinate_grid((8, 8)), pixels),
        (view.apply_fn, view.coords, view.split(pixels)),
    ):
        state = meta.init_state(config, model, optimizer)
        update = meta.make_update(config, model, optimizer, apply_fn)
        state, loss, _ = update(state, coords, targets, jax.random.key(0))
        losses.append(loss)
        weights.append(jax.device_get(state.weights))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    chex.assert_trees_all_close(*weights, atol=1e-5)
    kernel = weights[0]["params"]["latent_to_modulation"]["kernel"]
    assert np.all(np.abs(kernel).max((2, 3)) > 0)  # Neighbors are trained.
    # Each cell has the codes of the cells that are signals of their own.
    cells = functa.spatial.split_cells(images, (2, 2)).reshape(-1, 4, 4, 1)
    warm = meta.make_warm_start(cells, 3)
    codes = warm.codes(view.split(pixels), model.latent_shape)
    alone = warm.codes(data.to_float(cells), (1, 1, 3))
    np.testing.assert_array_equal(codes.reshape(-1, 3), alone.reshape(-1, 3))


@pytest.mark.parametrize("before", [True, False])
def test_training_goes_on_with_cells_or_with_whole_images(before):
    # by_cells of the run to start from; the new run is the other way round.
    config = small_config(by_cells=before)
    whole = functa.make_model(config.model.to_dict())
    model, other = (whole.cell(), whole)[:: 1 if before else -1]
    optimizer = meta.make_optimizer(config)
    state = meta.init_state(config, model, optimizer)
    learner = encoding.make_learner(config, vars(state))
    after = meta.init_state(config, other, optimizer, learner)
    assert after.latent.shape == other.latent_shape
    chex.assert_trees_all_equal(after.weights["params"], state.weights["params"])


def test_a_collapse_leads_back_to_the_last_good_state():
    config = small_config(max_drop=3.0)
    _, _, state = start(config)

    def moved(state, value):
        weights = jax.tree.map(lambda x: jnp.full_like(x, value), state.weights)
        return state.replace(weights=weights)

    def value(state):
        return float(jax.tree.leaves(state.weights)[0].ravel()[0])

    for number, psnr in enumerate([20.0, 25.0, 23.0]):
        state, recovered = meta.keep_or_recover(
            moved(state, number), psnr, max_drop=3.0
        )
        assert not recovered
    # The state after the last sound interval may already have begun to collapse.
    for number, (psnr, scale) in enumerate([(21.9, 0.5), (np.nan, 0.25)]):
        state, recovered = meta.keep_or_recover(moved(state, 9), psnr, max_drop=3.0)
        assert recovered
        assert value(state) == 1.0
        assert state.guard.num_recoveries == number + 1
        assert state.guard.scale == scale
    with pytest.raises(ValueError, match="collapsed 9 times"):
        for _ in range(9):
            state, _ = meta.keep_or_recover(state, 1.0, max_drop=3.0)


def test_half_of_what_a_warm_start_reached_is_enough():
    _, _, state = start(small_config(max_drop=3.0))
    intervals = [
        (40.0, False, False),  # warm start
        (36.9, False, True),
        (20.0, True, False),  # the first interval after it
        (16.9, False, True),
        (6.9, True, True),
        (7.1, False, False),
        (np.nan, True, True),
    ]
    for psnr, other_latents, is_collapse in intervals:
        state, recovered = meta.keep_or_recover(
            state, psnr, max_drop=3.0, other_latents=other_latents
        )
        assert recovered == is_collapse


@pytest.mark.slow
@pytest.mark.parametrize("warm_start_steps", [0, 4])
def test_a_run_recovers_and_counts_it(tmp_path, capsys, warm_start_steps):
    config = small_config(
        optimizer__name="sgd",
        optimizer__learning_rate=1e4,
        optimizer__clip_norm=0.0,
        warm_start_steps=warm_start_steps,
        max_drop=1.0,
        log_every=2,
        num_steps=4,
    )
    images = data.load_dataset("digits").splits["train"]["image"]
    model = functa.make_model(config.model.to_dict())
    with runs.open_run(tmp_path, config) as run:
        state = meta.train(run, model, images)
        last = run.metrics()[-1]
    assert state.guard.num_recoveries == last["num_recoveries"] > 0
    assert "going back to the last good state" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__grid": (3, 2)}, "model.grid must divide the images of 8x8"),
        ({"model__grid": (16, 16)}, "model.grid must divide the images of 8x8"),
        ({"cell": (2, 2)}, "a grid of 2x2 has cells of"),
        ({"model__interpolation": "bilinear", "cell": None}, "by_cells needs"),
        ({"coarse_steps": 5}, "set coarse_steps and num_pixels to 0"),
        ({"model__kernel_size": 3}, "by_cells needs model.kernel_size 1, got 3"),
        ({"model__kernel_size": 2, "by_cells": False}, "kernel_size must be odd"),
        ({"model__channels": 0}, "model.channels must be at least 1"),
        ({"inner__calibration": 2.0}, "inner.calibration must be"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        meta_learn.train_and_evaluate(small_config(**changes), tmp_path)


@pytest.mark.slow
def test_a_run_whose_cells_encode_other_images(tmp_path):
    summary = meta_learn.train_and_evaluate(
        configs.get_config("smoke_spatial"), tmp_path
    )
    functaset = functa.load_functaset(tmp_path / "functaset.npz")
    assert functaset.latent.shape == (1797, 2, 2, 3)
    assert functaset.mean.shape == (3,)
    assert files.read_json(tmp_path / "config.json")["cell"] == [4, 4]
    assert summary["num_recoveries"] == 0
    learner = encoding.load_learner(tmp_path)
    # The PSNR in the file is that of the images drawn from its latents.
    test = functaset.select("test")
    images = data.to_float(data.load_dataset("digits").splits["test"]["image"])
    drawn = functa.reconstruct(functaset, learner.params, 8)[functaset.split == "test"]
    psnr = functa.psnr(np.square(drawn - images).mean((1, 2, 3)))
    np.testing.assert_allclose(psnr, test.psnr, atol=1e-3)
    # Larger images have more cells; latents of a crop are a crop of the latents.
    large = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 1), np.uint8)
    [(latents, _)] = encoding.encode(learner, large, batch_size=2)
    [(crops, _)] = encoding.encode(learner, large[:, 4:, 8:], batch_size=2)
    assert latents.shape == (2, 3, 4, 3)
    np.testing.assert_allclose(crops, latents[:, 1:, 2:], atol=1e-5)
    with pytest.raises(ValueError, match="cells of 4x4 points do not fill images of"):
        learner.for_shape((10, 8))


def test_padded_copies_are_moved_by_less_than_a_cell_and_mirrored():
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)

    def copy_images(copy):
        return encoding.copy_images(
            images, copy, number=copy, seed=0, flip=True, padding=4, cell=(4, 4)
        )

    first = copy_images(0)
    np.testing.assert_array_equal(first[:, 4:12, 4:12], images)
    np.testing.assert_array_equal(first[:, 3, 4:12], images[:, 1])  # reflected
    for copy in range(1, 5):
        moved = copy_images(copy)
        assert moved.shape == (2, 16, 16, 1)
        original = images[:, :, ::-1] if copy % 2 else images
        places = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if np.array_equal(moved[:, row : row + 8, column : column + 8], original)
        ]
        [(row, column)] = places
        assert 0 <= 4 - row < 4 and 0 <= 4 - column < 4


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_padded_latents_give_the_images_without_their_padding(tmp_path, kernel_size):
    config = small_config(model__kernel_size=kernel_size, by_cells=False)
    model = functa.make_model(config.model.to_dict())
    state = meta.init_state(config, model, meta.make_optimizer(config))
    learner = encoding.make_learner(config, vars(state))
    rng = np.random.default_rng(0)
    dataset = {
        split: {
            "image": rng.integers(0, 256, (2, 8, 12, 1), np.uint8),
            "label": np.zeros(2, np.int32),
        }
        for split in data.SPLITS
    }
    path = tmp_path / "a.npz"
    options = {"config": {}, "batch_size": 2}
    encoding.write_functaset(path, learner, dataset, padding=4, **options)
    written = functa.load_functaset(path)
    model = functa.make_model(written.config["model"])
    assert model.grid == (4, 5)
    for times in (1, 3):
        whole = functa.render(
            model, learner.params, written.latent, (16 * times, 20 * times)
        )
        images = functa.reconstruct(written, learner.params, (8 * times, 12 * times))
        inside = whole[:, 4 * times : 12 * times, 4 * times : 16 * times]
        np.testing.assert_allclose(images, inside, atol=1e-5)
    without = {k: v for k, v in written.config.items() if k != "shape"}
    with pytest.raises(ValueError, match="a padding of 4, .* does not tell the shape"):
        functa.reconstruct(written._replace(config=without), learner.params, 8)


def test_a_field_of_another_grid_is_refused(tmp_path):
    make_runs(tmp_path, {"train": 64, "test": 2})
    config = small_config(model__grid=(4, 4), init_from=str(tmp_path / "meta"))
    with pytest.raises(ValueError, match=r"\(4, 4\), but .*meta was .* grid \(2, 2\)"):
        meta_learn.train_and_evaluate(config, tmp_path / "run")
    # A global latent in the configuration takes the field of the run, whose cells have
    # 4x4 pixels.
    for split in data.SPLITS:
        images = np.zeros((9, 16, 16, 1), np.uint8)
        np.savez(tmp_path / f"{split}.npz", image=images)
    config = configs.get_config("smoke")
    config.init_from = str(tmp_path / "meta")
    config.dataset.update({"name": "npz", "data_dir": str(tmp_path)})
    with pytest.raises(
        ValueError, match=r"cell is \(4, 4\), but .* of \(8, 8\) pixels"
    ):
        meta_learn.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
