"""functa.compression: the quantizer and the probabilities of its symbols."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functa import compression


def correlated_grids(num, grid, num_channels, seed=0):
    """Latents (N, h, w, C) in which each cell is 0.45 left + 0.45 upper + noise."""
    rng = np.random.default_rng(seed)
    latents = np.zeros((num, grid[0] + 1, grid[1] + 1, num_channels))
    scale = np.linspace(0.5, 2.0, num_channels)
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        noise = scale * rng.normal(size=(num, num_channels))
        latents[:, i + 1, j + 1] = (
            0.45 * latents[:, i, j + 1] + 0.45 * latents[:, i + 1, j] + noise
        )
    return latents[:, 1:, 1:], scale


def test_the_error_is_at_most_half_a_step():
    rng = np.random.default_rng(0)
    latents = rng.normal(3.0, 2.0, (50, 2, 3, 4)).astype(np.float32)
    mean, steps = latents.mean((0, 1, 2)), np.array([0.1, 0.5, 1.0, 7.0])
    symbols = compression.quantize(latents, mean, steps)
    decoded = compression.dequantize(symbols, mean, steps)
    assert symbols.dtype == np.int32 and decoded.dtype == np.float32
    # The last digits of float32 at a magnitude of 10.
    assert np.all(np.abs(decoded - latents) <= steps / 2 + 2e-6)
    assert np.any(np.abs(decoded - latents) > 0.49 * steps, axis=(0, 1, 2)).all()
    tiny = compression.dequantize(
        compression.quantize(latents, mean, 1e-7 * steps), mean, 1e-7 * steps
    )
    np.testing.assert_allclose(tiny, latents, atol=2e-6)


def test_steps_that_need_more_than_31_bits_are_refused():
    with pytest.raises(ValueError, match="steps of 1e-10 are too small"):
        compression.quantize(np.ones((1, 2)), np.zeros(2), np.array([1.0, 1e-10]))


@pytest.mark.parametrize(
    ("latent", "step", "message"),
    [
        (np.nan, 1.0, "latents must be finite"),
        (np.inf, 1.0, "latents must be finite"),
        (1.0, 0.0, "steps must be positive and finite, got 0 to 1"),
        (1.0, -2.0, "steps must be positive and finite, got -2 to 1"),
        (1.0, np.inf, "steps must be positive and finite, got 1 to inf"),
        (1.0, np.nan, "steps must be positive and finite"),
    ],
)
def test_what_has_no_symbols_is_refused(latent, step, message):
    with pytest.raises(ValueError, match=message):
        compression.quantize(np.full((1, 2), latent), np.zeros(2), np.array([1, step]))


def test_shrunk_symbols_are_the_means_of_their_values():
    rng = np.random.default_rng(0)
    latents = rng.laplace(0.0, 1.0, (40000, 2)) * np.array([1.0, 0.01])
    mean, steps = np.zeros(2), np.array([1.5, 1.0])
    shrink = compression.fit_shrink(latents, mean, steps)
    # In an interval of width w the mean of an exponential distribution of rate 1 lies
    # 1 - w / (exp(w) - 1) behind its start; the second channel has only zeros.
    expected = 0.5 - (1 - 1.5 / np.expm1(1.5)) / 1.5
    np.testing.assert_allclose(shrink, [expected, 0.0], atol=0.01)
    symbols = compression.quantize(latents, mean, steps)
    errors = [
        np.square(compression.dequantize(symbols, mean, steps, shift) - latents)[:, 0]
        for shift in (0.0, shrink, 2 * shrink)
    ]
    assert errors[1].mean() < min(errors[0].mean(), errors[2].mean())


def test_slopes_are_the_squares_of_the_jacobian():
    matrix = jax.random.normal(jax.random.key(0), (24, 2, 3, 4))
    matrix *= jnp.array([0.1, 1.0, 2.0, 5.0]).reshape(1, 1, 1, 4)
    latents = jax.random.normal(jax.random.key(1), (2, 2, 3, 4))

    def angles(z):
        return jnp.tensordot(matrix, z, axes=3)

    cosines = np.cos(jax.vmap(angles)(latents))[..., None, None, None]
    # Summed over the predicted values, and the mean over signals and cells.
    expected = np.square(cosines * matrix[None]).sum(1).mean((0, 1, 2))
    slopes = jax.jit(
        lambda key: compression.slopes(
            key, lambda z: jnp.sin(angles(z)), latents, num_probes=2000
        )
    )(jax.random.key(2))
    # 24,000 squares for each channel; those of one probe are correlated.
    np.testing.assert_allclose(slopes, expected, rtol=0.05)


def test_equal_slopes_share_the_error_of_the_signal():
    """For a linear field the squared error is the number of values times D^2 / 12."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 4)) * np.array([0.1, 1.0, 3.0, 10.0])
    slopes = np.square(matrix).sum(0)
    steps = 0.05 / np.sqrt(slopes)
    latents = rng.normal(size=(4000, 4))
    symbols = compression.quantize(latents, np.zeros(4), steps)
    error = (compression.dequantize(symbols, np.zeros(4), steps) - latents) @ matrix.T
    expected = 4 * 0.05**2 / 12
    assert np.square(error).sum(1).mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("family", compression.FAMILIES)
