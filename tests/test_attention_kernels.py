"""Attention with statistics: three implementations, one oracle in NumPy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_oracle
from numerics import run

from vit import attention, importance, schedules
from vit.attention_kernels import (
    Tiles,
    blocked_attention,
    pallas_attention,
    plain_attention,
)
from vit.model import ViT

pytestmark = pytest.mark.usefixtures("unoptimized")

IMPLEMENTATIONS = {
    "plain": plain_attention,
    "blocked": functools.partial(blocked_attention, block_size=7),
    "pallas": functools.partial(pallas_attention, tiles=Tiles(16, 16), interpret=True),
    "pallas_one_step": functools.partial(
        pallas_attention, tiles=Tiles(16, 32), interpret=True
    ),
}


def inputs_of(batch, num_tokens, heads, width, *, dtype=jnp.float32, weighted=False):
    rng = np.random.default_rng(num_tokens + width)
    shape = 3, batch, num_tokens, heads, width
    arrays = jnp.asarray(rng.normal(size=shape) * [[[[[2]]]], [[[[1]]]], [[[[1]]]]])
    weights = None
    if weighted:
        # Hidden rows, single tokens and groups; CLS is there.
        weights = rng.integers(0, 4, (batch, num_tokens)).astype(np.float32)
        weights[:, 0] = 1
    return *arrays.astype(dtype), weights


def numpy_attention(query, key, value, weights):
    """Loops over images, heads and queries in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_tokens, heads, width = query.shape
    weights = np.ones((batch, num_tokens)) if weights is None else np.float64(weights)
    out = np.zeros(query.shape)
    found = {
        name: np.zeros((batch, heads, num_tokens)) for name in importance.STATISTICS
    }
    for b in range(batch):
        for h in range(heads):
            for i in range(num_tokens):
                likeness = np.exp(key[b, :, h] @ query[b, i, h] / np.sqrt(width))
                probs = weights[b] * likeness / np.sum(weights[b] * likeness)
                out[b, i, h] = probs @ value[b, :, h]
                column = found["column_max"][b, h]
                if weights[b, i]:
                    np.maximum(column, probs, out=column)
                found["column_sum"][b, h] += weights[b, i] * probs
                share = probs / np.maximum(weights[b], 1)
                found["row_max"][b, h, i] = share.max()
                if i == 0:
                    found["cls"][b, h] = probs
    return out, found


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_values_and_statistics_match_numpy(name, weighted):
    inputs = inputs_of(2, 19, 3, 24, weighted=weighted)
    attend = functools.partial(IMPLEMENTATIONS[name], names=importance.STATISTICS)
    with jax.default_matmul_precision("highest"):
        out, found = run(attend, *inputs)
    expected, statistics = numpy_attention(*inputs)
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    for field, value in statistics.items():
        np.testing.assert_allclose(getattr(found, field), value, atol=1e-5)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype"),
    [
        (197, 64, jnp.float32),
        (65, 32, jnp.bfloat16),
        (50, 80, jnp.float32),
        (130, 128, jnp.bfloat16),
        (1024, 32, jnp.float32),
        (1030, 32, jnp.float16),
    ],
)
def test_kernel_agrees_with_plain_at_the_sizes_of_networks(num_tokens, width, dtype):
    inputs = inputs_of(1, num_tokens, 1, width, dtype=dtype, weighted=True)
    names = ("column_max", "row_max")
    kernel = functools.partial(pallas_attention, interpret=True)
    with jax.default_matmul_precision("highest"):
        (expected, statistics), *others = run(
            lambda *inputs: [
                attend(*inputs, names=names)
                for attend in (plain_attention, kernel, blocked_attention)
            ],
            *inputs,
        )
    for out, found in others:
        assert out.dtype == dtype and found.column_sum is found.cls is None
        # bfloat16 rounds the output and the probabilities to 8 bits, float16 to 11; the
        # statistics are float32 in every case.
        tolerance = {jnp.bfloat16: 2e-2, jnp.float16: 2e-3}.get(dtype, 1e-5)
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (out, expected)), atol=tolerance
        )
        for field in names:
            np.testing.assert_allclose(
                getattr(found, field), getattr(statistics, field), atol=1e-5
            )


