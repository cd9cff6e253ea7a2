"""Encodes images into a functaset file, in batches and shards.

Latents are fitted batch by batch and written in shards of a fixed size. Memory does not
grow with the number of images, and a run that was stopped resumes at the first missing
shard. At the end the shards are streamed into one file.

The docstrings write the shape of one latent as (*Z).
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

import functa
from experiments.common import data, devices, files, runs, settings
from functa import functaset

SHARD_SIZE = 1000

# Maps latents (N, *grid, C) to images (N, H, W, C), or to classes (N,).
Function = Callable[[np.ndarray], np.ndarray]


class Learner(NamedTuple):
    """The result of a meta-learning run, which encoding needs.

    Attributes:
      model_config: {"type": ..., **fields} of the model.
      params: weights. They, the latent and the rates are arrays on the host.
      latent: initial latent of the inner loop, (*Z), of any shape.
      learning_rate: (), one per channel or entry of a vector (C,), or those of each
        step, (S, C) or (S, 1).
      inner: keywords of `functa.fit_latent`: num_steps, l2_weight, unroll.
      cell: points of a cell along each axis, for a model whose cells are separate
        signals, otherwise None.
      coords: positions (*shape, d) of the points of a signal, if they are not those of
        `functa.coordinate_grid`.
      weight: weights (*shape) of the points in the loss, or None.
    """

    model_config: dict[str, Any]
    params: Any
    latent: np.ndarray
    learning_rate: np.ndarray
    inner: dict[str, Any]
    cell: tuple[int, ...] | None = None
    coords: np.ndarray | None = None
    weight: np.ndarray | None = None

    @property
    def model(self):
        return functaset.make_model(self.model_config)

    def for_shape(self, shape: Sequence[int]) -> "Learner":
        """The learner of signals of another size: a grid has more cells then.

        Raises:
          ValueError: if cells do not fill the signals.
        """
        if self.cell is None:
            return self
        if len(shape) != len(self.cell):
            raise ValueError(
                f"cells of {_by(self.cell)} points do not fill signals of {_by(shape)}."
            )
        if any(size % points for size, points in zip(shape, self.cell, strict=True)):
            raise ValueError(
                f"cells of {_by(self.cell)} points do not fill images of {_by(shape)}; "
                "crop or resize the images."
            )
        grid = [size // points for size, points in zip(shape, self.cell, strict=True)]
        latent = np.zeros((*grid, self.model_config["channels"]), np.float32)
        return self._replace(
            model_config=self.model_config | {"grid": grid}, latent=latent
        )

    def for_padded(self, shape: Sequence[int], padding: int) -> "Learner":
        """The learner of images (H, W) with reflected pixels on each side.

        Raises:
          ValueError: if the padding does not fit the cells or the images.
        """
        if padding and (self.cell is None or max(self.cell) > padding + 1):
            raise ValueError(
                f"padding {padding} needs cells of at most {padding + 1} pixels, and "
                f"the cells are {'None' if self.cell is None else _by(self.cell)}."
            )
        if padding >= min(shape):
            raise ValueError(
                f"padding must be below the image sides {_by(shape)}, got {padding}."
            )
        return self.for_shape([side + 2 * padding for side in shape])

    def with_steps(self, num_steps: int) -> "Learner":
        """The learner with another number of inner steps.

        Raises:
          ValueError: if there are rates for each step, but not for so many steps.
        """
        rates = self.learning_rate
        if rates.ndim == 2:
            if num_steps > len(rates):
                raise ValueError(
                    f"inner.num_steps is {num_steps}, but the run has learned rates "
                    f"for {len(rates)} steps."
                )
            rates = rates[:num_steps]
        inner = self.inner | {"num_steps": num_steps}
        return self._replace(learning_rate=rates, inner=inner)


def _by(sizes):
    return "x".join(map(str, sizes))


def load_learner(workdir: str | Path) -> Learner:
    """The learner of a run of meta_learn or import_functa.

    Raises:
      FileNotFoundError, ValueError: as `runs.load_checkpoint`, and if its config.json
        does not describe its weights or they are not finite.
    """
    config, state = runs.load_checkpoint(Path(workdir))
    is_of_command = config.get("experiment") in ("meta_learn", "import_functa")
    if not is_of_command or not {"weights", "latent"} <= state.keys():
        raise ValueError(f"{workdir} is not a run of meta_learn or import_functa.")
    with settings.blamed_on(f"{workdir}/config.json"):
        learner = make_learner(config, state)
        learner = learner.with_steps(learner.inner["num_steps"])
        model, latent = learner.model, learner.latent
        if learner.cell is not None:
            # Training on cells stores the latent of one cell.
            latent = model.initial_latent()
        coords = jnp.zeros((1, len(learner.params["layer_0"]["kernel"])))
        variables = {"params": learner.params}
        jax.eval_shape(model.apply, variables, coords, latent)
    if not (Path(workdir) / "summary.json").exists():
        devices.say(
            f"the run {workdir} is not finished; its newest checkpoint is used."
        )
    for leaf in jax.tree.leaves(learner[1:4]):
        if not np.isfinite(leaf).all():
            raise ValueError(f"the weights of {workdir} are not finite.")
    return learner


def points_of(
    model: nn.Module, dataset: data.Dataset
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The positions and weights of the points of a data set, as `Learner` has them.

    Raises:
      ValueError: if the model has a grid of latents and the points are not a regular
        grid or have weights.
    """
    coords, weight = dataset.coords, dataset.weight
    if coords is None or not isinstance(model, functa.SpatialSiren):
        return coords, weight
    regular = functa.coordinate_grid(coords.shape[:-1])
    if weight is not None or not np.array_equal(coords, regular):
        raise ValueError(
            "a SpatialSiren needs points on a regular grid without weights; for points "
            "of the sphere set model.type to LatentModulatedSiren."
        )
    return None, None


