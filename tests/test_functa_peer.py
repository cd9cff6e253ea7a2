"""The meta-step of a field with a latent grid, against NumPy, and its torch program.

The oracle follows the equations of Spatial Functa (Bauer et al. 2023, arXiv 2302.03130)
on whole images: each pixel looks up the modulation of its cell. Gradients of the inner
steps are written out, and those of the outer loss are central differences.

Axes: B images, N pixels, G cells, C channels of the latent, W width, S inner steps.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functa
from experiments.configs import train_lbi as train_lbi_configs
from experiments.networks import registry
from experiments.timing import peers

pytestmark = pytest.mark.usefixtures("unoptimized")

GRID, IMAGE, OMEGA = (2, 3), (4, 9), 10.0
WIDTH, DEPTH, CHANNELS, STEPS = 4, 3, 2, 2


def make_params(rng):
    sizes = [2] + [WIDTH] * (DEPTH - 1) + [3]
    params = {
        f"layer_{i}": {
            "kernel": rng.normal(size=(rows, columns)) / (OMEGA if i else 1),
            "bias": 0.1 * rng.normal(size=columns),
        }
        for i, (rows, columns) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    shifts = (DEPTH - 1) * WIDTH
    linear = {
        "kernel": 0.3 * rng.normal(size=(CHANNELS, shifts)),
        "bias": 0.1 * rng.normal(size=shifts),
    }
    return params | {"latent_to_modulation": {"linear_0": linear}}


def pixels_by_cell(grid, image):
    """The cell (N,) of every pixel, and its coordinates within the cell (N, 2)."""
    cells, local = [], []
    for i in range(image[0]):
        for j in range(image[1]):
            u = (i + 0.5) / image[0] * grid[0], (j + 0.5) / image[1] * grid[1]
            row, column = int(u[0]), int(u[1])
            cells.append(row * grid[1] + column)
            local.append((u[0] - row, u[1] - column))
    return np.array(cells), np.array(local)


def field_and_pullback(params, cells, coords, latent):
    """Values (N, 3) of a latent (G, C), and the gradient (N, 3) -> (G, C)."""
    linear = params["latent_to_modulation"]["linear_0"]
    modulation = (latent @ linear["kernel"] + linear["bias"])[cells]  # (N, (D-1) W)
    x, cosines = coords, []
    for i in range(DEPTH - 1):
        layer = params[f"layer_{i}"]
        shift = modulation[:, i * WIDTH : (i + 1) * WIDTH]
        inner = OMEGA * (x @ layer["kernel"] + layer["bias"] + shift)
        x = np.sin(inner)
        cosines.append(OMEGA * np.cos(inner))
    last = params[f"layer_{DEPTH - 1}"]

    def pullback(cotangent):
        cotangent = cotangent @ last["kernel"].T
        shifts = np.zeros_like(modulation)
        for i in reversed(range(DEPTH - 1)):
            cotangent = cotangent * cosines[i]
            shifts[:, i * WIDTH : (i + 1) * WIDTH] = cotangent
            cotangent = cotangent @ params[f"layer_{i}"]["kernel"].T
        members = np.arange(len(latent))[:, None] == cells  # (G, N)
        return members @ shifts @ linear["kernel"].T

    return x @ last["kernel"] + last["bias"] + 0.5, pullback


def meta_loss(params, rates, images, grid=GRID):
    """Mean squared error of images (B, H, W, 3) after inner steps with rates (S, C).

    The loss of an image is a mean over its pixels, so the gradient of each cell is
    multiplied by the number of cells: the rates are those of a cell alone.
    """
    cells, coords = pixels_by_cell(grid, images.shape[1:3])
    num_cells = grid[0] * grid[1]
    losses = []
    for image in images.reshape(len(images), -1, 3):
        latent = np.zeros((num_cells, CHANNELS))
        for rate in rates:
            values, pullback = field_and_pullback(params, cells, coords, latent)
            gradient = pullback(2 * (values - image) / image.size)
            latent = latent - num_cells * rate * gradient
        values, _ = field_and_pullback(params, cells, coords, latent)
        losses.append(np.mean(np.square(values - image)))
    return np.mean(losses)


def central_differences(function, tree, eps=1e-5):
    """Gradient of a scalar function of nested dicts of arrays."""
    if isinstance(tree, dict):
        return {
            name: central_differences(
                lambda x, name=name: function(tree | {name: x}), value, eps
            )
            for name, value in tree.items()
        }
    gradient = np.zeros_like(tree)
    for index in np.ndindex(tree.shape):
        step = np.zeros_like(tree)
        step[index] = eps
        gradient[index] = (function(tree + step) - function(tree - step)) / (2 * eps)
    return gradient


@pytest.fixture(scope="module")
def problem():
    """Parameters, rates, images, and the outer loss with its gradients."""
    rng = np.random.default_rng(0)
    params = make_params(rng)
    rates = rng.uniform(0.05, 0.3, (STEPS, CHANNELS))
    images = rng.random((2, *IMAGE, 3))
    loss = meta_loss(params, rates, images)
    grads = central_differences(lambda p: meta_loss(p, rates, images), params)
    rate_grads = central_differences(lambda r: meta_loss(params, r, images), rates)
    return params, rates, images, loss, grads, rate_grads


def assert_same_gradients(found, expected):
    # Central differences at 1e-5 are exact to about 1e-9.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
        found,
        expected,
    )


def as_patches(images):
    """Images (B, H, W, 3) as patches (B * G, N, 3), row by row."""
    p, q = IMAGE[0] // GRID[0], IMAGE[1] // GRID[1]
    return np.stack(
        [
            image[i * p : (i + 1) * p, j * q : (j + 1) * q].reshape(-1, 3)
            for image in images
            for i in range(GRID[0])
            for j in range(GRID[1])
        ]
    )


def test_the_inner_gradient_of_the_oracle(problem):
    params, _, images, *_ = problem
    cells, coords = pixels_by_cell(GRID, IMAGE)
    latent = np.random.default_rng(1).normal(size=(6, CHANNELS))
    image = images[0].reshape(-1, 3)

    def loss(z):
        return np.square(field_and_pullback(params, cells, coords, z)[0] - image).sum()

    values, pullback = field_and_pullback(params, cells, coords, latent)
    np.testing.assert_allclose(
        pullback(2 * (values - image)), central_differences(loss, latent), rtol=1e-6
    )


def test_the_image_has_the_step_of_its_patches(problem):
    params, rates, images, loss, *_ = problem
    patches = as_patches(images).reshape(-1, 2, 3, 3)
    alone = meta_loss(params, rates, patches, grid=(1, 1))
    np.testing.assert_allclose(alone, loss, rtol=1e-12)


def test_torch_program_has_the_same_step(problem):
    torch = pytest.importorskip("torch")
    from experiments.peers import torch_functa as program

    params, rates, images, loss, grads, rate_grads = problem
    tensors = jax.tree.map(torch.tensor, (params, rates))
    for leaf in jax.tree.leaves(tensors):
        leaf.requires_grad_()
    side = torch.tensor(pixels_by_cell((1, 1), (2, 3))[1])
    targets = torch.tensor(as_patches(images))
    found = program.meta_loss(*tensors, side, targets)
    np.testing.assert_allclose(found.item(), loss, rtol=1e-12)
    found.backward()
    found = jax.tree.map(lambda leaf: leaf.grad.numpy(), tensors)
    assert_same_gradients(found, (grads, rate_grads))
    own = program.init_params(width=WIDTH, depth=DEPTH, latent_dim=CHANNELS)
    shapes = [jax.tree.map(lambda leaf: tuple(leaf.shape), p) for p in (own, params)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(
        program.pixel_centers(2),
        torch.tensor(pixels_by_cell((1, 1), (2, 2))[1], dtype=torch.float32),
    )


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("torch_functa.py", "width=8 depth=3 latent=2 side=4 B=4"),
        ("torch_vgg.py", "B=2"),
        ("pyhessian_curvature.py", "trace width=4 depth=2 B=8"),
    ],
)
def test_programs_print_what_the_benchmark_reads(program, name):
    pytest.importorskip("pyhessian" if "pyhessian" in program else "torch")
    [(measured, rate)] = peers.run_peer(sys.executable, program, [name]).items()
    assert measured == name and rate > 0


def test_the_torch_network_is_ours():
    """The same shapes of VGG-A; torch keeps (out, in, kh, kw)."""
    pytest.importorskip("torch")
    from experiments.peers import torch_vgg

    config = train_lbi_configs.get_config("cifar10")
    model = registry.make_model(config.model.to_dict(), 10)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )["params"]
    ours = sorted(leaf.size for leaf in jax.tree.leaves(shapes))
    theirs = sorted(p.numel() for p in torch_vgg.make_model().parameters())
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["images", "patches"])
def test_spatial_siren_has_the_same_step(problem, whole, float64):
    params, rates, images, loss, grads, rate_grads = problem
    model = functa.SpatialSiren(
        width=WIDTH, depth=DEPTH, grid=GRID, channels=CHANNELS, omega_0=OMEGA
    )
    # The centers of `functa.coordinate_grid` are rounded to float32.
    if whole:
        cells, local = pixels_by_cell(GRID, IMAGE)
        corner = np.stack(np.divmod(cells, GRID[1]), axis=-1)
        coords = (corner + local) / GRID
        targets, scale = images.reshape(2, -1, 3), model.num_cells
    else:
        model = model.cell()
        coords = pixels_by_cell((1, 1), (2, 3))[1]
        targets, scale = as_patches(images), 1
    found, info = functa.meta_gradient(
        model.apply,
        jax.tree.map(jnp.asarray, params),
        model.initial_latent(),
        jnp.asarray(coords),
        jnp.asarray(targets),
        learning_rate=jnp.asarray(scale * rates),
        num_steps=STEPS,
    )
    np.testing.assert_allclose(info.loss[:, -1].mean(), loss, rtol=1e-12)
    weight_grads, scaled_rate_grads = found
    assert_same_gradients(
        (weight_grads, scale * scaled_rate_grads), (grads, rate_grads)
    )
