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

We use Linen's names, so one table per foreign layout suffices: from its names to
Linen's, with # for the index of a block. PyTorch stores linear maps as output by input
and the heads of an attention as one axis; `_from_torch` converts both by our name.

Axes: p side of a patch, C channels, D width, H heads, d width of a head, P patches,
g rows of the grid of patches.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit.cascade import Cascade
from vit.model import POOLS, ViT, pooled_size
from vit.weight_files import Arrays, json_object, read_arrays, some_names
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
    resize: str = "google",
) -> tuple[ViT, dict]:
    """Reads a Vision Transformer for `model.apply({"params": params}, images)`.

    Shapes do not tell the heads of a PyTorch file, the GELU, the epsilon and the
    pooling. An argument decides first, then the config.json of timm or Hugging Face in
    the same folder, or what `save_checkpoint` stored. Without them, the GELU and the
    epsilon are the defaults of the library ("tanh" and 1e-6 for Google, "erf" and 1e-6
    for timm, "erf" and 1e-12 for Hugging Face), the pooling is "mean_before_norm" for a
    timm file with `fc_norm` and "cls" for others, and the heads are those of the
    published network of the same width. The caller must scale the images as in
    training; Google's weights expect [-1, 1].

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
      resize: rule of `resize_positions`: "google", "timm" or "huggingface".

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
        for argument, value, least in (
            ("image_size", image_size, 1),
            ("grid", grid, 1),
            ("num_classes", num_classes, 0),
            ("num_heads", num_heads, 1),
        ):
            if value is not None and min(_pair(value)) < least:
                raise ValueError(f"{argument} must be at least {least}, got {value}.")
        settings = _own_settings(arrays.pop(_SETTINGS, None))
        is_ours = settings is not None
        if not is_ours:
            arrays, settings = _from_foreign(arrays, path, num_heads, grid)
        known_grid = settings.pop("grid", None)
        grid = grid or known_grid
        told = {"gelu": gelu, "ln_eps": ln_eps, "pool": pool}
        told = {name: value for name, value in told.items() if value is not None}
        fields = _architecture(arrays) | settings | _check_settings("argument", told)
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
        params = {name: _float32(name, value) for name, value in arrays.items()}
        for name, value in params.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name} has values that are not finite.")
        if image_size is not None:
            sides = _pair(image_size)
            if any(side % model.patch_size for side in sides):
                raise ValueError(
                    f"image_size must be a multiple of the patch size "
                    f"{model.patch_size}, got {image_size}."
                )
            new = tuple(side // model.patch_size for side in sides)
            num_patches = params[_POSITIONS].shape[1] - model.num_prefix
            if not grid and new[0] != new[1] and math.prod(new) == num_patches:
                raise ValueError(
                    f"{num_patches} positions may form a square or a grid of {new}; "
                    "set grid."
                )
            params[_POSITIONS] = resize_positions(
                params[_POSITIONS],
                new,
                grid=grid,
                num_prefix=model.num_prefix,
                rule=resize,
            )
        elif grid or not is_ours:
            _grid_of(params[_POSITIONS], grid, model.num_prefix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = {name: jnp.asarray(value) for name, value in params.items()}
    return model, traverse_util.unflatten_dict(params, sep="/")


def save_checkpoint(
    path: str | Path,
    model: ViT,
    params: Any,
    dtype: str = "float32",
    *,
    names: str = "google",
    grid: tuple[int, int] | None = None,
) -> None:
    """Writes a checkpoint with the names of Google, timm or Hugging Face.

    "google" writes a .npz with the names and shapes of
    google-research/vision_transformer. An additional entry, `meta`, stores the fields
    that shapes do not determine as JSON. "timm" and "huggingface" write a folder with
    model.safetensors and config.json, which `timm.create_model("local-dir:PATH")` and
    `from_pretrained(PATH)` read: ViT, DeiT with distillation or DINOv2, whichever
    computes the same.

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
      grid: rows and columns of patches; None takes a square for "timm" and
        "huggingface", and stores none for "google".

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
    if names not in ("google", *_WRITERS):
        raise ValueError(
            f"names must be one of google, {', '.join(_WRITERS)}; got {names!r}."
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
    for name, value in arrays.items():
        value = _float32(name, value)
        largest = np.max(np.abs(value), initial=0)
        if not largest <= np.finfo(dtype).max:
            raise ValueError(f"{name} contains {largest}, too large for {dtype}.")
        arrays[name] = value
    if grid or names != "google":
        grid = _grid_of(arrays[_POSITIONS], grid, model.num_prefix)
    if names != "google":
        _check_common(model, names)
        arrays, config = _WRITERS[names](model, arrays, grid)
        path.mkdir(parents=True, exist_ok=True)
        data = _to_safetensors(
            {name: value.astype(dtype) for name, value in arrays.items()}
        )
        _write(path / "model.safetensors", lambda file: file.write(data))
        text = json.dumps(config, indent=2).encode()
        _write(path / "config.json", lambda file: file.write(text))
        return
    arrays = {name: value.astype(dtype) for name, value in arrays.items()}
    settings = {"gelu": model.gelu, "ln_eps": float(model.ln_eps)}
    settings |= {"pool": model.pool, "distilled": model.distilled}
    if grid:
        settings["grid"] = grid
    if model.cascade is not None:
        settings["cascade"] = dataclasses.asdict(model.cascade)
    arrays[_SETTINGS] = json.dumps(settings)
    _write(path, lambda file: np.savez(file, **arrays))


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


def resize_positions(
    positions: np.ndarray,
    grid_size: int | tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    num_prefix: int = 1,
    rule: str = "google",
) -> np.ndarray:
    """Resizes position embeddings to another grid of patches.

    Each axis is interpolated alone, by one of three rules:

    * "google": linear between aligned corners; new row i is old row
      i (g_old - 1) / (g_new - 1), as in `scipy.ndimage.zoom(order=1)`;
    * "timm": cubic (a = -1/2) between aligned borders, widened where the grid shrinks,
      as `torch.nn.functional.interpolate` with antialias;
    * "huggingface": cubic (a = -3/4) between aligned borders, not widened; places
      outside the grid take the value at its border.

    Args:
      positions: (1, num_prefix + P_old, D); the first ones do not change.
      grid_size: rows and columns of the new grid, or one number for both.
      grid: rows and columns of the old grid; None takes a square.
      num_prefix: number of tokens before the patches.
      rule: "google", "timm" or "huggingface".

    Returns:
      (1, num_prefix + P_new, D).

    Raises:
      ValueError: if the rule is unknown, or the patches do not form the grid.
    """
    if rule not in _RESIZING:
        raise ValueError(f"resize must be one of {', '.join(_RESIZING)}; got {rule!r}.")
    old, new = _grid_of(positions, grid, num_prefix), _pair(grid_size)
    if new == old:
        return positions
    interpolation = _RESIZING[rule]
    prefix, rows = np.split(np.asarray(positions), [num_prefix], axis=1)
    rows = rows.reshape(*old, -1)
    rows = np.einsum("ai,ijd->ajd", interpolation(old[0], new[0]), rows)
    rows = np.einsum("bj,ajd->abd", interpolation(old[1], new[1]), rows)
    rows = rows.reshape(1, new[0] * new[1], -1).astype(prefix.dtype)
    return np.concatenate([prefix, rows], axis=1)


def _linear(old, new):
    """Matrix (new, old) that interpolates linearly between aligned corners."""
    places = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


def _cubic_widened(old, new):
    places = (np.arange(new) + 0.5) * old / new - 0.5
    distances = np.abs(places[:, None] - np.arange(old)) / max(old / new, 1)
    weights = _cubic(distances, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic_replicated(old, new):
    places = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        taps = np.floor(places) + offset
        columns = np.clip(taps, 0, old - 1).astype(int)
        np.add.at(
            matrix, (np.arange(new), columns), _cubic(np.abs(places - taps), -0.75)
        )
    return matrix


def _cubic(x, a):
    """Kernel of cubic convolution (Keys 1981) at distances x >= 0."""
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_RESIZING = {
    "google": _linear,
    "timm": _cubic_widened,
    "huggingface": _cubic_replicated,
}


# Names: from each layout to ours.

_SETTINGS = "meta"
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_BLOCK = "Transformer/encoderblock_#"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_MLP = f"{_BLOCK}/MlpBlock_0"

_TIMM = {
    "cls_token": "cls",
    "reg_token": "registers",
    "dist_token": "registers",
    "pos_embed": _POSITIONS,
    "patch_embed.proj": "embedding",
    "blocks.#.norm1": f"{_BLOCK}/LayerNorm_0",
    "blocks.#.attn.query": f"{_ATTENTION}/query",  # Thirds of qkv, see `_split`.
    "blocks.#.attn.key": f"{_ATTENTION}/key",
    "blocks.#.attn.value": f"{_ATTENTION}/value",
    "blocks.#.attn.proj": f"{_ATTENTION}/out",
    "blocks.#.ls1.gamma": f"{_BLOCK}/LayerScale_0",
    "blocks.#.norm2": f"{_BLOCK}/LayerNorm_1",
    "blocks.#.ls2.gamma": f"{_BLOCK}/LayerScale_1",
    "blocks.#.mlp.fc1": f"{_MLP}/Dense_0",
    "blocks.#.mlp.fc2": f"{_MLP}/Dense_1",
    "norm": "Transformer/encoder_norm",
    "fc_norm": "Transformer/encoder_norm",  # After the pooling.
    "pre_logits.fc": "pre_logits",
    "head": "head",
    "head_dist": "head_dist",
}
# Of Hugging Face: ViT, DeiT and both DINOv2 share these names.
_HUGGING_FACE = {
    "embeddings.cls_token": "cls",
    "embeddings.distillation_token": "registers",
    "embeddings.register_tokens": "registers",
    "embeddings.position_embeddings": _POSITIONS,
    "embeddings.patch_embeddings.projection": "embedding",
    "encoder.layer.#.attention.attention.query": f"{_ATTENTION}/query",
    "encoder.layer.#.attention.attention.key": f"{_ATTENTION}/key",
    "encoder.layer.#.attention.attention.value": f"{_ATTENTION}/value",
    "encoder.layer.#.attention.output.dense": f"{_ATTENTION}/out",
    "layernorm": "Transformer/encoder_norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
_HUGGING_FACE_VIT = _HUGGING_FACE | {
    "encoder.layer.#.layernorm_before": f"{_BLOCK}/LayerNorm_0",
    "encoder.layer.#.layernorm_after": f"{_BLOCK}/LayerNorm_1",
    "encoder.layer.#.intermediate.dense": f"{_MLP}/Dense_0",
    "encoder.layer.#.output.dense": f"{_MLP}/Dense_1",
}
_HUGGING_FACE_DINO = _HUGGING_FACE | {
    "encoder.layer.#.norm1": f"{_BLOCK}/LayerNorm_0",
    "encoder.layer.#.norm2": f"{_BLOCK}/LayerNorm_1",
    "encoder.layer.#.mlp.fc1": f"{_MLP}/Dense_0",
    "encoder.layer.#.mlp.fc2": f"{_MLP}/Dense_1",
    "encoder.layer.#.layer_scale1.lambda1": f"{_BLOCK}/LayerScale_0",
    "encoder.layer.#.layer_scale2.lambda1": f"{_BLOCK}/LayerScale_1",
}
# Before Linen, the modules of a block were numbered with one counter.
_PRE_LINEN = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}
_BIG_VISION = {"pos_embedding": _POSITIONS, "Transformer/pos_embedding": _POSITIONS}

# What a wrapper or a library puts before the names of the network.
_PREFIXES = (
    r"((_orig_mod|module|model|backbone|net|network|vit|deit|dinov2_with_registers"
    r"|dinov2)\.)+"
)
# Hugging Face's pooler, which classifiers do not use, and the token of hidden patches.
_UNUSED = r"pooler\.dense\.|(embeddings\.)?mask_token$"
# In names of parameters, and of timm's architectures.
_UNSUPPORTED = {
    r"rel_?pos|relative_position": "relative positions",
    r"(\b|_)rope|_dinov3": "rotary positions",
    r"attn\.[qv]_bias|\.gamma_[12]$": "the blocks of BEiT, EVA and CaiT",
    r"_rpn_": "normalizing the updates (res-post-norm)",
    r"\b(q|k|query|key)_(norm|ln)\b": "normalizing queries and keys (qk-norm)",
    r"mlp\.(fc1_[gx]|w\d+|weights_in)\b": "a gated MLP (SwiGLU)",
    r"MAPHead|^probe$|attn_pool": "pooling by attention (MAP)",
    r"\bnorm_pre\b": "a normalization before the blocks",
    r"conv_root|patch_embed\.backbone": "a convolutional stem (hybrid)",
}


class _Layout(NamedTuple):
    """How one library names its parameters and computes with them."""

    names: dict[str, str]
    gelu: str
    ln_eps: float


def _torch_names(modules):
    """{module: our module} -> {parameter: our parameter}."""
    names = {}
    for theirs, ours in modules.items():
        if ours in ("cls", "registers", _POSITIONS) or "LayerScale" in ours:
            names[theirs] = ours
        else:
            weight = "scale" if "norm" in ours.lower() else "kernel"
            names[f"{theirs}.weight"] = f"{ours}/{weight}"
            names[f"{theirs}.bias"] = f"{ours}/bias"
    return names


def _google_names():
    """Linen's names, which are ours, and those used before Linen."""
    ours = _torch_names(_TIMM).values()
    older = {
        name.replace(new, old): name
        for name in ours
        for old, new in _PRE_LINEN.items()
        if new in name
    }
    return dict(zip(ours, ours, strict=True)) | older | _BIG_VISION


_LAYOUTS = {
    "google": _Layout(_google_names(), "tanh", 1e-6),
    "timm": _Layout(_torch_names(_TIMM), "erf", 1e-6),
    "hugging_face": _Layout(_torch_names(_HUGGING_FACE_VIT), "erf", 1e-12),
    "dinov2": _Layout(_torch_names(_HUGGING_FACE_DINO), "erf", 1e-6),
}


def _our_name(name, layout):
    """Our name of a parameter; None if it has none."""
    block = re.search(r"(?<=[._])\d+(?=[./])", name)
    if block is None:
        return layout.names.get(name)
    ours = layout.names.get(f"{name[: block.start()]}#{name[block.end() :]}")
    return ours and ours.replace("#", block[0])


# Layouts.


def _from_foreign(arrays: Arrays, path: Path, num_heads: int | None, grid):
    """Converts the arrays of a foreign file to our layout; dtypes do not change.

    Returns:
      {our name: array}, where an unknown parameter keeps its name, and the fields of
      `ViT` that shapes do not determine.
    """
    for prefix in ("opt/target/", "params/"):
        inside = [name for name in arrays if name.startswith(prefix)]
        if inside:  # The other arrays belong to the optimizer.
            arrays = {name.removeprefix(prefix): arrays[name] for name in inside}
    bare = {name: re.sub(f"^{_PREFIXES}", "", name) for name in arrays}
    if len(set(bare.values())) < len(bare):
        raise ValueError(
            f"the file holds several networks, {some_names(arrays)}; leave one in it."
        )
    arrays = {bare[name]: value for name, value in arrays.items()}
    _check_supported(arrays)

    parts = [part for item in arrays.items() for part in _split(*item)]
    known = {
        home: sum(_our_name(name, layout) is not None for name, _ in parts)
        for home, layout in _LAYOUTS.items()
    }
    home = max(known, key=known.get)
    if not known[home]:
        raise ValueError(
            "the file must contain a Vision Transformer with the parameter names of "
            f"Google, timm or Hugging Face, got {some_names(arrays)}."
        )
    layout = _LAYOUTS[home]
    ours, sources = {}, {}
    for name, value in parts:
        if re.match(_UNUSED, name):
            continue
        target = _our_name(name, layout) or name
        if target in sources:
            raise ValueError(f"{sources[target]} and {name} name the same parameter.")
        ours[target], sources[target] = value, name

    settings = {"gelu": layout.gelu, "ln_eps": layout.ln_eps}
    settings["pool"] = "cls" if "cls" in ours else "mean"
    if home != "google":
        _check_gated(ours)
        folder = path if path.is_dir() else path.parent
        settings |= _torch_settings(folder / "config.json", home, sources)
        told = settings.pop("num_heads", None)
        head_dim = _torch_head_dim(ours, num_heads or told)
        ours = {name: _from_torch(name, ours[name], head_dim) for name in ours}
        _add_absent_biases(ours)
        _fold_layer_scale(ours)
    told = settings.pop("grid", None)
    grid = _complete_positions(ours, sources, home, grid, told)
    if home == "dinov2" and "head/kernel" in ours:
        width = _shape(ours, "embedding/kernel", "(p, p, C, D)")[3]
        if ours["head/kernel"].shape[0] == 2 * width:
            settings["pool"] = "cls_and_mean"
    return ours, settings | {"grid": grid}


def _check_supported(names):
    for pattern, what in _UNSUPPORTED.items():
        if found := [name for name in names if re.search(pattern, name)]:
            raise ValueError(f"not supported: {what}, {some_names(found)}.")


def _split(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Splits arrays that hold several parameters along their first axis."""
    stacked, fused = "/encoderblock/", ".attn.qkv."  # big_vision, timm
    if stacked in name and value.ndim:
        for i, layer in enumerate(value):
            yield name.replace(stacked, f"/encoderblock_{i}/"), layer
    elif fused in name and value.ndim and len(value) % 3 == 0:
        thirds = np.split(value, 3)
        for part, third in zip(("query", "key", "value"), thirds, strict=True):
            yield name.replace(fused, f".attn.{part}."), third
    else:
        yield name, value


def _check_gated(arrays):
    """Raises ValueError for a gated MLP that is packed as in DINOv2."""
    names = (f"{_MLP}/Dense_{i}/kernel".replace("#", "0") for i in (0, 1))
    first, second = (np.shape(arrays.get(name)) for name in names)  # (out, in)
    if first and first[0] == 2 * second[-1]:
        raise ValueError(
            "not supported: a gated MLP (SwiGLU), Dense_0 has twice as many outputs as "
            "Dense_1 has inputs."
        )


def _torch_head_dim(arrays, num_heads):
    """d, for attentions that store their heads as one axis of size H d."""
    name = f"{_ATTENTION}/query/kernel".replace("#", "0")
    width, _ = _shape(arrays, name, "(H d, D)")
    if num_heads is None:
        name = f"{_MLP}/Dense_0/kernel".replace("#", "0")
        sizes = width, _shape(arrays, name, "(M, D)")[0]
        if sizes not in _KNOWN_HEADS:
            raise ValueError(
                f"the number of heads is unknown: there is no config.json that tells "
                f"it, and width {sizes[0]} with an MLP of {sizes[1]} is not that of a "
                "published network; set num_heads."
            )
        num_heads = _KNOWN_HEADS[sizes]
    if width % num_heads:
        raise ValueError(
            f"num_heads must divide the attention's width {width}, got {num_heads}."
        )
    return width // num_heads


# (width, width of the MLP) -> heads, of the networks of timm, DeiT and DINOv2.
_KNOWN_HEADS = {
    (192, 768): 3,
    (256, 1280): 4,
    (320, 1792): 5,
    (384, 1536): 6,
    (512, 2048): 8,
    (640, 2560): 10,
    (768, 3072): 12,
    (832, 2176): 13,
    (896, 2304): 14,
    (896, 3584): 14,
    (1024, 4096): 16,
    (1152, 4304): 16,
    (1280, 5120): 16,
    (1408, 6144): 16,
    (1664, 8192): 16,
}


def _from_torch(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    """Converts a PyTorch parameter to our layout; one of unexpected shape is kept."""
    *_, module, leaf = f"/{name}".split("/")
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(2, 3, 1, 0)  # (D, C, p, p) -> (p, p, C, D)
    if leaf == "kernel" and value.ndim == 2:
        value = value.T  # (out, in) -> (in, out)
    if value.ndim == 0:
        return value
    if module in ("query", "key", "value") and value.shape[-1] % head_dim == 0:
        return value.reshape(*value.shape[:-1], -1, head_dim)  # (D, H, d), (H, d)
    if (module, leaf) == ("out", "kernel") and len(value) % head_dim == 0:
        return value.reshape(-1, head_dim, *value.shape[1:])  # (H, d, D)
    return value


def _add_absent_biases(arrays):
    """Adds zeros for the biases that no layer of the file has."""
    there = {re.sub(r"block_\d+", "block_#", name) for name in arrays}
    kernels = r"(Transformer/.*|embedding)/kernel"
    for name in [name for name in arrays if re.fullmatch(kernels, name)]:
        bias = name.removesuffix("kernel") + "bias"
        if re.sub(r"block_\d+", "block_#", bias) not in there:
            to_heads = name.split("/")[-2] in ("query", "key", "value")
            shape = arrays[name].shape[1 if to_heads else -1 :]
            arrays[bias] = np.zeros(shape, np.float32)


def _fold_layer_scale(arrays):
    """Multiplies the factors of LayerScale into the projections before them."""
    for name in [name for name in arrays if "/LayerScale_" in name]:
        block, _, index = name.rpartition("/LayerScale_")
        module = ("MultiHeadDotProductAttention_0/out", "MlpBlock_0/Dense_1")[
            int(index)
        ]
        factors = _float32(name, arrays.pop(name))
        for leaf in ("kernel", "bias"):
            target = f"{block}/{module}/{leaf}"
            if np.shape(arrays.get(target))[-1:] != factors.shape:
                raise ValueError(f"{name} {factors.shape} does not fit {target}.")
            arrays[target] = _float32(target, arrays[target]) * factors


def _complete_positions(arrays, sources, home, grid, told):
    """Gives every token before the patches a row: zeros where the file has none.

    `grid` is given, `told` is that of a config.json, which may keep an older size.
    Returns the grid, None if it is not known.
    """
    if np.ndim(arrays.get(_POSITIONS)) != 3:
        return grid
    num_cls, extra = int("cls" in arrays), 0
    if "registers" in arrays:
        extra = _shape(arrays, "registers", "(1, R, D)")[1]
    num_prefix = num_cls + extra
    rows = {
        "google": (num_cls, 0) if sources[_POSITIONS] in _BIG_VISION else (num_cls,),
        "timm": (num_prefix, 0),
        "hugging_face": (num_prefix,),
        "dinov2": (num_cls,),
    }[home]
    num_positions = arrays[_POSITIONS].shape[1]
    if not grid and told and any(_is_grid(num_positions - n, told) for n in rows):
        grid = told
    rows = sorted({n for n in rows if _is_grid(num_positions - n, grid)}, reverse=True)
    if len(rows) > 1:
        raise ValueError(
            f"{_POSITIONS} has {num_positions} rows, a square of patches after "
            f"{rows[0]} and after {rows[1]} tokens; set grid."
        )
    if rows and rows[0] < num_prefix:
        positions = _float32(_POSITIONS, arrays[_POSITIONS])
        absent = np.zeros((1, num_prefix - rows[0], positions.shape[2]), np.float32)
        parts = positions[:, : rows[0]], absent, positions[:, rows[0] :]
        arrays[_POSITIONS] = np.concatenate(parts, axis=1)
    return grid


def _torch_settings(path, home, sources):
    """The fields of `ViT` and the grid that a config.json and the names tell."""
    config = json_object(path, path.read_bytes()) if path.is_file() else {}
    read = _timm_config if home == "timm" else _hugging_face_config
    settings = read(config, set(sources.values()))
    return _check_settings(path.name, settings)


def _timm_config(config, sources):
    """Of timm: `model_args` are the arguments that differ from the architecture's."""
    arguments = _entry(config, "model_args")
    architecture = str(config.get("architecture", ""))
    settings = {"distilled": "dist_token" in sources}
    _check_supported([architecture])
    pool = arguments.get("global_pool", config.get("global_pool"))
    if pool is not None:
        settings["pool"] = _translate("global_pool", pool, _TIMM_POOL)
    if "fc_norm.weight" in sources and settings.get("pool") != "cls":
        settings["pool"] = "mean_before_norm"  # Of one token it is the same.
    if arguments.get("pool_include_prefix") and settings.get("pool") != "cls":
        raise ValueError("not supported: pool_include_prefix of config.json.")
    # The only architectures without normalization of the tokens before the blocks whose
    # activation is not timm's default.
    activation = "gelu_tanh" if re.search(_TIMM_TANH, architecture) else None
    activation = arguments.get("act_layer", activation)
    if activation is not None:
        settings["gelu"] = _translate("act_layer", activation, _TIMM_GELU)
    _translate("norm_layer", arguments.get("norm_layer"), {None: 0, "layernorm": 0})
    num_heads = 16 if architecture == "vit_base_patch16_gap_224" else None
    num_heads = arguments.get("num_heads", num_heads)
    if num_heads is not None:
        settings["num_heads"] = num_heads
    size = _entry(config, "pretrained_cfg").get("input_size", (0, 0, 0))[-2:]
    size = arguments.get("img_size", size)
    patch = arguments.get("patch_size")
    if patch is None and (found := re.search(r"_patch(\d+)", architecture)):
        patch = int(found[1])
    return settings | _grid_setting(size, patch)


def _hugging_face_config(config, sources):
    del sources
    settings = {
        ours: config[name]
        for ours, name in (
            ("num_heads", "num_attention_heads"),
            ("ln_eps", "layer_norm_eps"),
        )
        if name in config
    }
    if "hidden_act" in config:
        activation = config["hidden_act"]
        settings["gelu"] = _translate("hidden_act", activation, _HUGGING_FACE_GELU)
    return settings | _grid_setting(config.get("image_size"), config.get("patch_size"))


_TIMM_TANH = (
    r"base_patch32_siglip|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip"
    r"|giantopt_patch16_siglip"
)
_TIMM_POOL = {"token": "cls", "avg": "mean"}
_TIMM_GELU = {"gelu": "erf", "gelu_erf": "erf", "gelu_tanh": "tanh"}
_HUGGING_FACE_GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def _translate(field, value, table):
    if not isinstance(value, str | None) or value not in table:
        names = ", ".join(map(str, table))
        raise ValueError(
            f"{field} of config.json must be one of {names}; got {value!r}."
        )
    return table[value]


def _entry(config, name):
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} of config.json must be an object, got {value!r}.")
    return value


def _grid_setting(image_size, patch_size):
    """The grid of images (height, width) or of one side, if it is known."""
    try:
        grid = tuple(side // patch_size for side in _pair(image_size))
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    return {"grid": grid} if len(grid) == 2 and min(grid) > 0 else {}


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
    settings = _check_settings(_SETTINGS, settings)
    return settings if cascade is None else settings | {"cascade": _cascade(cascade)}


def _cascade(fields):
    """The cascade from its fields; raises ValueError if they are not valid."""
    try:
        return Cascade(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_SETTINGS} has an invalid cascade: {error}") from None


def _check_settings(source, settings):
    allowed = {
        "gelu": lambda value: value in ("tanh", "erf"),
        "ln_eps": lambda value: (
            isinstance(value, int | float) and 0 <= value < math.inf
        ),
        "num_heads": lambda value: type(value) is int and value > 0,
        "pool": lambda value: value in POOLS,
        "distilled": lambda value: isinstance(value, bool),
        "grid": lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(type(side) is int and side > 0 for side in value)
        ),
    }
    for name, value in settings.items():
        if not allowed[name](value):
            raise ValueError(f"{source} has the invalid value {value!r} for {name}.")
    return settings


# Writing for other libraries.


def _check_common(model, names):
    """Raises ValueError if the library has no network that computes the same."""
    uniform = isinstance(model.num_heads, int) and isinstance(model.mlp_dim, int)
    usual = uniform and model.hidden_size / model.num_heads
    other = uniform and model.head_dim not in (None, usual)
    pool, is_dino = f"pool {model.pool!r}", _is_dino(model)
    problems = [
        ("a stem of convolutions", model.stem),
        ("a layer before the head (representation_size)", model.representation_size),
        ("layers of different widths", not uniform),
        ("heads of another width (head_dim)", other),
        ("registers and distillation", model.distilled and model.num_registers > 1),
        (f"{pool} with distillation", model.distilled and model.pool != "cls"),
    ]
    if names == "timm":
        problems += [
            ("an epsilon other than 1e-6", not math.isclose(model.ln_eps, 1e-6)),
            (pool, model.pool == "cls_and_mean"),
        ]
    else:
        on_cls = model.num_classes and model.pool == "cls"
        whole = uniform and model.mlp_dim % model.hidden_size == 0
        problems += [
            ("a network without CLS", not model.class_token),
            (pool, model.pool.startswith("mean")),
            ("registers with a head on CLS alone", is_dino and on_cls),
            ("DINOv2 with an MLP that is not a multiple", is_dino and not whole),
            ("distillation without heads", model.distilled and not model.num_classes),
        ]
    if found := [what for what, there in problems if there]:
        raise ValueError(f"names {names!r} cannot express {', '.join(found)}.")


def _is_dino(model):
    return model.pool == "cls_and_mean" or (model.num_registers and not model.distilled)


def _to_torch(arrays, modules):
    """Renames our arrays by {their module: our module}, in PyTorch's shapes."""
    theirs = {ours: name for name, ours in _torch_names(modules).items()}
    renamed = {}
    for name, value in arrays.items():
        *_, module, leaf = f"/{name}".split("/")
        block = re.search(r"encoderblock_(\d+)", name)
        if leaf == "kernel" and value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)  # (p, p, C, D) -> (D, C, p, p)
        elif module in ("query", "key", "value"):
            value = value.reshape(*value.shape[:-2], -1).T  # (H d, D), (H d)
        elif leaf == "kernel":
            value = value.reshape(-1, value.shape[-1]).T  # (in, out) -> (out, in)
        pattern = re.sub(r"encoderblock_\d+", "encoderblock_#", name)
        renamed[theirs[pattern].replace("#", block[1] if block else "#")] = value
    return renamed


def _to_timm(model, arrays, grid):
    modules = {name: ours for name, ours in _TIMM.items() if "LayerScale" not in ours}
    average = model.pool == "mean_before_norm"
    del modules["norm" if average else "fc_norm"]
    del modules["reg_token" if model.distilled else "dist_token"]
    arrays = _to_torch(arrays, modules)
    for name in [name for name in arrays if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        joined = np.concatenate([arrays.pop(part) for part in parts])
        arrays[name.replace("query", "qkv")] = joined
    size = model.patch_size * grid[0], model.patch_size * grid[1]
    channels = arrays["patch_embed.proj.weight"].shape[1]
    pool = "token" if model.pool == "cls" else "avg"
    arguments = {
        "img_size": list(size),
        "patch_size": model.patch_size,
        "in_chans": channels,
        "embed_dim": model.hidden_size,
        "depth": model.num_layers,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_dim / model.hidden_size,
        "act_layer": "gelu_tanh" if model.gelu == "tanh" else "gelu",
        "global_pool": pool,
    }
    if not model.distilled:
        arguments |= {
            "class_token": model.class_token,
            "reg_tokens": model.num_registers,
            "fc_norm": average,
        }
    distilled = "deit_tiny_distilled_patch16_224"
    return arrays, {
        "architecture": distilled if model.distilled else "vit_tiny_patch16_224",
        "num_classes": model.num_classes,
        "num_features": model.hidden_size,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [channels, *size],
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if model.distilled else "head",
        },
    }


def _to_hugging_face(model, arrays, grid):
    dino = _is_dino(model)
    table = _HUGGING_FACE_DINO if dino else _HUGGING_FACE_VIT
    kind = "dinov2" if dino else "deit" if model.distilled else "vit"
    prefix, unused = kind, {"embeddings.register_tokens", "classifier"}
    if not model.distilled:
        unused = {"embeddings.distillation_token", "cls_classifier"}
    if dino and model.num_registers:
        # These have no positions.
        kind = prefix = "dinov2_with_registers"
        first, last = 1, 1 + model.num_registers
        positions = arrays[_POSITIONS]
        arrays["registers"] = arrays["registers"] + positions[:, first:last]
        arrays[_POSITIONS] = np.delete(positions, np.s_[first:last], axis=1)
    if dino:
        ones = np.ones(model.hidden_size, np.float32)
        arrays |= {
            f"{_BLOCK}/LayerScale_{i}".replace("#", str(layer)): ones
            for layer in range(model.num_layers)
            for i in (0, 1)
        }
    arrays = _to_torch(arrays, {k: v for k, v in table.items() if k not in unused})
    if model.num_classes:
        arrays = {
            name if "classifier" in name else f"{prefix}.{name}": value
            for name, value in arrays.items()
        }
    name = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}.get(
        kind, "Dinov2WithRegisters"
    )
    task = "ForImageClassification" if model.num_classes else "Model"
    task += "WithTeacher" * model.distilled
    [patches] = [v for k, v in arrays.items() if k.endswith("projection.weight")]
    size = [model.patch_size * side for side in grid]
    config = {
        "architectures": [name + task],
        "model_type": kind,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "gelu_pytorch_tanh" if model.gelu == "tanh" else "gelu",
        "layer_norm_eps": float(model.ln_eps),
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": model.patch_size,
        "num_channels": patches.shape[1],
        "qkv_bias": True,
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
    }
    if dino:
        config["mlp_ratio"] = model.mlp_dim // model.hidden_size
        config["num_register_tokens"] = model.num_registers
    else:
        config["intermediate_size"] = model.mlp_dim
    return arrays, config


