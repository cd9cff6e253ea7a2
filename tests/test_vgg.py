"""VGG-A against a NumPy forward pass and published counts; its batch statistics."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_oracle import (
    batch_norm,
    check_channel_graph,
    convolve,
    dense,
    max_pool,
    shapes_of,
)
from jax import lax
from numerics import assert_close, run

from experiments.networks.convolution import matmul_conv
from experiments.networks.vgg import VGG

pytestmark = pytest.mark.usefixtures("highest_precision")

# The shape of VGG-A, and two stages that leave several pixels to flatten.
NARROW = {
    "stages": ((3,), (4,), (5, 6), (7, 5), (4, 6)),
    "hidden": (8, 7),
    "num_classes": 9,
}
SHORT = {"stages": ((3,), (16, 5)), "hidden": (6,), "num_classes": 4}
IMAGES = {"narrow": (NARROW, (2, 32, 64, 3)), "short": (SHORT, (3, 8, 12, 2))}

sizes = pytest.mark.parametrize(
    ("settings", "image_shape"), IMAGES.values(), ids=IMAGES.keys()
)
with_and_without_bn = pytest.mark.parametrize(
    "batch_norm", [True, False], ids=["bn", "plain"]
)


def random_variables(model, image_shape):
    """Activations of order 1; no bias, scale or statistic at its usual start."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        stddev = (2 / math.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.3
        return jnp.asarray(rng.normal(0, stddev, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model, image_shape))


def random_images(shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def numpy_vgg(model, variables, images):
    """float64, evaluation mode, one layer after the other."""
    variables = jax.tree.map(np.float64, variables)
    params, x, number = variables["params"], np.float64(images), 0
    for stage in model.stages:
        for _ in stage:
            number += 1
            layer = params[f"conv{number}"]
            x = convolve(x, layer["kernel"], 1) + layer["bias"]
            if model.batch_norm:
                x = batch_norm(x, variables, f"bn{number}")
            x = np.maximum(x, 0)
        x = max_pool(x)
    x = np.reshape(x, (len(x), -1))
    for i in range(len(model.hidden) + 1):
        # This changes nothing before the first of these layers.
        x = dense(np.maximum(x, 0), params[f"fc{i + 1}"])
    return x


@pytest.mark.slow_after(1)
@sizes
@with_and_without_bn
@pytest.mark.parametrize("conv", [lax.conv_general_dilated, matmul_conv])
def test_matches_numpy(settings, image_shape, batch_norm, conv):
    model = VGG(**settings, batch_norm=batch_norm, conv=conv)
    variables, images = random_variables(model, image_shape), random_images(image_shape)
    logits = run(model.apply, variables, images)
    # Eleven layers of float32 sums; an error of architecture would be of order 1.
    assert_close(logits, numpy_vgg(model, variables, images), 1e-5)


def test_either_convolution_gives_the_same_batch_statistics():
    image_shape = (3, 8, 12, 2)
    images, results = random_images(image_shape), []
    for conv in (lax.conv_general_dilated, matmul_conv):
        model = VGG(**SHORT, conv=conv)

        def train(variables, images, model=model):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

        results.append(run(train, random_variables(model, image_shape), images))
    # Float32 rounding of sums, twice normalized.
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_on_a_cpu_its_convolutions_are_matrix_products():
    if jax.default_backend() != "cpu":
        pytest.skip("the choice here is that of a CPU")
    images = random_images((3, 8, 12, 2))
    for conv, expected in [(None, False), (lax.conv_general_dilated, True)]:
        model = VGG(**SHORT, conv=conv)
        variables = random_variables(model, images.shape)
        jaxpr = str(jax.make_jaxpr(model.apply)(variables, images))
        assert ("conv_general_dilated" in jaxpr) == expected


CONVS = {
    "conv1": 1_792,
    "conv2": 73_856,
    "conv3": 295_168,
    "conv4": 590_080,
    "conv5": 1_180_160,
    "conv6": 2_359_808,
    "conv7": 2_359_808,
    "conv8": 2_359_808,
}
DENSE = {"fc1": 262_656, "fc2": 262_656, "fc3": 5_130}
# A scale and a bias for each channel.
NORMS = {
    f"bn{i + 1}": 2 * n for i, n in enumerate((64, 128, 256, 256, 512, 512, 512, 512))
}


@pytest.mark.parametrize(
    ("batch_norm", "table", "total"),
    [(True, CONVS | NORMS | DENSE, 9_756_426), (False, CONVS | DENSE, 9_750_922)],
)
def test_parameter_counts(batch_norm, table, total):
    shapes = shapes_of(VGG(batch_norm=batch_norm), (1, 32, 32, 3))
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params))
        for name, params in shapes["params"].items()
    }
    assert counts == table
    assert sum(counts.values()) == total
    assert ("batch_stats" in shapes) == batch_norm


