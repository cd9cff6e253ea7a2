"""The residual network against a NumPy forward pass and a count of its parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_oracle import BN_EPSILON, batch_norm, convolve, dense, shapes_of
from jax import lax
from numerics import assert_close, run

from experiments.networks import registry
from experiments.networks.convolution import matmul_conv
from experiments.networks.resnet import ResNet
from lbi import channels, pruning

pytestmark = pytest.mark.usefixtures("highest_precision")

SMALL = {"widths": (3, 4), "blocks": 2, "num_classes": 5}
IMAGES = (2, 6, 10, 2)


def random_variables(model, image_shape):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.uniform(0.2, 0.8, leaf.shape), jnp.float32)
            * rng.choice([-1, 1], leaf.shape if leaf.ndim > 1 else ())
        ),
        shapes_of(model, image_shape),
    )


def normalized_conv(x, variables, name, stride):
    kernel = variables["params"][name]["kernel"]
    x = convolve(x, kernel, len(kernel) // 2, stride)
    return batch_norm(x, variables, f"{name}_bn")


def numpy_resnet(model, variables, images):
    """float64, evaluation mode, one layer after the other."""
    variables = jax.tree.map(np.float64, variables)
    x = np.maximum(normalized_conv(np.float64(images), variables, "conv", 1), 0)
    for stage, width in enumerate(model.widths, start=1):
        for number in range(1, model.blocks + 1):
            name = f"block{stage}_{number}"
            stride = 2 if stage > 1 and number == 1 else 1
            y = np.maximum(normalized_conv(x, variables, f"{name}_conv1", stride), 0)
            y = normalized_conv(y, variables, f"{name}_conv2", 1)
            if stride > 1 or x.shape[-1] != width:
                x = normalized_conv(x, variables, f"{name}_shortcut", stride)
            x = np.maximum(x + y, 0)
    return dense(x.mean((1, 2)), variables["params"]["fc"])


@pytest.mark.parametrize("conv", [lax.conv_general_dilated, matmul_conv])
def test_matches_numpy(conv):
    model = ResNet(**SMALL, conv=conv)
    variables = random_variables(model, IMAGES)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    images = np.random.default_rng(1).normal(size=IMAGES).astype(np.float32)
    logits = run(model.apply, variables, images)
    # Ten layers of float32 sums; an error of architecture would be of order 1.
    assert_close(logits, numpy_resnet(model, variables, images), 1e-5)


def test_parameter_counts():
    shapes = shapes_of(ResNet(), (1, 32, 32, 3))
    convs = [(3, 3, 16), *[(3, 16, 16)] * 2]
    convs += [(3, 16, 32), (3, 32, 32), (1, 16, 32)]
    convs += [(3, 32, 64), (3, 64, 64), (1, 32, 64)]
    expected = sum(k * k * i * o + 2 * o for k, i, o in convs) + 64 * 10 + 10
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected
    assert expected == 78_042


def test_without_batch_normalization_its_convolutions_have_biases():
    """A normalization with mean 0 and variance 1 - eps leaves the same network."""
    plain = ResNet(**SMALL, batch_norm=False, conv=lax.conv_general_dilated)
    variables = random_variables(plain, IMAGES)
    assert set(variables) == {"params"}
    norms, stats = {}, {}
    for name, layer in variables["params"].items():
        if name != "fc":
            ones = np.ones_like(layer["bias"])
            norms[f"{name}_bn"] = {"scale": ones, "bias": layer["bias"]}
            stats[f"{name}_bn"] = {"mean": 0 * ones, "var": (1 - BN_EPSILON) * ones}
    joined = {"params": variables["params"] | norms, "batch_stats": stats}
    images = np.random.default_rng(1).normal(size=IMAGES).astype(np.float32)
    logits = run(plain.apply, variables, images)
    assert_close(logits, numpy_resnet(plain, joined, images), 1e-5)


def test_a_stored_config_gives_the_same_network():
    settings = {"type": "ResNet", "widths": [3, 4], "blocks": 2}
    model = registry.make_model(settings, 5)
    assert model == ResNet(**SMALL) and hash(model) == hash(ResNet(**SMALL))


@pytest.mark.slow
def test_without_channels_it_is_the_masked_network():
    """Channels of the residual stream go from all layers that write and read it."""
    conv = lax.conv_general_dilated  # compiles faster
    model = ResNet(widths=(4, 6), blocks=1, num_classes=5, conv=conv)
    variables = random_variables(model, IMAGES)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    graph = registry.channel_graph(model, IMAGES[1:])
    keep = {"conv": np.array([1, 0, 1, 1]) > 0, "block2_1_conv2": np.arange(6) > 1}
    # The convolution inside of each block has the width of its stage too.
    keep |= {"block1_1_conv1": np.arange(4) > 0, "block2_1_conv1": np.arange(6) > 1}
    masked = pruning.apply_masks(
        variables, channels.channel_masks(keep, graph, variables)
    )
    smaller = channels.thin(variables, keep, graph)
    images = np.random.default_rng(1).normal(size=IMAGES).astype(np.float32)
    expected = run(model.apply, masked, images)
    logits = run(model.clone(widths=(3, 4)).apply, smaller, images)
    # The same sums, without the zeros.
    chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5)
