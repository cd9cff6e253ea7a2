"""Draws the figures of a run from its files: python -m experiments.figures WORKDIR.

A figure is a function of `metrics.jsonl`, `arrays.npz` and `summary.json`; nothing is
trained again. Each command's figures are one function below.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments.common import (
    benchmark_figures,
    devices,
    files,
    landscape_figures,
    lbi_figures,
    scaling_figures,
    vit_figures,
)


def draw(workdir: Path) -> None:
    """Draws all figures of the run into `<workdir>/figures`.

    Raises:
      FileNotFoundError: if the folder holds no run, or no arrays to draw from.
    """
    if not devices.is_main():
        return
    workdir = Path(workdir)
    for name in ("environment.json", "arrays.npz"):
        if not (workdir / name).exists():
            raise FileNotFoundError(f"{workdir} has no {name} to draw from.")
    with np.load(workdir / "arrays.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    (workdir / "figures").mkdir(exist_ok=True)
    metrics = files.read_metrics(workdir / "metrics.jsonl")
    _DRAW[json.loads((workdir / "config.json").read_text())["experiment"]](
        workdir / "figures", arrays, metrics
    )


def _save(figure, path):
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _show(axis, image):
    image = np.clip(image, 0, 1)
    if image.shape[-1] == 1:
        axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _image_grid(rows, *, row_labels, column_titles=None, size=1.1):
    """A figure of images, rows (R, K, H, W, C) as nested sequences."""
    num_rows, num_columns = len(rows), max(len(row) for row in rows)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(size * num_columns + 0.8, size * num_rows + 0.3),
        squeeze=False,
    )
    for i, row in enumerate(rows):
        for j in range(num_columns):
            if j < len(row):
                _show(axes[i, j], row[j])
            else:
                axes[i, j].axis("off")
            if column_titles is not None and i == 0 and j < len(column_titles):
                axes[i, j].set_title(column_titles[j], fontsize=8)
        axes[i, 0].set_ylabel(row_labels[i], fontsize=8)
    return figure


def _draw_meta_learn(folder, arrays, metrics):
    num_steps = int(arrays["num_steps"])
    rows, labels = [], []
    for split in ("train", "test"):
        for name in ("best", "worst"):
            original, fitted = arrays[f"{split}_{name}"]
            low, high = np.sort(arrays[f"{split}_{name}_psnr"])[[0, -1]]
            rows += [original, fitted]
            labels += [f"{split}\n{name} 4", f"{low:.1f} to\n{high:.1f} dB"]
    _save(_image_grid(rows, row_labels=labels), folder / "best_and_worst.png")

    steps = arrays["over_steps"]
    titles = [f"step {n}" for n in range(num_steps + 1)] + ["image"]
    _save(
        _image_grid(
            np.swapaxes(steps, 0, 1),
            row_labels=[f"test {i}" for i in range(steps.shape[1])],
            column_titles=titles,
        ),
        folder / "over_inner_steps.png",
    )

    interpolated = arrays["interpolation"]
    weights = np.linspace(0, 1, len(interpolated))
    _save(
        _image_grid(
            [interpolated],
            row_labels=["latent"],
            column_titles=[f"{w:.2f}" for w in weights],
        ),
        folder / "interpolation.png",
    )

    fitted, large = steps[-2], arrays["super_resolved"]
    sizes = [f"{x.shape[1]}x{x.shape[2]}" for x in (steps[-1], fitted, large)]
    _save(
        _image_grid(
            [steps[-1], fitted, large],
            row_labels=[
                f"image\n{sizes[0]}",
                f"field\n{sizes[1]}",
                f"field\n{sizes[2]}",
            ],
            size=1.8,
        ),
        folder / "super_resolution.png",
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    if metrics:
        step = [m["step"] for m in metrics]
        psnr = np.array([m["psnr_per_step"] for m in metrics])
        for n in range(psnr.shape[1]):
            left.plot(step, psnr[:, n], label=f"after {n} inner steps")
        left.legend(fontsize=7)
        left.set_xlabel("outer step")
        left.set_ylabel("training PSNR (dB)")
    else:
        left.axis("off")  # the run only evaluated
    further = arrays["further_psnr"]
    right.plot(np.arange(len(further)), further)
    right.axvline(num_steps, color="0.7", linewidth=1)
    right.annotate("inner loop ends", (num_steps, further[0]), fontsize=7)
    right.set_xlabel("latent step")
    right.set_ylabel("test PSNR, mean over images (dB)")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(0, len(further) - 1)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _save(figure, folder / "psnr.png")


def _draw_fit_image(folder, arrays, metrics):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    started = 0.0
    for name in arrays["tasks"]:
        curve, steps = arrays[f"{name}_curve"], arrays[f"{name}_steps"]
        psnr = arrays[f"{name}_psnr"].mean(1)
        [line] = left.plot(np.arange(len(curve)), curve, linewidth=0.8, alpha=0.6)
        left.plot(steps, psnr, "o", markersize=4, color=line.get_color(), label=name)
        logged = [m for m in metrics if m["task"] == name]
        measured = [m for m in logged if "psnr" in m]
        right.plot(
            [m["seconds"] - started for m in measured],
            [m["psnr"] for m in measured],
            "o-",
            markersize=4,
            color=line.get_color(),
        )
        started = logged[-1]["seconds"] if logged else started
    left.set_xscale("symlog", linthresh=10)
    left.set_xlabel("step (line: pixels of the step; dots: all pixels)")
    right.set_xlabel("seconds, compilation included")
    left.set_ylabel("PSNR, mean over images (dB)")
    left.legend(fontsize=7, title="pixels", title_fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _save(figure, folder / "psnr.png")

    for name in arrays["tasks"]:
        images = np.float32(arrays[f"{name}_image"][:4]) / 255
        shown = np.float32(arrays[f"{name}_shown"][:, :4]) / 255
        psnr = arrays[f"{name}_psnr"]
        titles = [
            f"step {step}\n{value:.1f} dB"
            for step, value in zip(arrays[f"{name}_steps"], psnr.mean(1), strict=True)
        ]
        # Room for a photograph's width, but for a table of small images no more.
        wide = 1.1 if len(images) > 1 else 1.9
        _save(
            _image_grid(
                np.swapaxes(np.concatenate([shown, images[None]]), 0, 1),
                row_labels=[f"image {i}" for i in range(len(images))],
                column_titles=[*titles, "image"],
                size=wide,
            ),
            folder / f"reconstructions_{name}.png",
        )

        large = np.float32(arrays[f"{name}_large"]) / 255
        gradient = arrays[f"{name}_gradient"]
        figure, axes = plt.subplots(
            len(large), 3, figsize=(9, 3.2 * len(large)), squeeze=False
        )
        for row, image, field, magnitude in zip(
            axes, images, large, gradient, strict=False
        ):
            _show(row[0], image)
            _show(row[1], field)
            # Edges span orders of magnitude; the root shows the faint ones too.
            _show(row[2], np.sqrt(magnitude / magnitude.max())[..., None])
        sizes = [f"{x.shape[1]}x{x.shape[2]}" for x in (images, large)]
        axes[0, 0].set_title(f"image, {sizes[0]}", fontsize=9)
        axes[0, 1].set_title(f"field, {sizes[1]}", fontsize=9)
        axes[0, 2].set_title("its gradient's magnitude (square root)", fontsize=9)
        _save(figure, folder / f"field_{name}.png")


def _draw_classify_functa(folder, arrays, metrics):
    chosen = int(arrays["chosen"])
    epochs = [m["step"] for m in metrics]
    parts = {
        "train": ("tab:blue", "training split"),
        "validation": ("tab:orange", "validation part"),
        "test": ("tab:green", "test split"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(epochs, [m["loss_per_candidate"][chosen] for m in metrics])
    left.set_ylabel("training loss")
    for part, (color, label) in parts.items():
        name = f"{part}_accuracy_per_candidate"
        if not metrics or name not in metrics[0]:
            continue
        accuracy = 100 * np.array([m[name] for m in metrics])
        if part == "validation":
            others = np.delete(accuracy, chosen, axis=1)
            right.plot(epochs, others, color=color, linewidth=0.6, alpha=0.4)
        right.plot(epochs, accuracy[:, chosen], color=color, label=label)
    right.set_ylabel("accuracy (%)")
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    _save(figure, folder / "accuracy.png")

    confusion = arrays["confusion"]
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    size = max(4.0, 0.45 * len(share))
    figure, axis = plt.subplots(figsize=(size, size))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    # Beyond some thirty classes the numbers no longer fit their cells.
    if len(share) <= 30:
        for i, j in np.argwhere(confusion > 0):
            color = "white" if share[i, j] > 50 else "black"
            text = f"{share[i, j]:.0f}" if share[i, j] >= 0.5 else "<1"
            axis.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
        axis.set_xticks(range(len(share)))
        axis.set_yticks(range(len(share)))
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    accuracy = 100 * np.trace(confusion) / confusion.sum()
    axis.set_title(
        f"test split, % of each true class; {accuracy:.2f} % right", fontsize=9
    )
    _save(figure, folder / "confusion.png")


_DRAW = {
    "fit_image": _draw_fit_image,
    "meta_learn": _draw_meta_learn,
    "classify_functa": _draw_classify_functa,
    "train_lbi": lbi_figures.draw_train_lbi,
    "prune_lbi": lbi_figures.draw_prune_lbi,
    "probe_landscape": landscape_figures.draw_probe_landscape,
    "train_vit": vit_figures.draw_train_vit,
    "prune_vit": vit_figures.draw_prune_vit,
    "benchmark": benchmark_figures.draw_benchmark,
    "scaling": scaling_figures.draw_scaling,
}
