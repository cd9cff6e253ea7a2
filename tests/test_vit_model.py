"""The Vision Transformer against a NumPy forward pass; training, names and errors."""

import itertools
import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from flax import traverse_util
from numerics import assert_close, compiled, run

from vit import attention
from vit import model as models
from vit.cascade import Cascade
from vit.model import DropPath, PatchEmbedding, ViT

pytestmark = [
    pytest.mark.usefixtures("unoptimized", "highest_precision"),
    # Many cascades here prune in the first layer, where the first patches are kept.
    pytest.mark.filterwarnings("ignore:the attention of layer"),
]

# All axes differ: 2 images of 15 x 20, 12 patches of 5 x 5, D 10, H 3, d 6, M 14, K 7.
SIZES = {
    "num_classes": 7,
    "patch_size": 5,
    "hidden_size": 10,
    "num_layers": 2,
    "num_heads": 3,
    "head_dim": 6,
    "mlp_dim": 14,
}
IMAGES = (2, 15, 20, 1)
# For stems: patches of 8 x 8.
LARGE_IMAGES = (2, 16, 24, 1)


def make(**options):
    return ViT(**(SIZES | options))


def logits_of(model, params, images, **options):
    return run(lambda p: model.apply({"params": p}, images, **options), params)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("options", "image_shape"),
    [
        ({}, IMAGES),
        ({"gelu": "erf", "ln_eps": 1e-2, "num_layers": 1}, IMAGES),
        ({"representation_size": 9, "head_dim": None, "num_heads": 2}, IMAGES),
        ({"num_classes": 0, "num_layers": 1}, IMAGES),
        ({"num_heads": (3, 1), "mlp_dim": (4, 15)}, IMAGES),
        ({"patch_size": 8, "stem": (3, 4), "num_layers": 1}, LARGE_IMAGES),
    ],
    ids=["plain", "erf", "pre_logits", "headless", "uneven", "stem"],
)
def test_logits_match_numpy(options, image_shape):
    model = make(**options)
    params = vit_oracle.random_params(model, image_shape)
    images = vit_oracle.random_images(image_shape)
    expected = vit_oracle.forward(
        params,
        images,
        gelu=model.gelu,
        epsilon=model.ln_eps,
    ).logits
    logits = logits_of(model, params, images)
    assert logits.shape == expected.shape == (2, model.num_classes or 10)
    assert_close(logits, expected)


def test_the_two_gelus_differ():
    params = vit_oracle.random_params(make(), IMAGES)
    images = vit_oracle.random_images(IMAGES)
    tanh, erf = (
        vit_oracle.forward(params, images, gelu=gelu).logits for gelu in ("tanh", "erf")
    )
    # Otherwise the test above, good to 1e-5, could not tell them apart.
    assert np.max(np.abs(tanh - erf)) > 4e-5 * np.max(np.abs(tanh))


def test_intermediates_are_those_of_numpy_and_change_nothing():
    model = make()
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    logits, captured = logits_of(model, params, images, mutable=["intermediates"])
    trace = vit_oracle.forward(params, images)
    assert_close(logits, trace.logits)
    for layer in range(2):
        block = captured["intermediates"]["Transformer"][f"encoderblock_{layer}"]
        (attention,), (tokens,) = block["attention"], block["tokens"]
        assert attention.dtype == jnp.float32
        np.testing.assert_allclose(attention, trace.probs[layer], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.sum(attention, -1), 1, rtol=1e-5)
        np.testing.assert_array_equal(tokens, [range(13)] * 2)


def test_rows_far_from_zero_are_normalized():
    # The mean is 300 deviations: E[x^2] - E[x]^2 in float32 would err by 1 %.
    x = 300 + np.random.default_rng(0).normal(size=(5, 64))
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    norm = models.layer_norm(1e-12, "norm")
    params = {"scale": jnp.ones(64), "bias": jnp.zeros(64)}
    found = norm.apply({"params": params}, jnp.asarray(x, jnp.float32))
    # x itself is rounded to 300 * 2**-24 = 2e-5.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_patches_are_taken_row_by_row():
    # The kernel picks one pixel of a patch; pixels hold their own numbers.
    image = jnp.arange(6 * 8, dtype=jnp.float32).reshape(1, 6, 8, 1)
    kernel = jnp.zeros((2, 2, 1, 3)).at[1, 0, 0, 1].set(1)
    params = {"kernel": kernel, "bias": jnp.array([0.0, 0.0, 5.0])}
    patches = PatchEmbedding(3, 2, jnp.float32).apply({"params": params}, image)
    expected = [
        [0, 8 * row + column, 5] for row in (1, 3, 5) for column in (0, 2, 4, 6)
    ]
    np.testing.assert_array_equal(patches, [expected])


