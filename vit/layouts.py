"""Names of the parameters of Vision Transformers in other libraries, and their configs.

We use the names of Flax Linen. One table for each layout of Google, timm and Hugging
Face therefore suffices: from its names to Linen's, with # for the index of a block.
PyTorch stores linear maps as output by input and the heads of an attention as one axis;
`from_foreign` converts both by our name. `vit.exports` goes the other way.

Axes: p side of a patch, C channels, D width, H heads, d width of a head, M width of the
MLP, P patches.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit.model import POOLS
from vit.positions import POSITIONS, is_grid, pair
from vit.weight_files import Arrays, json_object, shape_of, some_names, to_float32

BLOCK = "Transformer/encoderblock_#"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"
MLP = f"{BLOCK}/MlpBlock_0"
TIMM = {
    "cls_token": "cls",
    "reg_token": "registers",
    "dist_token": "registers",
    "pos_embed": POSITIONS,
    "patch_embed.proj": "embedding",
    "blocks.#.norm1": f"{BLOCK}/LayerNorm_0",
    "blocks.#.attn.query": f"{ATTENTION}/query",  # Thirds of qkv, see `_split`.
    "blocks.#.attn.key": f"{ATTENTION}/key",
    "blocks.#.attn.value": f"{ATTENTION}/value",
    "blocks.#.attn.proj": f"{ATTENTION}/out",
    "blocks.#.ls1.gamma": f"{BLOCK}/LayerScale_0",
    "blocks.#.norm2": f"{BLOCK}/LayerNorm_1",
    "blocks.#.ls2.gamma": f"{BLOCK}/LayerScale_1",
    "blocks.#.mlp.fc1": f"{MLP}/Dense_0",
    "blocks.#.mlp.fc2": f"{MLP}/Dense_1",
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
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.patch_embeddings.projection": "embedding",
    "encoder.layer.#.attention.attention.query": f"{ATTENTION}/query",
    "encoder.layer.#.attention.attention.key": f"{ATTENTION}/key",
    "encoder.layer.#.attention.attention.value": f"{ATTENTION}/value",
    "encoder.layer.#.attention.output.dense": f"{ATTENTION}/out",
    "layernorm": "Transformer/encoder_norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
HUGGING_FACE_VIT = _HUGGING_FACE | {
    "encoder.layer.#.layernorm_before": f"{BLOCK}/LayerNorm_0",
    "encoder.layer.#.layernorm_after": f"{BLOCK}/LayerNorm_1",
    "encoder.layer.#.intermediate.dense": f"{MLP}/Dense_0",
    "encoder.layer.#.output.dense": f"{MLP}/Dense_1",
}
HUGGING_FACE_DINO = _HUGGING_FACE | {
    "encoder.layer.#.norm1": f"{BLOCK}/LayerNorm_0",
    "encoder.layer.#.norm2": f"{BLOCK}/LayerNorm_1",
    "encoder.layer.#.mlp.fc1": f"{MLP}/Dense_0",
    "encoder.layer.#.mlp.fc2": f"{MLP}/Dense_1",
    "encoder.layer.#.layer_scale1.lambda1": f"{BLOCK}/LayerScale_0",
    "encoder.layer.#.layer_scale2.lambda1": f"{BLOCK}/LayerScale_1",
}
# transformers 5 has other names in memory, and in files of `model.state_dict()`; only
# `save_pretrained` writes those above.
_IN_MEMORY_DINO = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_IN_MEMORY_VIT = _IN_MEMORY_DINO | {
    "encoder.layer.": "layers.",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",  # After that of the attention.
}
# Before Linen, the modules of a block were numbered with one counter.
_PRE_LINEN = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_BIG_VISION = {"pos_embedding": POSITIONS, "Transformer/pos_embedding": POSITIONS}
# What a wrapper or a library puts before the names of the network.
_PREFIXES = (
    r"((_orig_mod|module|model|timm_model|backbone|net|network|vit|deit"
    r"|dinov2_with_registers|dinov2|ijepa)\.)+"
)
# Hugging Face's pooler, which classifiers do not use, and the token of hidden patches.
_UNUSED = r"pooler\.dense\.|(embeddings\.)?mask_token$"
# In names of parameters, architectures of timm and model types of Hugging Face.
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
    r"audio-spectrogram": "overlapping patches (AST)",
}


class _Layout(NamedTuple):
    """How one library names its parameters and computes with them."""

    names: dict[str, str]
    gelu: str
    ln_eps: float
    resize: str


def torch_names(modules: dict[str, str]) -> dict[str, str]:
    """{module: our module} -> {parameter: our parameter}."""
    names = {}
    for theirs, ours in modules.items():
        if ours in ("cls", "registers", POSITIONS) or "LayerScale" in ours:
            names[theirs] = ours
        else:
            weight = "scale" if "norm" in ours.lower() else "kernel"
            names[f"{theirs}.weight"] = f"{ours}/{weight}"
            names[f"{theirs}.bias"] = f"{ours}/bias"
    return names


def _also_as(renames, names):
    """Adds the names after all replacements of a part to {parameter: ours}."""
    renamed = {}
    for name, ours in names.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name] = ours
    return names | renamed


_LINEN = {ours: ours for ours in torch_names(TIMM).values()}
_OF_VIT = _also_as(_IN_MEMORY_VIT, torch_names(HUGGING_FACE_VIT))
_OF_DINO = _also_as(_IN_MEMORY_DINO, torch_names(HUGGING_FACE_DINO))
_LAYOUTS = {
    "google": _Layout(
        _also_as(_PRE_LINEN, _LINEN) | _BIG_VISION, "tanh", 1e-6, "google"
    ),
    "timm": _Layout(torch_names(TIMM), "erf", 1e-6, "timm"),
    "hugging_face": _Layout(_OF_VIT, "erf", 1e-12, "huggingface"),
    "dinov2": _Layout(_OF_DINO, "erf", 1e-6, "huggingface"),
}


def _our_name(name, layout):
    """Our name of a parameter; None if it has none."""
    block = re.search(r"(?<=[._])\d+(?=[./])", name)
    if block is None:
        return layout.names.get(name)
    ours = layout.names.get(f"{name[: block.start()]}#{name[block.end() :]}")
    return ours and ours.replace("#", block[0])


def from_foreign(
    arrays: Arrays,
    path: Path,
    num_heads: int | None,
    grid: tuple[int, int] | None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    """Converts the arrays of a foreign file to our layout; dtypes do not change.

    Args:
      arrays: {their name: array}.
      path: the file, next to which a config.json may lie, or the folder, in which.
      num_heads: H, if the caller gives it.
      grid: rows and columns of patches, if the caller gives them.
      image_size: side of the caller's images, or (height, width), if given: without
        `grid`, positions that fit them and a square are refused.

    Returns:
      {our name: array}, where an unknown parameter keeps its name, and the fields of
      `ViT`, the grid and the rule of `resize_positions` that shapes do not determine.

    Raises:
      ValueError: if the names are those of no layout, of several networks or of an
        architecture that `ViT` does not support, or if the heads or the grid are not
        known.
    """
    home, parts = _recognize(arrays)
    layout = _LAYOUTS[home]
    ours, sources = {}, {}
    for name, value in parts:
        if re.match(_UNUSED, name):
            continue
        target = _our_name(name, layout) or name
        if not np.size(value) and not target.startswith("head"):
            raise ValueError(f"{name} {np.shape(value)} has no entries.")
        if target in sources:
            raise ValueError(f"{sources[target]} and {name} name the same parameter.")
        ours[target], sources[target] = value, name

    settings = {"gelu": layout.gelu, "ln_eps": layout.ln_eps}
    settings["pool"] = "cls" if "cls" in ours else "mean"
    if home != "google":
        _check_gated(ours)
        folder = path if path.is_dir() else path.parent
        settings |= _torch_settings(folder / "config.json", home, sources, ours)
        told = settings.pop("num_heads", None)
        head_dim = _torch_head_dim(ours, num_heads or told)
        ours = {name: _from_torch(name, ours[name], head_dim) for name in ours}
        _add_absent_biases(ours)
        _fold_layer_scale(ours)
    told = settings.pop("grid", None)
    side, *_ = np.shape(ours.get("embedding/kernel")) or (0,)
    asked = _grid_setting(image_size, side).get("grid")
    grid = _complete_positions(ours, sources, home, grid, told, asked)
    if home == "dinov2" and "head/kernel" in ours:
        width = shape_of(ours, "embedding/kernel", "(p, p, C, D)")[3]
        if ours["head/kernel"].shape[0] == 2 * width:
            settings["pool"] = "cls_and_mean"
    # Hugging Face resizes those of DINOv2 with registers as timm does.
    resize = "timm" if home == "dinov2" and "registers" in ours else layout.resize
    return ours, settings | {"grid": grid, "resize": resize}


def foreign_normalization(
    arrays: Arrays, path: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation of each channel of the images, in [0, 1], of a foreign file.

    Google's networks expect [-1, 1]; the others have them in a file of their library.

    Args:
      arrays: {their name: array}.
      path: the file, next to which the files of its library lie, or their folder.

    Returns:
      Both, float32 (C,), or None if they are not stated for this number of channels.

    Raises:
      ValueError: if the names are not those of a Vision Transformer, or if a file of
        the library is damaged.
    """
    home, parts = _recognize(arrays)
    kernels = {_our_name(name, _LAYOUTS[home]): value for name, value in parts}
    shape = np.shape(kernels.get("embedding/kernel"))
    if len(shape) != 4:
        return None
    if home == "google":
        return by_channel(0.5, 0.5, shape[2])
    folder, scale = path if path.is_dir() else path.parent, 1.0
    if home == "timm":
        name, config = "config.json", _read_config(folder / "config.json")
        # Older files have these entries at the top.
        stated = _entry(config, "pretrained_cfg") or config
        mean, std = stated.get("mean"), stated.get("std")
    else:
        name = "preprocessor_config.json"
        mean, std, scale = _processed(_read_config(folder / name))
    # timm and Hugging Face leave three numbers for one channel.
    if mean is None or std is None or {np.size(mean), np.size(std)} - {1, shape[1]}:
        return None
    try:
        mean, std = by_channel(mean, std, shape[1])
        return mean / scale, std / scale
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _processed(config):
    """Mean, deviation and 255 times the factor of Hugging Face's image processors."""
    mean, std = config.get("image_mean"), config.get("image_std")
    if config.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    factor = config.get("rescale_factor", 1 / 255)
    factor = factor if config.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(
            f"rescale_factor of preprocessor_config.json must be positive, got "
            f"{factor!r}."
        )
    return mean, std, 255 * factor


