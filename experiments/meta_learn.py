"""Meta-learns a modulated SIREN over a data set (Functa; Dupont et al. 2022).

    python -m experiments.meta_learn --config=experiments/configs/meta_learn.py:digits

Trains the shared weights and the inner learning rates, evaluates them on the test
split, draws figures, and writes the functaset of both splits into the run folder.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import functa
from experiments.common import data, devices, fields, files, launch, settings
from experiments.common.sweep import sweep
from experiments.configs import meta_learn as configs
from experiments.drawing import figures
from experiments.training import controls, encoding, meta, optimizers
from functa import functaset


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    loaded = data.load_dataset(with_fields=True, **config.dataset)
    devices.say(loaded.found)
    dataset = loaded.splits
    learner = None
    if config.init_from:
        learner = encoding.load_learner(config.init_from)
        _adopt(config, learner)
        encoding.check_coords(learner, loaded, config.init_from)
    signals = data.signals(dataset["train"])
    _complete_config(config, signals.shape, is_image=signals.dtype == np.uint8)
    _check_training(config, loaded)

    def experiment(run):
        model = functaset.make_model(run.config.model.to_dict())
        coords, weight = encoding.points_of(model, loaded)
        state = meta.train(run, model, signals, learner, coords=coords, weight=weight)
        trained = encoding.make_learner(run.config, vars(state))
        trained = trained._replace(coords=coords, weight=weight)
        return _evaluate(run, trained, loaded)

    digests = data.digests(loaded.splits)
    if learner is not None:
        digests["network of init_from"] = functaset.hash_params(learner[1:4])
    return sweep(config, workdir, experiment, inputs=digests)


def _adopt(config, learner):
    """Uses the model, the cells and the inner loop of the run config.init_from."""
    grid = config.model.get("grid")
    trained = learner.model_config.get("grid", ())
    if grid is not None and tuple(grid) != tuple(trained):
        raise ValueError(
            f"model.grid is {tuple(grid)}, but {config.init_from} was trained with "
            + (f"the grid {tuple(trained)}." if trained else "one latent for an image.")
        )
    if config.cell is None:
        config.cell = learner.cell
    dtype = {"derivative_dtype": config.model.derivative_dtype}
    config.model = ConfigDict(learner.model_config | dtype)
    for name, value in learner.inner.items():
        if config.inner[name] != value:
            devices.say(
                f"inner.{name} is {value}, as in {config.init_from}, instead of "
                f"{config.inner[name]}."
            )
        config.inner[name] = value


def _complete_config(config, shape, *, is_image):
    """Sets the number of channels, and checks the fields that depend on the data."""
    num_images, *points, channels = shape
    kind = "images" if is_image else "fields"
    encoding.complete_channels(config, channels, kind)
    for name in ("latent_dim", "channels"):
        if config.model.get(name, 1) < 1:
            raise ValueError(
                f"model.{name} must be at least 1, got {config.model[name]}."
            )
    _complete_cells(config, points, kind)
    if config.by_cells:
        num_images *= math.prod(config.model.grid)
    # Refuses a batch that is larger than the data set.
    data.batch_indices(0, 0, num_examples=num_images, batch_size=config.batch_size)
    devices.check_divisible(config.batch_size)
    factor, by = config.coarse_factor, "x".join(map(str, points))
    if config.coarse_steps and not is_image:
        raise ValueError("coarse_steps is for images; set it to 0.")
    if config.coarse_steps and any(side % factor for side in points):
        raise ValueError(f"coarse_factor {factor} does not divide the images' {by}.")
    if config.num_pixels > math.prod(points):
        raise ValueError(
            f"num_pixels must be at most {math.prod(points)}, the points of one of the "
            f"{kind}, got {config.num_pixels}."
        )


def _check_training(config, loaded):
    """Makes model and optimizers, to refuse their fields before the training."""
    with settings.blamed_on("model"):
        model = functaset.make_model(config.model.to_dict())
        coords, _ = encoding.points_of(model, loaded)
        num_coords = data.signals(loaded.splits["train"]).ndim - 2
        num_coords = num_coords if coords is None else coords.shape[-1]
        point, latent = jnp.zeros((1, num_coords)), model.initial_latent()
        jax.eval_shape(model.init, jax.random.key(0), point, latent)
    meta.make_optimizer(config)
    with settings.blamed_on("eval.optimizer"):
        optimizer = _make_further_optimizer(config.eval)
        jax.eval_shape(
            lambda z: functa.optimize_latent(
                lambda z: z, z, z, optimizer=optimizer, num_steps=1
            ),
            jnp.zeros(3),
        )


def _make_further_optimizer(settings):
    make = optimizers.find(settings.optimizer, "eval.optimizer")
    if not settings.learning_rate:
        return make()
    steps = max(settings.more_steps, 1)
    return make(optax.cosine_decay_schedule(settings.learning_rate, steps))


def _complete_cells(config, shape, kind):
    """Sets the size of a cell; checks the fields that concern grids of latents."""
    model = functaset.make_model(config.model.to_dict())
    spatial = isinstance(model, functa.SpatialSiren)
    if not spatial or model.interpolation != "nearest":
        if config.by_cells:
            raise ValueError(
                "by_cells needs model.type SpatialSiren and interpolation nearest."
            )
        if config.cell is not None:
            raise ValueError("cell is for a SpatialSiren with interpolation nearest.")
    if not spatial:
        return
    grid, by = ("x".join(map(str, sizes)) for sizes in (model.grid, shape))
    if len(model.grid) != len(shape) or any(
        cells < 1 or points % cells
        for points, cells in zip(shape, model.grid, strict=True)
    ):
        raise ValueError(
            f"model.grid must divide the {kind} of {by} "
            f"{'pixels' if kind == 'images' else 'points'}, got {grid}."
        )
    if model.interpolation != "nearest":
        return
    cell = tuple(n // cells for n, cells in zip(shape, model.grid, strict=True))
    if config.cell not in (None, cell):
        raise ValueError(
            f"cell is {config.cell}, but a grid of {grid} has cells of {cell} pixels."
        )
    config.cell = cell
    if config.by_cells and not model.separable:
        raise ValueError(
            f"by_cells needs model.kernel_size 1, got {model.kernel_size}; with "
            f"by_cells=False whole {kind} are trained."
        )
    if config.coarse_steps or config.num_pixels:
        raise ValueError(
            "cells are trained with all their pixels; set coarse_steps and num_pixels "
            "to 0."
        )


def _evaluate(run, learner, loaded):
    config, dataset = run.config, loaded.splits
    run.say("evaluating on the test split ...")
    batch_size = config.eval.batch_size
    mse = {}
    for split, num_images in ("test", config.eval.num_images), ("train", _NUM_TRAIN):
        images = data.signals(dataset[split])
        encoded = encoding.encode(
            learner, images[: num_images or len(images)], batch_size=batch_size
        )
        mse[split] = np.concatenate([values for _, values in encoded])
    written = {}
    if config.write_functaset:
        run.say("writing the functaset ...")
        summary = encoding.write_functaset(
            run.workdir / "functaset.npz",
            learner,
            dataset,
            config=data.describe_source(config.dataset, loaded),
            batch_size=batch_size,
        )
        written = {f"functaset_{name}": value for name, value in summary.items()}
    further = _fit_further(learner, data.signals(dataset["test"]), config.eval)
    further_psnr = np.asarray(functa.psnr(further)).mean(0)
    num_steps = learner.inner["num_steps"]
    # What linear codes with as many values reach on the same images.
    if "image" in dataset["test"]:
        linear = controls.linear_controls(
            dataset, learner.model.latent_shape, num_images=config.eval.num_images
        )
        arrays = _showcase(learner, dataset, mse, batch_size)
    else:
        run.say("computing the linear control ...")
        linear, arrays = _compare_fields(run, learner, loaded)
    arrays |= {
        "further_psnr": further_psnr,
        "num_steps": np.array(num_steps),
        "test_psnr": np.asarray(functa.psnr(mse["test"][:, -1])),
    }
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir)
    metrics = run.metrics()
    if config.max_drop and metrics:
        written["num_recoveries"] = metrics[-1]["num_recoveries"]
    return {
        "test_psnr": functa.mean_psnr(mse["test"][:, -1]),
        **linear,
        "test_psnr_of_mean": functa.psnr_of_mean(mse["test"][:, -1]),
        "test_psnr_per_step": np.asarray(functa.psnr(mse["test"])).mean(0),
        "num_test_images": len(mse["test"]),
        # The first more_images images only, as for the PSNR after the additional steps.
        "num_further_images": len(further),
        "num_further_steps": further.shape[1] - 1,
        "further_psnr_start": further_psnr[num_steps],
        "further_psnr": further_psnr[-1],
        **written,
    }


# Training images from which the figure of the best and the worst selects.
_NUM_TRAIN = 1000


def _fit_further(learner, images, settings):
    """MSE (B, S + more_steps + 1) of the inner loop and the additional steps."""
    shape = images.shape[1:-1]
    view = encoding.make_view(learner.model, shape, coords=learner.coords)
    optimizer = _make_further_optimizer(settings)

    @jax.jit
    @jax.vmap
    def fit(latent, target):
        return functa.optimize_latent(
            lambda z: view.apply_fn({"params": learner.params}, view.coords, z),
            latent,
            target,
            optimizer=optimizer,
            num_steps=settings.more_steps,
            weight=learner.weight,
        )

    mse = []
    images = images[: settings.more_images]
    batch_size = min(settings.batch_size, len(images))
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        [(latents, first)] = encoding.encode(learner, batch, batch_size=len(batch))
        with jax.default_matmul_precision("highest"):
            targets = view.split(data.to_float(batch))
            _, info = fit(latents.reshape(-1, *view.latent.shape), targets)
        later = info.mse.reshape(len(batch), -1, info.mse.shape[-1]).mean(1)
        mse.append(np.concatenate([first, later[:, 1:]], axis=1))
    return np.concatenate(mse)


def _compare_fields(run, learner, loaded):
    """The quality of fields and of their linear control; arrays for the figures."""
    config = run.config.eval
    train, test = (data.signals(loaded.splits[split]) for split in data.SPLITS)
    test = test[: config.num_images or len(test)]
    [*grid, channels] = learner.model.latent_shape
    num = controls.count_components(train, channels, grid)
    if num < channels:
        run.say(f"the linear control has {num} numbers: there are no more components.")
    codes = {"pca": controls.linear_code(train, test, num, grid, loaded.weight)}
    latents = [
        latents
        for latents, _ in encoding.encode(learner, test, batch_size=config.batch_size)
    ]
    codes["test"] = functaset.render(
        learner.model,
        learner.params,
        np.concatenate(latents),
        test.shape[1:-1],
        batch_size=config.batch_size,
        coords=learner.coords,
    )
    quality = {
        name: controls.measure(train, test, code, loaded.weight)
        for name, code in codes.items()
    }
    summary = {
        f"{name}_{key}": value
        for name, values in quality.items()
        for key, value in values.items()
        if (name, key) != ("test", "psnr")  # That of the encoding stands for it.
    }
    # Four signals of at least median power, from the least relative error on.
    axes = tuple(range(1, test.ndim))
    power = np.square(test - test.mean(axis=axes[:-1], keepdims=True)).mean(axes)
    error = np.square(codes["test"] - test).mean(axes) / np.maximum(power, 1e-12)
    order = np.argsort(np.where(power >= np.median(power), error, np.inf))
    order = order[: (len(order) + 1) // 2]
    chosen = order[np.linspace(0, len(order) - 1, 4).round().astype(int)]
    low, high = loaded.bounds
    shown = {"signals": test, "fields": codes["test"], "controls": codes["pca"]}
    arrays = {
        name: np.float32(low + (high - low) * values[chosen])
        for name, values in shown.items()
    }
    if learner.coords is not None:
        arrays["coords"] = learner.coords
    if arrays["signals"].ndim == 3:
        # Sound, to listen to: a file for each signal and each code.
        for name in shown:
            for number, sound in enumerate(arrays[name]):
                path = run.workdir / "sounds" / f"{number}_{name[:-1]}.wav"
                fields.write_wav(path, sound[:, 0])
    # The numbers of a cell in both codes, for the labels.
    return summary, arrays | {"code_sizes": np.array([channels, num])}


def _showcase(learner, dataset, mse, batch_size):
    """Arrays for the figures."""
    model, params = learner.model, learner.params
    shape = dataset["test"]["image"].shape[1:3]
    num_steps = learner.inner["num_steps"]

    def fit(images, num_steps=num_steps):
        rates = learner.learning_rate
        shorter = learner._replace(
            inner=learner.inner | {"num_steps": num_steps},
            learning_rate=rates[:num_steps] if rates.ndim == 2 else rates,
        )
        batches = encoding.encode(shorter, images, batch_size=batch_size)
        return np.concatenate([latents for latents, _ in batches])

    def draw(latents, shape=shape):
        return functaset.render(model, params, latents, shape, batch_size=batch_size)

    arrays = {}
    for split in data.SPLITS:
        order = np.argsort(mse[split][:, -1])
        for name, chosen in ("best", order[:4]), ("worst", order[-4:]):
            images = dataset[split]["image"][chosen]
            arrays[f"{split}_{name}"] = np.stack(
                [data.to_float(images), draw(fit(images))]
            )
            arrays[f"{split}_{name}_psnr"] = functa.psnr(mse[split][chosen, -1])
    images = dataset["test"]["image"][:4]
    steps = [draw(fit(images, n)) for n in range(num_steps + 1)]
    arrays["over_steps"] = np.stack([*steps, data.to_float(images)])
    arrays["latents"] = latents = fit(images)
    weights = np.linspace(0, 1, 9, dtype=np.float32)
    weights = weights.reshape(-1, *[1] * (latents.ndim - 1))
    arrays["interpolation"] = draw((1 - weights) * latents[0] + weights * latents[-1])
    arrays["super_resolved"] = draw(latents, tuple(4 * n for n in shape))
    return arrays


if __name__ == "__main__":
    launch.launch("meta_learn", train_and_evaluate)