# Names, starts and kinds of numbers.


def test_parameters_have_googles_names_and_shapes():
    model = make(representation_size=9, num_layers=1, patch_size=10, stem=(4,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 20, 30, 2)))
    flat = traverse_util.flatten_dict(shapes["params"], sep="/")
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    expected = {
        "cls": (1, 1, 10),
        "stem_0/kernel": (3, 3, 2, 4),
        "stem_0/LayerNorm_0/scale": (4,),
        "stem_0/LayerNorm_0/bias": (4,),
        "embedding/kernel": (5, 5, 4, 10),
        "embedding/bias": (10,),
        "Transformer/posembed_input/pos_embedding": (1, 7, 10),
        f"{attention}/out/kernel": (3, 6, 10),
        f"{attention}/out/bias": (10,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (10, 14),
        f"{block}/MlpBlock_0/Dense_0/bias": (14,),
        f"{block}/MlpBlock_0/Dense_1/kernel": (14, 10),
        f"{block}/MlpBlock_0/Dense_1/bias": (10,),
        "pre_logits/kernel": (10, 9),
        "pre_logits/bias": (9,),
        "head/kernel": (9, 7),
        "head/bias": (7,),
    }
    for name in ("query", "key", "value"):
        expected[f"{attention}/{name}/kernel"] = (10, 3, 6)
        expected[f"{attention}/{name}/bias"] = (3, 6)
    norms = f"{block}/LayerNorm_0", f"{block}/LayerNorm_1", "Transformer/encoder_norm"
    for norm, name in itertools.product(norms, ("scale", "bias")):
        expected[f"{norm}/{name}"] = (10,)
    assert {name: leaf.shape for name, leaf in flat.items()} == expected


def test_new_networks_have_a_head_of_zeros_and_xavier_kernels():
    model = make(num_layers=1, head_dim=50, mlp_dim=90, num_classes=2)
    images = vit_oracle.random_images(IMAGES)
    params = run(lambda key: model.init(key, images)["params"], jax.random.key(3))
    assert not np.any(params["head"]["kernel"]) and not np.any(params["cls"])
    block = params["Transformer"]["encoderblock_0"]
    attention = block["MultiHeadDotProductAttention_0"]
    # Uniform over +-sqrt(6 / (inputs + outputs)), heads taken together.
    for kernel, inputs, outputs in (
        (attention["query"]["kernel"], 10, 150),
        (attention["out"]["kernel"], 150, 10),
        (block["MlpBlock_0"]["Dense_0"]["kernel"], 10, 90),
    ):
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.95 * bound < np.max(np.abs(kernel)) <= bound
        # 900 draws or more: five deviations of the mean square.
        np.testing.assert_allclose(np.mean(kernel**2), bound**2 / 3, rtol=0.15)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        params, vit_oracle.random_params(model, IMAGES)
    )


@pytest.mark.parametrize(
    "cascade", [None, Cascade(keep=(12, 5), score="max")], ids=["dense", "drop"]
)
def test_bfloat16_gives_float32_logits_near_those_of_float32(cascade):
    model = make(cascade=cascade)
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    logits = logits_of(model.clone(dtype=jnp.bfloat16), params, images)
    assert logits.dtype == jnp.float32
    expected = vit_oracle.forward(params, images, cascade=cascade).logits
    # Eight bits of mantissa, some ten products deep.
    assert_close(logits, expected, tolerance=0.05)
    assert np.max(np.abs(logits - expected)) > 0


def test_bfloat16_products_take_bfloat16_operands():
    model = make(dtype=jnp.bfloat16, num_layers=1, cascade=Cascade(keep=(4,)))
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    types = [
        types
        for _, types in vit_oracle.products(
            lambda p: model.apply({"params": p}, images), params
        )
    ]
    # Embedding, query, key, value, likeness, attended, out, two of the MLP; the head is
    # of float32.
    assert types.count({"bfloat16"}) == 9
    assert types.count({"float32"}) == 1


# Training.


def test_training_without_rates_is_evaluation_and_needs_no_rng():
    model = make()
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    evaluated, trained = run(
        lambda p: [model.apply({"params": p}, images, train=t) for t in (False, True)],
        params,
    )
    np.testing.assert_array_equal(evaluated, trained)


@pytest.mark.parametrize("rate", ["dropout_rate", "drop_path_rate"])
def test_rates_act_in_training_alone_and_need_the_rng(rate):
    model = make(**{rate: 0.5})
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)

    def train(params, key):
        rngs = None if key is None else {"dropout": key}
        return model.apply({"params": params}, images, train=True, rngs=rngs)

    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        jax.eval_shape(lambda p: train(p, None), params)
    forward = compiled(train)
    first, second = (forward(params, jax.random.key(seed)) for seed in (0, 1))
    # With seed 0 or 1 something of 8 branches or 400 numbers is left out.
    assert np.max(np.abs(first - second)) > 1e-3
    evaluated = logits_of(model, params, images)
    assert_close(evaluated, vit_oracle.forward(params, images).logits)