_WRITERS = {"timm": _to_timm, "huggingface": _to_hugging_face}


def _to_safetensors(arrays):
    """The bytes of a .safetensors file; see `_read_safetensors`."""
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    kinds = {"float32": "F32", "float16": "F16"}
    for name, value in sorted(arrays.items()):
        value = np.ascontiguousarray(value)
        start, end = end, end + value.nbytes
        header[name] = {
            "dtype": kinds[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [start, end],
        }
        parts.append(value.astype(value.dtype.newbyteorder("<")).tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # Arrays are aligned.
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


# Shapes.


def _architecture(arrays: Arrays) -> dict[str, Any]:
    """The fields of `ViT` that the shapes of our parameters determine."""
    side, _, _, hidden_size = _shape(arrays, "embedding/kernel", "(p, p, C, D)")
    stem = []
    while (name := f"stem_{len(stem)}/kernel") in arrays:
        stem.append(_shape(arrays, name, "(3, 3, C, F)")[-1])
    blocks = [re.match(r"Transformer/encoderblock_(\d+)/", name) for name in arrays]
    num_layers = len({block[1] for block in blocks if block})
    queries = _shapes(arrays, f"{_ATTENTION}/query/kernel", "(D, H, d)", num_layers)
    first = _shapes(arrays, f"{_MLP}/Dense_0/kernel", "(D, M)", num_layers)
    mlp_dim = [shape[1] for shape in first]
    num_heads = _once([shape[1] for shape in queries])
    head_dim = queries[0][2]
    if isinstance(num_heads, int) and num_heads * head_dim == hidden_size:
        head_dim = None
    num_registers = 0
    if "registers" in arrays:
        num_registers = _shape(arrays, "registers", "(1, R, D)")[1]
    return {
        "num_classes": _width(arrays, "head") or 0,
        "patch_size": side * 2 ** len(stem),
        "stem": tuple(stem),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_dim": _once(mlp_dim),
        "head_dim": head_dim,
        "representation_size": _width(arrays, "pre_logits"),
        "class_token": "cls" in arrays,
        "num_registers": num_registers,
        "distilled": "head_dist/kernel" in arrays,
    }


def _shape(arrays, name, axes):
    if name not in arrays:
        raise ValueError(
            f"{name} {axes} is missing; the file contains {some_names(arrays)}."
        )
    shape = arrays[name].shape
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"{name} must have shape {axes}, got {shape}.")
    return shape


def _shapes(arrays, name, axes, num_layers):
    """The shape in each layer; a layer without one gets that of the first other."""
    names = [name.replace("#", str(layer)) for layer in range(num_layers)]
    shapes = [np.shape(arrays.get(name)) for name in names]
    known = [shape for shape in shapes if len(shape) == axes.count(",") + 1]
    if not known:
        known = [_shape(arrays, name.replace("#", "0"), axes)]
    return [shape if shape in known else known[0] for shape in shapes]


def _width(arrays, module):
    """Number of outputs of a dense layer; None if the file lacks the layer."""
    if not any(name.startswith(f"{module}/") for name in arrays):
        return None
    return _shape(arrays, f"{module}/kernel", "(D, out)")[1]


def _once(sizes):
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


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
    if _POSITIONS in arrays:
        num_rows = _shape(arrays, _POSITIONS, "(1, 1 + P, D)")[1]
        num_patches = max(num_rows - model.num_prefix, 1)
    first = "stem_0/kernel" if model.stem else "embedding/kernel"
    if first in arrays:
        channels = _shape(arrays, first, "(side, side, C, features)")[2]
    images = jax.ShapeDtypeStruct((1, num_patches * side, side, channels), jnp.float32)
    init = model.clone(cascade=None).init
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


def _grid_of(positions, grid, num_prefix):
    """Rows and columns of position embeddings (1, N, D), given or of a square."""
    num_patches = positions.shape[1] - num_prefix
    if not _is_grid(num_patches, grid):
        expected = "a square number of positions (1, 4, 9, ...)"
        if grid:
            expected = f"a position for each patch of a grid of {grid}"
        raise ValueError(
            f"{_POSITIONS} must have {expected} after {num_prefix} of CLS and "
            f"registers, got {num_patches}; set grid."
        )
    return tuple(grid) if grid else (math.isqrt(num_patches),) * 2


def _is_grid(number, grid):
    if grid:
        return number == grid[0] * grid[1]
    return number > 0 and math.isqrt(number) ** 2 == number


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:
        value = value.view(jnp.bfloat16)  # How NumPy stores it.
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must have a floating-point dtype, got {value.dtype}.")
    with np.errstate(over="ignore"):  # It gives infinity, which is refused.
        return np.asarray(value, np.float32)
