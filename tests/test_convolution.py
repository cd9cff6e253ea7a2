"""Matrix-product convolutions against XLA's own and against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from numerics import assert_close, run

from experiments.networks.convolution import matmul_conv

pytestmark = pytest.mark.usefixtures("highest_precision")

NUMBERS = ("NHWC", "HWIO", "NHWC")
# name: image (B, H, W, C), kernel (kh, kw, C, O), padding, matrix products that it
# takes: Winograd 16, a band one for each row of the kernel and one to make the bands,
# slices side by side 1.
PLAIN = {
    "winograd": ((2, 6, 4, 16), (3, 3, 16, 5), "SAME", 16),
    "winograd_explicit": ((2, 2, 8, 17), (3, 3, 17, 4), ((1, 1), (1, 1)), 16),
    "odd_height": ((2, 5, 6, 16), (3, 3, 16, 3), "SAME", 1),
    "odd_width": ((2, 6, 5, 16), (3, 3, 16, 3), "SAME", 1),
    "few_channels": ((2, 6, 4, 3), (3, 3, 3, 5), "SAME", 1),
    "valid_3x3": ((2, 6, 4, 16), (3, 3, 16, 5), "VALID", 1),
    "asymmetric_3x3": ((2, 6, 4, 16), (3, 3, 16, 5), ((0, 2), (2, 0)), 1),
    "band": ((3, 7, 6, 2), (5, 5, 2, 4), ((2, 2), (2, 2)), 6),
    "band_valid": ((3, 7, 8, 2), (5, 5, 2, 4), "VALID", 6),
    "band_one_pixel": ((3, 5, 5, 2), (5, 5, 2, 4), "VALID", 6),
    "band_asymmetric": ((3, 6, 5, 2), (4, 6, 2, 3), ((1, 0), (2, 3)), 5),
    "band_even_same": ((3, 6, 5, 2), (4, 6, 2, 3), "SAME", 5),
    "wide": ((1, 6, 41, 2), (5, 5, 2, 3), "VALID", 1),
    "wide_by_padding": ((1, 6, 38, 2), (5, 5, 2, 3), "SAME", 1),
    "narrow_kernel": ((2, 8, 6, 2), (5, 3, 2, 3), "SAME", 1),
    "even_kernel_same": ((2, 5, 6, 3), (2, 4, 3, 5), "SAME", 1),
    "even_kernel_same_lower": ((2, 5, 6, 3), (2, 4, 3, 5), "SAME_LOWER", 1),
    "1x1": ((2, 3, 5, 4), (1, 1, 4, 6), "SAME", 1),
    "1x1_padded": ((2, 3, 5, 4), (1, 1, 4, 6), ((1, 0), (0, 2)), 1),
}
# name: image, kernel, arguments that the matrix products do not serve.
OTHERS = {
    "strides": ((2, 7, 6, 16), (3, 3, 16, 4), {"window_strides": (2, 1)}),
    "input_dilation": ((2, 6, 4, 16), (3, 3, 16, 4), {"lhs_dilation": (1, 2)}),
    "kernel_dilation": ((2, 7, 8, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 1)}),
    "groups": ((2, 6, 4, 16), (3, 3, 8, 6), {"feature_group_count": 2}),
    "batch_groups": ((4, 6, 4, 16), (3, 3, 16, 6), {"batch_group_count": 2}),
    "channels_first": (
        (2, 3, 6, 5),
        (4, 3, 3, 3),
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ),
    "channels_first_by_default": (
        (2, 3, 6, 5),
        (4, 3, 3, 3),
        {"dimension_numbers": None},
    ),
    "transposed_output": (
        (2, 6, 4, 16),
        (3, 3, 16, 4),
        {"dimension_numbers": ("NHWC", "HWIO", "NCHW")},
    ),
    "one_axis": (
        (2, 9, 3),
        (3, 3, 4),
        {"window_strides": (1,), "dimension_numbers": ("NHC", "HIO", "NHC")},
    ),
    "three_axes": (
        (2, 4, 3, 5, 2),
        (3, 3, 3, 2, 4),
        {"window_strides": (1,) * 3, "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
    ),
}
# Sums of at most 300 products in float32, whose rounding errors of 6e-8 add up like a
# random walk, and Winograd's sums of four beside them: 2e-6 of the largest entry is
# several times what is measured, and one wrong tap would be off by a tenth.
TOLERANCE = 2e-6

plain_convolutions = pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "padding", "num_products"),
    PLAIN.values(),
    ids=PLAIN.keys(),
)


def random_arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(conv, image, kernel, **arguments):
    """Outputs, and the gradients of both inputs for one random cotangent."""

    def values(image, kernel):
        outputs, pull_back = jax.vjp(
            lambda x, k: conv(x, k, **arguments), image, kernel
        )
        (cotangent,) = random_arrays(outputs.shape, dtype=outputs.dtype)
        return outputs, *pull_back(cotangent)

    return run(values, image, kernel)


def assert_same_as_lax(image, kernel, **arguments):
    actual = value_and_gradients(matmul_conv, image, kernel, **arguments)
    expected = value_and_gradients(lax.conv_general_dilated, image, kernel, **arguments)
    for array, other in zip(actual, expected, strict=True):
        assert array.dtype == other.dtype
        assert_close(array, other, TOLERANCE)


def num_operations(name, conv, *arguments, **options):
    """How often a primitive occurs in the traced function."""
    jaxpr = jax.make_jaxpr(lambda x, k: conv(x, k, **options))(*arguments)
    return sum(equation.primitive.name == name for equation in jaxpr.eqns)


@pytest.mark.slow_after(1)
@plain_convolutions
def test_plain_convolutions_equal_those_of_xla(
    image_shape, kernel_shape, padding, num_products
):
    image, kernel = random_arrays(image_shape, kernel_shape)
    arguments = {
        "window_strides": (1, 1),
        "padding": padding,
        "dimension_numbers": NUMBERS,
    }
    assert_same_as_lax(image, kernel, **arguments)
    # Each case really takes the way that it is here for.
    for name, count in [("conv_general_dilated", 0), ("dot_general", num_products)]:
        found = num_operations(name, matmul_conv, image, kernel, **arguments)
        assert found == count, f"{found} {name}, not {count}"


@pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "arguments"), OTHERS.values(), ids=OTHERS.keys()
)
def test_any_other_convolution_is_that_of_xla(image_shape, kernel_shape, arguments):
    image, kernel = random_arrays(image_shape, kernel_shape)
    defaults = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": NUMBERS,
    }
    if "lhs_dilation" in arguments:
        defaults["padding"] = ((1, 1), (1, 1))  # strings are refused with it
    arguments = defaults | arguments
    expected = lax.conv_general_dilated(image, kernel, **arguments)
    actual = matmul_conv(image, kernel, **arguments)
    # The very same operation.
    np.testing.assert_array_equal(actual, expected)


def numpy_conv(image, kernel, pads):
    """float64, output entry by output entry."""
    image, kernel = np.float64(image), np.float64(kernel)
    padded = np.pad(image, ((0, 0), *pads, (0, 0)))
    kh, kw, _, num_out = kernel.shape
    height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
    outputs = np.empty((len(image), height, width, num_out))
    for b, h, w, o in np.ndindex(*outputs.shape):
        window = padded[b, h : h + kh, w : w + kw]
        outputs[b, h, w, o] = np.sum(window * kernel[..., o])
    return outputs


@pytest.mark.parametrize(
    ("image_shape", "kernel_shape", "pads"),
    [
        ((2, 4, 6, 16), (3, 3, 16, 3), ((1, 1), (1, 1))),
        ((2, 6, 5, 2), (5, 5, 2, 3), ((2, 1), (0, 3))),
        ((2, 4, 5, 2), (2, 3, 2, 3), ((0, 1), (2, 0))),
    ],
    ids=["winograd", "band", "slices"],
)
def test_matches_numpy(image_shape, kernel_shape, pads):
    image, kernel = random_arrays(image_shape, kernel_shape)

    def conv(image, kernel):
        return matmul_conv(image, kernel, (1, 1), pads, dimension_numbers=NUMBERS)

    assert_close(run(conv, image, kernel), numpy_conv(image, kernel, pads), TOLERANCE)


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("name", ["winograd", "band", "few_channels"])
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (1, 3)])
def test_vmap_equals_a_loop(name, in_axes):
    image_shape, kernel_shape, padding, _ = PLAIN[name]
    shapes = [
        shape if axis is None else (*shape[:axis], 3, *shape[axis:])
        for shape, axis in zip((image_shape, kernel_shape), in_axes, strict=True)
    ]
    image, kernel = random_arrays(*shapes)

    def conv(function, image, kernel):
        return function(image, kernel, (1, 1), padding, dimension_numbers=NUMBERS)

    mapped = jax.vmap(lambda x, k: conv(matmul_conv, x, k), in_axes)
    for i, outputs in enumerate(run(mapped, image, kernel)):
        parts = [
            array if axis is None else jnp.take(array, i, axis=axis)
            for array, axis in zip((image, kernel), in_axes, strict=True)
        ]
        assert_close(outputs, conv(lax.conv_general_dilated, *parts), TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3)},
        {"kernel_size": (3, 3), "padding": "VALID"},
        {"kernel_size": (3, 3), "padding": "CIRCULAR"},
        {"kernel_size": (5, 5), "padding": 2},
        {"kernel_size": (5, 5), "padding": ((1, 2), (0, 3)), "use_bias": False},
        {"kernel_size": (3, 3), "strides": 2},
        {"kernel_size": (3, 3), "kernel_dilation": 2},
        {"kernel_size": (3, 3), "feature_group_count": 4},
    ],
    ids=lambda options: "-".join(f"{k}_{v}" for k, v in options.items()),
)
def test_flax_layer_equals_the_usual_one(options):
    layer = nn.Conv(8, conv_general_dilated=matmul_conv, **options)
    usual = nn.Conv(8, **options)
    (images,) = random_arrays((2, 6, 8, 16))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), images)["params"]
    arrays = random_arrays(*(leaf.shape for leaf in shapes.values()))
    variables = {"params": dict(zip(shapes, arrays, strict=True))}
    actual, expected = (run(m.apply, variables, images) for m in (layer, usual))
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["winograd", "band", "few_channels"])
def test_bfloat16_stays_bfloat16(name):
    image_shape, kernel_shape, padding, _ = PLAIN[name]
    image, kernel = random_arrays(image_shape, kernel_shape, dtype=jnp.bfloat16)
    arguments = {
        "window_strides": (1, 1),
        "padding": padding,
        "dimension_numbers": NUMBERS,
    }
    actual = value_and_gradients(matmul_conv, image, kernel, **arguments)
    exact = value_and_gradients(
        lax.conv_general_dilated,
        image.astype(jnp.float32),
        kernel.astype(jnp.float32),
        **arguments,
    )
    for array, expected in zip(actual, exact, strict=True):
        assert array.dtype == jnp.bfloat16
        # 8 bits, 4e-3 of each number; sums of rounded terms are off by a few of those.
        assert_close(array, expected, 3e-2, TOLERANCE)


def test_default_arguments_are_those_of_a_plain_convolution():
    image, kernel = random_arrays((2, 6, 4, 16), (3, 3, 16, 5))

    def conv(image, kernel):
        return matmul_conv(image, kernel, dimension_numbers=NUMBERS)

    expected = numpy_conv(image, kernel, ((1, 1), (1, 1)))
    assert_close(run(conv, image, kernel), expected, TOLERANCE)


@pytest.mark.parametrize(
    ("image_shape", "kernel_shape"),
    [
        ((2, 6, 4, 32), (3, 3, 16, 5)),
        ((2, 6, 4, 4), (3, 3, 2, 5)),
        ((2, 6, 6, 4), (5, 5, 2, 3)),
    ],
    ids=["winograd", "slices", "band"],
)
def test_channels_that_do_not_match_are_refused(image_shape, kernel_shape):
    arrays = random_arrays(image_shape, kernel_shape)

    def conv(image, kernel):
        return matmul_conv(image, kernel, dimension_numbers=NUMBERS)

    # Else a reshape may hand the channels on as further images.
    with pytest.raises((ValueError, TypeError)):
        jax.eval_shape(conv, *arrays)


def test_an_accumulation_type_is_not_ignored():
    image, kernel = random_arrays((2, 6, 4, 3), (3, 3, 3, 5), dtype=jnp.bfloat16)
    options = {
        "dimension_numbers": NUMBERS,
        "preferred_element_type": jnp.float32,
        "padding": "SAME",
        "window_strides": (1, 1),
    }
    actual = matmul_conv(image, kernel, **options)
    assert actual.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32.
    assert_close(actual, lax.conv_general_dilated(image, kernel, **options), TOLERANCE)
