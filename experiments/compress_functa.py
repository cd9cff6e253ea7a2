"""Compresses the latents of a functaset and compares the result with image codecs.

    python -m experiments.compress_functa \\
        --config=experiments/configs/compress_functa.py:digits

For each step of the quantizer the test latents are written to a file, read again and
rendered. This gives a curve of PSNR against bits per pixel. The probabilities of the
symbols are those of training latents. The controls are the codecs of Pillow without the
headers of their files, and principal components of patches (KLT) with the same coder.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

import functa
from experiments.common import (
    codecs,
    data,
    devices,
    files,
    launch,
    runs,
    settings,
    streams,
)
from experiments.configs import compress_functa as configs
from experiments.drawing import figures
from experiments.training import controls, encoding, features, latent_classifier
from experiments.training.encoding import Function
from functa import compression, functaset, linear

# An image that is exact after rounding to 8 bits gets a PSNR of 100 dB.
_SMALLEST_MSE = 1e-10
# Training latents at which the slopes are measured, and random signs for each.
_NUM_SLOPES, _NUM_PROBES = 256, 4


class Signals(NamedTuple):
    """The latents and images of both splits.

    Attributes:
      latents: {split: (N, *grid, C)}.
      images: {split: uint8 (N, H, W, C)}.
      labels: classes of the test images, (N,); -1 without classes.
      num_classes: of the functaset.
      dataset: name of the data set.
      params_sha256: hash of the weights that made the latents.
    """

    latents: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    labels: np.ndarray
    num_classes: int
    dataset: str
    params_sha256: str


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Measures all curves; returns the summary."""
    settings.check(config, configs.RULES)
    streams.load_coder()
    learner = encoding.load_learner(config.run)
    signals = load_signals(config, learner)
    for grid in config.klt_grids:
        with settings.blamed_on("klt_grids"):
            cells = functa.spatial.split_cells(signals.images["test"][:1], grid)
        if (values := math.prod(cells.shape[3:])) > controls.MAX_VALUES:
            raise ValueError(
                f"klt_grids: a cell of the grid {grid} has {values:,} values; at most "
                f"{controls.MAX_VALUES:,} are possible. Choose finer grids, or () for "
                "no such control."
            )
    inputs = {
        "functaset": functaset.hash_params(signals.latents),
        "labels of the functaset": functaset.hash_params(signals.labels),
    }
    classify = None
    if config.classifier is not None:
        classifier = latent_classifier.load(
            config.classifier,
            num_classes=signals.num_classes,
            latent_shape=signals.latents["test"].shape[1:],
            dataset=signals.dataset,
            params_sha256=signals.params_sha256,
        )
        inputs["classifier"] = classifier.sha256
        classify = classifier.predict

    def experiment(run):
        field, split = encoding.make_field(learner, signals.images["test"].shape[1:3])
        render = encoding.make_render(field, config.batch_size)
        latents = signals.latents
        if config.further_steps:
            run.say(f"fitting for {config.further_steps} further steps ...")
            latents = {
                name: fit_further(
                    field, values, split(data.to_float(signals.images[name])), config
                )
                for name, values in latents.items()
            }
        run.say("measuring the slopes of the field ...")
        scales = find_scales(field, latents["train"], config.scales)
        curves = {}
        curves["field"] = measure_codes(
            run,
            "field",
            latents,
            scales,
            render,
            signals,
            params_sha256=signals.params_sha256,
            classify=classify,
        )
        for grid in config.klt_grids:
            name = f"klt_{grid[0]}x{grid[1]}"
            pca = linear.fit_pca(signals.images["train"], grid=grid)
            codes = {
                split: linear.encode(pca, images)
                for split, images in signals.images.items()
            }
            curves[name] = measure_codes(
                run,
                name,
                codes,
                np.ones(codes["test"].shape[-1]),
                lambda codes, pca=pca: linear.decode(pca, codes),
                signals,
            )
        for name, qualities in config.codecs.items():
            if qualities:
                run.say(f"{name} ...")
                curves[name] = measure_files(name, qualities, signals.images["test"])
        summary = _summarize(config, curves, signals)
        exact = render(latents["test"])
        summary["psnr_not_quantized"] = _psnr(exact, signals.images["test"])
        if classify is not None:
            not_quantized = np.mean(classify(latents["test"]) == signals.labels)
            summary |= _accuracy(config, curves["field"], signals, not_quantized)
        files.write_npz(
            run.workdir / "arrays.npz",
            {
                f"{key}_{name}": np.array(values)
                for name, curve in curves.items()
                for key, values in curve.items()
            },
        )
        figures.draw(run.workdir, summary)
        return summary

    return runs.run_once(workdir, config, experiment, inputs=inputs)