def by_channel(mean: Any, std: Any, num_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32 (C,).

    Args:
      mean: a number for all channels, or C numbers.
      std: the same.
      num_channels: C.

    Raises:
      ValueError: if they are not finite, `std` is not positive, or their number is
        another.
    """
    found = []
    for name, value in (("mean", mean), ("std", std)):
        try:
            with np.errstate(over="ignore"):  # It gives infinity, which is refused.
                numbers = np.asarray(value, np.float32).ravel()
        except (TypeError, ValueError):
            numbers = np.array([np.nan])
        valid = np.isfinite(numbers) & ((numbers > 0) | (name == "mean"))
        if len(numbers) not in (1, num_channels) or not valid.all():
            kind = "finite" if name == "mean" else "positive"
            raise ValueError(
                f"{name} must be a {kind} number, or one for each of {num_channels} "
                f"channels, got {value!r}."
            )
        found.append(np.broadcast_to(numbers, num_channels))
    return tuple(found)


def _recognize(arrays):
    """The layout of a file, and its arrays as [(name without prefixes, array)]."""
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
    # Names outside the blocks, such as classifier.weight, are those of many networks.
    known = {
        home: sum(BLOCK[:-1] in (_our_name(name, layout) or "") for name, _ in parts)
        for home, layout in _LAYOUTS.items()
    }
    home = max(known, key=known.get)
    if not known[home]:
        raise ValueError(
            "the file must contain a Vision Transformer with the parameter names of "
            f"Google, timm or Hugging Face, got {some_names(arrays)}."
        )
    return home, parts


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
    names = (f"{MLP}/Dense_{i}/kernel".replace("#", "0") for i in (0, 1))
    first, second = (np.shape(arrays.get(name)) for name in names)  # (out, in)
    if first and first[0] == 2 * second[-1]:
        raise ValueError(
            "not supported: a gated MLP (SwiGLU), Dense_0 has twice as many outputs as "
            "Dense_1 has inputs."
        )


def _torch_head_dim(arrays, num_heads):
    """d, for attentions that store their heads as one axis of size H d."""
    sizes = width, _ = _attention_and_mlp(arrays)
    if num_heads is None:
        if sizes not in _KNOWN_HEADS:
            raise ValueError(
                f"the number of heads is unknown: there is no config.json that tells "
                f"it, and width {sizes[0]} with an MLP of {sizes[1]} is not that of a "
                "published network; set num_heads."
            )
        num_heads = _KNOWN_HEADS[sizes]
        for size, what, is_so, other, where in (
            (192, "a fixed position embedding", _has_fixed_positions, 12, "MAE-Lite"),
            (384, "a fixed position embedding", _has_fixed_positions, 12, "MoCo v3"),
            (768, "patches alone", _has_no_prefix, 16, "vit_base_patch16_gap_224"),
        ):
            if sizes == (size, 4 * size) and is_so(arrays):
                raise ValueError(
                    f"the number of heads is unknown: a network of width {size} with "
                    f"{what} has {other} heads in {where} and {num_heads} in others; "
                    "set num_heads."
                )
    if width % num_heads:
        raise ValueError(
            f"num_heads must divide the attention's width {width}, got {num_heads}."
        )
    return width // num_heads


def _attention_and_mlp(arrays):
    """H d and M of the first layer."""
    names = (
        (f"{ATTENTION}/query/kernel", "(H d, D)"),
        (f"{MLP}/Dense_0/kernel", "(M, D)"),
    )
    return tuple(
        shape_of(arrays, name.replace("#", "0"), axes)[0] for name, axes in names
    )


def _has_fixed_positions(arrays):
    """Whether CLS has a position of zeros, as before sines and cosines."""
    positions = arrays.get(POSITIONS)
    return "cls" in arrays and np.ndim(positions) == 3 and not positions[0, 0].any()


def _has_no_prefix(arrays):
    return arrays.keys().isdisjoint(("cls", "registers"))


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
        factors = to_float32(name, arrays.pop(name))
        for leaf in ("kernel", "bias"):
            target = f"{block}/{module}/{leaf}"
            if np.shape(arrays.get(target))[-1:] != factors.shape:
                raise ValueError(f"{name} {factors.shape} does not fit {target}.")
            arrays[target] = to_float32(target, arrays[target]) * factors


def _complete_positions(arrays, sources, home, grid, told, asked):
    """Gives every token before the patches a row: zeros where the file has none.

    `grid` is given, `told` is that of a config.json, which may keep an older size, and
    `asked` that of the images. Returns the grid, None if it is not known.
    """
    if np.ndim(arrays.get(POSITIONS)) != 3:
        return grid
    num_cls, extra = int("cls" in arrays), 0
    if "registers" in arrays:
        extra = shape_of(arrays, "registers", "(1, R, D)")[1]
    num_prefix = num_cls + extra
    rows = {
        "google": (num_cls, 0) if sources[POSITIONS] in _BIG_VISION else (num_cls,),
        "timm": (num_prefix, 0),
        "hugging_face": (num_prefix,),
        "dinov2": (num_cls,),
    }[home]
    num_positions = arrays[POSITIONS].shape[1]
    if not grid and told and any(is_grid(num_positions - n, told) for n in rows):
        grid = told
    shapes = [grid] if grid or not asked else [None, asked]
    rows = {n for n in rows for shape in shapes if is_grid(num_positions - n, shape)}
    rows = sorted(rows, reverse=True)
    if len(rows) > 1:
        raise ValueError(
            f"{POSITIONS} has {num_positions} rows, a grid of patches after "
            f"{rows[0]} and after {rows[1]} tokens; set grid."
        )
    if rows and rows[0] < num_prefix:
        positions = to_float32(POSITIONS, arrays[POSITIONS])
        absent = np.zeros((1, num_prefix - rows[0], positions.shape[2]), np.float32)
        parts = positions[:, : rows[0]], absent, positions[:, rows[0] :]
        arrays[POSITIONS] = np.concatenate(parts, axis=1)
    return grid


def _torch_settings(path, home, sources, arrays):
    """The fields of `ViT` and the grid that a config.json and the names tell."""
    config = _read_config(path)
    _check_same_network(path, config | _entry(config, "model_args"), arrays)
    if home == "timm" and not config.get("architecture"):
        _check_not_res_post_norm(sources.values(), arrays)
    read = _timm_config if home == "timm" else _hugging_face_config
    settings = read(config, set(sources.values()), arrays)
    return check_settings(path.name, settings)


def _check_not_res_post_norm(names, arrays):
    """Raises ValueError for a network that only its architecture tells from others."""
    width = np.shape(arrays.get("embedding/kernel"))[:1]
    usual = re.compile(r"cls_token|\.attn\.query\.bias|\.ls1\.")
    if (
        width == (768,)
        and "fc_norm.weight" in names
        and not any(map(usual.search, names))
    ):
        raise ValueError(
            "the parameters may be those of vit_base_patch16_rpn_224, which normalizes "
            "the updates (res-post-norm) and is not supported; if they are not, name "
            'the "architecture" in a config.json next to the file.'
        )


def _read_config(path):
    return json_object(path.name, path.read_bytes()) if path.is_file() else {}


def _check_same_network(path, config, arrays):
    """Raises ValueError if the sizes in a config.json are not those of the weights."""
    blocks = {re.match(r"Transformer/encoderblock_\d+/", name) for name in arrays}
    depth = len({block[0] for block in blocks if block})
    kernel = np.shape(arrays.get("embedding/kernel"))  # (D, C, p, p)
    width, side = (kernel[0], kernel[-1]) if len(kernel) == 4 else (None, None)
    hidden, *_ = np.shape(arrays.get(f"{MLP}/Dense_0/kernel".replace("#", "0"))) or [0]
    for name, size in (
        *(("hidden_size", width), ("embed_dim", width)),
        *(("num_hidden_layers", depth), ("depth", depth)),
        *(("intermediate_size", hidden), ("patch_size", side)),
    ):
        told = config.get(name)
        if size and isinstance(told, int) and told != size:
            raise ValueError(
                f"{path.name} is of another network: {name} is {told}, that of the "
                f"weights is {size}."
            )


def _timm_config(config, sources, arrays):
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
    # With an architecture, the other networks of the same width are out of question.
    num_heads = _KNOWN_HEADS.get(_attention_and_mlp(arrays)) if architecture else None
    if architecture == "vit_base_patch16_gap_224":
        num_heads = 16
    num_heads = arguments.get("num_heads", num_heads)
    if num_heads is not None:
        settings["num_heads"] = num_heads
    size = _entry(config, "pretrained_cfg").get("input_size", (0, 0, 0))[-2:]
    size = arguments.get("img_size", size)
    patch = arguments.get("patch_size")
    if patch is None and (found := re.search(r"_patch(\d+)", architecture)):
        patch = int(found[1])
    return settings | _grid_setting(size, patch)


def _hugging_face_config(config, sources, arrays):
    del sources, arrays
    _check_supported([str(config.get("model_type", ""))])
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
        grid = tuple(side // patch_size for side in pair(image_size))
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    return {"grid": grid} if len(grid) == 2 and min(grid) > 0 else {}


def check_settings(source: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ViT` and the grid that a source names.

    Raises:
      ValueError: if one of them is not valid.
    """
    allowed = {
        "gelu": lambda value: value in ("tanh", "erf"),
        "ln_eps": lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value < math.inf
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
