"""The peer of curvature in the benchmark: the same problem, the same eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.configs import benchmark as configs
from experiments.peers import pyhessian_eigenvalues as peer

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


def test_path_finds_the_eigenvalues_of_the_problem():
    config = configs.get_config("curvature")
    config.sizes.eigenvalues.update(**SIZES, num=3, num_steps=30)
    path = benchmark.make_path(config, "eigenvalues")
    _, (values, residuals) = jax.jit(path.step)(path.state, *path.inputs)
    expected = np.linalg.eigvalsh(hessian_of(*peer.make_problem(**SIZES)))[::-1]
    np.testing.assert_allclose(values, expected[:3], rtol=1e-3)
    assert max(residuals) <= 1e-2 * values[0] and path.units == 20
    config.sizes.eigenvalues.num_steps = 4
    with pytest.raises(ValueError, match="num_steps must be larger"):
        benchmark.make_path(config, "eigenvalues")


def test_lines_of_the_peer_are_read():
    text = "torch width=6 depth=2 B=20: eigenvalues 0.5000s, residual 1e-3, 2.1 1.0\n"
    assert benchmark.PEERS["pyhessian_eigenvalues.py"](text) == {
        "width=6 depth=2 B=20": 40.0
    }


def test_pyhessian_finds_the_same():
    pytest.importorskip("torch")
    pytest.importorskip("pyhessian")
    weights, inputs, labels = peer.make_problem(**SIZES)
    _, values, residual = peer.find_eigenvalues(
        weights, inputs, labels, num=3, tolerance=1e-2
    )
    expected = np.linalg.eigvalsh(hessian_of(weights, inputs, labels))[::-1]
    np.testing.assert_allclose(values, expected[:3], rtol=2e-2)
    assert residual <= 1e-2
