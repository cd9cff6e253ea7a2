"""compare_pruning: its baselines against closed forms, grains, masks, and one run."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics import random_like

import lbi
from experiments import compare_pruning
from experiments.common import files
from experiments.configs import compare_pruning as configs
from experiments.networks import registry
from experiments.networks.lenet import LeNet
from experiments.networks.resnet import ResNet
from experiments.training import classifier, pruning
from experiments.training.classifier import TrainState

LENET = LeNet(features=(3, 4, 5), hidden=6)
IMAGE = (28, 28, 1)


def smoke_config(**changes):
    config = configs.get_config("smoke")
    config.update(changes)
    return config


@functools.cache
def lenet_structure(grain):
    return pruning.make_structure(grain, LENET, IMAGE)


@functools.cache
def lenet_variables():
    shapes = jax.eval_shape(LENET.init, jax.random.key(0), jnp.ones((1, *IMAGE)))
    params = jax.tree.map(jnp.asarray, random_like(shapes["params"]))
    return {"params": params, "batch_stats": {}}


def test_proximal_steps_end_at_the_group_lasso():
    """Of |W - t|^2 / 2 + Omega(W), whatever the rate; the closed form is prox(t)."""
    rng = np.random.default_rng(0)
    target = {
        "conv": jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32),
        "fc": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=6), jnp.float32),
    }
    penalty = {"conv": lbi.GroupL2(2.2), "fc": lbi.L1(0.5)}
    optimizer = pruning.proximal_sgd(
        optax.cosine_decay_schedule(0.3, 60), momentum=0.0, penalty=penalty
    )

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = jax.tree.map(jnp.ones_like, target)
    carry = carry, optimizer.init(carry)
    params = jax.jit(lambda c: jax.lax.scan(step, c, length=80)[0][0])(carry)
    expected = {name: penalty[name].prox(target[name]) for name in penalty}
    zeros = [np.mean(leaf == 0) for leaf in expected.values()]
    assert all(0 < share < 1 for share in zeros), zeros
    # The rate is zero after 60 steps; the distance has shrunk by exp(-9) until then.
    chex.assert_trees_all_close(
        params, expected | {"bias": target["bias"]}, rtol=1e-3, atol=2e-3
    )
    for name, leaf in expected.items():
        np.testing.assert_array_equal(params[name] == 0, leaf == 0)


def test_lasso_takes_its_share_of_the_median_group():
    kernel = jnp.broadcast_to(jnp.array([1.0, 2.0, 4.0]), (1, 1, 4, 3))
    params = {"conv": {"kernel": kernel}}
    schedule, num_steps = optax.cosine_decay_schedule(0.1, 50), 50
    penalty = pruning.lasso_penalty(params, schedule, num_steps, "auto", 0.75)
    optimizer = pruning.proximal_sgd(schedule, momentum=0.0, penalty=penalty)
    state, still = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    start = params
    for _ in range(num_steps):
        updates, state = update(still, state, params)
        params = optax.apply_updates(params, updates)
    norms = [
        np.sqrt(np.sum(np.square(tree["conv"]["kernel"]), axis=(0, 1, 2)))
        for tree in (start, params)
    ]
    # All filters lose 0.75 of the norm of the second one, 4; the first had less.
    np.testing.assert_allclose(norms[0], [2, 4, 8])
    np.testing.assert_allclose(norms[1], [0, 1, 5], rtol=1e-5, atol=1e-6)


def test_cubic_schedule_by_hand():
    # 0.8 (1 - (3/4)^3), 0.8 (1 - (1/2)^3), 0.8 (1 - (1/4)^3), 0.8
    expected = {5: 0.4625, 10: 0.7, 15: 0.7875, 20: 0.8}
    assert pruning.cubic(0.8, 20, 4) == pytest.approx(expected)
    # With more prunings than steps the last one counts.
    assert pruning.cubic(0.8, 1, 4)[1] == pytest.approx(0.8)


GROUPS = {
    "weights": 25 * (3 + 12 + 20) + 5 * 6 + 6 * 10,
    "rows": 5 * (3 + 12 + 20) + 5 * 6 + 6 * 10,
    "kernels": (3 + 12 + 20) + 5 * 6 + 6 * 10,
    "filters": 3 + 4 + 5 + 6,
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("grain", pruning.GRAINS)
def test_number_of_groups_of_a_grain(grain):
    structure, params = lenet_structure(grain), lenet_variables()["params"]
    importance = lbi.pruning.magnitude_importance(params, structure.penalty)
    assert sum(scores.size for scores in importance.values()) == GROUPS[grain]
    kernel = np.asarray(params["conv2"]["kernel"])
    axes = {"weights": (), "rows": 1, "kernels": (0, 1), "filters": (0, 1, 2)}[grain]
    norms = np.sqrt(np.sum(kernel**2, axis=axes)) if axes != () else np.abs(kernel)
    np.testing.assert_allclose(importance["conv2/kernel"], norms, rtol=1e-6)


@pytest.mark.parametrize("grain", ["weights", "rows", "kernels"])
def test_masks_of_a_grain_remove_whole_groups(grain):
    structure, variables = lenet_structure(grain), lenet_variables()
    importance = lbi.pruning.magnitude_importance(
        variables["params"], structure.penalty
    )
    masks = pruning.make_masks(structure, importance, 0.75, "layer", variables)
    kernel = np.asarray(masks["params"]["conv2"]["kernel"])  # (5, 5, 3, 4)
    for axis in {"weights": (), "rows": (1,), "kernels": (0, 1)}[grain]:
        assert np.all(kernel == kernel.take([0], axis=axis))
    assert kernel.mean() == 0.25
    assert all(np.all(layer["bias"]) for layer in masks["params"].values())


def test_masks_of_filters_give_the_thin_network():
    structure, variables = lenet_structure("filters"), lenet_variables()
    importance = lbi.pruning.magnitude_importance(
        variables["params"], structure.penalty
    )
    masks = pruning.make_masks(structure, importance, 0.5, "layer", variables)
    # 2 (rounded up from 1.5), 2, 2 and 3 channels are left.
    kept = 2 * 26 + 2 * (25 * 2 + 1) + 2 * (25 * 2 + 1) + 3 * 3 + 10 * 4
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks["params"])) == kept
    norms = np.linalg.norm(variables["params"]["fc1"]["kernel"], axis=0)
    largest = set(np.argsort(-norms)[:3].tolist())
    assert set(np.flatnonzero(masks["params"]["fc1"]["bias"]).tolist()) == largest


def test_channels_of_a_residual_sum_have_the_importance_of_all_their_filters():
    model = ResNet(widths=(4,), num_classes=3)
    structure = pruning.make_structure("filters", model, (4, 4, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    # Alone, the stem would keep channels 0 and 1, the block 2 and 3.
    importance = {
        "conv/kernel": np.array([3.0, 2.0, 1.0, 0.0]),
        "block1_1_conv2/kernel": np.array([0.0, 0.1, 5.0, 4.0]),
        "block1_1_conv1/kernel": np.arange(4.0),
    }
    assert set(structure.penalty) == {f"^{path}$" for path in importance}
    masks = pruning.make_masks(structure, importance, 0.5, "layer", variables)
    for name in ("conv_bn", "block1_1_conv2_bn"):
        kept = [False, False, True, True]
        np.testing.assert_array_equal(masks["params"][name]["scale"], kept)
        np.testing.assert_array_equal(masks["batch_stats"][name]["mean"], kept)
    np.testing.assert_array_equal(
        masks["params"]["fc"]["kernel"].all(1), [False, False, True, True]
    )


def test_gradual_pruning_keeps_what_it_removed_at_zero():
    params = {"kernel": jnp.array([[0.1, -0.2, 0.3, 0.4]])}
    optimizer = pruning.masked(optax.sgd(1.0, momentum=0.9))
    structure = pruning.Structure({"kernel": lbi.L1()})

    def choose(variables, sparsity):
        importance = lbi.pruning.magnitude_importance(
            variables["params"], structure.penalty
        )
        return pruning.make_masks(structure, importance, sparsity, "layer", variables)

    def update(state, first, last):
        for _ in range(first, last):
            updates, opt_state = optimizer.update(
                {"kernel": jnp.full((1, 4), -1.0)}, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
            state = state.replace(params=params, opt_state=opt_state)
        return state

    state = TrainState(params, {}, optimizer.init(params), jnp.zeros(4), jnp.zeros(4))
    gradual = pruning.gradually(update, choose, {1: 0.5, 2: 0.75})
    zeros = []
    for step in range(4):
        state = gradual(state, step, step + 1)
        zeros.append(
            np.flatnonzero(np.asarray(state.params["kernel"])[0] == 0).tolist()
        )
    # The first step adds 1 to all: the second weight is now the smallest.
    assert zeros == [[], [0, 1], [0, 1, 2], [0, 1, 2]]


@pytest.mark.slow
def test_a_filter_that_nothing_reads_has_no_first_order_effect():
    config = smoke_config(batch_size=16)
    config.model = {"type": "LeNet", "features": LENET.features, "hidden": 6}
    problem = classifier.make_problem(config, classifier.load_images(config))
    # This convolution compiles faster.
    model = problem.model.clone(conv=jax.lax.conv_general_dilated)
    problem = problem._replace(model=model)
    params = jax.tree.map(jnp.asarray, problem.variables["params"])
    params["conv2"]["kernel"] = params["conv2"]["kernel"].at[:, :, 1].set(0)
    state = TrainState(params, {}, opt_state=(), loss=(), accuracy=())
    importance = compare_pruning.make_importance(
        config, problem, lenet_structure("filters"), state, "taylor"
    )
    assert np.flatnonzero(importance["conv1/kernel"] == 0).tolist() == [1]
    assert list(importance) == [
        f"{n}/kernel" for n in ("conv1", "conv2", "conv3", "fc1")
    ]


def test_validation_images_are_not_trained_on():
    images = classifier.load_images(smoke_config())
    training, (pixels, labels) = classifier.split_validation(images, 64)
    assert len(training.train[0]) == len(training.train[1]) == 256
    for whole, first, last in zip(
        images.train, training.train, (pixels, labels), strict=True
    ):
        np.testing.assert_array_equal(whole, np.concatenate([first, last]))
    assert training.test is images.test


@pytest.mark.slow_after(7)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_validation": 320}, "num_validation must be below the 320 training"),
        (
            {"sparsities": {"weights": (), "filters": ()}},
            "sparsities must have a value",
        ),
        ({"sparsities": {"weights": (1.0,)}}, r"sparsities.weights must be .*\[0, 1\)"),
        ({"scopes": {"weights": ("row",)}}, "scopes.weights must be .* layer, global"),
        ({"methods": ("snip",)}, "methods must be .* one of dessilbi"),
        ({"gradual": {"until": 1.0}}, r"gradual.until must be in \(0, 1\)"),
        ({"model": {"type": "MLP"}}, "model.type must be one of LeNet"),
        (
            {"optimizer": {"sgd": {"options": {"momentum": 1.0}}}},
            "sgd.options.momentum",
        ),
        ({"optimizer": {"sgd": {"options": {"b1": 0.9}}}}, "optimizer.sgd.options"),
        ({"optimizer": {"dessilbi": {"options": {"nu": 0.0}}}}, "options.nu must be"),
        ({"optimizer": {"group_lasso": {"learning_rate": 0.0}}}, "must be above 0"),
        ({"finetune": {"name": "nothing"}}, "finetune.name"),
    ],
)
def test_refuses_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare_pruning.train_and_evaluate(smoke_config(**changes), tmp_path)


def test_every_training_has_an_optimizer_and_every_method_a_label():
    from experiments.drawing import lbi

    config = configs.get_config()
    for training, _ in configs.METHODS.values():
        assert training in config.optimizer
    assert set(lbi._PRUNING_METHODS) == set(configs.METHODS)
    assert set(config.sparsities) == set(config.scopes) == set(pruning.GRAINS)
    for variant in configs.VARIANTS:
        config = configs.get_config(variant)
        registry.make_model(config.model.to_dict(), 10)


@pytest.mark.slow
def test_a_run_resumes_where_it_stopped(tmp_path, monkeypatch):
    methods = ("dessilbi", "magnitude", "taylor", "gradual")
    config = smoke_config(methods=methods, sparsities={"filters": ()})
    write = files.write_json

    def stop_at_gradual(path, value):
        if "gradual" in path.name:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(files, "write_json", stop_at_gradual)
    with pytest.raises(KeyboardInterrupt):
        compare_pruning.train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(files, "write_json", write)
    finished = tmp_path / "seed0" / "pruned" / "weights_magnitude_0.9.json"
    row = json.loads(finished.read_text())
    # A later run reads this file: it is not pruned again.
    finished.write_text(json.dumps(row | {"after": 0.125}))
    summary = compare_pruning.train_and_evaluate(config, tmp_path)
    table = summary["runs"]["seed0"]["weights"]
    assert list(table) == list(methods)
    assert table["magnitude"]["after"] == [0.125] == summary["weights.magnitude.after"]
    kept = {method: rows["kept_params"] for method, rows in table.items()}
    # A tenth of the weights of each layer or of all, and the biases.
    biases, weights = 6 + 16 + 120 + 84 + 10, 150 + 2400 + 48000 + 10080 + 840
    for [share] in kept.values():
        assert share == pytest.approx((0.1 * weights + biases) / 61706, abs=1e-4)
    assert "before" not in table["gradual"]
    assert set(summary["runs"]["seed0"]["dense"]) == {"sgd", "dessilbi_weights"}
    # Only results are left of the fine-tuned networks.
    assert not [path for path in finished.parent.iterdir() if path.is_dir()]
    assert (tmp_path / "figures" / "accuracy_against_sparsity.png").exists()
