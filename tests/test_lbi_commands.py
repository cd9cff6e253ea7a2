"""train_lbi and prune_lbi: measurements, files, resumption and errors."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import lbi
from experiments import prune_lbi, train_lbi
from experiments.common import data, files, runs
from experiments.common.sweep import mean_and_std
from experiments.configs import prune_lbi as prune_configs
from experiments.configs import train_lbi as train_configs
from experiments.networks import registry
from experiments.training import classifier, loop, optimizers
from experiments.training import lbi as lbi_training

pytestmark = pytest.mark.usefixtures("unoptimized")

LAYERS = ["conv1", "conv2", "conv3", "fc1", "fc2"]


def train_config(**changes):
    config = train_configs.get_config("smoke")
    config.methods = ("dessilbi",)
    config.num_test = 100
    config.update(changes)
    return config


def prune_config(**changes):
    config = prune_configs.get_config("smoke")
    config.num_random = 1
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one method."""
    workdir = tmp_path_factory.mktemp("trained") / "dessilbi_seed0"
    return workdir, train_lbi.train_and_evaluate(train_config(), workdir)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A finished run of two methods."""
    workdir = tmp_path_factory.mktemp("both")
    config = train_config(methods=("adam", "dessilbi"))
    return workdir, train_lbi.train_and_evaluate(config, workdir)


@pytest.mark.slow
def test_table_and_files_of_several_methods(both):
    workdir, summary = both
    assert runs.load_summary(workdir) == summary
    for method in ("adam", "dessilbi"):
        single = summary["runs"][f"{method}_seed0"]
        assert summary[f"{method}_test_accuracy"] == single["test_accuracy"]
        # One seed has no deviation.
        assert f"{method}_test_accuracy_std" not in summary
        own = runs.load_summary(workdir / f"{method}_seed0")
        assert own == single
        assert own["num_params"] == 61706
    assert "density" not in summary["runs"]["adam_seed0"]
    assert 0 < summary["dessilbi_density"] < 1
    assert (workdir / "figures" / "accuracy.png").exists()
    for name in ("path.png", "filters.png"):
        assert (workdir / "dessilbi_seed0" / "figures" / name).exists()


def test_path_in_files_is_that_of_the_state(trained):
    folder, summary = trained
    assert summary == runs.load_summary(folder)
    config = runs.load_config(folder)
    images = classifier.load_images(config)
    loaded = prune_lbi.load_trained(folder, images)
    state = loaded.opt_state
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    assert [n for n in arrays if n.startswith("entry_")] == [
        f"entry_{layer}" for layer in LAYERS
    ]
    kernel = loaded.variables["params"]["conv2"]["kernel"]
    norms = np.linalg.norm(np.reshape(kernel, (-1, 16)), axis=0)
    np.testing.assert_allclose(arrays["norm_conv2"], norms, rtol=1e-5)
    last = files.read_metrics(folder / "metrics.jsonl")[-1]
    inside = lbi.in_support(state)
    for layer in LAYERS:
        entered = arrays[f"entry_{layer}"] >= 0
        now = np.asarray(inside[f"{layer}/kernel"]).ravel()
        assert np.all(entered[now])
        assert last["density_per_layer"][f"{layer}/kernel"] == pytest.approx(now.mean())
    # 256 images in batches of 64, twice: the schedule has eight steps.
    schedule = optimizers.make_schedule(config.optimizer.dessilbi, 8)
    nu = config.optimizer.dessilbi.options.nu
    clock = sum(float(schedule(k)) for k in range(8)) / nu
    assert last["clock"] == pytest.approx(clock, rel=1e-5)
    assert loaded.problem.test_accuracy(loaded.variables) == last["test_accuracy"]
    sparse = loaded.variables | {
        "params": lbi.sparse_params(loaded.variables["params"], state)
    }
    assert loaded.problem.test_accuracy(sparse) == last["sparse_test_accuracy"]


@pytest.mark.slow
def test_resumed_run_ends_like_an_uninterrupted_one(both, tmp_path, monkeypatch):
    workdir, whole = both
    check, calls = loop.check_finite, []

    # Of the second method, after its checkpoint at step 4.
    def stop_once(losses, *, first_step):
        calls.append(first_step)
        if calls == [1, 3, 5, 7, 1, 3, 5]:
            raise KeyboardInterrupt
        check(losses, first_step=first_step)

    monkeypatch.setattr(loop, "check_finite", stop_once)
    config = train_config(methods=("adam", "dessilbi"))
    with pytest.raises(KeyboardInterrupt):
        train_lbi.train_and_evaluate(config, tmp_path)
    resumed = train_lbi.train_and_evaluate(config, tmp_path)
    assert calls[7:] == [5, 7]
    for name in ("adam_seed0", "dessilbi_seed0"):
        ours = resumed["runs"][name] | {"seconds": 0}
        assert ours == whole["runs"][name] | {"seconds": 0}
    with (
        np.load(workdir / "dessilbi_seed0" / "arrays.npz") as first,
        np.load(tmp_path / "dessilbi_seed0" / "arrays.npz") as second,
    ):
        chex.assert_trees_all_equal(dict(first), dict(second))


@pytest.mark.slow
def test_pruning(trained, tmp_path):
    workdir = trained[0]
    summary = prune_lbi.train_and_evaluate(
        prune_config(run=str(workdir)), tmp_path / "pruned"
    )
    assert summary["num_runs"] == 1
    row = json.loads((tmp_path / "pruned" / "dessilbi_seed0.json").read_text())
    assert row["one_layer"]["connected"][0] == row["dense"]
    # Removed and built smaller are the same network.
    compressed = row["compressed"]
    assert compressed["largest_difference_of_logits"] < 1e-5 * max(
        1, compressed["largest_logit"]
    )
    assert compressed["kept_channels"] == {
        "conv1": 4,
        "conv2": 8,
        "conv3": 20,
        "fc1": 24,
    }
    sizes = {
        "conv1": 4 * 26,
        "conv2": 8 * (25 * 4 + 1),
        "conv3": 20 * (25 * 8 + 1),
        "fc1": 24 * 21,
        "fc2": 10 * 25,
    }
    assert compressed["compressed_params"] == sum(sizes.values())
    # Positions of the output times weights of the kernel.
    dense = 784 * 150 + 100 * 2400 + 48000 + 120 * 84 + 84 * 10
    assert compressed["dense_multiply_adds"] == dense
    for name in ("layer_before_and_after.png", "accuracy_against_sparsity.png"):
        assert (tmp_path / "pruned" / "figures" / name).exists()


def test_what_was_pruned_before_a_stop_is_not_pruned_again(
    trained, tmp_path, monkeypatch
):
    config = prune_config(run=str(trained[0]))
    row = {"dense": 0.5, "curves": {"one_layer_entry": [0.5, 0.4]}, "seconds": 1.0}
    files.write_json(tmp_path / "dessilbi_seed0.json", row)
    monkeypatch.setattr(prune_lbi.figures, "draw", lambda workdir: None)
    summary = prune_lbi.train_and_evaluate(config, tmp_path)
    assert summary["dense"] == 0.5 and summary["curves.one_layer_entry"] == [0.5, 0.4]


def test_own_images_are_mixed_before_the_first_ones_are_taken(tmp_path):
    pixels = np.zeros((40, 28, 28, 1), np.uint8)
    labels = np.repeat(np.arange(2, dtype=np.int32), 20)
    pixels[20:] = 255
    for split in data.SPLITS:
        np.savez(tmp_path / f"{split}.npz", image=pixels, label=labels)
    config = train_config(
        dataset={"name": "npz", "data_dir": str(tmp_path)}, num_train=20, num_test=0
    )
    images = classifier.load_images(config)
    kept, kept_labels = images.train
    assert 5 < kept_labels.sum() < 15
    # Each image keeps its label.
    np.testing.assert_array_equal(kept[:, 0, 0, 0] == 255, kept_labels == 1)
    assert len(images.test[0]) == 40


@pytest.mark.slow
def test_finds_the_runs_of_a_method(both, tmp_path):
    workdir = both[0]
    folders = prune_lbi.find_runs(prune_config(run=str(workdir)))
    assert folders == [workdir / "dessilbi_seed0"]
    single = str(workdir / "dessilbi_seed0")
    assert prune_lbi.find_runs(prune_config(run=single)) == folders
    with pytest.raises(FileNotFoundError, match="holds no run"):
        prune_lbi.find_runs(prune_config(run=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no dessilbi_adam_seed"):
        prune_lbi.find_runs(prune_config(run=str(workdir), method="dessilbi_adam"))
    with pytest.raises(ValueError, match="adam has no structure parameter"):
        prune_lbi.find_runs(prune_config(run=str(workdir), method="adam"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": (1.0,)}, r"sparsities must be .* each value in \[0, 1\)"),
        ({"compress": {"conv1": 0.0}}, r"compress.conv1 must be in \(0, 1\]"),
        ({"layer": "conv9"}, "there is no layer conv9"),
        ({"num_random": 0}, "num_random must be at least 1"),
    ],
)
def test_prune_refuses_bad_settings(trained, tmp_path, changes, message):
    config = prune_config(run=str(trained[0]), **changes)
    with pytest.raises(ValueError, match=message):
        prune_lbi.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"methods": ("lars",)}, "methods must be .* each value one of adam"),
        ({"penalty": "lasso"}, "penalty must be one of auto, suggested"),
        ({"batch_size": 1000}, "batch_size must be between 1 and the 256"),
        ({"model": {"type": "ResNet"}}, "must be one of LeNet, VGG"),
        ({"model": {"type": "LeNet", "depth": 3}}, "config.model"),
        ({"model": {"type": "DeepLinear"}}, "model.type must be one of LeNet, VGG"),
        ({"image_size": 4}, "the network takes 4x4 pixels"),
        ({"optimizer": {"dessilbi": {"options": {"mu": 2.0}}}}, "dessilbi.options"),
        ({"optimizer": {"dessilbi": {"name": "sgd"}}}, "must be one of adam"),
        (
            {"optimizer": {"dessilbi": {"options": {"nu": 0.0}}}},
            "options.nu must be above 0",
        ),
    ],
)
def test_train_refuses_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_lbi.train_and_evaluate(train_config(**changes), tmp_path)


def test_warns_when_nothing_can_enter(tmp_path, capsys, monkeypatch):
    def stop(self, state):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "restore", stop)
    with pytest.raises(KeyboardInterrupt):
        train_lbi.train_and_evaluate(train_config(penalty="auto"), tmp_path)
    assert "warning: no group can enter" in capsys.readouterr().out


def test_double_step_of_the_report():
    """Adam's step, then DessiLBI's from there with the same gradient, by hand."""
    rate, nu = 0.1, 2.0
    params = {"fc": jnp.array([[1.0, -2.0]])}
    grads = {"fc": jnp.array([[0.5, 0.25]])}
    optimizer = lbi_training.adam_then_dessilbi(
        optax.constant_schedule(rate), nu=nu, momentum=0.9
    )
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    # The first step of Adam is the sign; Gamma is still zero.
    between = np.array([[1.0, -2.0]]) - rate * np.sign([[0.5, 0.25]])
    expected = between - rate * (np.array([[0.5, 0.25]]) + between / nu)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["fc"], expected, rtol=1e-5)
    [coupling] = lbi.find_states(state)
    np.testing.assert_allclose(coupling.dual["fc"], rate / nu * between, rtol=1e-5)


def test_label_smoothing_gives_every_class_its_share():
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 2, 1, 1, 0])
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    at_label = log_probabilities[np.arange(5), labels]
    # 1 - 0.3 + 0.3 / 3 at the label and 0.3 / 3 at the two others.
    smoothed = -(0.7 * at_label + 0.1 * log_probabilities.sum(1)).mean()
    for amount, expected in ((0.0, -at_label.mean()), (0.3, smoothed)):
        loss = classifier.cross_entropy(logits, labels, label_smoothing=amount)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_small_images_are_enlarged_and_padded():
    pixels = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    enlarged = classifier._enlarge(pixels, 5)
    expected = np.zeros((5, 5), np.uint8)
    expected[:4, :4] = np.kron([[0, 1], [2, 3]], np.ones((2, 2), np.uint8))
    np.testing.assert_array_equal(enlarged[0, ..., 0], expected)


@pytest.mark.slow
def test_recalibration_gives_the_statistics_of_the_data():
    config = train_config(
        image_size=32,
        model={
            "type": "VGG",
            "stages": ((4,), (4,), (4,), (4,), (4,)),
            "hidden": (4, 4),
        },
        num_train=64,
    )
    images = classifier.load_images(config)
    model = registry.make_model(config.model.to_dict(), images.num_classes)
    variables = classifier.init_variables(model, images, 0)
    fresh = classifier.recalibrate(
        model, images, variables, num_batches=2, batch_size=32
    )
    # The first layer's inputs do not depend on any statistics.
    batches = classifier.normalize(images, jnp.asarray(images.train[0]))
    kernel = variables["params"]["conv1"]["kernel"]
    outputs = jax.lax.conv_general_dilated(
        batches, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    halves = np.reshape(outputs, (2, -1, 4))
    stats = fresh["batch_stats"]["bn1"]
    # The absolute part: means near zero, in float32.
    np.testing.assert_allclose(stats["mean"], halves.mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], halves.var(1).mean(0), rtol=1e-4)
    chex.assert_trees_all_equal(fresh["params"], variables["params"])
    lenet = registry.make_model({"type": "LeNet"}, 10)
    same = {"params": {}, "batch_stats": {}}
    assert classifier.recalibrate(lenet, images, same, num_batches=1) is same


def test_an_update_stays_in_one_epoch():
    config = train_config()
    images = classifier.load_images(config)
    model = registry.make_model(config.model.to_dict(), images.num_classes)
    update = classifier.make_update(
        model, images, optax.sgd(0.1), batch_size=64, augmented=False, seed=0
    )
    with pytest.raises(ValueError, match="must be in one epoch"):
        update(None, 3, 5)


def test_batches_are_those_of_the_shuffled_epochs():
    """A step on a linear model shows which images it saw."""
    config = train_config()
    images = classifier.load_images(config)

    class Bias:
        def apply(self, variables, batch, *, train, mutable):
            del train, mutable
            return batch.mean((1, 2)) @ variables["params"], {}

    weights = jnp.ones((1, 10))
    optimizer = optax.sgd(0.0)
    state = classifier.TrainState(
        weights, {}, optimizer.init(weights), jnp.zeros(8), jnp.zeros(8)
    )
    update = classifier.make_update(
        Bias(), images, optimizer, batch_size=64, augmented=False, seed=3
    )
    state = update(state, 5, 7)
    for step in (5, 6):
        indices = data.batch_indices(3, step, num_examples=256, batch_size=64)
        # Equal logits: the first class is taken.
        expected = np.mean(images.train[1][indices] == 0)
        assert state.accuracy[step] == pytest.approx(expected)
    assert np.flatnonzero(state.loss).tolist() == [5, 6]


def test_summary_over_runs():
    rows = [{"a": 1.0, "b": {"c": [1.0, 2.0]}}, {"a": 3.0, "b": {"c": [3.0, 2.0]}}]
    summary = mean_and_std(rows)
    assert summary["a"] == 2.0
    assert summary["a_std"] == pytest.approx(np.sqrt(2))
    np.testing.assert_allclose(summary["b.c"], [2.0, 2.0])
    np.testing.assert_allclose(summary["b.c_std"], [np.sqrt(2), 0.0])
    assert "a_std" not in mean_and_std(rows[:1])


def test_config_of_prune_names_existing_runs():
    for variant in prune_configs.VARIANTS:
        config = prune_configs.get_config(variant)
        assert config.run == f"runs/train_lbi/{variant}"
        stored = train_configs.get_config(variant)
        assert isinstance(stored, ConfigDict) and config.method in stored.methods
