"""meta_learn: inputs and results of an update; exact resumption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functa
from experiments import meta_learn
from experiments.common import data, files
from experiments.configs import meta_learn as configs
from experiments.drawing import figures
from experiments.training import encoding, meta

pytestmark = pytest.mark.usefixtures("unoptimized")

ROOT = Path(__file__).parents[1]


def small_config(**changes):
    config = configs.get_config("smoke")
    config.model.out_channels = 1
    config.inner.num_steps = 2  # what is unrolled is compiled so often
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        (config[group] if group else config)[field] = value
    return config


def start(config):
    model = functa.make_model(config.model.to_dict())
    optimizer = meta.make_optimizer(config)
    state = meta.init_state(config, model, optimizer)
    return state, meta.make_update(config, model, optimizer)


def some_batch(config, step=0):
    images = data.load_dataset("digits").splits["train"]["image"]
    return meta.make_batch(config, images, step)


def test_update_equals_plain_gradient_descent_on_the_meta_loss():
    config = small_config(
        optimizer__name="sgd",
        optimizer__schedule="constant",
        optimizer__clip_norm=0.0,
        optimizer__warmup_steps=0,
        optimizer__learning_rate=0.5,
        optimizer__rate_multiplier=2.0,
        points_per_group=256,  # four images of 64 points in a group
    )
    state, update = start(config)
    coords, targets = some_batch(config)
    model = functa.make_model(config.model.to_dict())

    def loss_fn(weights):
        _, info = functa.fit_batch(
            model.apply,
            weights["params"],
            jnp.zeros(config.model.latent_dim),
            coords,
            targets,
            learning_rate=weights["learning_rate"],
            num_steps=config.inner.num_steps,
        )
        return info.loss[:, -1].mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(state.weights)
    expected = {
        name: jax.tree.map(lambda w, g, r=rate: w - r * g, weights, grads[name])
        for (name, weights), rate in zip(
            sorted(state.weights.items()), (1.0, 0.5), strict=True
        )
    }
    latent = np.asarray(state.latent)
    state, reported, _ = update(state, coords, targets, jax.random.key(0))
    # Sums over groups are rounded in another order.
    chex.assert_trees_all_close(state.weights, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(reported, loss, rtol=1e-6)
    np.testing.assert_array_equal(state.latent, latent)


def test_update_compiles_once_and_learns():
    config = small_config()
    state, update = start(config)
    losses = []
    for step in range(12):
        coords, targets = some_batch(config, step % 2)
        state, loss, psnr = update(state, coords, targets, jax.random.key(step))
        losses.append(float(loss))
    assert update._cache_size() == 1
    assert psnr.shape == (3,)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"inner__meta_sgd": True, "inner__rates_per_step": False}, (8,)),
        ({"inner__meta_sgd": True}, (2, 8)),
        ({"inner__meta_sgd": False}, (2, 1)),
        ({"inner__meta_sgd": False, "inner__rates_per_step": False}, ()),
    ],
)
def test_shapes_of_rates(changes, shape):
    config = small_config(**changes, inner__unroll=False)
    state, update = start(config)
    assert state.weights["learning_rate"].shape == shape
    after, *_ = jax.eval_shape(update, state, *some_batch(config), jax.random.key(0))
    assert after.weights["learning_rate"].shape == shape


def test_rates_that_are_not_learned_stay_but_for_their_bounds():
    config = small_config(
        inner__meta_sgd=False,
        inner__rates_per_step=False,
        inner__rate_clip=(0.25, 0.3),
        inner__unroll=False,
    )
    state, update = start(config)
    before = np.asarray(state.weights["learning_rate"])
    state, *_ = update(state, *some_batch(config), jax.random.key(0))
    after = np.asarray(state.weights["learning_rate"])
    np.testing.assert_array_equal(after, np.clip(before, 0.25, 0.3))


@pytest.mark.slow
def test_options_of_the_outer_loop_run():
    config = small_config(
        optimizer__name="adamw",
        optimizer__ema_decay=0.5,
        optimizer__options={"weight_decay": 0.1},
        inner__first_order=True,
        inner__noise_std=0.1,
        inner__l2_weight=0.01,
        inner__rate_clip=(0.25, 0.3),
        inner__unroll=False,
    )
    state, update = start(config)
    before = jax.tree.map(np.asarray, state.weights)
    state, loss, _ = update(state, *some_batch(config), jax.random.key(0))
    assert np.isfinite(loss)
    middle = jax.tree.map(lambda a, b: 0.5 * (a + b), before, state.weights)
    chex.assert_trees_all_close(state.average, middle, rtol=1e-5, atol=1e-7)
    rates = np.asarray(state.weights["learning_rate"])
    assert rates.shape == (2, 8)
    assert 0.25 <= rates.min() < rates.max() <= 0.3


def test_mixtures_have_the_mean_the_covariance_and_the_span_of_the_signals():
    signals = np.random.default_rng(0).normal(3.0, 1.0, (5, 2, 4, 1))
    mean = signals.mean(0)
    config = small_config(mix_signals=True, batch_size=5)
    mixed = np.concatenate(
        [meta.select_signals(config, signals, step, mean) for step in range(4000)]
    )
    assert mixed.dtype == np.float32 and mixed.shape == (20000, 2, 4, 1)
    centered, flat = (x.reshape(len(x), -1) for x in (signals - mean, mixed - mean))
    np.testing.assert_allclose(flat.mean(0), 0, atol=0.03)
    covariance = centered.T @ centered / 5
    np.testing.assert_allclose(flat.T @ flat / 20000, covariance, atol=0.03)
    outside = flat - flat @ np.linalg.pinv(centered) @ centered
    np.testing.assert_allclose(outside, 0, atol=1e-5)
    assert np.linalg.norm(flat[:5] - centered, axis=1).min() > 0.01


def test_codes_of_mixtures_are_mixtures_of_codes():
    signals = np.random.default_rng(1).normal(size=(6, 4, 4, 2))
    config = small_config(mix_signals=True, batch_size=6)
    warm = meta.make_warm_start(signals, 5)
    codes = meta.select_signals(config, warm.codes(signals, (5,)), 7)
    mixed = meta.select_signals(config, signals, 7, signals.mean(0))
    np.testing.assert_allclose(codes, warm.codes(mixed, (5,)), rtol=1e-4, atol=1e-5)


def test_batches_coarse_and_subsampled():
    images = data.load_dataset("digits").splits["train"]["image"]
    config = small_config(coarse_steps=1)
    coords, coarse = meta.make_batch(config, images, 0)
    fine_coords, fine = meta.make_batch(config, images, 1)
    assert coords.shape == (16, 2) and fine_coords.shape == (64, 2)
    _, whole = meta.make_batch(small_config(), images, 0)
    blocks = whole.reshape(-1, 4, 2, 4, 2)
    np.testing.assert_allclose(
        coarse.reshape(-1, 4, 4), blocks.mean((2, 4)), rtol=1e-5, atol=1e-7
    )
    coords, few = meta.make_batch(small_config(num_pixels=10), images, 0)
    assert coords.shape == (10, 2) and few.shape == (16, 10, 1)
    grid = functa.coordinate_grid((8, 8)).reshape(-1, 2)
    kept = [np.flatnonzero((grid == c).all(1))[0] for c in coords]
    np.testing.assert_array_equal(few, whole[:, kept])


def test_direct_modulation_without_a_latent():
    config = small_config()
    config.model = {"type": "ModulatedSiren", "width": 8, "depth": 3, "out_channels": 1}
    state, update = start(config)
    assert state.weights["learning_rate"].shape == (2, 16)
    state, loss, _ = update(state, *some_batch(config), jax.random.key(0))
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "adamm"}, "no optimizer 'adamm'"),
        ({"eval__optimizer": "adamm"}, "no optimizer 'adamm'"),
        ({"optimizer__options": {"beta": 1}}, "optimizer.options: .*beta"),
        ({"optimizer__schedule": "linear"}, "optimizer.schedule must be one of"),
        ({"model__type": "Sirene"}, "model.type must be one of .*'Sirene'"),
        ({"batch_size": 5000}, "batch_size must be between 1 and the 1438"),
        ({"num_pixels": 65}, "num_pixels must be at most 64"),
        ({"coarse_steps": 1, "coarse_factor": 3}, "does not divide"),
        ({"model__out_channels": 3}, "images have 1 channels"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"init_from": "absent"}, "absent holds no run"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        meta_learn.train_and_evaluate(small_config(**changes), tmp_path)


@pytest.mark.slow
def test_a_diverged_run_names_the_step_and_keeps_its_checkpoint(tmp_path):
    config = small_config(optimizer__clip_norm=0.0, optimizer__name="sgd")
    config.checkpoint_every = 5
    config.optimizer.learning_rate = 1e18
    config.optimizer.warmup_steps = 0
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step [2-5];"):
        meta_learn.train_and_evaluate(config, tmp_path)


def run_to_the_end(config, workdir):
    summary = meta_learn.train_and_evaluate(config, workdir)
    return summary, encoding.load_learner(workdir)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    options = ["--config.num_steps=40", "--config.checkpoint_every=5"]
    command = [
        *(sys.executable, "-m", "experiments.meta_learn"),
        "--config=experiments/configs/meta_learn.py:smoke",
        *options,
        f"--workdir={tmp_path / 'killed'}",
    ]
    log = tmp_path / "killed" / "metrics.jsonl"
    # As many devices and the same optimizations as here: otherwise sums are rounded in
    # another order.
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    ) as process:
        while len(files.read_metrics(log)) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    lines = len(files.read_metrics(log))
    assert 3 <= lines < 8

    def config():
        config = configs.get_config("smoke")
        config.num_steps, config.checkpoint_every = 40, 5
        return config

    summary, learner = run_to_the_end(config(), tmp_path / "killed")
    expected, expected_learner = run_to_the_end(config(), tmp_path / "whole")
    for name in summary.keys() - {"seconds", "functaset_images_per_second"}:
        assert summary[name] == expected[name], name
    chex.assert_trees_all_equal(learner.params, expected_learner.params)
    metrics = [
        [
            (m["step"], m["loss"])
            for m in files.read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("killed", "whole")
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 8

    # What a finished run leaves behind, and that it is not run again.
    drawn = {path.name for path in (tmp_path / "whole" / "figures").iterdir()}
    assert drawn == {
        "best_and_worst.png",
        "interpolation.png",
        "over_inner_steps.png",
        "psnr.png",
        "reconstructions.png",
        "super_resolution.png",
    }
    functaset = functa.load_functaset(tmp_path / "whole" / "functaset.npz")
    assert functaset.latent.shape == (1797, 8)
    assert meta_learn.train_and_evaluate(config(), tmp_path / "whole") == expected
    (tmp_path / "whole" / "figures" / "psnr.png").unlink()
    figures.draw(tmp_path / "whole")
    assert (tmp_path / "whole" / "figures" / "psnr.png").exists()
