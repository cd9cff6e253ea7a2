"""Compression of latents: a quantizer, and a model of the probabilities of its symbols.

A latent is a vector (C,) or a grid (h, w, C). Its entries become integers, and an
entropy coder turns the integers into bytes, given a probability for every symbol. This
module holds the quantizer and the probabilities. It writes no bytes: `code_cells` calls
a function for each cell, which encodes, decodes or measures.

* Quantizer: k = round((z - mean_c) / step_c), with one step per channel. Steps that are
  inversely proportional to the root of the mean squared derivative of the field give
  all channels the same share of the squared error of the signal (`slopes`).
* Probabilities: each symbol is predicted by a linear function of the symbols of the
  cells before it along each axis (for images left, upper, upper left). The residual
  has a table of probabilities. The table depends on the channel, on the size of the
  residuals of those cells, and on the fraction of the predicted value. A vector has no
  neighbors and one table per channel.

Everything is estimated from training latents only. COIN++ (Dupont et al. 2022, arXiv
2201.12904) quantizes latents with one step and reports the entropy of one distribution
for all entries. Prediction and tables that depend on the neighbors are those of
lossless image coders (LOCO-I; Weinberger et al. 2000).

A decoder must find the same tables as the encoder did. All that selects a table is
therefore exact: symbols and weights are integers, and the sums in float64 stay below
2^53.

Axes: N signals, (*grid) cells, C channels, K cells before a cell (2^d - 1 in d
dimensions), T tables, A symbols of a table.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from functa.varying import vary_like

FAMILIES = ("histogram", "laplace", "gaussian")
# Weights of the prediction are multiples of 2^-10.
_WEIGHT_BITS = 10
# The fraction of a predicted value is rounded down to a multiple of 1/4.
_NUM_PHASES = 4
# Signals in a block, which limits the memory.
_BLOCK = 500
# Scales of the distributions, in steps.
_SCALES = np.geomspace(0.02, 2000, 140)
# Weight, in symbols, of the Laplace distribution that smooths a histogram.
_PRIOR = 16.0
# Larger tables would take too much memory and time.
_MAX_SYMBOLS = 4096
# Share of a table that is the same for all symbols, so that each has a code.
_FLOOR = 2.0**-12


class EntropyModel(NamedTuple):
    """Probabilities of the symbols of latents.

    Attributes:
      weights: (K C, C), int32 multiples of 2^-10: the prediction of a cell from the
        symbols of the K cells before it.
      thresholds: (G - 1,), int32. The sum of the absolute residuals of the K cells
        selects one of G groups.
      tables: (C G F, A), float32: probabilities of the residuals low, ..., low + A - 1
        for each channel, group and fraction of the prediction.
      low: (), int32.
    """

    weights: np.ndarray
    thresholds: np.ndarray
    tables: np.ndarray
    low: np.ndarray


def quantize(latents: np.ndarray, mean: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Returns the symbols round((latents - mean) / steps), int32 (N, ..., C).

    Args:
      latents: (N, ..., C).
      mean: (C,).
      steps: (C,), positive.

    Raises:
      ValueError: if a latent or a step is not finite, a step is not positive, or a
        symbol does not fit 31 bits.

    Example:
      >>> import numpy as np
      >>> from functa.compression import dequantize, quantize
      >>> symbols = quantize(np.array([[0.24, -1.0]]), np.zeros(2), np.array([0.1, 1]))
      >>> print(symbols, dequantize(symbols, np.zeros(2), np.array([0.1, 1])))
      [[ 2 -1]] [[ 0.2 -1. ]]
    """
    smallest, largest = np.min(steps), np.max(steps)
    if not 0 < smallest <= largest < np.inf:
        raise ValueError(
            f"steps must be positive and finite, got {smallest:g} to {largest:g}."
        )
    if not np.isfinite(latents).all():
        raise ValueError("latents must be finite.")
    symbols = np.round((np.float64(latents) - mean) / np.float64(steps))
    if symbols.size and not np.abs(symbols).max() < 2**30:
        raise ValueError(
            f"steps of {np.min(steps):.3g} are too small for latents of up to "
            f"{np.abs(latents).max():.3g}: a symbol would need more than 31 bits."
        )
    return symbols.astype(np.int32)


