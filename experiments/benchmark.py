"""Times the training step of each optimizer, and weighs its state.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:lenet

The methods take turns, round after round, so that whatever else the machine does meets
all of them; the median over the rounds counts.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import image_classifier, runtime

_NUM_CLASSES = 10


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs one benchmark; returns its summary."""
    for name in ("batch_size", "num_rounds", "steps_per_round"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    with runtime.open_run(workdir, config) as run:
        if run.summary is not None:
            return run.show_summary()
        images = _random_images(config)
        model = image_classifier.make_model(config.model.to_dict(), _NUM_CLASSES)
        steps_per_epoch = image_classifier.count_steps(images, config.batch_size)
        states, updates, summary = {}, {}, {}
        for method in config.methods:
            variables = image_classifier.init_variables(model, images, config.seed)
            # A run of 20 epochs of 60,000 images, as far as schedules go.
            optimizer = image_classifier.make_optimizer(
                config, method, variables["params"], 20 * 60_000 // config.batch_size
            )
            states[method] = image_classifier.init_state(
                variables, optimizer, steps_per_epoch
            )
            updates[method] = image_classifier.make_update(
                model,
                images,
                optimizer,
                batch_size=config.batch_size,
                augmented=False,
                seed=config.seed,
            )
            started = time.perf_counter()
            states[method] = updates[method](states[method], 0, 1)
            jax.block_until_ready(states[method])
            params_bytes = _num_bytes(variables["params"])
            summary[f"{method}_compile_seconds"] = time.perf_counter() - started
            summary[f"{method}_state_over_params"] = (
                _num_bytes(states[method].opt_state) / params_bytes
            )
        times = {method: [] for method in config.methods}
        for number in range(config.num_rounds):
            for method in config.methods:
                started = time.perf_counter()
                states[method] = updates[method](states[method], 0, steps_per_epoch)
                jax.block_until_ready(states[method])
                seconds = time.perf_counter() - started
                times[method].append(1000 * seconds / steps_per_epoch)
            run.say(
                f"round {number + 1}/{config.num_rounds}, ms per step: "
                + ", ".join(f"{m} {t[-1]:.4g}" for m, t in times.items())
            )
        first = np.array(times[config.methods[0]])
        for method, values in times.items():
            summary[f"{method}_milliseconds"] = np.median(values)
            # Of the same round: what slows the machine down slows both.
            summary[f"{method}_over_{config.methods[0]}"] = np.median(values / first)
        return run.finish(summary | {"rounds": times})


def _random_images(config):
    rng = np.random.default_rng(config.seed)
    count = config.batch_size * config.steps_per_round
    shape = (count, config.image_size, config.image_size, config.num_channels)
    split = (
        rng.integers(0, 256, shape, dtype=np.uint8),
        rng.integers(0, _NUM_CLASSES, count).astype(np.int32),
    )
    scale = np.full((1, 1, 1, config.num_channels), 0.5, np.float32)
    return image_classifier.Images(split, split, scale, scale, _NUM_CLASSES)


def _num_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    runtime.launch("benchmark", train_and_evaluate)
