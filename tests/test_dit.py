"""The Diffusion Transformer: its start, one block in NumPy, and the shapes it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import random_like

from experiments.networks.dit import Block, DiT

pytestmark = pytest.mark.usefixtures("unoptimized")

MODEL = DiT(num_classes=3, hidden_size=8, num_layers=2, num_heads=2, mlp_dim=12)
apply = jax.jit(MODEL.apply)


@functools.cache
def init(model, shape=(2, 3, 4), batch=5):
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    time = jnp.linspace(0, 1, batch)
    label = jnp.arange(batch) % (model.num_classes + 1)
    params = jax.jit(model.init)(jax.random.key(1), x, time, label)["params"]
    return params, x, time, label


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 1, 2, 4)])
def test_velocity_is_zero_at_the_start(shape):
    params, *inputs = init(MODEL, shape)
    velocity = apply({"params": params}, *inputs)
    assert velocity.shape == (5, *shape)
    np.testing.assert_array_equal(velocity, 0)
    moved = apply({"params": random_like(params, stddev=0.3)}, *inputs)
    assert np.abs(moved).min() > 0


def test_blocks_are_the_identity_at_the_start():
    params, x, time, label = init(MODEL)
    params = dict(params, velocity=random_like(params, stddev=0.3)["velocity"])

    def velocity(x, time, label):
        return np.asarray(apply({"params": params}, x, time, label))

    first = velocity(x, time, label)
    # Neither time nor class act, and cells do not see each other.
    np.testing.assert_array_equal(first, velocity(x, 1 - time, (label + 1) % 4))
    changed = velocity(x.at[:, 0, 0].add(1.0), time, label)
    assert np.abs(changed - first)[:, 0, 0].min() > 0
    np.testing.assert_array_equal(
        changed.reshape(5, 6, 4)[:, 1:], first.reshape(5, 6, 4)[:, 1:]
    )


def test_time_class_and_other_cells_act_once_it_is_trained():
    params, x, time, label = init(MODEL)
    params = random_like(params, stddev=0.3)

    def velocity(*inputs):
        return np.asarray(apply({"params": params}, *inputs))

    first = velocity(x, time, label)
    for other in (
        velocity(x, time + 0.1, label),
        velocity(x, time, (label + 1) % 4),
        velocity(x.at[:, 0, 0].add(1.0), time, label),
    ):
        assert np.abs(other - first).reshape(5, 6, 4).max(-1).min() > 1e-5


def test_block_against_numpy():
    block = Block(num_heads=2, mlp_dim=12)
    rng = np.random.default_rng(1)
    x, condition = rng.normal(size=(3, 5, 8)), rng.normal(size=(3, 7))
    x, condition = np.float32(x), np.float32(condition)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, condition)["params"]
    params = random_like(shapes, stddev=0.3)
    expected = []
    linear = jax.tree.map(np.asarray, params["modulation"])
    modulation = condition @ linear["kernel"] + linear["bias"]
    for tokens, values in zip(x, modulation, strict=True):
        parts = np.split(values, 6)
        updates = (attention_in_numpy, mlp_in_numpy)
        for update, (shift, scale, gate) in zip(
            updates, (parts[:3], parts[3:]), strict=True
        ):
            centered = tokens - tokens.mean(-1, keepdims=True)
            normal = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True))
            tokens = tokens + gate * update(params, normal * (1 + scale) + shift)
        expected.append(tokens)
    values = jax.jit(block.apply)({"params": params}, x, condition)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


def attention_in_numpy(params, x):
    params = jax.tree.map(np.asarray, params["attention"])
    project = {
        name: np.einsum("nd,dhk->hnk", x, params[name]["kernel"])
        + params[name]["bias"][:, None]
        for name in ("query", "key", "value")
    }
    logits = np.einsum("hqk,hnk->hqn", project["query"], project["key"]) / 2  # sqrt(4)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    heads = np.einsum("hqn,hnk->qhk", probs, project["value"])
    return (
        np.einsum("qhk,hkd->qd", heads, params["out"]["kernel"])
        + (params["out"]["bias"])
    )


def mlp_in_numpy(params, x):
    params = jax.tree.map(np.asarray, params["mlp"])
    hidden = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    hidden = hidden * (
        1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))
    )
    return hidden / 2 @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def test_number_of_parameters():
    params, *_ = init(MODEL)
    width, mlp, channels, cells, classes = 8, 12, 4, 6, 4
    attention = 4 * width * (width + 1)
    block = (
        attention
        + width * mlp + mlp + mlp * width + width
        + 6 * width * (width + 1)
    )  # fmt: skip
    expected = (
        (channels + 1) * width
        + cells * width
        + (256 + 1) * width + width * (width + 1)
        + classes * width
        + 2 * block
        + 2 * width * (width + 1)
        + (width + 1) * channels
    )  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
