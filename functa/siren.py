"""SIREN and modulated SIREN, the networks of Functa.

Sources: Sitzmann et al. 2020 (arXiv 2006.09661) for the layer and its initialization;
Dupont et al. 2022 (arXiv 2201.12204) for the modulations. Details that the papers do
not specify follow google-deepmind/functa: a modulation is applied after the linear map
and before omega_0 and the sine; omega_0 is the same in every layer; the last layer has
neither modulation nor sine, and 0.5 is added to its output.

Axes: N points, d coordinates of a point, C channels, W width, L latent size,
M modulations of all layers.
"""

import math
import warnings
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from functa import matmul, sine


def coordinate_grid(shape: Sequence[int]) -> np.ndarray:
    """Returns the cell centers of a regular grid over [0, 1]^d in row-major order.

    Args:
      shape: number of cells along each of the d axes: (T,) for sound, (H, W) for an
        image, (D, H, W) for voxels.

    Returns:
      float32 (*shape, d). For an image, [..., 0] is the row and [..., 1] the column.

    Raises:
      ValueError: if there is no axis, or if a size is not a whole number from 1 on.

    Example:
      >>> from functa import coordinate_grid
      >>> coordinate_grid((2, 4)).shape
      (2, 4, 2)
      >>> print(coordinate_grid((4,))[:, 0])
      [0.125 0.375 0.625 0.875]
    """
    if len(shape) == 0 or any(n < 1 or n != int(n) for n in shape):
        raise ValueError(f"a grid needs axes of positive whole size, got {shape}.")
    axes = [(np.arange(n, dtype=np.float64) + 0.5) / n for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)


def siren_first_init(key, shape, dtype=jnp.float32):
    """U(-1/d, 1/d) for the first kernel; Sitzmann et al. 2020, section 3.2.

    Args:
      key: draws the kernel.
      shape: (d, W).
      dtype: of the kernel.
    """
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])


def siren_init(omega_0: float):
    """Initializer U(-b, b), b = sqrt(6 / d) / omega_0, of every later kernel (d, W)."""

    def init(key, shape, dtype=jnp.float32):
        bound = math.sqrt(6 / shape[0]) / omega_0
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Siren(nn.Module):
    """A SIREN: coords (..., d) -> values (..., C).

    Attributes:
      width: W, number of units of each sine layer.
      depth: number of linear layers, the first and the last included; at least 2.
      out_channels: C.
      omega_0: frequency factor inside every sine.
      fast_sine: use the polynomial sine (`functa.sine.sin`) instead of `jnp.sin`.
      derivative_dtype: "float32" or "bfloat16". The derivatives of the hidden layers
        round the operands of their matrix products to it (`functa.matmul`). Values,
        sums, parameters, and the first and the last layer remain in float32.
      dtype: deprecated name of `derivative_dtype`.
    """

    width: int
    depth: int
    out_channels: int = 3
    omega_0: float = 30.0
    fast_sine: bool = False
    derivative_dtype: str = "float32"
    dtype: str | None = None

    def __post_init__(self):
        _rename_dtype(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, coords: jax.Array) -> jax.Array:
        return apply_layers(self, coords, [(None, None)] * (self.depth - 1))


class ModulatedSiren(nn.Module):
    """A SIREN whose sine layers are scaled and shifted (FiLM) by a modulation vector.

    Layer i computes sin(omega_0 * (scale_i * (x W_i + b_i) + shift_i)). The modulation
    (M,) holds one layer after the other; in a layer the scale (if any) comes first.

    Attributes:
      width, depth, out_channels, omega_0, fast_sine, derivative_dtype: as in `Siren`.
      modulate_scale, modulate_shift: whether there are scales and shifts; at least one
        must be on.
    """

    width: int
    depth: int
    out_channels: int = 3
    omega_0: float = 30.0
    modulate_scale: bool = False
    modulate_shift: bool = True
    fast_sine: bool = False
    derivative_dtype: str = "float32"
    dtype: str | None = None

    def __post_init__(self):
        _rename_dtype(self)
        super().__post_init__()

    @property
    def latent_shape(self) -> tuple[int]:
        """(M,), the modulation of one signal."""
        return (num_modulations(self),)

    def initial_latent(self) -> jax.Array:
        """Returns scales of 1 and shifts of 0, (M,), which give a plain SIREN."""
        num_modulations(self)  # Checks the fields.
        parts = [1.0] * self.modulate_scale + [0.0] * self.modulate_shift
        return jnp.tile(jnp.repeat(jnp.array(parts), self.width), self.depth - 1)

    @nn.compact
    def __call__(self, coords: jax.Array, modulation: jax.Array) -> jax.Array:
        """Maps coords (..., d) and one signal's modulation (M,) to (..., C)."""
        chex.assert_shape(modulation, self.latent_shape)
        return apply_layers(self, coords, split_modulation(self, modulation))


