"""Latents with space in them: a SIREN modulated by a grid of latents.

Source: Spatial Functa (Bauer et al. 2023, arXiv 2302.03130). A signal over [0, 1]^d is
divided into a grid of cells. Each cell has its own latent (C,). One linear map turns
the latents into modulations, and a point uses the modulation of its cell (`nearest`)
or a mixture of those of the 2^d nearest cells (`bilinear`).

With `nearest` and a linear map of single latents, the cells of a signal do not
influence each other. The network of one cell is a `LatentModulatedSiren`, and a data
set of signals is a data set of cells (`SpatialSiren.cell`, `split_cells`). Cells can
therefore be trained and fitted as separate signals, and a signal may have any number of
them. A map of several neighboring latents (`kernel_size`) gives up this independence
for a better code, because neighboring cells are similar.

Axes: B batch, N points, d coordinates of a point, (*grid) cells along each axis,
(*cell) points of a cell along each axis, C channels of a latent, M modulations, k size
of the kernel.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from functa import inner_loop, siren

INTERPOLATIONS = ("nearest", "bilinear")


class SpatialSiren(nn.Module):
    """A SIREN modulated by a grid of latents: coords (..., d) -> values.

    The parameters have the names and shapes of those of a `LatentModulatedSiren` whose
    `latent_dim` is `channels`, and for a grid of one cell both networks are equal.

    Attributes:
      width, depth, out_channels, omega_0, fast_sine, derivative_dtype: as in `Siren`.
      grid: number of cells along each of the d axes.
      channels: C, size of the latent of a cell.
      interpolation: "nearest": the network sees the position inside the cell, in
        [0, 1]^d, and the modulation of the cell. "bilinear": the network sees the
        position in the signal, and the modulations are interpolated between the
        centers of the cells; beyond the outermost centers they are constant.
      kernel_size: k, odd. The modulation of a cell is a linear function of the k^d
        latents around it, a convolution with zeros beyond the grid. It starts as the
        map of kernel_size 1: the weights of the neighbors are zero.
      coord_scale: factor of the positions that the network sees. Above 1 the first
        layer starts with higher frequencies, for cells with many points such as those
        of sound.
      modulate_scale, modulate_shift: as in `ModulatedSiren`.

    Example:
      >>> import jax
      >>> from functa import SpatialSiren, siren
      >>> model = SpatialSiren(width=8, depth=3, grid=(2, 3), channels=4)
      >>> coords = siren.coordinate_grid((8, 9))
      >>> latent = model.initial_latent()
      >>> params = model.init(jax.random.key(0), coords, latent)["params"]
      >>> latent.shape, model.apply({"params": params}, coords, latent).shape
      ((2, 3, 4), (8, 9, 3))
    """

    width: int
    depth: int
    grid: Sequence[int]
    channels: int
    out_channels: int = 3
    omega_0: float = 10.0
    interpolation: str = "nearest"
    kernel_size: int = 1
    modulate_scale: bool = False
    modulate_shift: bool = True
    fast_sine: bool = False
    derivative_dtype: str = "float32"
    coord_scale: float = 1.0

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(*grid, C), the latent of one signal."""
        return (*self.grid, self.channels)

    @property
    def num_cells(self) -> int:
        """Number of cells of the whole grid."""
        return math.prod(self.grid)

    @property
    def separable(self) -> bool:
        """Whether the values in a cell depend on the latent of that cell alone."""
        return self.interpolation == "nearest" and self.kernel_size == 1

    def initial_latent(self) -> jax.Array:
        """Returns zeros (*grid, C), the usual start of the inner loop."""
        return jnp.zeros(self.latent_shape)

    def cell(self) -> "SpatialSiren":
        """Returns the network of one cell, which has the same parameters.

        Raises:
          ValueError: if the cells of the network depend on each other.
        """
        if not self.separable:
            raise ValueError(
                "the cells of a SpatialSiren are separate signals if interpolation is "
                f"'nearest' and kernel_size 1; they are {self.interpolation!r} and "
                f"{self.kernel_size}."
            )
        return self.clone(grid=(1,) * len(self.grid))

    @nn.compact
    def __call__(self, coords: jax.Array, latent: jax.Array) -> jax.Array:
        """Maps coords (..., d) and one signal's latents (*grid, C) to (..., C_out)."""
        _check_fields(self)
        chex.assert_shape(latent, self.latent_shape)
        chex.assert_axis_dimension(coords, -1, len(self.grid))
        modulation = _make_map(self, name="latent_to_modulation")(latent)  # (*grid, M)
        if self.num_cells == 1:
            modulation = modulation.reshape(-1)  # (M,), for all points
        elif self.interpolation == "nearest":
            coords, index = _locate(coords, self.grid)
            modulation = modulation[index]  # (..., M)
        else:
            modulation = _interpolate(coords, modulation)  # (..., M)
        layers = [
            (None if scale is None else 1 + scale, shift)
            for scale, shift in siren.split_modulation(self, modulation)
        ]
        return siren.apply_layers(self, self.coord_scale * coords, layers)


