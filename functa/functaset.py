"""The functaset: an .npz file of latents with labels, and the images they represent.

`np.load(path, allow_pickle=False)` reads the file. It holds N signals. The latent of a
signal is a vector (L,), or an array of higher rank whose last axis is its channels,
such as a grid (h, w, L):

  latent         float32 (N, ..., L)  fitted latents (parameters of plain SIRENs)
  label          int32   (N,)         class, -1 without labels
  psnr           float32 (N,)         PSNR of each reconstruction in dB
  split          <U5     (N,)         "train" or "test"
  mean, std      float32 (L,)         of the training split, over all axes but the last
  config         <U..    ()           JSON: model, inner loop, data set, class_names
  params_sha256  <U64    ()           hash of the weights used to fit the latents
  sha256         <U64    ()           checksum of the members above; optional

`load_functaset` accepts files of other programs: integers and floats of any size and
byte order, as long as labels are class numbers and latents are finite.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from functa import npz
from functa.siren import (
    LatentModulatedSiren,
    ModulatedSiren,
    Siren,
    coordinate_grid,
)
from functa.spatial import SpatialSiren

MODELS = {
    model.__name__: model
    for model in (Siren, ModulatedSiren, LatentModulatedSiren, SpatialSiren)
}


class Functaset(NamedTuple):
    """A data set of latents. The fields are those of the file, listed above."""

    latent: np.ndarray
    label: np.ndarray
    psnr: np.ndarray
    split: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    config: dict[str, Any]
    params_sha256: str

    def select(self, split: str) -> "Functaset":
        """Returns the signals of one split; mean and std remain unchanged.

        Raises:
          ValueError: if no signal belongs to it.
        """
        kept = self.split == split
        if not kept.any():
            raise ValueError(
                "split must be one of "
                f"{', '.join(np.unique(self.split))}; got {split!r}."
            )
        rows = {name: getattr(self, name)[kept] for name in _ROWS}
        return self._replace(**rows)

    def normalized(self) -> np.ndarray:
        """Returns (latent - mean) / std, (N, ..., L), the input of a classifier."""
        # An entry that is constant becomes 0 instead of infinite.
        return (self.latent - self.mean) / np.where(self.std > 0, self.std, 1)


_ROWS = ("latent", "label", "psnr", "split")
# The kinds of NumPy dtypes that a member may have.
_KINDS = {
    "latent": "f",
    "label": "iu",
    "psnr": "f",
    "split": "U",
    "mean": "f",
    "std": "f",
    "config": "U",
    "params_sha256": "U",
}
_CHECKSUM = "sha256"
# Points of an image that are evaluated at once.
_POINTS_AT_ONCE = 2**14
_KIND_NAMES = {"f": "floats", "iu": "integers", "U": "strings"}
_LONGEST_TEXT = {"split": 64, "params_sha256": 64, _CHECKSUM: 64, "config": 2**20}
# A classifier has one output for each class up to the largest label.
MAX_CLASSES = 2**16


def save_functaset(file: Any, functaset: Functaset) -> None:
    """Writes a functaset as an uncompressed .npz.

    Args:
      file: a path that ends in .npz, or a binary file.
      functaset: the data set.

    Raises:
      ValueError: if `load_functaset` would refuse the file.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from functa import Functaset, load_functaset, save_functaset
      >>> latent = np.array([[0.0, 2.0], [2.0, 2.0]], np.float32)
      >>> functaset = Functaset(
      ...     latent=latent,
      ...     label=np.array([3, 7], np.int32),
      ...     psnr=np.array([30.0, 31.0], np.float32),
      ...     split=np.array(["train", "train"]),
      ...     mean=latent.mean(0),
      ...     std=latent.std(0),
      ...     config={"dataset": "digits"},
      ...     params_sha256="",
      ... )
      >>> path = os.path.join(tempfile.mkdtemp(), "functaset.npz")
      >>> save_functaset(path, functaset)
      >>> print(load_functaset(path).normalized())
      [[-1.  0.]
       [ 1.  0.]]
    """
    arrays = {name: np.asarray(value) for name, value in functaset._asdict().items()}
    arrays["config"] = np.array(json.dumps(functaset.config))
    _check_shapes(arrays, "the functaset")
    arrays = _check_values(arrays, "the functaset")
    write_members(file, {name: (a.dtype, a.shape, [a]) for name, a in arrays.items()})


def write_members(
    file: Any, members: Mapping[str, tuple[Any, Sequence[int], Iterable[np.ndarray]]]
) -> None:
    """Writes a functaset block by block, for data sets larger than the memory.

    Args:
      file: a path that ends in .npz, or a binary file.
      members: {field: (dtype, shape, blocks)}, in the order of `Functaset`. The blocks
        are consecutive rows of the array.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(file, "w") as archive:
        for name, (dtype, shape, blocks) in members.items():
            dtype = np.dtype(dtype)
            header = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
            digest.update(_digest_header(name, dtype, shape))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    data = np.asarray(block, dtype).tobytes()
                    member.write(data)
                    digest.update(data)
        with archive.open(f"{_CHECKSUM}.npy", "w") as member:
            np.lib.format.write_array(member, np.array(digest.hexdigest()))