def dequantize(
    symbols: np.ndarray,
    mean: np.ndarray,
    steps: np.ndarray,
    shrink: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Returns the latents mean + steps * (symbols - sign(symbols) * shrink).

    Args:
      symbols: integers, (N, ..., C).
      mean: (C,).
      steps: (C,).
      shrink: (C,) or a number, see `fit_shrink`. With 0 the error is at most half a
        step.

    Returns:
      float32 (N, ..., C).
    """
    values = symbols - np.sign(symbols) * np.float64(shrink)
    return np.float32(values * steps + mean)


def fit_shrink(latents: np.ndarray, mean: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """How much nearer to zero the values of a symbol are than the symbol, on average.

    Small values are more frequent than large ones, so the mean of the values that
    become k > 0 is less than k. Of all amounts that are equal for the symbols of a
    channel, this one has the least squared error.

    Args:
      latents: training latents, (N, ..., C).
      mean: (C,).
      steps: (C,).

    Returns:
      Mean of |k| - |(latents - mean) / steps| over the symbols k that are not zero,
      (C,); 0 without such symbols.
    """
    symbols = quantize(latents, mean, steps).reshape(-1, len(mean))
    values = (np.float64(latents).reshape(symbols.shape) - mean) / steps
    excess = np.sign(symbols) * (symbols - values)
    return excess.sum(0) / np.maximum(np.count_nonzero(symbols, axis=0), 1)


def slopes(
    key: jax.Array,
    field: Callable[[jax.Array], jax.Array],
    latents: jax.Array,
    *,
    num_probes: int = 1,
) -> jax.Array:
    """Mean squared derivative of a field in each channel of its latent.

    g_c = E |df / dz_c|^2, the mean over signals and cells of the squared norm of the
    derivative of all predicted values in one entry of channel c. An error e in each
    entry of the channel, independent of the others, changes the sum of the squared
    errors of the signal by g_c e^2 per cell. The norm is estimated with random signs v:
    E (J^T v)^2 is the diagonal of J^T J.

    Args:
      key: PRNG key.
      field: maps a latent (*grid, C) to a prediction.
      latents: (B, *grid, C), at which the derivatives are taken.
      num_probes: number of random signs per signal.

    Returns:
      (C,).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from functa.compression import slopes
      >>> field = lambda z: jnp.array([3.0, 1.0]) * z
      >>> print(slopes(jax.random.key(0), field, jnp.zeros((5, 2))))
      [9. 1.]
    """

    def mean(inputs):
        key, latent = inputs
        prediction, pullback = jax.vjp(field, latent)
        shape = (num_probes, *prediction.shape)
        signs = jax.random.rademacher(key, shape, prediction.dtype)
        signs = vary_like(signs, prediction)
        [gradients] = jax.vmap(pullback)(signs)  # (num_probes, *grid, C)
        return jnp.square(gradients).mean(range(gradients.ndim - 1))

    # One signal at a time, which limits the memory.
    keys = jax.random.split(key, len(latents))
    return jax.lax.map(mean, (keys, latents)).mean(0)


def fit_entropy_model(
    symbols: np.ndarray,
    *,
    family: str = "histogram",
    predict: bool = True,
    num_groups: int = 8,
) -> EntropyModel:
    """Fits the probabilities of symbols to those of training latents.

    Args:
      symbols: int32 (N, *grid, C).
      family: "laplace" and "gaussian" are discretized distributions of the residuals,
        whose scale has the greatest likelihood. "histogram" counts the residuals; the
        Laplace distribution with the weight of 16 symbols smooths the counts.
      predict: whether symbols are predicted from the cells before them.
      num_groups: G, the largest number of groups of cells by the size of the residuals
        before them; 1 does not distinguish them.

    Returns:
      The model. Its tables reach as far as the residuals of `symbols`, and one further.

    Raises:
      ValueError: if there are no symbols, if the family is unknown, or if the tables
        would be too large.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if not symbols.size:
        raise ValueError(f"an entropy model needs symbols, got shape {symbols.shape}.")
    num_channels = symbols.shape[-1]
    num_before = len(_offsets(symbols.ndim - 2))
    weights = np.zeros((num_before * num_channels, num_channels), np.int32)
    if predict and num_before:
        weights = _fit_weights(symbols)
    model = EntropyModel(
        weights, np.zeros(0, np.int32), np.zeros((0, 1)), np.array(0, np.int32)
    )
    thresholds = np.zeros(0, np.int32)
    if num_before and num_groups > 1:
        sizes = np.concatenate(
            [size.ravel() for *_, size in _predictions(model, symbols)]
        )
        shares = np.arange(1, num_groups) / num_groups
        thresholds = np.unique(np.quantile(sizes, shares, method="lower"))
    model = model._replace(thresholds=thresholds.astype(np.int32))
    # Residuals and their tables, block by block.
    low, high = np.inf, -np.inf
    for base, _, block, _ in _predictions(model, symbols):
        low = min(low, (block - base).min() - 1)
        high = max(high, (block - base).max() + 1)
    low, num_symbols = int(low), int(high - low + 1)
    if num_symbols > _MAX_SYMBOLS:
        raise ValueError(
            f"the steps are too small: tables of {num_symbols:,} symbols would be "
            f"needed, and at most {_MAX_SYMBOLS:,} are possible."
        )
    shape = (num_channels, len(thresholds) + 1, num_phases(model.weights), num_symbols)
    counts = np.zeros(np.prod(shape))
    for base, index, block, _ in _predictions(model, symbols):
        entry = index * num_symbols + (block - base - low).astype(np.int64)
        counts += np.bincount(entry.ravel(), minlength=len(counts))
    tables = _fit_tables(counts.reshape(shape), low, family)
    return model._replace(
        tables=np.float32(tables.reshape(-1, num_symbols)), low=np.int32(low)
    )


def code_cells(
    model: EntropyModel,
    num: int,
    grid: Sequence[int],
    code: Callable[[tuple[int, ...], np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Visits the cells of N signals in the order in which they are coded.

    This is row-major order. For each cell `code(cell, base, rows)` returns the
    symbols (N, C), integers from base + low on:

    * an encoder knows the symbols and encodes `symbols - base - low` with `rows`;
    * a decoder decodes this number with `rows`.

    Args:
      model: the probabilities.
      num: N.
      grid: number of cells along each axis; () for vectors.
      code: the function; `cell` is the index of the cell, `base` (N, C) the predicted
        symbols, int64, and `rows` (N, C) the rows of `model.tables`.

    Returns:
      The symbols, int32 (N, *grid, C).
    """
    num_channels = model.weights.shape[1]
    offsets = _offsets(len(grid))
    # One more cell on the low side of each axis, whose symbols are zero.
    shape = (num, *(n + 1 for n in grid), num_channels)
    symbols, sizes = np.zeros(shape, np.int32), np.zeros(shape[:-1], np.int64)
    for cell in np.ndindex(*grid):
        before = [
            (slice(None), *(i + 1 - n for i, n in zip(cell, offset, strict=True)))
            for offset in offsets
        ]
        values = np.zeros((num, 0), np.int32)
        if before:
            values = np.concatenate([symbols[place] for place in before], axis=-1)
        size = sum((sizes[place] for place in before), np.zeros(num, np.int64))
        nearest, base, rows = _select(model, values, size)
        own = (slice(None), *(i + 1 for i in cell))
        symbols[own] = code(cell, base, rows)
        sizes[own] = np.abs(symbols[own] - nearest).sum(-1)
    return symbols[(slice(None), *[slice(1, None)] * len(grid))]


def clip_residuals(
    model: EntropyModel, symbols: np.ndarray, base: np.ndarray
) -> np.ndarray:
    """Residuals from 0 to A - 1; symbols beyond the tables become their last ones.

    Args:
      model: the probabilities.
      symbols: int32 (..., C).
      base: the predicted symbols, int64 (..., C), see `code_cells`.

    Returns:
      int64 (..., C), the columns of `model.tables`.
    """
    return np.clip(symbols - base - model.low, 0, model.tables.shape[1] - 1)


def ideal_bits(model: EntropyModel, symbols: np.ndarray) -> np.ndarray:
    """Ideal code length of each signal, -sum log2 p, (N,).

    Args:
      model: the probabilities.
      symbols: int32 (N, *grid, C).

    Example:
      >>> import numpy as np
      >>> from functa.compression import fit_entropy_model, ideal_bits
      >>> symbols = np.array([[0], [0], [0], [1]] * 1000, np.int32)
      >>> model = fit_entropy_model(symbols)
      >>> print(ideal_bits(model, symbols[:4]).round(1))  # log2(4 / 3) and log2(4)
      [0.4 0.4 0.4 2. ]
    """
    bits = np.zeros(len(symbols))

    def code(cell, base, rows):
        residuals = clip_residuals(model, symbols[(slice(None), *cell)], base)
        bits[:] -= np.log2(np.float64(model.tables[rows, residuals])).sum(-1)
        return base + model.low + residuals

    code_cells(model, len(symbols), symbols.shape[1:-1], code)
    return bits


def num_phases(weights: np.ndarray) -> int:
    """F, number of fractions of the prediction that have their own tables.

    Args:
      weights: those of an `EntropyModel`; F is 1 if all are zero.
    """
    return _NUM_PHASES if weights.any() else 1


def bits_at_psnr(bits: Sequence[float], psnr: Sequence[float], target: float) -> float:
    """Bits at which a curve reaches a PSNR, by linear interpolation.

    Args:
      bits: of the points of the curve, (P,), in any order.
      psnr: of the same points, in dB, (P,).
      target: in dB.

    Returns:
      The bits; NaN if the curve does not reach the target on both sides.

    Example:
      >>> from functa.compression import bits_at_psnr
      >>> print(bits_at_psnr([1.0, 2.0, 3.0], [26.0, 29.0, 33.0], 30.0))
      2.25
    """
    order = np.argsort(psnr)
    return float(
        np.interp(
            target,
            np.asarray(psnr)[order],
            np.asarray(bits)[order],
            left=np.nan,
            right=np.nan,
        )
    )


def _offsets(rank):
    """The cells before a cell: 1 for each axis along which it is one further."""
    return list(itertools.product((0, 1), repeat=rank))[1:]


def _select(model, before, size):
    """The predicted symbols, rounded and rounded down, and the rows of the tables.

    Args:
      model: the probabilities.
      before: symbols of the cells before, (..., K C).
      size: sum of their absolute residuals, (...).

    Returns:
      int64 (..., C) each.
    """
    num_channels, num_fractions = model.weights.shape[1], num_phases(model.weights)
    # Exact: integers below 2^53.
    scaled = np.float64(before) @ np.float64(model.weights)
    scaled = scaled.astype(np.int64)  # in units of 2^-10
    base = scaled >> _WEIGHT_BITS
    nearest = (scaled + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS
    phase = (scaled - (base << _WEIGHT_BITS)) * num_fractions >> _WEIGHT_BITS
    group = np.searchsorted(model.thresholds, size, side="left")[..., None]
    num_groups = len(model.thresholds) + 1
    rows = (np.arange(num_channels) * num_groups + group) * num_fractions + phase
    return nearest, base, rows


def _predictions(
    model, symbols
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """For blocks of known symbols (n, *grid, C): base, rows, symbols, size before."""
    grid = symbols.shape[1:-1]
    for start in range(0, len(symbols), _BLOCK):
        block = symbols[start : start + _BLOCK]
        before = _shifted(block)
        size = np.zeros(block.shape[:-1], np.int64)
        nearest, _, _ = _select(model, before, size)
        own = np.abs(block - nearest).sum(-1, keepdims=True)
        if grid:
            size = _shifted(own).sum(-1)
        _, base, rows = _select(model, before, size)
        yield base, rows, block, size


def _shifted(values):
    """Values of the K cells before each cell, (n, *grid, K C); zero outside."""
    grid = values.shape[1:-1]
    padded = np.pad(values, [(0, 0), *[(1, 0)] * len(grid), (0, 0)])
    before = [
        padded[
            (
                slice(None),
                *(slice(1 - i, 1 - i + n) for i, n in zip(offset, grid, strict=True)),
            )
        ]
        for offset in _offsets(len(grid))
    ]
    if not before:
        return np.zeros((*values.shape[:-1], 0), values.dtype)
    return np.concatenate(before, axis=-1)


def _fit_weights(symbols):
    """Least squares of the symbols on those of the cells before, in units of 2^-10."""
    products, targets = 0.0, 0.0
    for start in range(0, len(symbols), _BLOCK):
        block = symbols[start : start + _BLOCK]
        before = np.float64(_shifted(block)).reshape(-1, block.shape[-1] * _num(block))
        products = products + before.T @ before
        targets = targets + before.T @ np.float64(block).reshape(len(before), -1)
    # A channel whose symbols are all zero has no equation.
    products += 1e-6 * np.trace(products) / len(products) * np.eye(len(products))
    if not products.any():
        return np.zeros(targets.shape, np.int32)
    weights = np.linalg.solve(products, targets)
    return np.round(weights * 2**_WEIGHT_BITS).astype(np.int32)


def _num(symbols):
    return len(_offsets(symbols.ndim - 2))


def _fit_tables(counts, low, family):
    """Probabilities (C, G, F, A) of residuals from `low` on from their counts."""
    *_, num_fractions, num_symbols = counts.shape
    center = [0.0]
    if num_fractions > 1:
        center = (np.arange(num_fractions) + 0.5) / num_fractions
    edges = low - 0.5 + np.arange(num_symbols + 1) - np.reshape(center, (-1, 1))
    scaled = edges / _SCALES[:, None, None]  # (scales, F, A + 1)
    cumulative = _laplace_cdf(scaled) if family != "gaussian" else _normal_cdf(scaled)
    cumulative[..., 0], cumulative[..., -1] = 0, 1
    shapes = (1 - _FLOOR) * np.diff(cumulative) + _FLOOR / num_symbols
    likelihood = np.einsum("cgfa,sfa->cgs", counts, np.log(shapes), optimize=True)
    tables = shapes[likelihood.argmax(-1)]
    if family == "histogram":
        total = counts.sum(-1, keepdims=True)
        tables = (counts + _PRIOR * tables) / (total + _PRIOR)
    return tables


def _laplace_cdf(x):
    tail = 0.5 * np.exp(-np.abs(x))
    return np.where(x > 0, 1 - tail, tail)


def _normal_cdf(x):
    return 0.5 + 0.5 * np.vectorize(math.erf)(x / math.sqrt(2))
