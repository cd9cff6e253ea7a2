"""Meta-learns a field with the labels of its signals in the outer loss.

    python -m experiments.meta_classify \\
        --config=experiments/configs/meta_classify.py:digits

The inner loop reconstructs an image and sees no label. The outer loss adds the
cross-entropy of a classifier of the latents, whose gradient reaches the field through
the inner loop. The control trains the same field without labels, and then the same
classifier on its latents, for as many steps. A validation part of the training split
selects the step of each method, and only this one is evaluated on the test split.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.common import data, devices, launch, runs, settings
from experiments.common.sweep import mean_and_std, sweep
from experiments.configs import meta_classify as configs
from experiments.drawing import figures
from experiments.networks import heads
from experiments.training import controls, encoding, meta_classifier
from experiments.training.meta_classifier import Part, Problem
from functa import functaset


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    if config.warm_start_steps >= config.num_steps:
        raise ValueError(
            f"warm_start_steps must be below num_steps {config.num_steps}, got "
            f"{config.warm_start_steps}."
        )
    devices.check_divisible(config.batch_size)
    meta_classifier.make_optimizers(config)
    loaded = data.load_dataset(**config.dataset)
    devices.say(loaded.found)
    digests = data.digests(loaded.splits)
    problem = make_problem(config, loaded)

    def finish(run, summaries):
        table = {}
        for method in config.methods:
            rows = [
                {key: summary[key] for key in _RESULTS}
                for name, summary in summaries.items()
                if name.startswith(method)
            ]
            mean = mean_and_std(rows)
            table |= {f"{method}_{key}": value for key, value in mean.items()}
        # What linear codes with as many values reach on the same images.
        table |= controls.linear_controls(loaded.splits, problem.model.latent_shape)
        table |= {f"num_{name}": len(problem[i].label) for i, name in enumerate(_PARTS)}
        figures.draw(run.workdir, {**table, "runs": summaries})
        return table

    return sweep(
        config,
        workdir,
        lambda run: _run(run, problem),
        axes={"methods": "{}", "seeds": "seed{}"},
        inputs=digests,
        nested=True,
        finish=finish,
    )


_PARTS = ("train", "validation", "test")
_RESULTS = (
    *("test_accuracy", "test_psnr", "validation_accuracy", "validation_psnr"),
    *("step", "num_recoveries", "num_field_params", "num_head_params"),
)


def make_problem(config: ConfigDict, loaded: data.Dataset) -> Problem:
    """The parts of the data set, the field and the head; checks that they fit.

    The validation part is a fixed random choice of images of the training split.

    Raises:
      ValueError: if they do not, or if labels are missing.
    """
    splits = {name: Part(**arrays) for name, arrays in loaded.splits.items()}
    for name, part in splits.items():
        if part.label.min() < 0:
            raise ValueError(
                f"the {name} split of data set {config.dataset.name!r} has images "
                "without a label (-1); meta_learn needs no labels."
            )
    train, test = (splits[name] for name in data.SPLITS)
    num_images = len(train.label)
    num_validation = max(round(config.validation_fraction * num_images), 1)
    held_out, kept = data.hold_out(num_images, num_validation)
    rows = np.sort(held_out), kept
    validation, train = (Part(*(x[i] for x in train)) for i in rows)
    data.count_batches(len(kept), config.batch_size)  # refuses a larger batch
    classes = np.unique(train.label)
    if len(classes) < 2:
        raise ValueError(
            f"the {len(kept)} training images of data set {config.dataset.name!r} have "
            "one class only."
        )
    for name, part in ("validation", validation), ("test", test):
        absent = np.setdiff1d(part.label, classes)
        if absent.size:
            raise ValueError(
                f"the {name} part of data set {config.dataset.name!r} has images of "
                f"class {absent[0]}, but the {len(kept)} training images have none."
            )
    return Problem(
        train, validation, test, *_make_networks(config, train.image.shape, classes)
    )


def _make_networks(config, shape, classes):
    """The field, its view of the images and the head."""
    encoding.complete_channels(config, shape[-1])
    with settings.blamed_on("model"):
        model = functaset.make_model(config.model.to_dict())
        latent = model.initial_latent()
        if not latent.size:
            raise ValueError(f"a latent needs entries, got the shape {latent.shape}.")
        # One latent belongs to each image.
        view = encoding.make_view(model, shape[1:3], separate=False)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2)), latent)
    num_classes = 1 + int(classes.max())
    head = heads.make_head(
        config.head.to_dict(), num_classes, model.latent_shape, entry="head"
    )
    with settings.blamed_on("head"):
        params = jax.eval_shape(head.init, jax.random.key(0))
        jax.eval_shape(head.apply, params, latent[None])
    return model, view, head


def _run(run: runs.Run, problem: Problem) -> dict[str, Any]:
    """Trains by one method, and tests the step that the validation part selects."""
    state = meta_classifier.train(run, problem)
    best = jax.device_get(state.best)
    found = {}
    for name in ("validation", "test"):
        part = getattr(problem, name)
        psnr, predicted = meta_classifier.measure(run.config, problem, best, part)
        found[f"{name}_accuracy"] = np.mean(predicted == part.label)
        found[f"{name}_psnr"] = psnr.mean()
    metrics = run.metrics()
    return found | {
        "num_recoveries": max(m.get("num_recoveries", 0) for m in metrics),
        "step": best["step"],
        "num_field_params": optax.tree.size(best["weights"]["params"]),
        "num_head_params": optax.tree.size(best["head"]),
        "curves": {
            name: [[m["step"], m[name]] for m in metrics if name in m]
            for name in ("validation_psnr", "validation_accuracy")
        },
    }


if __name__ == "__main__":
    launch.launch("meta_classify", train_and_evaluate)
