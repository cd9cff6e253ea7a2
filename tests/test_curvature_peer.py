"""The peer of curvature in the benchmark: the same problem, the same eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.configs import benchmark as configs
from experiments.peers import pyhessian_curvature as peer

pytestmark = pytest.mark.usefixtures("unoptimized")

SIZES = {"width": 6, "depth": 2, "batch_size": 20}


def hessian_of(weights, inputs, labels):
    """The explicit Hessian of the mean cross-entropy."""
    flat, unravel = jax.flatten_util.ravel_pytree(weights)

    def loss_fn(flat):
        *hidden, last = unravel(flat)
        x = inputs
        for kernel in hidden:
            x = jnp.tanh(x @ kernel)
        log_probs = jax.nn.log_softmax(x @ last)
        return -jnp.mean(log_probs[jnp.arange(len(labels)), labels])

    return jax.jit(jax.hessian(loss_fn))(flat)


def find(name, **options):
    """What a path of the variant curvature finds on the small problem."""
    config = configs.get_config("curvature")
    config.sizes[name].update(**SIZES, **options)
    path = benchmark.make_path(config, name)
    assert path.units == 20
    return jax.jit(path.step)(path.state, *path.inputs)[1]


@pytest.mark.slow
def test_paths_measure_the_hessian_of_the_problem():
    hessian = hessian_of(*peer.make_problem(**SIZES))
    expected = np.linalg.eigvalsh(hessian)[::-1]
    values, _, residuals = find("eigenvalues", num=3, num_steps=30)
    np.testing.assert_allclose(values, expected[:3], rtol=1e-3)
    assert max(residuals) <= 1e-2 * values[0]
    mean, error = find("trace", num=200)
    assert abs(mean - np.trace(hessian)) < 4 * error
    nodes, weights = find("density", num=50, num_steps=20)
    assert nodes.shape == (50, 20)
    # The second moment of the eigenvalues, a polynomial that the quadrature takes in.
    np.testing.assert_allclose(
        np.sum(weights * nodes**2), np.mean(expected**2), rtol=0.2
    )
    with pytest.raises(ValueError, match="num_steps must be larger"):
        find("eigenvalues", num=3, num_steps=4)


# PyHessian keeps the graph in torch's way of 2020.
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_pyhessian_finds_the_same():
    pytest.importorskip("torch")
    pytest.importorskip("pyhessian")
    problem = peer.make_problem(**SIZES)
    hessian = hessian_of(*problem)
    # PyHessian orders by magnitude.
    expected = sorted(np.linalg.eigvalsh(hessian), key=abs)[::-1]
    _, values, residual = peer.find_eigenvalues(*problem, num=3, tolerance=1e-2)
    np.testing.assert_allclose(values, expected[:3], rtol=2e-2)
    assert residual <= 1e-2
    _, mean, error = peer.estimate_trace(*problem, num=200)
    assert abs(mean - np.trace(hessian)) < 4 * error
