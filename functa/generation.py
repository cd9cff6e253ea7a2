"""Measures of generated signals, from features of generated and of real ones.

* `frechet_distance`: between the Gaussians of two sets (Heusel et al. 2017, arXiv
  1706.08500).
* `kernel_distance`: the squared maximum mean discrepancy (Binkowski et al. 2018, arXiv
  1801.01401).
* `density_and_coverage`: of the real set by the generated one (Naeem et al. 2020, arXiv
  2002.09797).
* `nearest_distances`: to the closest signal of another set, which shows memorization.

The published FID and KID are these measures on features of Inception. With other
features the numbers are others. Compare them only with numbers on the same features and
of as many signals, because the Frechet distance depends on the number of signals.
`sample_gaussian` makes the control that a generative model has to surpass.

The code runs in NumPy and in float64. Axes: N, M signals, D features.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np

# Numbers in a block of distances: 64 MiB.
_BLOCK_VALUES = 2**23


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    m and C are mean and covariance of the features, divided by N - 1.

    Args:
      a: features (N, D).
      b: features (M, D).

    Raises:
      ValueError: if a set has fewer than two rows or a value that is not finite.

    Example:
      >>> import numpy as np
      >>> from functa.generation import frechet_distance
      >>> a = np.random.default_rng(0).normal(size=(50, 3))
      >>> print(f"{frechet_distance(a, a + 2):.6f}")
      12.000000
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = map(_moments, (a, b))
    # tr (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2).
    root = _square_root(covariance_a) @ _square_root(covariance_b)
    overlap = np.linalg.svd(root, compute_uv=False).sum()
    difference = np.square(mean_a - mean_b).sum()
    return float(
        difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    )


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, num_blocks: int = 1
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased.

    The mean is zero for two sets of one distribution; a value may be negative.

    Args:
      a: features (N, D), in random order.
      b: features (M, D), in random order.
      num_blocks: number of parts of consecutive rows, each of which is measured. Every
        part needs two rows of both sets. A remainder is left out.

    Returns:
      The mean over the parts and its standard error, which is NaN for one part.

    Raises:
      ValueError: if `num_blocks` is not positive or there are too few rows.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be >= 1, got {num_blocks}.")
    sizes = [len(x) // num_blocks for x in (a, b)]
    if min(sizes) < 2:
        raise ValueError(
            f"{num_blocks} parts need at least two rows each; the sets have {len(a)} "
            f"and {len(b)}."
        )
    values = []
    for number in range(num_blocks):
        x, y = (
            np.float64(z[number * size : (number + 1) * size])
            for z, size in zip((a, b), sizes, strict=True)
        )
        within = [
            (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))
            for kernel in (_kernel(x, x), _kernel(y, y))
        ]
        values.append(sum(within) - 2 * _kernel(x, y).mean())
    error = np.std(values, ddof=1) / np.sqrt(num_blocks) if num_blocks > 1 else np.nan
    return float(np.mean(values)), float(error)


def density_and_coverage(
    real: np.ndarray, fake: np.ndarray, *, num_neighbors: int = 5
) -> tuple[float, float]:
    """Density and coverage of generated features among real ones.

    The ball around a real feature reaches to its k-th nearest real neighbor.

    Args:
      real: features (N, D), N > k.
      fake: features (M, D).
      num_neighbors: k.

    Returns:
      density: mean number of balls around a generated feature, divided by k; 1 on
        average for equal distributions.
      coverage: share of the balls with at least one generated feature; see
        `expected_coverage`.

    Raises:
      ValueError: if there are not more than k >= 1 real features, or a feature is not
        finite.
    """
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors must be >= 1, got {num_neighbors}.")
    if num_neighbors >= len(real):
        raise ValueError(
            f"{num_neighbors} neighbors need more real signals than {len(real)}."
        )
    # The nearest one is the signal itself.
    radius = np.concatenate(
        [
            np.partition(squares, num_neighbors, axis=1)[:, num_neighbors]
            for _, squares in _distances(real, real)
        ]
    )
    count = covered = 0
    for rows, squares in _distances(real, fake):
        inside = squares < radius[rows, None]
        count += inside.sum()
        covered += inside.any(1).sum()
    return float(count / (num_neighbors * len(fake))), float(covered / len(real))


def expected_coverage(num_real: int, num_fake: int, *, num_neighbors: int = 5) -> float:
    """Mean coverage of N signals by M others of the same distribution, in [0, 1].

    1 - prod_(i = 1..k) (N - i) / (N + M - i).

    Args:
      num_real: N.
      num_fake: M.
      num_neighbors: k, less than N.

    Example:
      >>> from functa.generation import expected_coverage
      >>> print(f"{expected_coverage(200, 200):.3f}")
      0.970
    """
    number = np.arange(1, num_neighbors + 1)
    missed = (num_real - number) / (num_real + num_fake - number)
    return float(1 - np.prod(missed))


def nearest_distances(
    x: np.ndarray, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of each row to the nearest row of another set.

    Args:
      x: (N, ...).
      reference: (M, ...).

    Returns:
      The distances (N,) and the indices of the nearest rows, (N,).

    Raises:
      ValueError: if `reference` is empty or a number is not finite.
    """
    x, reference = (
        np.reshape(values, (len(values), math.prod(values.shape[1:])))
        for values in (x, reference)
    )
    distances, indices = np.empty(len(x)), np.empty(len(x), np.int64)
    for rows, squares in _distances(x, reference):
        indices[rows] = squares.argmin(1)
        distances[rows] = np.sqrt(squares.min(1))
    return distances, indices


def sample_gaussian(key: jax.Array, latents: np.ndarray, num: int) -> np.ndarray:
    """Draws from the Gaussian with the mean and the whole covariance of latents.

    Args:
      key: PRNG key.
      latents: (N, *Z).
      num: number of samples.

    Returns:
      float32 (num, *Z).
    """
    mean, covariance = _moments(latents.reshape(len(latents), -1))
    noise = np.float64(jax.random.normal(key, (num, len(mean))))
    drawn = mean + noise @ _square_root(covariance)
    return np.float32(drawn).reshape(num, *latents.shape[1:])


def _moments(features):
    features = np.float64(features)
    if len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(
            "mean and covariance need at least two rows of finite features, got "
            f"{features.shape}."
        )
    mean = features.mean(0)
    centered = features - mean
    return mean, centered.T @ centered / (len(features) - 1)


def _square_root(covariance):
    """The symmetric root of a covariance; rounding may make eigenvalues negative."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields blocks of rows of x and their squared distances to all rows of y."""
    x, y = np.float64(x), np.float64(y)
    if not len(y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(
            "distances need finite features to compare with, got shapes "
            f"{x.shape} and {y.shape}."
        )
    squares = np.square(y).sum(1)
    size = max(_BLOCK_VALUES // len(y), 1)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        block = np.square(x[rows]).sum(1)[:, None] + squares - 2 * x[rows] @ y.T
        yield rows, np.maximum(block, 0)