def complete_channels(config: ConfigDict, channels: int, kind: str = "images") -> None:
    """Sets config.model.out_channels to the number of channels of the data.

    Raises:
      ValueError: if it is already another number.
    """
    if config.model.out_channels not in (None, channels):
        raise ValueError(
            f"model.out_channels is {config.model.out_channels}, but the {kind} have "
            f"{channels} channels."
        )
    config.model.out_channels = channels


def check_coords(learner: Learner, dataset: data.Dataset, run: str) -> None:
    """Raises ValueError if the points of a data set have other coordinates.

    Args:
      learner: the weights.
      dataset: the signals.
      run: the folder of the weights, for the error.
    """
    shape = data.signals(next(iter(dataset.splits.values()))).shape
    found = len(shape) - 2 if dataset.coords is None else dataset.coords.shape[-1]
    expected = len(learner.params["layer_0"]["kernel"])
    if found != expected:
        raise ValueError(
            f"the points of the signals have {found} coordinates, but the fields of "
            f"{run} have {expected}."
        )


def make_learner(config: ConfigDict, state: dict[str, Any]) -> Learner:
    """The learner within a training state {"weights", "average", "latent", ...}.

    Gradients may have been rounded to bfloat16 in training. Encoding and evaluation use
    float32.
    """
    weights = state.get("average") or state["weights"]
    model_config = config.model.to_dict()
    for name in ("dtype", "derivative_dtype"):  # The first is the old name.
        model_config.pop(name, None)
    return Learner(
        model_config=model_config,
        params=jax.device_get(weights["params"]),
        latent=np.asarray(state["latent"]),
        learning_rate=np.asarray(weights["learning_rate"]),
        inner=fit_options(config),
        cell=tuple(cell) if (cell := config.get("cell")) else None,
    )


def fit_options(config: ConfigDict, num_cells: int = 1) -> dict[str, Any]:
    """Returns the keywords of `functa.fit_latent` that a run's config specifies.

    The penalty is that of one cell. The loss of `num_cells` cells is their mean.
    """
    return {
        "num_steps": config.inner.num_steps,
        "l2_weight": config.inner.l2_weight / num_cells,
        "unroll": config.inner.unroll,
    }


