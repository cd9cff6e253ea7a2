"""functa.generation against closed forms, double loops and a simulation."""

import jax
import numpy as np
import pytest

from functa import generation

RNG = np.random.default_rng(0)


def with_moments(num, mean, covariance):
    """Features whose mean and covariance (divided by N - 1) are exactly these."""
    x = RNG.normal(size=(num, len(mean)))
    x -= x.mean(0)
    own = np.linalg.cholesky(x.T @ x / (num - 1))
    return mean + x @ np.linalg.inv(own).T @ np.linalg.cholesky(covariance).T


def test_frechet_distance_of_two_gaussians():
    means = np.array([1.0, 2.0]), np.array([-0.5, 2.5])
    a, b = np.array([[2.0, 0.6], [0.6, 0.5]]), np.array([[0.7, -0.4], [-0.4, 1.5]])
    # For 2 x 2 matrices tr (ab)^(1/2) = sqrt(tr ab + 2 sqrt(det ab)).
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = 1.5**2 + 0.5**2 + np.trace(a) + np.trace(b) - 2 * overlap
    found = generation.frechet_distance(
        with_moments(30, means[0], a), with_moments(20, means[1], b)
    )
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_a_distance_that_rotations_keep():
    a, b = RNG.normal(size=(40, 5)), 2 * RNG.normal(size=(30, 5)) + 1
    rotation, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    found = generation.frechet_distance(a, b)
    assert generation.frechet_distance(b, a) == pytest.approx(found)
    assert generation.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(
        found
    )
    assert generation.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # Fewer signals than features: the covariances are singular.
    few = RNG.normal(size=(4, 9))
    assert generation.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert generation.frechet_distance(few, few + 1) == pytest.approx(9)


def brute_kernel_distance(a, b):
    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    def within(x):
        pairs = [
            kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j
        ]
        return np.mean(pairs)

    return within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_kernel_distance_against_a_double_loop():
    a, b = RNG.normal(size=(7, 3)), RNG.normal(size=(9, 3)) + 0.5
    mean, error = generation.kernel_distance(a, b)
    assert mean == pytest.approx(brute_kernel_distance(a, b)) and np.isnan(error)
    mean, error = generation.kernel_distance(a, b, num_blocks=3)
    # Two and three rows a block; the last of a is left out.
    parts = [
        brute_kernel_distance(a[2 * i : 2 * i + 2], b[3 * i : 3 * i + 3])
        for i in range(3)
    ]
    assert mean == pytest.approx(np.mean(parts))
    assert error == pytest.approx(np.std(parts, ddof=1) / np.sqrt(3))
    with pytest.raises(ValueError, match="4 parts need at least two rows each; .* 7"):
        generation.kernel_distance(a, b, num_blocks=4)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    a, b = RNG.normal(size=(2, 1000, 4))
    mean, error = generation.kernel_distance(a, b, num_blocks=20)
    assert abs(mean) < 4 * error
    mean, error = generation.kernel_distance(a, b + 0.5, num_blocks=20)
    assert mean > 4 * error


def test_density_and_coverage_of_three_points():
    real = np.array([[0.0], [1.0], [3.0]])  # balls of radius 1, 1 and 2 for k = 1
    fake = np.array([[0.5], [2.5], [100.0], [-0.5]])
    density, coverage = generation.density_and_coverage(real, fake, num_neighbors=1)
    # 0.5 lies in two balls, 2.5 and -0.5 in one each.
    assert density == pytest.approx(4 / 4) and coverage == 1
    _, coverage = generation.density_and_coverage(real, fake[2:], num_neighbors=1)
    assert coverage == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="3 neighbors need more real signals than 3"):
        generation.density_and_coverage(real, fake, num_neighbors=3)


def test_density_and_coverage_against_loops(monkeypatch):
    # Several blocks of rows.
    monkeypatch.setattr(generation, "_BLOCK_VALUES", 60)
    real, fake, k = RNG.normal(size=(13, 2)), RNG.normal(size=(17, 2)) + 0.3, 4
    count, covered = 0, 0
    for x in real:
        radius = sorted(np.linalg.norm(x - y) for y in real)[k]
        inside = sum(np.linalg.norm(x - y) < radius for y in fake)
        count += inside
        covered += inside > 0
    density, coverage = generation.density_and_coverage(real, fake, num_neighbors=k)
    assert density == pytest.approx(count / (k * len(fake)))
    assert coverage == pytest.approx(covered / len(real))


def test_expected_coverage_is_that_of_a_simulation():
    found = [
        generation.density_and_coverage(*RNG.normal(size=(2, 40, 3)), num_neighbors=3)
        for _ in range(200)
    ]
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(200)
    expected = generation.expected_coverage(40, 40, num_neighbors=3)
    assert abs(mean[1] - expected) < 4 * error[1] and 0.85 < expected < 0.92
    assert abs(mean[0] - 1) < 4 * error[0]


def test_nearest_distances_against_loops(monkeypatch):
    monkeypatch.setattr(generation, "_BLOCK_VALUES", 30)
    x, reference = RNG.random((7, 2, 3, 1)), RNG.random((11, 2, 3, 1))
    reference[4] = x[2]
    distances, indices = generation.nearest_distances(x, reference)
    for row, distance, index in zip(x, distances, indices, strict=True):
        every = [np.linalg.norm(row - other) for other in reference]
        assert index == np.argmin(every)
        # The difference of squares loses half of the digits near zero.
        assert distance == pytest.approx(min(every), abs=1e-7)
    assert indices[2] == 4


def test_gaussian_has_the_moments_of_the_latents():
    latents = RNG.normal(size=(6, 2, 2, 3)) + np.arange(3)  # of rank 5
    drawn = generation.sample_gaussian(jax.random.key(0), latents, 20000)
    assert drawn.shape == (20000, 2, 2, 3) and drawn.dtype == np.float32
    flat, vectors = drawn.reshape(20000, -1), latents.reshape(6, -1)
    np.testing.assert_allclose(flat.mean(0), vectors.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(flat.T), np.cov(vectors.T), atol=0.1)
    # Nothing is drawn outside of the span of the latents.
    basis = np.linalg.svd(vectors - vectors.mean(0))[2][5:]
    assert np.abs((flat - vectors.mean(0)) @ basis.T).max() < 1e-4


@pytest.mark.parametrize("features", [np.ones((1, 3)), np.full((4, 3), np.nan)])
def test_moments_that_do_not_exist_are_refused(features):
    with pytest.raises(ValueError, match="at least two rows of finite features"):
        generation.frechet_distance(np.ones((4, 3)), features)


@pytest.mark.parametrize("bad", [np.full((4, 3), np.nan), np.zeros((0, 3))])
def test_distances_that_do_not_exist_are_refused(bad):
    # Nothing is less than nan: the coverage would be 0 without a warning.
    with pytest.raises(ValueError, match="distances need finite features"):
        generation.density_and_coverage(np.eye(3), bad, num_neighbors=1)
    with pytest.raises(ValueError, match="distances need finite features"):
        generation.nearest_distances(np.eye(3), bad)


def test_numbers_of_parts_and_neighbors_are_positive():
    with pytest.raises(ValueError, match="num_blocks must be >= 1, got 0"):
        generation.kernel_distance(np.eye(3), np.eye(3), num_blocks=0)
    with pytest.raises(ValueError, match="num_neighbors must be >= 1, got 0"):
        generation.density_and_coverage(np.eye(3), np.eye(3), num_neighbors=0)
