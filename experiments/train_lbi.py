"""Trains an image classifier with DessiLBI, DessiLBI+Adam and Adam (report, 3.3).

    python -m experiments.train_lbi --config=experiments/configs/train_lbi.py:digits

With several methods or seeds each has a run folder of its own inside that of the run,
`METHOD_seedN`, for prune_lbi to read; the outer folder has the table and the curves.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

import lbi
from experiments.common import figures, files, launch, runs
from experiments.networks import registry
from experiments.training import classifier, loop, optimizers
from experiments.training.classifier import Images, TrainState

# Of 500 training images, for a network with batch normalisation.
_NUM_RECALIBRATION_BATCHES = 5


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    _check_config(config)
    images = classifier.load_images(config)
    if len(config.methods) == len(config.seeds) == 1:
        return _train_one(config, Path(workdir), images)
    with runs.open_run(workdir, config) as run:
        if run.summary is not None:
            return run.show_summary()
        summaries, curves = {}, {}
        for method in config.methods:
            for seed in config.seeds:
                single = ConfigDict(config)
                single.methods, single.seeds = (method,), (seed,)
                name = f"{method}_seed{seed}"
                run.say(f"--- {name}")
                summaries[name] = _train_one(single, run.workdir / name, images)
                metrics = files.read_metrics(run.workdir / name / "metrics.jsonl")
                epochs = [m for m in metrics if "test_accuracy" in m]
                for key in ("train_accuracy", "test_accuracy"):
                    curves[f"{name}_{key}"] = np.array([m[key] for m in epochs])
        files.write_npz(run.workdir / "arrays.npz", curves)
        figures.draw(run.workdir)
        return run.finish(_table(config, summaries))


def _table(config, summaries):
    """Mean and deviation over the seeds of each method's final numbers."""
    table = {}
    for method in config.methods:
        own = [summaries[f"{method}_seed{seed}"] for seed in config.seeds]
        for key in ("test_accuracy", "sparse_test_accuracy", "density"):
            values = [summary[key] for summary in own if key in summary]
            if values:
                table[f"{method}_{key}"] = np.mean(values)
                # Of one seed there is no deviation.
                if len(values) > 1:
                    table[f"{method}_{key}_std"] = np.std(values, ddof=1)
        table[f"{method}_seconds"] = np.mean([summary["seconds"] for summary in own])
    return table | {"runs": summaries}