def encode(
    learner: Learner, images: np.ndarray, *, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Fits a latent to every image or field.

    Args:
      learner: weights and inner loop.
      images: uint8 (N, H, W, C), or the values of fields, float32 (N, *shape, C).
      batch_size: B, number of images fitted at once, rounded up to a multiple of the
        number of devices of this process. The last batch is padded, to SHARD_SIZE or
        the number of images at most.

    Yields:
      latents (B, *Z) and mean squared errors (B, S + 1), fewer in the last batch.
    """
    batch_size = min(batch_size, max(len(images), SHARD_SIZE))
    batch_size += -batch_size % jax.local_device_count()
    learner = learner.for_shape(images.shape[1:-1])
    fixed = devices.replicate(learner[1:4], local=True)
    points = devices.replicate((learner.coords, learner.weight), local=True)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        # A batch of another size would be compiled separately.
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        latents, mse = fit_batch(
            *fixed,
            devices.divide(np.pad(batch, padding), local=True),
            *points,
            model=learner.model,
            inner=tuple(learner.inner.items()),
        )
        yield np.asarray(latents)[: len(batch)], np.asarray(mse)[: len(batch)]


# A closure within `encode` would be compiled again for every shard.
@functools.partial(jax.jit, static_argnames=("model", "inner"))
def fit_batch(
    params: Any,
    latent: jax.Array,
    learning_rate: jax.Array,
    images: jax.Array,
    coords: jax.Array | None = None,
    weight: jax.Array | None = None,
    *,
    model: nn.Module,
    inner: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, jax.Array]:
    """Fits the latents of one batch of signals (B, *shape, C) on the device.

    Signals of uint8 are divided by 255. The other arguments are those of a `Learner`;
    `inner` is the items of its `inner`, as static arguments must be hashable.

    Returns:
      latents (B, *Z) and mean squared errors (B, S + 1).
    """
    targets = jnp.float32(images)
    if images.dtype == jnp.uint8:
        targets = targets / 255
    options = {"learning_rate": learning_rate, **dict(inner)}
    # Reported PSNR is measured at full precision, also if training used less.
    with jax.default_matmul_precision("highest"):
        if isinstance(model, functa.SpatialSiren):
            return functa.spatial.fit_grids(model, params, targets, **options)
        if coords is None:
            coords = functa.coordinate_grid(images.shape[1:-1])
        latents, info = functa.fit_batch(
            model.apply, params, latent, coords, targets, weight=weight, **options
        )
    return latents, info.mse


def make_view(
    model: nn.Module,
    shape: Sequence[int],
    *,
    coords: np.ndarray | None = None,
    separate: bool | None = None,
) -> functa.spatial.Layout:
    """How the inner loop sees signals of a shape: as `functa.spatial.layout`.

    Args:
      model: the field; one without a grid has one latent for each signal.
      shape: points of a signal along each axis.
      coords: positions (*shape, d) of the points of a field without a grid; by default
        those of a regular grid.
      separate: see `functa.spatial.layout`.
    """
    if isinstance(model, functa.SpatialSiren):
        return functa.spatial.layout(model, shape, separate=separate)
    coords = functa.coordinate_grid(shape) if coords is None else coords
    latent = model.initial_latent()
    return functa.spatial.Layout(model.apply, latent, coords, 1, lambda images: images)


def make_field(
    learner: Learner, shape: tuple[int, int]
) -> tuple[Callable[[jax.Array], jax.Array], Function]:
    """The field of one latent, and the function that gives images the field's layout.

    Args:
      learner: the weights.
      shape: (H, W) of the images.

    Returns:
      latent (*grid, C) -> values, and images (N, H, W, C) -> targets (N, ...) of the
      same layout: those of a grid are cut into cells.
    """
    view = make_view(learner.model, shape, separate=False)

    def field(latent):
        return view.apply_fn({"params": learner.params}, view.coords, latent)

    return field, view.split


def make_render(field: Callable[[jax.Array], jax.Array], batch_size: int) -> Function:
    """The function that computes the images of latents, in batches."""
    fields = jax.jit(jax.vmap(field))

    def render(latents):
        values = devices.in_batches(fields, latents, batch_size=batch_size)
        return values if values.ndim == 4 else functa.spatial.join_cells(values)

    return render


def write_functaset(
    path: Path,
    learner: Learner,
    dataset: dict[str, data.Arrays],
    *,
    config: dict[str, Any],
    batch_size: int,
    copies: int = 1,
    flip: bool = False,
    padding: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Encodes the splits of a data set into one functaset file.

    Several processes share the work, shard by shard. All of them need access to the
    folder.

    Args:
      path: the .npz to write; its shards are kept in `<path>.parts` until the end.
      learner: weights and inner loop.
      dataset: {split: arrays of `data.load`}, written in this order.
      config: recorded in the file in addition to the model and the inner loop.
      batch_size: number of images fitted at once.
      copies: how often the training split is encoded; see `copy_images` for the copies
        after the first.
      flip: whether they are also mirrored.
      padding: reflected pixels on each side of every image, for a learner with cells.
      seed: seed of the augmentation.

    Returns:
      {"num_signals", "images_per_second" of this process, "<split>_psnr" mean in dB of
      the images without their copies}.
    """
    signals = {split: data.signals(arrays) for split, arrays in dataset.items()}
    first = next(iter(signals.values()))
    if first.dtype != np.uint8 and (copies > 1 or flip or padding):
        raise ValueError(
            "copies, flip and padding are for images; fields are encoded once."
        )
    learner = learner.for_padded(first.shape[1:-1], padding)
    config = {
        "model": learner.model_config,
        "inner": learner.inner,
        "copies": copies,
        "flip": flip,
        "padding": padding,
        "shape": first.shape[1:-1],
        "seed": seed,
        "signals_sha256": {split: data.sha256(one) for split, one in signals.items()},
        **config,
    }
    params_sha256 = functaset.hash_params(learner.params)
    total = sum(
        len(values) * (copies if split == "train" else 1)
        for split, values in signals.items()
    )
    needed = total * learner.latent.nbytes
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path} needs {needed / 2**30:.1f} GiB for {total} latents, and "
            f"{free / 2**30:.1f} GiB are free."
        )
    parts = path.with_name(path.name + ".parts")
    # What all latents depend on, besides the images of their shard.
    common = functaset.hash_params([json.dumps(config), learner[1:4], total])
    todo = [
        (split, copy, start)
        for split, values in signals.items()
        for copy in range(copies if split == "train" else 1)
        for start in range(0, len(values), SHARD_SIZE)
    ]
    done = encoded = 0
    started = last = time.monotonic()
    shards = []
    for number, (split, copy, start) in enumerate(todo):
        stop = min(start + SHARD_SIZE, len(signals[split]))
        shard = parts / f"{split}-{copy:03d}-{start:09d}.npz"
        shards.append((shard, split, copy, stop - start))
        mine = number % jax.process_count() == jax.process_index()
        images = signals[split][start:stop]
        labels = dataset[split]["label"][start:stop]
        source = _source(shard, images, labels, common) if mine else None
        if mine and not _is_whole(shard, source):
            if images.dtype == np.uint8:
                images = copy_images(
                    images,
                    copy,
                    number=copy * total + start,
                    seed=seed,
                    flip=flip,
                    padding=padding,
                    cell=learner.cell,
                )
            latents, mse = zip(
                *encode(learner, images, batch_size=batch_size), strict=True
            )
            values = {
                "latent": np.concatenate(latents),
                "label": labels,
                "psnr": np.asarray(functa.psnr(np.concatenate(mse)[:, -1])),
                "source": np.array(source),
            }
            _check_finite(values["latent"], f"{split} image", start)
            files.write_npz(shard, values, every_process=True)
            encoded += stop - start
        done += stop - start
        now = time.monotonic()
        if now - last > 10 or done == total:
            rate = encoded / (now - started)
            left = (total - done) / max(rate, 1e-9)
            devices.say(
                f"encoded {done}/{total}  {rate:.4g} images/s  {left / 60:.1f} min left"
            )
            last = now
    seconds = time.monotonic() - started
    devices.wait_for_all("all parts are written")
    summary = _join(path, shards, config=config, params_sha256=params_sha256)
    devices.wait_for_all("parts are joined")
    if devices.is_main():
        shutil.rmtree(parts)
    return summary | {"images_per_second": encoded / seconds}


