"""meta_classify: updates of each phase, the smoke run, and bad inputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_runs import copy_at_first_save

from experiments import meta_classify
from experiments.common import data, files
from experiments.configs import meta_classify as configs
from experiments.drawing import figures
from experiments.training import meta
from experiments.training import meta_classifier as training

pytestmark = pytest.mark.usefixtures("unoptimized")

LINEAR = {"type": "mlp", "hidden_sizes": ()}


def small_config(**changes):
    config = configs.get_config("smoke")
    config.head = LINEAR
    config.methods = ("joint",)
    # Compilation takes most of the time.
    config.inner.num_steps = 1
    config.model.update(depth=2, fast_sine=False, kernel_size=1)
    config.optimizer.ema_decay = config.max_drop = 0.0
    config.warm_start_steps = 0
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        (config[group] if group else config)[field] = value
    return config


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits")


def start(config, digits):
    problem = meta_classify.make_problem(config, digits)
    return problem, training.init_state(config, problem, None)


def batch(problem, config):
    return problem.train.image[: config.batch_size], jnp.asarray(
        problem.train.label[: config.batch_size]
    )


def test_parts_do_not_overlap(digits):
    problem = meta_classify.make_problem(small_config(), digits)
    sizes = [len(part.label) for part in problem[:3]]
    assert sizes == [1294, 144, 359]
    both = np.concatenate([problem.train.image, problem.validation.image])
    whole = digits.splits["train"]["image"]
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(whole, axis=0))


@pytest.mark.slow
def test_without_labels_a_step_of_the_field_is_that_of_meta_learn(digits):
    config = small_config(label_weight=0.0, normalize_losses=False)
    problem, state = start(config, digits)
    field = jax.tree.map(jnp.copy, state.field)
    head = jax.tree.map(np.asarray, state.head.params)
    images, labels = batch(problem, config)
    view = problem.view
    optimizer, _ = training.make_optimizers(config)
    plain = meta.make_update(
        meta_config(config), problem.model, optimizer, view.apply_fn
    )
    targets = view.split(data.to_float(images))
    expected, loss, psnr = plain(field, view.coords, targets, jax.random.key(0))
    update = training.make_update(config, problem, "joint")
    state, metrics = update(state, images, labels, jax.random.key(0))
    # Adam divides by the root of the square: rounding is amplified where the gradient
    # is near zero.
    chex.assert_trees_all_close(
        state.field.weights, expected.weights, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(metrics["psnr_per_step"], psnr, rtol=1e-5)
    total = metrics["loss"] - metrics["cross_entropy"]
    np.testing.assert_allclose(total, loss, rtol=1e-4)
    # The head learns all the same.
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.head.params, head)
    assert max(jax.tree.leaves(moved)) > 0


def meta_config(config):
    """The fields that meta_learn has in addition."""
    config = config.copy_and_resolve_references()
    config.inner.noise_std = 0.0
    return config


def test_a_label_moves_the_field(digits):
    config = small_config(optimizer__warmup_steps=0)
    problem, state = start(config, digits)
    images, labels = batch(problem, config)
    update = training.make_update(config, problem, "joint")
    params = []
    for shift in (0, 1):
        state, metrics = update(
            training.init_state(config, problem, None),
            images,
            (labels + shift) % 10,
            jax.random.key(0),
        )
        params.append(jax.device_get(state.field.weights["params"]))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *params)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert state.head.num_batches == 1
    assert np.isfinite(metrics["cross_entropy"])


def test_phase_of_the_head_keeps_the_field(digits):
    config = small_config(
        latent_dropout=0.0,
        head_optimizer__warmup_steps=0,
        head_optimizer__learning_rate=0.03,
    )
    problem, state = start(config, digits)
    images, labels = batch(problem, config)
    before = jax.device_get((state.field, state.head.params))
    update = training.make_update(config, problem, "head")
    losses = []
    for step in range(8):
        state, metrics = update(state, images, labels, jax.random.key(step))
        losses.append(float(metrics["cross_entropy"]))
    assert update._cache_size() == 1
    chex.assert_trees_all_equal(jax.device_get(state.field), before[0])
    assert losses[-1] < 0.9 * losses[1]
    assert state.head.num_batches == 8


def test_methods_train_field_and_head_for_the_same_number_of_steps():
    config = small_config(warm_start_steps=6)
    assert training.phases(config) == [("warm", 6), ("joint", 24)]
    config.methods = ("two_stage",)
    assert training.phases(config) == [("warm", 6), ("field", 24), ("head", 42)]


def test_moments_of_latents_against_numpy():
    rng = np.random.default_rng(0)
    latents = np.float32(rng.normal(2, 3, size=(5, 4, 2, 3, 6)))
    latents[..., 5] = 1.0  # a constant channel
    zeros = jnp.zeros(6)
    head = training.HeadState({}, (), None, zeros, zeros + 1, jnp.array(0))
    for number, values in enumerate(latents, start=1):
        head = head.observe(values)
        # The first hundred batches have the same weight.
        seen = latents[:number].reshape(-1, 6)
        mean, std = head.scale()
        np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-4)
        np.testing.assert_allclose(std[:5], seen.std(0)[:5], rtol=1e-3)
        assert std[5] == 1
    normalized = head.normalize(latents[0])[..., :5]
    expected = (latents[0][..., :5] - seen.mean(0)[:5]) / seen.std(0)[:5]
    np.testing.assert_allclose(normalized, expected, rtol=1e-2, atol=1e-3)


def test_latent_dropout_keeps_the_mean():
    ones = jnp.ones((50, 40, 4))
    dropped = np.asarray(training.drop(jax.random.key(0), ones, 0.25))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    # The share that is kept has a deviation of sqrt(0.25 * 0.75 / 8000) = 0.5 %.
    np.testing.assert_allclose(dropped.mean(), 1, rtol=0.03)
    assert training.drop(jax.random.key(0), ones, 0.0) is ones


@pytest.mark.slow
def test_smoke_run_stopped_and_resumed_ends_as_one_left_alone(tmp_path, monkeypatch):
    config = configs.get_config("smoke")
    config.inner.num_steps = 2
    config.augmentation.padding = 1
    config.points_per_group = 256
    config.methods = ("two_stage", "joint")  # The first one is stopped.
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        copy_at_first_save(patch, whole, stopped)
        summary = meta_classify.train_and_evaluate(config, whole)
    first = files.read_metrics(stopped / "two_stage_seed0" / "metrics.jsonl")
    assert [line["step"] for line in first] == [6, 12]
    resumed = meta_classify.train_and_evaluate(config, stopped)
    for name, inner in summary["runs"].items():
        assert resumed["runs"][name] | {"seconds": 0} == inner | {"seconds": 0}
    assert meta_classify.train_and_evaluate(config, whole) == summary

    assert (summary["num_train"], summary["num_validation"]) == (1294, 144)
    assert summary["patch_pca_psnr"] > 0
    for method in config.methods:
        inner = summary["runs"][f"{method}_seed0"]
        assert summary[f"{method}_test_accuracy"] == inner["test_accuracy"]
        assert 0 <= inner["test_accuracy"] <= 1 and inner["test_psnr"] > 5
        curve = dict(inner["curves"]["validation_accuracy"])
        # The selected step is the best one, and was measured in the same way.
        assert inner["validation_accuracy"] == max(curve.values())
        assert curve[inner["step"]] == inner["validation_accuracy"]
    control = summary["runs"]["two_stage_seed0"]["curves"]
    assert [step for step, _ in control["validation_accuracy"]] == [30, 36, 42]
    # The field rests while the head is trained.
    psnr = dict(control["validation_psnr"])
    assert psnr[24] == psnr[30] == psnr[42] != psnr[12]
    for name in ("training", "accuracy_against_psnr"):
        path = whole / "figures" / f"{name}.png"
        path.unlink()
        figures.draw(whole)
        assert path.stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__grid": (3, 3)}, r"model: a grid of \(3, 3\) cells does not divide"),
        ({"model__out_channels": 3}, "the images have 1 channels"),
        ({"head": {"type": "convnext", "widths": (4,) * 3, "depths": (1,) * 3}}, "4"),
        ({"head": {"type": "mlp", "hidden_sizes": (0,)}}, "config.head: hidden_sizes"),
        ({"head": {"type": "nosuch"}}, "head.type must be one of"),
        ({"head__hight": 3}, "config.head: .*hight"),
        ({"batch_size": 1295, "points_per_group": 0}, "batch_size|devices"),
        ({"warm_start_steps": 24}, "warm_start_steps must be below num_steps 24"),
        ({"label_weight": -1.0}, "label_weight must be at least 0"),
        ({"latent_dropout": 1.0}, "latent_dropout must be in"),
        ({"validation_fraction": 0.0}, "validation_fraction must be in"),
        ({"methods": ("joint", "joint")}, "methods must be"),
        ({"head_optimizer__name": "nosuch"}, "head_optimizer.name"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        meta_classify.train_and_evaluate(small_config(**changes), tmp_path / "run")


def test_a_head_for_grids_refuses_one_latent_for_each_image(digits):
    config = small_config(head={"type": "vit", "hidden_size": 8, "num_layers": 1})
    model = {"type": "LatentModulatedSiren", "width": 8, "depth": 3, "latent_dim": 5}
    config.model = model
    config.model.out_channels = 1
    with pytest.raises(ValueError, match="the head vit needs grids"):
        meta_classify.make_problem(config, digits)
    config.head = LINEAR
    problem = meta_classify.make_problem(config, digits)
    shapes = jax.eval_shape(problem.head.init, jax.random.key(0))
    assert shapes["linear_0"]["kernel"].shape == (5, 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda label: np.full_like(label, -1), "without a label .-1.*meta_learn"),
        (np.zeros_like, "one class only"),
        (lambda label: np.where(np.arange(len(label)) == 3, 17, label), "class 17"),
    ],
    ids=["none", "one", "absent"],
)
def test_bad_labels(digits, labels, message):
    splits = {name: dict(arrays) for name, arrays in digits.splits.items()}
    for name in data.SPLITS if "class 17" not in message else ("test",):
        splits[name]["label"] = labels(splits[name]["label"])
    with pytest.raises(ValueError, match=message):
        meta_classify.make_problem(small_config(), digits._replace(splits=splits))
