"""PSNR under its two definitions."""

import math
import statistics

import jax.numpy as jnp
import numpy as np

from functa import metrics


def test_psnr_closed_forms():
    mse = jnp.array([1.0, 0.1, 0.01, 4.0, 0.0])
    expected = [0.0, 10.0, 20.0, -20 * math.log10(2), math.inf]
    # Decimal logarithms in float32 round to about 1e-6 dB at these sizes.
    np.testing.assert_allclose(metrics.psnr(mse), expected, atol=1e-5)


def test_two_definitions_by_hand():
    mse = jnp.array([0.1, 0.001])
    np.testing.assert_allclose(metrics.mean_psnr(mse), 20.0, rtol=1e-6)
    expected = -10 * math.log10(0.0505)
    np.testing.assert_allclose(metrics.psnr_of_mean(mse), expected, rtol=1e-6)


def test_definitions_agree_for_equal_signals():
    mse = jnp.full(7, 0.003)
    # float32 sums of 7 equal terms round differently by about 1e-6 dB.
    np.testing.assert_allclose(
        metrics.mean_psnr(mse), metrics.psnr_of_mean(mse), rtol=1e-6
    )


def test_psnr_of_mean_is_never_above_mean_psnr():
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 3.0):
        mse = jnp.asarray(np.exp(spread * rng.normal(size=11)), jnp.float32)
        assert metrics.psnr_of_mean(mse) < metrics.mean_psnr(mse)


def test_gap_of_the_definitions_for_a_gaussian_spread():
    spread, num_signals = 3.0, 4001
    normal = statistics.NormalDist(25.0, spread)
    psnr = [normal.inv_cdf((i + 0.5) / num_signals) for i in range(num_signals)]
    mse = jnp.asarray([10 ** (-value / 10) for value in psnr])
    gap = metrics.mean_psnr(mse) - metrics.psnr_of_mean(mse)
    # Log-normal mean: ln(10) / 20 * spread^2; equal quantiles cut the tails by < 1%.
    np.testing.assert_allclose(gap, math.log(10) / 20 * spread**2, rtol=0.01)