def load_signals(config: ConfigDict, learner: encoding.Learner) -> Signals:
    """Reads the functaset and its images.

    Raises:
      FileNotFoundError: if the functaset or its data set does not exist.
      ValueError: if the functaset is damaged, has the latents of other weights or of
        padded images, or lacks a split.
    """
    path = config.functaset
    whole = features.load_renderable(path, config.run, learner)
    latents, images, labels = {}, {}, {}
    for split, limit in ("train", config.num_train_images), ("test", config.num_images):
        pixels, rows = features.load_images(whole, split, config.data_dir)
        features.check_grid(path, whole, learner, pixels)
        images[split] = pixels[: limit or len(pixels)]
        rows = rows[: len(images[split])]
        latents[split], labels[split] = whole.latent[rows], whole.label[rows]
    devices.say(
        f"{path}: {len(images['train'])} training and {len(images['test'])} test "
        f"images of {whole.config['dataset']}"
    )
    return Signals(
        latents,
        images,
        labels["test"],
        1 + int(whole.label.max()),
        whole.config["dataset"],
        whole.params_sha256,
    )


def fit_further(
    field: Callable[[jax.Array], jax.Array],
    latents: np.ndarray,
    targets: np.ndarray,
    config: ConfigDict,
) -> np.ndarray:
    """Fits latents (N, *grid, C) by config.further_steps iterations of L-BFGS."""

    @jax.jit
    @jax.vmap
    def fit(latent, target):
        fitted, _ = functa.optimize_latent(
            field,
            latent,
            target,
            optimizer=optax.lbfgs(),
            num_steps=config.further_steps,
        )
        return fitted

    return devices.in_batches(fit, latents, targets, batch_size=config.batch_size)


def find_scales(
    field: Callable[[jax.Array], jax.Array], latents: np.ndarray, kind: str
) -> np.ndarray:
    """The step of each channel (C,) for a step of 1.

    With errors of variance v in units of these steps, the sum of the squared errors of
    an image is v times the number of values of its latent. This is also true of an
    orthonormal transform with equal steps.

    Args:
      field: see `encoding.make_field`.
      latents: training latents, (N, *grid, C).
      kind: "slopes": all channels have the same share of the error. "deviation": the
        steps are proportional to the deviations of the channels.
    """
    slopes = np.asarray(
        jax.jit(
            lambda key, latents: compression.slopes(
                key, field, latents, num_probes=_NUM_PROBES
            )
        )(jax.random.key(0), latents[:_NUM_SLOPES])
    )
    # A channel that changes nothing gets a large step.
    slopes = np.maximum(slopes, 1e-9 * slopes.max())
    if not 0 < slopes.max() < np.inf:
        raise ValueError(
            "the field does not depend on the training latents, or not finitely: its "
            f"largest slope is {slopes.max():g}."
        )
    if kind == "slopes":
        return 1 / np.sqrt(slopes)
    deviation = latents.reshape(-1, latents.shape[-1]).std(0)
    if not deviation.max() > 0:
        raise ValueError(
            "scales=deviation needs training latents that differ; use scales=slopes."
        )
    deviation = np.maximum(deviation, 1e-6 * deviation.max())
    return deviation / np.sqrt(np.mean(slopes * np.square(deviation)))