def copy_images(
    images: np.ndarray,
    copy: int,
    *,
    number: int,
    seed: int,
    flip: bool,
    padding: int = 0,
    cell: Sequence[int] | None = None,
) -> np.ndarray:
    """One shard of one copy of the images of a functaset.

    Without padding, the copies after the first are augmented by `augment`. With padding
    they are moved by less than a cell, by one random distance per shard, and every
    second one is mirrored if `flip`. The windows of their grids of latents are then the
    latents of all crops of the padded images and of their mirror images. With a
    kernel_size above 1 they differ from these at the border of the window, whose cells
    were fitted together with their neighbors outside of it.

    Args:
      images: the images of the shard, uint8 (N, H, W, C).
      copy: number of the copy, from 0.
      number: copy * (number of signals of the functaset) + number of the shard's first
        image.
      seed: seed of the augmentation.
      flip: whether copies are mirrored.
      padding: reflected pixels on each side.
      cell: pixels of a cell along each axis; needed with padding.

    Returns:
      uint8 (N, H + 2 padding, W + 2 padding, C).
    """
    key = jax.random.fold_in(jax.random.key(seed), number)
    if not padding:
        return augment(key, images, flip=flip) if copy else images
    moved = [0, 0]
    if copy:
        moved = np.asarray(jax.random.randint(key, (2,), 0, jnp.array(cell)))
    sides = [(padding - distance, padding + distance) for distance in moved]
    if flip and copy % 2:
        images = images[:, :, ::-1]
    return np.pad(images, [(0, 0), *sides, (0, 0)], mode="reflect")


