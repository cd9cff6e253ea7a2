"""The figures of Vision Transformers: train_vit and prune_vit."""

import numpy as np

from experiments.common import files
from experiments.drawing.panels import panels
from experiments.drawing.run import bind
from vit import plots

# Methods of prune_vit in the panel that compares them; the order numbers their styles.
_TOKENS = {
    "max": "cascade, cumulative maxima",
    "sum": "cascade, sums",
    "cls": "cascade, CLS attention",
    "evit": "EViT, fused token",
    "merge": "token merging",
    "random": "random patches",
    "resolution": "lower resolution",
    "norm": "largest norms",
    "merge_decreasing": "token merging, decreasing",
}
_CASCADES = {
    "max": _TOKENS["max"],
    "constant": "constant ratios",
    "range": "ratios by attention range",
    "skip": "skipped for a layer",
    "zero": "zeroed rows",
    "released_code": "released code (masked only)",
}
_WEIGHTS = {
    "heads": "heads, by maxima",
    "heads_lbi": "heads, by DessiLBI",
    "heads_random": "heads, random",
    "neurons_lbi": "neurons, by DessiLBI",
    "neurons_random": "neurons, random",
    "structure_lbi": "heads and neurons, by DessiLBI",
    "heads_search": "heads, by A* search",
}
_METHODS = _TOKENS | _CASCADES | _WEIGHTS
# Style: a black star.
_WHOLE = {"whole network": 62, "whole network, not fine-tuned": 62}
_STYLES = {label: number for number, label in enumerate(_METHODS.values())}
# Fields whose names do not say what the number is.
_FIELDS = {
    "patch_keep_rate": "share of the patches",
    "augment.num_ops": "operations of RandAugment",
}


def _vit_training(run):
    config = run.config
    steps_per_epoch = run.metrics[-1]["step"] / config["num_epochs"]
    marks = {}
    for start, changes in config.get("stages", ()):
        changed = "\n".join(f"{_FIELDS.get(k, k)} {v}" for k, v in changes.items())
        marks[f"from here:\n{changed}"] = start * config["num_epochs"]

    def curve(key, scale=1):
        steps, values = files.logged(run.metrics, key)
        return steps / steps_per_epoch, scale * values

    figure, axes = panels(2)
    plots.training_curves(
        {"training, augmented": curve("loss")},
        y_label="loss (nats), labels smoothed",
        marks=marks,
        ax=axes[0, 0],
    )
    seen = "training, augmented,\non the patches it sees"
    plots.training_curves(
        {
            seen: curve("train_accuracy", 100),
            "test, averaged weights": curve("test_accuracy", 100),
        },
        y_label="accuracy (%)",
        marks=marks,
        ax=axes[0, 1],
    )
    return figure


def _prune_vit(run):
    rows = list(run.summary.get("rows", {}).values())  # the measured networks
    split = "validation" if run.config.get("num_validation") else "test"
    y_label = f"{split} accuracy (%)"
    figures = {}
    if any("accuracy" in row for row in rows):
        figures = bind(_ATTENTION_FIGURES, run)
        # Regions of an image that are pruned by themselves have a figure of their own.
        if any(row["method"] in _METHODS for row in rows):
            figures |= bind({"accuracy_and_cost": _accuracy_and_cost}, rows, y_label)
    names = {key for row in rows if row["method"] != "dense" for key in row}
    names = {name.removeprefix("speedup_") for name in names}
    batches = sorted(int(name) for name in names if name.isdigit())
    if batches:
        figures |= bind({"speed": _speed}, rows, batches, y_label)
    return figures


def _points(rows, method, x, y):
    """Two columns of a method's rows, scaled to percent where they are shares."""
    chosen = [row for row in rows if row["method"] == method and x in row and y in row]
    scale = 100 if y.endswith("accuracy") else 1
    return np.array([[row[x], scale * row[y]] for row in chosen]).reshape(-1, 2).T