def load_functaset(path: str | Path, *, with_signals: bool = True) -> Functaset:
    """Reads a functaset and checks it.

    Args:
      path: an .npz file, for example one written by `save_functaset`.
      with_signals: whether to read the signals. Without them the arrays of the signals
        have no rows, and the checksum is not verified.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged or is not a functaset.

    Example:
      >>> import numpy as np
      >>> from functa import Functaset, load_functaset, save_functaset
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "functaset.npz")
      >>> save_functaset(
      ...     path,
      ...     Functaset(
      ...         latent=np.ones((3, 4), np.float32),
      ...         label=np.array([3, 7, 3], np.int32),
      ...         psnr=np.array([30.0, 31.0, 29.0], np.float32),
      ...         split=np.array(["train", "train", "test"]),
      ...         mean=np.ones(4, np.float32),
      ...         std=np.zeros(4, np.float32),
      ...         config={"dataset": "digits"},
      ...         params_sha256="",
      ...     ),
      ... )
      >>> train = load_functaset(path).select("train")
      >>> train.latent.shape, train.label.tolist()
      ((2, 4), [3, 7])
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"functaset {path} does not exist.")
    headers = npz.read_headers(path, {*Functaset._fields, _CHECKSUM})
    _check_shapes(headers, path)
    skipped = () if with_signals else (*_ROWS, _CHECKSUM)
    arrays = npz.read_arrays(path, [name for name in headers if name not in skipped])
    stored = arrays.pop(_CHECKSUM, None)
    if stored is not None and str(stored) != _digest(arrays):
        raise ValueError(f"{path} is damaged: its checksum does not match its arrays.")
    for name in set(_ROWS) - set(arrays):
        arrays[name] = np.empty((0, *headers[name].shape[1:]), headers[name].dtype)
    arrays = _check_values(arrays, path)
    try:
        arrays["config"] = json.loads(str(arrays["config"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: `config` is not valid JSON: {error}.") from None
    if not isinstance(arrays["config"], dict):
        raise ValueError(
            f"{path}: `config` must be a JSON object, got {arrays['config']!r:.80}."
        )
    arrays["params_sha256"] = str(arrays["params_sha256"])
    return Functaset(**arrays)


def _check_shapes(arrays, source):
    """Checks the members, dtypes and shapes; needs no values."""
    missing = [name for name in Functaset._fields if name not in arrays]
    if missing:
        raise ValueError(f"{source} is not a functaset: it lacks {', '.join(missing)}.")
    latent_shape = arrays["latent"].shape
    if len(latent_shape) < 2 or 0 in latent_shape:
        raise ValueError(f"{source}: `latent` must be (N, ..., L), got {latent_shape}.")
    shapes = {
        **dict.fromkeys(_ROWS[1:], latent_shape[:1]),
        **dict.fromkeys(("mean", "std"), latent_shape[-1:]),
        **dict.fromkeys(("config", "params_sha256", _CHECKSUM), ()),
    }
    for name, array in arrays.items():
        kinds = _KINDS.get(name, "U")
        if array.dtype.kind not in kinds:
            raise ValueError(
                f"{source}: `{name}` must hold {_KIND_NAMES[kinds]}, got {array.dtype}."
            )
        shape = shapes.get(name, latent_shape)
        if array.shape != shape:
            raise ValueError(
                f"{source}: `{name}` must have shape {shape} because `latent` has "
                f"shape {latent_shape}, got {array.shape}."
            )
        # NumPy stores four bytes a character.
        if kinds == "U" and array.dtype.itemsize > 4 * _LONGEST_TEXT[name]:
            raise ValueError(
                f"{source}: `{name}` must hold at most {_LONGEST_TEXT[name]} "
                f"characters, got {array.dtype.itemsize // 4}."
            )


def _check_values(arrays, source):
    """Checks ranges and returns the arrays in the dtypes of the format."""
    label = arrays["label"]
    if label.size and (label.min() < -1 or label.max() >= MAX_CLASSES):
        raise ValueError(
            f"{source}: `label` must be from -1 to {MAX_CLASSES - 1}, got "
            f"{label.min()} to {label.max()}."
        )
    arrays = arrays | {"label": label.astype(np.int32, copy=False)}
    for name in ("latent", "psnr", "mean", "std"):
        with np.errstate(over="ignore"):  # It gives infinity, which is refused.
            array = arrays[name] = arrays[name].astype(np.float32, copy=False)
        # The PSNR of an exact reconstruction is infinite.
        bad = np.isnan(array) if name == "psnr" else ~np.isfinite(array)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{source}: `{name}` must be finite, got {array[place]} at {place}."
            )
    if arrays["std"].min() < 0:
        raise ValueError(
            f"{source}: `std` must not be negative, got {arrays['std'].min()}."
        )
    return arrays


def _digest(arrays):
    """The checksum of all members, in the order of `Functaset`."""
    digest = hashlib.sha256()
    for name in Functaset._fields:
        array = arrays[name]
        digest.update(_digest_header(name, array.dtype, array.shape))
        digest.update(array.tobytes())
    return digest.hexdigest()


def _digest_header(name, dtype, shape):
    return f"{name} {tuple(shape)} {dtype.str};".encode()


def hash_params(params: Any) -> str:
    """Returns the SHA-256 of a parameter tree's names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {leaf.shape} {leaf.dtype};".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def make_model(config: Mapping[str, Any]) -> LatentModulatedSiren | ModulatedSiren:
    """Builds a network from {"type": name of its class, **fields}.

    Raises:
      ValueError: if the type or a field is unknown.

    Example:
      >>> from functa import make_model
      >>> model = make_model({"type": "ModulatedSiren", "width": 8, "depth": 3})
      >>> model.latent_shape
      (16,)
    """
    # JSON has no tuples, and jit cannot hash a module that holds a list.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"model type {name!r} is not one of {', '.join(MODELS)}.")
    # Files of earlier versions call `derivative_dtype` "dtype".
    dtype = fields.pop("dtype", None)
    if dtype is not None and fields.setdefault("derivative_dtype", dtype) != dtype:
        raise ValueError(
            f"model {name}: dtype {dtype!r}, the old name of derivative_dtype, "
            f"contradicts derivative_dtype {fields['derivative_dtype']!r}."
        )
    try:
        return MODELS[name](**fields)
    except TypeError as error:
        raise ValueError(f"model {name}: {error}") from None


