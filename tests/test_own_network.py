"""A cascade in networks of Linen and NNX that know nothing of vit.ViT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from flax import linen as nn
from flax import nnx
from numerics import run

import vit
from vit import schedules
from vit.cascade import Cascade, initial_tokens, pruned_attention, pruned_mlp
from vit.tokens import mean_of_patches

pytestmark = [
    pytest.mark.usefixtures("unoptimized"),
    # Many cascades here prune in the first layer, where the first patches are kept.
    pytest.mark.filterwarnings("ignore:the attention of layer"),
]

# 2 images of 15 x 20, 12 patches of 5 x 5, D 8, H 2, d 6, M 14, K 3, L 2; CLS and one
# register.
IMAGES = (2, 15, 20, 1)
SIZES = {
    "num_classes": 3,
    "patch_size": 5,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 6,
    "mlp_dim": 14,
    "num_registers": 1,
}
NORM = {"epsilon": 1e-6, "use_fast_variance": False}
PREFIX = {"num_prefix": 2}


def rows_of(attend):
    """Positions of the tokens that the attention works on, -1 for the others."""
    if attend.weights is None:
        return attend.position
    return jnp.where(attend.weights > 0, attend.position, -1)


class LinenBlock(nn.Module):
    cascade: Cascade | None
    layer: int

    @nn.compact
    def __call__(self, tokens, rows):
        def attention(x, attend):
            rows.append(rows_of(attend))
            layer = nn.MultiHeadDotProductAttention(
                2, qkv_features=12, attention_fn=attend, name="attention"
            )
            return layer(x)

        def mlp(x):
            return nn.Dense(8, name="down")(nn.gelu(nn.Dense(14, name="up")(x)))

        place = self.cascade, self.layer
        first, second = (nn.LayerNorm(**NORM, name=f"norm_{i}") for i in range(2))
        tokens = pruned_attention(*place, tokens, first, attention, **PREFIX)
        return pruned_mlp(*place, tokens, second, mlp, **PREFIX)


class LinenNetwork(nn.Module):
    cascade: Cascade | None

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (5, 5), 5, "VALID", name="embedding")(images).reshape(2, 12, 8)
        prefix = self.param("prefix", nn.initializers.zeros, (1, 2, 8))
        x = jnp.concatenate([jnp.broadcast_to(prefix, (2, 2, 8)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, 14, 8))
        tokens, rows = initial_tokens(self.cascade, x), []
        for layer in range(2):
            block = LinenBlock(self.cascade, layer, name=f"block_{layer}")
            tokens = block(tokens, rows)
        x = nn.LayerNorm(**NORM, name="norm")(tokens.x[:, 0])
        return nn.Dense(3, name="head")(x), rows


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm_0, self.norm_1 = (nnx.LayerNorm(8, **NORM, rngs=rngs) for _ in "ab")
        self.attention = nnx.MultiHeadAttention(2, 8, 12, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 14, rngs=rngs), nnx.Linear(14, 8, rngs=rngs)

    def __call__(self, cascade, layer, tokens, rows):
        def attention(x, attend):
            rows.append(rows_of(attend))
            parts = self.attention
            return parts.out(attend(parts.query(x), parts.key(x), parts.value(x)))

        def mlp(x):
            return self.down(nnx.gelu(self.up(x)))

        place = cascade, layer
        tokens = pruned_attention(*place, tokens, self.norm_0, attention, **PREFIX)
        return pruned_mlp(*place, tokens, self.norm_1, mlp, **PREFIX)


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Conv(1, 8, (5, 5), 5, padding="VALID", rngs=rngs)
        self.prefix = nnx.Param(jnp.zeros((1, 2, 8)))
        self.positions = nnx.Param(jnp.zeros((1, 14, 8)))
        self.block_0, self.block_1 = NNXBlock(rngs), NNXBlock(rngs)
        self.norm = nnx.LayerNorm(8, **NORM, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, cascade, images):
        x = self.embedding(images).reshape(2, 12, 8)
        prefix = jnp.broadcast_to(self.prefix[...], (2, 2, 8))
        x = jnp.concatenate([prefix, x], axis=1) + self.positions[...]
        tokens, rows = initial_tokens(cascade, x), []
        for layer, block in enumerate((self.block_0, self.block_1)):
            tokens = block(cascade, layer, tokens, rows)
        return self.head(self.norm(tokens.x[:, 0])), rows


def own_params(params):
    """The parameters of vit.ViT with the names of these networks."""
    encoder = params["Transformer"]
    own = {name: params[name] for name in ("embedding", "head")}
    own["prefix"] = jnp.concatenate([params["cls"], params["registers"]], axis=1)
    own["positions"] = encoder["posembed_input"]["pos_embedding"]
    own["norm"] = encoder["encoder_norm"]
    for layer in range(2):
        block = encoder[f"encoderblock_{layer}"]
        own[f"block_{layer}"] = {
            "attention": block["MultiHeadDotProductAttention_0"],
            "norm_0": block["LayerNorm_0"],
            "norm_1": block["LayerNorm_1"],
            "up": block["MlpBlock_0"]["Dense_0"],
            "down": block["MlpBlock_0"]["Dense_1"],
        }
    return own


@functools.cache
def split_nnx():
    return nnx.split(nnx.eval_shape(lambda: NNXNetwork(nnx.Rngs(0))))


def apply_nnx(cascade, params, images):
    definition, state = split_nnx()
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(definition, state)(cascade, images)


COUNTS = {"keep": (9, 6), "keep_mlp": (8, 5)}
CASCADES = {
    "whole": None,
    "drop": Cascade(**COUNTS, alpha=0.5, keep_heads=(2, 1)),
    "masked": Cascade(**COUNTS, score="norm", mode="masked"),
    "skip": Cascade(keep=(6, 8), keep_mlp=(8, 5), semantics="skip", score="sum"),
    "zero": Cascade(keep=(6, 8), keep_mlp=(8, 5), semantics="zero"),
    "evit": Cascade(**COUNTS, score="cls", cumulative=False, fuse="sum"),
    "merge": schedules.token_merging(3, num_layers=2, num_patches=12),
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", CASCADES)
def test_own_networks_are_vit_of_the_same_weights(name):
    cascade = CASCADES[name]
    model = vit.ViT(**SIZES, cascade=cascade)
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)

    def all_three(params):
        logits, captured = model.apply(
            {"params": params}, images, mutable=["intermediates"]
        )
        encoder = captured["intermediates"]["Transformer"]
        rows = [encoder[f"encoderblock_{i}"]["rows"][0] for i in range(2)]
        own = own_params(params)
        linen = LinenNetwork(cascade).apply({"params": own}, images)
        return (logits, rows), linen, apply_nnx(cascade, own, images)

    with jax.default_matmul_precision("highest"):
        (logits, rows), *others = run(all_three, params)
    for found, kept in others:
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
        for one, expected in zip(kept, rows, strict=True):
            np.testing.assert_array_equal(one, expected)
    # Fused tokens have no position, and may fuse again.
    if cascade is not None and not cascade.fuse:
        for kept, count in zip(rows, cascade.keep, strict=True):
            assert np.all(np.sum(np.asarray(kept) >= 0, axis=1) == count + 2)


def test_observed_patches_and_attention_are_those_of_the_layers():
    cascade = Cascade(keep=(9, 6), keep_mlp=(8, 5), semantics="skip")
    model = vit.ViT(**SIZES)
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    whole, pruned = run(
        lambda p: [
            vit.observe(model.clone(cascade=one), p, images) for one in (None, cascade)
        ],
        params,
    )
    assert whole.kept.shape == (2, 2, 12) and np.all(whole.kept)
    assert [a.shape for a in whole.attention] == [(2, 2, 14, 14)] * 2
    assert [a.shape for a in pruned.attention] == [(2, 2, 11, 11), (2, 2, 8, 8)]
    # The first layer has no scores yet: the first patches are kept.
    np.testing.assert_array_equal(pruned.kept[0], [[True] * 9 + [False] * 3] * 2)
    np.testing.assert_array_equal(pruned.kept[1].sum(1), [6, 6])


def attention_without_attend(x, attend):
    del attend
    return x


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (attention_without_attend, "layer 0 must call attend.* the score 'max' needs"),
        (lambda x, attend: attend(x, x, x, mask=x), "takes no bias and no mask"),
        (
            lambda x, attend: attend(x, x, x, dropout_rate=0.1, deterministic=False),
            "has no dropout",
        ),
        (
            lambda x, attend: attend(x, x, x, is_causal=True, dtype=None, module=None),
            "does not have is_causal",
        ),
        (lambda x, attend: attend(x, x, x, scale=10.0, is_causal=False), "have scale"),
    ],
)
def test_attention_that_does_not_fit_is_refused(attention, message):
    cascade = Cascade(keep=(4, 2))
    tokens = initial_tokens(cascade, jnp.ones((1, 5, 3)))
    with pytest.raises(ValueError, match=message):
        pruned_attention(cascade, 0, tokens, lambda x: x, attention)


# Two images of CLS and 11 patches, of which 4 are padding. D 6, two heads, L 3.
PADDED = {
    "norm": Cascade(keep=(6, 5, 3), score="norm"),
    "whole": None,
    "drop": Cascade(keep=(11, 5, 3), keep_mlp=(9, 4, 2), alpha=0.5),
    "sum": Cascade(keep=(8, 5, 3), score="sum", keep_heads=(2, 1, 2)),
    "cls": Cascade(keep=(9, 5, 3), score="cls", cumulative=False),
    "random": Cascade(keep=(6, 5, 3), score="random"),
    "skip": Cascade(keep=(11, 5, 6), score="norm", semantics="skip"),
    "zero": Cascade(keep=(9, 5, 6), semantics="zero", alpha=0.5),
    "sum fused": Cascade(keep=(11, 6, 4), fuse="sum"),
    "mean fused": Cascade(keep=(11, 6, 4), fuse="mean", score="cls"),
    "merge": schedules.token_merging(3, num_layers=3, num_patches=11),
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "compact") for name in PADDED]
    + [(name, "masked") for name in ("norm", *list(PADDED)[2:-3])],
)
def test_padding_of_weight_zero_changes_nothing(name, mode):
    cascade = PADDED[name] and dataclasses.replace(PADDED[name], mode=mode)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 6)) * 2
    score = rng.uniform(size=(2, 12))
    visible = np.array([[0, 2, 3, 5, 6, 7, 9, 11], [0, 1, 2, 3, 4, 8, 9, 10]])
    if name == "merge":
        visible = np.array([np.arange(8)] * 2)  # the sets A and B are the same
    weights = np.zeros((2, 12))
    np.put_along_axis(weights, visible, 1, axis=1)
    # What has to be hidden is conspicuous.
    x, score = x * np.where(weights, 1, 5)[..., None], score + 1 - weights
    kernels = jnp.asarray(rng.normal(size=(3, 5, 6, 6)) * 0.4, jnp.float32)

    def apply(cascade, x, score, weights=None):
        tokens = initial_tokens(cascade, jnp.asarray(x, jnp.float32))
        if name == "random":
            tokens = tokens._replace(score=jnp.asarray(score, jnp.float32))
        if weights is not None:
            tokens = tokens._replace(weights=jnp.asarray(weights, jnp.float32))
        for layer in range(3):

            def attention(x, attend, layer=layer):
                heads = [
                    (x @ kernels[layer, i]).reshape(*x.shape[:2], 2, 3)
                    for i in range(3)
                ]
                return attend(*heads).reshape(x.shape) @ kernels[layer, 3]

            def mlp(x, layer=layer):
                return jnp.tanh(x @ kernels[layer, 4])

            tokens = pruned_attention(cascade, layer, tokens, normalize, attention)
            tokens = pruned_mlp(cascade, layer, tokens, normalize, mlp)
        return tokens.x[:, 0], mean_of_patches(tokens)

    alone = [np.take_along_axis(x, visible[..., None], 1)]
    alone += [np.take_along_axis(score, visible, 1)]
    without = functools.partial(apply, without_padding(PADDED[name]))
    with jax.default_matmul_precision("highest"):
        cls, mean = run(functools.partial(apply, cascade), x, score, weights)
        expected = run(without, *alone)
    np.testing.assert_allclose(cls, expected[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(mean, expected[1], rtol=0, atol=2e-5)


def without_padding(cascade):
    """The cascade of 11 patches for the 7 that are no padding."""
    if cascade is None:
        return None
    if cascade.score == "merge":
        # Of what merges, 2 tokens of the first layer and 1 of the second are padding.
        return dataclasses.replace(cascade, keep=(7, 6, 4), keep_mlp=(6, 4, 2))
    keep, keep_mlp = (
        tuple(min(count, 7) for count in counts)
        for counts in zip(*cascade.counts, strict=True)
    )
    return dataclasses.replace(cascade, keep=keep, keep_mlp=keep_mlp)


def normalize(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))


def test_a_cascade_for_another_network_is_refused():
    tokens = initial_tokens(None, jnp.ones((1, 5, 3)))

    for cascade, layer, options, message in (
        # It would prune nothing, without a word.
        (Cascade(keep=(8, 6), semantics="skip"), 1, {}, "keeps 6 patches, .* are 4"),
        (Cascade(keep=(4, 4)), 0, {"num_prefix": 2}, "after 2 tokens .* are 3"),
        (Cascade(keep=(4, 4)), 2, {}, "for the layers 0 to 1, got 2"),
        (Cascade(keep=(4, 4)), -1, {}, "for the layers 0 to 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pruned_attention(
                cascade, layer, tokens, abs, lambda x, attend: x, **options
            )
        with pytest.raises(ValueError, match=message):
            pruned_mlp(cascade, layer, tokens, abs, abs, **options)
    cascade = Cascade(keep=(4, 4))
    with pytest.raises(ValueError, match="in a Python loop, not in a scan"):
        jax.lax.scan(
            lambda t, i: (pruned_mlp(cascade, i, t, abs, abs), None),
            initial_tokens(cascade, jnp.ones((1, 5, 3))),
            jnp.arange(2),
        )
