"""Channels found by tracing: the masked network equals the smaller one it gives."""

import re

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lbi
import vit
from lbi import channels, pruning

NUMBERS = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def draw(*shape):
    return jnp.asarray(NUMBERS.normal(0, 0.5, shape), jnp.float32)


def positive(*shape):
    return jnp.asarray(NUMBERS.uniform(0.5, 2, shape), jnp.float32)


def redraw(tree):
    """Random values in place of all, so that no bias is zero and no scale one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (positive if "var" in str(path[-1]) else draw)(*leaf.shape),
        tree,
    )


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options
    )


def shaped(vector, rank=4):
    return vector.reshape((1,) * (rank - 1) + (-1,))


def norm(x, p):
    """Batch normalization with running statistics."""
    mean, var, scale, bias = (
        shaped(p[name]) for name in ("mean", "var", "scale", "bias")
    )
    return (x - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias


def norm_params(size):
    return {
        "mean": draw(size),
        "var": positive(size),
        "scale": draw(size),
        "bias": draw(size),
    }


# Networks as plain functions: their sizes are those of the parameters.


def resnet(p, x):
    x = jax.nn.relu(norm(conv(x, p["stem"]), p["bn0"]))
    y = jax.nn.relu(norm(conv(x, p["a"]["conv1"]), p["a"]["bn1"]))
    x = jax.nn.relu(x + norm(conv(y, p["a"]["conv2"]), p["a"]["bn2"]))
    y = jax.nn.silu(norm(conv(x, p["b"]["conv1"]), p["b"]["bn1"]))
    x = jax.nn.relu(conv(x, p["b"]["shortcut"]) + conv(y, p["b"]["conv2"]))
    x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return x.mean((1, 2)) @ p["out"]


RESNET = {
    "stem": draw(3, 3, 2, 5),
    "bn0": norm_params(5),
    "a": {
        "conv1": draw(3, 3, 5, 4),
        "bn1": norm_params(4),
        "conv2": draw(3, 3, 4, 5),
        "bn2": norm_params(5),
    },
    "b": {
        "conv1": draw(3, 3, 5, 6),
        "bn1": norm_params(6),
        "conv2": draw(3, 3, 6, 7),
        "shortcut": draw(1, 1, 5, 7),
    },
    "out": draw(7, 3),
}


def densenet(p, x):
    x = jnp.concatenate([x, jax.nn.sigmoid(conv(x, p["a"]))], axis=-1)
    x = jnp.concatenate([x, jnp.tanh(conv(x, p["b"]))], axis=-1)
    x = jax.nn.relu(norm(x, p["bn"]))
    return conv(x, p["c"]).transpose(0, 3, 1, 2).reshape(len(x), -1) @ p["out"]


DENSENET = {
    "a": draw(3, 3, 2, 4),
    "b": draw(1, 1, 6, 3),
    "bn": norm_params(9),
    "c": draw(1, 1, 9, 5),
    "out": draw(5 * 24, 3),
}


def grouped(p, x):
    x = jax.nn.relu(conv(x, p["a"]))
    groups = x.shape[-1] // p["b"].shape[2]
    x = jax.nn.relu(conv(x, p["b"], feature_group_count=groups))
    return x.mean((1, 2)) @ p["out"]


GROUPED = {"a": draw(3, 3, 2, 6), "b": draw(3, 3, 2, 12), "out": draw(12, 3)}


def glu(p, x):
    first, second = jnp.split(x @ p["in"] + shaped(p["bias"], 2), 2, axis=-1)
    gated = first * jax.nn.sigmoid(second)
    stacked = (x @ p["pairs"]).reshape(len(x), 2, -1)
    return (gated + stacked[:, 0] * stacked[:, 1]) @ p["out"]


GLU = {"in": draw(4, 10), "bias": draw(10), "pairs": draw(4, 10), "out": draw(5, 3)}


def attention(p, x, depth=4):
    """Heads by reshaping: fused query, key and value, and a window of their own."""
    qkv = (x @ p["qkv"]).reshape(*x.shape[:2], 3, -1, depth)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / depth**0.5)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return x + mixed.reshape(*x.shape[:2], -1) @ p["out"]


ATTENTION = {"qkv": draw(5, 3 * 3 * 4), "out": draw(12, 5)}


def scanned(p, x):
    @jax.checkpoint
    def layer(x, p):
        return x + jax.nn.gelu(x @ p["up"] + shaped(p["bias"], 2)) @ p["down"], None

    return jax.lax.scan(layer, x, p)[0]


SCANNED = {"up": draw(2, 4, 6), "bias": draw(2, 6), "down": draw(2, 6, 4)}
IMAGE, ROWS = (2, 4, 6, 2), (3, 4)
# name: (network, parameters, shape of the input, {channels: number})
PLAIN = {
    "resnet": (
        resnet,
        RESNET,
        IMAGE,
        {"stem": 5, "a/conv1": 4, "b/conv1": 6, "b/shortcut": 7},
    ),
    "densenet": (densenet, DENSENET, IMAGE, {"a": 4, "b": 3, "c": 5}),
    "glu": (glu, GLU, ROWS, {"in": 5}),
    "attention": (attention, ATTENTION, (2, 3, 5), {"qkv": 3}),
    "scanned": (scanned, SCANNED, ROWS, {"up": 6}),
}


def random_keep(sizes):
    rng = np.random.default_rng(1)
    return {
        name: rng.permutation(size) < max(round(0.6 * size), 1)
        for name, size in sizes.items()
    }


def check(graph, keep, params, x, apply_fn, smaller_fn=None):
    """The masked network equals the smaller one, and something was removed."""
    masks = channels.channel_masks(keep, graph, params)
    thinned = pruning.thin(params, keep, graph)
    removed = sum(leaf.size for leaf in jax.tree.leaves(thinned))
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    assert removed == kept < sum(leaf.size for leaf in jax.tree.leaves(params))
    masked = jax.jit(apply_fn)(pruning.apply_masks(params, masks), x)
    smaller = jax.jit(smaller_fn or apply_fn)(thinned, x)
    # Float32 rounding of the same sums in another order.
    np.testing.assert_allclose(smaller, masked, rtol=1e-4, atol=1e-5)
    assert np.abs(jax.jit(apply_fn)(params, x) - masked).max() > 1e-3
    return thinned


@pytest.mark.parametrize("name", PLAIN)
def test_masked_network_equals_the_smaller_one(name):
    apply_fn, params, shape, sizes = PLAIN[name]
    graph = channels.trace(apply_fn, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert graph.removable() == sizes
    check(graph, random_keep(sizes), params, draw(*shape), apply_fn)
