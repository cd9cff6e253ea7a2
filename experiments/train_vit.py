"""Trains a Vision Transformer, from scratch or from a checkpoint file (report, 2.4).

python -m experiments.train_vit --config=experiments/configs/train_vit.py:smoke
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import vit
from experiments.common import figures, files, launch, settings
from experiments.common.sweep import sweep
from experiments.configs import train_vit as configs
from experiments.training import classifier
from experiments.training import vit as vit_training


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    vit_training.check_stages(config)
    images = vit_training.load_images(config)
    return sweep(config, workdir, lambda run: _train_one(run, images))


def _train_one(run, images):
    config = run.config
    model, params = make_model(config, images)
    predict = vit_training.make_predict(model, images, config.image_size)
    pixels, labels = images.test

    def evaluate(state):
        logits = predict(state.average, pixels)
        return {"test_accuracy": classifier.accuracy(logits, labels)}

    state = vit_training.train(run, model, images, params, evaluate=evaluate)
    vit.save_checkpoint(run.workdir / "model.npz", model, state.average)
    metrics = run.metrics()
    accuracies = [m["test_accuracy"] for m in metrics if "test_accuracy" in m]
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    arrays = {"steps_per_epoch": np.array(steps_per_epoch)}
    files.write_npz(run.workdir / "arrays.npz", arrays)
    figures.draw(run.workdir)
    return evaluate(state) | {
        "best_test_accuracy": max(accuracies),
        "train_accuracy": metrics[-1]["train_accuracy"],
        "num_params": sum(x.size for x in jax.tree.leaves(params)),
    }


def make_model(config, images):
    """The model of config.model and its initial parameters: (model, params)."""
    options = config.model.to_dict()
    dtype = vit_training.parse_dtype(options.pop("dtype"))
    if config.checkpoint:
        model, params = vit.load_checkpoint(
            config.checkpoint,
            image_size=config.image_size,
            num_classes=images.num_classes,
        )
        vit_training.check_channels(model, params, images)
        # The shapes in the file define the other fields.
        rates = {k: v for k, v in options.items() if k.endswith("_rate")}
        return model.clone(dtype=dtype, **rates), params
    try:
        model = vit.make(num_classes=images.num_classes, dtype=dtype, **options)
    except TypeError as error:
        raise ValueError(f"config.model: {error}") from None
    channels = images.train[0].shape[-1]
    shape = (1, config.image_size, config.image_size, channels)
    variables = jax.jit(model.init)(jax.random.key(config.seeds[0]), jnp.zeros(shape))
    return model, variables["params"]


if __name__ == "__main__":
    launch.launch("train_vit", train_and_evaluate)
