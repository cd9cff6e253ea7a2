"""The three networks against NumPy loops, published sizes and stated distributions."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import random_like

from functa import functaset
from functa.siren import (
    LatentModulatedSiren,
    ModulatedSiren,
    Siren,
    coordinate_grid,
    num_modulations,
)

pytestmark = pytest.mark.usefixtures("unoptimized")

GRIDS = {"1d": (5,), "2d": (4, 3), "3d": (2, 4, 3)}
# (modulate_scale, modulate_shift)
MODULATIONS = {"shift": (False, True), "scale": (True, False), "both": (True, True)}

grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
modulations = pytest.mark.parametrize(
    ("scale", "shift"), MODULATIONS.values(), ids=MODULATIONS.keys()
)


def init_arguments(model, grid):
    """What `model.init` takes after the key: coordinates, and a latent if any."""
    coords = jnp.asarray(coordinate_grid(grid))
    return (coords,) if isinstance(model, Siren) else (coords, model.initial_latent())


def random_params(model, grid):
    """(params, coords), without the cost of compiling the initialisers."""
    arguments = init_arguments(model, grid)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    return random_like(shapes["params"], seed=1, stddev=0.3), arguments[0]


def numpy_siren(params, coords, modulation, model):
    """float64, one point at a time; the modulation is read front to back."""
    values = []
    for point in np.reshape(np.float64(coords), (-1, coords.shape[-1])):
        x, position = point, 0
        for i in range(model.depth):
            kernel, bias = (
                np.float64(params[f"layer_{i}"][name]) for name in ("kernel", "bias")
            )
            x = np.array([x @ kernel[:, j] + bias[j] for j in range(kernel.shape[1])])
            if i == model.depth - 1:
                values.append(x + 0.5)
                break
            if modulation is not None and model.modulate_scale:
                x = x * modulation[position : position + model.width]
                position += model.width
            if modulation is not None and model.modulate_shift:
                x = x + modulation[position : position + model.width]
                position += model.width
            x = np.sin(model.omega_0 * x)
        assert modulation is None or position == len(modulation)
    return np.reshape(values, (*coords.shape[:-1], model.out_channels))


def numpy_latent_to_modulation(params, latent, model):
    x = np.float64(latent)
    for i in range(len(params)):
        x = x if i == 0 else np.maximum(x, 0)
        layer = params[f"linear_{i}"]
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    if model.modulate_scale:
        parts = 1 + model.modulate_shift
        x = x.reshape(model.depth - 1, parts, model.width)
        x[:, 0] += 1
    return x.ravel()


# Three sines of omega_0 * |W| of about 7 * 0.3 * sqrt(6) multiply float32 rounding
# errors of 1e-7 by up to 5^3; measured errors stay below 1e-5.
FORWARD_TOLERANCE = 2e-5
SIZES = {"width": 6, "depth": 4, "out_channels": 2, "omega_0": 7.0}


@pytest.mark.slow_after(1)
@grids
def test_siren_matches_numpy(grid):
    model = Siren(**SIZES)
    params, coords = random_params(model, grid)
    expected = numpy_siren(params, coords, None, model)
    actual = model.apply({"params": params}, coords)
    np.testing.assert_allclose(actual, expected, atol=FORWARD_TOLERANCE)


@grids
@modulations
def test_modulated_siren_matches_numpy(grid, scale, shift):
    model = ModulatedSiren(**SIZES, modulate_scale=scale, modulate_shift=shift)
    params, coords = random_params(model, grid)
    modulation = random_like(model.initial_latent(), seed=2, stddev=0.3)
    expected = numpy_siren(params, coords, np.float64(modulation), model)
    actual = model.apply({"params": params}, coords, modulation)
    np.testing.assert_allclose(actual, expected, atol=FORWARD_TOLERANCE)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "layer_sizes", [(), (7,), (7, 4)], ids=["linear", "mlp1", "mlp2"]
)
@modulations
def test_latent_modulated_siren_matches_numpy(layer_sizes, scale, shift):
    model = LatentModulatedSiren(
        **SIZES,
        latent_dim=5,
        layer_sizes=layer_sizes,
        modulate_scale=scale,
        modulate_shift=shift,
    )
    params, coords = random_params(model, GRIDS["2d"])
    latent = random_like(model.initial_latent(), seed=2, stddev=1.0)
    latent_map = params["latent_to_modulation"]
    assert len(latent_map) == len(layer_sizes) + 1
    modulation = numpy_latent_to_modulation(latent_map, latent, model)
    expected = numpy_siren(params, coords, modulation, model)
    actual = model.apply({"params": params}, coords, latent)
    np.testing.assert_allclose(actual, expected, atol=FORWARD_TOLERANCE)


@pytest.mark.slow_after(1)
@grids
def test_siren_init_is_uniform_within_its_bounds(grid):
    width, omega_0 = 64, 10.0
    model = Siren(width=width, depth=4, out_channels=5, omega_0=omega_0)
    params = jax.jit(model.init)(jax.random.key(0), *init_arguments(model, grid))[
        "params"
    ]
    later = math.sqrt(6 / width) / omega_0
    bounds = [1 / len(grid), later, later, later]
    for i, bound in enumerate(bounds):
        kernel = np.float64(params[f"layer_{i}"]["kernel"])
        n = kernel.size
        assert np.abs(kernel).max() <= bound
        # The largest of n uniform values misses the bound by about bound / n.
        assert np.abs(kernel).max() > bound * (1 - 10 / n)
        # Five standard errors of mean and variance of n uniform values.
        assert abs(kernel.mean()) < 5 * bound / math.sqrt(3 * n)
        assert abs(3 * np.mean(kernel**2) / bound**2 - 1) < 5 * math.sqrt(0.8 / n)
        assert not np.any(params[f"layer_{i}"]["bias"])
    hidden = [params[f"layer_{i}"]["kernel"] for i in (1, 2)]
    assert not np.array_equal(*hidden)


def test_latent_map_init_is_a_truncated_normal_without_variance_correction():
    model = LatentModulatedSiren(
        width=64, depth=2, latent_dim=25, layer_sizes=(49,), modulate_scale=True
    )
    variables = jax.jit(model.init)(jax.random.key(0), *init_arguments(model, (1, 1)))
    layers = variables["params"]["latent_to_modulation"]
    for name, fan_in in [("linear_0", 25), ("linear_1", 49)]:
        kernel = np.float64(layers[name]["kernel"]) * math.sqrt(fan_in)
        assert 1.9 < np.abs(kernel).max() <= 2.0  # cut at two deviations
        # 0.8796 is the deviation of a unit normal cut there. The standard error of a
        # deviation is about 0.6 / sqrt(n), n >= 1225; a corrected one would be 1.
        assert abs(kernel.std() - 0.8796) < 5 * 0.6 / math.sqrt(kernel.size)
        assert abs(kernel.mean()) < 5 * 0.88 / math.sqrt(kernel.size)
        assert not np.any(layers[name]["bias"])


def num_parameters(model, num_axes):
    arguments = init_arguments(model, (1,) * num_axes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("latent_dim", "num_axes", "out_channels", "published"),
    [
        (64, 2, 3, 3_883_651),
        (128, 2, 3, 4_342_531),
        (256, 2, 3, 5_260_291),
        (512, 2, 3, 7_095_811),
        (1024, 2, 3, 10_766_851),
        (128, 3, 4, 4_343_556),
    ],
)
def test_parameter_counts_of_the_paper(latent_dim, num_axes, out_channels, published):
    model = LatentModulatedSiren(
        width=512, depth=15, latent_dim=latent_dim, out_channels=out_channels
    )
    # The original keeps the latent and its rates, L each, among the parameters.
    assert num_parameters(model, num_axes) + 2 * latent_dim == published


def test_parameter_counts_without_a_latent():
    assert num_parameters(Siren(width=512, depth=15), 2) == 3_417_603
    # The modulation is an argument: the parameters are those of the plain SIREN.
    assert num_parameters(ModulatedSiren(width=512, depth=15), 2) == 3_417_603


@pytest.mark.parametrize("model_type", [ModulatedSiren, LatentModulatedSiren])
def test_number_of_modulations(model_type):
    latent_dim = {"latent_dim": 5} if model_type is LatentModulatedSiren else {}
    shift = model_type(width=7, depth=4, **latent_dim)
    both = model_type(width=7, depth=4, modulate_scale=True, **latent_dim)
    assert num_modulations(shift) == 21
    assert num_modulations(both) == 42
    assert both.initial_latent().shape == both.latent_shape
    assert both.latent_shape == ((5,) if latent_dim else (42,))


def test_coordinate_grid_has_cell_centres_in_ij_order():
    np.testing.assert_array_equal(coordinate_grid((2,)), [[0.25], [0.75]])
    expected = [
        [[0.25, 0.125], [0.25, 0.375], [0.25, 0.625], [0.25, 0.875]],
        [[0.75, 0.125], [0.75, 0.375], [0.75, 0.625], [0.75, 0.875]],
    ]
    np.testing.assert_array_equal(coordinate_grid((2, 4)), expected)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 5, 3), (2, 1, 4, 3)])
def test_coordinate_grid_of_any_dimension(shape):
    grid = coordinate_grid(shape)
    assert grid.dtype == np.float32
    assert grid.shape == (*shape, len(shape))
    for index in np.ndindex(*shape):
        centre = [(i + 0.5) / n for i, n in zip(index, shape, strict=True)]
        np.testing.assert_array_equal(grid[index], np.float32(centre))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (-2, 3), (2.5, 3)])
def test_empty_grid_is_refused(shape):
    with pytest.raises(ValueError, match="axes of positive whole size"):
        coordinate_grid(shape)


@grids
@modulations
def test_initial_modulation_changes_nothing(grid, scale, shift):
    model = ModulatedSiren(**SIZES, modulate_scale=scale, modulate_shift=shift)
    params, coords = random_params(model, grid)
    plain = Siren(**SIZES).apply({"params": params}, coords)
    modulated = model.apply({"params": params}, coords, model.initial_latent())
    # Multiplying by 1 and adding 0 are exact.
    chex.assert_trees_all_equal(modulated, plain)


@modulations
def test_initial_latent_changes_nothing_without_biases_in_its_map(scale, shift):
    model = LatentModulatedSiren(
        **SIZES,
        latent_dim=5,
        layer_sizes=(7,),
        modulate_scale=scale,
        modulate_shift=shift,
    )
    params, coords = random_params(model, GRIDS["2d"])
    for layer in params["latent_to_modulation"].values():
        layer["bias"] = jnp.zeros_like(layer["bias"])
    modulated = model.apply({"params": params}, coords, model.initial_latent())
    del params["latent_to_modulation"]
    plain = Siren(**SIZES).apply({"params": params}, coords)
    chex.assert_trees_all_equal(modulated, plain)


def test_fast_sine_agrees_with_the_exact_one():
    exact = LatentModulatedSiren(**SIZES, latent_dim=5)
    fast = LatentModulatedSiren(**SIZES, latent_dim=5, fast_sine=True)
    params, coords = random_params(exact, GRIDS["2d"])
    latent = random_like(exact.initial_latent(), seed=2, stddev=0.3)

    def value_and_grads(model):
        def loss_fn(params, latent):
            return jnp.mean(jnp.square(model.apply({"params": params}, coords, latent)))

        return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))(params, latent)

    # Errors of 1e-7 in a sine grow like the rounding errors above.
    chex.assert_trees_all_close(
        value_and_grads(fast), value_and_grads(exact), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "model",
    [
        Siren(width=6, depth=1),
        ModulatedSiren(width=6, depth=1),
        LatentModulatedSiren(width=6, depth=1, latent_dim=5),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_single_layer_is_refused(model):
    with pytest.raises(ValueError, match="depth"):
        random_params(model, GRIDS["2d"])


@pytest.mark.parametrize(
    "model",
    [
        ModulatedSiren(width=6, depth=3, modulate_shift=False),
        LatentModulatedSiren(width=6, depth=3, latent_dim=5, modulate_shift=False),
    ],
    ids=lambda model: type(model).__name__,
)
def test_no_modulation_is_refused(model):
    with pytest.raises(ValueError, match="set at least one"):
        random_params(model, GRIDS["2d"])


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (ModulatedSiren(width=6, depth=3), (6,)),
        (ModulatedSiren(width=6, depth=3), (1, 12)),
        (LatentModulatedSiren(width=6, depth=3, latent_dim=5), (4,)),
        (LatentModulatedSiren(width=6, depth=3, latent_dim=5), (2, 5)),
    ],
)
def test_a_latent_of_the_wrong_shape_is_refused(model, wrong):
    params, coords = random_params(model, GRIDS["2d"])
    with pytest.raises(AssertionError, match="has shape"):
        model.apply({"params": params}, coords, jnp.zeros(wrong))


@pytest.mark.parametrize("model_type", [Siren, ModulatedSiren, LatentModulatedSiren])
def test_old_name_of_derivative_dtype_works(model_type):
    sizes = {"width": 6, "depth": 3}
    if model_type is LatentModulatedSiren:
        sizes["latent_dim"] = 5
    expected = model_type(**sizes, derivative_dtype="bfloat16")
    with pytest.warns(DeprecationWarning, match="now derivative_dtype"):
        assert model_type(**sizes, dtype="bfloat16") == expected
    # Stored configs are loaded without a warning.
    config = {"type": model_type.__name__, **sizes}
    assert functaset.make_model(config | {"dtype": "bfloat16"}) == expected
    assert functaset.make_model(config | {"dtype": None}) == model_type(**sizes)
    both = {"dtype": "float32", "derivative_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="contradicts"):
        functaset.make_model(config | both)
