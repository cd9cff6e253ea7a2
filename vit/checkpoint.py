"""Checkpoints of Vision Transformers: others' files and ours -> `ViT` and its params.

`load_checkpoint` reads
  .npz          google-research/vision_transformer and AugReg, in the spelling before
                Flax Linen and in Linen's; big_vision with a CLS token, its layers
                stacked or not; what `save_checkpoint` wrote
  .safetensors  timm; Hugging Face transformers
The layout is told by the names in the file, the architecture by the shapes. Nothing in
a file is run: neither format needs pickle, and pickled content is refused.

Linen's names are ours, so that one table per foreign layout says all: from its names to
Linen's, # for the number of a block. PyTorch stores linear maps output by input, and
the heads of an attention as one axis; `_from_torch` knows that from our name.

Axes: p side of a patch, C channels, D width, H heads, d width of a head, P patches,
g rows of the grid of patches.
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit.model import ViT

Arrays = dict[str, np.ndarray]


def load_checkpoint(
    path: str | Path,
    image_size: int | None = None,
    num_classes: int | None = None,
    *,
    num_heads: int | None = None,
) -> tuple[ViT, dict]:
    """Reads a Vision Transformer, ready for `model.apply({"params": params}, images)`.

    Files differ in what shapes cannot tell: GELU and epsilon are set to what the file's
    home computes with ("tanh" and 1e-6 of Google, "erf" and 1e-6 of timm, "erf" and
    1e-12 of Hugging Face), or to what `save_checkpoint` and Hugging Face's config.json
    beside the file say. How images are scaled is the caller's: Google's own weights
    expect [-1, 1].

    Args:
      path: ends in .npz or .safetensors.
      image_size: side of the images in pixels; the position embedding is resized to
        their grid by `resize_positions`. None keeps the file's.
      num_classes: None or the file's own number keeps its head, and the `pre_logits`
        layer before it. Another number puts zeros in their place, as Google does for
        fine-tuning; 0 puts nothing there.
      num_heads: H, for files of PyTorch, which do not tell it. None is that of
        config.json beside a file of Hugging Face, else heads of width 64.

    Returns:
      The model, and its float32 params as nested dicts. Layers that differ in heads or
      in the width of the MLP give tuples. A file without head gives num_classes=0.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, of another format or of an architecture that
        `ViT` is not, or if the arguments do not fit it.
    """
    path = Path(path)
    arrays = _read(path)
    try:
        for argument, value, least in (
            ("image_size", image_size, 1),
            ("num_classes", num_classes, 0),
            ("num_heads", num_heads, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{argument} must be at least {least}, got {value}.")
        settings = _own_settings(arrays.pop(_SETTINGS, None))
        is_ours = settings is not None
        if not is_ours:
            arrays, settings = _from_foreign(arrays, path, num_heads)
        fields = _architecture(arrays) | settings
        if num_heads not in (None, fields["num_heads"]):
            raise ValueError(
                f"num_heads is {fields['num_heads']} in this file, got {num_heads}."
            )
        if num_classes not in (None, fields["num_classes"]):
            _replace_head(arrays, fields, num_classes)
        elif not (fields["num_classes"] or is_ours):
            _replace_head(arrays, fields, 0)
        model = ViT(**fields)
        _check_fits(model, arrays)
        params = {name: _float32(name, value) for name, value in arrays.items()}
        if image_size is not None:
            if image_size % model.patch_size:
                raise ValueError(
                    f"image_size must be a multiple of the patch size "
                    f"{model.patch_size}, got {image_size}."
                )
            grid_size = image_size // model.patch_size
            params[_POSITIONS] = resize_positions(params[_POSITIONS], grid_size)
        elif not is_ours:
            _grid_size(params[_POSITIONS])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = {name: jnp.asarray(value) for name, value in params.items()}
    return model, traverse_util.unflatten_dict(params, sep="/")


def save_checkpoint(
    path: str | Path, model: ViT, params: Any, dtype: str = "float32"
) -> None:
    """Writes a .npz with the names and shapes of google-research/vision_transformer.

    One entry more, `meta`, holds in JSON what shapes do not tell: `gelu` and `ln_eps`.
    The other fields are those of a run: `cascade`, the dropout rates and the compute
    dtype come back at their defaults. The file is written beside `path` and moved into
    place, so that a kill leaves an older one whole.

    Args:
      path: ends in .npz.
      model: whose params they are.
      params: nested dicts, pruned heads and MLP columns left out or not.
      dtype: "float32" or "float16". NumPy's format has no bfloat16.

    Raises:
      ValueError: if the name, the dtype or the params do not fit.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ValueError(f"the name of a checkpoint must end in .npz, got {path}.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}.")
    arrays = {
        name: np.asarray(value)
        for name, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    _check_fits(model, arrays)
    for name, value in arrays.items():
        value = _float32(name, value)
        largest = np.max(np.abs(value), where=np.isfinite(value), initial=0)
        if largest > np.finfo(dtype).max:
            raise ValueError(f"{name} holds {largest}, too large for {dtype}.")
        arrays[name] = value.astype(dtype)
    arrays[_SETTINGS] = json.dumps({"gelu": model.gelu, "ln_eps": float(model.ln_eps)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resize_positions(positions: np.ndarray, grid_size: int) -> np.ndarray:
    """Position embeddings for another grid of patches, by Google's rule.

    Linear along both axes, corners upon corners: new row i lies at the old row
    i (g_old - 1) / (g_new - 1), as `scipy.ndimage.zoom(order=1)` has it.
    `jax.image.resize` aligns the borders instead, and timm and Hugging Face resize by
    cubics.

    Args:
      positions: (1, 1 + g_old^2, D), the CLS token's first, which stays.
      grid_size: g_new.

    Returns:
      (1, 1 + g_new^2, D).

    Raises:
      ValueError: if the patches do not form a square.
    """
    old = _grid_size(positions)
    if grid_size == old:
        return positions
    places = np.linspace(0, old - 1, grid_size)
    distances = np.abs(places[:, None] - np.arange(old))
    weights = np.maximum(0, 1 - distances)  # (g_new, g_old)
    cls, grid = np.asarray(positions[:, :1]), np.asarray(positions[0, 1:])
    grid = grid.reshape(old, old, -1)
    grid = np.einsum("ai,ijd->ajd", weights, grid)
    grid = np.einsum("bj,ajd->abd", weights, grid)  # (g_new, g_new, D)
    grid = grid.reshape(1, grid_size**2, -1).astype(cls.dtype)
    return np.concatenate([cls, grid], axis=1)


# Names: each layout's -> ours.

_SETTINGS = "meta"
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_BLOCK = "Transformer/encoderblock_#"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_MLP = f"{_BLOCK}/MlpBlock_0"

_TIMM = {
    "cls_token": "cls",
    "pos_embed": _POSITIONS,
    "patch_embed.proj": "embedding",
    "blocks.#.norm1": f"{_BLOCK}/LayerNorm_0",
    "blocks.#.attn.query": f"{_ATTENTION}/query",  # The thirds of qkv, by `_split`.
    "blocks.#.attn.key": f"{_ATTENTION}/key",
    "blocks.#.attn.value": f"{_ATTENTION}/value",
    "blocks.#.attn.proj": f"{_ATTENTION}/out",
    "blocks.#.norm2": f"{_BLOCK}/LayerNorm_1",
    "blocks.#.mlp.fc1": f"{_MLP}/Dense_0",
    "blocks.#.mlp.fc2": f"{_MLP}/Dense_1",
    "norm": "Transformer/encoder_norm",
    "pre_logits.fc": "pre_logits",
    "head": "head",
}
_HUGGING_FACE = {
    "embeddings.cls_token": "cls",
    "embeddings.position_embeddings": _POSITIONS,
    "embeddings.patch_embeddings.projection": "embedding",
    "encoder.layer.#.layernorm_before": f"{_BLOCK}/LayerNorm_0",
    "encoder.layer.#.attention.attention.query": f"{_ATTENTION}/query",
    "encoder.layer.#.attention.attention.key": f"{_ATTENTION}/key",
    "encoder.layer.#.attention.attention.value": f"{_ATTENTION}/value",
    "encoder.layer.#.attention.output.dense": f"{_ATTENTION}/out",
    "encoder.layer.#.layernorm_after": f"{_BLOCK}/LayerNorm_1",
    "encoder.layer.#.intermediate.dense": f"{_MLP}/Dense_0",
    "encoder.layer.#.output.dense": f"{_MLP}/Dense_1",
    "layernorm": "Transformer/encoder_norm",
    "classifier": "head",
}
# Before Linen, all modules of a block shared one counter.
_PRE_LINEN = {
    "LayerNorm_2": "LayerNorm_1",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "MlpBlock_3": "MlpBlock_0",
}
_BIG_VISION = {"pos_embedding": _POSITIONS, "Transformer/pos_embedding": _POSITIONS}

# Added before the CLS token joins, these may have no row for it.
_WITHOUT_CLS_ROW = {*_BIG_VISION, "pos_embed"}
_UNUSED = r"(vit\.)?pooler\.dense\."  # Hugging Face's, no part of a classifier
_UNSUPPORTED = {
    r"dist_token|head_dist|distillation": "a distillation token (DeiT)",
    r"\.ls\d\.|\.gamma_\d|layer_scale": "layer scale",
    r"\b(q|k|query|key)_(norm|ln)\b": "normalising queries and keys (qk-norm)",
    r"reg_token|register_token": "register tokens",
    r"mlp\.(fc1_[gx]|w\d+|weights_in)\b": "a gated MLP (SwiGLU)",
    r"MAPHead|^probe$|attn_pool": "pooling by attention (MAP)",
    r"\bfc_norm\b": "pooling by average (GAP)",
    r"\bnorm_pre\b": "a normalisation before the blocks",
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
        if ours in ("cls", _POSITIONS):
            names[theirs] = ours
        else:
            weight = "scale" if "norm" in ours.lower() else "kernel"
            names[f"{theirs}.weight"] = f"{ours}/{weight}"
            names[f"{theirs}.bias"] = f"{ours}/bias"
    return names


def _google_names():
    """Linen's names, which are ours, and what they were called before."""
    ours = _torch_names(_TIMM).values()
    older = {
        name.replace(new, old): name
        for name in ours
        for old, new in _PRE_LINEN.items()
        if new in name
    }
    return dict(zip(ours, ours, strict=True)) | older | _BIG_VISION


# A classifier of Hugging Face has its encoder under "vit.", an encoder alone has not.
_HUGGING_FACE |= {f"vit.{name}": ours for name, ours in _HUGGING_FACE.items()}
_LAYOUTS = {
    "google": _Layout(_google_names(), "tanh", 1e-6),
    "timm": _Layout(_torch_names(_TIMM), "erf", 1e-6),
    "hugging_face": _Layout(_torch_names(_HUGGING_FACE), "erf", 1e-12),
}


def _our_name(name, layout):
    """Our name of a parameter, or None."""
    block = re.search(r"(?<=[._])\d+(?=[./])", name)
    if block is None:
        return layout.names.get(name)
    ours = layout.names.get(f"{name[: block.start()]}#{name[block.end() :]}")
    return ours and ours.replace("#", block[0])


# Layouts.


def _from_foreign(arrays: Arrays, path: Path, num_heads: int | None):
    """Brings the arrays of a foreign file into our layout, whatever their dtypes.

    Returns:
      {our name: array}, in which what has no name of ours keeps its own, and the fields
      of `ViT` that shapes do not tell.
    """
    for prefix in ("opt/target/", "params/"):
        inside = [name for name in arrays if name.startswith(prefix)]
        if inside:  # The others are the optimiser's.
            arrays = {name.removeprefix(prefix): arrays[name] for name in inside}
    for pattern, what in _UNSUPPORTED.items():
        if found := [name for name in arrays if re.search(pattern, name)]:
            raise ValueError(f"not supported: {what}, {_first(found)}.")

    parts = [part for item in arrays.items() for part in _split(*item)]
    known = {
        home: sum(_our_name(name, layout) is not None for name, _ in parts)
        for home, layout in _LAYOUTS.items()
    }
    home = max(known, key=known.get)
    if not known[home]:
        raise ValueError(
            "these are no parameters of a Vision Transformer as Google, timm or "
            f"Hugging Face name them: {_first(arrays)}."
        )
    layout = _LAYOUTS[home]
    ours, sources = {}, {}
    for name, value in parts:
        if re.match(_UNUSED, name):
            continue
        target = _our_name(name, layout) or name
        if target in sources:
            raise ValueError(f"{sources[target]} and {name} are the same parameter.")
        ours[target], sources[target] = value, name

    settings = {"gelu": layout.gelu, "ln_eps": layout.ln_eps}
    if home == "hugging_face":
        settings |= _hugging_face_settings(path.with_name("config.json"))
        told = settings.pop("num_heads", None)
        num_heads = num_heads or told
    if home != "google":
        head_dim = _torch_head_dim(ours, num_heads)
        ours = {name: _from_torch(name, ours[name], head_dim) for name in ours}
    _add_cls_row(ours, sources)
    return ours, settings


def _split(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that some store as one, along its first axis."""
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


def _torch_head_dim(arrays, num_heads):
    """d, where the heads of an attention are one axis of H d."""
    name = f"{_ATTENTION}/query/kernel".replace("#", "0")
    width, _ = _shape(arrays, name, "(H d, D)")
    if num_heads is None and width % 64:
        raise ValueError(
            f"an attention of width {width} does not divide into heads of 64: give "
            "num_heads."
        )
    if num_heads is not None and width % num_heads:
        raise ValueError(
            f"num_heads must divide the attention's width {width}, got {num_heads}."
        )
    return width // num_heads if num_heads else 64


def _from_torch(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    """One of PyTorch's parameters in our layout; if it does not fit, as it is."""
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


def _add_cls_row(arrays, sources):
    """Gives the CLS token the position zero if the file has none for it."""
    shape = arrays[_POSITIONS].shape if _POSITIONS in arrays else ()
    if len(shape) != 3 or not _is_square(shape[1]):
        return
    if "cls" not in arrays:
        raise ValueError(
            f"not supported: pooling by average (GAP), {shape[1]} positions and no CLS "
            "token."
        )
    if sources[_POSITIONS] in _WITHOUT_CLS_ROW:
        positions = _float32(_POSITIONS, arrays[_POSITIONS])
        arrays[_POSITIONS] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))


def _hugging_face_settings(path):
    """What a config.json tells of `ViT`'s fields, if there is one."""
    if not path.exists():
        return {}
    config = _json_object(path, path.read_bytes())
    theirs = {
        "num_heads": "num_attention_heads",
        "ln_eps": "layer_norm_eps",
        "gelu": "hidden_act",
    }
    settings = {ours: config[name] for ours, name in theirs.items() if name in config}
    if "gelu" in settings:
        activation = str(settings["gelu"])
        if activation not in _HUGGING_FACE_GELU:
            raise ValueError(
                f"hidden_act {activation!r} of {path.name} is none of "
                f"{', '.join(_HUGGING_FACE_GELU)}."
            )
        settings["gelu"] = _HUGGING_FACE_GELU[activation]
    return _check_settings(path.name, settings)


_HUGGING_FACE_GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def _own_settings(entry):
    """The fields in a file of `save_checkpoint`; None in any other."""
    if entry is None:
        return None
    settings = _json_object(_SETTINGS, str(entry))
    settings = {name: settings.get(name) for name in ("gelu", "ln_eps")}
    return _check_settings(_SETTINGS, settings)


def _json_object(name, text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, holds {value!r}.")
    return value


def _check_settings(source, settings):
    allowed = {
        "gelu": lambda value: value in ("tanh", "erf"),
        "ln_eps": lambda value: (
            isinstance(value, int | float) and 0 <= value < math.inf
        ),
        "num_heads": lambda value: type(value) is int and value > 0,
    }
    for name, value in settings.items():
        if not allowed[name](value):
            raise ValueError(f"{source} gives {value!r} for {name}.")
    return settings


# Shapes.


def _architecture(arrays: Arrays) -> dict[str, Any]:
    """The fields of `ViT` that the shapes of our parameters tell."""
    side, _, _, hidden_size = _shape(arrays, "embedding/kernel", "(p, p, C, D)")
    stem = []
    while (name := f"stem_{len(stem)}/kernel") in arrays:
        stem.append(_shape(arrays, name, "(3, 3, C, F)")[-1])
    blocks = [re.match(r"Transformer/encoderblock_(\d+)/", name) for name in arrays]
    num_layers = len({block[1] for block in blocks if block})
    queries = _shapes(arrays, f"{_ATTENTION}/query/kernel", "(D, H, d)", num_layers)
    first = _shapes(arrays, f"{_MLP}/Dense_0/kernel", "(D, M)", num_layers)
    second = _shapes(arrays, f"{_MLP}/Dense_1/kernel", "(M, D)", num_layers)
    mlp_dim = [shape[1] for shape in first]
    if mlp_dim == [2 * shape[0] for shape in second]:
        raise ValueError(
            "not supported: a gated MLP (SwiGLU), Dense_0 is twice as wide as Dense_1 "
            "takes."
        )
    num_heads = _once([shape[1] for shape in queries])
    head_dim = queries[0][2]
    if isinstance(num_heads, int) and num_heads * head_dim == hidden_size:
        head_dim = None
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
    }


def _shape(arrays, name, axes):
    if name not in arrays:
        raise ValueError(f"{name} {axes} is missing among {_first(arrays)}.")
    shape = arrays[name].shape
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"{name} has shape {shape}, needs {axes}.")
    return shape


def _shapes(arrays, name, axes, num_layers):
    """The shape in each layer; where there is none, that of the first to have one."""
    names = [name.replace("#", str(layer)) for layer in range(num_layers)]
    shapes = [np.shape(arrays.get(name)) for name in names]
    known = [shape for shape in shapes if len(shape) == axes.count(",") + 1]
    if not known:
        known = [_shape(arrays, name.replace("#", "0"), axes)]
    return [shape if shape in known else known[0] for shape in shapes]


def _width(arrays, module):
    """Outputs of a dense layer; None if there is no such layer."""
    if not any(name.startswith(f"{module}/") for name in arrays):
        return None
    return _shape(arrays, f"{module}/kernel", "(D, out)")[1]


def _once(sizes):
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def _replace_head(arrays, fields, num_classes):
    """Puts a head of zeros onto the CLS token, none if num_classes is 0; in place."""
    for name in list(arrays):
        if name.startswith(("head/", "pre_logits/")):
            del arrays[name]
    fields |= {"num_classes": num_classes, "representation_size": None}
    if num_classes:
        shape = fields["hidden_size"], num_classes
        arrays["head/kernel"] = np.zeros(shape, np.float32)
        arrays["head/bias"] = np.zeros(num_classes, np.float32)


def _check_fits(model, arrays):
    """Raises ValueError unless the arrays are the model's, by name and shape."""
    num_patches, channels, side = 1, 1, model.patch_size
    if _POSITIONS in arrays:
        num_patches = max(_shape(arrays, _POSITIONS, "(1, 1 + P, D)")[1] - 1, 1)
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
            f"{len(names)} {problem}: {_first(names)}"
            for problem, names in problems.items()
            if names
        ]
        raise ValueError(f"the parameters do not fit a ViT: {'; '.join(counts)}.")


def _first(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, for errors."""
    names = list(names)
    return ", ".join(names[:limit] + ["..."] * (len(names) > limit))


def _grid_size(positions):
    """g of (1, 1 + g^2, D)."""
    num_patches = positions.shape[1] - 1
    if not _is_square(num_patches):
        raise ValueError(
            f"{_POSITIONS} has {num_patches} positions beside that of the CLS token; "
            "allowed are squares: 1, 4, 9, ..."
        )
    return math.isqrt(num_patches)


def _is_square(number):
    return number > 0 and math.isqrt(number) ** 2 == number


def _float32(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:
        value = value.view(jnp.bfloat16)  # What NumPy's format makes of it.
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} is of {value.dtype}, not of floats.")
    return np.asarray(value, np.float32)


# Files.


def _read(path: Path) -> Arrays:
    """Every array of a file, by its name there."""
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    kind = path.suffix.lower()
    if path.is_dir() or kind not in _READERS:
        raise ValueError(
            f"a checkpoint is a file that ends in {' or '.join(_READERS)}, got "
            f"{'the directory ' * path.is_dir()}{path}."
        )
    with path.open("rb") as file:
        try:
            return _READERS[kind](file)
        # Damaged bytes may raise anything inside zipfile, NumPy and json.
        except Exception as error:
            raise ValueError(
                f"{path} is damaged, or no {kind} file of arrays "
                f"({type(error).__name__}: {error})."
            ) from error


def _read_npz(file):
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no zip archive, or truncated")
    file.seek(0)
    with np.load(file, allow_pickle=False) as npz:
        arrays = {name: npz[name] for name in npz.files}
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} is no array")
    return arrays


def _read_safetensors(file):
    """Header length (uint64), header (JSON), then the arrays in C order.

    The header is {name: {"dtype", "shape", "data_offsets": [begin, end]}}, offsets from
    its end, and perhaps a text under "__metadata__"; all is little-endian.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(file.read(length))
    buffer = file.read()
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{name} is of {entry['dtype']}; read are {', '.join(_DTYPES)}"
            )
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        begin, end = entry["data_offsets"]
        size = math.prod(shape)
        if not 0 <= begin <= end <= len(buffer) or end - begin != size * dtype.itemsize:
            raise ValueError(
                f"{name} {shape} lies at bytes {begin} to {end} of {len(buffer)}"
            )
        array = np.frombuffer(buffer, dtype, count=size, offset=begin)
        arrays[name] = array.reshape(shape)
    return arrays


_MAX_HEADER = 100_000_000  # The format's own limit.
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "F64": "<f8"}
_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
