"""LeNet against a NumPy forward pass, published counts and stated distributions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.networks.convolution import matmul_conv
from experiments.networks.lenet import LeNet
from experiments.networks.registry import channel_graph
from lbi.penalty import named_leaves

SMALL = {"features": (3, 4, 5), "hidden": 6, "num_classes": 7}


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def run(function, *arguments):
    """Compiled for one run: compiling faster counts for more than running faster."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)(*arguments)


def shapes_of(model, channels=1):
    images = jax.ShapeDtypeStruct((2, 28, 28, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(model, channels=1):
    """Kernels that keep activations of order 1, and no bias that is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), jnp.float32
        ),
        shapes_of(model, channels),
    )


def random_images(channels=1):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(2, 28, 28, channels)), jnp.float32)


def numpy_conv(x, kernel, bias, pad):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias


def numpy_lenet(variables, images):
    """float64, one layer after the other."""
    params = jax.tree.map(np.float64, variables["params"])
    x = np.float64(images)
    for name, pad in [("conv1", 2), ("conv2", 0), ("conv3", 0)]:
        x = np.maximum(numpy_conv(x, *layer(params, name), pad), 0)
        if name != "conv3":
            x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
    assert x.shape[1:3] == (1, 1)
    kernel, bias = layer(params, "fc1")
    x = np.maximum(x[:, 0, 0] @ kernel + bias, 0)
    kernel, bias = layer(params, "fc2")
    return x @ kernel + bias


def layer(params, name):
    return params[name]["kernel"], params[name]["bias"]


@pytest.mark.parametrize("conv", [lax.conv_general_dilated, matmul_conv])
@pytest.mark.parametrize("channels", [1, 2])
def test_matches_numpy(conv, channels):
    model = LeNet(**SMALL, conv=conv)
    variables, images = random_variables(model, channels), random_images(channels)
    logits = run(model.apply, variables, images)
    expected = numpy_lenet(variables, images)
    # Five layers of float32 sums; an error of architecture would be of order 1.
    error = np.max(np.abs(logits - expected)) / np.max(np.abs(expected))
    assert error < 1e-5


def test_parameter_counts():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params))
        for name, params in shapes_of(LeNet())["params"].items()
    }
    assert counts == {
        "conv1": 156,
        "conv2": 2_416,
        "conv3": 48_120,
        "fc1": 10_164,
        "fc2": 850,
    }
    assert sum(counts.values()) == 61_706


def test_kernels_start_uniform_within_the_root_of_their_fan_in():
    params = run(LeNet().init, jax.random.key(0), random_images())["params"]
    for name in params:
        kernel, bias = (np.float64(array) for array in layer(params, name))
        bound = math.prod(kernel.shape[:-1]) ** -0.5
        # float32 rounds the bound itself.
        assert np.abs(kernel).max() <= bound * (1 + 1e-6)
        # Five standard errors of the variance of that many uniform values.
        error = abs(3 * np.mean(kernel**2) / bound**2 - 1)
        assert error < 5 * math.sqrt(0.8 / kernel.size)
        assert not np.any(bias)


def test_train_changes_nothing():
    model = LeNet(**SMALL)
    variables, images = random_variables(model), random_images()

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=True)

    logits = run(model.apply, variables, images)
    trained, updates = run(train, variables, images)
    np.testing.assert_array_equal(trained, logits)
    assert set(updates) == {"params"}


@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (2, 28, 24, 1), (28, 28, 1)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 28, 28, C\)"):
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        jax.eval_shape(LeNet().init, jax.random.key(0), images)


def test_channel_graph_finds_all_that_goes_with_a_channel():
    lengths = {"conv1": 3, "conv2": 4, "conv3": 5, "fc1": 6}
    leaves = named_leaves(shapes_of(LeNet(**SMALL)))
    channels = channel_graph(LeNet(**SMALL), (28, 28, 1))
    assert list(channels.removable().values()) == list(lengths.values())
    named = []
    for name in lengths:
        places = channels[f"params/{name}/kernel"]
        assert places[0][0] == f"params/{name}/kernel"
        for path, axis, numbers in places:
            copies = len(numbers) // lengths[name]  # positions of a flattened image
            expected_numbers = np.tile(np.arange(lengths[name]), copies)
            np.testing.assert_array_equal(numbers, expected_numbers)
            assert leaves[path].shape[axis] == lengths[name], (name, path)
            named.append((path, axis % leaves[path].ndim))
    # Every output axis of a hidden layer, every input axis but the image's, once.
    expected = []
    for path, leaf in leaves.items():
        if "/fc2/" not in path:
            expected.append((path, leaf.ndim - 1))
        if path.endswith("kernel") and "/conv1/" not in path:
            expected.append((path, leaf.ndim - 2))
    assert sorted(named) == sorted(expected)