def test_drop_path_keeps_the_mean_and_leaves_out_whole_images():
    x = jnp.ones((4000, 2, 3))
    module = DropPath(0.3, deterministic=False)
    y = np.asarray(module.apply({}, x, rngs={"dropout": jax.random.key(5)}))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    # The share of the kept has deviation sqrt(.3 * .7 / 4000) = .0072.
    np.testing.assert_allclose(y.mean(), 1, atol=5 * 0.0072 / 0.7)
    np.testing.assert_array_equal(DropPath(0.3, deterministic=True).apply({}, x), x)


def test_drop_path_grows_from_none_at_the_first_layer():
    model = make(num_layers=3, drop_path_rate=0.6, patch_size=1, mlp_dim=2)
    images = jnp.ones((600, 1, 1, 1))
    params = vit_oracle.random_params(model, images.shape)
    _, captured = run(
        lambda p, key: model.apply(
            {"params": p},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, DropPath),
        ),
        params,
        jax.random.key(0),
    )
    for layer, rate in enumerate((0.0, 0.3, 0.6)):
        block = captured["intermediates"]["Transformer"][f"encoderblock_{layer}"]
        branches = next(v for k, v in block.items() if k.startswith("DropPath"))
        dropped = [np.all(y == 0, axis=(1, 2)) for y in branches["__call__"]]
        assert len(dropped) == 2  # attention and MLP, drawn apart
        for drawn in dropped:
            # Five deviations of a share of 600.
            assert abs(np.mean(drawn) - rate) <= 5 * math.sqrt(0.25 / 600)
        if rate:
            assert np.any(dropped[0] != dropped[1])


def test_training_draws_the_cascades_random_scores_anew():
    cascade = Cascade(keep=(4, 4), score="random")
    model = make(cascade=cascade)
    params = vit_oracle.random_params(model, IMAGES)
    images = vit_oracle.random_images(IMAGES)
    key = jax.random.key(8)

    def kept(params, **rngs):
        _, captured = model.apply(
            {"params": params}, images, rngs=rngs, mutable=["intermediates"]
        )
        return captured["intermediates"]["Transformer"]["encoderblock_0"]["tokens"][0]

    fixed = run(kept, params)
    draw = compiled(lambda params, key: kept(params, cascade=key))
    one, two = (draw(params, jax.random.fold_in(key, step)) for step in (1, 2))
    scores = jax.random.uniform(jax.random.key(cascade.seed), (2, 13))
    expected = 1 + np.argsort(-np.asarray(scores)[:, 1:], axis=1)[:, :4]
    np.testing.assert_array_equal(fixed[:, 1:], np.sort(expected, axis=1))
    assert np.any(fixed != one) and np.any(one != two)
    assert np.any(fixed[0] != fixed[1])


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"stem": (4,)}, "patch_size 5 must be a multiple of 2 with 1 conv"),
        ({"num_heads": 0}, "num_heads must be at least 1, as one number or one for"),
        ({"mlp_dim": 13.5}, "mlp_dim must be of whole numbers, got 13.5"),
        ({"num_heads": (3, 1.0)}, r"num_heads must be of whole .* got \(3, 1.0\)"),
        ({"num_heads": (3, 3, 3)}, r"num_heads .* got \(3, 3, 3\)"),
        ({"mlp_dim": (14, 0)}, r"mlp_dim must be at least 1.* got \(14, 0\)"),
        ({"head_dim": None}, "hidden_size 10 is not divisible by num_heads 3; set"),
        ({"head_dim": None, "num_heads": (1, 2)}, r"num_heads \(1, 2\); set head_dim"),
        ({"pool": "max"}, "pool must be one of cls, mean, .*; got 'max'"),
        ({"class_token": False}, "pool 'cls' requires class_token=True"),
        ({"distilled": True}, "requires class_token=True and num_registers of at lea"),
        (
            {"attention_implementation": "fast"},
            "attention_implementation must be one of None, xla, cudnn, pallas, plain",
        ),
        (
            {"class_token": False, "pool": "mean"}
            | {"cascade": Cascade(keep=(5, 5), score="cls")},
            "the score 'cls' requires class_token=True",
        ),
        (
            {"pool": "mean", "cascade": Cascade(keep=(5, 0))},
            "pool 'mean' requires a patch after the last layer",
        ),
        ({"gelu": "relu"}, "gelu must be one of tanh, erf; got 'relu'"),
        ({"num_registers": -1}, "num_registers must not be negative, got -1"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"ln_eps": -1.0}, "ln_eps must not be negative, got -1.0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must lie in \[0, 1\), got -0.1"),
        (
            {"cascade": Cascade(keep=(9,))},
            "cascade is for 1 layers and at least 9 patches; the network has 2 and 12",
        ),
        (
            {"cascade": Cascade(keep=(13, 9))},
            "cascade is for 2 layers and at least 13 patches; the network has 2 and 12",
        ),
        (
            {"cascade": Cascade(keep=(8, 6), keep_mlp=(6, 6), score="merge")},
            "merges from 8 patches on, but the network has 12",
        ),
        (
            {"cascade": Cascade(keep=(9, 9), keep_heads=(3, 4))},
            "keep_heads must be at most 3 in layer 1, got 4",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(options, message):
    model = make(**options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGES))