def augment(key: jax.Array, images: np.ndarray, *, flip: bool) -> np.ndarray:
    """Enlarges images by a quarter, crops them at random and mirrors them if `flip`.

    This is the augmentation of Spatial Functa (Bauer et al. 2023, arXiv 2302.03130).

    Args:
      key: PRNG key.
      images: uint8 (N, H, W, C).
      flip: mirror half of the images; unsuitable for digits and letters.

    Returns:
      uint8 (N, H, W, C).
    """
    return np.asarray(_augment(key, jnp.asarray(images), flip=flip))


@functools.partial(jax.jit, static_argnames="flip")
def _augment(key, images, *, flip):
    num, height, width, channels = images.shape
    large = (num, height + height // 4, width + width // 4, channels)
    enlarged = jax.image.resize(jnp.float32(images), large, "bilinear")
    key_row, key_column, key_flip = jax.random.split(key, 3)
    rows = jax.random.randint(key_row, (num,), 0, height // 4 + 1)
    columns = jax.random.randint(key_column, (num,), 0, width // 4 + 1)
    crop = jax.vmap(
        lambda image, row, column: jax.lax.dynamic_slice(
            image, (row, column, 0), (height, width, channels)
        )
    )
    images = crop(enlarged, rows, columns)
    if flip:
        mirrored = jax.random.bernoulli(key_flip, shape=(num, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return jnp.uint8(jnp.clip(jnp.round(images), 0, 255))


def _source(shard, images, labels, common):
    """A digest of the place of a shard and of all from which it is encoded."""
    return functaset.hash_params({shard.name: (images, labels, common)})


def _is_whole(shard, source):
    """Whether a shard exists, can be read and was encoded from this source."""
    if not shard.exists():
        return False
    try:
        if str(files.read_npz(shard)["source"]) == source:
            return True
    except (ValueError, KeyError):  # damaged, or of an earlier version
        pass
    print(f"{shard} is damaged or has other rows; it is encoded again.", flush=True)
    return False


def _check_finite(latents, what, first):
    bad = np.flatnonzero(~np.isfinite(latents).all(tuple(range(1, latents.ndim))))
    if bad.size:
        raise ValueError(
            f"the latent of {what} {first + bad[0]} is not finite; lower the inner "
            "learning rate."
        )


def _join(path, shards, *, config, params_sha256):
    """Streams the shards into one .npz; returns its size and mean PSNR."""
    num = sum(size for *_, size in shards)
    latent_shape = files.read_npz(shards[0][0])["latent"].shape[1:]
    # Over all axes but the last: the signals and, in a grid, the positions.
    total = np.zeros(latent_shape[-1])
    squares, count = np.zeros_like(total), 0
    psnr = {}
    for file, split, copy, _ in shards:
        shard = files.read_npz(file)
        if not copy:
            psnr.setdefault(split, []).append(shard["psnr"])
        if split == "train":
            latent = np.float64(shard["latent"]).reshape(-1, len(total))
            total += latent.sum(0)
            squares += np.square(latent).sum(0)
            count += len(latent)
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - np.square(mean), 0))
    whole = {
        "mean": np.float32(mean),
        "std": np.float32(std),
        "config": np.array(json.dumps(config)),
        "params_sha256": np.array(params_sha256),
    }

    def rows(name):
        for file, split, _, size in shards:
            if name == "split":
                yield np.full(size, split, "<U5")
            else:
                yield files.read_npz(file, [name])[name]

    members = {
        "latent": ("<f4", (num, *latent_shape), rows("latent")),
        "label": ("<i4", (num,), rows("label")),
        "psnr": ("<f4", (num,), rows("psnr")),
        "split": ("<U5", (num,), rows("split")),
        **{name: (a.dtype, a.shape, [a]) for name, a in whole.items()},
    }
    files.write_atomic(
        path, lambda file: functaset.write_members(file, members), mode="wb"
    )
    means = {
        f"{split}_psnr": float(np.mean(np.concatenate(values)))
        for split, values in psnr.items()
    }
    return {"num_signals": num, **means}
