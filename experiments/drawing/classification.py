"""The figures of classifiers of fields: classify_functa and meta_classify."""

import numpy as np

from experiments.common import files
from experiments.drawing.panels import panels
from functa import plots


def _classifier_accuracy(run):
    epochs, losses = files.logged(run.metrics, "loss_per_candidate")  # (K,), (K, R)
    parts = {
        part: 100 * files.logged(run.metrics, f"{part}_accuracy_per_candidate")[1]
        for part in ("train", "validation", "test")
    }
    parts = {part: values for part, values in parts.items() if values.size}
    chosen, marks = 0, {}
    if "validation" in parts:
        # The command selects by the best validation accuracy of any epoch.
        chosen = int(np.argmax(parts["validation"].max(0)))
        if "epoch" in run.summary:
            marks = {"weights kept": run.summary["epoch"]}
    has_others = losses.shape[1] > 1
    label = "chosen candidate" if has_others else "train"
    loss_curves = {label: (epochs, losses[:, chosen])}
    curves = {part: (epochs, values[:, chosen]) for part, values in parts.items()}
    if has_others:
        everything = f"all {losses.shape[1]} (mean, range)"
        loss_curves[everything] = epochs, losses.T
        if "validation" in parts:
            curves[f"validation,\n{everything}"] = epochs, parts["validation"].T
    figure, axes = panels(2)
    plots.accuracy_curves(loss_curves, y_label="training loss (nats)", ax=axes[0, 0])
    plots.accuracy_curves(curves, marks=marks, ax=axes[0, 1])
    return figure


def _confusion(run):
    names = run.arrays.get("class_names")
    names = None if names is None else [str(name) for name in names]
    return plots.confusion_matrix(run.need("confusion"), class_names=names)


# The names of the methods of meta_classify.
_JOINT = {"joint": "labels in the loop", "two_stage": "field, then classifier"}


def _methods(run):
    """{title: {measure: (steps (K,), values (R, K))}} of R seeds of each method."""
    table = {}
    for method in run.config["methods"]:
        curves = [
            inner["curves"]
            for name, inner in run.summary["runs"].items()
            if name.startswith(method)
        ]
        table[_JOINT[method]] = {
            measure: (
                np.array(curves[0][measure])[:, 0],
                np.array([curve[measure] for curve in curves])[:, :, 1],
            )
            for measure in curves[0]
        }
    return table


def _joint_training(run):
    accuracies, psnr = {}, {}
    for title, curves in _methods(run).items():
        steps, values = curves["validation_accuracy"]
        accuracies[title] = steps, 100 * values
        psnr[title] = curves["validation_psnr"]
    figure, axes = panels(2)
    y_label = "validation accuracy (%)"
    plots.accuracy_curves(accuracies, x_label="step", y_label=y_label, ax=axes[0, 0])
    plots.psnr_curves(psnr, y_label="validation PSNR (dB)", ax=axes[0, 1])
    axes[0, 0].get_legend().remove()
    return figure


def _accuracy_against_psnr(run):
    points = {}
    for (title, measured), method in zip(
        _methods(run).items(), run.config["methods"], strict=True
    ):
        steps, accuracy = measured["validation_accuracy"]
        all_steps, psnr = measured["validation_psnr"]
        psnr = psnr[:, np.isin(all_steps, steps)].mean(0)
        accuracy = 100 * accuracy.mean(0)
        points[f"{title}:\nvalidation, during training"] = psnr, accuracy
        points[f"{title}: test"] = (
            np.array([run.summary[f"{method}_test_psnr"]]),
            np.array([100 * run.summary[f"{method}_test_accuracy"]]),
        )
    return plots.accuracy_curves(points, x_label="PSNR (dB)")


FIGURES = {
    "classify_functa": {"accuracy": _classifier_accuracy, "confusion": _confusion},
    "meta_classify": {
        "training": _joint_training,
        "accuracy_against_psnr": _accuracy_against_psnr,
    },
}
