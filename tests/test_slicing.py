"""Heads and neurons cut out of the weights: same logits as masked, fewer parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from numerics import compiled, run

from vit import cascade as cascades
from vit import cost, slicing
from vit.cascade import Cascade
from vit.checkpoint import load_checkpoint, save_checkpoint
from vit.model import ViT

pytestmark = [
    pytest.mark.usefixtures("unoptimized", "highest_precision"),
    # Many cascades here prune in the first layer, where the first patches are kept.
    pytest.mark.filterwarnings("ignore:the attention of layer"),
]

# All axes differ: 2 images of 15 x 20, 12 patches of 5 x 5, D 10, H 4, d 6, M 14, K 7.
IMAGES = (2, 15, 20, 1)
MODEL = ViT(
    num_classes=7,
    patch_size=5,
    hidden_size=10,
    num_layers=2,
    num_heads=4,
    head_dim=6,
    mlp_dim=14,
)
HEADS = ((0, 3), (2,))
NEURONS = ((1, 2, 5, 13), tuple(range(0, 14, 2)))


def block_of(params, layer):
    return params["Transformer"][f"encoderblock_{layer}"]


def assert_same_logits(networks):
    """For pairs of model and parameters; up to rounding of float32."""
    images = vit_oracle.random_images(IMAGES)

    @functools.cache
    def forward(model):
        return compiled(lambda params: model.apply({"params": params}, images))

    first, *others = (forward(model)(params) for model, params in networks)
    scale = np.max(np.abs(first))
    for logits in others:
        np.testing.assert_allclose(logits, first, rtol=0, atol=2e-6 * scale)
    return first


# Random ranks look at no attention; no cascade does neither.
@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "cascade",
    [
        None,
        Cascade(keep=(9, 4), keep_mlp=(6, 3), score="random"),
        Cascade(keep=(5, 9), semantics="skip", mode="masked", score="norm"),
    ],
    ids=["dense", "drop", "skip"],
)
def test_sliced_heads_are_masked_heads(cascade):
    model = MODEL.clone(cascade=cascade)
    params = vit_oracle.random_params(model, IMAGES)
    smaller, sliced = slicing.keep_heads(model, params, HEADS)
    masked = slicing.mask_heads(model, params, HEADS)
    # What is masked does not matter.
    other = jax.tree.map(lambda x: x, masked)
    for layer, kept in enumerate(HEADS):
        value = block_of(other, layer)["MultiHeadDotProductAttention_0"]["value"]
        gone = np.setdiff1d(range(4), kept)
        value["kernel"] = value["kernel"].at[:, gone].add(3.0)
        value["bias"] = value["bias"].at[gone].add(-2.0)
    logits = assert_same_logits([(model, masked), (model, other), (smaller, sliced)])
    scores = None
    if cascade is not None and cascade.score == "random":
        scores = jax.random.uniform(jax.random.key(cascade.seed), (2, 13))
    expected = vit_oracle.forward(
        masked,
        vit_oracle.random_images(IMAGES),
        cascade=cascade,
        random_scores=scores,
    ).logits
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.max(np.abs(expected)))


def test_sliced_heads_with_a_cascade_by_attention_match_numpy():
    """The heads that are gone have no say in which patches are kept."""
    cascade = Cascade(keep=(9, 4), keep_mlp=(6, 3), score="max")
    model = MODEL.clone(cascade=cascade)
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    smaller, sliced = slicing.keep_heads(model, params, HEADS)
    logits = run(lambda p: smaller.apply({"params": p}, images), sliced)
    expected = vit_oracle.forward(sliced, images, cascade=cascade).logits
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.max(np.abs(expected)))


def test_cascade_drops_the_heads_that_masking_drops():
    """A choice of the batch's heads in the last layer is that of its scores."""
    model = MODEL.clone(cascade=Cascade(keep=(12, 12), keep_heads=(4, 2)))
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    trace = vit_oracle.forward(params, images)
    scores = [vit_oracle.head_scores(probs, "max") for probs in trace.probs[1]]
    kept = (tuple(range(4)), *slicing.largest([np.mean(scores, 0)], [2]))
    masked = slicing.mask_heads(MODEL, params, kept)
    smaller, sliced = slicing.keep_heads(MODEL, params, kept)
    every_image = cascades.Cascade(keep=(12, 12), keep_heads=(4, 2), mode="masked")
    assert_same_logits(
        [
            (MODEL, masked),
            (smaller, sliced),
            (model, params),
            (MODEL.clone(cascade=every_image), params),
        ]
    )


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "cascade", [None, Cascade(keep=(9, 4), semantics="zero")], ids=["dense", "zero"]
)
def test_sliced_neurons_are_masked_neurons(cascade):
    model = MODEL.clone(cascade=cascade)
    params = vit_oracle.random_params(model, IMAGES)
    smaller, sliced = slicing.keep_neurons(model, params, NEURONS)
    masked = slicing.mask_neurons(model, params, NEURONS)
    assert_same_logits([(model, masked), (smaller, sliced)])
    assert smaller.mlp_dim == (4, 7)


