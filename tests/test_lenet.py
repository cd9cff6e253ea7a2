"""LeNet against a NumPy forward pass, published counts and stated distributions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_oracle import (
    check_channel_graph,
    convolve,
    dense,
    max_pool,
    shapes_of,
)
from jax import lax
from numerics import assert_close, run

from experiments.networks.convolution import matmul_conv
from experiments.networks.lenet import LeNet

pytestmark = pytest.mark.usefixtures("highest_precision")

SMALL = {"features": (3, 4, 5), "hidden": 6, "num_classes": 7}


def random_variables(model, channels=1):
    """Kernels that keep activations of order 1, and no bias that is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), jnp.float32
        ),
        shapes_of(model, (2, 28, 28, channels)),
    )


def random_images(channels=1):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(2, 28, 28, channels)), jnp.float32)


def numpy_lenet(variables, images):
    """float64, one layer after the other."""
    params = jax.tree.map(np.float64, variables["params"])
    x = np.float64(images)
    for name, pad in [("conv1", 2), ("conv2", 0), ("conv3", 0)]:
        x = convolve(x, params[name]["kernel"], pad) + params[name]["bias"]
        x = np.maximum(x, 0)
        if name != "conv3":
            x = max_pool(x)
    assert x.shape[1:3] == (1, 1)
    return dense(np.maximum(dense(x[:, 0, 0], params["fc1"]), 0), params["fc2"])


@pytest.mark.parametrize("conv", [lax.conv_general_dilated, matmul_conv])
@pytest.mark.parametrize("channels", [1, 2])
def test_matches_numpy(conv, channels):
    model = LeNet(**SMALL, conv=conv)
    variables, images = random_variables(model, channels), random_images(channels)
    logits = run(model.apply, variables, images)
    # Five layers of float32 sums; an error of architecture would be of order 1.
    assert_close(logits, numpy_lenet(variables, images), 1e-5)


def test_parameter_counts():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params))
        for name, params in shapes_of(LeNet(), (1, 28, 28, 1))["params"].items()
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
    for layer in params.values():
        kernel, bias = np.float64(layer["kernel"]), layer["bias"]
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
    check_channel_graph(LeNet(**SMALL), (2, 28, 28, 1), lengths)
