"""The figures of codes at several sizes: latent_controls and compress_functa."""

import math
from pathlib import Path

import numpy as np

from experiments.common import files
from experiments.drawing.run import MissingError, bind
from functa import plots

_CODES = {
    "field": "latents of the field",
    "jpeg": "JPEG without headers",
    "webp": "WebP without headers",
    "jpeg2000": "JPEG 2000 without headers",
}
# An installed copy has no results.
_RESULTS = Path(__file__).parents[2] / "results"
_PUBLISHED = _RESULTS / "published" / "summary.json"


def _psnr_against_size(run):
    curves = {}
    grids = sorted(run.arrays.keys() - {"pca"}, key=_num_cells)
    for name in ("pca", *grids):
        psnr = run.need(name)[1:]
        label, num_cells = "PCA of whole images", 1
        if name != "pca":
            label, num_cells = _pca_of_cells(name), _num_cells(name)
        # With more components the image is exact once it is rounded to 8 bits.
        psnr = psnr[psnr <= plots.EXACT_TO_8_BITS]
        curves[label] = num_cells * np.arange(1, 1 + len(psnr)), psnr
    fields = _fields_in_results(run.config["dataset"]["name"], run.summary)
    return plots.against_num_values(curves, fields, y_label="test PSNR (dB)")


def _num_cells(grid):
    """Number of cells of a grid that is written RxC."""
    return math.prod(map(int, grid.split("x")))


def _pca_of_cells(grid):
    if _num_cells(grid) == 1:
        return "PCA of whole images"
    return f"PCA of the cells, grid of {grid}"


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
        kind, *rest = _code_of(_RESULTS / "_".join(Path(config["run"]).parts[1:]))
        num_steps = config.get("inner", {}).get("num_steps")
        steps = {None: "", 1: ", one step"}.get(num_steps, f", {num_steps} steps")
        return f"{kind}{steps}", *rest
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
        elif features == "patch_pca":
            kind = "principal components of the cells"
        head = config["model"].get("type", "mlp")
        deviation = summary.get("test_accuracy_std", np.nan)
        point = (size, 100 * summary["test_accuracy"], 100 * deviation)
        points.setdefault(f"{kind}: {head}", []).append(point)
    if not points:
        raise MissingError("accuracies in results/")
    codes = {}
    for label, rows in points.items():
        sizes, accuracies, deviations = np.transpose(rows)
        # Codes of the same size hide each other; seeds of one code are close.
        if np.ptp(accuracies) < 1:
            label = f"{label}, {accuracies.mean():.1f} %"
        else:
            label = f"{label}, {accuracies.min():.1f} to {accuracies.max():.1f} %"
        codes[label] = sizes, accuracies, deviations
    return plots.against_num_values({}, codes, y_label="test accuracy (%)")


def _compress_functa(run):
    makers = {"psnr_against_bits": _psnr_against_bits}
    if "accuracy" in run.summary["curves"]["field"]:
        makers["accuracy_against_bits"] = _accuracy_against_bits
    return bind(makers, run)


def _psnr_against_bits(run):
    curves = {}
    for name, curve in run.summary["curves"].items():
        label = _CODES.get(name) or _pca_of_cells(name.removeprefix("klt_"))
        curves[label] = curve["bpp"], curve["psnr"]
    if run.summary["dataset"] == "cifar10" and _PUBLISHED.exists():
        published = files.read_json(_PUBLISHED)["coin_pp"]
        curves["COIN++, as published"] = published["bpp"], published["psnr"]
    level = run.summary["target_psnr"]
    return plots.rate_curves(
        curves,
        y_label="test PSNR (dB)",
        level=level,
        level_label=f"{level:g} dB, where bits are compared",
    )


def _accuracy_against_bits(run):
    curve = run.summary["curves"]["field"]
    return plots.rate_curves(
        {"decoded latents": (curve["bpp"], 100 * np.array(curve["accuracy"]))},
        y_label="test accuracy (%)",
        level=100 * run.summary["accuracy_not_quantized"],
        level_label="latents before quantization",
    )


FIGURES = {
    "latent_controls": {
        "psnr_against_size": _psnr_against_size,
        "accuracy_against_size": _accuracy_against_size,
    },
    "compress_functa": _compress_functa,
}