def test_heads_and_neurons_together_and_twice():
    params = vit_oracle.random_params(MODEL, IMAGES)
    masked = slicing.mask_neurons(
        MODEL, slicing.mask_heads(MODEL, params, HEADS), NEURONS
    )
    smaller, sliced = slicing.keep_heads(MODEL, params, ((0, 1, 3), (1, 2)))
    smaller, sliced = slicing.keep_neurons(smaller, sliced, NEURONS)
    # Of what is left, the numbers are new.
    smaller, sliced = slicing.keep_heads(smaller, sliced, ((0, 2), (1,)))
    assert_same_logits([(MODEL, masked), (smaller, sliced)])
    assert smaller == MODEL.clone(num_heads=(2, 1), mlp_dim=(4, 7))


def test_equal_layers_have_one_number_as_in_a_file(tmp_path):
    params = vit_oracle.random_params(MODEL, IMAGES)
    smaller, sliced = slicing.keep_heads(MODEL, params, [(0, 3), (1, 2)])
    smaller, sliced = slicing.keep_neurons(smaller, sliced, [(2,), (5,)])
    assert (smaller.num_heads, smaller.mlp_dim) == (2, 1)
    save_checkpoint(tmp_path / "smaller.npz", smaller, sliced)
    assert load_checkpoint(tmp_path / "smaller.npz")[0] == smaller


@pytest.mark.parametrize("head_dim", [6, None])
def test_parameters_and_cost_shrink_as_counted(head_dim):
    model = MODEL.clone(head_dim=head_dim, hidden_size=12, num_heads=4)
    params = vit_oracle.random_params(model, IMAGES)
    smaller, sliced = slicing.keep_heads(model, params, HEADS)
    smaller, sliced = slicing.keep_neurons(smaller, sliced, NEURONS)
    images = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    shapes = jax.eval_shape(smaller.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, sliced
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(sliced))
    assert count == cost.count_params(smaller, (15, 20), channels=1)
    # 5 heads and 17 neurons are gone: q, k, v and out, with the biases of the first
    # three; both layers, with one bias.
    depth = head_dim or 3
    before = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert before - count == 5 * depth * (4 * 12 + 3) + 17 * (2 * 12 + 1)
    saved = cost.count(model, (15, 20)).total - cost.count(smaller, (15, 20)).total
    tokens = 13
    per_head = 4 * tokens * 12 * depth + 2 * tokens**2 * depth
    assert saved == 5 * per_head + 17 * 2 * tokens * 12


def test_slicing_leaves_its_arguments_alone():
    params = vit_oracle.random_params(MODEL, IMAGES)
    before = jax.tree.map(np.array, params)
    for function in (
        slicing.keep_heads,
        slicing.mask_heads,
    ):
        function(MODEL, params, HEADS)
    for function in (slicing.keep_neurons, slicing.mask_neurons):
        function(MODEL, params, NEURONS)
    assert jax.tree.structure(before) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert MODEL.num_heads == 4 and MODEL.mlp_dim == 14


