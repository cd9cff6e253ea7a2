"""Quality of reconstructions: PSNR, SNR, and the overlap (IoU) of shapes.

The peak signal-to-noise ratio (PSNR) of a data set has two usual definitions: the mean
of the PSNRs of its signals (`mean_psnr`), and the PSNR of their mean error
(`psnr_of_mean`). Both use mean squared errors of signals in [0, 1] (peak 1). The
prediction is not clamped, as in google-deepmind/functa. By Jensen's inequality
`psnr_of_mean` is never greater than `mean_psnr`. If the PSNR of the signals has
standard deviation s dB, the difference is about 0.115 s^2 dB. State the definition with
every number.
"""

import jax
import jax.numpy as jnp


def psnr(mse: jax.Array) -> jax.Array:
    """Returns -10 log10(mse) in dB, elementwise.

    Args:
      mse: mean squared errors of signals in [0, 1], any shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa import psnr
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
      >>> from functa import mean_psnr, psnr_of_mean
      >>> print(f"{mean_psnr(jnp.array([0.1, 0.001])):.1f}")
      20.0
      >>> print(f"{psnr_of_mean(jnp.array([0.1, 0.001])):.1f}")
      13.0
    """
    return jnp.mean(psnr(mse))


def psnr_of_mean(mse: jax.Array) -> jax.Array:
    """Returns the PSNR of the mean of the errors `mse` (B,); scalar, in dB."""
    return psnr(jnp.mean(mse))


def snr(power: jax.Array, mse: jax.Array) -> jax.Array:
    """Signal-to-noise ratio of a data set, 10 log10(mean(power) / mean(mse)) in dB.

    The means are over the signals, so that a loud one counts as much as its power.

    Args:
      power: mean squared deviation of each signal from the mean of all, (B,).
      mse: mean squared error of each signal, (B,).

    Returns:
      Scalar. A reconstruction that is constant and correct on average has 0 dB.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa.metrics import snr
      >>> print(snr(jnp.array([3.0, 1.0]), jnp.array([0.01, 0.03])))
      20.0
    """
    return 10 * jnp.log10(jnp.mean(power) / jnp.mean(mse))


def iou(prediction: jax.Array, target: jax.Array, *, threshold: float = 0.5):
    """Intersection over union of the points above a threshold, of each signal.

    Args:
      prediction: (B, ...).
      target: (B, ...).
      threshold: a point belongs to a shape if its value is above it.

    Returns:
      (B,); 1 if both shapes are empty.

    Example:
      >>> import jax.numpy as jnp
      >>> from functa.metrics import iou
      >>> print(iou(jnp.array([[0.9, 0.8, 0.1]]), jnp.array([[1.0, 0.0, 0.0]])))
      [0.5]
    """
    axes = tuple(range(1, prediction.ndim))
    a, b = prediction > threshold, target > threshold
    both, either = (a & b).sum(axes), (a | b).sum(axes)
    return jnp.where(either == 0, 1.0, both / jnp.maximum(either, 1))
