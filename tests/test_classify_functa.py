"""functa.classifier and experiments.classify_functa."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functa_runs import copy_at_first_save
from numerics import random_like

from experiments import classify_functa
from experiments.common import files, runs
from experiments.configs import classify_functa as classify_functa_config
from experiments.drawing import figures
from experiments.networks import heads
from functa import classifier, functaset

pytestmark = pytest.mark.usefixtures("unoptimized")

# Three well separated classes of latents with entries of very different size.
CENTERS = np.array([[3.0, 0, 0, 1], [0, 3, 0, 1], [0, 0, 3, 1]]) * [1, 10, 0.1, 0]


def make_functaset(num_train=60, num_test=15, copies=1):
    rng = np.random.default_rng(0)
    label = np.concatenate([np.tile(np.arange(num_train) % 3, copies)]
                           + [np.arange(num_test) % 3])  # fmt: skip
    noise = rng.normal(size=(len(label), 4)) * [0.3, 3, 0.03, 0]
    latent = np.float32(CENTERS[label] + noise)
    train = latent[: num_train * copies]
    return functaset.Functaset(
        latent=latent,
        label=label.astype(np.int32),
        psnr=np.zeros(len(label), np.float32),
        split=np.array(["train"] * len(train) + ["test"] * num_test),
        mean=train.mean(0),
        std=train.std(0),
        config={"copies": copies},
        params_sha256="0" * 64,
    )


def make_config(path, variant="smoke", **changes):
    config = classify_functa_config.get_config(variant)
    config.functaset = str(path)
    config.batch_size = 8
    # Noise takes a second to compile, and dropout draws numbers already.
    config.candidates.noise_std = (0.0,)
    config.update(changes)
    return config


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "functaset.npz"
    functaset.save_functaset(path, make_functaset())
    return path


@pytest.mark.parametrize(
    "variant, num_params", [("report_mlp1", 165_514), ("report_mlp2", 173_130)]
)
def test_number_of_parameters_of_the_reports_networks(variant, num_params):
    # 512-256-128-10 and 512-256-128-64-10, weights and biases.
    config = classify_functa_config.get_config(variant)
    head = heads.make_head(config.model.to_dict(), 10, (512,))
    params = jax.eval_shape(head.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == num_params


def random_variables(model, x):
    """Weights without the seconds that compiling an initialiser takes."""
    return random_like(jax.eval_shape(model.init, jax.random.key(0), x), seed=1)


def test_mlp_against_numpy():
    model = classifier.MLP((5, 3), 2)
    x = np.float32(np.random.default_rng(0).normal(size=(4, 6)))
    variables = random_variables(model, x)
    y = x
    for i in range(3):
        layer = variables["params"][f"linear_{i}"]
        y = y @ layer["kernel"] + layer["bias"]
        y = np.maximum(y, 0) if i < 2 else y
    # The order of the sums differs.
    chex.assert_trees_all_close(model.apply(variables, x), y, rtol=1e-5, atol=1e-5)
    key = jax.random.key(2)
    same = model.apply(variables, x, dropout_rate=0.0, key=key)
    chex.assert_trees_all_close(same, y, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean():
    model = classifier.MLP((4000,), 1)
    x = jnp.ones((1, 2))
    ones = jax.tree.map(np.ones_like, random_variables(model, x))
    plain = model.apply(ones, x)
    dropped = model.apply(ones, x, dropout_rate=0.25, key=jax.random.key(1))
    # The share that is kept has a deviation of sqrt(0.25 * 0.75 / 4000) = 0.7 %.
    np.testing.assert_allclose(dropped, plain, rtol=0.03)
    assert not np.allclose(dropped, plain, rtol=1e-5)


def test_cross_entropy_and_label_smoothing():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    labels = jnp.array([2, 1])
    targets = classifier.smooth_labels(labels, 3, 0.0)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = classifier.cross_entropy(logits, targets)
    chex.assert_trees_all_close(loss, expected, rtol=1e-6)
    smooth = classifier.smooth_labels(labels, 3, 0.3)
    np.testing.assert_allclose(smooth, [[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]], atol=1e-6)
    # Of sure and right logits, the second softmax leaves log(1 + (K - 1) / e).
    twice = classifier.cross_entropy(100 * targets, targets, double_softmax=True)
    np.testing.assert_allclose(twice, np.log(1 + 2 / np.e), rtol=1e-6)


def test_mixup_mixes_latents_as_targets():
    targets = jax.nn.one_hot(jnp.arange(6), 6)
    mixed, mixed_targets = classifier.mixup(jax.random.key(0), targets, targets, 0.5)
    # Latents that are their own targets stay so.
    chex.assert_trees_all_equal(mixed, mixed_targets)
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)
    weights = np.sort(mixed, axis=1)
    assert (weights[:, :4] == 0).all() and (weights[:, 4] <= 0.5).all()
    assert (weights[:, 4] > 0).all()
    same, _ = classifier.mixup(jax.random.key(1), targets, targets, 0.0)
    chex.assert_trees_all_equal(same, targets)


def test_linear_probe_finds_a_linear_map():
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (200, 5))
    labels = jnp.argmax(x @ jax.random.normal(key_w, (5, 3)), axis=1)
    probe = classifier.linear_probe(x, labels, 3)
    predicted = classifier.predict(probe, x, batch_size=30)
    assert predicted.shape == (200,) and predicted.dtype == jnp.int32
    assert (predicted == labels).mean() > 0.98


def test_validation_holds_out_all_copies_of_its_images(tmp_path):
    made = make_functaset(num_train=20, copies=3)
    # The latent says which image and which copy a row is.
    rows = np.stack([np.arange(75) % 20, np.arange(75) // 20] * 2, axis=1)
    made = made._replace(latent=rows.astype(np.float32))
    functaset.save_functaset(tmp_path / "a.npz", made)
    config = make_config(tmp_path / "a.npz", normalize=False, validation_fraction=0.3)
    splits = classify_functa.load_signals(config, config.functaset).splits
    (train, labels), (validation, _) = splits["train"], splits["validation"]
    assert train.shape == (3 * 14, 4) and validation.shape == (6, 4)
    assert len(splits["test"][0]) == 15
    assert not set(train[:, 0]) & set(validation[:, 0])
    assert set(validation[:, 1]) == {0}
    np.testing.assert_array_equal(labels, np.int32(train[:, 0]) % 3)


def test_classes_that_only_the_validation_part_has_are_named(tmp_path, capsys):
    made = make_functaset(num_train=20, copies=3)
    config = make_config(tmp_path / "a.npz", validation_fraction=0.3)
    functaset.save_functaset(tmp_path / "a.npz", made)
    classify_functa.load_signals(config, config.functaset)
    assert "not learned" not in capsys.readouterr().out
    held_out = np.random.default_rng(0).permutation(20)[:6]  # As in the command.
    labels = made.label.copy()
    labels[: 3 * 20].reshape(3, 20)[:, held_out[0]] = 7
    functaset.save_functaset(tmp_path / "a.npz", made._replace(label=labels))
    classify_functa.load_signals(config, config.functaset)
    assert "all training images of the classes 7 are in" in capsys.readouterr().out


def one_epoch(config, latents, labels):
    settings = classify_functa.make_candidates(config)
    config.model.hidden_sizes = ()
    head = heads.make_head(config.model.to_dict(), 3, latents.shape[1:])
    state = classify_functa.init_state(config, head, settings)
    start = jax.tree.map(np.asarray, state.params)
    epoch = classify_functa.make_epoch(config, head, settings, num_images=len(labels))
    state, losses = epoch(state, latents, labels, jax.random.key(0))
    return head, start, state, losses


def test_weight_decay_of_the_report_is_in_the_gradient():
    config = make_config("none", "report_mlp1_decay", batch_size=10)
    config.candidates.weight_decay = (0.2,)
    rng = np.random.default_rng(0)
    latents = np.float32(rng.normal(size=(10, 4)))
    labels = np.arange(10) % 3
    head, start, state, _ = one_epoch(config, latents, labels)
    params = jax.tree.map(lambda x: x[0], start)

    def loss(params):
        logits = head.apply(params, latents)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss)(params)
    # Adam's first step is the rate times the sign of the gradient.
    expected = jax.tree.map(
        lambda x, grad: x - 1e-3 * np.sign(grad + 0.2 * x), params, grads
    )
    trained = jax.tree.map(lambda x: x[0], state.params)
    chex.assert_trees_all_close(trained, expected, atol=1e-6)


def test_candidates_do_not_touch_each_other():
    config = make_config("none")
    config.candidates.update({name: (0.0,) for name in config.candidates})
    latents = np.float32(np.random.default_rng(0).normal(size=(19, 4)))
    labels = np.arange(19) % 3

    def train(*rates):
        config.candidates.learning_rate = rates
        return one_epoch(config, latents, labels)[2:]

    both, losses = train(1e-2, 1e-1)
    alone, loss = train(1e-1)
    second = jax.tree.map(lambda x: x[1:], both.params)
    chex.assert_trees_all_close(second, alone.params, atol=1e-6)
    chex.assert_trees_all_close(losses[1:], loss, atol=1e-6)
    # No moving average: what is evaluated are the weights themselves.
    chex.assert_trees_all_equal(both.average, both.params)


def test_groups_have_the_gradient_of_the_batch():
    config = make_config("none", batch_size=12)
    config.candidates.update({name: (0.0,) for name in config.candidates})
    config.candidates.update(learning_rate=(1e-2,), label_smoothing=(0.1,))
    latents = np.float32(np.random.default_rng(0).normal(size=(24, 4)))
    labels = np.arange(24) % 3
    *_, whole, loss = one_epoch(config, latents, labels)
    config.images_per_group = 4
    *_, grouped, grouped_loss = one_epoch(config, latents, labels)
    chex.assert_trees_all_close(grouped.params, whole.params, atol=1e-6)
    chex.assert_trees_all_close(grouped_loss, loss, atol=1e-6)


def test_keep_best_chooses_for_each_candidate():
    params = {"w": jnp.array([[1.0], [2.0], [3.0]])}
    best = {
        "params": {"w": jnp.zeros((3, 1))},
        "accuracy": jnp.array([0.5, 0.5, 0.5]),
        "epoch": jnp.array([1, 1, 1]),
    }
    state = classify_functa.TrainState(params, None, params, best)
    # Of equally good epochs the last is kept.
    state = classify_functa.keep_best(state, jnp.array([0.4, 0.6, 0.5]), 7)
    assert state.best["params"]["w"].tolist() == [[0], [2], [3]]
    assert state.best["epoch"].tolist() == [1, 7, 7]
    np.testing.assert_allclose(state.best["accuracy"], [0.5, 0.6, 0.5])


@pytest.mark.slow
def test_run_stopped_and_resumed_ends_as_one_left_alone(path, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        copy_at_first_save(patch, whole, stopped)
        summary = classify_functa.train_and_evaluate(make_config(path), whole)
    assert [m["step"] for m in files.read_metrics(stopped / "metrics.jsonl")] == [
        1,
        2,
    ]
    resumed = classify_functa.train_and_evaluate(make_config(path), stopped)
    assert resumed | {"seconds": 0} == summary | {"seconds": 0}
    first, second = (
        [{**m, "seconds": 0} for m in files.read_metrics(workdir / "metrics.jsonl")]
        for workdir in (whole, stopped)
    )
    assert first == second and [m["step"] for m in first] == [1, 2, 3, 4]
    # The test split is looked at once, at the end.
    assert not any("test" in name for name in first[0])
    assert (summary["num_train"], summary["num_validation"]) == (54, 6)
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["linear_probe_test_accuracy"] == 1
    with np.load(whole / "arrays.npz") as arrays:
        assert arrays["confusion"].sum(1).tolist() == [5, 5, 5]
        right = np.trace(arrays["confusion"]) / 15
    assert right == pytest.approx(summary["test_accuracy"])
    (whole / "figures" / "confusion.png").unlink()
    figures.draw(whole)
    assert (whole / "figures" / "confusion.png").stat().st_size > 1000
    again = classify_functa.train_and_evaluate(make_config(path), whole)
    assert again == runs.load_summary(whole)


def test_other_latents_or_labels_of_the_same_weights_are_noticed(path):
    signals = classify_functa.load_signals(make_config(path), path)
    whole = make_functaset()
    found = [signals.digests]
    for changes in ({"latent": 2 * whole.latent}, {"label": (whole.label + 1) % 3}):
        functaset.save_functaset(path, whole._replace(**changes))
        found.append(classify_functa.load_signals(make_config(path), path).digests)
    assert len({digests["functaset"] for digests in found}) == 1
    assert len({digests["content of the functaset"] for digests in found}) == 3


@pytest.mark.slow
def test_report_variant_logs_the_reports_table(path, tmp_path):
    config = make_config(path, "report_mlp1", num_epochs=4)
    config.update({"log_every": 2, "checkpoint_every": 4, "normalize": True})
    config.candidates.learning_rate = (1e-2,)
    summary = classify_functa.train_and_evaluate(config, tmp_path / "run")
    assert summary["epochs"] == [2, 4]
    assert summary["epoch"] == 4 and summary["num_train"] == 60
    assert len(summary["train_accuracy_per_epoch"]) == 2
    # Well separated classes: a network of this size has them after a few epochs.
    assert summary["test_accuracy_per_epoch"][-1] == summary["test_accuracy"] == 1
    assert "validation_accuracy" not in summary


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda f: f._replace(label=np.full_like(f.label, -1)), "without a label"),
        (lambda f: f._replace(label=np.zeros_like(f.label)), "of one class only"),
        (
            lambda f: f._replace(
                label=np.where((f.split == "train") & (f.label == 2), 0, f.label)
            ),
            "test split of .* signals of class 2, but the training split has none",
        ),
        (lambda f: f.select("train"), "has no test split"),
        (lambda f: f.select("test"), "has no train split"),
        (lambda f: f._replace(config={"copies": 7}), "are not 7 copies"),
        (lambda f: f._replace(config={"copies": 3}), "labels of its 3 copies differ"),
        (lambda f: f._replace(config={"copies": 0}), "copies must be an integer of at"),
        (lambda f: f._replace(config={"copies": "2"}), "at least 1, got '2'"),
        (lambda f: f._replace(config={"padding": -1}), "padding must be .* least 0"),
        (lambda f: f._replace(config={"seed": "x"}), "seed must be an integer"),
        (lambda f: f._replace(config={"dataset": 3}), "dataset must be of type str"),
        (lambda f: f._replace(config={"image_size": "8"}), "must be of type int"),
        (
            lambda f: f._replace(config={"class_names": ["a", "b"]}),
            "class_names must be a list of at least 3 names, got .'a', 'b'.",
        ),
        (
            lambda f: f._replace(config={"class_names": ["a", ["b"], {}]}),
            "class_names must be a list of at least 3 names, got .'a', .'b'., {}",
        ),
    ],
)
def test_functaset_that_can_not_be_classified(tmp_path, changes, message):
    path = tmp_path / "a.npz"
    functaset.save_functaset(path, changes(make_functaset()))
    with pytest.raises(ValueError, match=message):
        classify_functa.train_and_evaluate(make_config(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("candidates.dropout_rate", (1.0,), "candidates.dropout_rate must be"),
        ("candidates.noise_std", (), "candidates.noise_std must be"),
        ("validation_fraction", 0.0, "one of 2 candidates needs a validation part"),
        ("validation_fraction", 1.0, "validation_fraction must be"),
        ("data_dir", "x", "data_dir=x is not read"),
        ("model.type", "cnn", "model.type must be one of mlp, vit, convnext"),
        ("schedule", "linear", "schedule must be one of constant, cosine"),
        ("model.activation", "rellu", "no activation 'rellu'"),
        ("batch_size", 55, "between 1 and the 54 training images"),
        ("checkpoint_every", 0, "checkpoint_every must be at least 1"),
    ],
)
def test_config_mistakes_are_named(path, name, value, message):
    config = make_config(path)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        classify_functa.train_and_evaluate(config, path.parent / "run")


def test_missing_functaset_says_what_writes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="experiments.make_functaset"):
        classify_functa.train_and_evaluate(make_config("none.npz"), tmp_path / "run")
