"""Channels found by tracing: the masked network equals the smaller one it gives."""

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channel_oracle import check, conv
from flax import linen as nn
from flax import nnx

import vit
from lbi import channels, pruning

pytestmark = pytest.mark.usefixtures("unoptimized", "highest_precision")

NUMBERS = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(NUMBERS.normal(0, 0.5, shape), jnp.float32)


def positive(*shape):
    return jnp.asarray(NUMBERS.uniform(0.5, 2, shape), jnp.float32)


def redraw(tree):
    """Random values in place of all, so that no bias is zero and no scale one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (positive if "var" in str(path) else draw)(*leaf.shape),
        tree,
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


def strided(p, x):
    """Even and odd channels go different ways: they are removed in pairs."""
    x = jax.nn.relu(x @ p["in"])
    return x[:, ::2] @ p["even"] + jnp.tanh(x[:, 1::2] @ p["odd"])


STRIDED = {"in": draw(4, 8), "even": draw(4, 3), "odd": draw(4, 3)}


def experts(p, x):
    """Each row goes through one of two networks."""
    sizes = jnp.array([1, 2])
    x = jax.nn.gelu(jax.lax.ragged_dot(x, p["up"], sizes))
    return jax.lax.ragged_dot(x, p["down"], sizes)


EXPERTS = {"up": draw(2, 4, 6), "down": draw(2, 6, 3)}


def graph_network(p, x):
    """Messages along edges, summed, or their largest one, at each node."""
    first, second = jnp.array([0, 1, 2, 1]), jnp.array([1, 0, 1, 2])
    nodes = jax.nn.sigmoid(x @ p["in"])
    messages = jnp.tanh(nodes[first] @ p["message"])
    sums = jax.ops.segment_sum(messages, second, len(x))
    largest = jax.ops.segment_max(nodes[first], second, len(x))
    nodes = jnp.concatenate([sums, largest], -1).at[1:].multiply(2.0)
    return nodes.at[0].set(p["first"]) @ p["out"]


GRAPH = {
    "in": draw(4, 6),
    "message": draw(6, 5),
    "first": draw(11),
    "out": draw(11, 3),
}


def fourier(p, x):
    """A Fourier neural operator: a product of low frequencies."""
    hidden = x @ p["lift"]
    low = jnp.fft.rfft(hidden, axis=1)[:, :3]
    low = jnp.einsum("bmi,iom->bmo", low, jax.lax.complex(p["real"], p["imag"]))
    all_of = jnp.zeros((len(x), 4, low.shape[-1]), low.dtype).at[:, :3].set(low)
    smooth = jnp.fft.irfft(all_of, n=6, axis=1)
    return jax.nn.gelu(smooth + hidden @ p["skip"]) @ p["out"]


FOURIER = {
    "lift": draw(2, 5),
    "real": draw(5, 4, 3),
    "imag": draw(5, 4, 3),
    "skip": draw(5, 4),
    "out": draw(4, 3),
}


def weight_norm(p, x):
    """Kernels of unit norm: what is removed adds nothing to the norms."""

    def unit(kernel, *axes):
        squares = jnp.square(kernel).sum(axes, keepdims=True)
        return kernel * jax.lax.rsqrt(squares + 1e-6)

    x = jax.nn.relu(conv(x, unit(p["a"], 0, 1, 2)) * shaped(p["gain"]))
    x = jax.nn.gelu(conv(x, unit(p["b"], 0, 1, 2)))
    return x.mean((1, 2)) @ unit(p["out"], 0, 1)


WEIGHT_NORM = {
    "a": draw(3, 3, 2, 5),
    "gain": draw(5),
    "b": draw(3, 3, 5, 4),
    "out": draw(4, 3),
}
IMAGE, ROWS = (2, 4, 6, 2), (3, 4)
# name: (network, parameters, shape of the input, {channels: number})
PLAIN = {
    "resnet": (
        resnet,
        RESNET,
        IMAGE,
        {"stem": 5, "a/conv1": 4, "b/conv1": 6, "b/shortcut": 7},
    ),
    "strided": (strided, STRIDED, ROWS, {"in": 4}),
    "densenet": (densenet, DENSENET, IMAGE, {"a": 4, "b": 3, "c": 5}),
    "glu": (glu, GLU, ROWS, {"in": 5}),
    "attention": (attention, ATTENTION, (2, 3, 5), {"qkv": 3}),
    "scanned": (scanned, SCANNED, ROWS, {"up": 6}),
    "experts": (experts, EXPERTS, ROWS, {"up": 6}),
    "graph": (graph_network, GRAPH, ROWS, {"in": 6, "message": 5}),
    "fourier": (fourier, FOURIER, (2, 6, 2), {"lift": 5, "real": 4}),
    "weight_norm": (weight_norm, WEIGHT_NORM, IMAGE, {"a": 5, "b": 4}),
}


def random_keep(sizes):
    rng = np.random.default_rng(1)
    return {
        name: rng.permutation(size) < max(round(0.6 * size), 1)
        for name, size in sizes.items()
    }


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", PLAIN)
def test_masked_network_equals_the_smaller_one(name):
    apply_fn, params, shape, sizes = PLAIN[name]
    graph = channels.trace(apply_fn, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert graph.removable() == sizes
    check(graph, random_keep(sizes), params, draw(*shape), apply_fn)


def test_groups_of_a_convolution_and_channels_within_them():
    graph = channels.trace(grouped, GROUPED, jax.ShapeDtypeStruct(IMAGE, jnp.float32))
    # Three groups, each of two inputs and four outputs.
    sizes = {"a:3": 3, "a:3+": 2, "b": 4}
    assert graph.removable() == sizes
    check(graph, random_keep(sizes), GROUPED, draw(*IMAGE), grouped)
    _, groups, _ = graph["a:3"]
    np.testing.assert_array_equal(groups[2], np.arange(12) // 4)


# Networks of Linen, NNX, Haiku and Equinox, whose sizes are arguments.


class Depthwise(nn.Module):
    widths: tuple[int, int] = (4, 6)

    @nn.compact
    def __call__(self, x):
        first, second = self.widths
        x = nn.relu(nn.Conv(first, (3, 3), name="stem")(x))
        x = nn.Conv(first, (3, 3), feature_group_count=first, name="depth")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        x = nn.relu(nn.Conv(second, (1, 1), name="point")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3, name="out")(x.reshape(len(x), -1))


def test_depthwise_convolution_of_linen():
    x, model = draw(*IMAGE), Depthwise()
    variables = redraw(jax.eval_shape(model.init, jax.random.key(0), x))
    graph = channels.trace(model.apply, variables, x)
    sizes = {"params/stem/kernel": 4, "params/point/kernel": 6}
    assert graph.removable() == sizes
    keep = random_keep(sizes)
    smaller = Depthwise(tuple(int(mask.sum()) for mask in keep.values()))
    thinned = check(graph, keep, variables, x, model.apply, smaller.apply)
    assert thinned["params"]["depth"]["kernel"].shape == (3, 3, 1, 2)
    # A part of the path is a name as well.
    named = {"stem": keep["params/stem/kernel"]}
    assert (
        pruning.thin(variables, named, graph)["params"]["stem"]["bias"].tolist()
        == thinned["params"]["stem"]["bias"].tolist()
    )


def haiku_network(widths):
    def network(x):
        x = hk.Conv2D(widths[0], 3, data_format="NCHW", name="conv")(x)
        x = hk.Flatten()(jax.nn.sigmoid(x))  # (B, C * H * W)
        x = jax.nn.gelu(hk.Linear(widths[1], name="hidden")(x))
        return hk.Linear(3, name="out")(x)

    return hk.without_apply_rng(hk.transform(network))


def test_haiku_with_channels_first():
    x, network = draw(2, 2, 4, 6), haiku_network((4, 5))
    params = redraw(jax.eval_shape(network.init, jax.random.key(0), x))
    graph = channels.trace(network.apply, params, x)
    sizes = {"conv/w": 4, "hidden/w": 5}
    assert graph.removable() == sizes
    keep = random_keep(sizes)
    smaller = haiku_network(tuple(int(mask.sum()) for mask in keep.values()))
    check(graph, keep, params, x, network.apply, smaller.apply)


class NnxNetwork(nnx.Module):
    def __init__(self, widths, rngs):
        first, second = widths
        self.conv = nnx.Conv(2, first, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.hidden = nnx.Linear(first, second, rngs=rngs)
        self.out = nnx.Linear(second, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.swish(self.bn(self.conv(x)))
        return self.out(nnx.relu(self.hidden(x.mean((1, 2)))))


def nnx_apply(widths):
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxNetwork(widths, nnx.Rngs(0))))
    return state, lambda state, x: nnx.merge(graph, state)(x)


def test_nnx():
    x = draw(*IMAGE)
    state, apply_fn = nnx_apply((4, 5))
    state = redraw(state)
    graph = channels.trace(apply_fn, state, x)
    sizes = {"conv/kernel": 4, "hidden/kernel": 5}
    assert graph.removable() == sizes
    keep = random_keep(sizes)
    _, smaller = nnx_apply(tuple(int(mask.sum()) for mask in keep.values()))
    check(graph, keep, state, x, apply_fn, smaller)


class EquinoxNetwork(eqx.Module):
    conv: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, widths):
        keys = jax.random.split(jax.random.key(0), 3)
        self.conv = eqx.nn.Conv2d(2, widths[0], 3, key=keys[0])
        self.hidden = eqx.nn.Linear(8 * widths[0], widths[1], key=keys[1])
        self.out = eqx.nn.Linear(widths[1], 3, key=keys[2])

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x)).ravel()
        return self.out(jax.nn.relu(self.hidden(x)))


def equinox_apply(widths):
    network = eqx.filter_eval_shape(EquinoxNetwork, widths)
    params, static = eqx.partition(network, lambda leaf: hasattr(leaf, "shape"))
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def test_equinox_under_vmap():
    x = draw(3, 2, 4, 6)
    params, apply_fn = equinox_apply((4, 5))
    params = redraw(params)
    graph = channels.trace(apply_fn, params, x)
    sizes = {"conv/weight": 4, "hidden/weight": 5}
    assert graph.removable() == sizes
    # Equinox reads the sizes from the arrays, so the same modules run the smaller one.
    check(graph, random_keep(sizes), params, x, apply_fn)


# Our Vision Transformer: the same as vit.slicing, which knows its layers by name.


def test_heads_and_neurons_of_vit_are_those_of_slicing():
    model = vit.make("cifar_128", num_classes=3, patch_size=4, num_layers=1, mlp_dim=12)
    images = draw(2, 8, 8, 3)
    params = redraw(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    graph = channels.trace(lambda p, x: model.apply({"params": p}, x), params, images)
    block = "Transformer/encoderblock_0/"
    heads = block + "MultiHeadDotProductAttention_0/query/kernel"
    neurons = block + "MlpBlock_0/Dense_0/kernel"
    assert graph.removable()[heads] == 4 and graph.removable()[neurons] == 12
    keep = {heads: np.arange(4) != 1, neurons: np.arange(12) % 3 > 0}
    chosen = [[np.flatnonzero(mask).tolist()] for mask in keep.values()]
    smaller, expected = vit.slicing.keep_heads(model, params, chosen[0])
    smaller, expected = vit.slicing.keep_neurons(smaller, expected, chosen[1])
    thinned = check(
        graph,
        keep,
        params,
        images,
        lambda p, x: model.apply({"params": p}, x),
        lambda p, x: smaller.apply({"params": p}, x),
    )
    chex.assert_trees_all_equal(thinned, expected)


def test_a_large_vit_is_traced_by_its_shapes():
    model = vit.make("B", num_classes=1000, patch_size=16, num_layers=2)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    graph = channels.trace(model.apply, variables, images)
    sizes = [12, 64, 3072] * 2  # heads, entries of a value, neurons
    assert list(graph.removable().values()) == sizes


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.log(jnp.cosh(x) + 1),
        lambda x: x / (jnp.std(x, 0, keepdims=True) + 0.1),
        lambda x: jnp.sort(jax.nn.sigmoid(x), 0) / jnp.cumsum(jnp.exp(x), 0),
        lambda x: jnp.mod(jnp.exp(x), 3.0) / jax.nn.sigmoid(x).max(0, keepdims=True),
        lambda x: jnp.exp(jnp.where(x > 0, x, -jnp.inf)),
        lambda x: (
            jax.scipy.special.i0e(x) * jax.scipy.special.gammainc(2.0, jnp.abs(x))
        ),
    ],
    ids=["cosh", "std", "sort", "mod", "infinite", "bessel"],
)
def test_removed_entries_that_stay_finite_are_removed(function):
    def network(p, x):
        return function(x @ p["a"]) @ p["b"]

    params, x = {"a": draw(3, 4), "b": draw(4, 2)}, draw(5, 3)
    with jax.debug_nans(True):
        graph = channels.trace(network, params, x)
    check(graph, {"a": np.arange(4) != 2}, params, x, network)


# What is refused.


def layer_norm(p, x):
    x = x @ p["a"]
    x = x - x.mean(-1, keepdims=True)
    return jax.nn.relu(x) @ p["b"]


def softmax(p, x):
    return jax.nn.softmax(x @ p["a"]) @ p["b"]


def sorted_channels(p, x):
    return jnp.sort(x @ p["a"]) @ p["b"]


def largest_of_the_active(p, x):
    """A removed channel is -inf everywhere."""
    hidden = x @ p["a"]
    return jnp.where(hidden > 0, hidden, -jnp.inf).max(0) @ p["b"]


def softmax_of_the_active(p, x):
    hidden = x @ p["a"]
    return jax.nn.softmax(jnp.where(hidden > 0, hidden, -jnp.inf), 0) @ p["b"]


def mean_without_nan(p, x):
    hidden = x @ p["a"]
    return jnp.nanmean(jnp.where(hidden > 0, hidden, jnp.nan), 0) @ p["b"]


def place_of_the_largest(p, x):
    return (1 / jnp.argmax(x @ p["a"], 0)) @ p["b"]


def unknown(p, x):
    return (x @ p["a"]).at[0].apply(jnp.exp) @ p["b"]


def fourier_of_channels(p, x):
    return jnp.fft.fft(x @ p["a"]).real @ p["b"]


def update_of_some(p, x):
    return (x @ p["a"]).at[:, :1].set(0.0) @ p["b"]


def share_of_a_segment(p, x):
    """A removed channel has the sum 0."""
    hidden, rows = jnp.abs(x @ p["a"]), jnp.array([0, 1, 0, 1, 1])
    return (hidden / jax.ops.segment_sum(hidden, rows, 2)[rows]) @ p["b"]


def output(p, x):
    hidden = x @ p["a"]
    return hidden @ p["b"], hidden


def product_of_activations(p, x):
    hidden = x @ p["a"]
    return (hidden @ hidden.T) @ (hidden @ p["b"])


def fixed_length(p, x):
    return (x @ p["a"] + jnp.arange(4.0)[None]) @ p["b"]


def unit_columns(p, x):
    """A removed column is 0 / 0 in the masked network."""
    kernel = p["a"] / jnp.sqrt(jnp.square(p["a"]).sum(0, keepdims=True))
    return (x @ kernel) @ p["b"]


def standardized(p, x):
    """`jnp.std` chooses between the deviation and NaN."""
    return (x @ (p["a"] / p["a"].std(0, keepdims=True))) @ p["b"]


def centered_rows(p, x):
    """Weight standardization divides by the number of inputs."""
    return (x @ p["a"]) @ (p["b"] - p["b"].mean(0, keepdims=True))


def scaled_to_unit_variance(p, x):
    """The kernels of Karras et al. 2024 (arXiv 2312.02696)."""
    norms = jnp.linalg.norm(p["b"], axis=0, keepdims=True)
    return (x @ p["a"]) @ (p["b"] / norms / jnp.sqrt(len(p["b"])))


def scaled_by_an_array(p, x):
    scale = 1 / jnp.prod(jnp.array(p["b"].shape[:1]))
    return (x @ p["a"]) @ (p["b"] - p["b"].sum(0, keepdims=True) * scale)


def average_of_an_iteration(p, x):
    def halve(_, kernel):
        return kernel - 0.5 * kernel.sum(0, keepdims=True)

    return (x @ p["a"]) @ jax.lax.fori_loop(0, 2, halve, p["b"])


def mean_of_the_active(p, x):
    hidden = x[None] @ p["a"]
    active = (hidden > 0).sum(1)
    return jax.nn.relu(hidden).sum(1) / active @ p["b"]


def cumulative_share(p, x):
    hidden = jnp.square(x @ p["a"])
    return (hidden / jnp.cumsum(hidden, 0)) @ p["b"]


def clipped_share(p, x):
    hidden = x @ p["a"]
    return (hidden / jnp.clip(jnp.abs(hidden), 0, 6)) @ p["b"]


def remainder(p, x):
    hidden = x @ p["a"]
    return jax.lax.rem(jnp.ones_like(hidden), hidden) @ p["b"]


def rolled(p, x):
    return jnp.roll(x @ p["a"], 1, axis=-1) @ p["b"]


def shifted_in_time(p, x):
    """Some channels come from the example before."""
    hidden = x @ p["a"]
    return jnp.concatenate([jnp.roll(hidden[:, :1], 1, 0), hidden[:, 1:]], 1) @ p["b"]


def rolled_after_reshaping(p, x):
    hidden = x @ p["a"]
    parts = [part.reshape(len(x), -1, 1) for part in (hidden[:, 1:], hidden[:, :1])]
    return jnp.concatenate(parts, 1)[..., 0] @ p["b"]


def rolled_after_a_sum(p, x):
    hidden, zeros = x @ p["a"], jnp.zeros((len(x), 4))
    parts = [zeros[:, 1:] + hidden[:, 1:], zeros[:, :1] + hidden[:, :1]]
    return jnp.concatenate(parts, 1) @ p["b"]


def modulo(p, x):
    """`jnp.mod` corrects the sign of the remainder where it is not zero."""
    hidden = x @ p["a"]
    return (1 / jnp.mod(hidden, 3.0)) @ p["b"]


def share_of_the_median(p, x):
    hidden = jnp.abs(x @ p["a"])
    return (hidden / jnp.median(hidden, 0, keepdims=True)) @ p["b"]


def largest_share(p, x):
    hidden = jnp.abs(x @ p["a"]).T
    return (hidden / jax.lax.top_k(hidden, 2)[0].sum(1, keepdims=True)).T @ p["b"]


def inverse_of_cosh(p, x):
    return jnp.arccosh(x @ p["a"]) @ p["b"]


def constant_divided_by_its_deviation(p, x):
    """A removed channel is 1/2 everywhere and deviates by 0."""
    hidden = jax.nn.sigmoid(x @ p["a"])
    return (hidden / hidden.std(0, keepdims=True)) @ p["b"]


def logarithm_of_a_difference(p, x):
    """It is log(exp(0) - 1), that is, log 0."""
    return jnp.log(jnp.exp(jnp.abs(x @ p["a"])) - 1) @ p["b"]


def length_of_pairs(p, x):
    hidden = x @ p["a"]
    return (hidden / jnp.hypot(hidden, hidden)) @ p["b"]


def padded_with_ones(p, x):
    """The last output sums the removed channel too."""
    wide = jnp.pad(p["b"], ((0, 0), (0, 1)), constant_values=1.0)
    return jax.nn.sigmoid(x @ p["a"]) @ wide


def gates(p, x):
    """The sigmoid of a masked weight is 1/2."""
    return (x @ p["a"]) @ jax.nn.sigmoid(p["b"])


@pytest.mark.parametrize(
    ("apply_fn", "reason"),
    [
        (layer_norm, r"an operation over all of them \(reduce_sum at "),
        (softmax, r"an operation over all of them \(reduce_max at "),
        (sorted_channels, r"an operation over all of them \(sort at "),
        (unknown, r"there is no rule for this operation \(scatter at "),
        (fourier_of_channels, r"an operation over all of them \(fft at "),
        (update_of_some, r"a part of them is replaced \(scatter at "),
        (share_of_a_segment, r"would be divided by zero \(div at "),
        (output, "they are an output of the network"),
        (product_of_activations, r"a product of activations .*\(dot_general at "),
        (fixed_length, r"an axis of fixed length \(add at "),
        (unit_columns, r"would be divided by zero \(div at "),
        (standardized, r"would be divided by zero \(div at "),
        (centered_rows, r"a mean, or another multiple of a sum .* \(div at "),
        (scaled_to_unit_variance, r"a mean, or another multiple .* \(div at "),
        (scaled_by_an_array, r"a mean, or another multiple of a sum .* \(mul at "),
        (average_of_an_iteration, r"a mean, or another multiple .* \(mul at "),
        (mean_of_the_active, r"would be divided by zero \(div at "),
        (cumulative_share, r"would be divided by zero \(div at "),
        (clipped_share, r"would be divided by zero \(div at "),
        (remainder, r"would be divided by zero \(rem at "),
        (rolled, r"unequal parts of one axis are joined \(concatenate at "),
        (shifted_in_time, r"unequal parts of one axis are joined \(concatenate at "),
        (rolled_after_reshaping, r"unequal parts of one axis .*\(concatenate at "),
        (rolled_after_a_sum, r"unequal parts of one axis .*\(concatenate at "),
        (modulo, r"would be divided by zero \(div at "),
        (share_of_the_median, r"would be divided by zero \(div at "),
        (largest_share, r"would be divided by zero \(div at "),
        (inverse_of_cosh, r"would be infinite or NaN \(acosh at "),
        (constant_divided_by_its_deviation, r"would be divided by zero \(div at "),
        (logarithm_of_a_difference, r"would be infinite or NaN \(log at "),
        (length_of_pairs, r"would be divided by zero \(div at "),
        (largest_of_the_active, r"would be infinite or NaN \(dot_general at "),
        (softmax_of_the_active, r"would be infinite or NaN \(dot_general at "),
        (mean_without_nan, r"would be divided by zero \(div at "),
        (place_of_the_largest, r"would be divided by zero \(div at "),
        (padded_with_ones, r"would still contribute to a sum \(dot_general at "),
        (gates, r"a removed channel would still contribute to a sum \(dot_general at "),
    ],
)
def test_what_cannot_be_removed_is_refused_with_operation_and_line(apply_fn, reason):
    params = {"a": draw(3, 4), "b": draw(4, 2)}
    graph = channels.trace(apply_fn, params, draw(5, 3))
    assert graph.removable() == {}
    line = r"test_channel_graph\.py:\d+" if "\\(" in reason else ""
    keep = {"a": np.arange(4) != 2}
    with pytest.raises(ValueError, match=f"^a: channel 2 cannot .* {reason}{line}"):
        pruning.thin(params, keep, graph)


def test_entries_of_a_learned_query_are_fixed():
    """The scale of the products depends on their number, as with other queries."""

    def network(p, x):
        queries = p["latents"] @ p["query"] + p["bias"][None]
        scores = queries @ (x @ p["key"]).T / queries.shape[1] ** 0.5
        return jax.nn.softmax(scores) @ x @ p["out"]

    sizes = {"latents": (2, 5), "query": (5, 4), "bias": (4,), "key": (3, 4)}
    params = {name: draw(*size) for name, size in (sizes | {"out": (3, 2)}).items()}
    graph = channels.trace(network, params, draw(6, 3))
    assert graph.removable() == {}
    with pytest.raises(ValueError, match="a product of activations sums over them"):
        pruning.thin(params, {"query": np.arange(4) > 0}, graph)


def test_the_only_channel_cannot_be_removed():
    def network(p, x):
        hidden = x @ p["a"]
        return (hidden + jnp.roll(hidden, 1, -1)) @ p["b"]

    params = {"a": draw(3, 4), "b": draw(4, 2)}
    assert channels.trace(network, params, draw(5, 3)).removable() == {}


def test_a_barrier_changes_nothing():
    def network(p, x):
        return jax.nn.relu(x @ jax.lax.optimization_barrier(p["a"])) @ p["b"]

    params = {"a": draw(3, 4), "b": draw(4, 2)}
    graph = channels.trace(network, params, draw(5, 3))
    check(graph, {"a": np.arange(4) != 2}, params, draw(5, 3), network)


def test_halves_that_change_places_stay_halves():
    def network(p, x):
        hidden = x @ p["a"]
        return jnp.roll(hidden, hidden.shape[1] // 2, -1) @ p["b"]

    params = {"a": draw(3, 6), "b": draw(6, 2)}
    graph = channels.trace(network, params, draw(5, 3))
    assert graph.removable() == {"a": 3}  # pairs
    check(graph, {"a": np.arange(3) != 1}, params, draw(5, 3), network)


def test_channels_that_are_rolled_in_two_steps_are_fixed():
    def network(p, x):
        first, second, third, fourth = jnp.split(x @ p["a"], 4, axis=1)
        half = jnp.concatenate([fourth, third], 1)
        return jnp.concatenate([half, second, first], 1) @ p["b"]

    params = {"a": draw(3, 4), "b": draw(4, 2)}
    graph = channels.trace(network, params, draw(5, 3))
    assert graph.removable() == {}
    [reason] = set(graph.fixed["a"].values())
    assert reason.startswith("unequal parts of one axis are joined (concatenate at ")


def test_halves_that_are_joined_in_two_steps_stay_halves():
    def network(p, x):
        first, second = jnp.split(x @ p["a"], 2, axis=1)
        second = jnp.concatenate([second, jax.nn.relu(second @ p["c"])], 1)
        return jnp.concatenate([first, second], 1) @ p["b"]

    params = {"a": draw(3, 6), "b": draw(8, 2), "c": draw(3, 2)}
    graph = channels.trace(network, params, draw(5, 3))
    assert graph.removable() == {"a": 3, "c": 2}  # pairs
    keep = {"a": np.arange(3) != 1, "c": np.arange(2) > 0}
    check(graph, keep, params, draw(5, 3), network)


def test_only_some_channels_may_be_fixed():
    def network(p, x):
        hidden = jax.nn.relu(x @ p["a"])
        return hidden @ p["b"] + hidden[:, :1]

    params = {"a": draw(3, 4), "b": draw(4, 2)}
    graph = channels.trace(network, params, draw(5, 3))
    assert graph.removable() == {"a": 4} and list(graph.fixed["a"]) == [0]
    check(graph, {"a": np.arange(4) != 2}, params, draw(5, 3), network)
    with pytest.raises(ValueError, match="a: channel 0 cannot be removed"):
        pruning.thin(params, {"a": np.arange(4) > 0}, graph)


def test_bad_input_is_refused():
    params = {"a": draw(3, 4), "b": draw(4, 2)}

    def network(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    graph = channels.trace(network, params, draw(5, 3))
    keep = {"a": np.arange(4) != 2}
    for other, message in [
        ({"params": params}, "another network: the variables have no a"),
        (params | {"c": draw(2)}, "another network: the traced parameters have no c"),
        (params | {"b": draw(4, 3)}, r"another network: b has shape \(4, 3\), in .*2"),
        (params | {"b": jnp.full((4, 2), jnp.nan)}, "b contains NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            pruning.thin(other, keep, graph)
    for mask, message in [
        ({"c": np.ones(4, bool)}, "c is not a layer of the traced network: a"),
        ({"a": np.ones(3)}, r"a: the mask must have shape \(4,\), got \(3,\)"),
        ({"a": np.zeros(4)}, "a would lose all its channels"),
        # Scores, and the numbers of the channels to keep.
        (
            {"a": np.full(4, 0.5)},
            "a: the mask must be bool .*, got float64; .*keep_masks",
        ),
        ({"a": np.arange(4)}, "a: the mask must be bool .*, got int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            pruning.thin(params, mask, graph)
    with pytest.raises(
        ValueError, match="the function cannot be traced: .*boolean conversion"
    ):
        channels.trace(lambda p, x: x if p["a"].sum() > 0 else -x, params, draw(5, 3))


def test_keys_and_python_numbers_among_the_variables():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.b = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(self.dropout(nnx.relu(self.a(x))))

    structure, state = nnx.split(Network(nnx.Rngs(0)))
    variables = {"state": state, "scale": 2.0}

    def network(v, x):
        return v["scale"] * nnx.merge(structure, v["state"])(x)

    x = draw(5, 3)
    graph = channels.trace(network, variables, x)
    keep = {"a": np.arange(4) != 2}
    masks = channels.channel_masks(keep, graph, variables)
    masked = network(pruning.apply_masks(variables, masks), x)
    smaller = network(pruning.thin(variables, keep, graph), x)
    np.testing.assert_allclose(smaller, masked, rtol=1e-5, atol=1e-6)


def test_masks_of_tied_entries_must_agree():
    graph = channels.trace(glu, GLU, jax.ShapeDtypeStruct(ROWS, jnp.float32))
    both = np.tile(np.arange(5) != 3, 2)
    chex.assert_trees_all_equal(
        pruning.thin(GLU, {"in": both}, graph),
        pruning.thin(GLU, {"in": both[:5]}, graph),
    )
    with pytest.raises(ValueError, match="in: entries 8 and 3 can only be removed"):
        pruning.thin(GLU, {"in": np.arange(10) != 3}, graph)
