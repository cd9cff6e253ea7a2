"""Names, masks and importance of the channels that tracing finds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channel_oracle import check, conv

import lbi
from lbi import channels, pruning

pytestmark = pytest.mark.usefixtures("unoptimized", "highest_precision")

NUMBERS = np.random.default_rng(0)
IMAGE = (2, 4, 6, 2)


def draw(*shape):
    return jnp.asarray(NUMBERS.normal(0, 0.5, shape), jnp.float32)


def test_full_names_without_params_are_those_of_no_other_layer():
    """`b` adds to the channels of `a`; `block/b` has channels of its own."""

    def network(variables, x):
        p = variables["params"]
        x = x @ p["a"] + jnp.tanh(x @ p["b"])
        x = x + jnp.tanh(x @ p["block"]["a"] @ p["block"]["b"]) @ p["block"]["c"]
        return x @ p["out"]

    block = {"a": draw(4, 5), "b": draw(5, 4), "c": draw(4, 4)}
    params = {"a": draw(3, 4), "b": draw(3, 4), "block": block, "out": draw(4, 2)}
    variables, x = {"params": params}, draw(2, 3)
    graph = channels.trace(network, variables, x)
    assert graph.removable() == {
        "params/a": 4,
        "params/block/a": 5,
        "params/block/b": 4,
    }
    keep = np.array([True, False, True, True])
    for name in ("a", "params/a"):
        thinned = check(graph, {name: keep}, variables, x, network)
        assert thinned["params"]["a"].shape == (3, 3)
        assert thinned["params"]["block"]["a"].shape == (3, 5)
    for name in ("b", "params/b", "block/c"):
        with pytest.raises(ValueError, match=f"^{name} computes .* params/a: use this"):
            pruning.thin(variables, {name: keep}, graph)
    with pytest.raises(
        ValueError, match="params/out: channel 1 cannot be removed: .*output"
    ):
        pruning.thin(variables, {"out": np.array([True, False])}, graph)
    # A part of the names of several layers, one of which adds to channels of another.
    params["block"] = {"inner": block}
    graph = channels.trace(
        lambda v, x: network(
            {"params": v["params"] | {"block": v["params"]["block"]["inner"]}}, x
        ),
        variables,
        x,
    )
    with pytest.raises(ValueError, match="inner is several layers .*inner/c"):
        graph.find("inner")


def test_two_masks_of_one_layer_are_refused():
    params = {"net": {"a": draw(3, 4), "b": draw(4, 2)}}
    graph = channels.trace(
        lambda p, x: jax.nn.relu(x @ p["net"]["a"]) @ p["net"]["b"], params, draw(5, 3)
    )
    keep = {"a": np.arange(4) != 2, "net/a": np.arange(4) != 1}
    with pytest.raises(ValueError, match="several masks of one layer: a, net/a"):
        pruning.thin(params, keep, graph)


def test_importance_of_channels_is_the_sum_over_what_computes_them():
    """Filters of two layers, weights of a neuron, and entries of the values."""

    def network(p, x):
        x = conv(x, p["stem"]) + jnp.tanh(conv(x, p["skip"]))
        x = x.mean((1, 2)) @ p["dense"]
        q, k, v = (jnp.einsum("bc,chd->bhd", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2))
        return jnp.einsum("bhg,bgd,hdo->bo", weights, v, p["out"])

    params = {name: draw(5, 3, 2) for name in "qkv"} | {
        "stem": draw(3, 3, 2, 4),
        "skip": draw(1, 1, 2, 4),
        "dense": draw(4, 5),
        "out": draw(3, 2, 2),
    }
    penalty = {
        "stem|skip": lbi.GroupL2(),
        "dense": lbi.L1(),
        "^[qkv]$": lbi.GroupL2(group_axes=(0, 2)),
    }
    graph = channels.trace(network, params, draw(*IMAGE))
    assert graph.removable() == {"stem": 4, "dense": 5, "q": 3, "v": 2}
    scores = pruning.magnitude_importance(params, penalty)
    found = pruning.channel_importance(scores, graph, penalty)
    p = jax.tree.map(np.asarray, params)
    expected = {
        "stem": [
            np.linalg.norm(p["stem"][..., c]) + np.linalg.norm(p["skip"][..., c])
            for c in range(4)
        ],
        "dense": np.abs(p["dense"]).sum(0),
        "v": [
            sum(np.linalg.norm(p["v"][row, :, d]) for row in range(5)) for d in range(2)
        ],
    }
    chex.assert_trees_all_close(
        {name: np.asarray(v) for name, v in expected.items()}, found, rtol=1e-6
    )
    check(graph, pruning.keep_masks(found, 0.5), params, draw(*IMAGE), network)
    # What has no importance is left out, as the heads are; what stays is infinite.
    del scores["stem"], scores["skip"]
    assert list(pruning.channel_importance(scores, graph, penalty)) == ["dense", "v"]
    graph.fixed["dense"][3] = "a test"
    found = pruning.channel_importance({"dense": scores["dense"]}, graph, penalty)
    assert found["dense"][3] == np.inf and np.isfinite(found["dense"]).sum() == 4
    for wrong, message in [
        ({"dense": np.ones(5)}, r"dense: the importance \(5,\) .* groups, \(4, 5\)"),
        ({"out": np.ones(2)}, "out: the importance .* of which the penalty has none"),
        ({"other": np.ones(2)}, "unknown layer other; the layers are"),
    ]:
        with pytest.raises(ValueError, match=message):
            pruning.channel_importance(wrong, graph, penalty)


def test_importance_of_a_layer_selects_channels_by_path():
    params = {"a": {"kernel": draw(3, 3, 2, 4)}, "b": {"kernel": draw(4, 2)}}

    def network(p, x):
        return conv(x, p["a"]["kernel"]).mean((1, 2)) @ p["b"]["kernel"]

    layers = lbi.groups(network, params, draw(*IMAGE))
    graph = channels.trace(network, params, draw(*IMAGE))
    importance = pruning.magnitude_importance(params, {"a": layers})
    keep = pruning.keep_masks(importance, 0.5)
    thinned = check(graph, keep, params, draw(*IMAGE), network)
    norms = np.linalg.norm(np.asarray(params["a"]["kernel"]).reshape(-1, 4), axis=0)
    kept = np.sort(np.argsort(-norms)[:2])
    chex.assert_trees_all_equal(thinned["b"]["kernel"], params["b"]["kernel"][kept, :])
