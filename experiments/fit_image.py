"""Fits plain SIRENs to images, one network per image (Sitzmann et al. 2020).

    python -m experiments.fit_image --config.image=photo.jpg

A run consists of one or more tasks. A task is a set of images of one size that are
fitted at once. The checkpoint contains every task, so that a run can resume within any
of them. The fields are evaluated on finer grids and differentiated. The parameter
vectors are written as a functaset.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import functa
from experiments.common import data, devices, files, launch, runs, settings
from experiments.common.sweep import sweep
from experiments.configs import fit_image as configs
from experiments.drawing import figures
from experiments.training import encoding, loop, siren
from experiments.training.siren import Task
from functa import functaset

# PSNR of rounding to 8 bits: the error is uniform over an interval of 1/255.
EIGHT_BITS = 20 * np.log10(255 * np.sqrt(12))
# Grid points evaluated at once; this limits the memory for large images.
_POINTS_AT_ONCE = 16384


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    tasks = make_tasks(config)
    encoding.complete_channels(config, tasks[0].images.shape[-1])
    for task in tasks:
        siren.check(config, task)

    def experiment(run):
        model = functaset.make_model(run.config.model.to_dict())
        states = train(run, model, tasks)
        return _evaluate(run, model, tasks, states)

    digests = {f"data of task {task.name}": data.sha256(task.images) for task in tasks}
    return sweep(config, workdir, experiment, inputs=digests)


def make_tasks(config: ConfigDict) -> list[Task]:
    """Reads and resizes the images of every task.

    Raises:
      FileNotFoundError, ValueError: if an image cannot be read, or if there are too
        few images.
    """
    images, labels, class_names = _load_images(config)
    num_tasks = max(len(config[name]) for name in _PER_TASK)
    columns = []
    for name in _PER_TASK:
        if len(config[name]) not in (1, num_tasks):
            raise ValueError(
                f"{name} must have one value for all tasks or {num_tasks} values, one "
                f"for each, got {config[name]!r}."
            )
        columns.append(config[name] * (num_tasks if len(config[name]) == 1 else 1))
    tasks = []
    for resolution, num_images, mosaic, num_steps in zip(*columns, strict=True):
        used = num_images * mosaic**2
        if used > len(images):
            raise ValueError(
                f"num_images {num_images} and mosaic {mosaic} need {used} images; "
                f"there {'is' if len(images) == 1 else 'are'} {len(images)}."
            )
        shape = _resized_shape(images[0], resolution)
        data.check_memory(used, (*shape, 3), f"a task of resolution {resolution}")
        sized = np.stack([resize(image, resolution) for image in images[:used]])
        name = "x".join(str(mosaic * n) for n in sized.shape[1:3])
        if mosaic > 1:
            _, height, width, channels = sized.shape
            grid = sized.reshape(num_images, mosaic, mosaic, height, width, channels)
            sized = grid.swapaxes(2, 3).reshape(
                num_images, mosaic * height, mosaic * width, channels
            )
            name += "_mosaic"
        snapshots = [s for s in config.snapshot_steps if s < num_steps] + [num_steps]
        task_labels = labels[:used] if mosaic == 1 else np.full(num_images, -1)
        tasks.append(
            Task(name, sized, task_labels, num_steps, tuple(snapshots), class_names)
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"no two tasks may be of the same size, got {names}.")
    return tasks


def resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """Resizes uint8 (H, W, C) so that its longer side is `resolution` pixels."""
    from PIL import Image

    shape = _resized_shape(image, resolution)
    if shape == image.shape[:2]:
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = picture.resize(shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized).reshape(*shape, -1)


def _resized_shape(image, resolution):
    scale = resolution / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return height, width


def _load_images(config):
    """Images (N, H, W, C), labels (N,) and their names; a task uses the first ones."""
    name, fields = config.dataset.name, config.dataset.to_dict()
    del fields["name"]
    if config.image is not None:
        data.refuse_unread(f"--config.image={config.image}", **fields)
        image = data.read_image(config.image, min_side=max(config.resolution))
        return image[None], np.array([-1]), None
    if name == "photograph":
        from sklearn.datasets import load_sample_image

        data.refuse_unread("the photograph of scikit-learn", **fields)
        return load_sample_image("flower.jpg")[None], np.array([-1]), None
    loaded = data.load_dataset(name, ("train",), **fields)
    devices.say(loaded.found)
    arrays = loaded.splits["train"]
    return arrays["image"], arrays["label"], loaded.class_names


_PER_TASK = ("resolution", "num_images", "mosaic", "num_steps")


def fold_range(params: Any, coord_range: tuple[float, float]) -> Any:
    """Converts parameters for coordinates in `coord_range` to coordinates in [0, 1]^d.

    With u = low + (high - low) x, u W + b = x (high - low) W + (b + low 1^T W).

    Args:
      params: parameters of a `Siren`.
      coord_range: (low, high), the same for every axis.

    Returns:
      Parameters of the same shapes, which give the same values.
    """
    low, high = coord_range
    kernel, bias = params["layer_0"]["kernel"], params["layer_0"]["bias"]
    folded = {"kernel": (high - low) * kernel, "bias": bias + low * kernel.sum(0)}
    return params | {"layer_0": folded}


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def evaluate_fields(
    model: functa.Siren, params: Any, shape: tuple[int, ...], derivative: bool
) -> jax.Array:
    """Values of B fields over [0, 1]^2, or their Jacobians, on a grid.

    Args:
      model: the network.
      params: stacked parameters of B networks.
      shape: size of the grid, (H, W).
      derivative: whether to return the Jacobians.

    Returns:
      (B, H, W, C), or with `derivative` (B, H, W, C, 2).
    """

    def evaluate(params):
        def field(point):
            return model.apply({"params": params}, point)

        coords = jnp.asarray(functa.coordinate_grid(shape)).reshape(-1, 2)
        values = jax.lax.map(
            jax.jacfwd(field) if derivative else field,
            coords,
            batch_size=min(_POINTS_AT_ONCE, len(coords)),
        )
        return values.reshape(*shape, *values.shape[1:])

    # The reported PSNR is measured at full precision, independent of the training.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(evaluate)(params)


def gradient_magnitude(
    model: functa.Siren, params: Any, shape: tuple[int, int]
) -> jax.Array:
    """Frobenius norm of the fields' Jacobians, in units of value per pixel: (B, H, W).

    Args:
      model: the network.
      params: stacked parameters of B networks over [0, 1]^2.
      shape: number of pixels, (H, W).
    """
    jacobians = evaluate_fields(model, params, shape, True)
    # The pixel size is (1 / H, 1 / W).
    per_pixel = [jacobians[..., axis] / n for axis, n in enumerate(shape)]
    return jnp.linalg.norm(jnp.stack(per_pixel, axis=-1), axis=(-2, -1))


def train(
    run: runs.Run, model: functa.Siren, tasks: list[Task]
) -> dict[str, siren.TaskState]:
    """Fits the tasks in sequence; returns the state of each.

    Steps are numbered consecutively over all tasks.
    """
    config = run.config
    states = {task.name: siren.init_state(config, model, task) for task in tasks}
    firsts, total = {}, 0
    for task in tasks:
        firsts[task.name] = total
        total += task.num_steps
    updates = {}

    def advance(states, start, stop):
        # The steps between two stops belong to one task.
        task = next(t for t in tasks if stop <= firsts[t.name] + t.num_steps)
        name, first = task.name, firsts[task.name]
        if name not in updates:
            run.say(f"task {name}: {len(task.images)} image(s); compiling the step ...")
            updates[name] = siren.make_update(config, model, task)
        start, stop = start - first, stop - first
        state = updates[name](states[name], start, stop)
        losses = state.loss[start:stop]
        metrics = {
            "task": name,
            "task_step": stop,
            "loss": float(losses[-1].mean()),
        }
        if stop in task.snapshots:
            state = _record(config, model, task, state, stop)
            mse = np.asarray(state.mse[task.snapshots.index(stop)])
            metrics["psnr"] = float(functa.mean_psnr(mse))
        return {**states, name: state}, losses, metrics

    def steps(task, *intervals):
        return {
            firsts[task.name] + step for step in loop.every(task.num_steps, *intervals)
        }

    stops, saves = set(), set()
    for task in tasks:
        stops |= steps(task, config.log_every)
        stops |= {firsts[task.name] + step for step in task.snapshots}
        saves |= steps(task, config.checkpoint_every)
    return loop.train(run, states, advance, stops=stops, saves=saves)


def _record(config, model, task, state, step):
    """Measures and stores the reconstructions after `step`."""
    values = _reconstruct(config, model, state.params, task)
    mse = jnp.mean(jnp.square(values - data.to_float(task.images)), axis=(1, 2, 3))
    k = task.snapshots.index(step)
    return state.replace(
        mse=state.mse.at[k].set(mse),
        shown=state.shown.at[k].set(values[: state.shown.shape[1]]),
    )


def _reconstruct(config, model, params, task):
    # Measured with the exported parameters, to include the rounding of the conversion.
    folded = jax.vmap(lambda p: fold_range(p, config.coord_range))(params)
    return evaluate_fields(model, folded, task.images.shape[1:3], False)


def _evaluate(run, model, tasks, states):
    config = run.config
    folded = {
        task.name: jax.vmap(lambda p: fold_range(p, config.coord_range))(
            states[task.name].params
        )
        for task in tasks
    }
    # Before the figures, which need the most memory.
    run.say("writing the functaset ...")
    latents = [np.asarray(jax.vmap(_ravel)(folded[task.name])) for task in tasks]
    written = _make_functaset(config, tasks, states, np.concatenate(latents))
    files.write_atomic(
        run.workdir / "functaset.npz",
        lambda file: functa.save_functaset(file, written),
        mode="wb",
    )
    run.say("evaluating the fields ...")
    summary = {}
    arrays = {"tasks": np.array([task.name for task in tasks])}
    for task in tasks:
        state = states[task.name]
        psnr = np.asarray(functa.psnr(state.mse))  # (K, B)
        curve = np.asarray(functa.psnr(state.loss))  # (S, B)
        summary |= _summarize(task, psnr, curve)
        few = jax.tree.map(lambda x: x[:_NUM_LARGE], folded[task.name])
        shape = task.images.shape[1:3]
        large = evaluate_fields(model, few, enlarged_shape(shape), False)
        shown = np.asarray(state.shown)
        arrays |= {
            f"{task.name}_steps": np.array(task.snapshots),
            f"{task.name}_psnr": psnr,
            f"{task.name}_curve": curve.mean(1),
            f"{task.name}_image": task.images[: shown.shape[1]],
            f"{task.name}_shown": _to_uint8(shown),
            f"{task.name}_large": _to_uint8(large),
            f"{task.name}_gradient": np.asarray(gradient_magnitude(model, few, shape)),
        }
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir)
    return summary | {"num_params": written.latent.shape[1]}


def enlarged_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The size (H, W) at which a field is drawn: four times that of its image.

    The longer side has at most 4,096 pixels, or those of the image.
    """
    factor = max(1, min(4, _LARGEST_SIDE // max(shape)))
    return tuple(factor * side for side in shape)


# Number of images per task whose field is drawn enlarged, and its largest side.
_NUM_LARGE, _LARGEST_SIDE = 2, 4096


def _ravel(params):
    return jax.flatten_util.ravel_pytree(params)[0]


def _to_uint8(values):
    return np.uint8(np.round(255 * np.clip(values, 0, 1)))


def _summarize(task, psnr, curve):
    """The summary of one task.

    Args:
      task: the task.
      psnr: PSNR of the reconstructions, (K, B).
      curve: PSNR of the pixels of each step, (S, B).
    """
    reached = curve >= EIGHT_BITS
    steps = np.where(reached.any(0), reached.argmax(0), -1)
    # Largest drop of the training PSNR below its previous maximum, in the second half.
    falls = np.maximum.accumulate(curve) - curve
    return {
        f"{task.name}_num_images": len(task.images),
        f"{task.name}_steps": task.snapshots,
        f"{task.name}_psnr": psnr.mean(1),
        f"{task.name}_psnr_std": psnr.std(1),
        f"{task.name}_psnr_min": psnr.min(1),
        # -1: some image does not reach it.
        f"{task.name}_steps_to_8_bits": -1 if (steps < 0).any() else steps.max(),
        f"{task.name}_largest_late_fall": falls[len(curve) // 2 :].max(),
    }


def _make_functaset(config, tasks, states, latents):
    """The networks of all tasks, in order, for coordinates in [0, 1]^2."""
    psnr = np.concatenate([functa.psnr(states[t.name].mse[-1]) for t in tasks])
    return functa.Functaset(
        latent=latents,
        label=np.concatenate([task.labels for task in tasks]).astype(np.int32),
        psnr=psnr.astype(np.float32),
        split=np.full(len(latents), "train"),
        mean=latents.mean(0),
        std=latents.std(0),
        config={
            "model": config.model.to_dict(),
            "dataset": config.image or config.dataset.name,
            "class_names": tasks[0].class_names,
            "tasks": [
                {"name": t.name, "num_images": len(t.images), "num_steps": t.num_steps}
                for t in tasks
            ],
        },
        # The networks share no weights.
        params_sha256=functaset.hash_params({}),
    )


if __name__ == "__main__":
    launch.launch("fit_image", train_and_evaluate)
