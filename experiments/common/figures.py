"""Draws the figures of a run from its files: python -m experiments.figures WORKDIR.

A figure is a function of `config.json`, `metrics.jsonl`, `summary.json` and
`arrays.npz`; no network is trained. The public functions of `functa.plots`,
`vit.plots`, `landscape.plots` and `lbi.plots` draw the figures; this module passes them
the numbers, names and titles of a run. A folder of `results/` has no `arrays.npz`:
figures that need it are skipped, and those that only need logged numbers are drawn.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments.common import devices, files  # noqa: E402
from functa import plots as functa_plots  # noqa: E402
from landscape import plots as landscape_plots  # noqa: E402
from lbi import plots as lbi_plots  # noqa: E402
from vit import plots as vit_plots  # noqa: E402


class Run(NamedTuple):
    """The files of a run, or of its folder in `results/`.

    Attributes:
      workdir: the folder.
      config: `config.json`.
      environment: `environment.json`.
      summary: `summary.json`; empty if the run is not finished.
      metrics: the lines of `metrics.jsonl`.
      arrays: `arrays.npz`; empty if the file does not exist.
    """

    workdir: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]

    def need(self, name: str) -> np.ndarray:
        """An array of `arrays.npz`; raises _MissingError if it does not exist."""
        if name not in self.arrays:
            raise _MissingError(name)
        return self.arrays[name]


class _MissingError(Exception):
    """A figure needs an array that the folder of the run does not contain."""


def draw(workdir: Path) -> None:
    """Draws all figures of the run into `<workdir>/figures`.

    One line names the figures that cannot be drawn because arrays are missing. A figure
    that fails gives a warning.

    Raises:
      FileNotFoundError: if the folder does not contain a run.
    """
    if not devices.is_main():
        return
    run = read_run(Path(workdir))
    experiment = run.config["experiment"]
    if experiment not in _FIGURES:
        raise ValueError(f"{workdir} is a run of {experiment}, which has no figures.")
    missing = []
    for name, make in _FIGURES[experiment](run).items():
        try:
            figure = make()
            figure.suptitle(describe(run), fontsize=9)
            path = run.workdir / "figures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=130, bbox_inches="tight")
        except _MissingError as error:
            missing.append(f"{name} ({error})")
        # An error in one figure must not stop the run or the other figures.
        except Exception as error:  # noqa: BLE001
            print(f"warning: figure {name} is not drawn: {error!r}", flush=True)
        finally:
            plt.close("all")
    if missing:
        print(
            f"{workdir}: not drawn, because the array in parentheses is missing: "
            f"{', '.join(missing)}",
            flush=True,
        )


def read_run(workdir: Path) -> Run:
    """Reads the files of the folder; only `config.json` is required."""
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} has no config.json: it holds no run.")

    def read(name):
        path = workdir / name
        return files.read_json(path) if path.exists() else {}

    arrays = {}
    if (workdir / "arrays.npz").exists():
        with np.load(workdir / "arrays.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    return Run(
        workdir,
        read("config.json"),
        read("environment.json"),
        read("summary.json"),
        files.read_metrics(workdir / "metrics.jsonl"),
        arrays,
    )


def describe(run: Run) -> str:
    """Title of the figures of a run: command, data set, seeds, length of training."""
    config = run.config
    data = (config.get("dataset") or {}).get("name")
    for source in ("functaset", "run", "checkpoint"):
        # runs/meta_learn/digits/functaset.npz -> meta_learn/digits
        if config.get(source):
            parts = [p for p in Path(config[source]).parts if p not in ("runs", "/")]
            parts = parts[:-1] if parts[-1].endswith(".npz") else parts
            data = f"{data}, " if data else ""
            data += f"{source} {'/'.join(parts[-2:])}"
    if config["experiment"] in ("benchmark", "scaling"):
        cores = run.environment.get("cpu_count")
        data = run.environment.get("backend", "")
        data += f" with {cores} cores" if cores and data == "cpu" else ""
    elif config["experiment"] == "prune_vit" and not data:
        data = "random weights"
    parts = [f"{config['experiment']} {config.get('variant', '')}".strip(), data]
    seeds = config.get("seeds", config.get("seed"))
    if isinstance(seeds, list) and len(seeds) > 1:
        parts.append(f"seeds {', '.join(map(str, seeds))}")
    elif seeds is not None and seeds != []:
        seed = seeds[0] if isinstance(seeds, list) else seeds
        num_runs = run.summary.get("num_runs", 1)
        parts.append(f"seed {seed}" if num_runs == 1 else f"{num_runs} trained seeds")
    for key, unit in (("num_epochs", "epochs"), ("num_steps", "steps")):
        if isinstance(config.get(key), int):
            parts.append(f"{config[key]} {unit}")
    if "epoch" in run.summary:
        parts.append(f"weights of epoch {run.summary['epoch']}")
    return ", ".join(part for part in parts if part)


def _panels(num, *, width=5.4, height=3.5, rows=1, **options):
    """A figure with `rows` x `num` Axes."""
    return plt.subplots(
        rows,
        num,
        figsize=(width * num, height * rows + 0.3),
        layout="constrained",
        squeeze=False,
        **options,
    )


def _one_legend(axes):
    """Keeps only the legend of the last panel of the first row."""
    axes = np.atleast_2d(axes)
    for ax in axes.flat:
        if ax is not axes[0, -1] and ax.get_legend():
            ax.get_legend().remove()


# --- functa ---


def _meta_learn(run):
    figures = {
        "psnr": _meta_psnr,
        "best_and_worst": _best_and_worst,
        "over_inner_steps": _over_inner_steps,
        "interpolation": _interpolation,
        "super_resolution": _super_resolution,
    }
    return {name: functools.partial(make, run) for name, make in figures.items()}


def _meta_psnr(run):
    config = run.config
    further = run.arrays.get("further_psnr")
    panels = [run.metrics, further is not None or "test_psnr_per_step" in run.summary]
    figure, axes = _panels(sum(map(bool, panels)) or 1)
    axes = list(axes[0])
    if run.metrics:
        steps = np.array([m["step"] for m in run.metrics])
        psnr = np.array([m["psnr_per_step"] for m in run.metrics])
        coarse = config.get("coarse_steps", 0)
        marks = {}
        if 0 < coarse < steps[-1]:
            factor = config.get("coarse_factor", 2)
            marks = {f"images at full size (before: 1/{factor})": coarse}
        functa_plots.psnr_curves(
            {
                f"after {n} inner steps": (steps, psnr[:, n])
                for n in range(psnr.shape[1])
            },
            x_label="outer step",
            y_label="training PSNR (dB)",
            marks=marks,
            ax=axes.pop(0),
        )
    if axes:
        num_steps = config["inner"]["num_steps"]
        marks = {}
        if further is None:
            further = np.array(run.summary["test_psnr_per_step"])
        elif len(further) > num_steps + 1:
            marks = {"end of the inner loop": num_steps}
        functa_plots.psnr_curves(
            {"mean over images": (np.arange(len(further)), further)},
            x_label="step of the latent",
            y_label="test PSNR (dB)",
            marks=marks,
            log_x=num_steps if marks else None,
            ax=axes[0],
        )
    return figure


def _best_and_worst(run):
    rows, labels = [], []
    for split in ("train", "test"):
        for name in ("best", "worst"):
            original, fitted = run.need(f"{split}_{name}")
            psnr = np.sort(run.need(f"{split}_{name}_psnr"))
            rows += [original, fitted]
            labels += [
                f"{split}, {name}\nimages",
                f"fields, {psnr[0]:.1f}\nto {psnr[-1]:.1f} dB",
            ]
    return functa_plots.image_grid(rows, row_labels=labels)


def _over_inner_steps(run):
    steps = run.need("over_steps")  # (S + 2, B, H, W, C), the images last
    return functa_plots.over_inner_steps(
        steps[:-1],
        steps[-1],
        row_labels=[f"test {i}" for i in range(steps.shape[1])],
    )


def _interpolation(run):
    images = run.need("interpolation")
    weights = np.linspace(0, 1, len(images))
    return functa_plots.image_grid(
        [images],
        row_labels=["weight of the\nsecond latent"],
        column_titles=[f"{weight:.2f}" for weight in weights],
    )


def _super_resolution(run):
    steps, large = run.need("over_steps"), run.need("super_resolved")
    rows = {"image": steps[-1], "field": steps[-2], "field, 4 x": large}
    return functa_plots.image_grid(
        list(rows.values()),
        row_labels=[
            f"{name}\n{images.shape[1]} x {images.shape[2]}"
            for name, images in rows.items()
        ],
        size=1.8,
    )


def _fit_image(run):
    tasks = list(dict.fromkeys(m["task"] for m in run.metrics))
    tasks = tasks or [str(name) for name in run.arrays.get("tasks", ())]
    figures = {"psnr": functools.partial(_fit_psnr, run, tasks)}
    for task in tasks:
        for name, make in (
            ("reconstructions", _reconstructions),
            ("field", _field),
        ):
            figures[f"{name}_{task}"] = functools.partial(make, run, task)
    return figures


def _fit_psnr(run, tasks):
    curves, over_steps, over_seconds = {}, {}, {}
    started = 0.0
    for task in tasks:
        logged = [m for m in run.metrics if m["task"] == task]
        measured = [m for m in logged if "psnr" in m]
        if f"{task}_curve" in run.arrays:
            curve = run.arrays[f"{task}_curve"]
            curves[task] = np.arange(len(curve)), curve
        else:
            steps = np.array([m["task_step"] for m in logged])
            loss = np.array([m["loss"] for m in logged])
            curves[task] = steps, -10 * np.log10(loss)
        deviation = run.summary.get(f"{task}_psnr_std")
        if f"{task}_psnr" in run.arrays:
            deviation = run.arrays[f"{task}_psnr"].std(1)
        psnr = [m["psnr"] for m in measured]
        over_steps[task] = [m["task_step"] for m in measured], psnr
        if deviation is not None:
            over_steps[task] += (deviation,)
        over_seconds[task] = [m["seconds"] - started for m in measured], psnr
        started = logged[-1]["seconds"]
    figure, axes = _panels(2)
    functa_plots.psnr_curves(
        curves,
        points=over_steps,
        x_label="step (line: pixels of the step; points: all pixels,\n"
        "mean and deviation over images)",
        y_label="PSNR (dB)",
        log_x=10,
        ax=axes[0, 0],
    )
    functa_plots.psnr_curves(
        {},
        points=over_seconds,
        x_label="time (s), compilation included",
        y_label="PSNR, mean over images (dB)",
        ax=axes[0, 1],
    )
    # The legend of the first panel also explains the lines.
    axes[0, 1].get_legend().remove()
    return figure


def _reconstructions(run, task):
    images = np.float32(run.need(f"{task}_image")[:4]) / 255
    shown = np.float32(run.need(f"{task}_shown")[:, :4]) / 255
    psnr = run.need(f"{task}_psnr").mean(1)
    titles = [
        f"step {step}\n{value:.1f} dB"
        for step, value in zip(run.need(f"{task}_steps"), psnr, strict=True)
    ]
    return functa_plots.image_grid(
        np.swapaxes(np.concatenate([shown, images[None]]), 0, 1),
        row_labels=[f"image {i}" for i in range(len(images))],
        column_titles=[*titles, "image"],
        # A photograph needs more room than a small image.
        size=1.1 if len(images) > 1 else 1.9,
    )


def _field(run, task):
    return functa_plots.field_and_gradient(
        np.float32(run.need(f"{task}_image")) / 255,
        np.float32(run.need(f"{task}_large")) / 255,
        run.need(f"{task}_gradient"),
    )


def _classify_functa(run):
    return {
        "accuracy": functools.partial(_classifier_accuracy, run),
        "confusion": functools.partial(_confusion, run),
    }


def _classifier_accuracy(run):
    epochs = np.array([m["step"] for m in run.metrics])
    losses = np.array([m["loss_per_candidate"] for m in run.metrics]).T  # (R, K)
    parts = {
        part: 100 * np.array([m[f"{part}_accuracy_per_candidate"] for m in run.metrics])
        for part in ("train", "validation", "test")
        if f"{part}_accuracy_per_candidate" in run.metrics[0]
    }
    # The command selects by the best validation accuracy of any epoch.
    chosen = 0
    if "validation" in parts:
        chosen = int(np.argmax(parts["validation"].max(0)))
    figure, axes = _panels(2)
    curves = {"chosen candidate": (epochs, losses[chosen])}
    if len(losses) > 1:
        curves[f"all {len(losses)} (mean, range)"] = epochs, losses
    functa_plots.accuracy_curves(curves, y_label="training loss (nats)", ax=axes[0, 0])
    curves = {part: (epochs, values[:, chosen]) for part, values in parts.items()}
    if len(losses) > 1 and "validation" in parts:
        label = f"validation,\nall {len(losses)} (mean, range)"
        curves[label] = epochs, parts["validation"].T
    marks = {}
    if "validation" in parts and "epoch" in run.summary:
        marks = {"weights kept": run.summary["epoch"]}
    functa_plots.accuracy_curves(curves, marks=marks, ax=axes[0, 1])
    return figure


def _confusion(run):
    names = run.arrays.get("class_names")
    ax = functa_plots.confusion_matrix(
        run.need("confusion"),
        class_names=None if names is None else [str(name) for name in names],
    )
    return ax.figure


# --- vit ---

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
}
_METHODS = _TOKENS | _CASCADES | _WEIGHTS
_WHOLE = 62  # style of the whole network: a black star
_STYLES = {label: number for number, label in enumerate(_METHODS.values())}


def _train_vit(run):
    return {"training": functools.partial(_vit_training, run)}


def _vit_training(run):
    config = run.config
    steps_per_epoch = run.metrics[-1]["step"] / config["num_epochs"]
    if "steps_per_epoch" in run.arrays:
        steps_per_epoch = int(run.arrays["steps_per_epoch"])
    marks = {}
    for start, changes in config.get("stages", ()):
        changed = "\n".join(f"{name} {value}" for name, value in changes.items())
        marks[f"from here: {changed}"] = start * config["num_epochs"]

    def curve(key, scale=1.0):
        chosen = [m for m in run.metrics if key in m]
        return (
            np.array([m["step"] for m in chosen]) / steps_per_epoch,
            scale * np.array([m[key] for m in chosen]),
        )

    figure, axes = _panels(2)
    vit_plots.training_curves(
        {"training, augmented": curve("loss")},
        y_label="loss (nats), labels smoothed",
        marks=marks,
        ax=axes[0, 0],
    )
    vit_plots.training_curves(
        {
            "training, augmented,\non the patches it sees": curve(
                "train_accuracy", 100
            ),
            "test, averaged weights": curve("test_accuracy", 100),
        },
        y_label="accuracy (%)",
        marks=marks,
        ax=axes[0, 1],
    )
    return figure


def _prune_vit(run):
    rows = _rows(run)
    figures = {}
    if any("accuracy" in row for row in rows):
        figures = {
            "accuracy_and_cost": functools.partial(_accuracy_and_cost, rows),
            "kept_patches": functools.partial(_kept_patches, run),
            "attention": functools.partial(_attention, run),
            "informativeness": functools.partial(_informativeness, run),
            "heads": functools.partial(_heads, run),
        }
    batches = _timed_batches(rows)
    if batches:
        figures["speed"] = functools.partial(_speed, rows, batches)
    return figures


def _rows(run):
    """The measured networks, from the arrays or from the summary's table."""
    columns = {
        name.removeprefix("row_"): values
        for name, values in run.arrays.items()
        if name.startswith("row_")
    }
    if not columns:
        return list(run.summary.get("rows", {}).values())
    return [
        {
            name: str(values[i]) if name == "method" else float(values[i])
            for name, values in columns.items()
            if name == "method" or np.isfinite(values[i])
        }
        for i in range(len(columns["method"]))
    ]


