"""Peak signal-to-noise ratio, under the two definitions that the literature mixes.

Both take mean squared errors of signals in [0, 1] (peak 1) without clamping the
prediction, as google-deepmind/functa does. By Jensen's inequality `psnr_of_mean` is
never above `mean_psnr`; for images whose PSNR spreads by s dB the gap is about
0.115 s^2 dB, so a number is comparable only when its definition is named.
"""

import jax
import jax.numpy as jnp


def psnr(mse: jax.Array) -> jax.Array:
    """-10 log10(MSE) in dB, elementwise."""
    return -10 * jnp.log10(mse)


def mean_psnr(mse: jax.Array) -> jax.Array:
    """Mean over signals of each signal's PSNR; the definition of the Functa paper.

    Args:
      mse: mean squared error of each signal, (B,).

    Returns:
      dB, scalar.
    """
    return jnp.mean(psnr(mse))


def psnr_of_mean(mse: jax.Array) -> jax.Array:
    """PSNR of the mean squared error over all signals (B,); scalar, in dB."""
    return psnr(jnp.mean(mse))
