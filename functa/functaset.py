"""The functaset: latents with labels in a real .npz, and images back out of it.

One file, readable by `np.load(path, allow_pickle=False)`, N signals, latent size L:

  latent         float32 (N, L)   fitted latents (parameter vectors for plain SIRENs)
  label          int32   (N,)     class, -1 if there is none
  psnr           float32 (N,)     PSNR of each reconstruction in dB
  split          <U5     (N,)     "train" or "test"
  mean, std      float32 (L,)     of each latent entry over the training split
  config         <U..    ()       JSON: model, inner loop, data set
  params_sha256  <U64    ()       hash of the weights that the latents belong to
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

MODELS = {m.__name__: m for m in (Siren, ModulatedSiren, LatentModulatedSiren)}


class Functaset(NamedTuple):
    """A data set of latents; the fields are those of the file, above."""

    latent: np.ndarray
    label: np.ndarray
    psnr: np.ndarray
    split: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    config: dict[str, Any]
    params_sha256: str

    def select(self, split: str) -> "Functaset":
        """The signals of one split; mean and std stay those of the training split."""
        kept = self.split == split
        if not kept.any():
            raise ValueError(
                f"no signal is of split {split!r}; there are {np.unique(self.split)}."
            )
        rows = {name: getattr(self, name)[kept] for name in _ROWS}
        return self._replace(**rows)

    def normalized(self) -> np.ndarray:
        """(latent - mean) / std, (N, L): what a classifier should be given."""
        # A latent entry that never moves says nothing; it becomes 0, not infinite.
        return (self.latent - self.mean) / np.where(self.std > 0, self.std, 1)


_ROWS = ("latent", "label", "psnr", "split")


def save_functaset(file: Any, functaset: Functaset) -> None:
    """Writes a functaset as an uncompressed .npz.

    Args:
      file: a path or a binary file.
      functaset: what to write.
    """
    arrays = functaset._asdict()
    arrays["config"] = json.dumps(functaset.config)
    np.savez(file, **arrays)


def load_functaset(path: str | Path) -> Functaset:
    """Reads and checks a functaset.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or no functaset; says what is wrong.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no functaset {path}.")
    try:
        # An opened file: np.load leaves one that it opened itself to the collector
        # when it is truncated.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no readable .npz file: {error}") from None
    missing = [name for name in Functaset._fields if name not in arrays]
    if missing:
        raise ValueError(f"{path} is no functaset: it lacks {', '.join(missing)}.")
    num_signals, latent_size = arrays["latent"].shape
    for name, shape in {
        **dict.fromkeys(_ROWS[1:], (num_signals,)),
        **dict.fromkeys(("mean", "std"), (latent_size,)),
    }.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"{path}: `{name}` should be {shape} beside `latent` "
                f"({num_signals}, {latent_size}), found {arrays[name].shape}."
            )
    arrays["config"] = json.loads(str(arrays["config"]))
    arrays["params_sha256"] = str(arrays["params_sha256"])
    return Functaset(**{name: arrays[name] for name in Functaset._fields})


def hash_params(params: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a parameter tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {leaf.shape} {leaf.dtype};".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def make_model(config: Mapping[str, Any]) -> LatentModulatedSiren | ModulatedSiren:
    """Builds {"type": "LatentModulatedSiren", **fields}.

    Raises:
      ValueError: if the type or a field is unknown.
    """
    # JSON knows no tuples, and a module that holds a list can not be hashed by jit.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    name = fields.pop("type", None)
    if name not in MODELS:
        raise ValueError(f"model type {name!r} is none of {', '.join(MODELS)}.")
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
    """Images of a functaset's latents, at any resolution.

    Args:
      functaset: N latents and the configuration of their model.
      params: the weights, as the run's checkpoint holds them.
      resolution: H and W, or one number for both.
      batch_size: images computed at once; bounds the memory.

    Returns:
      float32 (N, H, W, C), not clamped to [0, 1].

    Raises:
      ValueError: if `params` are not the weights that the latents were fitted with.
    """
    if hash_params(params) != functaset.params_sha256:
        raise ValueError(
            "these weights are not the ones that the latents were fitted with "
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
      latents: (N, L).
      shape: cells along each axis, for instance (H, W).
      batch_size: fields evaluated at once; bounds the memory.

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