class _Neighborhood(nn.Module):
    """A linear map of the k^d latents around each cell: (*grid, C) -> (*grid, M)."""

    size: int
    kernel_size: int

    @nn.compact
    def __call__(self, latent):
        *grid, channels = latent.shape
        d, k = len(grid), self.kernel_size
        center = (k // 2,) * d

        def init(key, shape):
            own = siren.latent_map_init(key, shape[-2:])
            return jnp.zeros(shape, own.dtype).at[center].set(own)

        kernel = self.param("kernel", init, (*(k,) * d, channels, self.size))
        bias = self.param("bias", nn.initializers.zeros, (self.size,), jnp.float32)
        padded = jnp.pad(latent, [(k // 2, k // 2)] * d + [(0, 0)])
        # One product of all neighbors. The derivatives of a convolution are slower on
        # a CPU.
        neighbors = [
            padded[tuple(slice(i, i + n) for i, n in zip(offset, grid, strict=True))]
            for offset in itertools.product(range(k), repeat=d)
        ]
        values = jnp.concatenate(neighbors, -1) @ kernel.reshape(-1, self.size)
        return values + jnp.expand_dims(bias, range(d))


def _make_map(model, **options):
    """The module that maps latents (*grid, C) to modulations (*grid, M)."""
    size = siren.num_modulations(model)
    if model.kernel_size == 1:
        return siren.LatentToModulation((size,), **options)
    return _Neighborhood(size, model.kernel_size, **options)


def split_cells(signals: Any, grid: Sequence[int]) -> Any:
    """Cuts signals into cells: (B, *shape, C) -> (B, *grid, *cell, C).

    Args:
      signals: B signals on a regular grid of points; a NumPy or JAX array.
      grid: number of cells along each axis of `shape`.

    Raises:
      ValueError: if `grid` does not divide `shape`.

    Example:
      >>> import numpy as np
      >>> from functa.spatial import split_cells
      >>> split_cells(np.zeros((5, 8, 6, 3)), (2, 3)).shape
      (5, 2, 3, 4, 2, 3)
    """
    shape = signals.shape[1:-1]
    _check_division(shape, grid)
    d = len(shape)
    sizes = [
        n
        for size, cells in zip(shape, grid, strict=True)
        for n in (cells, size // cells)
    ]
    signals = signals.reshape(len(signals), *sizes, signals.shape[-1])
    return signals.transpose(0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1)


def join_cells(cells: Any) -> Any:
    """Inverse of `split_cells`: (B, *grid, *cell, C) -> (B, *shape, C)."""
    d = (cells.ndim - 2) // 2
    order = [axis for i in range(d) for axis in (1 + i, 1 + d + i)]
    shape = [cells.shape[1 + i] * cells.shape[1 + d + i] for i in range(d)]
    cells = cells.transpose(0, *order, 2 * d + 1)
    return cells.reshape(len(cells), *shape, cells.shape[-1])


class Layout(NamedTuple):
    """How the inner loop sees the signals of a `SpatialSiren`.

    Attributes:
      apply_fn: (variables, coords, latent) -> values, shaped like a target.
      latent: start of the inner loop of one target.
      coords: positions of the points, (..., d).
      num_cells: cells of a target. A learning rate of one cell is multiplied by it,
        because the loss is a mean over cells.
      split: maps signals (B, *shape, C_out) to targets (B', ..., C_out).
    """

    apply_fn: Callable[..., jax.Array]
    latent: jax.Array
    coords: jax.Array
    num_cells: int
    split: Callable[[Any], Any]


def layout(
    model: SpatialSiren, shape: Sequence[int], *, separate: bool | None = None
) -> Layout:
    """The layout in which signals of `shape` points are fitted with the least work.

    With `nearest` all cells have the same points, so a target is an array of cells
    (*grid, *cell, C_out), and no modulation is looked up by point. Separable cells are
    targets themselves.

    Args:
      model: the network.
      shape: points of a signal along each axis.
      separate: whether each cell is a target; by default, if the model allows it.

    Raises:
      ValueError: if the grid does not divide `shape`, or if `separate` is True and
        the cells depend on each other.
    """
    _check_division(shape, model.grid)
    cell = tuple(n // g for n, g in zip(shape, model.grid, strict=True))
    if model.separable if separate is None else separate:
        network = model.cell()

        def split(signals):
            cells = split_cells(signals, model.grid)
            return cells.reshape(-1, *cell, cells.shape[-1])

        latent, coords = network.initial_latent(), siren.coordinate_grid(cell)
        return Layout(network.apply, latent, coords, 1, split)
    latent = model.initial_latent()
    if model.interpolation != "nearest":
        coords = siren.coordinate_grid(shape)
        return Layout(model.apply, latent, coords, model.num_cells, lambda x: x)
    return Layout(
        _apply_to_cells(model),
        latent,
        siren.coordinate_grid(cell),
        model.num_cells,
        lambda signals: split_cells(signals, model.grid),
    )


def _apply_to_cells(model):
    """(variables, coords (*cell, d) inside a cell, latent) -> (*grid, *cell, C_out)."""
    network = siren.ModulatedSiren(
        **{
            field: getattr(model, field)
            for field in (
                "width",
                "depth",
                "out_channels",
                "omega_0",
                "modulate_scale",
                "modulate_shift",
                "fast_sine",
                "derivative_dtype",
            )
        }
    )

    def apply_fn(variables, coords, latent):
        layers = dict(variables["params"])
        to_modulation = {"params": layers.pop("latent_to_modulation")}
        modulation = _make_map(model).apply(to_modulation, latent)  # (*grid, M)
        # A modulation of zeros means scales of 1 here.
        modulation += jnp.expand_dims(network.initial_latent(), range(latent.ndim - 1))
        scaled = model.coord_scale * coords
        values = jax.vmap(lambda m: network.apply({"params": layers}, scaled, m))(
            modulation.reshape(-1, modulation.shape[-1])
        )
        return values.reshape(*model.grid, *values.shape[1:])

    return apply_fn


def fit_grids(
    model: SpatialSiren,
    params: chex.ArrayTree,
    signals: jax.Array,
    *,
    learning_rate: jax.Array,
    l2_weight: float = 0.0,
    weight: jax.Array | None = None,
    noise: jax.Array | None = None,
    **options,
) -> tuple[jax.Array, jax.Array]:
    """Fits grids of latents to signals by the inner loop, starting at zero.

    Separable cells are fitted as separate signals, unless there are weights or noise;
    the result is the same and the work is less (`layout`). Learning rates and penalty
    are those of one cell in all cases: the loss of a whole signal is a mean over the
    cells, so its gradient in the latent of a cell is `num_cells` times smaller.

    Args:
      model: the network.
      params: its weights.
      signals: (B, *shape, C_out).
      learning_rate: (), or (C,), or per step (S, C).
      l2_weight: weight of the penalty on the latent of a cell.
      weight: weights of the points of a signal, (*shape), or None.
      noise: (B, *grid, C), added to the fitted latents before the last error, or None.
      **options: other keywords of `functa.fit_latent`.

    Returns:
      Latents (B, *grid, C), and mean squared errors (B, S + 1).

    Raises:
      ValueError: if the grid does not divide the signals.
    """
    whole = weight is not None or noise is not None
    view = layout(model, signals.shape[1:-1], separate=False if whole else None)
    if weight is not None:
        chex.assert_shape(weight, signals.shape[1:-1])
        weight = view.split(jnp.asarray(weight)[None, ..., None])[0, ..., 0]
    rates = spread_rates(view.num_cells * jnp.asarray(learning_rate), view.latent.shape)
    latents, info = inner_loop.fit_batch(
        view.apply_fn,
        params,
        view.latent,
        view.coords,
        view.split(signals),
        learning_rate=rates,
        l2_weight=l2_weight / view.num_cells,
        weight=weight,
        noise=noise,
        **options,
    )
    latents = latents.reshape(len(signals), *model.latent_shape)
    mse = info.mse.reshape(len(signals), -1, info.mse.shape[-1]).mean(1)
    return latents, mse


def spread_rates(rates: jax.Array, latent_shape: Sequence[int]) -> jax.Array:
    """Learning rates that cells share, with the axes that `functa.fit_latent` expects.

    Args:
      rates: (), one per channel (C,), or per step, (S, C) or (S, 1).
      latent_shape: (*grid, C).

    Returns:
      (), (*grid, C), or (S, 1, ..., 1, C). For a latent vector these are the rates.
    """
    rates = jnp.asarray(rates)
    if rates.ndim == 1:
        return jnp.broadcast_to(rates, latent_shape)
    if rates.ndim == 2:  # Not of the cells of a grid with one axis.
        return jnp.expand_dims(rates, range(1, len(latent_shape)))
    return rates


def _check_division(shape, grid):
    if len(grid) != len(shape) or any(
        cells < 1 or size % cells for size, cells in zip(shape, grid, strict=True)
    ):
        raise ValueError(
            f"a grid of {tuple(grid)} cells does not divide signals of {tuple(shape)} "
            "points."
        )


def _check_fields(model):
    if not model.grid or min(model.grid) < 1 or model.channels < 1:
        raise ValueError(
            "a SpatialSiren needs at least one cell along each axis and one channel, "
            f"got grid {tuple(model.grid)} and channels {model.channels}."
        )
    if model.kernel_size < 1 or model.kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and at least 1; got {model.kernel_size}."
        )
    if model.interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got "
            f"{model.interpolation!r}."
        )


def _locate(coords, grid):
    """Positions inside the cells (..., d), and the index of the cell of each point."""
    sizes = jnp.broadcast_to(jnp.array(grid), coords.shape)
    scaled = coords * sizes  # (..., d)
    # The end of the last cell belongs to it.
    cell = jnp.clip(jnp.floor(scaled).astype(jnp.int32), 0, sizes - 1)
    return scaled - cell, tuple(jnp.moveaxis(cell, -1, 0))


def _interpolate(coords, modulation):
    """Multilinear interpolation of (*grid, M) at coords (..., d): (..., M)."""
    *grid, _ = modulation.shape
    sizes = jnp.broadcast_to(jnp.array(grid), coords.shape)
    position = coords * sizes - 0.5  # in units of cells, from the first center
    first = jnp.floor(position)
    weight = position - first
    total = 0.0
    for corner in itertools.product((0, 1), repeat=len(grid)):
        offset = jnp.broadcast_to(jnp.array(corner), coords.shape)
        index = jnp.clip(first.astype(jnp.int32) + offset, 0, sizes - 1)
        share = jnp.where(offset == 1, weight, 1 - weight).prod(-1, keepdims=True)
        total += share * modulation[tuple(jnp.moveaxis(index, -1, 0))]
    return total
