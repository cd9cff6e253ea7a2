"""Convolutions written as matrix products, for backends where XLA's own are slow.

`matmul_conv` has the signature of `jax.lax.conv_general_dilated` and computes the same
values up to rounding. Pass it to `flax.linen.Conv(conv_general_dilated=matmul_conv)`.
On a CPU the gradient of XLA's convolution is several times slower than these products.

Axes: B batch, H W image, C input and O output channels, T tiles per side.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Lavin & Gray 2016 (arXiv 1509.09308), F(2x2, 3x3): 16 products for 4 outputs, where
# the plain sum takes 36. The error is that of the plain sum. Larger tiles are bound by
# memory: they are not faster, and their error is ten times larger.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
# With fewer channels the transforms cost more than the saved products.
_MIN_CHANNELS = 16
# For a large kernel on a small image a band wastes few products and avoids copies.
_MIN_BAND = 5
_MAX_BAND_WIDTH = 40


def fastest() -> Callable[..., Array]:
    """`matmul_conv` on CPUs, otherwise XLA's own convolution."""
    on_cpu = jax.default_backend() == "cpu"
    return matmul_conv if on_cpu else lax.conv_general_dilated


def max_pool(x: Array) -> Array:
    """Maximum over 2x2 pixels; the gradient of a windowed reduction is slow on CPUs."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def matmul_conv(
    lhs: Array,
    rhs: Array,
    window_strides=(1, 1),
    padding="SAME",
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    **options,
) -> Array:
    """A convolution of stride 1 as matrix products; XLA computes any other one.

    Args:
      lhs: inputs (B, H, W, C).
      rhs: kernel (kh, kw, C, O).
      window_strides: as in `jax.lax.conv_general_dilated`; so are the arguments below.
      padding: SAME, VALID, or ((low, high), (low, high)).
      lhs_dilation: dilation of the inputs.
      rhs_dilation: dilation of the kernel.
      dimension_numbers: NHWC, HWIO, NHWC, as Flax passes them.
      feature_group_count: number of groups.
      **options: precision; with any other option XLA computes the convolution.

    Returns:
      (B, H', W', O).
    """
    plain = (
        lhs.ndim == 4
        and lhs.shape[3] == rhs.shape[2]
        and feature_group_count == 1
        and all(
            option is None for name, option in options.items() if name != "precision"
        )
        and _all_ones(window_strides)
        and _all_ones(lhs_dilation)
        and _all_ones(rhs_dilation)
        and _is_channels_last(lhs, rhs, dimension_numbers)
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **options,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding)
    pads = tuple(tuple(pair) for pair in padding)
    even = lhs.shape[1] % 2 == 0 and lhs.shape[2] % 2 == 0
    same = rhs.shape[:2] == (3, 3) and pads == ((1, 1), (1, 1))
    precision = options.get("precision")
    if even and same and lhs.shape[3] >= _MIN_CHANNELS:
        return _winograd(lhs, rhs, precision)
    if rhs.shape[1] >= _MIN_BAND and lhs.shape[2] + sum(pads[1]) <= _MAX_BAND_WIDTH:
        return _banded(lhs, rhs, pads, precision)
    return _shifted_slices(lhs, rhs, pads, precision)


def _all_ones(values):
    return values is None or all(value == 1 for value in np.ravel(values))


def _is_channels_last(lhs, rhs, dimension_numbers):
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return numbers == lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC")
    )


def _shifted_slices(inputs, kernel, pads, precision):
    """Concatenated slices for all taps, times the flattened kernel."""
    kh, kw, num_in, num_out = kernel.shape
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
    slices = [
        padded[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw)
    ]
    columns = jnp.concatenate(slices, axis=-1).reshape(-1, kh * kw * num_in)
    flat = kernel.reshape(-1, num_out)
    outputs = jnp.matmul(columns, flat, precision=precision)
    return outputs.reshape(-1, height, width, num_out)


def _banded(inputs, kernel, pads, precision):
    """Rows of the image times one band matrix per row of the kernel."""
    kh, kw, num_in, num_out = kernel.shape
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    batch, padded_height, padded_width, _ = padded.shape
    height, width = padded_height - kh + 1, padded_width - kw + 1
    # Tap j maps input column x to output column w = x - j.
    band = np.stack([np.eye(padded_width, width, -j) for j in range(kw)])
    matrices = jnp.einsum(
        "jxw,ijco->ixcwo", band.astype(kernel.dtype), kernel, precision=precision
    ).reshape(kh, padded_width * num_in, width * num_out)
    rows = padded.reshape(batch, padded_height, -1)
    outputs = sum(
        jnp.matmul(
            rows[:, i : i + height].reshape(batch * height, -1),
            matrices[i],
            precision=precision,
        )
        for i in range(kh)
    )
    return outputs.reshape(batch, height, width, num_out)


def _winograd(inputs, kernel, precision):
    """3x3 with one pixel of padding: transformed tiles times transformed kernels."""
    batch, height, width, num_in = inputs.shape
    tiles = height // 2, width // 2
    padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    padded = padded.reshape(batch, tiles[0] + 1, 2, tiles[1] + 1, 2, num_in)
    rows = _combine(_INPUT, _overlapping(padded, 1))
    transformed = [_combine(_INPUT, _overlapping(row, 2)) for row in rows]
    kernels = [_combine(_KERNEL, list(row)) for row in _combine(_KERNEL, list(kernel))]
    products = [
        [
            jnp.matmul(x.reshape(-1, num_in), k, precision=precision).reshape(
                batch, *tiles, -1
            )
            for x, k in zip(x_row, k_row, strict=True)
        ]
        for x_row, k_row in zip(transformed, kernels, strict=True)
    ]
    columns = [jnp.stack(_combine(_OUTPUT, row), axis=3) for row in products]
    outputs = jnp.stack(_combine(_OUTPUT, columns), axis=2)  # (B, T, 2, T, 2, O)
    return outputs.reshape(batch, height, width, -1)


def _overlapping(padded, axis):
    """The four rows (or columns) of each tile; tiles advance by two."""
    num_tiles = padded.shape[axis] - 1
    return [
        lax.index_in_dim(
            lax.slice_in_dim(padded, start, start + num_tiles, axis=axis),
            parity,
            axis + 1,
            keepdims=False,
        )
        for start in (0, 1)
        for parity in (0, 1)
    ]


def _combine(matrix, arrays):
    """matrix @ arrays for a list of arrays, without the products by 0 and 1."""
    results = []
    for row in matrix:
        terms = [
            array if weight == 1 else float(weight) * array
            for weight, array in zip(row, arrays, strict=True)
            if weight != 0
        ]
        results.append(sum(terms[1:], start=terms[0]))
    return results
