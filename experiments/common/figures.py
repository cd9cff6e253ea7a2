"""Draws the figures of a run from its files: python -m experiments.figures WORKDIR.

A figure is a function of `config.json`, `metrics.jsonl`, `summary.json` and
`arrays.npz`; no network is trained. The public functions of `functa.plots`,
`vit.plots`, `landscape.plots` and `lbi.plots` draw the figures; this module passes them
the numbers, names and titles of a run. Most folders of `results/` have no `arrays.npz`:
figures that need it are skipped, and those that only need logged numbers are drawn.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments.common import devices, fields, files  # noqa: E402
from functa import metrics as functa_metrics  # noqa: E402
from functa import plots as functa_plots  # noqa: E402
from landscape import curvature, probes  # noqa: E402
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


def draw(workdir: Path, summary: Mapping[str, Any] | None = None) -> None:
    """Draws all figures of the run into `<workdir>/figures`.

    One line names the figures that cannot be drawn because arrays are missing. A figure
    that fails gives a warning.

    Args:
      workdir: the folder of the run.
      summary: replaces `summary.json`, which a run writes after its figures.

    Raises:
      FileNotFoundError: if the folder does not contain a run.
    """
    if not devices.is_main():
        return
    run = read_run(Path(workdir))
    if summary is not None:
        run = run._replace(summary=files.plain(summary))
    is_config = isinstance(run.config, dict)
    experiment = run.config.get("experiment") if is_config else None
    if experiment not in _FIGURES:
        raise ValueError(f"{workdir} is a run of {experiment}, which has no figures.")
    try:
        makers = _FIGURES[experiment](run)
    # Arrays of another program, for example.
    except Exception as error:  # noqa: BLE001
        devices.say(f"warning: the figures are not drawn: {error!r}")
        return
    missing = []
    for name, make in makers.items():
        try:
            figure = make()
            figure.suptitle(describe(run), fontsize=9)
            files.write_atomic(
                run.workdir / "figures" / f"{name}.png",
                functools.partial(figure.savefig, dpi=130, bbox_inches="tight"),
                mode="wb",
            )
        except _MissingError as error:
            missing.append(f"{name} ({error})")
        # An error in one figure must not stop the run or the other figures.
        except Exception as error:  # noqa: BLE001
            devices.say(f"warning: figure {name} is not drawn: {error!r}")
        finally:
            plt.close("all")
    if missing:
        devices.say(
            f"{workdir}: not drawn, because the array in parentheses is missing: "
            f"{', '.join(missing)}"
        )


def compare(workdir: Path, other: Path) -> None:
    """Draws test images enlarged by the fields of two runs of meta_learn, side by side.

    Into `<workdir>/figures/super_resolution_compared.png`; for example of cells with
    interpolation "nearest" and "bilinear".

    Raises:
      FileNotFoundError: if a folder does not contain a run.
      ValueError: if a run has no enlarged images, or their images differ.
    """
    columns, images = {}, []
    for folder in (Path(workdir), Path(other)):
        run = read_run(folder)
        if not {"super_resolved", "over_steps"} <= run.arrays.keys():
            raise ValueError(f"{folder} has no enlarged images of a run of meta_learn.")
        images.append(run.arrays["over_steps"][-1])
        label = run.config["model"].get("interpolation", "one latent")
        label = f"{folder.name}, {label}" if label in columns else label
        columns[label] = run.arrays["super_resolved"]
    if not np.array_equal(*images):
        raise ValueError(f"{workdir} and {other} have other test images.")
    figure = functa_plots.super_resolution({"image": images[0], **columns})
    titles = [describe(read_run(Path(folder))) for folder in (workdir, other)]
    figure.suptitle("\n".join(titles), fontsize=9)
    files.write_atomic(
        Path(workdir) / "figures" / "super_resolution_compared.png",
        functools.partial(figure.savefig, dpi=130, bbox_inches="tight"),
        mode="wb",
    )
    plt.close("all")


def read_run(workdir: Path) -> Run:
    """Reads the files of the folder; only `config.json` is required."""
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} has no config.json: it holds no run.")
    jsons = {}
    for name in ("config", "environment", "summary"):
        path = workdir / f"{name}.json"
        jsons[name] = files.read_json(path) if path.exists() else {}
    metrics = files.read_metrics(workdir / "metrics.jsonl")
    return Run(workdir, **jsons, metrics=metrics, arrays=_read_arrays(workdir))


def _read_arrays(folder):
    path = folder / "arrays.npz"
    return files.read_npz(path) if path.exists() else {}


def describe(run: Run) -> str:
    """Title of the figures of a run: command, data set, seeds, length of training."""
    config, environment = run.config, run.environment
    parts = [f"{config['experiment']} {config.get('variant', '')}".strip()]
    if config["experiment"] in ("benchmark", "scaling"):
        backend = environment.get("backend", "")
        cores = f" with {environment.get('cpu_count')} cores"
        parts.append(backend + cores if backend == "cpu" else backend)
    else:
        parts += [name for name in [(config.get("dataset") or {}).get("name")] if name]
        for source in ("functaset", "run", "checkpoint"):
            # runs/meta_learn/digits/functaset.npz -> meta_learn/digits
            path = Path((config.get(source) or "").replace("/seed{seed}", ""))
            folder = path.parent if path.suffix == ".npz" else path
            names = [name for name in folder.parts if name not in ("runs", "/")]
            name = "/".join(names[-2:])
            # The functaset of a run is named with the run.
            if name and not any(part.endswith(f" {name}") for part in parts):
                parts.append(f"{source} {name}")
        if config.get("features", "latents") != "latents":
            parts.append(f"features {config['features']}")
        if config["experiment"] == "prune_vit" and len(parts) == 1:
            parts.append("random weights")
    seeds = config.get("seeds", config.get("seed"))
    seeds = seeds if isinstance(seeds, list) else [] if seeds is None else [seeds]
    num_runs = run.summary.get("num_runs", 1)
    if num_runs > 1:
        parts.append(f"{num_runs} trained seeds")
    elif seeds:
        words = "seed" if len(seeds) == 1 else "seeds"
        parts.append(f"{words} {', '.join(map(str, seeds))}")
    for key, unit in (("num_epochs", "epochs"), ("num_steps", "steps")):
        if isinstance(config.get(key), int):
            parts.append(f"{config[key]} {unit}")
    if "epoch" in run.summary:
        parts.append(f"weights of epoch {run.summary['epoch']}")
    return ", ".join(part for part in parts if part)


def _bind(figures, *args):
    """{name: figure(*args)} without the arguments."""
    return {name: functools.partial(make, *args) for name, make in figures.items()}


def _logged(metrics, key):
    """Steps (K,) and values (K, ...) of the log lines that have an entry."""
    lines = [line for line in metrics if key in line]
    return np.array([m["step"] for m in lines]), np.array([m[key] for m in lines])


def _panels(num, *, width=5.4, height=3.5, rows=1, titles=(), **options):
    """A figure with `rows` x `num` Axes, and titles above the first of them."""
    figure, axes = plt.subplots(
        rows,
        num,
        figsize=(width * num, height * rows + 0.3),
        layout="constrained",
        squeeze=False,
        **options,
    )
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(title, fontsize=9)
    return figure, axes


def _share_labels(axes):
    """Keeps the last legend of the first row, and the first label of equal ones."""
    for ax in axes.flat:
        if ax is not axes[0, -1] and ax.get_legend():
            ax.get_legend().remove()
    for first, *others in axes:
        for ax in others:
            if ax.get_ylabel() == first.get_ylabel():
                ax.set_ylabel("")


# --- functa ---


def _meta_psnr(run):
    inner_steps = run.config["inner"]["num_steps"]
    further = run.arrays.get("further_psnr", run.summary.get("test_psnr_per_step"))
    figure, axes = _panels(bool(run.metrics) + (further is not None) or 1)
    if run.metrics:
        steps, psnr = _logged(run.metrics, "psnr_per_step")
        coarse = run.config.get("coarse_steps", 0)
        marks = {}
        if 0 < coarse < steps[-1]:
            factor = run.config["coarse_factor"]
            marks = {f"images at full size (before: 1/{factor})": coarse}
        functa_plots.psnr_curves(
            {
                f"after {n} inner {'step' if n == 1 else 'steps'}": (steps, values)
                for n, values in enumerate(psnr.T)
            },
            x_label="outer step",
            y_label="training PSNR (dB)",
            marks=marks,
            ax=axes[0, 0],
        )
    if further is not None:
        is_longer = len(further) > inner_steps + 1
        functa_plots.psnr_curves(
            {"mean over images": (np.arange(len(further)), np.array(further))},
            x_label="step of the latent",
            y_label="test PSNR (dB)",
            marks={"end of the inner loop": inner_steps} if is_longer else {},
            log_x=inner_steps if is_longer else None,
            ax=axes[0, -1],
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
    return functa_plots.image_grid(
        [images],
        row_labels=["weight of the\nsecond latent"],
        column_titles=[f"{weight:.2f}" for weight in np.linspace(0, 1, len(images))],
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


def _error_maps(run):
    steps = run.need("over_steps")
    label = f"field,\n{len(steps) - 2} inner steps"
    return functa_plots.reconstructions(steps[-1], {label: steps[-2]})


def _latent_channels(run):
    """Of the first test image."""
    return functa_plots.latent_channels(run.need("latents")[0])


def _meta_learn(run):
    if run.config["dataset"]["name"] in fields.NAMES:
        return _bind({"psnr": _meta_psnr, "fields": _fields}, run)
    figures = dict(_META_LEARN)
    if run.config["model"]["type"] == "SpatialSiren":
        figures["latent_channels"] = _latent_channels
    return _bind(figures, run)


def _fields(run):
    """Signals beside their fields and linear control, drawn by their number of axes."""
    signals, code = run.need("signals"), run.need("fields")
    model = run.config["model"]
    if "grid" in model:
        cells = "x".join(map(str, model["grid"]))
        labels = [f"field, {cells}x{model['channels']} numbers", "principal components"]
    else:
        labels = [f"field, {model['latent_dim']} numbers", "EOF"]
    codes = dict(zip(labels, (code, run.need("controls")), strict=True))
    if signals.ndim == 3:
        noise, power = (np.square(x).mean((1, 2)) for x in (code - signals, signals))
        return functa_plots.waveforms(
            signals[..., 0],
            {label: values[..., 0] for label, values in codes.items()},
            sample_rate=fields.SAMPLE_RATE,
            row_labels=[
                f"SNR of the field {snr:.1f} dB" for snr in 10 * np.log10(power / noise)
            ],
        )
    if signals.ndim == 5:
        rows = {"shape": signals} | codes
        return functa_plots.voxel_grid(
            {label: values[..., 0] for label, values in rows.items()},
            column_titles=[
                f"IoU of the field {value:.2f}"
                for value in np.asarray(functa_metrics.iou(code, signals))
            ],
        )
    return functa_plots.globes(
        signals,
        codes,
        run.need("coords"),
        row_labels=["least error", "", "", "largest error"],
    )


def _fit_image(run):
    tasks = list(dict.fromkeys(m["task"] for m in run.metrics))
    figures = _bind({"psnr": _fit_psnr}, run, tasks)
    for task in tasks:
        makers = {f"reconstructions_{task}": _reconstructions, f"field_{task}": _field}
        figures |= _bind(makers, run, task)
    return figures


def _fit_psnr(run, tasks):
    curves, over_steps, over_seconds = {}, {}, {}
    started = 0.0
    for task in tasks:
        logged = [m for m in run.metrics if m["task"] == task]
        measured = [m for m in logged if "psnr" in m]
        loss = np.array([m["loss"] for m in logged])
        curves[task] = np.array([m["task_step"] for m in logged]), -10 * np.log10(loss)
        if f"{task}_curve" in run.arrays:  # every step
            curve = run.arrays[f"{task}_curve"]
            curves[task] = np.arange(len(curve)), curve
        psnr = [m["psnr"] for m in measured]
        over_steps[task] = [m["task_step"] for m in measured], psnr
        if f"{task}_psnr" in run.arrays:
            over_steps[task] += (run.arrays[f"{task}_psnr"].std(1),)
        elif f"{task}_psnr_std" in run.summary:
            over_steps[task] += (run.summary[f"{task}_psnr_std"],)
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


def _classifier_accuracy(run):
    epochs, losses = _logged(run.metrics, "loss_per_candidate")  # (K,), (K, R)
    parts = {
        part: 100 * _logged(run.metrics, f"{part}_accuracy_per_candidate")[1]
        for part in ("train", "validation", "test")
    }
    parts = {part: values for part, values in parts.items() if values.size}
    chosen, marks = 0, {}
    if "validation" in parts:
        # The command selects by the best validation accuracy of any epoch.
        chosen = int(np.argmax(parts["validation"].max(0)))
        if "epoch" in run.summary:
            marks = {"weights kept": run.summary["epoch"]}
    loss_curves = {"chosen candidate": (epochs, losses[:, chosen])}
    curves = {part: (epochs, values[:, chosen]) for part, values in parts.items()}
    if losses.shape[1] > 1:
        everything = f"all {losses.shape[1]} (mean, range)"
        loss_curves[everything] = epochs, losses.T
        if "validation" in parts:
            curves[f"validation,\n{everything}"] = epochs, parts["validation"].T
    figure, axes = _panels(2)
    functa_plots.accuracy_curves(
        loss_curves, y_label="training loss (nats)", ax=axes[0, 0]
    )
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
_WHOLE = {"whole network": 62}  # style: a black star
_STYLES = {label: number for number, label in enumerate(_METHODS.values())}


def _vit_training(run):
    config = run.config
    steps_per_epoch = run.metrics[-1]["step"] / config["num_epochs"]
    marks = {}
    for start, changes in config.get("stages", ()):
        changed = "\n".join(f"{name} {value}" for name, value in changes.items())
        marks[f"from here: {changed}"] = start * config["num_epochs"]

    def curve(key, scale=1):
        steps, values = _logged(run.metrics, key)
        return steps / steps_per_epoch, scale * values

    figure, axes = _panels(2)
    vit_plots.training_curves(
        {"training, augmented": curve("loss")},
        y_label="loss (nats), labels smoothed",
        marks=marks,
        ax=axes[0, 0],
    )
    seen = "training, augmented,\non the patches it sees"
    vit_plots.training_curves(
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
        figures = _bind({"accuracy_and_cost": _accuracy_and_cost}, rows, y_label)
        figures |= _bind(_ATTENTION_FIGURES, run)
    names = {key for row in rows if row["method"] != "dense" for key in row}
    names = {name.removeprefix("speedup_") for name in names}
    batches = sorted(int(name) for name in names if name.isdigit())
    if batches:
        figures |= _bind({"speed": _speed}, rows, batches, y_label)
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
            if column in whole:
                curves |= {"whole network": (np.full(1, 100.0), [100 * whole[column]])}
            drawn[title] = curves
    columns = min(len(drawn), 2)
    figure, axes = _panels(
        columns, rows=-(-len(drawn) // columns), width=5.8, titles=drawn
    )
    for ax in axes.flat[len(drawn) :]:
        ax.axis("off")
    for ax, curves in zip(axes.flat, drawn.values(), strict=False):
        styles = {label: number for number, label in enumerate(curves)} | _WHOLE
        vit_plots.accuracy_against_cost(curves, y_label=y_label, styles=styles, ax=ax)
    return figure


def _speed(rows, batches, y_label):
    with_accuracy = any("accuracy" in row for row in rows)
    figure, axes = _panels(
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
        vit_plots.speedup(measured, styles=_STYLES, ax=ax)
    for ax in axes[0, : len(batches) - 1]:
        ax.get_legend().remove()
    if with_accuracy:
        methods = _TOKENS | {"dense": "whole network"}
        vit_plots.accuracy_against_cost(
            points(methods, f"speedup_{batches[-1]}", "accuracy"),
            x_label=f"measured speed-up, batch of {batches[-1]} (times)",
            y_label=f"{y_label}, not fine-tuned",
            styles=_STYLES | _WHOLE,
            ax=axes[0, -1],
        )
    return figure


def _heads(run):
    scores, ranges = run.need("head_scores"), run.need("attention_ranges")
    figure, axes = _panels(2)
    vit_plots.head_scores(scores, ax=axes[0, 0])
    vit_plots.attention_range(ranges, ax=axes[0, 1])
    return figure


def _square_grid(num_patches):
    # The networks of prune_vit take square images; the pictures may have other sides.
    return (round(num_patches**0.5),) * 2


def _kept_patches(run):
    kept = run.need("kept")
    pictures = run.need("pictured") / 255
    return vit_plots.kept_patches(pictures, kept, grid=_square_grid(kept.shape[-1]))


def _attention(run):
    attention, kept = run.need("attention"), run.need("kept")
    return vit_plots.attention_maps(
        attention,
        num_prefix=attention.shape[-1] - kept.shape[-1],
        ranges=run.need("attention_ranges"),
    )


def _segments(run):
    segments = run.need("segments")
    return vit_plots.segments(
        run.need("pictured")[0] / 255,
        segments,
        grid=_square_grid(segments.shape[-1]),
    )


_ATTENTION_FIGURES = {
    "kept_patches": _kept_patches,
    "attention": _attention,
    "informativeness": lambda run: vit_plots.informativeness(run.need("patch_scores")),
    "segments": _segments,
    "heads": _heads,
}


# --- lbi ---

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


def _train_lbi(run):
    # A single training has its own log; a sweep has one folder per training.
    if not run.metrics:
        return _bind({"accuracy": _lbi_accuracy}, run)
    return _bind({"path": _path, "filters": _filters}, run)


def _lbi_accuracy(run):
    figure, axes = _panels(2)
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
            runs = [_logged(log, f"{split}_accuracy")[1] for log in logs]
            epochs = np.arange(1, len(runs[0]) + 1)
            curves[_OPTIMIZERS.get(method, method)] = epochs, 100 * np.array(runs)
        lbi_plots.accuracy_curves(curves, y_label=y_label, ax=ax)
    _share_labels(axes)
    return figure


def _path(run):
    steps_per_epoch = run.metrics[-1]["step"] / run.config["num_epochs"]
    curves = {}
    for key, label in (
        ("test_accuracy", "accuracy, dense"),
        ("sparse_test_accuracy", "accuracy, projected\non the support"),
        ("density", "groups in the support"),
    ):
        steps, values = _logged(run.metrics, key)
        if steps.size:
            curves[label] = steps / steps_per_epoch, 100 * values
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
    return lbi_plots.filter_norms(layers, entry_label="epoch of entry")


def _prune_lbi(run):
    figures = _bind({"layer_before_and_after": _pruned_layer}, run)
    rows = [files.read_json(path) for path in sorted(run.workdir.glob("*.json"))]
    curves = [row["curves"] for row in rows if row.get("curves")]
    if curves:
        figures |= _bind({"accuracy_against_sparsity": _sparsity}, run.config, curves)
    return figures


def _pruned_layer(run):
    return lbi_plots.pruned_layer(
        run.need("kernel"), run.need("kept"), name=run.config["layer"]
    )


def _sparsity(config, curves):
    """`curves` are those of each network, {SCOPE_ORDER: accuracies}."""
    shares = sorted({*config["sparsities"], *config["curve_sparsities"]})
    orders = {"entry": "order of entry", "magnitude": "magnitude", "random": "random"}
    titles = [title.format(layer=config["layer"]) for title in _SCOPES.values()]
    figure, axes = _panels(3, width=4.4, sharey=True, titles=titles)
    for ax, scope in zip(axes[0], _SCOPES, strict=True):
        lbi_plots.accuracy_against_sparsity(
            100 * np.array(shares),
            {
                label: 100 * np.array([own[f"{scope}_{order}"] for own in curves])
                for order, label in orders.items()
            },
            y_label="test accuracy (%), no fine-tuning",
            ax=ax,
        )
    _share_labels(axes)
    return figure


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


def _compare_pruning(run):
    return _bind({"accuracy_against_sparsity": _compared}, run)


def _compared(run):
    seeds = list(run.summary["runs"].values())
    sparsities = {g: s for g, s in run.config["sparsities"].items() if s}
    titles = ("before fine-tuning", "after fine-tuning")
    figure, axes = _panels(2, rows=len(sparsities), sharey="row", titles=titles)
    for row, (grain, shares) in zip(axes, sparsities.items(), strict=True):
        for ax, measure in zip(row, ("before", "after"), strict=True):
            lbi_plots.accuracy_against_sparsity(
                100 * np.array(shares),
                {
                    label: 100 * np.array([s[grain][method][measure] for s in seeds])
                    for method, label in _PRUNING_METHODS.items()
                    if measure in seeds[0][grain].get(method, ())
                },
                x_label=f"{grain} removed (%)",
                ax=ax,
            )
    _share_labels(axes)
    return figure


# --- landscape ---

_NETWORKS = {"plain": "without BN", "bn": "with BN"}
# Number of points of a curve over all steps; averages reduce the noise of batches.
_NUM_WINDOWS = 60


def _probe_landscape(run):
    run = run._replace(arrays=landscape_arrays(run.workdir, run.config))
    figures = {"beta_profile": _beta_profile}
    if run.config["num_epochs"]:
        figures |= {
            "loss_envelope": _loss_envelope,
            "along_the_gradient": _along_the_gradient,
            "at_equal_loss": _at_equal_loss,
            "gradient_at_equal_loss": _gradient_at_equal_loss,
            "consecutive_steps": _consecutive_steps,
        }
        if run.config["sharpness"]["every"]:
            figures["eigenvalues"] = _eigenvalues
    if run.config.get("spectrum", {}).get("num_samples"):
        figures["spectral_density"] = _spectral_density
    if run.config["surface"]["size"]:
        figures["surfaces"] = _surfaces
    names = [*_NETWORKS, *run.config["networks"]]
    networks = {
        name: _NETWORKS.get(name, name)
        for name in names
        if name in run.config["networks"]
    }
    return _bind(figures, run, networks)


def landscape_arrays(workdir: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The measurements of all trainings of a run of probe_landscape.

    Returns:
      {NETWORK/NAME: (rates, seeds, ...)} of the arrays and the log of each training.
      `logged_loss` are means over the intervals of the log, and `loss_step` their
      middles; `progress_loss` and `progress_step` begin with the loss before the first
      step. NETWORK/surface is that of the only training that has one.

    Raises:
      FileNotFoundError: if a training has no log.
    """
    arrays = {}
    for network in config["networks"]:
        names = [
            [f"{network}_rate{rate:g}_seed{seed}" for seed in config["seeds"]]
            for rate in config["learning_rates"]
        ]
        trainings = [[_training(workdir / name) for name in row] for row in names]
        for single in (single for row in trainings for single in row):
            if "surface" in single:
                arrays[f"{network}/surface"] = single.pop("surface")
        for name in trainings[0][0]:
            values = [[single[name] for single in row] for row in trainings]
            arrays[f"{network}/{name}"] = np.array(values)
    last_step = next(v for k, v in arrays.items() if k.endswith("/last_step")).flat[0]
    num_epochs = config["num_epochs"] or 1
    return arrays | {"steps_per_epoch": max(last_step // num_epochs, 1)}


def _training(folder):
    metrics = files.read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise FileNotFoundError(f"{folder} has no metrics.jsonl to draw from.")
    ends, losses = _logged(metrics[1:], "loss")
    starts = [metrics[0]["step"], *ends[:-1]][: len(ends)]
    arrays = {
        "last_step": np.array(metrics[-1]["step"]),
        "logged_loss": losses,
        "loss_step": (ends + starts) / 2,
        "test_accuracy": _logged(metrics, "test_accuracy")[1],
    }
    probed = [m for m in metrics if "probe" in m]
    arrays["probe_step"] = np.array([m["step"] for m in probed])
    for key in probed[0]["probe"]:
        arrays[f"probe_{key}"] = np.array([m["probe"][key] for m in probed])
    if "probe_loss" in arrays:
        start = arrays["probe_step"][:1], arrays["probe_loss"][:1]
        for name, first, later in zip(
            ("progress_step", "progress_loss"),
            start,
            (arrays["loss_step"], losses),
            strict=True,
        ):
            arrays[name] = np.concatenate([first, later])
    for prefix in ("", "preconditioned_"):
        steps, values = _logged(metrics, f"{prefix}eigenvalues")
        if steps.size:
            arrays[f"{prefix}eigenvalue_step"] = steps
            arrays[f"{prefix}eigenvalues"] = values
    return arrays | _read_arrays(folder)


def _in_epochs(run, name):
    return run.need(name) / run.need("steps_per_epoch")


def _windows(values):
    """Means over windows of steps: (..., S) -> their centers (W,), (..., W)."""
    size = max(values.shape[-1] // _NUM_WINDOWS, 1)
    count = values.shape[-1] // size
    kept = values[..., : count * size].reshape(*values.shape[:-1], count, size)
    return size * (np.arange(count) + 0.5), kept.mean(-1)


def _loss_envelope(run, networks):
    titles = ["band over the learning rates", *networks.values()]
    figure, axes = _panels(1 + len(networks), width=4.6, sharey=True, titles=titles)
    bands = {}
    for ax, (network, label) in zip(axes[0, 1:], networks.items(), strict=True):
        epochs = _in_epochs(run, f"{network}/loss_step")[0, 0]
        losses = run.need(f"{network}/logged_loss")  # (rates, seeds, K)
        # The mean over seeds of the bands.
        bands[label] = epochs, np.stack([losses.min(0).mean(0), losses.max(0).mean(0)])
        landscape_plots.curves(
            {
                f"{rate:g}": (epochs, runs)
                for rate, runs in zip(run.config["learning_rates"], losses, strict=True)
            },
            y_label="training loss (nats)",
            legend_title="learning rate",
            ax=ax,
        )
    landscape_plots.envelope(bands, y_label="training loss (nats)", ax=axes[0, 0])
    for ax in axes[0, 1:-1]:
        ax.get_legend().remove()
    return figure


def _at_equal_loss(run, networks):
    """The band over the learning rates against the training loss, not the epoch."""
    figure, axes = _panels(2, width=5)
    lows, highs = [], []
    for network in networks:
        losses = run.need(f"{network}/progress_loss")
        highs.append(np.nanmin(losses[..., 0]))
        lows.append(np.nanmin(losses))
    levels = np.linspace(min(highs), max(lows), 100)
    widths, bands = {}, {}
    for network, label in networks.items():
        losses = run.need(f"{network}/progress_loss")  # (rates, seeds, K)
        epochs = _in_epochs(run, f"{network}/progress_step")
        width = probes.at_equal_loss(losses.mean(0), np.ptp(losses, 0), levels)
        widths[label] = levels, width
        reached = np.asarray(probes.at_equal_loss(losses, epochs, levels)).mean(1)
        bands[label] = levels, reached
    landscape_plots.curves(
        widths,
        x_label="mean training loss over the rates (nats)",
        y_label="width of the band of losses (nats)",
        ax=axes[0, 0],
    )
    # A band ends where the first of the rates no longer gets there.
    landscape_plots.envelope(
        bands,
        x_label="training loss (nats)",
        y_label="epochs until the loss is reached\n(fastest to slowest rate)",
        log=True,
        ax=axes[0, 1],
    )
    # The losses before the first interval of the log are interpolated.
    steps = [run.need(f"{network}/progress_step")[..., 1] for network in networks]
    axes[0, 1].set_ylim(bottom=np.min(steps) / run.need("steps_per_epoch"))
    for ax in axes[0]:
        ax.invert_xaxis()
    axes[0, 0].get_legend().remove()
    return figure


def _gradient_at_equal_loss(run, networks):
    """Measures along the gradient against the training loss at the probes."""
    figure, axes = _rate_panels(run, rows=2, width=3, height=2.5, sharex=True)
    measures = {
        "grad_distances": "gradient distance (largest)",
        "betas": "effective beta (largest)",
    }
    for row, (key, y_label) in zip(axes, measures.items(), strict=True):
        x_label = "training loss (nats)" if key == "betas" else ""
        for i, ax in enumerate(row):
            curves = {}
            for network, label in networks.items():
                losses = loss_at_probes(run.arrays, network)[i].mean(0)
                values = run.need(f"{network}/probe_{key}")[i].max(-1)
                curves[label] = losses, values
            landscape_plots.curves(
                curves, x_label=x_label, y_label=y_label, log=True, ax=ax
            )
    axes[0, 0].invert_xaxis()  # shared
    _share_labels(axes)
    return figure


def loss_at_probes(arrays: Mapping[str, np.ndarray], network: str) -> np.ndarray:
    """The smallest training loss so far at each probe, (rates, seeds, P).

    Args:
      arrays: those of `landscape_arrays`.
      network: one of the networks of the run.
    """
    if f"{network}/progress_loss" not in arrays:
        raise _MissingError(f"{network}/progress_loss")
    names = ("probe_step", "progress_step", "progress_loss")
    probed, steps, losses = (arrays[f"{network}/{name}"] for name in names)
    lowest = np.fmin.accumulate(losses, axis=-1)
    found = np.empty(probed.shape)
    for i in np.ndindex(probed.shape[:2]):
        found[i] = np.interp(probed[i], steps[i], lowest[i])
    return found


def _consecutive_steps(run, networks):
    layers = {"last_layer": "last layer", "all_layers": "all parameters"}
    measures = {
        "grad_distance": "gradient distance",
        "beta": "gradient distance / step length",
    }
    if run.config.get("last_layer", "") is None:
        del layers["last_layer"]
    titles = 2 * [f"between consecutive steps, {layer}" for layer in layers.values()]
    figure, axes = _panels(len(layers), rows=2, height=3, sharex=True, titles=titles)
    for row, (measure, y_label) in zip(axes, measures.items(), strict=True):
        x_label = "epoch" if measure == "beta" else ""  # the lower row
        for ax, layer in zip(row, layers, strict=True):
            bands = {}
            for network, label in networks.items():
                steps, values = _windows(run.need(f"{network}/{layer}_{measure}"))
                bands[label] = (
                    (steps + 1) / run.need("steps_per_epoch"),
                    values.mean(1),
                )
            landscape_plots.envelope(
                bands, x_label=x_label, y_label=y_label, log=True, ax=ax
            )
    _share_labels(axes)
    return figure


def _rate_panels(run, **options):
    """A column of Axes for each learning rate."""
    rates = run.config["learning_rates"]
    titles = [f"learning rate {rate:g}" for rate in rates]
    return _panels(len(rates), sharey="row", titles=titles, **options)


def _along_the_gradient(run, networks):
    """Santurkar et al., figure 4, at every learning rate: bands over the step sizes."""
    figure, axes = _rate_panels(run, rows=4, width=3, height=2.3, sharex=True)
    measures = {
        "losses": "loss (nats)",
        "grad_distances": "gradient distance",
        "relative_grad_distances": "gradient distance /\ngradient norm",
        "betas": "effective beta\n(largest)",
    }
    x_label = ""
    for row, (key, y_label) in zip(axes, measures.items(), strict=True):
        for i, ax in enumerate(row):
            bands = {}
            for network, label in networks.items():
                values = run.need(f"{network}/probe_{key}")[i]  # (seeds, P, steps)
                low, high = values.min(-1), values.max(-1)
                band = np.stack([low.mean(0), high.mean(0)])
                # The beta of the paper is the largest one.
                bands[label] = (
                    _in_epochs(run, f"{network}/probe_step")[i, 0],
                    high if key == "betas" else band,
                )
            make = landscape_plots.envelope
            if key == "betas":  # the lowest row
                make, x_label = landscape_plots.curves, "epoch"
            make(
                bands,
                x_label=x_label,
                y_label=y_label,
                log=True,
                ax=ax,
            )
    _share_labels(axes)
    return figure


def _beta_profile(run, networks):
    """Over the step sizes, from the end of the first epoch on, if there is one."""
    first = min(run.config["num_epochs"], 1)
    figure, axes = _rate_panels(run, width=3.2, height=3)
    for i, ax in enumerate(axes[0]):
        betas = {}
        for network, label in networks.items():
            later = _in_epochs(run, f"{network}/probe_step")[i, 0] >= first
            values = run.need(f"{network}/probe_betas")[i][:, later]
            betas[label] = values.reshape(-1, values.shape[-1])
        landscape_plots.step_profile(np.array(run.config["step_sizes"]), betas, ax=ax)
    axes[0, -1].get_legend().set_title("median, 10 to 90 %", {"size": 7})
    _share_labels(axes)
    return figure


def _eigenvalues(run, networks):
    with_adam = run.config["sharpness"].get("preconditioned", False)
    figure, axes = _rate_panels(
        run, rows=2 + with_adam, width=3, height=2.6, sharex=True
    )
    for i, rate in enumerate(run.config["learning_rates"]):
        largest, products, preconditioned = {}, {}, {}
        for network, label in networks.items():
            epochs = _in_epochs(run, f"{network}/eigenvalue_step")[i, 0]
            values = run.need(f"{network}/eigenvalues")[i]  # (seeds, E, k)
            # The last eigenvalue is the smallest.
            largest[label] = epochs, values.mean(0)[:, :-1]
            products[label] = epochs, rate * values[..., 0]
            if with_adam:
                name = f"{network}/preconditioned_eigenvalue"
                preconditioned[label] = (
                    _in_epochs(run, f"{name}_step")[i, 0],
                    rate * run.need(f"{name}s")[i][..., 0],
                )
        landscape_plots.eigenvalues(largest, x_label="", ax=axes[0, i])
        landscape_plots.stability(
            products, x_label="" if with_adam else "epoch", ax=axes[1, i]
        )
        if with_adam:
            b1 = run.config["optimizer"]["options"].get("b1", 0.9)
            landscape_plots.stability(
                preconditioned,
                y_label="learning rate x\npreconditioned sharpness",
                bound=curvature.adam_bound(b1),
                optimizer="Adam",
                ax=axes[2, i],
            )
    _share_labels(axes)
    return figure


def _spectral_density(run, networks):
    """At the end of the training, of the first seed."""
    figure, axes = _rate_panels(run, width=3.6, height=3)
    for i, ax in enumerate(axes[0]):
        densities = {}
        for network, label in networks.items():
            spectrum = curvature.Quadrature(
                run.need(f"{network}/spectrum_nodes")[i, 0],
                run.need(f"{network}/spectrum_weights")[i, 0],
            )
            low, high = spectrum.nodes.min(), spectrum.nodes.max()
            width = 0.01 * float(high - low) or 1e-3
            grid = np.linspace(low - 5 * width, high + 5 * width, 1000)
            density = curvature.spectral_density(spectrum, grid, sigma=width)
            densities[label] = grid, np.asarray(density)
        landscape_plots.spectral_density(densities, ax=ax)
    _share_labels(axes)
    return figure


def _surfaces(run, networks):
    surfaces = {
        label: run.arrays[f"{network}/surface"]
        for network, label in networks.items()
        if f"{network}/surface" in run.arrays
    }
    if not surfaces:
        raise _MissingError("surface")
    limits = landscape_plots.robust_limits(*surfaces.values())
    num, span = len(surfaces), run.config["surface"]["span"]
    figure = plt.figure(figsize=(5.4 * num, 8.6), layout="constrained")
    for number, (label, losses) in enumerate(surfaces.items(), start=1):
        points = np.linspace(-span, span, len(losses))
        flat = figure.add_subplot(2, num, number)
        landscape_plots.surface_contours(losses, points, limits=limits, ax=flat)
        flat.set_title(label, fontsize=9)
        deep = figure.add_subplot(2, num, num + number, projection="3d")
        landscape_plots.surface_3d(losses, points, limits=limits, ax=deep)
    return figure


# --- time and memory ---

_AXES = {
    "batch_size": "images of a batch",
    "image_size": "side of an image (pixels)",
    "latent_dim": "size of the latent (numbers)",
    "num_steps": "inner steps",
}


def _measured(ax, x, values, *, x_label, y_label, style, quartiles=None, log_x=False):
    """Measurements (K,) with their quartiles (K, 2) as error bars."""
    low, high = np.transpose(np.array(quartiles or np.stack([values, values], -1)))
    ax.errorbar(
        x,
        values,
        yerr=np.clip([values - low, high - values], 0, None) if quartiles else None,
        **style,
        markersize=5,
        linestyle="none",
        capsize=3,
    )
    if log_x:
        ax.set_xscale("log")
    else:
        ax.set_xlim(0, 1.06 * np.max(x))
    # From zero: proportional measurements are on a line through the origin.
    ax.set_ylim(0, 1.1 * np.max(high))
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)


_TIME = {"color": "#0072B2", "marker": "o"}
_MEMORY = {"color": "#D55E00", "marker": "s"}


def _benchmark(run):
    return _bind({"scaling": _benchmark_axes}, run) if run.config.get("axes") else {}


def _benchmark_axes(run):
    axes = run.config["axes"]
    figure, panels = _panels(len(axes), rows=2, width=3.4, height=2.6, sharex="col")
    for (top, bottom), (axis, values) in zip(panels.T, axes.items(), strict=True):
        rows = [run.summary[f"{axis}_{value}"] for value in values]
        _measured(
            top,
            values,
            np.array([row["milliseconds"] for row in rows]),
            x_label="",
            y_label="time of a step (ms)\nmedian and quartiles",
            quartiles=[row["milliseconds_quartiles"] for row in rows],
            style=_TIME,
        )
        _measured(
            bottom,
            values,
            np.array([row["mebibytes"] for row in rows]),
            x_label=_AXES.get(axis, axis),
            y_label="memory (MiB)",
            style=_MEMORY,
        )
    return figure


def _scaling(run):
    figure, axes = _panels(2, width=4.6, height=3.2)
    _measured(
        axes[0, 0],
        run.summary["num_devices"],
        np.array(run.summary["images_per_second"]),
        x_label="virtual devices on the same cores",
        y_label="meta-learning (images/s)",
        style=_TIME,
    )
    axes[0, 0].set_xticks(run.summary["num_devices"])
    _measured(
        axes[0, 1],
        run.summary["num_images"],
        np.array(run.summary["peak_mebibytes"]),
        x_label="images encoded into one functaset",
        y_label="peak memory of the process (MiB)",
        style=_MEMORY,
        log_x=True,
    )
    return figure


def _psnr_against_size(run):
    curves = {}
    for name in ("pca", *sorted(run.arrays.keys() - {"pca"})):
        psnr = run.need(name)[1:]
        label, num_cells = "PCA of whole images", 1
        if name != "pca":
            label = f"PCA of the cells, grid of {name}"
            num_cells = math.prod(map(int, name.split("x")))
        # With more components the image is exact once it is rounded to 8 bits.
        psnr = psnr[psnr <= functa_plots.EXACT_TO_8_BITS]
        curves[label] = num_cells * np.arange(1, 1 + len(psnr)), psnr
    fields = _fields_in_results(run.config["dataset"]["name"], run.summary)
    return functa_plots.against_num_values(
        curves, fields, y_label="test PSNR (dB)"
    ).figure


def _fields_in_results(dataset, controls):
    """{kind: (numbers per image, test PSNR, deviation)} of fields in `results/`.

    Of runs that were tested on as many images of the data set as the controls.
    """
    points = {}
    for folder in sorted(_RESULTS.glob("meta_learn_*")):
        if not f"{folder.name}_".startswith(f"meta_learn_{dataset}_"):
            continue
        summary = files.read_json(folder / "summary.json")
        if summary["num_test_images"] != controls["num_test_images"]:
            continue
        kind, size, _ = _code_of(folder)
        point = (size, summary["test_psnr"], summary.get("test_psnr_std", np.nan))
        points.setdefault(f"field, {kind}", []).append(point)
    return {kind: tuple(np.transpose(rows)) for kind, rows in points.items()}


def _code_of(folder):
    """Kind and size of the latents of a run in `results/`, and its configuration."""
    config = files.read_json(folder / "config.json")
    if "run" in config:  # make_functaset
        return _code_of(_RESULTS / "_".join(Path(config["run"]).parts[1:]))
    model = config["model"]
    if model["type"] != "SpatialSiren":
        return "one latent", model["latent_dim"], config
    kind = f"grid of {'x'.join(map(str, model['grid']))}"
    return kind, math.prod(model["grid"]) * model["channels"], config


def _accuracy_against_size(run):
    """Of all heads in `results/` on latents and pixels of the data set."""
    dataset, points = run.config["dataset"]["name"], {}
    for folder in sorted(_RESULTS.glob("classify_functa_*")):
        config = files.read_json(folder / "config.json")
        summary = files.read_json(folder / "summary.json")
        parts = Path(config["functaset"].replace("/seed{seed}", "")).parts[1:-1]
        field = _RESULTS / "_".join(parts)
        if dataset not in field.name.split("_") or not field.exists():
            continue
        features = config.get("features") or "latents"
        kind, size, made = _code_of(field)
        if features == "patches":
            kind = "pixels of the cells"
            model = made["model"]
            size = math.prod((*model["grid"], *made["cell"], model["out_channels"]))
        elif features != "latents":
            continue
        head = config["model"].get("type", "mlp")
        label = f"{kind}: {head}"
        deviation = summary.get("test_accuracy_std", np.nan)
        point = (size, 100 * summary["test_accuracy"], 100 * deviation)
        points.setdefault(label, []).append(point)
    if not points:
        raise _MissingError("accuracies in results/")
    points = {label: tuple(np.transpose(rows)) for label, rows in points.items()}
    return functa_plots.against_num_values(
        {}, points, y_label="test accuracy (%)"
    ).figure


_CODES = {
    "field": "latents of the field",
    "jpeg": "JPEG without headers",
    "webp": "WebP without headers",
    "jpeg2000": "JPEG 2000 without headers",
}
# An installed copy has no results.
_RESULTS = Path(__file__).parents[2] / "results"
_PUBLISHED = _RESULTS / "published" / "summary.json"


def _compress_functa(run):
    makers = {"psnr_against_bits": _psnr_against_bits}
    if "accuracy" in run.summary["curves"]["field"]:
        makers["accuracy_against_bits"] = _accuracy_against_bits
    return _bind(makers, run)


def _psnr_against_bits(run):
    curves = {}
    for name, curve in run.summary["curves"].items():
        grid = name.removeprefix("klt_")
        label = _CODES.get(name, f"components of patches, grid of {grid}")
        curves[label] = curve["bpp"], curve["psnr"]
    if run.summary["dataset"] == "cifar10" and _PUBLISHED.exists():
        published = files.read_json(_PUBLISHED)["coin_pp"]
        curves["COIN++, as published"] = published["bpp"], published["psnr"]
    return functa_plots.rate_curves(
        curves, y_label="test PSNR (dB)", level=run.summary["target_psnr"]
    ).figure


def _accuracy_against_bits(run):
    curve = run.summary["curves"]["field"]
    ax = functa_plots.rate_curves(
        {"decoded latents": (curve["bpp"], 100 * np.array(curve["accuracy"]))},
        y_label="test accuracy (%)",
        level=100 * run.summary["accuracy_not_quantized"],
    )
    return ax.figure


_SOURCES = {
    "train": "training images",
    "reconstructions": "reconstructions",
    "samples": "samples of the flow",
    "gaussian": "Gaussian of each class",
}
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
    curves = {"training batches": _logged(run.metrics, "loss")}
    if "held_out_loss" in run.metrics[-1]:
        curves["held-out latents"] = _logged(run.metrics, "held_out_loss")
    return functa_plots.accuracy_curves(
        curves, x_label="step", y_label="flow loss (squared error)"
    ).figure


def _generated_classes(run):
    images, labels = _as_float(run, "rows"), run.need("row_labels")
    rows = images.reshape(len(labels), -1, *images.shape[1:])
    names = run.arrays.get("class_names")
    names = [str(label if names is None else names[label]) for label in labels]
    if not run.config["conditional"]:
        names = None
    return functa_plots.image_grid(rows, row_labels=names, size=0.8)


def _generated_sources(run):
    names = {"reference": f"{run.summary['compared_with']} images", **_sources(run)}
    rows = [_as_float(run, name) for name in names]
    labels = [name.replace(" ", "\n", 1) for name in names.values()]
    return functa_plots.image_grid(rows, row_labels=labels, size=0.9)


def _generated_large(run):
    small, large = _as_float(run, "small")[:4], _as_float(run, "large")[:4]
    return functa_plots.super_resolution(
        {"resolution of the training": small, "the same latents, larger": large}
    )


def _generated_nearest(run):
    rows = [_as_float(run, "samples"), _as_float(run, "nearest")]
    labels = ["sample", "nearest\ntraining image"]
    return functa_plots.image_grid(rows, row_labels=labels, size=0.9)


def _generated_measures(run):
    table, levels = {}, {}
    for extractor in ("classifier", "random"):
        if extractor not in run.summary["samples"]:
            continue
        for key, title in _MEASURES_OF_IMAGES.items():
            title = f"{title},\nfeatures of the {_EXTRACTORS[extractor]}"
            table[title] = {}
            for source, name in _sources(run).items():
                value = run.summary[source][extractor][key]
                if key == "kernel_distance":
                    error = run.summary[source][extractor][f"{key}_error"]
                    value = (value, error)
                table[title][name] = value
            if key == "coverage":
                levels[title] = run.summary["expected_coverage"]
            elif key == "density":
                levels[title] = 1.0
    for key, title, scale in (
        ("accuracy_score", "accuracy score (%, higher is better)", 100),
        ("memorization_ratio", "distance to the nearest training\nimage, relative", 1),
    ):
        values = {
            name: scale * run.summary[source][key]
            for source, name in _sources(run).items()
            if key in run.summary[source]
        }
        if values:
            table[title] = values
            if key == "memorization_ratio":
                levels[title] = 1.0
    return functa_plots.measures(table, levels=levels)


def _as_float(run, name):
    return np.float32(run.need(name)) / 255


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
    curves = _methods(run)
    _, axes = _panels(2)
    functa_plots.accuracy_curves(
        {
            title: (measured["validation_accuracy"][0], 100 * values)
            for title, measured in curves.items()
            for values in [measured["validation_accuracy"][1]]
        },
        x_label="step",
        y_label="validation accuracy (%)",
        ax=axes[0, 0],
    )
    functa_plots.psnr_curves(
        {title: measured["validation_psnr"] for title, measured in curves.items()},
        y_label="validation PSNR (dB)",
        ax=axes[0, 1],
    )
    axes[0, 0].get_legend().remove()
    return axes[0, 0].figure


def _accuracy_against_psnr(run):
    points = {}
    for (title, measured), method in zip(
        _methods(run).items(), run.config["methods"], strict=True
    ):
        steps, accuracy = measured["validation_accuracy"]
        all_steps, psnr = measured["validation_psnr"]
        psnr = psnr[:, np.isin(all_steps, steps)].mean(0)
        points[f"{title}:\nvalidation, during training"] = (
            psnr,
            100 * accuracy.mean(0),
        )
        points[f"{title}: test"] = (
            np.array([run.summary[f"{method}_test_psnr"]]),
            np.array([100 * run.summary[f"{method}_test_accuracy"]]),
        )
    return functa_plots.accuracy_curves(points, x_label="PSNR (dB)").figure


# The names of the methods of meta_classify.
_JOINT = {"joint": "labels in the loop", "two_stage": "field, then classifier"}


_EXTRACTORS = {"classifier": "classifier", "random": "random network"}
_GENERATE = {
    "training": _flow_training,
    "samples": _generated_classes,
    "sources": _generated_sources,
    "large": _generated_large,
    "nearest": _generated_nearest,
    "measures": _generated_measures,
}
_META_LEARN = {
    "psnr": _meta_psnr,
    "best_and_worst": _best_and_worst,
    "over_inner_steps": _over_inner_steps,
    "interpolation": _interpolation,
    "reconstructions": _error_maps,
    "super_resolution": _super_resolution,
}
_META_CLASSIFY = {
    "training": _joint_training,
    "accuracy_against_psnr": _accuracy_against_psnr,
}
_CLASSIFY = {"accuracy": _classifier_accuracy, "confusion": _confusion}
_CONTROLS = {
    "psnr_against_size": _psnr_against_size,
    "accuracy_against_size": _accuracy_against_size,
}
_FIGURES: dict[str, Callable[[Run], dict[str, Callable[[], Any]]]] = {
    "meta_learn": _meta_learn,
    "fit_image": _fit_image,
    "classify_functa": functools.partial(_bind, _CLASSIFY),
    "train_vit": functools.partial(_bind, {"training": _vit_training}),
    "prune_vit": _prune_vit,
    "train_lbi": _train_lbi,
    "prune_lbi": _prune_lbi,
    "compare_pruning": _compare_pruning,
    "probe_landscape": _probe_landscape,
    "benchmark": _benchmark,
    "scaling": functools.partial(_bind, {"scaling": _scaling}),
    "latent_controls": functools.partial(_bind, _CONTROLS),
    "compress_functa": _compress_functa,
    "generate_functa": functools.partial(_bind, _GENERATE),
    "meta_classify": functools.partial(_bind, _META_CLASSIFY),
}
