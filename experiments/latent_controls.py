"""Measures the PSNR of principal components, the linear controls of latents.

    python -m experiments.latent_controls \\
        --config=experiments/configs/latent_controls.py:cifar10

The components of whole images are the control of a latent vector. Those of equal cells
are the control of a latent grid. The basis is fitted to the training split, and the
PSNR is the mean over the test images.
"""

import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.common import data, devices, files, launch, runs, settings
from experiments.configs import latent_controls as configs
from experiments.drawing import figures
from experiments.training import controls


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Measures the controls of all sizes; returns the summary."""
    settings.check(config, configs.RULES)
    loaded = data.load_dataset(**config.dataset)
    devices.say(loaded.found)
    images = {split: arrays["image"] for split, arrays in loaded.splits.items()}
    if config.num_images:
        images = {split: array[: config.num_images] for split, array in images.items()}
    _check_sizes(config, images["train"].shape[1:])

    def measure(run):
        curves, summary = {}, {f"num_{k}_images": len(v) for k, v in images.items()}
        run.say("components of whole images ...")
        curves["pca"] = controls.psnr_per_size(*images.values())
        for size in config.sizes:
            summary[f"pca_psnr_{size}"] = curves["pca"][size]
        for *grid, channels in config.grids:
            name = "x".join(map(str, grid))
            if name not in curves:
                run.say(f"components of {name} cells ...")
                curves[name] = controls.psnr_per_size(*images.values(), grid=grid)
            summary[f"patch_pca_psnr_{name}x{channels}"] = curves[name][channels]
        files.write_npz(run.workdir / "arrays.npz", curves)
        figures.draw(run.workdir, summary)
        return summary

    return runs.run_once(workdir, config, measure, inputs=data.digests(loaded.splits))


def _check_sizes(config, shape):
    """Compares the sizes of the config with the shape (H, W, C) of the images."""
    num_values = math.prod(shape)
    if num_values > controls.MAX_VALUES:
        raise ValueError(
            f"the images of {config.dataset.name} have {num_values:,} values; at most "
            f"{controls.MAX_VALUES:,} are possible."
        )
    if max(config.sizes) > num_values:
        raise ValueError(
            f"sizes must be at most {num_values}, the values of an image, got "
            f"{max(config.sizes)}."
        )
    height, width, _ = shape
    for h, w, channels in config.grids:
        if height % h or width % w or channels * h * w > num_values:
            raise ValueError(
                f"grids: {h}x{w} cells must divide images of {height}x{width}, with at "
                f"most as many channels as a cell has values; got ({h}, {w}, "
                f"{channels})."
            )


if __name__ == "__main__":
    launch.launch("latent_controls", train_and_evaluate)