def _accuracy_and_cost(rows, y_label):
    [whole] = [row for row in rows if row["method"] == "dense"]
    groups = {
        "patches": (_TOKENS, "accuracy"),
        "forms of the cascade": (_CASCADES, "accuracy"),
        "heads and neurons": (_WEIGHTS, "accuracy"),
        "fine-tuned": (_METHODS, "tuned_accuracy"),
    }
    drawn = {}
    for title, (methods, column) in groups.items():
        curves = {}
        for method, label in methods.items():
            cost, accuracy = _points(rows, method, "multiply_adds", column)
            if len(cost) > 1 and column in whole:
                # The dense network starts every curve, but not a single point.
                cost = np.append(cost, whole["multiply_adds"])
                accuracy = np.append(accuracy, 100 * whole[column])
            if len(cost):
                curves[label] = 100 * cost / whole["multiply_adds"], accuracy
        # The cascade is in the first panel; a second panel needs another method.
        is_repeated = drawn and set(curves) == {_TOKENS["max"]}
        if curves and (column != "accuracy" or not is_repeated):
            label, known = "whole network", column
            if column not in whole:  # for orientation
                label, known = "whole network, not fine-tuned", "accuracy"
            curves |= {label: (np.full(1, 100.0), [100 * whole[known]])}
            drawn[title] = curves
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    figure, axes = panels(columns, rows=rows, width=5.8, titles=drawn)
    for ax in axes.flat[len(drawn) :]:
        ax.axis("off")
    for ax, curves in zip(axes.flat, drawn.values(), strict=False):
        plots.accuracy_against_cost(
            curves, y_label=y_label, styles=_STYLES | _WHOLE, ax=ax
        )
    return figure


def _speed(rows, batches, y_label):
    with_accuracy = any("accuracy" in row for row in rows)
    figure, axes = panels(
        len(batches) + with_accuracy,
        width=5.2,
        height=3.8,
        titles=[f"batch of {batch}" for batch in batches],
    )

    def points(methods, x, y):
        found = {label: _points(rows, name, x, y) for name, label in methods.items()}
        return {label: xy for label, xy in found.items() if xy.size}

    for ax, batch in zip(axes[0], batches, strict=False):
        measured = points(_METHODS, "predicted_speedup", f"speedup_{batch}")
        plots.speedup(measured, styles=_STYLES, ax=ax)
    for ax in axes[0, : len(batches) - 1]:
        ax.get_legend().remove()
    if with_accuracy:
        columns = f"speedup_{batches[-1]}", "accuracy"
        # Other methods would stretch the axis of the tokens, where there are any.
        curves = points(_TOKENS, *columns) or points(_METHODS, *columns)
        plots.accuracy_against_cost(
            curves | points({"dense": "whole network"}, *columns),
            x_label=f"measured speed-up, batch of {batches[-1]} (times)",
            y_label=f"{y_label}, not fine-tuned",
            styles=_STYLES | _WHOLE,
            ax=axes[0, -1],
        )
    return figure


def _heads(run):
    scores, ranges = run.need("head_scores"), run.need("attention_ranges")
    figure, axes = panels(2)
    plots.head_scores(scores, ax=axes[0, 0])
    plots.attention_range(ranges, ax=axes[0, 1])
    return figure


def _square_grid(num_patches):
    # The networks of prune_vit take square images; the pictures may have other sides.
    return (round(num_patches**0.5),) * 2


def _kept_patches(run):
    kept = run.need("kept")
    pictures = run.need("pictured") / 255
    return plots.kept_patches(pictures, kept, grid=_square_grid(kept.shape[-1]))


def _attention(run):
    attention, kept = run.need("attention"), run.need("kept")
    return plots.attention_maps(
        attention,
        num_prefix=attention.shape[-1] - kept.shape[-1],
        ranges=run.need("attention_ranges"),
    )


def _segments(run):
    segments, picture = run.need("segments"), run.need("pictured")[0] / 255
    return plots.segments(picture, segments, grid=_square_grid(segments.shape[-1]))


_ATTENTION_FIGURES = {
    "kept_patches": _kept_patches,
    "attention": _attention,
    "informativeness": lambda run: plots.informativeness(run.need("patch_scores")),
    "segments": _segments,
    "heads": _heads,
}


FIGURES = {"train_vit": {"training": _vit_training}, "prune_vit": _prune_vit}
