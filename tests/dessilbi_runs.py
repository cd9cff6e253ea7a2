"""Short trainings that the tests of DessiLBI share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbi

# Of `quadratic`, for `tensors`.
CURVATURE = {"conv": 0.5, "fc": 1.0, "bias": 2.0}


def tensors(seed=0):
    """A convolution kernel, a matrix and a bias; float32."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (2, 1, 3, 4), "fc": (5, 6), "bias": (4,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def coupling_of(opt_state):
    (state,) = lbi.find_states(opt_state)
    return state


def run(optimizer, params, grad_fn, num_steps):
    """((params, opt_state), (params, dual, Gamma) after each step, stacked).

    The gradient is grad_fn(params, number of updates so far).
    """

    def step(carry, count):
        params, opt_state = carry
        grads = grad_fn(params, count)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        dual = coupling_of(opt_state).dual
        return (params, opt_state), (params, dual, lbi.gamma(opt_state))

    @jax.jit
    def scan(params):
        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, jnp.arange(num_steps))

    return scan(params)


def quadratic(curvature, target):
    """The gradient of sum(curvature (W - target)^2) / 2, for `run`."""
    return lambda params, count: jax.tree.map(
        lambda p, c, t: c * (p - t), params, curvature, target
    )
