"""The figures of generated images: generate_functa."""

import numpy as np

from experiments.common import files
from functa import plots

_SOURCES = {
    "train": "training images",
    "reconstructions": "reconstructions",
    "samples": "samples of the flow",
    "gaussian": "Gaussian of each class",
}
_EXTRACTORS = {"classifier": "classifier", "random": "random network"}
_MEASURES_OF_IMAGES = {
    "frechet_distance": "Fréchet distance (lower is better)",
    "kernel_distance": "kernel distance (lower is better)",
    "density": "density (higher is better)",
    "coverage": "coverage (higher is better)",
}


def _sources(run):
    """The names of the sources; a flow without classes has one Gaussian."""
    names = dict(_SOURCES)
    if not run.config["conditional"]:
        names["gaussian"] = "Gaussian"
    return names


def _flow_training(run):
    curves = {"training batches": files.logged(run.metrics, "loss")}
    if "held_out_loss" in run.metrics[-1]:
        curves["held-out latents"] = files.logged(run.metrics, "held_out_loss")
    y_label = "flow loss (squared error)"
    return plots.accuracy_curves(curves, x_label="step", y_label=y_label)


def _generated_classes(run):
    images, labels = _as_float(run, "rows"), run.need("row_labels")
    rows = images.reshape(len(labels), -1, *images.shape[1:])
    names = run.arrays.get("class_names")
    names = [str(label if names is None else names[label]) for label in labels]
    if not run.config["conditional"]:
        names = None
    return plots.image_grid(rows, row_labels=names, size=0.8)


def _generated_sources(run):
    names = {"reference": f"{run.summary['compared_with']} images", **_sources(run)}
    rows = [_as_float(run, name) for name in names]
    labels = [name.replace(" ", "\n", 1) for name in names.values()]
    return plots.image_grid(rows, row_labels=labels, size=0.9)


def _generated_large(run):
    small, large = _as_float(run, "small")[:4], _as_float(run, "large")[:4]
    return plots.super_resolution(
        {"resolution of the training": small, "the same latents, larger": large}
    )


def _generated_nearest(run):
    rows = [_as_float(run, "samples"), _as_float(run, "nearest")]
    labels = ["sample", "nearest\ntraining image"]
    return plots.image_grid(rows, row_labels=labels, size=0.9)


def _generated_measures(run):
    table, levels = {}, {}
    expected = {"density": 1.0, "coverage": run.summary["expected_coverage"]}
    expected["memorization_ratio"] = 1.0
    rows = {name: run.summary[source] for source, name in _sources(run).items()}
    for extractor, features in _EXTRACTORS.items():
        if extractor not in run.summary["samples"]:
            continue
        for key, title in _MEASURES_OF_IMAGES.items():
            title = f"{title},\nfeatures of the {features}"
            table[title] = {name: row[extractor][key] for name, row in rows.items()}
            if key == "kernel_distance":
                for name, row in rows.items():
                    error = row[extractor][f"{key}_error"]
                    table[title][name] = table[title][name], error
            if key in expected:
                levels[title] = expected[key]
    for key, title, scale in (
        ("accuracy_score", "accuracy score (%, higher is better)", 100),
        ("memorization_ratio", "distance to the nearest training\nimage, relative", 1),
    ):
        values = {name: scale * row[key] for name, row in rows.items() if key in row}
        if values:
            table[title] = values
            if key in expected:
                levels[title] = expected[key]
    label = (
        f"expected with the distribution of the {run.summary['compared_with']} images"
    )
    return plots.measures(table, levels=levels, level_label=label)


def _as_float(run, name):
    return np.float32(run.need(name)) / 255


FIGURES = {
    "generate_functa": {
        "training": _flow_training,
        "samples": _generated_classes,
        "sources": _generated_sources,
        "large": _generated_large,
        "nearest": _generated_nearest,
        "measures": _generated_measures,
    }
}