# Newer versions of JAX warn that this backend will be removed.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.skipif(
    not jax.devices()[0].device_kind.startswith("NVIDIA"),
    reason=f"the kernel runs on NVIDIA GPUs; the backend is {jax.default_backend()}",
)
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("num_tokens", "width"), [(197, 64), (65, 32), (50, 80)])
def test_kernel_on_a_gpu_agrees_with_plain(num_tokens, width, dtype, weighted):
    inputs = inputs_of(2, num_tokens, 3, width, dtype=dtype, weighted=weighted)
    names = importance.STATISTICS
    with jax.default_matmul_precision("highest"):
        out, found = jax.jit(
            functools.partial(pallas_attention, names=names, interpret=False)
        )(*inputs)
        expected, statistics = jax.jit(functools.partial(plain_attention, names=names))(
            *inputs
        )
    assert out.dtype == expected.dtype == dtype
    # bfloat16 rounds the probabilities and the output to 8 bits. The reductions are
    # float32: up to 1,024 products and exponentials in another order, and sums of
    # `num_tokens` of them.
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (out, expected)),
        rtol=0,
        atol=2e-2 if dtype == jnp.bfloat16 else 1e-4,
    )
    for field in ("column_max", "row_max", "cls"):
        np.testing.assert_allclose(
            getattr(found, field), getattr(statistics, field), rtol=0, atol=1e-4
        )
    np.testing.assert_allclose(
        found.column_sum, statistics.column_sum, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("name", ["blocked", "pallas"])
def test_gradients_are_those_of_plain(name, weighted):
    inputs = [x for x in inputs_of(2, 19, 2, 16, weighted=weighted) if x is not None]
    direction = np.random.default_rng(1).normal(size=inputs[0].shape)

    def loss_fn(inputs, attend):
        out, found = attend(*inputs, names=("column_max",))
        # The statistics carry no gradient.
        return jnp.sum(direction * out) + jnp.sum(found.column_max)

    grads, expected = run(
        lambda inputs: [
            jax.grad(loss_fn)(inputs, IMPLEMENTATIONS[one]) for one in (name, "plain")
        ],
        inputs,
    )
    for leaf, other in zip(grads, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=2e-5)
        assert np.max(np.abs(other)) > 0.1


# Newer versions of JAX warn that this backend will be removed.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype"),
    [(197, 64, jnp.bfloat16), (1024, 128, jnp.float32), (50, 80, jnp.bfloat16)],
)
def test_kernel_lowers_to_triton(num_tokens, width, dtype):
    """Without a GPU: the lowering for CUDA, up to the compiler of the GPU."""
    shape = jax.ShapeDtypeStruct((2, num_tokens, 3, width), dtype)
    weights = jax.ShapeDtypeStruct((2, num_tokens), jnp.float32)
    names = ("column_max", "column_sum", "row_max")
    traced = jax.jit(functools.partial(pallas_attention, names=names)).trace(
        shape, shape, shape, weights
    )
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this version of JAX lowers Pallas kernels only where a GPU is")
    assert "attention_with_statistics" in text and "triton" in text


# The whole network.

SIZES = {
    "num_classes": 3,
    "patch_size": 1,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 16,
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("score", ["max", "cls"])
def test_pruned_network_holds_no_square_of_the_tokens(score):
    shape = 3, 16, 16, 1
    cascade = schedules.from_ratios([0.0, 0.2], 256, score=score)
    model = ViT(**SIZES, cascade=cascade)
    params = vit_oracle.param_shapes(model, shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)

    def largest_array(model):
        forward = jax.jit(lambda p, x: model.apply({"params": p}, x))
        text = forward.lower(params, images).compile().as_text()
        shapes = re.findall(r"\[([\d,]+)\]", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    # Images, heads, queries and keys. The choice of tokens compares all pairs, but once
    # for all heads.
    square = 3 * 2 * 257 * 257
    assert largest_array(model.clone(attention_implementation="plain")) == square
    assert largest_array(model) == square / 2


def test_implementations_give_the_same_network():
    shape = 2, 12, 12, 1
    cascade = schedules.cp_vit(0.5, num_layers=2, num_patches=144, alpha=0.5)
    model = ViT(**SIZES, cascade=cascade)
    params = vit_oracle.random_params(model, shape)
    images = vit_oracle.random_images(shape)
    with jax.default_matmul_precision("highest"):
        logits, plain = run(
            lambda p: [
                model.clone(attention_implementation=name).apply({"params": p}, images)
                for name in (None, "plain")
            ],
            params,
        )
    np.testing.assert_allclose(logits, plain, rtol=0, atol=1e-5)


def test_the_kernel_is_chosen_where_it_was_measured():
    def chosen(num_tokens, width, dtype):
        shape = jax.ShapeDtypeStruct((2, num_tokens, 3, width), dtype)
        return attention._was_measured(shape)

    assert chosen(1024, 64, jnp.bfloat16)
    assert not chosen(1025, 64, jnp.bfloat16)
    assert not chosen(197, 64, jnp.float16)
    assert not chosen(197, 80, jnp.bfloat16)
    query = np.zeros((1, 2, 1, 16), np.float64)
    with pytest.raises(ValueError, match="takes float32, .* got float64"):
        pallas_attention(query, query, query)


def test_implementations_that_do_not_exist_or_need_a_gpu_are_refused():
    inputs = inputs_of(1, 3, 1, 16)
    with pytest.raises(
        ValueError, match="one of xla, cudnn, pallas, plain; got 'fast'"
    ):
        attention.attend(*inputs, implementation="fast")
    if jax.default_backend() == "cpu":
        for name in ("cudnn", "pallas"):
            with pytest.raises(ValueError, match=f"'{name}' needs an NVIDIA GPU; .* c"):
                attention.attend(*inputs, implementation=name)
