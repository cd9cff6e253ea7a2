"""probe_landscape: measurements against plain loops, files, resumption and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments import probe_landscape
from experiments.common import data, evidence, files, runs
from experiments.configs import probe_landscape as configs
from experiments.networks import registry
from experiments.training import classifier, landscape

pytestmark = pytest.mark.usefixtures("unoptimized")

RUNS = sorted(evidence.RESULTS.glob("probe_landscape_*"))


def tiny_config(**changes):
    config = configs.get_config("smoke")
    config.networks = ("bn",)
    config.learning_rates = (1e-3,)
    config.image_size = 8
    config.model = {"type": "DeepLinear", "depth": 3, "width": 6}
    config.surface.size = 2
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two networks at two learning rates."""
    workdir = tmp_path_factory.mktemp("landscape")
    config = tiny_config(networks=("bn", "plain"), learning_rates=(1e-3, 2e-3))
    return workdir, config, probe_landscape.train_and_evaluate(config, workdir)


def arrays_of(workdir, config, network):
    """The arrays of the training at the first rate with the first seed."""
    arrays = landscape.read_arrays(workdir, config)
    names = [name for name in arrays if name.startswith(f"{network}/")]
    return {
        name.removeprefix(f"{network}/"): arrays[name][0, 0]
        for name in names
        if not name.endswith("surface")
    }


def train_by_hand(config, num_steps):
    """Parameters, statistics and gradients before each step, and the losses."""
    images = classifier.load_images(config)
    settings = config.model.to_dict() | {"batch_norm": True}
    model = registry.make_model(settings, images.num_classes)
    variables = classifier.init_variables(model, images, 0)
    params, batch_stats = variables["params"], variables["batch_stats"]
    optimizer = optax.adam(config.learning_rates[0])
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def grad(params, batch_stats, inputs, labels):
        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                inputs,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    history = []
    for step in range(num_steps):
        indices = data.batch_indices(
            0, step, num_examples=len(images.train[0]), batch_size=config.batch_size
        )
        inputs = classifier.normalize(images, images.train[0][indices])
        labels = images.train[1][indices]
        (loss, updated), grads = grad(params, batch_stats, inputs, labels)
        history.append((params, batch_stats, grads, loss, inputs, labels))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params, batch_stats = optax.apply_updates(params, updates), updated
    return model, history, grad