def measure_codes(
    run: runs.Run,
    name: str,
    codes: Mapping[str, np.ndarray],
    scales: np.ndarray,
    decode: Function,
    signals: Signals,
    *,
    params_sha256: str = "",
    classify: Function | None = None,
) -> dict[str, list[float]]:
    """Compresses the test codes with each step of the config.

    Args:
      run: the open run, whose folder gets the files.
      name: prefix of the files.
      codes: {split: (N, *grid, C)}.
      scales: step of each channel for a step of 1, (C,).
      decode: computes the images of codes.
      signals: the images and labels.
      params_sha256: hash of the weights of the field.
      classify: computes the classes of codes, or None.

    Returns:
      One value per step, from the smallest on: bits per pixel `bpp`, those of the ideal
      code `ideal_bpp`, `psnr`, `bytes` of the codec, `encode_seconds` for the latents,
      `decode_seconds` from bytes to images, and `accuracy` with `classify`.
    """
    test, images = codes["test"], signals.images["test"]
    pixels = len(images) * np.prod(images.shape[1:3])
    decode(test[: run.config.batch_size])  # Compiles it.
    points = []
    # The smallest step needs the largest tables; too small ones are refused at once.
    for number, step in enumerate(sorted(run.config.steps)):
        codec = streams.fit_codec(
            codes["train"],
            step * scales,
            params_sha256=params_sha256,
            **run.config.model,
        )
        paths = [
            run.workdir / "compressed" / f"{name}_{number}_{part}"
            for part in ("codec.npz", "test.functaz")
        ]
        streams.save_codec(paths[0], codec)
        started = time.perf_counter()
        encoded = streams.encode(codec, test)
        encode_seconds = time.perf_counter() - started
        streams.write_streams(paths[1], codec, encoded)
        # From here on nothing is known but the files.
        codec = streams.load_codec(paths[0])
        encoded = streams.read_streams(paths[1], codec)
        started = time.perf_counter()
        decoded = streams.decode(codec, encoded)
        rendered = decode(decoded)
        decode_seconds = time.perf_counter() - started
        symbols = compression.quantize(test, codec.mean, codec.steps)
        point = {
            "bpp": 8 * sum(map(len, encoded)) / pixels,
            "ideal_bpp": compression.ideal_bits(codec.model, symbols).sum() / pixels,
            "psnr": _psnr(rendered, images),
            "bytes": paths[0].stat().st_size,
            "encode_seconds": encode_seconds,
            "decode_seconds": decode_seconds,
        }
        if classify is not None:
            point["accuracy"] = np.mean(classify(decoded) == signals.labels)
        points.append(point)
        run.say(
            f"{name}: step {step:g}  {point['bpp']:.3f} bits per pixel  "
            f"{point['psnr']:.2f} dB"
        )
    return {key: [float(point[key]) for point in points] for key in points[0]}


def measure_files(
    name: str, qualities: tuple[float, ...], images: np.ndarray
) -> dict[str, list[float]]:
    """The curve of a file codec: `bpp` without headers, and `psnr`, per quality."""
    pixels = len(images) * np.prod(images.shape[1:3])
    curve = {"bpp": [], "psnr": []}
    for quality in qualities:
        sizes, decoded = zip(
            *(codecs.code(name, image, quality) for image in images), strict=True
        )
        curve["bpp"].append(float(8 * sum(sizes) / pixels))
        curve["psnr"].append(_psnr(np.stack(decoded) / 255, images))
    return curve


def _psnr(values, images):
    """Mean PSNR of float images (N, H, W, C), rounded to 8 bits, in dB."""
    psnr = []
    for value, image in zip(values, images, strict=True):
        error = np.clip(np.round(255 * np.float64(value)), 0, 255) - image
        mse = max(np.square(error / 255).mean(), _SMALLEST_MSE)
        psnr.append(-10 * np.log10(mse))
    return float(np.mean(psnr))


def _summarize(config, curves, signals):
    field = curves["field"]
    num_coded = len(signals.images["test"]) * len(config.steps)
    at_target = {
        name: compression.bits_at_psnr(curve["bpp"], curve["psnr"], config.target_psnr)
        for name, curve in curves.items()
    }
    nearest = np.argmin(np.abs(np.array(field["psnr"]) - config.target_psnr))
    return {
        "dataset": signals.dataset,
        **{f"num_{k}_images": len(v) for k, v in signals.images.items()},
        "target_psnr": config.target_psnr,
        # A curve that does not reach the target has no number.
        **{f"bpp_at_target_{k}": v for k, v in at_target.items() if np.isfinite(v)},
        "excess_over_ideal": sum(field["bpp"]) / sum(field["ideal_bpp"]) - 1,
        "codec_bytes": field["bytes"][nearest],
        "encode_images_per_second": num_coded / sum(field["encode_seconds"]),
        "decode_images_per_second": num_coded / sum(field["decode_seconds"]),
        "curves": {
            name: {k: v for k, v in curve.items() if k in ("bpp", "psnr", "accuracy")}
            for name, curve in curves.items()
        },
    }


def _accuracy(config, curve, signals, not_quantized):
    """Accuracy of the latents, and what is lost at config.accuracy_bits."""
    pixels = np.prod(signals.images["test"].shape[1:3])
    numbers = np.prod(signals.latents["test"].shape[1:])
    summary = {"accuracy_not_quantized": not_quantized}
    bits = np.array(curve["bpp"]) * pixels / numbers  # per number
    order = np.argsort(bits)
    accuracy = np.interp(
        config.accuracy_bits,
        bits[order],
        np.array(curve["accuracy"])[order],
        left=np.nan,
        right=np.nan,
    )
    if np.isfinite(accuracy):
        summary["accuracy_at_bits"] = accuracy
        summary["accuracy_lost_at_bits"] = not_quantized - accuracy
    return summary


if __name__ == "__main__":
    launch.launch("compress_functa", train_and_evaluate)
