"""Removal of channels: masked networks equal the smaller networks."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from flax import linen as nn
from numerics import run

from experiments.networks import lenet, vgg
from lbi import channels, pruning
from lbi.channels import trace

pytestmark = pytest.mark.usefixtures("highest_precision")


# Whole channels, and smaller networks.


class Positions(nn.Module):
    """A convolution whose 2x3 pixels are flattened, and f(0) = 1/2."""

    features: int = 4

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.features, (3, 3), padding="VALID", name="conv")(images)
        x = nn.sigmoid(x)
        x = x.reshape(len(x), -1)  # (B, 6 C): channels last
        return nn.Dense(5, name="dense")(x)


POSITIONS_MAP = {
    "conv": (
        ("params/conv/kernel", 3),
        ("params/conv/bias", 0),
        ("params/dense/kernel", 0),
    )
}


def make_vgg(channels, batch_norm, stages=(1, 1, 1, 1, 1), num_hidden=1):
    """A VGG whose layers have these channels in turn."""
    channels = iter(channels)
    stages = tuple(tuple(next(channels) for _ in range(n)) for n in stages)
    hidden = tuple(next(channels) for _ in range(num_hidden))
    return vgg.VGG(stages=stages, hidden=hidden, num_classes=7, batch_norm=batch_norm)


def make_lenet(channels):
    *features, hidden = channels
    return lenet.LeNet(features=tuple(features), hidden=hidden, num_classes=7)


# name: (network from channels, its channels, its map by hand, shape of the images)
NETWORKS = {
    "lenet": (
        make_lenet,
        (4, 5, 6, 8),
        "trace",
        (3, 28, 28, 1),
    ),
    "vgg_bn": (
        lambda channels: make_vgg(channels, True),
        (4, 5, 6, 7, 5, 8),
        "trace",
        (3, 32, 32, 3),
    ),
    "vgg": (
        lambda channels: make_vgg(channels, False),
        (4, 5, 6, 7, 5, 8),
        "trace",
        (3, 32, 32, 3),
    ),
    "vgg_bn_positions": (
        lambda channels: make_vgg(channels, True, (2, 1), 1),
        (7, 5, 4, 6),
        "trace",
        (3, 8, 12, 2),
    ),
    "positions": (
        lambda channels: Positions(*channels),
        (4,),
        POSITIONS_MAP,
        (3, 4, 5, 2),
    ),
}
networks = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def compiled(model):
    """`model.apply`, shared by the tests: compiling is most of their time."""
    return numerics.compiled(model.apply)


@functools.cache
def set_up(name):
    """(model, its variables, images, random masks, its map, the thinner model)."""
    make, channels, channel_map, image_shape = NETWORKS[name]
    rng = np.random.default_rng(0)
    model = make(channels)
    images = jnp.asarray(rng.normal(size=image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        stddev = (2 / math.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(rng.normal(0, stddev, leaf.shape), jnp.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    if channel_map == "trace":
        channel_map = trace(model.apply, variables, images)
    layers = channel_map if isinstance(channel_map, dict) else channel_map.removable()
    keep = {
        layer: rng.permutation(count) < max(round(0.6 * count), 1)
        for layer, count in zip(layers, channels, strict=True)
    }
    thinner = make(tuple(int(mask.sum()) for mask in keep.values()))
    return model, variables, images, keep, channel_map, thinner


def relative_error(actual, expected):
    """Largest error relative to the largest entry."""
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


# Float32 rounding of the same sums in another order.
THIN_TOLERANCE = 1e-5


@pytest.mark.slow_after(1)
@networks
def test_masked_network_equals_the_thinner_one(name):
    model, variables, images, keep, channel_map, thinner = set_up(name)
    masks = channels.channel_masks(keep, channel_map, variables)
    masked = compiled(model)(pruning.apply_masks(variables, masks), images)
    thinned = channels.thin(variables, keep, channel_map)
    shapes = jax.eval_shape(thinner.init, jax.random.key(0), images)
    chex.assert_trees_all_equal_shapes_and_dtypes(thinned, shapes)
    assert relative_error(compiled(thinner)(thinned, images), masked) < THIN_TOLERANCE
    # Something was removed.
    assert relative_error(compiled(model)(variables, images), masked) > 0.01


@networks
def test_zeroed_filters_and_biases_are_not_enough_for_every_network(name):
    model, variables, images, keep, channel_map, thinner = set_up(name)
    own = {
        layer: ((layer, -1), (layer.replace("kernel", "bias"), 0))
        for layer in keep
        if layer != "conv"
    } or {"conv": POSITIONS_MAP["conv"][:2]}
    masks = channels.channel_masks(keep, own, variables)
    naive = compiled(model)(pruning.apply_masks(variables, masks), images)
    thinned = channels.thin(variables, keep, channel_map)
    error = relative_error(compiled(thinner)(thinned, images), naive)
    if name in ("lenet", "vgg"):
        assert error < THIN_TOLERANCE  # relu(0) = 0, and nothing between
    else:
        # Batch normalization makes a constant of zero, and so does the sigmoid.
        assert error > 0.01


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", ["lenet", "vgg_bn_positions", "positions"])
def test_gradients_of_the_masked_network_are_those_of_the_thinner_one(name):
    model, variables, images, keep, channel_map, thinner = set_up(name)
    masks = channels.channel_masks(keep, channel_map, variables)

    def loss_fn(variables, model):
        logits = model.apply(variables, images)
        return jnp.mean(jnp.square(logits - jnp.arange(logits.shape[-1])[None]))

    def masked_loss(variables):
        return loss_fn(pruning.apply_masks(variables, masks), model)

    grads = jax.jit(jax.grad(masked_loss))(variables)
    thinned = channels.thin(variables, keep, channel_map)
    thin_grads = jax.jit(jax.grad(lambda v: loss_fn(v, thinner)))(thinned)
    for grad, mask in zip(*map(jax.tree.leaves, (grads, masks)), strict=True):
        assert not np.any(np.asarray(grad)[~np.asarray(mask)])
    ours = channels.thin(grads, keep, channel_map)
    for grad, expected in zip(*map(jax.tree.leaves, (ours, thin_grads)), strict=True):
        assert relative_error(grad, expected) < 1e-4  # sums that cancel, backwards


def test_masked_and_thinner_networks_train_alike():
    model, variables, images, keep, channel_map, thinner = set_up("vgg_bn_positions")
    masks = channels.channel_masks(keep, channel_map, variables)

    def train(model, variables):
        apply = lambda v: model.apply(v, images, train=True, mutable=["batch_stats"])  # noqa: E731
        logits, updated = run(apply, variables)
        return logits, updated["batch_stats"]

    masked_logits, masked_stats = train(model, pruning.apply_masks(variables, masks))
    thinned = channels.thin(variables, keep, channel_map)
    logits, stats = train(thinner, thinned)
    assert relative_error(logits, masked_logits) < THIN_TOLERANCE
    ours = channels.thin(variables | {"batch_stats": masked_stats}, keep, channel_map)
    chex.assert_trees_all_close(ours["batch_stats"], stats, rtol=1e-5, atol=1e-6)


def test_channel_masks_match_a_loop():
    _, variables, _, keep, channel_map, _ = set_up("positions")
    masks = channels.channel_masks(keep, channel_map, variables)["params"]
    kept = keep["conv"]
    assert 0 < kept.sum() < 4
    for index in np.ndindex(3, 3, 2, 4):
        assert masks["conv"]["kernel"][index] == kept[index[3]]
    for position, channel, unit in np.ndindex(6, 4, 5):
        row = position * 4 + channel
        assert masks["dense"]["kernel"][row, unit] == kept[channel]
    np.testing.assert_array_equal(masks["conv"]["bias"], kept)
    assert masks["dense"]["bias"].all()


def test_channel_masks_of_two_layers_meet_in_one_kernel():
    _, variables, _, keep, channel_map, _ = set_up("lenet")
    masks = channels.channel_masks(keep, channel_map, variables)["params"]
    expected = np.ones((5, 5, 4, 5), bool)
    expected[:, :, ~keep["params/conv1/kernel"]] = False
    expected[:, :, :, ~keep["params/conv2/kernel"]] = False
    np.testing.assert_array_equal(masks["conv2"]["kernel"], expected)
    # The network's outputs are no channels to remove.
    assert masks["fc2"]["bias"].all()


def test_layers_that_are_not_named_keep_all():
    _, variables, _, keep, channel_map, _ = set_up("lenet")
    keep = {"conv2": keep["params/conv2/kernel"]}
    only = {"conv2": keep["conv2"]}
    thinned = channels.thin(variables, only, channel_map)["params"]
    count = keep["conv2"].sum()
    assert thinned["conv2"]["kernel"].shape == (5, 5, 4, count)
    assert thinned["conv3"]["kernel"].shape == (5, 5, count, 6)
    chex.assert_trees_all_equal(thinned["conv1"], variables["params"]["conv1"])
    np.testing.assert_array_equal(
        thinned["conv2"]["kernel"],
        np.asarray(variables["params"]["conv2"]["kernel"])[..., keep["conv2"]],
    )


@pytest.mark.parametrize(
    ("keep", "channel_map", "message"),
    [
        ({"conv": [False] * 4}, POSITIONS_MAP, "conv would lose all its channels"),
        ({"fc": [True]}, POSITIONS_MAP, "unknown layer fc; the layers are conv"),
        (
            {"conv": [True] * 4},
            {"conv": (("params/conv2/kernel", 3),)},
            "conv: the variables contain no params/conv2/kernel",
        ),
        (
            {"conv": [True] * 3},
            POSITIONS_MAP,
            r"conv: a mask \(3,\) does not fit axis 3 of params/conv/kernel, .* 4\.",
        ),
        ({"conv": [True] * 8}, POSITIONS_MAP, r"a mask \(8,\) does not fit axis 3"),
        ({"conv": [[True] * 4]}, POSITIONS_MAP, r"a mask \(1, 4\) does not fit axis 3"),
        # Half as many as there are channels: not positions of a flattened image.
        ({"conv": [True, False]}, POSITIONS_MAP, r"a mask \(2,\) does not fit axis 3"),
        ({"conv": [True]}, POSITIONS_MAP, r"a mask \(1,\) does not fit axis 3"),
    ],
)
def test_masks_that_do_not_fit_are_refused(keep, channel_map, message):
    _, variables, *_ = set_up("positions")
    keep = {name: np.array(mask) for name, mask in keep.items()}
    with pytest.raises(ValueError, match=message):
        channels.thin(variables, keep, channel_map)
    if any(mask.any() for mask in keep.values()):
        with pytest.raises(ValueError, match=message):
            channels.channel_masks(keep, channel_map, variables)