def flatten(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_measures_what_a_plain_loop_does(finished):
    workdir, config, _ = finished
    arrays = arrays_of(workdir, config, "bn")
    model, history, grad = train_by_hand(config, 6)
    losses = [float(loss) for _, _, _, loss, _, _ in history]
    np.testing.assert_allclose(arrays["loss"][:6], losses, rtol=1e-3)

    # Between steps 0 and 1: Adam's first step is nearly the sign of the gradient.
    first, second = history[:2]
    for name, pick in (
        ("last_layer", lambda tree: tree["fc3"]["kernel"]),
        ("all_layers", flatten),
    ):
        change = np.linalg.norm(np.ravel(pick(second[2]) - pick(first[2])))
        moved = np.linalg.norm(np.ravel(pick(second[0]) - pick(first[0])))
        found = {
            key: arrays[f"{name}_{key}"][0]
            for key in ("grad_distance", "step_norm", "beta")
        }
        expected = {
            "grad_distance": change,
            "step_norm": moved,
            "beta": change / moved,
        }
        for key, value in expected.items():
            # Adam's first step divides gradients by their own size. It is arbitrary if
            # they are rounding errors, as for biases before batch normalization.
            np.testing.assert_allclose(found[key], value, rtol=0.03, err_msg=key)

    # Along the gradient at step 4, on its batch, statistics of the batch.
    params, batch_stats, grads, loss, inputs, labels = history[4]
    place = arrays["probe_step"].tolist().index(4)
    for i, step_size in enumerate(config.step_sizes):
        moved = jax.tree.map(lambda p, g, eta=step_size: p - eta * g, params, grads)
        (after, _), after_grads = grad(moved, batch_stats, inputs, labels)
        change = np.linalg.norm(flatten(after_grads) - flatten(grads))
        norm = np.linalg.norm(flatten(grads))
        # Differences of nearly equal gradients, four steps of training on.
        for key, value in {
            "losses": after,
            "grad_distances": change,
            "betas": change / (step_size * norm),
        }.items():
            np.testing.assert_allclose(
                arrays[f"probe_{key}"][place, i], value, rtol=0.02, err_msg=key
            )
    np.testing.assert_allclose(arrays["probe_loss"][place], loss, rtol=1e-3)


@pytest.mark.slow
def test_largest_eigenvalue_is_that_of_the_hessian(finished):
    workdir, config, _ = finished
    arrays = arrays_of(workdir, config, "plain")
    images = classifier.load_images(config)
    settings = config.model.to_dict() | {"batch_norm": False}
    model = registry.make_model(settings, images.num_classes)
    params = classifier.init_variables(model, images, 0)["params"]
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    count = config.sharpness.num_images
    inputs = classifier.normalize(images, images.train[0][:count])
    labels = images.train[1][:count]

    @jax.jit
    def products(vectors):
        def loss_fn(flat):
            logits = model.apply({"params": unravel(flat)}, inputs, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        one = lambda v: jax.jvp(jax.grad(loss_fn), (flat,), (v,))[1]  # noqa: E731
        return jax.lax.map(one, vectors)

    hessian = np.asarray(products(jnp.eye(flat.size)), np.float64)
    largest = np.linalg.eigvalsh((hessian + hessian.T) / 2)[-1]
    # Three steps of Lanczos from below; none at all would be off by all of it.
    assert arrays["eigenvalue_step"][0] == 0
    assert 0.6 * largest < arrays["eigenvalues"][0, 0] <= 1.001 * largest


@pytest.mark.slow
def test_files_and_table(finished):
    workdir, config, summary = finished
    assert runs.load_summary(workdir) == summary
    for name in (
        *("loss_envelope", "consecutive_steps", "along_the_gradient"),
        *("at_equal_loss", "gradient_at_equal_loss"),
        *("beta_profile", "eigenvalues", "surfaces"),
    ):
        assert (workdir / "figures" / f"{name}.png").exists()
    arrays = landscape.read_arrays(workdir, config)
    # 128 images in batches of 32, twice; probes every second step and at the end.
    assert arrays["bn/loss"].shape == (2, 1, 8)
    assert arrays["plain/probe_betas"].shape == (2, 1, 5, 2)
    assert arrays["bn/last_layer_beta"].shape == (2, 1, 7)
    assert arrays["bn/surface"].shape == (2, 2)
    assert np.isfinite(arrays["bn/surface"]).all()
    with np.load(workdir / "plain_rate0.002_seed0" / "arrays.npz") as single:
        np.testing.assert_array_equal(single["loss"], arrays["plain/loss"][1, 0])
    # The log has the means between the probes.
    logged = arrays["plain/loss"].reshape(2, 1, 4, 2).mean(-1)
    np.testing.assert_allclose(arrays["plain/logged_loss"], logged, rtol=1e-6)
    assert arrays["plain/loss_step"][0, 0].tolist() == [1, 3, 5, 7]
    widths = np.ptp(arrays["plain/loss"][:, 0], axis=0)
    assert summary["plain.envelope_width"] == pytest.approx(widths.mean(), rel=1e-5)
    assert summary["plain.envelope_width_at_the_end"] == pytest.approx(
        widths[4:].mean(), rel=1e-5
    )
    for suffix in ("", "_at_the_end"):
        assert summary[f"envelope_width_ratio{suffix}"] == pytest.approx(
            summary[f"plain.envelope_width{suffix}"]
            / summary[f"bn.envelope_width{suffix}"]
        )
    start = arrays["plain/probe_loss"][..., :1]
    np.testing.assert_array_equal(arrays["plain/progress_loss"][..., :1], start)
    assert arrays["plain/progress_step"][0, 0].tolist() == [0, 1, 3, 5, 7]
    # From the end of the first epoch, step 4, on: probes of steps 4, 6 and 8.
    later = arrays["bn/probe_grad_distances"][1, 0, 2:].max(-1)
    assert summary["bn.rate0.002.gradient_predictiveness"] == pytest.approx(
        later.mean(), rel=1e-5
    )
    assert summary["runs"]["bn_rate0.001_seed0"]["num_params"] > 0


def test_equal_loss_by_hand():
    # Loss and epochs of two rates: the second network needs twice as long.
    losses = np.array([[[4.0, 2.0, 0.0]], [[4.0, 3.0, 2.0]]])
    arrays = {"steps_per_epoch": 10}
    for network, pace in (("bn", 1), ("plain", 2)):
        steps = np.broadcast_to(pace * np.array([0, 10, 20]), losses.shape)
        measure = pace * np.stack([losses, 0 * losses], -1)  # the largest step size
        arrays |= {
            f"{network}/progress_loss": losses,
            f"{network}/progress_step": steps,
            f"{network}/probe_step": steps,
            f"{network}/probe_grad_distances": measure,
            f"{network}/probe_betas": 10 * measure,
        }
    config = ConfigDict({"networks": ("bn", "plain")})
    table = landscape.equal_loss_table(config, arrays)
    # The mean over the rates falls from 4 to 1 and the band widens from 0 to 2.
    middle = pytest.approx(1.0, rel=1e-5)
    assert table["bn.envelope_width_at_equal_loss"] == middle
    assert table["envelope_width_ratio_at_equal_loss"] == middle
    compared = table["at_equal_loss"]
    levels = np.array(compared["loss"])  # between 4 and 2, where both rates arrive
    np.testing.assert_allclose(levels, 4 - np.arange(1, 8) / 4)
    for network, pace in (("bn", 1), ("plain", 2)):
        rows = compared[network]
        np.testing.assert_allclose(
            [rows["epochs"]["low"], rows["epochs"]["high"]],
            [pace * (4 - levels) / 2, pace * (4 - levels)],
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            rows["effective_beta"]["high"], 10 * pace * levels, rtol=1e-5
        )


def test_nothing_is_compared_where_no_loss_is_shared():
    losses = np.array([[[4.0, 3.0]], [[2.0, 1.0]]])
    arrays = {"bn/progress_loss": losses, "plain/progress_loss": losses - 2}
    config = ConfigDict({"networks": ("bn", "plain")})
    assert landscape.equal_loss_table(config, arrays) == {}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_summaries_hold_what_the_logs_give_at_equal_loss(folder):
    config = ConfigDict(files.read_json(folder / "config.json"))
    arrays = landscape.read_arrays(folder, config)
    table = landscape.equal_loss_table(config, arrays)
    summary = files.read_json(folder / "summary.json")
    kept = {name: summary.get(name) for name in table}
    chex.assert_trees_all_close(kept, table, rtol=1e-4)  # single precision


@pytest.mark.slow
def test_resumed_run_ends_like_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    workdir, config, whole = finished
    log, calls = runs.Run.log, []

    # In the second of its runs, after the checkpoint at step 4.
    def stop_once(self, step, metrics, *, num_steps):
        calls.append(step)
        if calls.count(6) == 2:
            raise KeyboardInterrupt
        log(self, step, metrics, num_steps=num_steps)

    monkeypatch.setattr(runs.Run, "log", stop_once)
    with pytest.raises(KeyboardInterrupt):
        probe_landscape.train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(runs.Run, "log", log)
    resumed = probe_landscape.train_and_evaluate(config, tmp_path)
    chex.assert_trees_all_equal(
        landscape.read_arrays(tmp_path, config),
        landscape.read_arrays(workdir, config),
    )
    without_time = [
        {k: v for k, v in summary.items() if k not in ("seconds", "runs")}
        for summary in (resumed, whole)
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    config = tiny_config()
    config.surface.size = 0
    config.checkpoint_every = 100
    log = runs.Run.log

    def stop(self, step, metrics, *, num_steps):
        if step == 4:
            raise KeyboardInterrupt
        log(self, step, metrics, num_steps=num_steps)

    monkeypatch.setattr(runs.Run, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        probe_landscape.train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(runs.Run, "log", log)
    summary = probe_landscape.train_and_evaluate(config, tmp_path)
    steps = landscape.read_arrays(tmp_path, config)["bn/probe_step"]
    assert steps.tolist() == [[[0, 2, 4, 6, 8]]]
    # One learning rate has a band of no width, and no ratio to another.
    assert summary["bn.envelope_width"] == 0


def test_half_a_surface_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_landscape, "_PIECE", 2)
    asked = []

    def losses(state, directions, points):
        del directions
        asked.append(points.tolist())
        return state.params["w"] + points[:, 0] + 10 * points[:, 1]

    tools = probe_landscape.Tools(*[None] * 8, surface_losses=losses)
    state = classifier.TrainState({"w": jnp.float32(1)}, {}, None, None, None)
    config = tiny_config()
    config.surface.size = 3
    with runs.open_run(tmp_path, config) as run:
        whole = probe_landscape._measure_surface(run, tools, state, jax.random.key(0))
        expected = 1 + np.arange(-1, 2)[:, None] + 10 * np.arange(-1, 2)
        np.testing.assert_allclose(whole, expected)
        # As a kill leaves it.
        half = np.where(np.arange(9) < 4, whole.ravel(), np.nan)
        files.write_npz(tmp_path / "surface.npz", {"losses": half})
        asked.clear()
        again = probe_landscape._measure_surface(run, tools, state, jax.random.key(0))
    np.testing.assert_array_equal(again, whole)
    assert len(asked) == 3 and asked[0] == [[0.0, 0.0], [0.0, 1.0]]


def test_dead_runs_are_counted_and_left_out_of_the_second_width():
    config = tiny_config(networks=("plain",), learning_rates=(1e-3, 2e-3, 3e-3))
    num_steps = 8
    losses = np.full((3, 1, num_steps), np.log(10.0))
    losses[0], losses[1] = 1.0, 1.5
    arrays = {
        "steps_per_epoch": np.array(4),
        "plain/loss": losses,
        "plain/probe_step": np.tile([0, 4], (3, 1, 1)),
        "plain/probe_grad_norm": np.ones((3, 1, 2)),
        "plain/test_accuracy": np.tile([0.1, 0.7], (3, 1, 1)),
        "plain/progress_loss": losses[..., :2],
        "plain/progress_step": np.tile([0, 7], (3, 1, 1)),
    }
    for key in ("grad_distances", "relative_grad_distances", "betas"):
        arrays[f"plain/probe_{key}"] = np.arange(12.0).reshape(3, 1, 2, 2)
    for layers in ("last_layer", "all_layers"):
        for key in ("grad_distance", "beta"):
            arrays[f"plain/{layers}_{key}"] = np.ones((3, 1, num_steps - 1))
    labels = np.repeat(np.arange(10), 3)
    table = landscape.make_table(config, arrays, labels)
    assert table["plain.dead_runs"] == 1
    assert table["plain.envelope_width"] == pytest.approx(np.log(10) - 1)
    assert table["plain.envelope_width_without_dead"] == pytest.approx(0.5)
    # The largest over two step sizes, of the probe at step 4 alone.
    assert table["plain.rate0.001.effective_beta"] == 3.0
    assert table["plain.rate0.002.effective_beta"] == 7.0
    assert table["plain.rate0.001.test_accuracy"] == 0.7
    assert "envelope_width_ratio" not in table
    # A run that diverges keeps its first loss in the band.
    losses[2, 0] = [4.0, 1.0, *[np.nan] * 6]
    config.loss = "mine.py:loss"
    table = landscape.make_table(config, arrays, labels)
    assert table["plain.dead_runs"] == 1
    assert table["plain.envelope_width"] == pytest.approx((3 + 0.5 + 6 * 3) / 8)
    # A single step has no change.
    for key in ("grad_distance", "beta"):
        arrays[f"plain/all_layers_{key}"] = np.ones((3, 1, 0))
    table = landscape.make_table(config, arrays, labels)
    assert not any("consecutive_beta_all" in key for key in table)
    assert "plain.rate0.001.consecutive_beta_last_layer" in table


def test_recorder_leaves_updates_alone_and_compiles_once():
    recorder = probe_landscape.record_changes(3, {"a": "^a$"})
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([0.0])}
    state = recorder.init(params)
    update = jax.jit(recorder.update)
    all_grads = [
        {"a": jnp.array([x, 0.0]), "b": jnp.array([5 * x])} for x in (1.0, 3.0, -2.0)
    ]
    for number, grads in enumerate(all_grads):
        updates, state = update(grads, state, params)
        chex.assert_trees_all_equal(updates, grads)
        params = {"a": params["a"] + 0.5 * (number + 1), "b": params["b"]}
    change = state.changes["a"]
    assert change.grad_distance.tolist()[1:] == [2.0, 5.0]
    np.testing.assert_allclose(
        change.step_norm[1:], [np.hypot(0.5, 0.5), np.hypot(1, 1)], rtol=1e-6
    )
    assert update._cache_size() == 1


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("mode", classifier.BN_MODES)
def test_modes_of_batch_normalization(mode):
    images = classifier.load_images(tiny_config())
    settings = {"type": "VGG", "stages": ((4,), (5,)), "hidden": (6, 7)}
    model = registry.make_model(settings, images.num_classes)
    variables = classifier.init_variables(model, images, 0)
    drift = lambda x: x + 0.3  # noqa: E731
    batch_stats = jax.tree.map(drift, variables["batch_stats"])
    pixels = images.train[0]
    inputs, calibration = (
        classifier.normalize(images, x) for x in (pixels[:16], pixels[16:48])
    )
    labels = images.train[1][:16]
    batch = {"inputs": inputs, "labels": labels, "batch_stats": batch_stats}
    batch["calibration"] = calibration
    loss = jax.jit(classifier.make_loss(model, mode))(variables["params"], batch)

    variables = {"params": variables["params"], "batch_stats": batch_stats}
    if mode == "batch":
        logits, _ = jax.jit(
            lambda v: model.apply(v, inputs, train=True, mutable=["batch_stats"])
        )(variables)
    else:
        if mode == "recalibrated":
            # The running mean over many passes is that of one.
            update = jax.jit(
                lambda v: model.apply(
                    v, calibration, train=True, mutable=["batch_stats"]
                )[1]
            )
            for _ in range(200):
                variables = variables | update(variables)
        logits = jax.jit(model.apply)(variables, inputs)
    chances = jax.nn.softmax(logits)[jnp.arange(16), labels]
    np.testing.assert_allclose(loss, -np.log(chances).mean(), rtol=1e-4)


def test_modes_agree_where_they_must():
    """Calibrated on the batch itself, recalibrated is batch; without BN all agree."""
    config = tiny_config()
    images = classifier.load_images(config)
    inputs = classifier.normalize(images, images.train[0][:16])
    for batch_norm in (True, False):
        settings = config.model.to_dict() | {"batch_norm": batch_norm}
        model = registry.make_model(settings, images.num_classes)
        variables = classifier.init_variables(model, images, 0)
        batch = {
            "inputs": inputs,
            "calibration": inputs,
            "labels": images.train[1][:16],
            "batch_stats": variables["batch_stats"],
        }
        losses = {
            mode: float(
                jax.jit(classifier.make_loss(model, mode))(variables["params"], batch)
            )
            for mode in classifier.BN_MODES
        }
        assert losses["recalibrated"] == pytest.approx(losses["batch"], rel=1e-5)
        is_same = losses["frozen"] == pytest.approx(losses["batch"], rel=1e-5)
        assert is_same == (not batch_norm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": -1}, "num_epochs must be at least 0"),
        ({"surface": {"span": 0.0}}, "surface.span must be above 0"),
        ({"sharpness": {"num_steps": 10**6}}, "sharpness.num_steps must be at most"),
        # The smallest eigenvalue needs a step of its own.
        (
            {"sharpness": {"num_eigenvalues": 3}},
            "sharpness.num_eigenvalues must be below",
        ),
        ({"network_options": {"width": 3}}, "network_options are those of a network"),
        *(
            (
                {"optimizer": {"name": name, "options": {}}}
                | {"sharpness": {"preconditioned": True}},
                f"sharpness.preconditioned needs one of .* adam, .*; got '{name}'",
            )
            for name in ("sgd", "adamax", "lamb")
        ),
        ({"networks": ("resnet",)}, "networks must be .* each value one of bn, plain"),
        ({"learning_rates": (0.0,)}, "learning_rates must be .* each value above 0"),
        ({"step_sizes": (-0.1, 0.4)}, "step_sizes must be .* each value above 0"),
        ({"seeds": ()}, "seeds must be a non-empty tuple"),
        ({"bn_mode": "eval"}, "bn_mode must be one of batch, frozen"),
        ({"optimizer": {"name": "adamant", "options": {}}}, "no optimizer 'adamant'"),
        ({"optimizer": {"name": "adam", "options": {"b9": 1.0}}}, "optimizer.options"),
        ({"model": {"type": "MLP"}}, "must be one of LeNet, VGG, ResNet"),
        ({"last_layer": "^head$"}, "no parameter matches"),
        ({"surface": {"size": 1}}, "surface.size must be 0, or from 2 to 65536, got 1"),
        ({"surface": {"chunk_size": 0}}, "surface.chunk_size must be at least 1"),
        ({"surface": {"learning_rate": 0.5}}, "must be one of learning_rates .*0.5"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        probe_landscape.train_and_evaluate(tiny_config(**changes), tmp_path)