def _train_one(config, workdir, images):
    method, seed = config.methods[0], config.seeds[0]
    model = registry.make_model(config.model.to_dict(), images.num_classes)
    steps_per_epoch = classifier.count_steps(images, config.batch_size)
    num_steps = config.num_epochs * steps_per_epoch
    with runs.open_run(workdir, config) as run:
        if run.summary is not None:
            return run.show_summary()
        variables = classifier.init_variables(model, images, seed)
        _forecast(run, method, variables["params"], num_steps)
        optimizer = classifier.make_optimizer(
            config, method, variables["params"], num_steps
        )
        update = classifier.make_update(
            model,
            images,
            optimizer,
            batch_size=config.batch_size,
            augmented=config.augment,
            seed=seed,
        )
        predict = classifier.make_predict(model, images)
        state = classifier.init_state(variables, optimizer, num_steps)
        step, state = run.restore(state)
        if step < num_steps:
            run.say(f"compiling the step of {method}, {num_steps} steps to do ...")
        while step < num_steps:
            start = step
            step = min(
                (start // every + 1) * every
                for every in (
                    config.log_every,
                    config.checkpoint_every,
                    steps_per_epoch,
                )
            )
            state = update(state, start, step)
            losses = np.asarray(state.loss[start:step])
            loop.check_finite(losses, first_step=start + 1)
            metrics = {"loss": float(losses.mean())}
            if step % steps_per_epoch == 0:
                epoch = slice(step - steps_per_epoch, step)
                metrics["train_accuracy"] = float(state.accuracy[epoch].mean())
                metrics |= measure(model, predict, state, images)
            run.log(step, metrics, num_steps=num_steps)
            if step % config.checkpoint_every == 0 or step == num_steps:
                run.save(step, state)
        summary = _summarize(run, model, state, images, predict)
        if lbi.find_states(state.opt_state):
            arrays = _path(state, steps_per_epoch)
            files.write_npz(run.workdir / "arrays.npz", arrays)
            figures.draw(run.workdir)
        return run.finish(summary)


def _path(state, steps_per_epoch):
    """When each group entered, and its norm at the end: arrays for the figures."""
    arrays = {
        "steps_per_epoch": np.array(steps_per_epoch),
        "num_steps": np.array(len(state.loss)),
    }
    entries = lbi.entry_steps(state.opt_state)
    assigned = lbi.path.penalties_of(state.opt_state)
    leaves = lbi.penalty.named_leaves(state.params)
    for path, steps in entries.items():
        layer = path.removesuffix("/kernel")
        arrays[f"entry_{layer}"] = steps.ravel()
        arrays[f"norm_{layer}"] = np.ravel(assigned[path].norms(leaves[path]))
    return arrays


def _forecast(run, method, params, num_steps):
    """Says what the path can be expected to do, before the run is done in vain."""
    config = run.config
    settings = config.optimizer[method]
    if settings.name == "adam":
        return
    schedule = optimizers.make_schedule(settings, num_steps)
    clocked = schedule, settings.options.nu, num_steps
    penalty = classifier.make_penalty(config, method, params, num_steps)
    expected = lbi.forecast_entries(params, *clocked, penalty)
    fading = lbi.forecast_entries(
        params, *clocked, penalty, decaying=True, kappa=settings.options.kappa
    )
    run.say(
        f"clock at the end {lbi.final_clock(*clocked):.3g}; groups that enter if "
        "their norms stay (if the coupling alone moves them): "
        + ", ".join(
            f"{name} {100 * share:.0f} % ({100 * fading[name]:.0f} %)"
            for name, share in expected.items()
        )
    )
    if not any(expected.values()):
        run.say(
            "warning: no group can enter; the run would only decay its weights. Take "
            "--config.penalty=suggested, a smaller nu or a higher rate."
        )


def measure(
    model: nn.Module, predict: Any, state: TrainState, images: Images
) -> dict[str, Any]:
    """Test accuracy of the dense and the sparse network, and the path's place.

    The sparse one is W on the support, its batch statistics measured anew.
    """
    pixels, labels = images.test
    metrics = {
        "test_accuracy": classifier.accuracy(predict(state.variables, pixels), labels)
    }
    if not lbi.find_states(state.opt_state):
        return metrics
    sparse = {
        **state.variables,
        "params": lbi.sparse_params(state.params, state.opt_state),
    }
    sparse = classifier.recalibrate(
        model, images, sparse, num_batches=_NUM_RECALIBRATION_BATCHES
    )
    inside = lbi.in_support(state.opt_state)
    total = sum(x.size for x in inside.values())
    return metrics | {
        "sparse_test_accuracy": classifier.accuracy(predict(sparse, pixels), labels),
        "clock": float(lbi.clock(state.opt_state)),
        "density": sum(int(x.sum()) for x in inside.values()) / total,
        "density_per_layer": {k: float(v.mean()) for k, v in inside.items()},
    }


def _summarize(run, model, state, images, predict):
    metrics = files.read_metrics(run.workdir / "metrics.jsonl")
    final = measure(model, predict, state, images)
    epochs = [m["test_accuracy"] for m in metrics if "test_accuracy" in m]
    return final | {
        "best_epoch_test_accuracy": max(epochs),
        "num_params": sum(x.size for x in jax.tree.leaves(state.params)),
    }


def _check_config(config):
    for name in ("num_epochs", "log_every", "checkpoint_every"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}.")
    unknown = [m for m in config.methods if m not in config.optimizer]
    if unknown or not config.methods or not config.seeds:
        raise ValueError(
            f"methods {config.methods} must be some of {', '.join(config.optimizer)}, "
            "and seeds at least one."
        )
    if config.model.type == "DeepLinear":
        raise ValueError("config.model.type must be LeNet or VGG, got 'DeepLinear'.")
    if config.penalty not in ("auto", "suggested"):
        raise ValueError(f"penalty {config.penalty!r} is neither auto nor suggested.")


if __name__ == "__main__":
    launch.launch("train_lbi", train_and_evaluate)
