"""DeepLinear: against NumPy, parameter counts, statistics, bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks.deep_linear import DeepLinear

pytestmark = pytest.mark.usefixtures("unoptimized")


def random_variables(model, key):
    """Variables with every entry random, variances positive."""
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 2, 3)))
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        0.5 + jax.random.uniform(k, leaf.shape)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_matches_numpy(batch_norm, train):
    model = DeepLinear(depth=3, width=5, num_classes=4, batch_norm=batch_norm)
    variables = random_variables(model, jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (7, 2, 3))
    outputs, _ = model.apply(variables, inputs, train=train, mutable=["batch_stats"])
    x = np.asarray(inputs, np.float64).reshape(7, 6)
    variables = jax.tree.map(np.asarray, variables)
    params = variables["params"]
    for number in (1, 2, 3):
        layer = params[f"fc{number}"]
        x = x @ layer["kernel"] + layer["bias"]
        if batch_norm and number < 3:
            stats = variables["batch_stats"][f"bn{number}"]
            mean, var = stats["mean"], stats["var"]
            if train:
                mean, var = x.mean(0), x.var(0)
            bn = params[f"bn{number}"]
            x = (x - mean) / np.sqrt(var + 1e-5) * bn["scale"] + bn["bias"]
    np.testing.assert_allclose(outputs, x, rtol=2e-4, atol=2e-4)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_parameter_counts(batch_norm):
    model = DeepLinear(depth=5, width=16, batch_norm=batch_norm)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 7, 7)))
    # 49 inputs, three hidden layers of 16 behind the first, ten outputs.
    expected = 50 * 16 + 3 * 17 * 16 + 17 * 10 + batch_norm * 4 * 2 * 16
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected


def test_it_is_linear_in_its_inputs():
    model = DeepLinear(depth=4, width=6, batch_norm=False)
    variables = random_variables(model, jax.random.key(2))
    a, b = jax.random.normal(jax.random.key(3), (2, 5, 2, 3))
    apply = lambda x: model.apply(variables, x)  # noqa: E731
    np.testing.assert_allclose(
        apply(0.25 * a + 0.75 * b), 0.25 * apply(a) + 0.75 * apply(b), rtol=1e-5
    )


def test_depth_out_of_range_is_refused():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        DeepLinear(depth=0).init(jax.random.key(0), jnp.zeros((1, 4)))