@pytest.mark.parametrize("image_shape", [(15, 21), (14, 20), (0, 20)])
def test_images_must_divide_into_patches(image_shape):
    height, width = image_shape
    images = jnp.zeros((1, *image_shape, 1))
    with pytest.raises(ValueError, match=f"{height}x{width} .* multiples of 5"):
        jax.eval_shape(make().init, jax.random.key(0), images)


def test_variants_are_made_by_name():
    model = models.make("S", 5, 32, mlp_dim=7, dtype=jnp.bfloat16)
    assert model == ViT(
        num_classes=5,
        patch_size=32,
        hidden_size=384,
        num_layers=12,
        num_heads=6,
        mlp_dim=7,
        dtype=jnp.bfloat16,
    )
    with pytest.raises(ValueError, match="must be one of Ti, S, B, L, .* got 'XL'"):
        models.make("XL", 5, 32)


def test_the_attention_is_found_in_model():
    for name in (
        "Attended",
        "FromHeads",
        "MultiHeadDotProductAttention",
        "ToHeads",
        "attention_probs",
    ):
        assert getattr(models, name) is getattr(attention, name)


def test_numbers_of_numpy_become_those_of_python():
    heads, widths = np.array([3, 2]), [np.int64(9), np.int32(8)]
    model = make(num_heads=heads, mlp_dim=widths, patch_size=np.int64(5))
    assert model == make(num_heads=(3, 2), mlp_dim=(9, 8))
    sizes = model.patch_size, *model.num_heads, *model.mlp_dim
    assert {type(size) for size in sizes} == {int}


EXPORTED = {
    "whole": {},
    "drop": {"cascade": Cascade(keep=(12, 6))},
    "masked": {"cascade": Cascade(keep=(12, 6), mode="masked")},
    "skip": {"cascade": Cascade(keep=(12, 6), semantics="skip")},
    "zero": {"cascade": Cascade(keep=(12, 6), semantics="zero")},
    "fuse": {"cascade": Cascade(keep=(12, 6), score="cls", fuse="sum")},
    "merge": {"cascade": Cascade(keep=(12, 9), keep_mlp=(9, 6), score="merge")},
    "random": {"cascade": Cascade(keep=(6, 6), score="random")},
    "heads": {"cascade": Cascade(keep=(12, 12), keep_heads=(1, 2))},
    "segment": {"segment": attention.Segment(1)},
}


@pytest.mark.parametrize("options", EXPORTED.values(), ids=EXPORTED)
def test_a_network_is_exported_for_every_batch_size(options):
    model = make(**options)
    params = vit_oracle.random_params(make(), IMAGES)
    params = jax.tree.map(np.asarray, params)  # constants of the program
    (size,) = jax.export.symbolic_shape("size")
    images = jax.ShapeDtypeStruct((size, *IMAGES[1:]), jnp.float32)
    forward = jax.jit(lambda images: model.apply({"params": params}, images))
    [logits] = jax.export.export(forward, platforms=["cpu"])(images).out_avals
    assert logits.shape == (size, 7)


@pytest.mark.parametrize("semantics", [None, "drop", "skip", "zero"])
def test_a_batch_may_be_empty(semantics):
    cascade = semantics and Cascade(keep=(12, 6), semantics=semantics)
    model = ViT(**SIZES, cascade=cascade)
    images = jax.ShapeDtypeStruct((0, *IMAGES[1:]), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (0, 7)


def test_images_of_integers_are_refused():
    model = models.make("Ti", num_classes=3, patch_size=4)
    with pytest.raises(ValueError, match="floating point and scaled, got uint8"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3), "uint8"))
    with pytest.raises(ValueError, match=r"\(B, H, W, C\), got \(8, 8, 3\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((8, 8, 3)))
