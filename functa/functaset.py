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
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

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
        """Returns the signals of one split; mean and std remain unchanged."""
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


def save_functaset(file: Any, functaset: Functaset) -> None:
    """Writes a functaset as an uncompressed .npz.

    Args:
      file: a path or a binary file.
      functaset: the data set.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
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
    arrays = functaset._asdict()
    arrays["config"] = json.dumps(functaset.config)
    np.savez(file, **arrays)


def load_functaset(path: str | Path) -> Functaset:
    """Reads a functaset and checks it.

    Args:
      path: an .npz file, for example one written by `save_functaset`.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged or is not a functaset.

    Example:
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
    try:
        # Given a path, np.load does not close a truncated file.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    missing = [name for name in Functaset._fields if name not in arrays]
    if missing:
        raise ValueError(f"{path} is not a functaset: it lacks {', '.join(missing)}.")
    latent_shape = arrays["latent"].shape
    if len(latent_shape) < 2:
        raise ValueError(f"{path}: `latent` must be (N, ..., L), got {latent_shape}.")
    for name, shape in {
        **dict.fromkeys(_ROWS[1:], latent_shape[:1]),
        **dict.fromkeys(("mean", "std"), latent_shape[-1:]),
    }.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"{path}: `{name}` must have shape {shape} because `latent` has shape "
                f"{latent_shape}, got {arrays[name].shape}."
            )
    arrays["config"] = json.loads(str(arrays["config"]))
    arrays["params_sha256"] = str(arrays["params_sha256"])
    return Functaset(**{name: arrays[name] for name in Functaset._fields})


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
      >>> model = make_model({"type": "ModulatedSiren", "width": 8, "depth": 3})
      >>> model.latent_shape
      (16,)
    """
    # JSON has no tuples, and jit cannot hash a module that holds a list.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    name = fields.pop("type", None)
    if name not in MODELS:
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

    Args:
      functaset: N latents and the configuration of their model.
      params: the weights from the checkpoint of the run.
      resolution: (H, W), or one number for both.
      batch_size: number of images computed at once, which limits the memory.

    Returns:
      float32 (N, H, W, C), not clamped to [0, 1].

    Raises:
      ValueError: if the latents were fitted with other weights than `params`.

    Example:
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
    shape = (resolution, resolution) if isinstance(resolution, int) else resolution
    model = make_model(functaset.config["model"])
    return render(model, params, functaset.latent, shape, batch_size=batch_size)


def render(
    model: LatentModulatedSiren | ModulatedSiren | Siren,
    params: Any,
    latents: np.ndarray,
    shape: Sequence[int],
    *,
    batch_size: int = 16,
) -> np.ndarray:
    """Evaluates the fields of N latents on a grid of any shape.

    Args:
      model: the network.
      params: its shared weights; unused by a plain `Siren`, whose "latent" is its own
        parameter vector (`jax.flatten_util.ravel_pytree`).
      latents: (N, *Z), where Z is the shape of one latent.
      shape: number of cells along each axis, for example (H, W).
      batch_size: number of fields evaluated at once, which limits the memory.

    Returns:
      float32 (N, *shape, C).
    """
    coords = jnp.asarray(coordinate_grid(shape))
    if isinstance(model, Siren):
        start = jax.eval_shape(model.init, jax.random.key(0), coords)["params"]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
        unravel = jax.flatten_util.ravel_pytree(zeros)[1]

        def field(latent):
            return model.apply({"params": unravel(latent)}, coords)
    else:

        def field(latent):
            return model.apply({"params": params}, coords, latent)

    fields = jax.jit(jax.vmap(field))
    values = [
        np.asarray(fields(latents[start : start + batch_size]))
        for start in range(0, len(latents), batch_size)
    ]
    return np.concatenate(values)
