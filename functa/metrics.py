"""Peak signal-to-noise ratio (PSNR) of a data set, under its two usual definitions.

Both definitions use mean squared errors of signals in [0, 1] (peak 1). The prediction
is not clamped, as in google-deepmind/functa. By Jensen's inequality `psnr_of_mean` is
never greater than `mean_psnr`. If the PSNR of the signals has standard deviation s dB,
the difference is about 0.115 s^2 dB. State the definition with every number.
"""

import jax
import jax.numpy as jnp


def psnr(mse: jax.Array) -> jax.Array:
    """Returns -10 log10(mse) in dB, elementwise.

    Example:
      >>> import jax.numpy as jnp
      >>> print(psnr(jnp.array([0.1, 0.01])))
      [10. 20.]
    """
    return -10 * jnp.log10(mse)


def mean_psnr(mse: jax.Array) -> jax.Array:
    """Returns the mean of the PSNR of each signal, the definition of the Functa paper.

    Args:
      mse: mean squared error of each signal, (B,).

    Returns:
      Scalar, in dB.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{mean_psnr(jnp.array([0.1, 0.001])):.1f}")
      20.0
      >>> print(f"{psnr_of_mean(jnp.array([0.1, 0.001])):.1f}")
      13.0
    """
    return jnp.mean(psnr(mse))


def psnr_of_mean(mse: jax.Array) -> jax.Array:
    """Returns the PSNR of the mean of the errors `mse` (B,); scalar, in dB."""
    return psnr(jnp.mean(mse))
