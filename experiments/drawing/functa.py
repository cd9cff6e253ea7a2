"""The figures of fields: meta_learn and fit_image."""

import numpy as np

from experiments.common import fields, files
from experiments.drawing.panels import panels
from experiments.drawing.run import bind
from functa import metrics, plots


def _meta_psnr(run):
    inner_steps = run.config["inner"]["num_steps"]
    further = run.arrays.get("further_psnr", run.summary.get("test_psnr_per_step"))
    figure, axes = panels(bool(run.metrics) + (further is not None) or 1)
    if run.metrics:
        steps, psnr = files.logged(run.metrics, "psnr_per_step")
        coarse = run.config.get("coarse_steps", 0)
        marks = {}
        if 0 < coarse < steps[-1]:
            factor = run.config["coarse_factor"]
            marks = {f"images at full size\n(before: 1/{factor})": coarse}
        curves, warm = {}, 0
        if not run.config.get("init_from"):
            warm = run.config.get("warm_start_steps", 0)
        if warm:
            # Its latents are given, so that there are no inner steps.
            curves["warm start"] = steps[steps <= warm], psnr[steps <= warm, -1]
            marks["end of the warm start"] = warm
        later = steps > warm
        for n, values in enumerate(psnr.T if later.any() else ()):
            label = f"after {n} inner {'step' if n == 1 else 'steps'}"
            curves[label] = steps[later], values[later]
        plots.psnr_curves(
            curves,
            x_label="outer step",
            y_label="training PSNR (dB)",
            marks=marks,
            ax=axes[0, 0],
        )
    if further is not None:
        is_longer = len(further) > inner_steps + 1
        plots.psnr_curves(
            {"mean over the signals": (np.arange(len(further)), np.array(further))},
            x_label="optimization step of the latents",
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
    return plots.image_grid(rows, row_labels=labels)


def _over_inner_steps(run):
    steps = run.need("over_steps")  # (S + 2, B, H, W, C), the images last
    return plots.over_inner_steps(
        steps[:-1],
        steps[-1],
        row_labels=[f"test {i}" for i in range(steps.shape[1])],
    )


def _interpolation(run):
    images = run.need("interpolation")
    return plots.image_grid(
        [images],
        row_labels=["weight of the\nsecond latent"],
        column_titles=[f"{weight:.2f}" for weight in np.linspace(0, 1, len(images))],
    )


def _super_resolution(run):
    steps, large = run.need("over_steps"), run.need("super_resolved")
    rows = {"image": steps[-1], "field": steps[-2], "field, 4 x": large}
    return plots.image_grid(
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
    return plots.reconstructions(steps[-1], {label: steps[-2]})


def _latent_channels(run):
    """Of the first test image."""
    return plots.latent_channels(run.need("latents")[0])


def _meta_learn(run):
    if run.config["dataset"]["name"] in fields.NAMES:
        return bind({"psnr": _meta_psnr, "fields": _fields}, run)
    figures = {
        "psnr": _meta_psnr,
        "best_and_worst": _best_and_worst,
        "over_inner_steps": _over_inner_steps,
        "interpolation": _interpolation,
        "reconstructions": _error_maps,
        "super_resolution": _super_resolution,
    }
    if run.config["model"]["type"] == "SpatialSiren":
        figures["latent_channels"] = _latent_channels
    return bind(figures, run)


def _fields(run):
    """Signals, their fields and linear control, drawn by their number of axes."""
    signals, code = run.need("signals"), run.need("fields")
    model = run.config["model"]
    size, num_components = run.arrays.get(
        "code_sizes",  # Runs of earlier versions do not have it.
        [model.get("channels") or model.get("latent_dim")] * 2,
    )
    if "grid" in model:
        cells = "x".join(map(str, model["grid"]))
        labels = [f"field, {cells}x{size} numbers", "principal components"]
    else:
        name = "EOF" if signals.ndim == 4 else "principal components"
        labels = [f"field, {size} numbers", f"{name}, {num_components} numbers"]
    codes = dict(zip(labels, (code, run.need("controls")), strict=True))
    if signals.ndim == 3:
        noise, power = (np.square(x).mean((1, 2)) for x in (code - signals, signals))
        return plots.waveforms(
            signals[..., 0],
            {label: values[..., 0] for label, values in codes.items()},
            sample_rate=fields.SAMPLE_RATE,
            row_labels=[
                f"SNR of the field {snr:.1f} dB" for snr in 10 * np.log10(power / noise)
            ],
        )
    if signals.ndim == 5:
        rows = {"shape": signals} | codes
        return plots.voxel_grid(
            {label: values[..., 0] for label, values in rows.items()},
            column_titles=[
                f"IoU of the field {value:.2f}"
                for value in np.asarray(metrics.iou(code, signals))
            ],
        )
    return plots.globes(
        signals,
        codes,
        run.need("coords"),
        row_labels=["least error", "", "", "largest error"],
    )


def _fit_image(run):
    tasks = list(dict.fromkeys(m["task"] for m in run.metrics))
    figures = bind({"psnr": _fit_psnr}, run, tasks)
    for task in tasks:
        makers = {f"reconstructions_{task}": _reconstructions, f"field_{task}": _field}
        figures |= bind(makers, run, task)
    return figures


def _fit_psnr(run, tasks):
    curves, over_steps, over_seconds = {}, {}, {}
    started = 0.0
    for task in tasks:
        label = task.replace("_", ", ")  # 96x96_mosaic
        logged = [m for m in run.metrics if m["task"] == task]
        measured = [m for m in logged if "psnr" in m]
        loss = np.array([m["loss"] for m in logged])
        curves[label] = np.array([m["task_step"] for m in logged]), -10 * np.log10(loss)
        if f"{task}_curve" in run.arrays:  # every step
            curve = run.arrays[f"{task}_curve"]
            curves[label] = np.arange(len(curve)), curve
        psnr = [m["psnr"] for m in measured]
        over_steps[label] = [m["task_step"] for m in measured], psnr
        if f"{task}_psnr" in run.arrays:
            over_steps[label] += (run.arrays[f"{task}_psnr"].std(1),)
        elif f"{task}_psnr_std" in run.summary:
            over_steps[label] += (run.summary[f"{task}_psnr_std"],)
        over_seconds[label] = [m["seconds"] - started for m in measured], psnr
        started = logged[-1]["seconds"]
    figure, axes = panels(2)
    plots.psnr_curves(
        curves,
        points=over_steps,
        x_label="step (line: pixels of the step; points: all pixels,\n"
        "mean and deviation over images)",
        y_label="PSNR (dB)",
        log_x=10,
        ax=axes[0, 0],
    )
    plots.psnr_curves(
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
    return plots.image_grid(
        np.swapaxes(np.concatenate([shown, images[None]]), 0, 1),
        row_labels=[f"image {i}" for i in range(len(images))],
        column_titles=[*titles, "image"],
        # A photograph needs more room than a small image.
        size=1.1 if len(images) > 1 else 1.9,
    )


def _field(run, task):
    return plots.field_and_gradient(
        np.float32(run.need(f"{task}_image")) / 255,
        np.float32(run.need(f"{task}_large")) / 255,
        run.need(f"{task}_gradient"),
    )


FIGURES = {"meta_learn": _meta_learn, "fit_image": _fit_image}
