"""train_vit and prune_vit: measurements, files, resumption and errors."""

import itertools
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vit_files
from ml_collections import ConfigDict

import vit
from experiments import prune_vit, train_vit
from experiments.common import files, runs
from experiments.configs import prune_vit as prune_configs
from experiments.configs import train_vit as train_configs
from experiments.drawing import figures
from experiments.training import classifier, loop, vit_pruning
from experiments.training import vit as vit_training
from vit.model import per_layer

pytestmark = pytest.mark.usefixtures("unoptimized")

ROOT = Path(__file__).parents[1]
# One of each kind: a cascade, another image size, masks, cut weights, learned scores.
METHODS = ("max", "resolution", "released_code", "heads", "neurons_lbi")


def train_config(**changes):
    config = train_configs.get_config("smoke")
    config.num_train, config.num_test, config.batch_size = 128, 40, 32
    config.log_every, config.checkpoint_every = 2, 4
    config.model.update(num_layers=2, hidden_size=16, num_heads=4, mlp_dim=12)
    config.patch_keep_rate = 0.5
    config.stages = ((0.5, {"patch_keep_rate": 1.0}),)
    config.update(changes)
    return config


def prune_config(trained, **changes):
    config = prune_configs.get_config("smoke")
    config.checkpoint = str(trained / "model.npz")
    config.num_train, config.num_test = 128, 40
    config.tuning.training.batch_size = 32
    config.tuning.teacher_weight = 0.5
    # Not all of them: each compiles a few networks.
    config.methods = ConfigDict({name: (0.5,) for name in METHODS})
    config.tuning.methods = ConfigDict({"dense": (0.0,), "max": (0.5,)})
    config.timing.batch_sizes = (2,)
    config.timing.gradient_batch_size = 3
    config.timing.methods = ("max",)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained_vit")
    return workdir, train_vit.train_and_evaluate(train_config(), workdir)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The folder of a network at its initialization, which pruning can read."""
    workdir = tmp_path_factory.mktemp("untrained_vit")
    config = train_config()
    problem = train_vit.make_problem(config, vit_training.load_images(config))
    vit.save_checkpoint(workdir / "model.npz", problem.model, problem.params)
    return workdir


@pytest.fixture(scope="module")
def pruned(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pruned_vit")
    config = prune_config(trained[0])
    return workdir, config, prune_vit.train_and_evaluate(config, workdir)


@pytest.mark.slow
def test_training_writes_what_it_evaluated(trained):
    workdir, summary = trained
    assert runs.load_summary(workdir) == summary
    assert (workdir / "figures" / "training.png").exists()
    metrics = files.read_metrics(workdir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [2, 4, 6, 8]
    assert summary["test_accuracy"] == metrics[-1]["test_accuracy"]
    model, params = vit.load_checkpoint(workdir / "model.npz")
    assert (model.num_layers, model.num_heads, model.patch_size) == (2, 4, 2)
    assert summary["num_params"] == vit.cost.count_params(model, 8, channels=1)
    images = vit_training.load_images(train_config())
    problem = vit_training.Problem(model, params, 8, images)
    assert problem.test_accuracy(params) == summary["test_accuracy"]
    mean, std = vit.load_normalization(workdir / "model.npz")
    np.testing.assert_array_equal(mean, images.mean.ravel())
    np.testing.assert_array_equal(std, images.std.ravel())


@pytest.mark.slow
def test_resumed_training_ends_like_an_uninterrupted_one(
    trained, tmp_path, monkeypatch
):
    workdir, whole = trained
    check, calls = loop.check_finite, []

    def stop_once(losses, *, first_step):
        calls.append(first_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        check(losses, first_step=first_step)

    monkeypatch.setattr(loop, "check_finite", stop_once)
    with pytest.raises(KeyboardInterrupt):
        train_vit.train_and_evaluate(train_config(), tmp_path)
    resumed = train_vit.train_and_evaluate(train_config(), tmp_path)
    # From the checkpoint of step 4, and no step before.
    assert calls[4:] == [5, 7]
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    chex.assert_trees_all_equal(
        vit.load_checkpoint(tmp_path / "model.npz")[1],
        vit.load_checkpoint(workdir / "model.npz")[1],
    )


@pytest.mark.slow
def test_first_steps_against_a_plain_loop(tmp_path):
    """Loss, weights and their average, without anything random in the model."""
    config = train_config(average_decay=0.05)
    config.patch_keep_rate, config.stages = 1.0, ()
    config.augment.crop_padding = 0
    config.optimizer.warmup_steps = 0
    images = vit_training.load_images(config)
    problem = train_vit.make_problem(config, images)
    model, params = problem.model, problem.params
    optimizer = vit_training.make_optimizer(config.optimizer, 8)
    update = vit_training.make_update(problem, optimizer, config)
    start = jax.tree.map(jnp.copy, params)
    state = update(vit_training.init_state(params, optimizer, 8), 0, 2)

    order = np.random.default_rng((config.seeds[0], 0)).permutation(128)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(2e-3, 8), weight_decay=0.05),
    )

    @jax.jit
    def reference_step(params, opt_state, pixels, targets):
        def loss_fn(params):
            logits = model.apply({"params": params}, pixels, train=True)
            return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=1))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = reference.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    params, average = start, start
    opt_state = jax.jit(reference.init)(params)
    for step in range(2):
        chosen = order[step * 32 : (step + 1) * 32]
        pixels = images.train[0][chosen] / 255.0 - images.mean
        pixels = np.float32(pixels / np.maximum(images.std, 1e-6))
        targets = np.full((32, 10), 0.01)
        targets[np.arange(32), images.train[1][chosen]] += 0.9
        loss, params, opt_state = reference_step(params, opt_state, pixels, targets)
        np.testing.assert_allclose(state.loss[step], loss, rtol=1e-5)
        decay = min(0.05, (1 + step) / (10 + step))
        average = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * p, average, params
        )
    # Adam's first steps are signs: tiny gradients may differ in theirs.
    chex.assert_trees_all_close(state.params, params, atol=2e-4)
    chex.assert_trees_all_close(state.average, average, atol=2e-4)


def teach(weight, method, ratio):
    """A step of SGD of a pruned network, whose teacher is the whole one."""
    config = train_config()
    config.patch_keep_rate, config.stages = 1.0, ()
    config.augment.crop_padding = 0
    images = vit_training.load_images(config)
    dense = train_vit.make_problem(config, images)
    # The zeros that heads start with would teach nothing.
    dense.params["head"]["kernel"] += jax.random.normal(jax.random.key(3), (16, 10))
    student = vit_pruning.prune(method, ratio, dense)
    update = vit_training.make_update(
        student, optax.sgd(0.1), config, teacher=dense, teacher_weight=weight
    )
    state = vit_training.init_state(student.params, optax.sgd(0.1), 1)
    return config, dense, student, update(state, 0, 1)


@pytest.mark.slow
def test_a_network_has_nothing_to_learn_from_itself():
    *_, student, state = teach(1.0, "dense", 0.0)
    assert state.loss[0] > 0.1  # the entropy of its own classes
    chex.assert_trees_all_close(state.params, student.params, atol=1e-6)


@pytest.mark.slow
def test_teacher_sees_the_whole_image_and_shares_the_targets_with_the_labels():
    config, dense, student, state = teach(0.25, "resolution", 0.5)
    images = dense.images
    assert student.image_size < dense.image_size == 8
    chosen = np.random.default_rng((config.seeds[0], 0)).permutation(128)[:32]
    pixels = images.train[0][chosen] / 255.0 - images.mean
    pixels = np.float32(pixels / np.maximum(images.std, 1e-6))
    shape = (32, student.image_size, student.image_size, 1)
    small = jax.image.resize(pixels, shape, "linear")
    log_probs = [
        jax.nn.log_softmax(jax.jit(one.model.apply)({"params": one.params}, x))
        for one, x in ((dense, pixels), (student, small))
    ]
    labels = 0.9 * np.eye(10)[images.train[1][chosen]] + 0.01
    targets = 0.25 * np.exp(log_probs[0]) + 0.75 * labels
    expected = -np.mean(np.sum(targets * log_probs[1], axis=1))
    np.testing.assert_allclose(state.loss[0], expected, rtol=1e-5)


def test_stages_add_up_and_leave_the_config_alone():
    config = train_config()
    config.stages = (
        (0.2, {"patch_keep_rate": 0.75, "augment.num_ops": 3}),
        (0.8, {"patch_keep_rate": 1.0, "augment.flip": True}),
    )
    vit_training.check_stages(config, train_configs.RULES)
    settings = [loop.in_stage(config, stage) for stage in range(3)]
    assert [s.patch_keep_rate for s in settings] == [0.5, 0.75, 1.0]
    assert [s.augment.num_ops for s in settings] == [0, 3, 3]
    assert [s.augment.flip for s in settings] == [False, False, True]
    assert config.patch_keep_rate == 0.5 and config.augment.num_ops == 0


def test_patch_dropout_takes_other_patches_every_step():
    model = vit.make("cifar_128", 10, 2, num_layers=2, hidden_size=16)
    dropped = vit_training.patch_dropout(model, 16, 0.5)
    assert dropped.cascade.keep == (8, 8)
    assert vit_training.patch_dropout(model, 16, 1.0) is model
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    @jax.jit
    def kept_tokens(key):
        _, state = dropped.apply(
            variables,
            images,
            train=True,
            rngs={"cascade": key},
            mutable=["intermediates"],
        )
        return state["intermediates"]["Transformer"]["encoderblock_0"]["tokens"][0]

    kept = [kept_tokens(jax.random.key(seed)) for seed in (0, 0, 1)]
    chex.assert_trees_all_equal(kept[0], kept[1])
    assert np.any(kept[0] != kept[2])
    assert np.any(kept[0][0] != kept[0][1])


@pytest.mark.slow
def test_muon_takes_the_matrices_of_the_blocks():
    config = train_configs.get_config("cifar10_cpu")
    model = vit.make("cifar_128", 10, 2, num_layers=2, hidden_size=16, mlp_dim=24)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    config.optimizer.warmup_steps = 0
    optimizer = vit_training.make_optimizer(config.optimizer, 10)
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), params
    )
    updates, _ = jax.jit(optimizer.update)(
        grads, jax.jit(optimizer.init)(params), params
    )
    block = updates["Transformer"]["encoderblock_1"]
    attention = block["MultiHeadDotProductAttention_0"]
    for matrix in (
        attention["query"]["kernel"].reshape(16, 16),
        attention["out"]["kernel"].reshape(16, 16),
        block["MlpBlock_0"]["Dense_0"]["kernel"],
    ):
        # Orthogonal up to what five Newton-Schulz iterations leave.
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() > 0.3 * values.max()
    for vector in (updates["head"]["kernel"], updates["embedding"]["kernel"]):
        # Adam's first step: of one size everywhere, but for the epsilon.
        np.testing.assert_allclose(np.abs(vector), np.abs(vector).mean(), rtol=1e-2)


@pytest.mark.slow
def test_pruning_table(pruned):
    workdir, config, summary = pruned
    assert runs.load_summary(workdir) == summary
    rows = summary["rows"]
    assert {row["method"] for row in rows.values()} == {"dense", *METHODS}
    dense = rows["dense_0"]
    for name, row in rows.items():
        saved = 1 - row["multiply_adds"] / dense["multiply_adds"]
        assert row["saved"] == pytest.approx(saved)
        assert 0 <= row["accuracy"] <= 1
        for prefix in ("", "tuned_") if row["method"] == "max" else ("",):
            if row is not dense:
                difference = (
                    row[f"{prefix}accuracy"] - dense[f"{prefix}accuracy"]
                ) * config.num_test
                gain = row[f"{prefix}gained"] - row[f"{prefix}lost"]
                assert gain == pytest.approx(difference)
                assert 0 < row[f"{prefix}mcnemar_p"] <= 1
        timed = row["method"] in ("dense", *config.timing.methods)
        assert ("gradient_speedup" in row) == timed
        for batch in config.timing.batch_sizes:
            assert (f"speedup_{batch}" in row) == timed
            if not timed:
                continue
            for name in ("milliseconds", "speedup"):
                low, high = row[f"{name}_{batch}_quartiles"]
                assert 0 < low <= high
            low, high = row[f"milliseconds_{batch}_quartiles"]
            assert low <= row[f"milliseconds_{batch}"] <= high
            efficiency = row[f"speedup_{batch}"] / row["predicted_speedup"]
            assert row[f"efficiency_{batch}"] == pytest.approx(efficiency)
        assert ("tuned_accuracy" in row) == (row["method"] in config.tuning.methods), (
            name
        )
    assert rows["max_0.5"]["saved"] > 0.1
    # The released code only hides tokens.
    assert rows["released_code_0.5"]["saved"] == 0
    assert rows["heads_0.5"]["num_params"] < dense["num_params"]
    for name in ("accuracy_and_cost", "speed", "kept_patches", "attention", "heads"):
        assert (workdir / "figures" / f"{name}.png").exists(), name
    figures.draw(workdir)


@pytest.mark.slow
def test_masked_and_compact_predict_alike(pruned):
    for semantics, parity in pruned[2]["parity"].items():
        assert parity["largest_difference_of_logits"] < 1e-4, semantics
        assert parity["same_predictions"] == parity["num_images"] == 40


@pytest.mark.slow
def test_pruning_resumes_row_by_row(pruned, tmp_path, monkeypatch):
    workdir, _, summary = pruned
    # As if it had been killed before the last rows.
    (tmp_path / "rows").mkdir()
    kept = list((workdir / "rows").iterdir())[2:]
    for path in kept:
        (tmp_path / "rows" / path.name).write_bytes(path.read_bytes())
    measured = []

    def measure(network, *arguments, **options):
        measured.append(network)
        return real(network, *arguments, **options)

    real = prune_vit.measure
    monkeypatch.setattr(prune_vit, "measure", measure)
    resumed = prune_vit.train_and_evaluate(runs.load_config(workdir), tmp_path)
    assert len(measured) == 2
    for name, row in summary["rows"].items():
        for key in ("accuracy", "multiply_adds", "lost", "tuned_mcnemar_p"):
            assert resumed["rows"][name].get(key) == row.get(key)


def test_equal_cost():
    """Methods with a knob of their own come as near as their steps allow."""
    sizes = {"num_layers": 3, "hidden_size": 16, "num_heads": 4, "mlp_dim": 12}
    model = vit.make("cifar_128", 10, 2, **sizes)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    dense = vit_training.Problem(model, params, 8)
    target = vit_pruning.prune("max", 0.5, dense).cost.total
    for method in ("evit", "merge"):
        cost = vit_pruning.prune(method, 0.5, dense).cost.total
        assert abs(cost - target) < 0.15 * dense.cost.total
    smaller = vit_pruning.prune("resolution", 0.6, dense)
    assert smaller.image_size < 8
    positions = smaller.params["Transformer"]["posembed_input"]["pos_embedding"]
    assert positions.shape[1] == 1 + smaller.num_patches


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [4, 1])
def test_structure_is_cut_as_by_slicing(num_heads):
    """The channel graph cuts what slicing cuts, which knows the layers by name."""
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": num_heads, "mlp_dim": 8}
    model = vit.make("cifar_128", 4, 2, **sizes)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    model = model.clone(cascade=vit.schedules.cp_vit(0.5, num_layers=2, num_patches=16))
    rng = np.random.default_rng(0)
    scores = {
        "heads_lbi": [rng.random(num_heads) for _ in range(2)],
        "neurons_lbi": [rng.random(8) for _ in range(2)],
    }
    dense = vit_training.Problem(model, params, 8)
    cut = vit_pruning.prune("structure_lbi", 0.5, dense, scores)
    kept = {
        name: vit.slicing.largest(score, [max(len(score[0]) // 2, 1)] * 2)
        for name, score in scores.items()
    }
    smaller, expected = vit.slicing.keep_heads(model, params, kept["heads_lbi"])
    smaller, expected = vit.slicing.keep_neurons(smaller, expected, kept["neurons_lbi"])
    assert cut.model == smaller and cut.model.cascade == model.cascade
    chex.assert_trees_all_equal(cut.params, expected)


def joint_loss(layers, heads, seed, *, interaction):
    """A loss of removed heads: one term for each, and one for each pair."""
    rng = np.random.default_rng(seed)
    own = rng.uniform(0.1, 1, (layers, heads))
    pairs = interaction * rng.uniform(size=(layers, heads, layers, heads))

    def loss_fn(removed):
        terms = [own[head] for head in removed]
        terms += [pairs[a + b] for a, b in itertools.combinations(sorted(removed), 2)]
        return 2.0 + sum(terms)

    return loss_fn


@pytest.mark.parametrize("seed", range(3))
def test_search_over_heads_finds_the_best_set(seed):
    """Heads that hurt more together: the bound holds, so every set is tried at most."""
    loss_fn = joint_loss(2, 4, seed, interaction=1.0)
    calls = []

    def counted(removed):
        calls.append(removed)
        return loss_fn(removed)

    found = vit_pruning.search_heads(counted, [4, 4], 4, max_evaluations=1000)
    heads = [(i, j) for i in range(2) for j in range(4)]
    allowed = [
        frozenset(each)
        for each in itertools.combinations(heads, 4)
        if len({layer for layer, _ in each}) == 2  # no layer loses all of its heads
    ]
    assert found == min(allowed, key=loss_fn)
    assert len(calls) == len(set(calls)) < 2**8


def test_search_over_heads_is_never_worse_than_a_greedy_one():
    for seed in range(5):
        loss_fn = joint_loss(3, 3, seed, interaction=-0.3)  # the bound does not hold
        greedy = vit_pruning.search_heads(loss_fn, [3] * 3, 4, max_evaluations=0)
        longer = vit_pruning.search_heads(loss_fn, [3] * 3, 4, max_evaluations=60)
        assert loss_fn(longer) <= loss_fn(greedy) and len(longer) == len(greedy) == 4
    with pytest.raises(ValueError, match="between 0 and 6, got 7"):
        vit_pruning.search_heads(loss_fn, [3] * 3, 7, max_evaluations=60)


@pytest.mark.slow
def test_searched_heads_are_cut_from_the_network(untrained):
    config = prune_config(untrained)
    images = prune_vit.load_images(config)
    problem = vit_training.load_problem(config.checkpoint, 8, images, {})
    kernel = jax.random.normal(jax.random.key(0), (16, 10))
    head = problem.params["head"] | {"kernel": kernel}
    problem = problem._replace(params=problem.params | {"head": head})
    pixels, labels = images.train
    predict = vit_training.make_predict(problem)

    def loss_without(*removed):
        kept = [[h for h in range(4) if (i, h) not in removed] for i in range(2)]
        params = vit.slicing.mask_heads(problem.model, problem.params, kept)
        return classifier.cross_entropy(predict(params, pixels), labels)

    heads = [(i, j) for i in range(2) for j in range(4)]
    pairs = {
        frozenset(pair): loss_without(*pair)
        for pair in itertools.combinations(heads, 2)
    }
    cut = vit_pruning.prune("heads_search", 0.25, problem)
    assert sum(per_layer(cut.model.num_heads, i) for i in range(2)) == 6
    logits = vit_training.make_predict(cut)(cut.params, pixels)
    loss = classifier.cross_entropy(logits, labels)
    # Float32 sums over six or eight heads.
    assert min(abs(loss - other) for other in pairs.values()) < 1e-5
    greedy = min(heads, key=loss_without)
    assert loss <= min(pairs[pair] for pair in pairs if greedy in pair) + 1e-5


@pytest.mark.parametrize(
    "method", ["max", "skip", "evit", "merge_decreasing", "range", "heads_random"]
)
def test_ratio_for_a_budget_is_the_smallest_that_fits(method):
    model = vit.make("cifar_128", 4, 2, num_layers=4, hidden_size=16, mlp_dim=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes["params"])
    dense = vit_training.Problem(model, params, 16)

    def fits(share):
        return lambda network: network.cost.total <= share * dense.cost.total

    scores = {"range": (0.1, 0.2, 0.2, 0.4)}
    ratio = vit_pruning.ratio_for_budget(method, fits(0.8), dense, scores)
    costs = [
        vit_pruning.prune(method, one, dense, scores).cost.total / dense.cost.total
        for one in (ratio, ratio - 0.001)
    ]
    assert costs[0] <= 0.8 < costs[1]
    with pytest.raises(ValueError, match=f"no ratio of the method {method} is"):
        vit_pruning.ratio_for_budget(method, fits(0.01), dense, scores)


@pytest.mark.slow
def test_latency_is_measured_and_predicted(tmp_path):
    config = prune_config(tmp_path, latency=0.9)
    config.checkpoint = None
    config.dataset.name = None  # random weights
    config.image_size = 64
    config.model.update({"variant": "cifar_128", "num_layers": 4})
    # What leaves the tokens as they are is left out.
    config.methods = ConfigDict({"max": (0.5,), "heads": (), "segment_1": ()})
    config.tuning.methods = ConfigDict({})
    config.tuning.num_epochs = 0
    config.timing.gradient_batch_size = 0
    config.timing.num_rounds = 1
    # A table of the test's own: measured times differ from run to run.
    table = {str(tokens): float(tokens) for tokens in (2, 9, 17)}
    files.write_json(tmp_path / "latency.json", table)
    rows = prune_vit.train_and_evaluate(config, tmp_path)["rows"]
    (row,) = (row for row in rows.values() if row["method"] == "max")
    tokens = [*row["attention_tokens"], *row["mlp_tokens"]]
    assert row["predicted_milliseconds"] == pytest.approx(np.mean(tokens))
    assert 0.8 * 17 < row["predicted_milliseconds"] <= 0.9 * 17


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (5, 1), (4, 4), (30, 12), (700, 1300)]
)
def test_mcnemar_is_the_binomial_test_of_the_discordant_images(lost, gained):
    total = lost + gained
    tail = sum(math.comb(total, k) for k in range(min(lost, gained) + 1))
    expected = min(1.0, 2 * tail / 2**total)  # of exact integers
    assert classifier.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_rows_are_tested_against_the_dense_network_of_the_same_training():
    rows = {
        "dense_0": {"wrong": [1, 2, 3], "tuned_wrong": [1]},
        "max_0.4": {"wrong": [3, 4, 5, 6], "tuned_wrong": []},
        "random_0.4": {"wrong": [1, 2, 3]},
        "speed_only": {},
    }
    prune_vit.add_tests(rows)
    # Of the 3 + 2 images on which one of the two errs: 2 (1 + 5 + 10) / 2^5.
    untuned = {"lost": 3, "gained": 2, "mcnemar_p": 1.0}
    tuned = {"tuned_lost": 0, "tuned_gained": 1, "tuned_mcnemar_p": 1.0}
    assert rows["max_0.4"] == untuned | tuned
    assert rows["random_0.4"] == {"lost": 0, "gained": 0, "mcnemar_p": 1.0}
    assert rows["dense_0"] == rows["speed_only"] == {}


def test_validation_images_replace_the_test_images(untrained):
    config = prune_config(untrained, num_validation=28)
    images = prune_vit.load_images(config)
    pixels, labels = vit_training.load_images(config).train
    assert len(images.train[0]) == len(images.train[1]) == 100
    np.testing.assert_array_equal(images.test[0], pixels[100:])
    np.testing.assert_array_equal(images.test[1], labels[100:])
    # train_vit normalized by mean and deviation of the remaining images.
    trained = vit_training.load_images(prune_config(untrained, num_train=100))
    np.testing.assert_array_equal(images.mean, trained.mean)
    np.testing.assert_array_equal(images.std, trained.std)
    google = {"num_validation": 28, "normalization": "google"}
    assert np.all(prune_vit.load_images(prune_config(untrained, **google)).mean == 0.5)


def test_a_network_keeps_its_normalization(untrained, tmp_path):
    model, params = vit.load_checkpoint(untrained / "model.npz")
    path = tmp_path / "model.npz"
    vit.save_checkpoint(path, model, params, mean=0.25, std=2.0)
    for changes in ({}, {"num_train": 100}, {"num_validation": 28}):
        config = prune_config(tmp_path, **changes)
        images = prune_vit.load_images(config)
        assert (images.mean, images.std) == (0.25, 2.0)
    images = vit_training.load_images(train_config(checkpoint=str(path)))
    # A white image of the digits.
    white = classifier.normalize(images, jnp.full((1, 8, 8, 1), 255, jnp.uint8))
    np.testing.assert_allclose(white, (1 - 0.25) / 2, rtol=1e-6)
    google = {"normalization": "google"}
    with pytest.raises(ValueError, match=r"google .* \[0.25\] .*normalization=dataset"):
        vit_training.load_images(prune_config(tmp_path, **google))
    vit.save_checkpoint(path, model, params, mean=0.5, std=0.5)
    assert np.all(vit_training.load_images(prune_config(tmp_path, **google)).std == 0.5)


def test_errors_are_the_images_that_lower_the_accuracy(untrained):
    config = prune_config(untrained)
    images = prune_vit.load_images(config)
    problem = vit_training.load_problem(config.checkpoint, 8, images, {})
    head = problem.params["head"] | {"bias": jnp.arange(10.0) == 3}
    params = problem.params | {"head": head}  # the kernel of the head is zero
    wrong = problem.test_errors(params)
    np.testing.assert_array_equal(wrong, np.flatnonzero(problem.images.test[1] != 3))
    assert problem.test_accuracy(params) == (40 - len(wrong)) / 40


def test_comparison_interpolates_between_costs():
    rows = [
        {"method": "dense", "ratio": 0, "multiply_adds": 100, "accuracy": 0.9},
        {"method": "random", "ratio": 0.5, "multiply_adds": 50, "accuracy": 0.7},
        {"method": "max", "ratio": 0.3, "multiply_adds": 75, "accuracy": 0.85},
    ]
    summary = prune_vit.compare(rows)
    assert summary["max_0.3_drop"] == pytest.approx(0.05)
    # Halfway between 0.7 and 0.9.
    assert summary["max_0.3_accuracy_over_random"] == pytest.approx(0.05)


def test_both_commands_tell_what_a_file_does_not(tmp_path):
    net = vit_files.network(size=2, channels=1, classes=10)
    path = vit_files.write(tmp_path, vit_files.timm, net)
    fields = {"num_heads": 6, "gelu": "tanh", "ln_eps": 0.1, "pool": "mean"}
    config = train_config(checkpoint=str(path), checkpoint_options=fields)
    trained = train_vit.make_problem(config, vit_training.load_images(config))
    config = prune_config(tmp_path, checkpoint=str(path), checkpoint_options=fields)
    pruned = prune_vit.load_problem(config, vit_training.load_images(config))
    for problem in (trained, pruned):
        assert {name: getattr(problem.model, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"maxx": (0.5,)}}, "got maxx"),
        ({"methods": {"max": (1.0,)}}, "methods.max must be .* each value in"),
        ({"num_calibration": 0}, "num_calibration must be at least 1"),
        (
            {"timing": {"gradient_batch_size": -1}},
            "gradient_batch_size must be at least 0 .*, got -1",
        ),
        ({"tuning": {"teacher_weight": 1.5}}, r"must be in \[0, 1\], got 1.5"),
        (
            {"tuning": {"methods": {"max": (0.5, 0.25)}}},
            r"tuning.methods.max must be among methods.max, .* \(0.5,\); got 0.25",
        ),
        ({"num_validation": 128}, "num_validation must be below the 128 training"),
        ({"checkpoint": "absent.npz"}, "absent.npz"),
        ({"checkpoint": None}, "must name a file that train_vit wrote"),
        ({"latency": 0.5}, "methods heads, .* leave as they are"),
        ({"latency": 0.5, "budget": 0.5}, "budget or latency, not both"),
        (
            {"budget": 0.5},
            "released_code save no work .*methods.released_code='\\(\\)'",
        ),
        ({"latency": 0.5, "timing": {"batch_sizes": ()}}, "latency needs a batch size"),
        ({"budget": 1.0}, r"budget must be .* in \(0, 1\), got 1.0"),
        (
            {"checkpoint_options": {"heads": 3, "path": "x"}},
            "among num_heads, gelu, .*; got heads, path",
        ),
        ({"image_size": 7}, "7"),
    ],
)
def test_bad_options_of_pruning(untrained, tmp_path, changes, message):
    config = prune_config(untrained, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prune_vit.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cascade": vit.Cascade(keep=(16, 8))}, "has a cascade, but .* dense network"),
        ({"num_heads": (4, 3), "head_dim": 4}, r"same num_heads .* got \(4, 3\)"),
        ({"mlp_dim": (12, 8)}, r"same mlp_dim .* got \(12, 8\) in .*model.npz"),
        (
            {"class_token": False, "pool": "mean"},
            "methods cls, evit need a CLS token, .*methods.cls='\\(\\)'",
        ),
    ],
)
def test_networks_that_cannot_be_pruned_are_refused(tmp_path, fields, message):
    fields = {"mlp_dim": 12, "num_heads": 4} | fields
    model = vit.ViT(
        num_classes=10, patch_size=2, hidden_size=16, num_layers=2, **fields
    )
    images = jnp.zeros((1, 8, 8, 1))
    params = model.init(jax.random.key(0), images)["params"]
    params["head"]["kernel"] += 1.0
    vit.save_checkpoint(tmp_path / "model.npz", model, params)
    config = prune_config(tmp_path)
    config.methods = ConfigDict({name: (0.5,) for name in ("max", "cls", "evit")})
    with pytest.raises(ValueError, match=message):
        prune_vit.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ("methods", "num_layers", "message"),
    [
        # The MLP of the last of 24 layers prunes three times the plateau.
        ({"released_code": (0.2, 0.4)}, 24, r"released_code: .*\[0, 0.326\) with 24"),
        ({"range": (0.4, 0.95)}, 12, r"methods.range: .* \[0, 0.9\] .* got 0.95"),
        ({"range": (0.4,)}, 1, "methods.range: .* first_layer below 1"),
        ({"resolution": (0.4,)}, 12, "resolution needs images of more than one patch"),
    ],
)
def test_ratios_that_a_network_cannot_have_are_refused(methods, num_layers, message):
    config = prune_configs.get_config("speed_b16")
    config.methods = ConfigDict({"max": (0.4,)})
    model = vit.make("Ti", 10, patch_size=224, num_layers=num_layers)
    prune_vit._check_network(config, model)
    config.methods.update(methods)
    with pytest.raises(ValueError, match=message):
        prune_vit._check_network(config, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"variant": "cifar"}}, "variant must be one of .* got 'cifar'"),
        ({"model": {"hiden": 3}}, "model: .*hiden"),
        ({"model": {"patch_size": 3}}, "do not divide into patches"),
        ({"normalization": "none"}, "normalization must be one of dataset, google"),
        ({"patch_keep_rate": 0.0}, r"must be in \(0, 1\], got 0.0"),
        (
            {"stages": ((0.5, {"patch_keep_rate": 2}),)},
            r"stages\[0\]: .*\(0, 1\], got 2",
        ),
        ({"stages": ((1.0, {}),)}, r"shares of the epochs in \[0, 1\)"),
        ({"stages": ((0.5, {}), (0.2, {}))}, "rising shares"),
        ({"stages": ((0.5, {"seed": 1}),)}, "stages can change .*, not seed"),
        ({"optimizer": {"name": "adamx"}}, "no optimizer 'adamx'"),
        ({"optimizer": {"options": {"wd": 3}}}, "optimizer.options"),
        ({"batch_size": 1000}, "batch_size must be between"),
        ({"checkpoint": "absent.npz"}, "absent.npz"),
        (
            {"checkpoint_options": {"num_heads": 3}},
            r"checkpoint_options \(num_heads\) are not read without a checkpoint",
        ),
    ],
)
def test_bad_options_of_training(tmp_path, changes, message):
    config = ConfigDict(train_config().to_dict())
    for name, value in changes.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                config[name][key] = inner
        else:
            config[name] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_vit.train_and_evaluate(config, tmp_path)


@pytest.mark.slow
def test_committed_network_classifies_cifar10_pruned_and_not():
    """The weights under results/, in float16, on the first 500 test images."""
    config = train_configs.get_config("cifar10_cpu")
    config.num_test = 500
    try:
        images = vit_training.load_images(config)
    except FileNotFoundError as error:
        pytest.skip(f"CIFAR-10 is not prepared: {error}")
    model, params = vit.load_checkpoint(
        ROOT / "results" / "train_vit_cifar10_cpu" / "model.npz"
    )
    accuracies = []
    for ratio in (None, 0.4):
        chosen = ratio and vit.schedules.cp_vit(ratio, num_layers=7, num_patches=64)
        pruned = vit_training.Problem(model.clone(cascade=chosen), params, 32, images)
        accuracies.append(pruned.test_accuracy(params))
    whole, dropped = accuracies
    assert whole > 0.85
    assert dropped > whole - 0.02
