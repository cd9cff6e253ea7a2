"""Networks and losses from a file: each framework against a direct call, and errors."""

import hashlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from experiments import probe_landscape
from experiments.common import files
from experiments.configs import probe_landscape as configs
from experiments.networks import custom
from experiments.training import classifier

pytestmark = pytest.mark.usefixtures("unoptimized")

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), jnp.float32)

SOURCE = """
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class Linen(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


def linen(num_classes):
    return Linen(num_classes)


class Default(Linen):
    def __call__(self, x, train=True):
        return super().__call__(x, train)


def sequential(num_classes):
    return nn.Sequential([Default(num_classes), nn.tanh])


def without_train(num_classes):
    return nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(num_classes)])


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(16)(x))
        return x, None


class Lifted(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=2)
        x, _ = blocks(train)(x.reshape(len(x), -1), None)
        x, _ = nn.jit(nn.remat(Block))(train)(x, None)
        return nn.Dense(self.num_classes)(x)


def lifted(num_classes):
    return Lifted(num_classes)


class Nnx(nnx.Module):
    def __init__(self, num_classes, rngs):
        self.first = nnx.Linear(16, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(5, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.first(x.reshape(len(x), -1))
        return self.last(nnx.relu(self.norm(x)))


def of_nnx(num_classes, seed):
    return Nnx(num_classes, nnx.Rngs(seed))


def haiku_with_norm(num_classes):
    def forward(x, train):
        x = hk.Linear(5)(x.reshape(len(x), -1))
        x = hk.BatchNorm(True, True, 0.9)(x, train)
        return hk.Linear(num_classes)(jax.nn.relu(x))

    return hk.transform_with_state(forward)


def haiku(num_classes):
    return hk.transform(lambda x: hk.Linear(num_classes)(x.reshape(len(x), -1)))


def haiku_without_rng(num_classes):
    return hk.without_apply_rng(haiku(num_classes))


def plain(num_classes, scale=0.1):
    def init(key, x):
        shape = (x[0].size, num_classes)
        return [scale * jax.random.normal(key, shape), jnp.zeros(num_classes)]

    def apply(params, x):
        return x.reshape(len(x), -1) @ params[0] + params[1][None]

    return init, apply


def squares(logits, labels):
    return jnp.mean(jnp.square(logits - jax.nn.one_hot(labels, logits.shape[-1])))


# Refused.


def second_in_training(num_classes):
    return nn.Sequential([nn.Dense(4), Default(num_classes)])


class Frozen(Linen):
    def __call__(self, x, train=False):
        return super().__call__(x, train)


def second_frozen(num_classes):
    return nn.Sequential([nn.Dense(4), Frozen(num_classes)])


def haiku_in_training(num_classes):
    def forward(x, train):
        x = hk.BatchNorm(True, True, 0.9)(x.reshape(len(x), -1), True)
        return hk.Linear(num_classes)(x)

    return hk.transform_with_state(forward)


def integers(num_classes):
    init, apply = plain(num_classes)
    return lambda key, x: jax.tree.map(jnp.int32, init(key, x)), apply


def dropout(num_classes):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(16, 3, rngs=rngs))


def linen_dropout(num_classes):
    return nn.Sequential([nn.Dropout(0.5, deterministic=False), nn.Dense(3)])


def haiku_dropout(num_classes):
    return hk.transform(
        lambda x: hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.5, hk.Flatten()(x)))
    )


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("cache", "calls", jnp.zeros, ())
        return nn.Dense(3)(x.reshape(len(x), -1))


def counter(num_classes):
    return Counter()


def narrow(num_classes):
    return plain(num_classes - 1)


def nothing(num_classes):
    return None


def same_path(num_classes):
    init, apply = plain(num_classes)

    def init_same(key, x):
        kernel, bias = init(key, x)
        return {"a/b": kernel, "a": {"b": bias}}

    return init_same, lambda params, x: apply([params["a/b"], params["a"]["b"]], x)


def whole(num_classes):
    init, apply = plain(num_classes)
    return init, lambda params, x: jnp.int32(apply(params, x))


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dense(3)(x.reshape(len(x), -1))


def training(num_classes):
    return Training()


class Auxiliary(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        logits = nn.Dense(3)(x.reshape(len(x), -1))
        return (logits, logits) if train else logits


def auxiliary(num_classes):
    return Auxiliary()


def leaving(num_classes):
    raise SystemExit


def no_gradient(num_classes):
    init, apply = plain(num_classes)

    def halve(params, x):
        return jax.lax.while_loop(lambda y: jnp.any(y > 1), lambda y: y / 2, x)

    return init, lambda params, x: halve(params, apply(params, x))


def bfloat16(num_classes):
    init, apply = plain(num_classes)
    return lambda key, x: jax.tree.map(jnp.bfloat16, init(key, x)), apply


def of_two(logits, labels):
    return jnp.mean(jnp.square(logits - jnp.ones((2, 10))))


def of_negative(logits, labels):
    return jnp.log(-1 - jnp.sum(jnp.square(logits)))


def failing(num_classes):
    raise KeyError("width")


def branching(logits, labels):
    if logits.max() > 3:
        return jnp.float32(0)
    return jnp.mean(logits)


def branching_network(num_classes):
    init, apply = plain(num_classes)
    return init, lambda params, x: float(x[0, 0, 0, 0]) * apply(params, x)


def vector(logits, labels):
    return logits[:, 0]


def twice(logits, labels):
    return 2 * jnp.mean(logits), labels
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("networks") / "mine.py"
    file.write_text(SOURCE)
    return str(file)


def load(path, name, **options):
    return custom.load_network(
        f"{path}:{name}", name, IMAGES, num_classes=3, options=options
    )


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "name",
    ["linen", "of_nnx", "haiku_with_norm", "haiku", "haiku_without_rng", "plain"],
)
def test_every_framework_gives_what_a_direct_call_gives(path, name):
    network = load(path, name)
    variables = network.init(jax.random.key(3), IMAGES)
    key = jax.random.key(3)  # the same again
    made = custom.load_functions(f"{path}:{name}", "network")[name]
    made = made(3, 0) if name == "of_nnx" else made(3)
    train, stats = True, {}
    if isinstance(made, nn.Module):
        direct = made.init(key, IMAGES, train=False)
        expected, updated = made.apply(
            direct, IMAGES, train=True, mutable=["batch_stats"]
        )
        stats = updated["batch_stats"]
    elif isinstance(made, nnx.Module):
        made.train()
        expected, stats = made(IMAGES), nnx.state(made, nnx.BatchStat)
    elif name == "haiku_with_norm":
        params, state = made.init(key, IMAGES, True)
        expected, stats = made.apply(params, state, None, IMAGES, True)
    elif name == "haiku":
        expected = made.apply(made.init(key, IMAGES), None, IMAGES)
    elif name == "haiku_without_rng":
        expected = made.apply(made.init(key, IMAGES), IMAGES)
    else:
        init, apply = made
        expected = apply(init(key, IMAGES), IMAGES)
    logits, updated = network.apply(
        variables, IMAGES, train=train, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    for found, leaf in zip(
        jax.tree.leaves(updated["batch_stats"]), jax.tree.leaves(stats), strict=True
    ):
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6)
    # Nested dicts of strings, for checkpoints and patterns.
    for entry, _ in jax.tree_util.tree_leaves_with_path(variables):
        assert all(isinstance(key.key, str) for key in entry)
    if name in ("linen", "of_nnx", "haiku_with_norm"):
        # Other images than those from which Haiku has its first statistics.
        others = 1 + 2 * IMAGES
        frozen = network.apply(variables, others)
        trained, _ = network.apply(variables, others, train=True, mutable=["x"])
        assert np.abs(frozen - trained).max() > 1e-3


def test_train_reaches_a_module_inside_of_sequential(path):
    network = load(path, "sequential")
    variables = network.init(jax.random.key(0), IMAGES)
    inner = load(path, "linen")
    [params], [stats] = (variables[k].values() for k in ("params", "batch_stats"))
    for train in (False, True):
        found, _ = network.apply(variables, IMAGES, train=train, mutable=["x"])
        expected, _ = inner.apply(
            {"params": params, "batch_stats": stats}, IMAGES, train=train, mutable=["x"]
        )
        np.testing.assert_allclose(found, np.tanh(expected), rtol=1e-5, atol=1e-6)
    load(path, "lifted")  # statistics that pass through scan, remat and jit
    network = load(path, "without_train")
    variables = network.init(jax.random.key(0), IMAGES)
    assert network.apply(variables, IMAGES).shape == (6, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("integers", "params must be floating point"),
        ("counter", "state other than that of batch normalization: cache"),
        ("dropout", "state other than that of batch normalization: "),
        ("linen_dropout", "layers_0 needs PRNG .* leave out dropout"),
        ("haiku_dropout", "PRNGKey .* leave out dropout"),
        ("narrow", r"the outputs must be logits \(6, 3\), got \(6, 2\)"),
        ("nothing", "must return a module of Flax, .* got NoneType"),
        ("failing", "network failing: 'width'"),
        ("same_path", "same_path: two parameters have the path 'a/b'"),
        ("whole", "the outputs must be floating point, got int32"),
        ("training", "the argument 'training' of __call__ would not be passed"),
        ("second_in_training", "with train=False the running statistics .* change: "),
        ("haiku_in_training", "with train=False the running statistics .* change: "),
        ("second_frozen", "with train=True the running statistics .* stay as they are"),
        (
            "branching_network",
            r"line \d+ of .*mine.py needs the value .* \(return init,",
        ),
        ("auxiliary", r"the outputs must be logits \(6, 3\), got tuple"),
        ("leaving", "network leaving: SystemExit"),
    ],
)
def test_what_is_no_network_is_refused(path, name, message):
    with pytest.raises(ValueError, match=message):
        load(path, name)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("{path}", "network must be PATH.py:FUNCTION"),
        ("/nowhere/mine.py:plain", "there is no file /nowhere/mine.py"),
        ("{path}:missing", "has no function 'missing'; it has linen, sequential"),
        ("{path}:plain,hk", "has no function 'hk'"),
    ],
)
def test_what_is_no_function_is_refused(path, chosen, message):
    with pytest.raises(ValueError, match=message):
        custom.load_functions(chosen.format(path=path), "network")


def test_a_file_is_executed_as_a_module_of_its_folder(tmp_path):
    (tmp_path / "blocks_of_mine.py").write_text("WIDTH = 3\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "def make(num_classes):\n"
        "    from blocks_of_mine import WIDTH\n"
        "    @dataclasses.dataclass\n"
        "    class Options:\n"
        "        width: int = WIDTH\n"
        "    return Options().width * num_classes\n"
    )
    chosen = f"{tmp_path}/mine.py:make"
    assert custom.load_functions(chosen, "network")["make"](2) == 6


def test_the_digest_covers_what_a_file_imports_from_its_folder(tmp_path):
    files = {
        "mine.py": "def make():\n    import parts_of_mine.first\n    import jax\n"
        "    from no_package import leaf, broken\n",
        "no_package/leaf.py": "import mine\n",
        "no_package/broken.py": "def (\n",
        "parts_of_mine/__init__.py": "",
        "parts_of_mine/first.py": "from . import second\n",
        "parts_of_mine/second.py": "",
        "other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    chosen = f"{tmp_path}/mine.py:make"
    found = [custom.digest(chosen)]
    for name in files:
        (tmp_path / name).write_text(files[name] + "\n# changed\n")
        found.append(custom.digest(chosen))
    assert len(set(found[:-1])) == 7 and found[-1] == found[-2]
    (tmp_path / "alone.py").write_text("import jax\n")
    alone = hashlib.sha256(b"import jax\n").hexdigest()
    assert custom.digest(f"{tmp_path}/alone.py:make") == alone


def test_a_file_that_fails_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named"):
        custom.load_functions(f"{tmp_path}/bad.py:make", "network")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vector", "must return a floating-point scalar"),
        ("twice", "got a tuple"),
        ("branching", r"line \d+ of .*mine.py needs the value .*if logits.max\(\) > 3"),
    ],
)
def test_what_is_no_loss_is_refused(path, name, message):
    with pytest.raises(ValueError, match=message):
        custom.load_loss(f"{path}:{name}", 3)


def tiny_config(**changes):
    config = configs.get_config("smoke_own")
    config.learning_rates = (1e-3,)
    config.update_from_flattened_dict({"surface.size": 0, **changes})
    return config


@pytest.mark.slow
def test_a_network_is_measured_as_it_is_made(path, tmp_path):
    config = tiny_config(num_epochs=0)
    config.network, config.loss = f"{path}:plain", f"{path}:squares"
    config.network_options = {"scale": 0.3}
    config.sharpness.num_steps = 20
    config.surface.size = 3
    summary = probe_landscape.train_and_evaluate(config, tmp_path)
    arrays = files.read_npz(tmp_path / "plain_rate0.001_seed0" / "arrays.npz")
    images = classifier.load_images(config)
    count = config.sharpness.num_images
    inputs = classifier.normalize(images, images.train[0][:count]).reshape(count, -1)
    # The Hessian of the squares: 2 / (N K) X^T X for every output, X with ones.
    rows = np.concatenate([np.float64(inputs), np.ones((count, 1))], axis=1)
    values = np.linalg.eigvalsh(2 / (10 * count) * rows.T @ rows)
    name = "plain.rate0.001.largest_eigenvalue_at_the_end"
    assert summary[name] == pytest.approx(values[-1], rel=1e-3)
    [inner] = summary["runs"].values()
    # Ten copies; one random vector of signs.
    assert inner["hessian_trace"] == pytest.approx(10 * values.sum(), rel=0.5)
    assert arrays["surface"].shape == (3, 3) and np.isfinite(arrays["surface"]).all()
    assert (tmp_path / "figures" / "spectral_density.png").exists()
    assert "plain.envelope_width" not in summary
    # The same command shows the result.
    assert probe_landscape.train_and_evaluate(config, tmp_path) == summary


@pytest.mark.slow
def test_a_network_is_trained_with_another_loss(path, tmp_path):
    config = tiny_config()
    config.network, config.loss = f"{path}:plain", f"{path}:squares"
    summary = probe_landscape.train_and_evaluate(config, tmp_path)
    arrays = files.read_npz(tmp_path / "plain_rate0.001_seed0" / "arrays.npz")
    images = classifier.load_images(config)
    network = custom.load_network(
        config.network, "plain", images.train[0], num_classes=10, options={}
    )
    variables = classifier.init_variables(network, images, 0)
    order = np.random.default_rng((0, 0)).permutation(128)[:32]
    inputs = classifier.normalize(images, images.train[0][order])
    logits = network.apply(variables, inputs)
    targets = np.eye(10)[images.train[1][order]]
    np.testing.assert_allclose(
        arrays["loss"][0], np.mean(np.square(logits - targets)), rtol=1e-4
    )
    metrics = files.read_metrics(tmp_path / "plain_rate0.001_seed0" / "metrics.jsonl")
    found = [m["preconditioned_sharpness"] for m in metrics if m["step"] in (4, 8)]
    assert len(found) == 2 and all(value > 0 for value in found)
    assert "preconditioned_sharpness" not in metrics[0]
    key = "plain.rate0.001.preconditioned_sharpness_at_the_end"
    assert summary[key] == pytest.approx(found[-1], rel=1e-5)
    (tmp_path / "figures" / "eigenvalues.png").stat()


@pytest.mark.parametrize(
    ("network", "loss", "message"),
    [
        ("no_gradient", None, "network no_gradient or its loss: Reverse-mode"),
        ("plain", "of_two", "network plain or its loss: .* incompatible shapes"),
    ],
)
def test_what_has_no_derivatives_is_refused_before_the_run(
    path, tmp_path, network, loss, message
):
    config = tiny_config(num_epochs=0)
    config.network = f"{path}:{network}"
    config.loss = loss and f"{path}:{loss}"
    with pytest.raises(ValueError, match=message):
        probe_landscape.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_no_number_is_refused_before_the_run(path, tmp_path):
    config = tiny_config(num_epochs=0)
    config.network, config.loss = f"{path}:plain", f"{path}:of_negative"
    with pytest.raises(ValueError, match="loss of the initial network plain is nan"):
        probe_landscape.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parameters_of_16_bits_become_float32(path):
    variables = load(path, "bfloat16").init(jax.random.key(0), IMAGES)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.float32.dtype}


def test_parameters_of_haiku_have_nested_names(path):
    variables = load(path, "haiku").init(jax.random.key(0), IMAGES)
    chex.assert_trees_all_equal_shapes(
        variables["params"],
        {"linear": {"w": jnp.zeros((16, 3)), "b": jnp.zeros(3)}},
    )
