"""A Diffusion Transformer (Peebles and Xie 2023, arXiv 2212.09748) for latents.

A cell of a grid of latents is a token, and a latent vector is one token. Attention, MLP
and position embedding are those of `vit`. Time and class act on every block through
adaLN-zero: a linear map of their embedding, which starts at zero, gives the shifts,
scales and gates. Each block therefore starts as the identity, and the network as the
velocity zero.

Axes: B latents, *Z shape of a latent with C channels, N tokens, D width.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit.attention import MultiHeadDotProductAttention
from vit.model import MlpBlock, PositionEmbedding

# Sines and cosines of the time, and the factor that spreads [0, 1] over their periods.
NUM_WAVES, _TIME_SCALE = 128, 1000.0


class DiT(nn.Module):
    """The velocity of noisy latents: (x (B, *Z), time (B,), label (B,)) -> (B, *Z).

    Attributes:
      num_classes: K; the label K stands for no class.
      hidden_size: D.
      num_layers: number of blocks.
      num_heads: heads of the attention, a divisor of D.
      mlp_dim: width of the MLPs.
    """

    num_classes: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array) -> jax.Array:
        width, channels = self.hidden_size, x.shape[-1]
        tokens = x.reshape(len(x), -1, channels)  # (B, N, C)
        tokens = nn.Dense(width, name="embedding")(tokens)
        tokens += PositionEmbedding(name="posembed_input")(tokens)
        condition = nn.Dense(width, name="time_0")(_waves(time))
        condition = nn.Dense(width, name="time_1")(nn.silu(condition))
        table = nn.Embed(
            self.num_classes + 1,
            width,
            embedding_init=nn.initializers.normal(0.02),
            name="classes",
        )
        condition = nn.silu(condition + table(label))  # (B, D)
        for layer in range(self.num_layers):
            tokens = Block(self.num_heads, self.mlp_dim, name=f"block_{layer}")(
                tokens, condition
            )
        shift, scale = _modulation(condition, width, 2)
        tokens = _norm(tokens) * (1 + scale) + shift
        velocity = nn.Dense(
            channels, kernel_init=nn.initializers.zeros, name="velocity"
        )(tokens)
        return velocity.reshape(x.shape)


class Block(nn.Module):
    """Attention and MLP with adaLN-zero: tokens (B, N, D), condition (B, D)."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x, condition):
        width = x.shape[-1]
        attention = MultiHeadDotProductAttention(
            self.num_heads, width // self.num_heads, name="attention"
        )
        mlp = MlpBlock(
            self.mlp_dim, gelu="tanh", dropout_rate=0.0, dtype=jnp.float32, name="mlp"
        )
        values = _modulation(condition, width, 6)
        shift, scale, gate = values[:3]
        x = x + gate * attention(_norm(x) * (1 + scale) + shift)
        shift, scale, gate = values[3:]
        return x + gate * mlp(_norm(x) * (1 + scale) + shift, train=False)


def _norm(x):
    """Layer normalization without parameters."""
    norm = nn.LayerNorm(use_bias=False, use_scale=False, use_fast_variance=False)
    return norm(x)


def _modulation(condition, width, number):
    """`number` linear maps of the condition (B, D) that start at zero, (B, 1, D)."""
    values = nn.Dense(
        number * width, kernel_init=nn.initializers.zeros, name="modulation"
    )(condition)
    return jnp.split(values[:, None], number, axis=-1)


def _waves(time):
    """Sines and cosines of the time (B,), with periods from short to long."""
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(NUM_WAVES) / NUM_WAVES)
    angles = _TIME_SCALE * time[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