class LatentModulatedSiren(nn.Module):
    """A SIREN modulated by a latent vector, the network of Functa.

    A linear map, or an MLP with ReLU, turns the latent (L,) into the modulation (M,),
    M = (depth - 1) * W * (modulate_scale + modulate_shift). The order of the modulation
    is that of `ModulatedSiren`. 1 is added to every scale, so a map that returns zeros
    leaves the SIREN unmodulated.

    Attributes:
      width, depth, out_channels, omega_0, fast_sine, derivative_dtype: as in `Siren`.
      latent_dim: L.
      layer_sizes: hidden widths of the MLP; () is the linear map.
      modulate_scale, modulate_shift: as in `ModulatedSiren`.

    Example:
      >>> import jax
      >>> from functa import LatentModulatedSiren, coordinate_grid
      >>> model = LatentModulatedSiren(width=8, depth=3, latent_dim=4)
      >>> coords, latent = coordinate_grid((6, 5)), model.initial_latent()
      >>> params = model.init(jax.random.key(0), coords, latent)["params"]
      >>> model.apply({"params": params}, coords, latent).shape
      (6, 5, 3)
    """

    width: int
    depth: int
    latent_dim: int
    out_channels: int = 3
    omega_0: float = 30.0
    layer_sizes: Sequence[int] = ()
    modulate_scale: bool = False
    modulate_shift: bool = True
    fast_sine: bool = False
    derivative_dtype: str = "float32"
    dtype: str | None = None

    def __post_init__(self):
        _rename_dtype(self)
        super().__post_init__()

    @property
    def latent_shape(self) -> tuple[int]:
        """(L,), the latent of one signal."""
        return (self.latent_dim,)

    def initial_latent(self) -> jax.Array:
        """Returns zeros (L,), the usual start of the inner loop."""
        return jnp.zeros(self.latent_shape)

    @nn.compact
    def __call__(self, coords: jax.Array, latent: jax.Array) -> jax.Array:
        """Maps coords (..., d) and one signal's latent (L,) to (..., C)."""
        chex.assert_shape(latent, self.latent_shape)
        modulation = LatentToModulation(
            (*self.layer_sizes, num_modulations(self)), name="latent_to_modulation"
        )(latent)
        layers = [
            (None if scale is None else 1 + scale, shift)
            for scale, shift in split_modulation(self, modulation)
        ]
        return apply_layers(self, coords, layers)


def num_modulations(model: ModulatedSiren | LatentModulatedSiren) -> int:
    """Returns M, the length of the modulation vector of all sine layers.

    Raises:
      ValueError: if a size is too small, or nothing is modulated.
    """
    _check_sizes(model)
    parts = model.modulate_scale + model.modulate_shift
    if not parts:
        raise ValueError(
            "modulate_scale and modulate_shift are both off; set at least one."
        )
    return (model.depth - 1) * model.width * parts


def _check_sizes(model):
    if model.depth < 2 or model.width < 1 or model.omega_0 <= 0:
        raise ValueError(
            "a SIREN needs depth >= 2, width >= 1 and omega_0 > 0, got "
            f"{model.depth}, {model.width} and {model.omega_0}."
        )


def _rename_dtype(model):
    """Moves `dtype`, the old name, to `derivative_dtype`."""
    if model.dtype is not None:
        warnings.warn(
            f"{type(model).__name__}.dtype is now derivative_dtype.",
            DeprecationWarning,
            stacklevel=4,
        )
        model.derivative_dtype, model.dtype = model.dtype, None


class LatentToModulation(nn.Module):
    """Maps latents (..., C) to modulations (..., M): linear layers, with ReLU between.

    Attributes:
      sizes: widths of the layers; the last one is M.
    """

    sizes: Sequence[int]

    @nn.compact
    def __call__(self, x):
        for i, size in enumerate(self.sizes):
            if i:
                x = nn.relu(x)
            x = nn.Dense(size, kernel_init=latent_map_init, name=f"linear_{i}")(x)
        return x


def latent_map_init(key, shape, dtype=jnp.float32):
    """The default of hk.Linear for a kernel.

    It is a truncated normal without the variance correction of Flax's lecun_normal.

    Args:
      key: draws the kernel.
      shape: (L, M).
      dtype: of the kernel.
    """
    init = nn.initializers.truncated_normal(1 / math.sqrt(shape[0]))
    return init(key, shape, dtype)


def split_modulation(model, modulation):
    """Splits a modulation into those of the layers.

    Args:
      model: says what is modulated, and W.
      modulation: (..., M).

    Returns:
      (scale, shift) of each sine layer; each is (..., W), or None if it is off.
    """
    parts = modulation.reshape(*modulation.shape[:-1], model.depth - 1, -1, model.width)
    return [
        (
            parts[..., i, 0, :] if model.modulate_scale else None,
            parts[..., i, -1, :] if model.modulate_shift else None,
        )
        for i in range(model.depth - 1)
    ]


def apply_layers(model, coords, modulations):
    """Applies the layers of a SIREN, inside the compact `__call__` of its model.

    Args:
      model: the module.
      coords: (..., d).
      modulations: (scale, shift) of each sine layer. Each is None, (W,) for all points,
        or (..., W) with one vector per point.

    Returns:
      (..., C).
    """
    _check_sizes(model)
    sin = sine.sin if model.fast_sine else jnp.sin
    init = siren_init(model.omega_0)
    x = coords
    for i, (scale, shift) in enumerate(modulations):
        # Rounding coordinates or outputs would lower the quality visibly.
        x = _Linear(
            model.width,
            init if i else siren_first_init,
            dtype=model.derivative_dtype if i else "float32",
            name=f"layer_{i}",
        )(x)
        if scale is not None:
            x = _for_all_points(scale, x) * x
        if shift is not None:
            x = x + _for_all_points(shift, x)
        x = sin(model.omega_0 * x)
    last = _Linear(model.out_channels, init, name=f"layer_{model.depth - 1}")
    return last(x) + 0.5


def _for_all_points(vector, x):
    """Adds the axes of x (..., W) to a vector (W,)."""
    return jnp.expand_dims(vector, range(x.ndim - vector.ndim))


class _Linear(nn.Module):
    """`nn.Dense` with `functa.matmul`; the parameters have the same names."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x = matmul.matmul(x, kernel, dtype=self.dtype)
        return x + jnp.expand_dims(bias, range(x.ndim - 1))
