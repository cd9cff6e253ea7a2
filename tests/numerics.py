"""What many tests share: functions for few runs, random arrays, and a comparison."""

import jax
import numpy as np


def compiled(function):
    """For a few runs: compiling faster counts for more than running faster."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run(function, *arguments):
    return compiled(function)(*arguments)


def random_like(tree, seed=0, stddev=1.0):
    """Normal numbers in the shapes of a tree: no bias is zero, no scale is one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(0, stddev, x.shape)), tree)


def assert_close(actual, expected, tolerance=1e-5, name="the array"):
    """Largest error relative to the largest entry: a sum may cancel to almost zero."""
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
    assert error < tolerance, f"{name} is off by {error:.1e}"
