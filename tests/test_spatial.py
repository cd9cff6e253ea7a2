"""Grids of latents, against a global latent, image resizing and whole-signal fits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functa
from functa import inner_loop, spatial

pytestmark = pytest.mark.usefixtures("unoptimized")

COORDS = functa.coordinate_grid((6, 8))


def make(grid=(2, 4), channels=3, **fields):
    model = functa.SpatialSiren(
        width=5, depth=3, grid=grid, channels=channels, out_channels=2, **fields
    )
    init = jax.jit(model.init)
    params = init(jax.random.key(0), COORDS, model.initial_latent())["params"]
    latent = jax.random.normal(jax.random.key(1), model.latent_shape)
    return model, params, latent


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("interpolation", spatial.INTERPOLATIONS)
def test_a_grid_of_one_cell_is_a_latent_modulated_siren(interpolation, scale):
    model, params, latent = make(
        (1, 1), interpolation=interpolation, modulate_scale=scale
    )
    other = functa.LatentModulatedSiren(
        width=5,
        depth=3,
        latent_dim=3,
        out_channels=2,
        omega_0=10.0,
        modulate_scale=scale,
    )
    init = jax.jit(other.init)
    expected = init(jax.random.key(0), COORDS, other.initial_latent())["params"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(
        jax.jit(model.apply)({"params": params}, COORDS, latent),
        jax.jit(other.apply)({"params": params}, COORDS, latent[0, 0]),
    )


@pytest.mark.parametrize("scale", [False, True])
def test_nearest_evaluates_each_cell_by_itself(scale):
    model, params, latent = make(modulate_scale=scale)
    values = jax.jit(model.apply)({"params": params}, COORDS, latent)
    inside = functa.coordinate_grid((3, 2))
    apply_cell = jax.jit(model.cell().apply)
    for row in range(2):
        for column in range(4):
            alone = apply_cell(
                {"params": params}, inside, latent[row, column].reshape(1, 1, -1)
            )
            part = values[3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(part, alone, rtol=1e-5, atol=1e-5)


def test_the_ends_of_the_domain_belong_to_the_outer_cells():
    position, index = spatial._locate(jnp.array([[0.0, 1.0], [0.5, 0.25]]), (2, 4))
    np.testing.assert_array_equal(np.stack(index, -1), [[0, 3], [1, 1]])
    np.testing.assert_array_equal(position, [[0, 1], [0, 0]])


def test_bilinear_weights_are_those_of_image_resizing():
    values = jax.random.normal(jax.random.key(0), (3, 4, 5))
    coords = functa.coordinate_grid((12, 20))
    expected = jax.jit(jax.image.resize, static_argnums=(1, 2))(
        values, (12, 20, 5), "bilinear"
    )
    result = jax.jit(spatial._interpolate)(coords, values)
    np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize("grid", [(3,), (2, 3, 2)])
@pytest.mark.parametrize("interpolation", spatial.INTERPOLATIONS)
def test_any_number_of_axes(grid, interpolation):
    model = functa.SpatialSiren(
        width=4, depth=2, grid=grid, channels=2, interpolation=interpolation
    )
    coords = functa.coordinate_grid([4 * n for n in grid])
    latent = model.initial_latent()
    values, _ = jax.eval_shape(
        model.init_with_output, jax.random.key(0), coords, latent
    )
    assert values.shape == (*coords.shape[:-1], 3)


def test_a_latent_reaches_its_own_pixels_only():
    for interpolation, reach in ("nearest", 0), ("bilinear", 1):
        model, params, latent = make((6, 8), interpolation=interpolation)
        coords = functa.coordinate_grid((12, 16))
        apply = jax.jit(model.apply)
        before = apply({"params": params}, coords, latent)
        after = apply({"params": params}, coords, latent.at[2, 3].add(1.0))
        changed = np.argwhere(np.any(np.asarray(before != after), axis=-1))
        low, high = changed.min(0), changed.max(0)
        np.testing.assert_array_equal(low, [2 * 2 - reach, 2 * 3 - reach])
        np.testing.assert_array_equal(high, [2 * 2 + 1 + reach, 2 * 3 + 1 + reach])


def test_rolled_latents_give_a_rolled_image():
    model, params, latent = make((3, 4))
    coords = functa.coordinate_grid((6, 8))
    apply = jax.jit(lambda z: model.apply({"params": params}, coords, z))
    rolled = apply(jnp.roll(latent, (1, 2), (0, 1)))
    np.testing.assert_allclose(
        rolled, jnp.roll(apply(latent), (2, 4), (0, 1)), atol=1e-5
    )


def test_cells_are_cut_and_joined():
    signals = np.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    cells = spatial.split_cells(signals, (2, 4))
    np.testing.assert_array_equal(cells[1, 1, 2], signals[1, 3:6, 4:6])
    np.testing.assert_array_equal(spatial.join_cells(cells), signals)
    volumes = np.arange(2 * 4 * 6 * 2).reshape(2, 4, 6, 2, 1)
    cells = spatial.split_cells(volumes, (2, 3, 1))
    assert cells.shape == (2, 2, 3, 1, 2, 2, 2, 1)
    np.testing.assert_array_equal(spatial.join_cells(cells), volumes)


@pytest.mark.parametrize("grid", [(4, 4), (2,), (0, 4)])
def test_a_grid_that_does_not_divide_the_signals_is_refused(grid):
    with pytest.raises(ValueError, match=r"does not divide signals of \(6, 8\)"):
        spatial.split_cells(np.zeros((1, 6, 8, 3)), grid)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, bilinear"),
        ({"grid": (0, 2)}, "at least one cell"),
        ({"channels": 0}, "one channel"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize("fields", [{"interpolation": "bilinear"}, {"kernel_size": 3}])
def test_only_separate_cells_have_a_network_of_one_cell(fields):
    model, *_ = make(**fields)
    with pytest.raises(ValueError, match="are separate signals if interpolation is"):
        model.cell()
    with pytest.raises(ValueError, match="are separate signals if interpolation is"):
        spatial.layout(model, (6, 8), separate=True)


def set_kernel(params):
    """The parameters with weights of the neighbors that are not zero."""
    linear = params["latent_to_modulation"]
    kernel = jax.random.normal(jax.random.key(3), linear["kernel"].shape)
    return params | {"latent_to_modulation": linear | {"kernel": 0.2 * kernel}}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("grid", [(5,), (2, 4), (2, 3, 2)])
def test_a_kernel_is_a_convolution(grid):
    model = functa.SpatialSiren(width=4, depth=2, grid=grid, channels=3, kernel_size=3)
    latent = jax.random.normal(jax.random.key(1), model.latent_shape)
    to_modulation = spatial._make_map(model)
    params = jax.jit(to_modulation.init)(jax.random.key(0), latent)["params"]
    params = set_kernel({"latent_to_modulation": params})["latent_to_modulation"]
    axes = "DHW"[: len(grid)]
    expected = jax.lax.conv_general_dilated(
        latent[None],
        params["kernel"],
        (1,) * len(grid),
        "SAME",
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )[0]
    result = jax.jit(to_modulation.apply)({"params": params}, latent)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_new_kernel_is_the_map_of_single_latents():
    model, params, latent = make(kernel_size=3)
    single, others, _ = make()
    linear = others["latent_to_modulation"]["linear_0"]
    kernel = params["latent_to_modulation"]["kernel"]
    assert not jnp.any(kernel.at[1, 1].set(0))
    assert jnp.std(kernel[1, 1]) > 0
    linear = linear | {"kernel": kernel[1, 1]}
    others = others | {"latent_to_modulation": {"linear_0": linear}}
    np.testing.assert_allclose(
        jax.jit(model.apply)({"params": params}, COORDS, latent),
        jax.jit(single.apply)({"params": others}, COORDS, latent),
        atol=1e-6,
    )


@pytest.mark.parametrize("fields", [{"modulate_scale": True}, {"kernel_size": 3}])
def test_the_field_of_all_cells_is_that_of_the_whole_signal(fields):
    model, params, latent = make(**fields)
    if model.kernel_size > 1:
        params = set_kernel(params)
    view = spatial.layout(model, (6, 8), separate=False)
    cells = jax.jit(view.apply_fn)({"params": params}, view.coords, latent)
    assert cells.shape == (2, 4, 3, 2, 2)
    np.testing.assert_allclose(
        spatial.join_cells(cells[None])[0],
        jax.jit(model.apply)({"params": params}, COORDS, latent),
        atol=1e-5,
    )


@pytest.fixture
def problem(float64):
    """A model, its parameters, rates per step and channel, and three signals."""
    model, params, _ = make((2, 4))
    params = jax.tree.map(lambda x: jnp.float64(x), params)
    key_rates, key_signals = jax.random.split(jax.random.key(2))
    rates = jax.random.uniform(key_rates, (3, 3), minval=0.5, maxval=2.0)
    signals = jax.random.uniform(key_signals, (3, 6, 8, 2))
    return model, params, rates, signals


def centers(*shape):
    """`functa.coordinate_grid` in float64."""
    cells = np.moveaxis(np.indices(shape), 0, -1)
    return (cells + 0.5) / np.array(shape)


fit_grids = jax.jit(spatial.fit_grids, static_argnames=("model", "num_steps"))


@functools.partial(jax.jit, static_argnums=0)
def fit_whole(model, params, rates, signals, **options):
    return functa.fit_batch(
        model.apply,
        params,
        jnp.zeros(model.latent_shape),
        centers(6, 8),
        signals,
        learning_rate=model.num_cells * rates,
        num_steps=3,
        **options,
    )


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("separate", [True, False])
def test_rates_and_penalty_are_those_of_one_cell(problem, separate):
    """One step from zero, then one on the gradient with the penalty, cell by cell."""
    model, params, rates, signals = problem
    rate, l2_weight = rates[0], 0.3
    cell = model.cell()
    targets = spatial.split_cells(signals, model.grid).reshape(-1, 3, 2, 2)

    def loss(z, target):
        values = cell.apply({"params": params}, centers(3, 2), z)
        return jnp.mean(jnp.square(values - target)) + l2_weight * jnp.sum(z**2)

    grads = jax.jit(jax.vmap(jax.grad(loss)))
    expected = np.zeros((len(targets), *cell.latent_shape))
    for _ in range(2):
        expected -= rate[None, None, None] * grads(expected, targets)
    if not separate:  # The same network, whose neighbors have no weight.
        model = model.clone(kernel_size=3)
        linear = params["latent_to_modulation"]["linear_0"]
        kernel = jnp.zeros((3, 3, *linear["kernel"].shape))
        kernel = kernel.at[1, 1].set(linear["kernel"])
        params = params | {"latent_to_modulation": linear | {"kernel": kernel}}
    assert model.separable == separate
    latents, _ = fit_grids(
        *(model, params, signals),
        learning_rate=rate,
        num_steps=2,
        l2_weight=l2_weight,
    )
    np.testing.assert_allclose(latents.reshape(expected.shape), expected, atol=1e-7)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_fitting_cells_equals_fitting_whole_signals(problem, kernel_size):
    model, params, rates, signals = problem
    if kernel_size > 1:
        model, params, _ = make((2, 4), kernel_size=kernel_size)
        params = jax.tree.map(lambda x: jnp.float64(x), set_kernel(params))
    latents, mse = fit_grids(model, params, signals, learning_rate=rates, num_steps=3)
    expected, info = fit_whole(model, params, rates, signals)
    # Coordinates are float32; their products with the grid differ in the last digit.
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    np.testing.assert_allclose(mse, info.mse, atol=1e-7)


def test_weights_and_noise_are_those_of_whole_signals(problem):
    model, params, rates, signals = problem
    rng = np.random.default_rng(0)
    # The cells weigh differently, some points of a cell nothing.
    options = {"weight": rng.integers(0, 4, (6, 8)) * 1.0}
    options["noise"] = rng.normal(size=(3, *model.latent_shape))
    latents, mse = fit_grids(
        model, params, signals, learning_rate=rates, num_steps=3, **options
    )
    expected, info = fit_whole(model, params, rates, signals, **options)
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    np.testing.assert_allclose(mse, info.mse, rtol=1e-5)
    with pytest.raises(AssertionError, match="shape"):
        fit_grids(
            *(model, params, signals),
            learning_rate=rates,
            num_steps=3,
            weight=np.ones((3, 2)),  # of a cell
        )


def test_rates_of_as_many_steps_as_cells_are_those_of_the_steps():
    model = functa.SpatialSiren(
        width=5, depth=3, grid=(3,), channels=2, interpolation="bilinear"
    )
    coords, latent = np.linspace(-1, 1, 6)[:, None], model.initial_latent()
    params = jax.jit(model.init)(jax.random.key(0), coords, latent)["params"]
    signals = np.random.default_rng(0).normal(size=(1, 6, 3))
    rates = np.linspace(0.1, 0.6, 6).reshape(3, 2)
    one, other = (
        fit_grids(model, params, signals, learning_rate=r, num_steps=3)[0]
        for r in (rates, rates[:, None])
    )
    np.testing.assert_array_equal(one, other)
    start, _ = fit_grids(model, params, signals, learning_rate=rates[:0], num_steps=0)
    np.testing.assert_array_equal(start, 0)


def test_latents_of_a_crop_are_a_crop_of_the_latents(problem):
    model, params, rates, signals = problem
    options = {"learning_rate": rates, "num_steps": 3}
    latents, _ = fit_grids(model, params, signals, **options)
    small = model.clone(grid=(1, 2))
    crop, _ = fit_grids(small, params, signals[:, 3:6, 2:6], **options)
    np.testing.assert_allclose(crop, latents[:, 1:2, 1:3], atol=1e-12)


def test_the_outer_gradient_of_cells_is_that_of_whole_signals(problem):
    model, params, rates, signals = problem

    def loss(params, rates):
        _, info = fit_whole(model, params, rates, signals)
        return info.loss[:, -1].mean()

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, rates)
    cell = model.cell()
    cells = spatial.split_cells(signals, model.grid).reshape(-1, 3, 2, 2)
    meta_gradient = functools.partial(
        functa.meta_gradient,
        cell.apply,
        latent=jnp.zeros(cell.latent_shape),
        coords=centers(3, 2),
        num_steps=3,
        num_groups=4,
    )
    grads, _ = jax.jit(meta_gradient)(params, targets=cells, learning_rate=rates)
    for ours, theirs in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-10 * np.abs(theirs).max())


def test_cells_do_not_influence_each_other(problem):
    model, params, _, signals = problem

    def loss(latent):
        values = model.apply({"params": params}, COORDS, latent)
        return jnp.mean(jnp.square(values - signals[0]))

    hessian = jax.jit(jax.hessian(loss))(jnp.ones(model.latent_shape))
    hessian = np.asarray(hessian).reshape(8, 3, 8, 3)
    between = np.abs(hessian).max((1, 3))
    assert np.all(between[~np.eye(8, dtype=bool)] == 0)
    assert np.all(np.diag(between) > 0)


def test_the_first_step_is_a_product_with_the_jacobian(problem):
    model, params, rates, signals = problem
    cell = model.cell()
    inside = functa.coordinate_grid((3, 2)).astype(np.float64)

    def field(z):
        return cell.apply({"params": params}, inside, z.reshape(1, 1, 3)).reshape(-1)

    start = jax.jit(field)(jnp.zeros(3))
    jacobian = jax.jit(jax.jacobian(field))(jnp.zeros(3))
    cells = spatial.split_cells(signals, model.grid).reshape(24, -1)
    expected = rates[:1] * 2 / start.size * ((cells - start[None]) @ jacobian)
    latents, _ = fit_grids(model, params, signals, learning_rate=rates[:1], num_steps=1)
    np.testing.assert_allclose(latents.reshape(24, 3), expected, atol=1e-12)


def test_a_shared_jacobian_changes_no_result(problem):
    model, params, rates, signals = problem
    cell = model.cell()
    start = jnp.zeros(cell.latent_shape)
    inside = functa.coordinate_grid((3, 2)).astype(np.float64)

    @functools.partial(jax.jit, static_argnames="num_fits")
    def value_and_product(**options):
        values, pullback = inner_loop.field_vjp(
            cell.apply, params, start, inside, **options
        )
        cotangent = jnp.cos(jnp.arange(values.size)).reshape(values.shape)
        return values, pullback(cotangent)[0]

    few, many = value_and_product(), value_and_product(num_fits=100)
    for one, other in zip(few, many, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_largest_eigenvalue(problem):
    model, params, *_ = problem
    cell = model.cell()
    inside = functa.coordinate_grid((3, 2)).astype(np.float64)

    def field(z):
        return cell.apply({"params": params}, inside, z)

    start = jnp.zeros(cell.latent_shape)
    jacobian = jax.jit(jax.jacobian(field))(start).reshape(-1, 3)
    expected = np.linalg.eigvalsh(2 / len(jacobian) * jacobian.T @ jacobian)[-1]
    np.testing.assert_allclose(
        functa.largest_eigenvalue(field, start, num_iterations=200), expected, rtol=1e-6
    )


def test_a_functaset_of_grids_is_rendered(tmp_path):
    model, params, latent = make()
    fields = {"type": "SpatialSiren", "width": 5, "depth": 3, "grid": [2, 4]}
    latents = np.stack([latent, 2 * latent])
    functaset = functa.Functaset(
        latent=latents,
        label=np.zeros(2, np.int32),
        psnr=np.zeros(2, np.float32),
        split=np.full(2, "train"),
        mean=latents.mean((0, 1, 2)),
        std=latents.std((0, 1, 2)),
        config={"model": fields | {"channels": 3, "out_channels": 2}},
        params_sha256=functa.functaset.hash_params(params),
    )
    functa.save_functaset(tmp_path / "f.npz", functaset)
    loaded = functa.load_functaset(tmp_path / "f.npz")
    np.testing.assert_allclose(
        loaded.normalized().std((0, 1, 2)), np.ones(3), rtol=1e-5
    )
    images = functa.reconstruct(loaded, params, (12, 16))
    expected = jax.jit(model.apply)(
        {"params": params}, functa.coordinate_grid((12, 16)), 2 * latent
    )
    np.testing.assert_allclose(images[1], expected, atol=1e-5)
