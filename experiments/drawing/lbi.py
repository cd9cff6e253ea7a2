"""The figures of structured sparsity: train_lbi, prune_lbi and compare_pruning."""

import numpy as np

from experiments.common import files
from experiments.drawing.panels import panels, share_labels
from experiments.drawing.run import bind
from lbi import plots

_OPTIMIZERS = {
    "adam": "Adam",
    "dessilbi": "DessiLBI",
    "dessilbi_adam": "DessiLBI+Adam",
}
_SCOPES = {
    "one_layer": "filters of {layer}",
    "layer": "all convolutions, each by the same share",
    "global": "all convolutions, ranked together",
}
_PRUNING_METHODS = {
    "dessilbi": "DessiLBI, order of entry",
    "dessilbi_adam": "DessiLBI+Adam, order of entry",
    "magnitude": "magnitude",
    "taylor": "Taylor, first order",
    "group_lasso": "group lasso, magnitude",
    "random": "random",
    # Last: it has no accuracy before fine-tuning, and the others keep their styles.
    "gradual": "gradual magnitude",
}


def _train_lbi(run):
    # A single training has its own log; a sweep has one folder per training.
    if not run.metrics:
        return bind({"accuracy": _lbi_accuracy}, run)
    return bind({"path": _path, "filters": _filters}, run)


def _lbi_accuracy(run):
    figure, axes = panels(2)
    labels = {
        "train": "training accuracy, mean over the epoch (%)",
        "test": "test accuracy (%)",
    }
    for ax, (split, y_label) in zip(axes[0], labels.items(), strict=True):
        curves = {}
        for method in run.config["methods"]:
            folders = [f"{method}_seed{seed}" for seed in run.config["seeds"]]
            logs = [
                files.read_metrics(run.workdir / folder / "metrics.jsonl")
                for folder in folders
            ]
            runs = [files.logged(log, f"{split}_accuracy")[1] for log in logs]
            epochs = np.arange(1, len(runs[0]) + 1)
            curves[_OPTIMIZERS.get(method, method)] = epochs, 100 * np.array(runs)
        plots.accuracy_curves(curves, y_label=y_label, ax=ax)
    share_labels(axes)
    return figure


def _path(run):
    steps_per_epoch = run.metrics[-1]["step"] / run.config["num_epochs"]
    curves = {}
    for key, label in (
        ("test_accuracy", "accuracy, dense"),
        ("sparse_test_accuracy", "accuracy, projected\non the support"),
        ("density", "groups in the support"),
    ):
        steps, values = files.logged(run.metrics, key)
        if steps.size:
            curves[label] = steps / steps_per_epoch, 100 * values
    entries = _entries(run)
    figure, axes = panels(1 + bool(entries))
    if entries:
        plots.entry_path(
            entries,
            num_steps=int(run.need("num_steps")),
            steps_per_epoch=int(run.need("steps_per_epoch")),
            ax=axes[0, 0],
        )
    plots.accuracy_curves(
        curves, y_label="test accuracy; share of groups (%)", ax=axes[0, -1]
    )
    return figure


def _entries(run):
    """{layer: step at which each group entered}."""
    names = [name for name in run.arrays if name.startswith("entry_")]
    return {name.removeprefix("entry_"): run.arrays[name] for name in names}


def _filters(run):
    steps_per_epoch = int(run.need("steps_per_epoch"))
    layers = {
        layer: (run.need(f"norm_{layer}"), steps / steps_per_epoch)
        for layer, steps in _entries(run).items()
        if layer.startswith("conv")
    }
    return plots.filter_norms(layers, entry_label="epoch of entry")


def _prune_lbi(run):
    figures = bind({"layer_before_and_after": _pruned_layer}, run)
    rows = [files.read_json(path) for path in sorted(run.workdir.glob("*.json"))]
    curves = [row["curves"] for row in rows if row.get("curves")]
    if curves:
        figures |= bind({"accuracy_against_sparsity": _sparsity}, run, curves)
    return figures


def _pruned_layer(run):
    return plots.pruned_layer(
        run.need("kernel"), run.need("kept"), name=run.config["layer"]
    )


def _sparsity(run, curves):
    """`curves` are those of each network, {SCOPE_ORDER: accuracies}."""
    config = run.config
    has_bn = "one_layer.recalibrated" in run.summary
    note = "batch normalization recalibrated" if has_bn else "no fine-tuning"
    shares = sorted({*config["sparsities"], *config["curve_sparsities"]})
    orders = {"entry": "order of entry", "magnitude": "magnitude", "random": "random"}
    titles = [title.format(layer=config["layer"]) for title in _SCOPES.values()]
    figure, axes = panels(3, width=4.4, sharey=True, titles=titles)
    for ax, scope in zip(axes[0], _SCOPES, strict=True):
        plots.accuracy_against_sparsity(
            100 * np.array(shares),
            {
                label: 100 * np.array([own[f"{scope}_{order}"] for own in curves])
                for order, label in orders.items()
            },
            y_label=f"test accuracy (%),\n{note}",
            ax=ax,
        )
    share_labels(axes)
    return figure


def _compared(run):
    seeds = list(run.summary["runs"].values())
    sparsities = {g: s for g, s in run.config["sparsities"].items() if s}
    titles = ("before fine-tuning", "after fine-tuning")
    figure, axes = panels(2, rows=len(sparsities), sharey="row", titles=titles)
    for row, (grain, shares) in zip(axes, sparsities.items(), strict=True):
        for ax, measure in zip(row, ("before", "after"), strict=True):
            plots.accuracy_against_sparsity(
                100 * np.array(shares),
                {
                    label: 100 * np.array([s[grain][method][measure] for s in seeds])
                    for method, label in _PRUNING_METHODS.items()
                    if measure in seeds[0][grain].get(method, ())
                },
                x_label=f"{grain} removed (%)",
                ax=ax,
            )
    share_labels(axes)
    return figure


FIGURES = {
    "train_lbi": _train_lbi,
    "prune_lbi": _prune_lbi,
    "compare_pruning": {"accuracy_against_sparsity": _compared},
}