def reconstruct(
    functaset: Functaset,
    params: Any,
    resolution: int | Sequence[int],
    *,
    batch_size: int = 16,
) -> np.ndarray:
    """Computes the images of a functaset's latents, at any resolution.

    Of latents of padded images, the part inside of the padding is computed; in copies,
    which are moved, it is the moved image.

    Args:
      functaset: N latents and the configuration of their model.
      params: the weights from the checkpoint of the run.
      resolution: number of points along each axis, (H, W) for images; or one number for
        all axes.
      batch_size: number of images computed at once, which limits the memory.

    Returns:
      float32 (N, H, W, C), not clamped to [0, 1].

    Raises:
      ValueError: if the latents were fitted with other weights than `params`, if the
        functaset does not name its model or, with padding, the shape of its images, or
        if the points of its fields have another number of coordinates.

    Example:
      >>> import numpy as np, jax, jax.numpy as jnp
      >>> from functa import Functaset, make_model, reconstruct
      >>> from functa.functaset import hash_params
      >>> config = {"type": "LatentModulatedSiren", "width": 8, "depth": 3}
      >>> config["latent_dim"] = 4
      >>> model = make_model(config)
      >>> latent = model.initial_latent()
      >>> params = model.init(jax.random.key(0), jnp.zeros(2), latent)["params"]
      >>> functaset = Functaset(
      ...     latent=np.zeros((5, 4), np.float32),
      ...     label=np.zeros(5, np.int32),
      ...     psnr=np.zeros(5, np.float32),
      ...     split=np.full(5, "test"),
      ...     mean=np.zeros(4, np.float32),
      ...     std=np.ones(4, np.float32),
      ...     config={"model": config},
      ...     params_sha256=hash_params(params),
      ... )
      >>> reconstruct(functaset, params, (12, 16)).shape
      (5, 12, 16, 3)
    """
    if hash_params(params) != functaset.params_sha256:
        raise ValueError(
            "the latents were fitted with other weights than these "
            f"(params_sha256 {functaset.params_sha256[:12]}...)."
        )
    config = functaset.config.get("model")
    if not isinstance(config, Mapping):
        raise ValueError(f"the functaset's config must hold a model, got {config!r}.")
    model = make_model(config)
    # The networks of plain SIRENs, of images, are the latents themselves.
    num_coords = len(params["layer_0"]["kernel"]) if params else 2
    shape = (resolution,) * num_coords if np.ndim(resolution) == 0 else resolution
    if len(shape) != num_coords:
        raise ValueError(
            f"the points of the fields have {num_coords} coordinates, so that many "
            f"axes are needed; got the resolution {resolution}. For points that are no "
            "regular grid, call functa.render with their coords."
        )
    return render(
        model,
        params,
        functaset.latent,
        shape,
        batch_size=batch_size,
        coords=_inside_padding(functaset.config, coordinate_grid(shape)),
    )


