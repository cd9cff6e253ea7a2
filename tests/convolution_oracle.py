"""Layers of convolutional networks in NumPy, and their parameters as shapes."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks.registry import channel_graph
from lbi.penalty import named_leaves

BN_EPSILON = 1e-5


def shapes_of(model, image_shape):
    """The variables of a network for images (B, H, W, C), as shapes."""
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def convolve(x, kernel, pad, stride=1):
    """A convolution with `pad` pixels of zeros at each side."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
    windows = windows[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)


def max_pool(x):
    return np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def batch_norm(x, variables, name):
    """With running statistics."""
    affine, stats = variables["params"][name], variables["batch_stats"][name]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + BN_EPSILON)
    return x * affine["scale"] + affine["bias"]


def check_channel_graph(model, image_shape, lengths, num_positions=1):
    """The graph of a LeNet or VGG has all that goes with a channel.

    Args:
      model: the network.
      image_shape: (B, H, W, C).
      lengths: {hidden layer: its channels}, from first to last.
      num_positions: pixels of the last convolution, which are flattened.
    """
    leaves = named_leaves(shapes_of(model, image_shape))
    channels = channel_graph(model, image_shape[1:])
    assert list(channels.removable().values()) == list(lengths.values())
    *_, last_conv = (name for name in lengths if name.startswith("conv"))
    named = []
    for name, length in lengths.items():
        places = channels[f"params/{name}/kernel"]
        assert places[0][0] == f"params/{name}/kernel"
        for path, axis, numbers in places:
            copies = len(numbers) // length
            np.testing.assert_array_equal(numbers, np.tile(np.arange(length), copies))
            flattened = name == last_conv and path == "params/fc1/kernel"
            expected = length * (num_positions if flattened else 1)
            assert leaves[path].shape[axis] == expected, (name, path)
            named.append((path, axis % leaves[path].ndim))
    # Every output axis of a hidden layer, every input axis but the image's, once.
    expected = []
    for path, leaf in leaves.items():
        if path.split("/")[1] in lengths or path.split("/")[1].startswith("bn"):
            expected.append((path, leaf.ndim - 1))
        if path.endswith("kernel") and "/conv1/" not in path:
            expected.append((path, leaf.ndim - 2))
    assert sorted(named) == sorted(expected)