@pytest.mark.parametrize("predict", [False, True])
def test_ideal_bits_are_those_of_a_loop(family, predict):
    latents, _ = correlated_grids(30, (3, 2), 2)
    symbols = compression.quantize(latents, np.zeros(2), np.array([0.7, 1.1]))
    model = compression.fit_entropy_model(
        symbols, family=family, predict=predict, num_groups=3
    )
    num_groups = len(model.thresholds) + 1
    num_phases = 4 if predict else 1
    assert 1 < num_groups <= 3
    assert len(model.tables) == 2 * num_groups * num_phases
    np.testing.assert_allclose(np.float64(model.tables).sum(-1), 1, rtol=1e-5)
    bits = []
    for grid in symbols.tolist():
        total, residuals = 0.0, {}
        for i, j in itertools.product(range(3), range(2)):
            before = [(i, j - 1), (i - 1, j), (i - 1, j - 1)]
            known = [grid[a][b] if a >= 0 and b >= 0 else [0, 0] for a, b in before]
            size = sum(residuals.get(place, 0) for place in before)
            group = sum(int(size > t) for t in model.thresholds)
            residuals[i, j] = 0
            for c in range(2):
                predicted = sum(
                    value * int(model.weights[2 * k + b, c])
                    for k, cell in enumerate(known)
                    for b, value in enumerate(cell)
                )
                base = math.floor(predicted / 1024)
                phase = math.floor((predicted / 1024 - base) * num_phases)
                row = (c * num_groups + group) * num_phases + phase
                residual = grid[i][j][c] - base - int(model.low)
                total -= math.log2(model.tables[row, residual])
                nearest = math.floor(predicted / 1024 + 0.5)
                residuals[i, j] += abs(grid[i][j][c] - nearest)
        bits.append(total)
    np.testing.assert_allclose(compression.ideal_bits(model, symbols), bits, rtol=1e-9)


@pytest.mark.parametrize("family", compression.FAMILIES)
def test_bits_of_a_gaussian_source_obey_reverse_water_filling(family):
    rng = np.random.default_rng(0)
    std = np.array([0.4, 1.0, 2.0, 5.0])
    train, test = (std * rng.normal(size=(n, 4)) for n in (20000, 4000))
    for step in (0.2, 1.5):
        steps = np.full(4, step)
        symbols = [compression.quantize(x, np.zeros(4), steps) for x in (train, test)]
        model = compression.fit_entropy_model(symbols[0], family=family)
        rate = compression.ideal_bits(model, symbols[1]).mean()
        error = compression.dequantize(symbols[1], np.zeros(4), steps) - test
        mse = np.square(error).mean(0)
        # The least rate for these errors, 0 for a channel that is not worth a bit.
        least = np.maximum(0.5 * np.log2(np.square(std) / mse), 0).sum()
        assert rate > least
        # With fine steps a uniform quantizer needs 0.254 bits per number more (Gish and
        # Pierce 1968), and the model of another distribution up to 0.1 bits. With 4,000
        # samples the mean has a standard error of 0.01 bits per number.
        if step == 0.2:
            assert rate < least + 4 * (0.29 + 0.1 * (family == "laplace"))


def test_prediction_reaches_the_conditional_variance():
    train, scale = correlated_grids(1500, (4, 4), 3)
    test, _ = correlated_grids(300, (4, 4), 3, seed=1)
    steps = np.full(3, 0.2)
    symbols = [compression.quantize(x, np.zeros(3), steps) for x in (train, test)]
    error = compression.dequantize(symbols[1], np.zeros(3), steps) - test
    least = (
        16 * 0.5 * np.log2(np.square(scale) / np.square(error).mean((0, 1, 2))).sum()
    )
    rates = {}
    for predict in (False, True):
        model = compression.fit_entropy_model(
            symbols[0], predict=predict, family="gaussian", num_groups=1
        )
        rates[predict] = compression.ideal_bits(model, symbols[1]).mean()
    # 48 numbers; fine steps cost 0.254 bits, four phases and the border a little more.
    assert least < rates[True] < least + 48 * 0.30
    assert rates[False] > rates[True] + 48 * 0.1


def test_groups_find_signals_of_other_scales():
    rng = np.random.default_rng(0)
    scale = np.array([0.5, 8.0])[rng.integers(0, 2, 800)]
    latents = scale[:, None, None, None] * rng.normal(size=(800, 4, 4, 2))
    symbols = compression.quantize(latents, np.zeros(2), np.ones(2))
    bits = {
        num: compression.ideal_bits(
            compression.fit_entropy_model(symbols[:600], num_groups=num), symbols[600:]
        ).mean()
        for num in (1, 4)
    }
    assert bits[4] < 0.93 * bits[1]


def test_one_channel_that_never_changes_costs_almost_nothing():
    symbols = np.zeros((200, 3, 3, 2), np.int32)
    symbols[..., 1] = np.random.default_rng(0).integers(0, 4, (200, 3, 3))
    model = compression.fit_entropy_model(symbols, predict=False, num_groups=1)
    assert compression.ideal_bits(model, symbols).mean() < 9 * (2 + 0.05)
    nothing = compression.fit_entropy_model(np.zeros((5, 2, 2, 1), np.int32))
    assert compression.ideal_bits(nothing, np.zeros((1, 2, 2, 1), np.int32)) < 0.5


def test_bits_at_psnr():
    at = compression.bits_at_psnr
    assert at([3.0, 1.0, 2.0], [33.0, 26.0, 29.0], 30.0) == pytest.approx(2.25)
    assert math.isnan(at([1.0, 2.0], [26.0, 29.0], 30.0))
    assert math.isnan(at([1.0, 2.0], [31.0, 32.0], 30.0))


def test_impossible_models_are_refused():
    symbols = np.zeros((3, 2), np.int32)
    with pytest.raises(ValueError, match="family must be one of .* got 'cauchy'"):
        compression.fit_entropy_model(symbols, family="cauchy")
    with pytest.raises(ValueError, match=r"needs symbols, got shape \(0, 2\)"):
        compression.fit_entropy_model(symbols[:0])
    symbols[0] = 10**6
    with pytest.raises(ValueError, match="the steps are too small: tables of 1,000,0"):
        compression.fit_entropy_model(symbols)
