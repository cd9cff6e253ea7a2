"""Trains an image classifier with DessiLBI, DessiLBI+Adam and Adam.

    python -m experiments.train_lbi --config=experiments/configs/train_lbi.py:digits

With several methods or seeds, each training has its own run folder `METHOD_seedN`
inside that of the run, which prune_lbi reads. The outer folder has the table and the
curves.
"""

from pathlib import Path
from typing import Any

import optax
from ml_collections import ConfigDict

import lbi
from experiments.common import files, launch, settings
from experiments.common.sweep import mean_and_std, sweep
from experiments.configs import train_lbi as configs
from experiments.drawing import figures
from experiments.training import classifier
from experiments.training import lbi as lbi_training


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes one experiment; returns its summary."""
    settings.check(config, configs.RULES)
    images = classifier.load_images(config)
    lbi_training.check(config, images)
    digests = classifier.digests(images)
    return sweep(
        config,
        workdir,
        lambda run: _train_one(run, images),
        axes={"methods": "{}", "seeds": "seed{}"},
        inputs=digests,
        finish=_summarize_all,
    )


def _train_one(run, images):
    problem = classifier.make_problem(run.config, images)
    state = lbi_training.train(run, problem)
    accuracies = [m["test_accuracy"] for m in run.metrics() if "test_accuracy" in m]
    if lbi.find_states(state.opt_state):
        arrays = lbi_training.path_arrays(problem, state)
        files.write_npz(run.workdir / "arrays.npz", arrays)
        figures.draw(run.workdir)
    return lbi_training.measure(problem, state) | {
        "best_epoch_test_accuracy": max(accuracies),
        "num_params": optax.tree.size(state.params),
    }


def _summarize_all(run, summaries):
    """Mean and deviation over the seeds of each method."""
    figures.draw(run.workdir)
    table = {}
    for method in run.config.methods:
        own = [summaries[f"{method}_seed{seed}"] for seed in run.config.seeds]
        kept = ("test_accuracy", "sparse_test_accuracy", "density", "seconds")
        rows = [{k: row[k] for k in kept if k in row} for row in own]
        table |= {f"{method}_{k}": v for k, v in mean_and_std(rows).items()}
    return table


if __name__ == "__main__":
    launch.launch("train_lbi", train_and_evaluate)