@pytest.mark.parametrize("momentum", [0.9, 0.75, 0.0])
def test_training_moves_the_statistics_to_those_of_the_batch(momentum):
    image_shape = (3, 8, 12, 2)
    model = VGG(**SHORT, bn_momentum=momentum)
    variables, images = random_variables(model, image_shape), random_images(image_shape)

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    _, updated = run(train, variables, images)
    first = jax.tree.map(np.float64, variables["params"]["conv1"])
    values = convolve(np.float64(images), first["kernel"], 1) + first["bias"]
    old, new = variables["batch_stats"]["bn1"], updated["batch_stats"]["bn1"]
    # Biased: the mean of squares about the mean, 288 values for each channel.
    batch = {"mean": values.mean((0, 1, 2)), "var": values.var((0, 1, 2))}
    for name, expected in batch.items():
        expected = momentum * np.float64(old[name]) + (1 - momentum) * expected
        # Flax takes the variance as a difference of two means of order 1.
        np.testing.assert_allclose(new[name], expected, rtol=1e-5, atol=1e-5)
    changed = jax.tree.map(
        lambda a, b: np.all(a != b), variables["batch_stats"], updated["batch_stats"]
    )
    assert all(jax.tree.leaves(changed)), changed


def test_training_normalizes_with_the_statistics_of_the_batch():
    image_shape = (3, 8, 12, 2)
    model = VGG(**SHORT, bn_momentum=0.0)
    variables, images = random_variables(model, image_shape), random_images(image_shape)

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = run(train, variables, images)
    # With momentum 0 the running statistics are the batch's own.
    expected = numpy_vgg(model, variables | updated, images)
    stale = numpy_vgg(model, variables, images)
    assert_close(logits, expected, 1e-5)
    assert np.max(np.abs(logits - stale)) > 0.1 * np.max(np.abs(expected))


def test_evaluation_leaves_the_statistics_alone():
    image_shape = (3, 8, 12, 2)
    model = VGG(**SHORT)
    variables, images = random_variables(model, image_shape), random_images(image_shape)

    def evaluate(variables, images):
        return model.apply(variables, images, mutable=["batch_stats"])

    _, updated = run(evaluate, variables, images)
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("settings", "shape", "side"),
    [
        (NARROW, (2, 28, 28, 3), 32),
        (NARROW, (2, 32, 48, 3), 32),
        (NARROW, (2, 48, 32, 3), 32),
        (NARROW, (32, 32, 3), 32),
        (SHORT, (2, 8, 10, 3), 4),
    ],
)
def test_images_of_another_size_are_refused(settings, shape, side):
    message = rf"images must be \(B, H, W, C\) with sides divisible by {side}"
    with pytest.raises(ValueError, match=message):
        shapes_of(VGG(**settings), shape)


@sizes
@with_and_without_bn
def test_channel_graph_finds_all_that_goes_with_a_channel(
    settings, image_shape, batch_norm
):
    model = VGG(**settings, batch_norm=batch_norm)
    convs = [channels for stage in model.stages for channels in stage]
    lengths = {f"conv{i + 1}": n for i, n in enumerate(convs)}
    lengths |= {f"fc{i + 1}": n for i, n in enumerate(model.hidden)}
    side = 2 ** len(model.stages)
    num_positions = image_shape[1] * image_shape[2] // side**2
    assert num_positions > 1
    check_channel_graph(model, image_shape, lengths, num_positions)
