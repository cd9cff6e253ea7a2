"""A small ConvNeXt (Liu et al. 2022, arXiv 2201.03545) for grids of latents.

It differs from the source in its sizes, its stem, which is a 1x1 convolution, and its
depthwise convolutions, which are 3x3. No convolution of XLA is used, because those are
slow on the CPU: the depthwise one is nine shifted multiply-adds, all others are matrix
products.

Axes: B grids, H W cells of a grid, C channels, D width, K classes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from functa import matmul
from vit.model import DropPath


class ConvNeXt(nn.Module):
    """Classifies grids: (B, H, W, C) -> logits (B, K).

    Attributes:
      num_classes: K.
      widths: width of each stage. Before each stage but the first, 2x2 cells are merged
        into one.
      depths: number of blocks of each stage.
      drop_path_rate: rate of the last block's residual branch, in training; it grows
        linearly from zero in the first block.
      layer_scale: initial value of the factors of each residual branch.
      token_drop: share of the cells that are set to zero in training.
      activation: name of a function of `jax.nn`; the source has gelu. On a CPU relu
        takes half the time of a block with gelu.
      product_dtype: "float32" or "bfloat16". The matrix products of the blocks and of
        the stem round their operands to it, and their gradients too.
    """

    num_classes: int
    widths: Sequence[int] = (128, 256)
    depths: Sequence[int] = (3, 3)
    drop_path_rate: float = 0.0
    layer_scale: float = 1e-6
    token_drop: float = 0.0
    activation: str = "gelu"
    product_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits (B, K).

        Args:
          x: normalized grids, (B, H, W, C).
          train: whether drop path and token drop are active. They need the rng
            "dropout".
        """
        if train and self.token_drop:
            shape = (*x.shape[:3], 1)
            keep = jax.random.bernoulli(
                self.make_rng("dropout"), 1 - self.token_drop, shape
            )
            x = jnp.where(keep, x, 0)
        rates = iter(np.linspace(0, self.drop_path_rate, sum(self.depths)).tolist())
        for stage, (width, depth) in enumerate(
            zip(self.widths, self.depths, strict=True)
        ):
            if stage:
                x = _merge_cells(
                    nn.LayerNorm(use_fast_variance=False, name=f"norm_{stage}")(x)
                )
            name = f"merge_{stage}" if stage else "stem"
            x = _dense(width, self.product_dtype, name=name)(x)
            if not stage:
                x = nn.LayerNorm(use_fast_variance=False, name="norm_0")(x)
            for block in range(depth):
                drop_path = DropPath(next(rates), deterministic=not train)
                name = f"block_{stage}_{block}"
                branch = Block(
                    self.layer_scale, self.activation, self.product_dtype, name=name
                )
                x = x + drop_path(branch(x))
        x = nn.LayerNorm(use_fast_variance=False, name="norm")(x.mean((1, 2)))
        return nn.Dense(
            self.num_classes, kernel_init=nn.initializers.zeros, name="head"
        )(x)


class Block(nn.Module):
    """The residual branch of a block: (B, H, W, D) -> (B, H, W, D)."""

    layer_scale: float
    activation: str
    product_dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        kernel = self.param("depthwise", nn.initializers.normal(1 / 3), (3, 3, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x = depthwise_conv(x, kernel) + bias[None, None, None]
        x = nn.LayerNorm(use_fast_variance=False, name="norm")(x)
        x = _dense(4 * width, self.product_dtype, name="expand")(x)
        x = getattr(jax.nn, self.activation)(x)
        x = _dense(width, self.product_dtype, name="project")(x)
        scale = nn.initializers.constant(self.layer_scale)
        return x * self.param("scale", scale, (width,))[None, None, None]


def _dense(features, dtype, **options):
    """A dense layer whose products, and those of its gradients, are in `dtype`."""

    def product(inputs, kernel, *_, **__):
        return matmul.matmul(inputs, kernel, dtype=dtype, round_values=True)

    return nn.Dense(features, dot_general=product, **options)


@jax.custom_vjp
def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of each channel by itself, with one cell of zero padding.

    Args:
      x: (B, H, W, D).
      kernel: (3, 3, D).

    Returns:
      (B, H, W, D).
    """
    return sum(
        window * kernel[i, j][None, None, None] for (i, j), window in _windows(x)
    )


def _forward(x, kernel):
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals, grad):
    # Written out, because the transposed slices would be nine padded copies.
    x, kernel = residuals
    grad_kernel = [jnp.sum(window * grad, (0, 1, 2)) for _, window in _windows(x)]
    grad_kernel = jnp.stack(grad_kernel).reshape(kernel.shape)
    return depthwise_conv(grad, kernel[::-1, ::-1]), grad_kernel


depthwise_conv.defvjp(_forward, _backward)


def _windows(x):
    """Yields ((i, j), the padded grids shifted by i and j cells), nine times."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(3):
        for j in range(3):
            yield (i, j), padded[:, i : i + height, j : j + width]


def _merge_cells(x):
    """Concatenates the channels of 2x2 cells: (B, H/2, W/2, 4 D)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, -1)
