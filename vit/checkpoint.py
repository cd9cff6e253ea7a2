"""Checkpoints of Vision Transformers: reads and writes common formats.

`load_checkpoint` returns a `ViT` and its parameters. It reads
  .npz          google-research/vision_transformer and AugReg, with the names used
                before Flax Linen and with Linen's; big_vision with a CLS token or the
                mean of the patches, layers stacked or separate; files of
                `save_checkpoint`
  .safetensors  ViT, DeiT and DINOv2 of timm and Hugging Face transformers, alone, in
                several files, or in a folder with its config.json
Factors of LayerScale are multiplied into the projections before them, and a bias that
no layer has becomes zeros: the network computes the same, but a fine-tuning moves other
parameters. `save_checkpoint` writes for Google, timm or Hugging Face.

The names in the file determine the layout, the shapes determine the architecture.
Nothing in a file is executed: neither format needs pickle, and pickled content is
rejected.

Axes: p side of a patch, C channels, D width, H heads, d width of a head, M width of the
MLP.
"""

import dataclasses
import json
import math
import operator
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit.cascade import Cascade
from vit.exports import WRITERS, check_expressible
from vit.layouts import (
    ATTENTION,
    MLP,
    by_channel,
    check_settings,
    foreign_normalization,
    from_foreign,
)
from vit.model import ViT, one_or_each, pooled_size
from vit.positions import POSITIONS, grid_of, pair
from vit.positions import resize_positions as resize_positions
from vit.weight_files import (
    Arrays,
    json_object,
    read_arrays,
    shape_of,
    some_names,
    to_float32,
    to_safetensors,
)
from vit.weight_files import find_files as find_files