def _timed_batches(rows):
    prefix = "speedup_"
    keys = [key for row in rows if row["method"] != "dense" for key in row]
    names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return sorted(int(name) for name in names if name.isdigit())


def _points(rows, method, x, y):
    """Two columns of a method's rows, scaled to percent where they are shares."""
    chosen = [row for row in rows if row["method"] == method and x in row and y in row]
    scale = 100 if y.endswith("accuracy") else 1
    return np.array([[row[x], scale * row[y]] for row in chosen]).reshape(-1, 2).T


def _accuracy_and_cost(rows):
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
            if column in whole:
                curves["whole network"] = (
                    np.array([100.0]),
                    np.array([100 * whole[column]]),
                )
            drawn[title] = curves
    columns = min(len(drawn), 2)
    figure, axes = _panels(columns, rows=-(-len(drawn) // columns), width=5.8)
    for ax in axes.flat[len(drawn) :]:
        ax.axis("off")
    for ax, (title, curves) in zip(axes.flat, drawn.items(), strict=False):
        own = [label for label in curves if label != "whole network"]
        styles = {label: number for number, label in enumerate(own)}
        vit_plots.accuracy_against_cost(
            curves, styles=styles | {"whole network": _WHOLE}, ax=ax
        )
        ax.set_title(title, fontsize=9)
    return figure


def _speed(rows, batches):
    with_accuracy = any("accuracy" in row for row in rows)
    figure, axes = _panels(len(batches) + with_accuracy, width=5.2, height=3.8)
    for ax, batch in zip(axes[0], batches, strict=False):
        measured = {
            label: _points(rows, method, "predicted_speedup", f"speedup_{batch}")
            for method, label in _METHODS.items()
        }
        measured = {label: xy for label, xy in measured.items() if xy.size}
        vit_plots.speedup(measured, styles=_STYLES, ax=ax)
        ax.set_title(f"batch of {batch}", fontsize=9)
    _one_legend(axes[:, : len(batches)])
    if with_accuracy:
        batch = batches[-1]
        curves = {
            label: _points(rows, method, f"speedup_{batch}", "accuracy")
            for method, label in (_TOKENS | {"dense": "whole network"}).items()
        }
        vit_plots.accuracy_against_cost(
            {label: xy for label, xy in curves.items() if xy.size},
            x_label=f"measured speed-up, batch of {batch} (times)",
            y_label="test accuracy (%), not fine-tuned",
            styles=_STYLES | {"whole network": _WHOLE},
            ax=axes[0, -1],
        )
    return figure


def _kept_patches(run):
    return vit_plots.kept_patches(run.need("pictured") / 255, run.need("kept"))


def _attention(run):
    return vit_plots.attention_maps(
        run.need("attention"), ranges=run.need("attention_ranges")
    )


def _informativeness(run):
    return vit_plots.informativeness(run.need("patch_scores"))


def _heads(run):
    scores, ranges = run.need("head_scores"), run.need("attention_ranges")
    figure, axes = _panels(2)
    vit_plots.head_scores(scores, ax=axes[0, 0])
    vit_plots.attention_range(ranges, ax=axes[0, 1])
    return figure


# --- lbi ---

_OPTIMIZERS = {
    "adam": "Adam",
    "dessilbi": "DessiLBI",
    "dessilbi_adam": "DessiLBI+Adam",
}
_ORDERS = {
    "entry": "order of entry",
    "magnitude": "magnitude",
    "random": "random",
}
_SCOPES = {
    "one_layer": "filters of {layer}",
    "layer": "all convolutions, each by the same share",
    "global": "all convolutions, ranked together",
}


def _train_lbi(run):
    # A single training has its own log; a sweep has one folder per training.
    if not run.metrics:
        return {"accuracy": functools.partial(_lbi_accuracy, run)}
    return {
        "path": functools.partial(_path, run),
        "filters": functools.partial(_filters, run),
    }


def _lbi_accuracy(run):
    figure, axes = _panels(2)
    labels = {
        "train": "training accuracy, mean over the epoch (%)",
        "test": "test accuracy (%)",
    }
    for ax, (split, y_label) in zip(axes[0], labels.items(), strict=True):
        curves = {}
        for method in run.config["methods"]:
            runs = [
                _accuracy_of_epochs(run, f"{method}_seed{seed}", f"{split}_accuracy")
                for seed in run.config["seeds"]
            ]
            epochs = np.arange(1, len(runs[0]) + 1)
            curves[_OPTIMIZERS.get(method, method)] = epochs, 100 * np.array(runs)
        lbi_plots.accuracy_curves(curves, y_label=y_label, ax=ax)
    _one_legend(axes)
    return figure


def _accuracy_of_epochs(run, name, key):
    metrics = files.read_metrics(run.workdir / name / "metrics.jsonl")
    values = [m[key] for m in metrics if key in m]
    return np.array(values) if values else run.need(f"{name}_{key}")


def _path(run):
    num_epochs = run.config["num_epochs"]
    steps_per_epoch = run.metrics[-1]["step"] / num_epochs
    measured = [m for m in run.metrics if "test_accuracy" in m]
    epochs = np.array([m["step"] for m in measured]) / steps_per_epoch
    curves = {
        label: (epochs, 100 * np.array([m[key] for m in measured]))
        for key, label in (
            ("test_accuracy", "accuracy, dense"),
            ("sparse_test_accuracy", "accuracy, projected\non the support"),
            ("density", "groups in the support"),
        )
        if key in measured[0]
    }
    entries = _entries(run)
    figure, axes = _panels(1 + bool(entries))
    if entries:
        lbi_plots.entry_path(
            entries,
            num_steps=int(run.need("num_steps")),
            steps_per_epoch=int(run.need("steps_per_epoch")),
            ax=axes[0, 0],
        )
    lbi_plots.accuracy_curves(
        curves, y_label="test accuracy; share of groups (%)", ax=axes[0, -1]
    )
    return figure


def _entries(run):
    prefix = "entry_"
    return {
        name.removeprefix(prefix): steps
        for name, steps in run.arrays.items()
        if name.startswith(prefix)
    }


def _filters(run):
    steps_per_epoch = int(run.need("steps_per_epoch"))
    layers = {
        layer: (run.need(f"norm_{layer}"), steps / steps_per_epoch)
        for layer, steps in _entries(run).items()
        if layer.startswith("conv")
    }
    return lbi_plots.filter_norms(layers, entry_label="epoch of entry")


def _prune_lbi(run):
    figures = {"layer_before_and_after": functools.partial(_pruned_layer, run)}
    curves = _sparsity_curves(run)
    if curves:
        name = "accuracy_against_sparsity"
        figures[name] = functools.partial(_sparsity, run, curves)
    return figures


def _pruned_layer(run):
    return lbi_plots.pruned_layer(
        run.need("kernel"), run.need("kept"), name=run.config["layer"]
    )


def _sparsity_curves(run):
    """{SCOPE_ORDER: accuracies (runs, K)}, from the arrays or the files of the runs."""
    prefix = "curve_"
    curves = {
        name.removeprefix(prefix): values
        for name, values in run.arrays.items()
        if name.startswith(prefix) and name != "curve_sparsities"
    }
    if curves:
        return curves
    rows = [files.read_json(path) for path in sorted(run.workdir.glob("*.json"))]
    rows = [row["curves"] for row in rows if row.get("curves")]
    return (
        {name: np.array([row[name] for row in rows]) for name in rows[0]}
        if rows
        else {}
    )


def _sparsity(run, curves):
    config = run.config
    shares = sorted({*config["sparsities"], *config["curve_sparsities"]})
    figure, axes = _panels(3, width=4.4, sharey=True)
    for ax, (scope, title) in zip(axes[0], _SCOPES.items(), strict=True):
        lbi_plots.accuracy_against_sparsity(
            100 * np.array(shares),
            {
                label: 100 * curves[f"{scope}_{order}"]
                for order, label in _ORDERS.items()
                if f"{scope}_{order}" in curves
            },
            y_label="test accuracy (%), no fine-tuning",
            ax=ax,
        )
        ax.set_title(title.format(layer=config["layer"]), fontsize=9)
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    _one_legend(axes)
    return figure


# --- landscape ---

_NETWORKS = {"plain": "without BN", "bn": "with BN"}
# Number of points of a curve over all steps; averages reduce the noise of batches.
_NUM_WINDOWS = 60


def _probe_landscape(run):
    arrays = dict(run.arrays) or _landscape_arrays(run)
    names = [name for name in _NETWORKS if f"{name}/loss" in arrays]
    figures = {
        "loss_envelope": _loss_envelope,
        "along_the_gradient": _along_the_gradient,
        "beta_profile": _beta_profile,
        "consecutive_steps": _consecutive_steps,
    }
    if run.config["sharpness"]["every"]:
        figures["eigenvalues"] = _eigenvalues
    if run.config["surface"]["size"]:
        figures["surfaces"] = _surfaces
    run = run._replace(arrays=arrays)
    return {name: functools.partial(make, run, names) for name, make in figures.items()}


def _landscape_arrays(run):
    """The logs of the trainings in the form of `arrays.npz`: (rates, seeds, ...).

    The log contains means of the loss over intervals; `loss_step` is their middle.
    """
    config = run.config
    arrays = {
        "learning_rates": np.array(config["learning_rates"]),
        "step_sizes": np.array(config["step_sizes"]),
    }
    for network in config["networks"]:
        logs = [
            [
                _landscape_log(run.workdir / f"{network}_rate{rate:g}_seed{seed}")
                for seed in config["seeds"]
            ]
            for rate in config["learning_rates"]
        ]
        for name in logs[0][0]:
            values = np.array([[log[name] for log in row] for row in logs])
            arrays[f"{network}/{name}"] = values
        last = logs[0][0]["last_step"]
        arrays["steps_per_epoch"] = np.array(last // config["num_epochs"])
        arrays["loss_step"] = logs[0][0]["loss_step"]
    return arrays


def _landscape_log(folder):
    metrics = files.read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise FileNotFoundError(f"{folder} has no metrics.jsonl to draw from.")
    ends = np.array([m["step"] for m in metrics])
    log = {
        "last_step": metrics[-1]["step"],
        "loss": np.array([m["loss"] for m in metrics[1:]]),
        "loss_step": (ends[1:] + ends[:-1]) / 2,
    }
    probed = [m for m in metrics if "probe" in m]
    log["probe_step"] = np.array([m["step"] for m in probed])
    for key in probed[0]["probe"]:
        log[f"probe_{key}"] = np.array([m["probe"][key] for m in probed])
    curved = [m for m in metrics if "eigenvalues" in m]
    if curved:
        log["eigenvalue_step"] = np.array([m["step"] for m in curved])
        log["eigenvalues"] = np.array([m["eigenvalues"] for m in curved])
    return log


def _losses(run, network):
    """Epochs (W,) and training losses (rates, seeds, W), means over windows."""
    losses = run.need(f"{network}/loss")
    steps = run.arrays.get("loss_step")
    if steps is None:
        steps, losses = _windows(losses)
    return steps / run.need("steps_per_epoch"), losses


def _windows(values):
    """Means over windows of steps: (..., S) -> their centers (W,), (..., W)."""
    size = max(values.shape[-1] // _NUM_WINDOWS, 1)
    count = values.shape[-1] // size
    kept = values[..., : count * size].reshape(*values.shape[:-1], count, size)
    return size * (np.arange(count) + 0.5), kept.mean(-1)


def _loss_envelope(run, networks):
    figure, axes = _panels(1 + len(networks), width=4.6, sharey=True)
    bands = {}
    for ax, network in zip(axes[0, 1:], networks, strict=True):
        epochs, losses = _losses(run, network)
        # The mean over seeds of the bands.
        low, high = losses.min(0).mean(0), losses.max(0).mean(0)
        bands[_NETWORKS[network]] = epochs, np.stack([low, high])
        landscape_plots.curves(
            {
                f"{rate:g}": (epochs, runs)
                for rate, runs in zip(run.need("learning_rates"), losses, strict=True)
            },
            y_label="training loss (nats)",
            legend_title="learning rate",
            ax=ax,
        )
        ax.set_title(_NETWORKS[network], fontsize=9)
    landscape_plots.envelope(bands, y_label="training loss (nats)", ax=axes[0, 0])
    axes[0, 0].set_title("band over the learning rates", fontsize=9)
    for ax in axes[0, 1:-1]:
        ax.get_legend().remove()
    return figure


def _consecutive_steps(run, networks):
    figure, axes = _panels(2, rows=2, height=3, sharex=True)
    layers = {"last_layer": "last layer", "all_layers": "all parameters"}
    measures = {
        "grad_distance": "gradient distance",
        "beta": "gradient distance / step length",
    }
    for row, (measure, y_label) in zip(axes, measures.items(), strict=True):
        for ax, (which, layer) in zip(row, layers.items(), strict=True):
            bands = {}
            for network in networks:
                steps, values = _windows(run.need(f"{network}/{which}_{measure}"))
                epochs = (steps + 1) / run.need("steps_per_epoch")
                bands[_NETWORKS[network]] = epochs, values.mean(1)
            x_label = "epoch" if measure == "beta" else ""  # the lower row
            labels = {"x_label": x_label, "y_label": y_label}
            landscape_plots.envelope(bands, **labels, log=True, ax=ax)
            ax.set_title(f"between consecutive steps, {layer}", fontsize=9)
    _one_legend(axes)
    return figure


def _along_the_gradient(run, networks):
    """Santurkar et al., figure 4, at every learning rate: bands over the step sizes."""
    rates = run.need("learning_rates")
    figure, axes = _panels(
        len(rates), rows=4, width=3, height=2.3, sharex=True, sharey="row"
    )
    measures = {
        "losses": "loss (nats)",
        "grad_distances": "gradient distance",
        "relative_grad_distances": "gradient distance /\ngradient norm",
        "betas": "effective beta\n(largest)",
    }
    for row, (key, y_label) in zip(axes, measures.items(), strict=True):
        x_label = "epoch" if key == "betas" else ""  # the lowest row
        for i, ax in enumerate(row):
            bands = {}
            for network in networks:
                values = run.need(f"{network}/probe_{key}")[i]  # (seeds, P, steps)
                steps = run.need(f"{network}/probe_step")[i, 0]
                epochs = steps / run.need("steps_per_epoch")
                low, high = values.min(-1), values.max(-1)
                band = np.stack([low.mean(0), high.mean(0)])
                # The beta of the paper is the largest one.
                bands[_NETWORKS[network]] = epochs, high if key == "betas" else band
            draw_one = (
                landscape_plots.curves if key == "betas" else landscape_plots.envelope
            )
            labels = {"x_label": x_label, "y_label": y_label if i == 0 else ""}
            draw_one(bands, **labels, log=True, ax=ax)
    for ax, rate in zip(axes[0], rates, strict=True):
        ax.set_title(f"learning rate {rate:g}", fontsize=9)
    _one_legend(axes)
    return figure


def _beta_profile(run, networks):
    """Over the step sizes, from the end of the first epoch on."""
    rates = run.need("learning_rates")
    figure, axes = _panels(len(rates), width=3.2, height=3, sharey=True)
    for i, (ax, rate) in enumerate(zip(axes[0], rates, strict=True)):
        betas = {}
        for network in networks:
            steps = run.need(f"{network}/probe_step")[i, 0]
            later = steps >= run.need("steps_per_epoch")
            values = run.need(f"{network}/probe_betas")[i][:, later]
            betas[_NETWORKS[network]] = values.reshape(-1, values.shape[-1])
        landscape_plots.step_profile(run.need("step_sizes"), betas, ax=ax)
        ax.set_title(f"learning rate {rate:g}", fontsize=9)
        if i:
            ax.set_ylabel("")
    axes[0, -1].get_legend().set_title("median, 10 to 90 %", {"size": 7})
    _one_legend(axes)
    return figure


def _eigenvalues(run, networks):
    rates = run.need("learning_rates")
    figure, axes = _panels(
        len(rates), rows=2, width=3, height=2.6, sharex=True, sharey="row"
    )
    for i, (top, bottom) in enumerate(axes.T):
        largest, products = {}, {}
        for network in networks:
            steps = run.need(f"{network}/eigenvalue_step")[i, 0]
            epochs = steps / run.need("steps_per_epoch")
            values = run.need(f"{network}/eigenvalues")[i]  # (seeds, E, k)
            # The last eigenvalue is the smallest.
            largest[_NETWORKS[network]] = epochs, values.mean(0)[:, :-1]
            products[_NETWORKS[network]] = epochs, rates[i] * values[..., 0]
        landscape_plots.eigenvalues(largest, ax=top)
        landscape_plots.stability(products, ax=bottom)
        top.set_title(f"learning rate {rates[i]:g}", fontsize=9)
        top.set_xlabel("")
        if i:
            top.set_ylabel("")
            bottom.set_ylabel("")
    _one_legend(axes)
    return figure


def _surfaces(run, networks):
    surfaces = {
        network: run.arrays[f"{network}/surface"]
        for network in networks
        if f"{network}/surface" in run.arrays
    }
    if not surfaces:
        raise _MissingError("surface")
    limits = landscape_plots.robust_limits(*surfaces.values())
    figure = plt.figure(figsize=(5.4 * len(surfaces), 8.6), layout="constrained")
    for number, (network, losses) in enumerate(surfaces.items(), start=1):
        points = np.linspace(-1, 1, len(losses)) * run.need("span")
        flat = figure.add_subplot(2, len(surfaces), number)
        landscape_plots.surface_contours(losses, points, limits=limits, ax=flat)
        flat.set_title(_NETWORKS[network], fontsize=9)
        deep = figure.add_subplot(
            2, len(surfaces), len(surfaces) + number, projection="3d"
        )
        landscape_plots.surface_3d(losses, points, limits=limits, ax=deep)
    return figure


# --- time and memory ---

_AXES = {
    "batch_size": "images of a batch",
    "image_size": "side of an image (pixels)",
    "latent_dim": "size of the latent (numbers)",
    "num_steps": "inner steps",
}


def measurements(
    x: np.ndarray,
    values: np.ndarray,
    *,
    x_label: str,
    y_label: str,
    quartiles: np.ndarray | None = None,
    number: int = 0,
    log_x: bool = False,
    ax: Any = None,
) -> Any:
    """Draws measured times, rates or memory with error bars; the axis starts at 0.

    Args:
      x: the varied quantity, (K,).
      values: the measurements, (K,).
      x_label: name and unit.
      y_label: name and unit.
      quartiles: quartiles over the rounds of each measurement, (K, 2).
      number: index of the color and marker.
      log_x: whether the x axis is logarithmic.
      ax: the Axes to draw into; None makes a figure.

    Returns:
      The Axes.
    """
    if ax is None:
        ax = _panels(1)[1][0, 0]
    color, marker = (("#0072B2", "o"), ("#D55E00", "s"))[number]
    bars = None
    if quartiles is not None:
        low, high = np.transpose(quartiles)
        bars = np.clip([values - low, high - values], 0, None)
    ax.errorbar(
        x,
        values,
        yerr=bars,
        color=color,
        marker=marker,
        markersize=5,
        linestyle="none",
        capsize=3,
    )
    if log_x:
        ax.set_xscale("log")
    else:
        ax.set_xlim(0, 1.06 * np.max(x))
    # From zero: proportional measurements are on a line through the origin.
    highest = np.max(values if quartiles is None else quartiles)
    ax.set_ylim(0, 1.1 * highest)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    return ax


def _benchmark(run):
    axes = run.config.get("axes") or {}
    return {"scaling": functools.partial(_benchmark_axes, run, axes)} if axes else {}


def _benchmark_axes(run, axes):
    figure, panels = _panels(len(axes), rows=2, width=3.4, height=2.6, sharex="col")
    for column, (axis, values) in zip(panels.T, axes.items(), strict=True):

        def measured(key, axis=axis, values=values):
            if f"{axis}/{key}" in run.arrays:
                return run.arrays[f"{axis}/{key}"]
            return np.array([run.summary[f"{axis}_{value}"][key] for value in values])

        measurements(
            np.array(values),
            measured("milliseconds"),
            x_label="",
            y_label="time of a step (ms)\nmedian and quartiles",
            quartiles=measured("milliseconds_quartiles"),
            ax=column[0],
        )
        measurements(
            np.array(values),
            measured("mebibytes"),
            x_label=_AXES.get(axis, axis),
            y_label="memory (MiB)",
            number=1,
            ax=column[1],
        )
    return figure


def _scaling(run):
    return {"scaling": functools.partial(_scaling_figure, run)}


def _scaling_figure(run):
    def measured(name):
        return np.asarray(run.arrays.get(name, run.summary.get(name)))

    figure, axes = _panels(2, width=4.6, height=3.2)
    measurements(
        measured("num_devices"),
        measured("images_per_second"),
        x_label="virtual devices on the same cores",
        y_label="meta-learning (images/s)",
        ax=axes[0, 0],
    )
    axes[0, 0].set_xticks(measured("num_devices"))
    measurements(
        measured("num_images"),
        measured("peak_mebibytes"),
        x_label="images encoded into one functaset",
        y_label="peak memory of the process (MiB)",
        number=1,
        log_x=True,
        ax=axes[0, 1],
    )
    return figure


def _latent_controls(run):
    return {"psnr_against_size": functools.partial(_psnr_against_size, run)}


def _psnr_against_size(run):
    curves = {}
    for name in ("pca", *sorted(run.arrays.keys() - {"pca"})):
        psnr = run.need(name)[1:]
        label, num_cells = "PCA of whole images", 1
        if name != "pca":
            label = f"PCA of the cells of a {name} grid"
            num_cells = math.prod(map(int, name.split("x")))
        # With more components the image is exact once it is rounded to 8 bits.
        psnr = psnr[psnr <= functa_plots.EXACT_TO_8_BITS]
        curves[label] = num_cells * np.arange(1, 1 + len(psnr)), psnr
    return functa_plots.against_num_values(curves, y_label="test PSNR (dB)").figure


_FIGURES: dict[str, Callable[[Run], dict[str, Callable[[], Any]]]] = {
    "meta_learn": _meta_learn,
    "fit_image": _fit_image,
    "classify_functa": _classify_functa,
    "train_vit": _train_vit,
    "prune_vit": _prune_vit,
    "train_lbi": _train_lbi,
    "prune_lbi": _prune_lbi,
    "probe_landscape": _probe_landscape,
    "benchmark": _benchmark,
    "scaling": _scaling,
    "latent_controls": _latent_controls,
}