def _inside_padding(config, coords):
    """Positions in the image (..., d) as positions in the padded image."""
    padding = config.get("padding", 0)
    if not padding:
        return coords
    if "shape" not in config:
        raise ValueError(
            f"the latents are those of images with a padding of {padding}, and the "
            "functaset, of an earlier version, does not tell the shape of the images; "
            "functa.render computes the padded images."
        )
    shape = np.array(config["shape"])
    return np.float32((padding + coords * shape) / (shape + 2 * padding))


def render(
    model: LatentModulatedSiren | ModulatedSiren | Siren,
    params: Any,
    latents: np.ndarray,
    shape: Sequence[int],
    *,
    batch_size: int = 16,
    coords: np.ndarray | None = None,
) -> np.ndarray:
    """Evaluates the fields of N latents on a grid of any shape.

    Args:
      model: the network.
      params: its shared weights; unused by a plain `Siren`, whose "latent" is its own
        parameter vector (`jax.flatten_util.ravel_pytree`).
      latents: (N, *Z), where Z is the shape of one latent.
      shape: number of cells along each axis, for example (H, W).
      batch_size: number of fields evaluated at once, which limits the memory.
      coords: positions (*shape, d) of the points; by default `coordinate_grid(shape)`.

    Returns:
      float32 (N, *shape, C).
    """
    coords = jnp.asarray(coordinate_grid(shape) if coords is None else coords)

    def evaluate(params, *latent):
        def at(points):
            return model.apply({"params": params}, points, *latent)

        num_points = math.prod(coords.shape[:-1])
        if num_points <= _POINTS_AT_ONCE:
            return at(coords)
        # The activations of all points of a large image need gigabytes.
        points = coords.reshape(num_points, -1)
        values = jax.lax.map(at, points, batch_size=_POINTS_AT_ONCE)
        return values.reshape(*coords.shape[:-1], -1)

    if isinstance(model, Siren):
        start = jax.eval_shape(model.init, jax.random.key(0), coords)["params"]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
        unravel = jax.flatten_util.ravel_pytree(zeros)[1]

        def field(latent):
            return evaluate(unravel(latent))
    else:

        def field(latent):
            return evaluate(params, latent)

    fields = jax.jit(jax.vmap(field))
    latents = np.asarray(latents)
    values = [
        np.asarray(fields(latents[start : start + batch_size]))
        for start in range(0, max(len(latents), 1), batch_size)
    ]
    return np.concatenate(values)