def load_checkpoint(
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    *,
    num_heads: int | None = None,
    gelu: str | None = None,
    ln_eps: float | None = None,
    pool: str | None = None,
    grid: tuple[int, int] | None = None,
    resize: str | None = None,
) -> tuple[ViT, dict]:
    """Reads a Vision Transformer for `model.apply({"params": params}, images)`.

    Shapes do not tell the heads of a PyTorch file, the GELU, the epsilon and the
    pooling. An argument decides first, then the config.json of timm or Hugging Face in
    the same folder, or what `save_checkpoint` stored. Without them, the GELU and the
    epsilon are the defaults of the library ("tanh" and 1e-6 for Google, "erf" and 1e-6
    for timm, "erf" and 1e-12 for Hugging Face), the pooling is "mean_before_norm" for a
    timm file with `fc_norm` and "cls" for others, and the heads are those of the
    published network of the same width, if it is the only one. The caller must
    normalize the images as in training; see `load_normalization`.

    Args:
      path: a file that ends in .npz or .safetensors, or see `find_files`.
      image_size: side of the images in pixels, or (height, width); `resize_positions`
        resizes the position embedding to their grid. None keeps that of the file.
      num_classes: None, or the number of the file, keeps its head and the `pre_logits`
        layer before it. Another number replaces them by a head of zeros, as Google does
        for fine-tuning; 0 removes them.
      num_heads: H, for PyTorch files, whose shapes do not determine it.
      gelu: "tanh" or "erf".
      ln_eps: epsilon of the layer normalizations.
      pool: a value of `ViT.pool`.
      grid: rows and columns of patches of the file's position embedding; None reads
        them from config.json, or else takes a square.
      resize: rule of `resize_positions`: "google", "timm" or "huggingface"; None takes
        that of the file's library, and "google" for .npz files of `save_checkpoint`.

    Returns:
      The model and its float32 parameters as nested dicts. `num_heads` or `mlp_dim` is
      a tuple if layers differ. A file without a head gives num_classes=0.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged, has another format, weights that are not
        finite, or an architecture that `ViT` does not support, if the arguments do not
        fit it, or if the heads or the grid are not known and must be given.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import vit
      >>> model = vit.make("cifar_128", num_classes=10, patch_size=4, num_layers=1)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     vit.save_checkpoint(f"{folder}/model.npz", model, params)
      ...     model, params = vit.load_checkpoint(
      ...         f"{folder}/model.npz", image_size=32, num_classes=5
      ...     )
      >>> model.num_classes, params["head"]["kernel"].shape
      (5, (128, 5))
      >>> params["Transformer"]["posembed_input"]["pos_embedding"].shape
      (1, 65, 128)
    """
    path = Path(path)
    arrays = read_arrays(path)
    try:
        image_size = _whole("image_size", image_size, 1, (1, 2))
        grid = _whole("grid", grid, 1, (2,))
        num_classes = _whole("num_classes", num_classes, 0)
        num_heads = _whole("num_heads", num_heads, 1)
        settings = _own_settings(arrays.pop(_SETTINGS, None))
        is_ours = settings is not None
        if not is_ours:
            arrays, settings = from_foreign(arrays, path, num_heads, grid, image_size)
        known_grid = settings.pop("grid", None)
        grid = grid or known_grid
        known_rule = settings.pop("resize", "google")
        told = {"gelu": gelu, "ln_eps": ln_eps, "pool": pool}
        told = {name: value for name, value in told.items() if value is not None}
        fields = _architecture(arrays) | settings | check_settings("argument", told)
        if num_heads not in (None, fields["num_heads"]):
            raise ValueError(
                f"num_heads must be {fields['num_heads']} for this file, got "
                f"{num_heads}."
            )
        if num_classes not in (None, fields["num_classes"]):
            _replace_head(arrays, fields, num_classes)
        elif not (fields["num_classes"] or is_ours):
            _replace_head(arrays, fields, 0)
        model = ViT(**fields)
        _check_fits(model, arrays)
        params = {name: to_float32(name, value) for name, value in arrays.items()}
        for name, value in params.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name} has values that are not finite.")
        if image_size is not None:
            sides = pair(image_size)
            if any(side % model.patch_size for side in sides):
                raise ValueError(
                    f"image_size must be a multiple of the patch size "
                    f"{model.patch_size}, got {image_size}."
                )
            new = tuple(side // model.patch_size for side in sides)
            num_patches = params[POSITIONS].shape[1] - model.num_prefix
            if model.cascade is not None and math.prod(new) != num_patches:
                raise ValueError(
                    f"the cascade in the file is for {num_patches} patches, images of "
                    f"{image_size} have {math.prod(new)}; load it without image_size, "
                    "save model.clone(cascade=None), load that for the new images and "
                    "make a new cascade, for example with vit.for_budget."
                )
            if not grid and new[0] != new[1] and math.prod(new) == num_patches:
                raise ValueError(
                    f"{num_patches} positions may form a square or a grid of {new}; "
                    "set grid."
                )
            params[POSITIONS] = resize_positions(
                params[POSITIONS],
                new,
                grid=grid,
                num_prefix=model.num_prefix,
                rule=known_rule if resize is None else resize,
            )
            model = model.clone(grid=new)
        elif grid or not is_ours:
            known_grid = grid_of(params[POSITIONS], grid, model.num_prefix)
            model = model.clone(grid=known_grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = {name: jnp.asarray(value) for name, value in params.items()}
    return model, traverse_util.unflatten_dict(params, sep="/")


def load_normalization(path: str | Path) -> tuple[np.ndarray, np.ndarray] | None:
    """How the images of a checkpoint are normalized.

    The inputs of the network are (images - mean) / std for images in [0, 1]. Files of
    `save_checkpoint` may store both; Google's networks expect [-1, 1]; for timm they
    are in config.json, for Hugging Face in preprocessor_config.json.

    Args:
      path: see `load_checkpoint`.

    Returns:
      Mean and standard deviation of each channel, float32 (C,), or None if they are not
      stated.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged or has another format, or what it states is not
        valid.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import vit
      >>> model = vit.make("cifar_128", num_classes=10, patch_size=4, num_layers=1)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/model.npz"
      ...     vit.save_checkpoint(path, model, params, mean=0.5, std=[0.25, 0.25, 0.5])
      ...     mean, std = vit.load_normalization(path)
      >>> mean.tolist(), std.tolist()
      ([0.5, 0.5, 0.5], [0.25, 0.25, 0.5])
    """
    path = Path(path)
    arrays = read_arrays(path)
    try:
        entry = arrays.pop(_SETTINGS, None)
        if entry is None:
            return foreign_normalization(arrays, path)
        stored = json_object(_SETTINGS, str(entry))
        if stored.keys().isdisjoint(("mean", "std")):
            return None
        return by_channel(stored.get("mean"), stored.get("std"), _num_channels(arrays))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_checkpoint(
    path: str | Path,
    model: ViT,
    params: Any,
    dtype: str = "float32",
    *,
    names: str = "google",
    grid: tuple[int, int] | None = None,
    mean: Any = None,
    std: Any = None,
) -> None:
    """Writes a checkpoint with the names of Google, timm or Hugging Face.

    "google" writes a .npz with the names and shapes of
    google-research/vision_transformer. An additional entry, `meta`, stores the fields
    that shapes do not determine as JSON. "timm" and "huggingface" write a folder with
    model.safetensors and config.json, which `timm.create_model("local-dir:PATH")` and
    `from_pretrained(PATH)` read: ViT, DeiT with distillation or DINOv2, whichever
    computes the same. Mean and deviation are stored in `meta`, in config.json, or for
    Hugging Face in preprocessor_config.json.

    Fields of a run are not stored: after loading, the dropout rates and the compute
    dtype have their defaults. Only "google" stores the cascade. Every file is written
    under a temporary name and moved into place, so that an interruption leaves an
    existing file intact.

    Args:
      path: a name that ends in .npz, or a folder.
      model: the model of these parameters.
      params: nested dicts; `vit.slicing` may have removed heads and neurons.
      dtype: "float32" or "float16". NumPy's format has no bfloat16.
      names: "google", "timm" or "huggingface".
      grid: rows and columns of patches; None takes `model.grid`. Without it, "timm" and
        "huggingface" take a square, and "google" stores none.
      mean: mean of each channel by which the images, in [0, 1], were normalized in
        training, a number or (C,); None stores none. See `load_normalization`.
      std: their standard deviation; given if and only if `mean` is.

    Raises:
      ValueError: if the name, the dtype or the parameters do not fit, or the library
        has no network that computes the same.

    Example:
      >>> import pathlib, tempfile
      >>> import jax, jax.numpy as jnp
      >>> import vit
      >>> model = vit.make("cifar_128", num_classes=10, patch_size=4, num_layers=1)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.npz")
      ...     vit.save_checkpoint(path, model, params, dtype="float16")
      ...     vit.load_checkpoint(path)[0] == model
      True
    """
    path = Path(path)
    grid = _whole("grid", grid, 1, (2,)) or model.grid
    if names not in ("google", *WRITERS):
        raise ValueError(
            f"names must be one of google, {', '.join(WRITERS)}; got {names!r}."
        )
    if (path.suffix.lower() == ".npz") != (names == "google"):
        kind = "end in .npz" if names == "google" else "be a folder"
        raise ValueError(f"path must {kind}, got {path}.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be one of float32, float16; got {dtype!r}.")
    arrays = {
        name: np.asarray(value)
        for name, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    _check_fits(model, arrays)
    if model.segment is not None:
        raise ValueError("a file cannot leave out a segment; save segment=None.")
    for name, value in arrays.items():
        value = to_float32(name, value)
        largest = np.max(np.abs(value), initial=0)
        if not largest <= np.finfo(dtype).max:
            raise ValueError(f"{name} contains {largest}, too large for {dtype}.")
        arrays[name] = value
    stated = {}
    if not (mean is None and std is None):
        found = by_channel(mean, std, _num_channels(arrays))
        stated = {"mean": found[0].tolist(), "std": found[1].tolist()}
    if grid or names != "google":
        grid = grid_of(arrays[POSITIONS], grid, model.num_prefix)
    if names != "google":
        check_expressible(model, names)
        arrays, configs = WRITERS[names](model, arrays, grid, stated)
        path.mkdir(parents=True, exist_ok=True)
        data = to_safetensors(
            {name: value.astype(dtype) for name, value in arrays.items()}
        )
        _write(path / "model.safetensors", lambda file: file.write(data))
        for name, config in configs.items():
            text = json.dumps(config, indent=2).encode()
            _write(path / name, lambda file, text=text: file.write(text))
        return
    arrays = {name: value.astype(dtype) for name, value in arrays.items()}
    settings = {"gelu": model.gelu, "ln_eps": float(model.ln_eps)}
    settings |= {"pool": model.pool, "distilled": model.distilled} | stated
    if grid:
        settings["grid"] = grid
    if model.cascade is not None:
        settings["cascade"] = dataclasses.asdict(model.cascade)
    arrays[_SETTINGS] = json.dumps(settings)
    _write(path, lambda file: np.savez(file, **arrays))


def _whole(argument, value, least, lengths=(1,)):
    """An argument as a Python int, or as a tuple of them; None is kept.

    `lengths` are the possible numbers of entries.
    """
    if value is None:
        return None
    entries = value if isinstance(value, list | tuple | np.ndarray) else (value,)
    try:
        if any(isinstance(entry, bool | np.bool_) for entry in entries):
            raise TypeError
        numbers = tuple(operator.index(entry) for entry in entries)
    except TypeError:
        numbers = ()
    if len(numbers) not in lengths:
        wanted = "a whole number" if 1 in lengths else "two whole numbers"
        wanted += " or two" if lengths == (1, 2) else ""
        raise ValueError(f"{argument} must be {wanted}, got {value!r}.")
    if min(numbers) < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}.")
    return numbers[0] if len(numbers) == 1 else numbers


def _write(path, write):
    """Calls write(file) on a temporary file and moves it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


_SETTINGS = "meta"


def _own_settings(entry):
    """The fields stored by `save_checkpoint`; None for other files."""
    if entry is None:
        return None
    settings = json_object(_SETTINGS, str(entry))
    cascade = settings.pop("cascade", None)
    settings = {name: settings.get(name) for name in ("gelu", "ln_eps")} | {
        name: settings[name]
        for name in ("pool", "distilled", "grid")
        if name in settings
    }
    settings = check_settings(_SETTINGS, settings)
    return settings if cascade is None else settings | {"cascade": _cascade(cascade)}


def _cascade(fields):
    """The cascade from its fields; raises ValueError if they are not valid."""
    if not isinstance(fields, dict):
        raise ValueError(f"{_SETTINGS} has an invalid cascade: {fields!r}.")
    try:
        return Cascade(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_SETTINGS} has an invalid cascade: {error}") from None


def _architecture(arrays: Arrays) -> dict[str, Any]:
    """The fields of `ViT` that the shapes of our parameters determine."""
    side, _, _, hidden_size = shape_of(arrays, "embedding/kernel", "(p, p, C, D)")
    stem = []
    while (name := f"stem_{len(stem)}/kernel") in arrays:
        stem.append(shape_of(arrays, name, "(3, 3, C, F)")[-1])
    blocks = [re.match(r"Transformer/encoderblock_(\d+)/", name) for name in arrays]
    num_layers = len({block[1] for block in blocks if block})
    queries = _shapes(arrays, f"{ATTENTION}/query/kernel", "(D, H, d)", num_layers)
    first = _shapes(arrays, f"{MLP}/Dense_0/kernel", "(D, M)", num_layers)
    mlp_dim = [shape[1] for shape in first]
    num_heads = one_or_each([shape[1] for shape in queries])
    head_dim = queries[0][2]
    if isinstance(num_heads, int) and num_heads * head_dim == hidden_size:
        head_dim = None
    num_registers = 0
    if "registers" in arrays:
        num_registers = shape_of(arrays, "registers", "(1, R, D)")[1]
    return {
        "num_classes": _width(arrays, "head") or 0,
        "patch_size": side * 2 ** len(stem),
        "stem": tuple(stem),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_dim": one_or_each(mlp_dim),
        "head_dim": head_dim,
        "representation_size": _width(arrays, "pre_logits"),
        "class_token": "cls" in arrays,
        "num_registers": num_registers,
        "distilled": "head_dist/kernel" in arrays,
    }


def _shapes(arrays, name, axes, num_layers):
    """The shape in each layer; a layer without one gets that of the first other."""
    names = [name.replace("#", str(layer)) for layer in range(num_layers)]
    shapes = [np.shape(arrays.get(name)) for name in names]
    known = [shape for shape in shapes if len(shape) == axes.count(",") + 1]
    if not known:
        known = [shape_of(arrays, name.replace("#", "0"), axes)]
    return [shape if shape in known else known[0] for shape in shapes]


def _width(arrays, module):
    """Number of outputs of a dense layer; None if the file lacks the layer."""
    if not any(name.startswith(f"{module}/") for name in arrays):
        return None
    return shape_of(arrays, f"{module}/kernel", "(D, out)")[1]


def _num_channels(arrays):
    first = "stem_0/kernel" if "stem_0/kernel" in arrays else "embedding/kernel"
    return shape_of(arrays, first, "(side, side, C, features)")[2]


def _replace_head(arrays, fields, num_classes):
    """Replaces the head by zeros, or removes it if num_classes is 0; in place."""
    for name in list(arrays):
        if name.startswith(("head/", "head_dist/", "pre_logits/")):
            del arrays[name]
    fields |= {"num_classes": num_classes, "representation_size": None}
    if num_classes:
        shape = pooled_size(ViT(**fields)), num_classes
        for head in ("head", "head_dist")[: 1 + fields["distilled"]]:
            arrays[f"{head}/kernel"] = np.zeros(shape, np.float32)
            arrays[f"{head}/bias"] = np.zeros(num_classes, np.float32)


def _check_fits(model, arrays):
    """Raises ValueError if names and shapes of the arrays are not the model's."""
    num_patches, channels, side = 1, 1, model.patch_size
    if POSITIONS in arrays:
        num_rows = shape_of(arrays, POSITIONS, "(1, 1 + P, D)")[1]
        num_patches = max(num_rows - model.num_prefix, 1)
    if ("stem_0/kernel" if model.stem else "embedding/kernel") in arrays:
        channels = _num_channels(arrays)
    images = jax.ShapeDtypeStruct((1, num_patches * side, side, channels), jnp.float32)
    init = model.clone(cascade=None, grid=None).init
    expected = jax.eval_shape(init, jax.random.key(0), images)["params"]
    expected = traverse_util.flatten_dict(expected, sep="/")
    problems = {
        "missing": [name for name in expected if name not in arrays],
        "unexpected": [name for name in arrays if name not in expected],
        "misshapen": [
            f"{name} {arrays[name].shape} instead of {leaf.shape}"
            for name, leaf in expected.items()
            if name in arrays and arrays[name].shape != leaf.shape
        ],
    }
    if any(problems.values()):
        counts = [
            f"{len(names)} {problem}: {some_names(names)}"
            for problem, names in problems.items()
            if names
        ]
        raise ValueError(f"the parameters do not fit a ViT: {'; '.join(counts)}.")
