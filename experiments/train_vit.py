"""Trains a Vision Transformer, from scratch or from a checkpoint file.

python -m experiments.train_vit --config=experiments/configs/train_vit.py:smoke
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import vit
from experiments.common import files, launch, settings
from experiments.common.sweep import sweep
from experiments.configs import train_vit as configs
from experiments.drawing import figures
from experiments.training import classifier
from experiments.training import vit as vit_training
from experiments.training.classifier import Images
from experiments.training.vit import Problem


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    vit_training.check_stages(config, configs.RULES)
    vit_training.check_options(config)
    images = vit_training.load_images(config)
    vit_training.check(config, images)
    jax.eval_shape(lambda: make_problem(config, images).params)
    digests = classifier.digests(images)
    if config.checkpoint:
        digests |= {"checkpoint": vit_training.digest(config.checkpoint)}
    return sweep(
        config,
        workdir,
        lambda run: _train_one(run, images),
        inputs=digests,
    )


def _train_one(run, images):
    config = run.config
    problem = make_problem(config, images)
    predict = vit_training.make_predict(problem)
    pixels, labels = images.test

    def evaluate(state):
        logits = predict(state.average, pixels)
        return {"test_accuracy": classifier.accuracy(logits, labels)}

    state = vit_training.train(run, problem, evaluate=evaluate)
    vit.save_checkpoint(
        run.workdir / "model.npz",
        problem.model,
        state.average,
        mean=images.mean,
        std=classifier.divisor(images),
    )
    metrics = run.metrics()
    accuracies = [m["test_accuracy"] for m in metrics if "test_accuracy" in m]
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    arrays = {"steps_per_epoch": np.array(steps_per_epoch)}
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir)
    return evaluate(state) | {
        "best_test_accuracy": max(accuracies),
        "train_accuracy": metrics[-1]["train_accuracy"],
        "num_params": optax.tree.size(problem.params),
    }


def make_problem(config: ConfigDict, images: Images) -> Problem:
    """The network of config.model, with random weights or those of a checkpoint."""
    fields = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
    if config.checkpoint:
        # The shapes in the file define the other fields.
        kept = ["dtype", *(name for name in fields if name.endswith("_rate"))]
        fields = {name: fields[name] for name in kept}
        return vit_training.load_problem(
            config.checkpoint,
            config.image_size,
            images,
            config.checkpoint_options.to_dict(),
            **fields,
        )
    return vit_training.init_problem(
        config.seeds[0], config.image_size, images, **fields
    )


if __name__ == "__main__":
    launch.launch("train_vit", train_and_evaluate)