def test_masked_parts_have_no_gradient():
    params = vit_oracle.random_params(MODEL, IMAGES)
    params = slicing.mask_heads(MODEL, params, HEADS)
    params = slicing.mask_neurons(MODEL, params, NEURONS)
    images = vit_oracle.random_images(IMAGES)
    direction = jnp.arange(14.0).reshape(2, 7) - 5

    def loss_fn(params):
        return jnp.sum(direction * MODEL.apply({"params": params}, images))

    grads = run(jax.grad(loss_fn), params)
    for layer in range(2):
        block = block_of(grads, layer)
        attention, mlp = block["MultiHeadDotProductAttention_0"], block["MlpBlock_0"]
        heads = np.setdiff1d(range(4), HEADS[layer])
        neurons = np.setdiff1d(range(14), NEURONS[layer])
        for name in ("query", "key", "value"):
            kernel = np.asarray(attention[name]["kernel"])
            assert not np.any(kernel[:, heads])
            assert np.all(np.any(kernel[:, list(HEADS[layer])], axis=(0, 2)))
        kernel = np.asarray(mlp["Dense_0"]["kernel"])
        assert not np.any(kernel[:, neurons])
        assert np.all(np.any(kernel[:, list(NEURONS[layer])], axis=0))


def test_largest_by_hand_and_ties_go_to_the_first():
    scores = [np.array([1.0, 3.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0, 5.0, 6.0])]
    assert slicing.largest(scores, [2, 3]) == ((1, 3), (0, 1, 4))
    assert slicing.largest(scores, [4, 1]) == ((0, 1, 2, 3), (4,))
    assert slicing.largest([jnp.zeros(30)], [3]) == ((0, 1, 2),)


# Errors.


@pytest.mark.parametrize(
    "function",
    [
        *(slicing.keep_heads, slicing.keep_neurons),
        *(slicing.mask_heads, slicing.mask_neurons),
    ],
)
@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([(0,)], "one entry for each of the 2 layers, got 1"),
        ([(0,), ()], r"layer 1 has .* must keep at least one of them, got \(\)"),
        ([(-1,), (0,)], r"layer 0 has .* 0 to .*, got \(-1,\)"),
        ([(0,), (1, 14)], r"layer 1 has .* 0 to .*, got \(1, 14\)"),
        ([(0, 1, 0), (0,)], r"that layer 0 keeps must differ, got \(0, 1, 0\)"),
        # A mask of two units has the length and the range of indices.
        ([(0,), (True, False)], r"layer 1 keeps must be indices, got \(True, False\)"),
    ],
)
def test_wrong_choices_are_refused(function, kept, message):
    params = vit_oracle.random_params(MODEL, IMAGES)
    with pytest.raises(ValueError, match=message):
        function(MODEL, params, kept)


def test_limits_are_named():
    params = vit_oracle.random_params(MODEL, IMAGES)
    with pytest.raises(ValueError, match="has heads 0 to 3"):
        slicing.keep_heads(MODEL, params, [(4,), (0,)])
    with pytest.raises(ValueError, match="has neurons 0 to 13"):
        slicing.keep_neurons(MODEL, params, [(0,), (14,)])


def test_a_cascade_that_chooses_heads_itself_is_refused():
    model = MODEL.clone(cascade=Cascade(keep=(9, 9), keep_heads=(2, 2)))
    params = vit_oracle.random_params(model, IMAGES)
    with pytest.raises(ValueError, match="chooses heads itself; set its keep_heads"):
        slicing.keep_heads(model, params, HEADS)


@pytest.mark.parametrize("count", [0, 5])
def test_counts_beyond_the_scores_are_refused(count):
    scores = [np.zeros(4), np.zeros(6)]
    with pytest.raises(ValueError, match=f"between 1 and 4, got {count}"):
        slicing.largest(scores, [count, 2])
    with pytest.raises(ValueError, match="2 scores and 1 counts"):
        slicing.largest(scores, [2])
