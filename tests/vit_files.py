"""A Vision Transformer in NumPy, and its files in every layout.

A network is a dictionary; its matrices are (out, in), as in PyTorch. A layout converts
it to the {name: array} of the files of one library: `linen` and the rest of GOOGLE, and
TORCH.
"""

import math

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util
from numerics import run

from vit.checkpoint import load_checkpoint

POSITIONS = "Transformer/posembed_input/pos_embedding"


def network(  # Sizes all differ.
    seed=0,
    *,
    size=3,
    channels=2,
    width=12,
    heads=3,
    hidden=20,
    layers=2,
    grid=4,
    classes=5,
    representation=None,
):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return rng.normal(0, scale, shape).astype(np.float32)

    def linear(out, inputs, gain=1.0):
        return normal(out, inputs, scale=gain / inputs**0.5), normal(out, scale=0.3)

    def norm():
        return 1 + normal(width, scale=0.3), normal(width, scale=0.3)

    def block():
        return {
            "norm1": norm(),
            # Sharp attention and a hidden layer far from zero: nothing averages out.
            "query": linear(width, width, 2),
            "key": linear(width, width, 2),
            "value": linear(width, width),
            "out": linear(width, width),
            "norm2": norm(),
            "fc1": linear(hidden, width, 2),
            "fc2": linear(width, hidden),
        }

    net = {
        "heads": heads,
        "cls": normal(width),
        "positions": normal(1 + grid**2, width),
        "patch": (normal(width, channels, size, size, scale=0.3), normal(width)),
        "blocks": [block() for _ in range(layers)],
        "norm": norm(),
    }
    if representation:
        net["pre_logits"] = linear(representation, width)
    if classes:
        net["head"] = linear(classes, representation or width)
    return net


def images_of(net, grid=4, num=2):
    _, channels, size, _ = net["patch"][0].shape
    shape = num, grid * size, grid * size, channels
    return np.random.default_rng(9).uniform(-1, 1, shape).astype(np.float32)


def forward(net, images, gelu, eps, pool="cls"):
    return np.stack([forward_one(net, image, gelu, eps, pool) for image in images])


def forward_one(net, image, gelu, eps, pool="cls"):
    """Dosovitskiy et al. 2021, equations 1 to 4, one image (H, W, C), in float64."""
    kernel, bias = net["patch"]
    size = kernel.shape[-1]
    tokens = [net["cls"]] if "cls" in net else []
    tokens += list(net.get("registers", ()))
    prefix = len(tokens)
    for top in range(0, image.shape[0], size):
        for left in range(0, image.shape[1], size):
            patch = image[top : top + size, left : left + size].transpose(2, 0, 1)
            tokens.append([np.sum(filter_ * patch) for filter_ in kernel] + bias)
    z = np.array(tokens, np.float64) + net["positions"]
    for block in net["blocks"]:
        y = attention(layer_norm(z, block["norm1"], eps), block, net["heads"])
        z = z + block.get("scale1", 1) * y
        hidden = affine(layer_norm(z, block["norm2"], eps), block["fc1"])
        y = affine(np.vectorize(GELU[gelu])(hidden), block["fc2"])
        z = z + block.get("scale2", 1) * y
    if pool == "mean_before_norm":
        y = layer_norm(z[prefix:].mean(0), net["norm"], eps)
    else:
        z = layer_norm(z, net["norm"], eps)
        mean = z[prefix:].mean(0)
        y = {"cls": z[0], "mean": mean, "cls_and_mean": np.append(z[0], mean)}[pool]
    if "pre_logits" in net:
        y = np.tanh(affine(y, net["pre_logits"]))
    if "head_dist" in net:
        return (affine(y, net["head"]) + affine(z[1], net["head_dist"])) / 2
    return affine(y, net["head"]) if "head" in net else y


def affine(x, linear):
    return x @ linear[0].astype(np.float64).T + linear[1]


def layer_norm(x, norm, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * norm[0] + norm[1]


GELU = {
    "erf": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "tanh": lambda x: (
        x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


def attention(x, block, heads):
    query, key, value = (affine(x, block[k]) for k in ("query", "key", "value"))
    rows = []
    for i in range(len(x)):
        row = []
        for part in np.split(np.arange(query.shape[1]), heads):
            logits = key[:, part] @ query[i, part] / math.sqrt(len(part))
            weights = np.exp(logits - logits.max())
            row.append(weights / weights.sum() @ value[:, part])
        rows.append(np.concatenate(row))
    return affine(np.array(rows), block["out"])


def linen(net):
    """The file of google-research/vision_transformer."""

    def by_head(matrix):
        parts = np.split(matrix, net["heads"])
        return np.stack([part.T for part in parts], axis=1)  # (D, H, d)

    arrays = {
        "cls": net["cls"][None, None],
        POSITIONS: net["positions"][None],
        "embedding/kernel": np.moveaxis(net["patch"][0], (0, 1), (3, 2)),
        "embedding/bias": net["patch"][1],
        "Transformer/encoder_norm/scale": net["norm"][0],
        "Transformer/encoder_norm/bias": net["norm"][1],
    }
    for i, block in enumerate(net["blocks"]):
        start = f"Transformer/encoderblock_{i}"
        for name in ("query", "key", "value"):
            module = f"{start}/MultiHeadDotProductAttention_0/{name}"
            kernel, bias = block[name]
            arrays[f"{module}/kernel"] = by_head(kernel)
            arrays[f"{module}/bias"] = np.stack(np.split(bias, net["heads"]))
        module = f"{start}/MultiHeadDotProductAttention_0/out"
        parts = np.split(block["out"][0], net["heads"], axis=1)
        arrays[f"{module}/kernel"] = np.stack([part.T for part in parts])  # (H, d, D)
        arrays[f"{module}/bias"] = block["out"][1]
        for i, name in enumerate(("norm1", "norm2")):
            arrays[f"{start}/LayerNorm_{i}/scale"] = block[name][0]
            arrays[f"{start}/LayerNorm_{i}/bias"] = block[name][1]
        for i, name in enumerate(("fc1", "fc2")):
            arrays[f"{start}/MlpBlock_0/Dense_{i}/kernel"] = block[name][0].T
            arrays[f"{start}/MlpBlock_0/Dense_{i}/bias"] = block[name][1]
    for name in net.keys() & {"pre_logits", "head"}:
        arrays[f"{name}/kernel"] = net[name][0].T
        arrays[f"{name}/bias"] = net[name][1]
    return arrays


def pre_linen(net):
    return {
        name.replace("/LayerNorm_1/", "/LayerNorm_2/")
        .replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        .replace("MlpBlock_0", "MlpBlock_3"): value
        for name, value in linen(net).items()
    }


def opt_target(net):
    arrays = {f"opt/target/{name}": value for name, value in pre_linen(net).items()}
    return arrays | {"opt/state/step": np.int64(3), "extra/seen": np.arange(2)}


def big_vision(net):
    arrays = linen(net)
    positions = arrays.pop(POSITIONS)
    arrays["cls"] = arrays["cls"] + positions[:, :1]
    arrays["pos_embedding"] = positions[:, 1:]
    arrays = {f"params/{name}": value for name, value in arrays.items()}
    return arrays | {"opt/0/mu/cls": np.zeros(3, np.float32)}


def big_vision_stacked(net):
    arrays = big_vision(net)
    start = "params/Transformer/encoderblock"
    for name in [name for name in arrays if name.startswith(f"{start}_0")]:
        leaf = name.removeprefix(f"{start}_0/")
        layers = [arrays.pop(f"{start}_{i}/{leaf}") for i in range(len(net["blocks"]))]
        arrays[f"{start}/{leaf}"] = np.stack(layers)
    return arrays


def big_vision_old(net):
    """From before its CLS token left the position embedding."""
    arrays = linen(net)
    arrays["Transformer/pos_embedding"] = arrays.pop(POSITIONS)
    return arrays


def torch_file(net, names):
    """{theirs.weight, theirs.bias} of {(block or None, ours): theirs}."""
    arrays = {}
    modules = {(None, name): value for name, value in net.items()}
    for i, block in enumerate(net["blocks"]):
        modules |= {(i, name): value for name, value in block.items()}
    for (i, name), theirs in names.items():
        for block in [None] if i is None else range(len(net["blocks"])):
            if (block, name) in modules:
                module = theirs.format(block)
                weight, bias = modules[block, name]
                arrays |= {f"{module}.weight": weight, f"{module}.bias": bias}
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def timm(net):
    blocks = [
        {
            **block,
            "qkv": [
                np.concatenate([block[name][i] for name in ("query", "key", "value")])
                for i in (0, 1)
            ],
        }
        for block in net["blocks"]
    ]
    names = {
        (None, "patch"): "patch_embed.proj",
        (0, "norm1"): "blocks.{}.norm1",
        (0, "qkv"): "blocks.{}.attn.qkv",
        (0, "out"): "blocks.{}.attn.proj",
        (0, "norm2"): "blocks.{}.norm2",
        (0, "fc1"): "blocks.{}.mlp.fc1",
        (0, "fc2"): "blocks.{}.mlp.fc2",
        (None, "norm"): "norm",
        (None, "pre_logits"): "pre_logits.fc",
        (None, "head"): "head",
    }
    return torch_file(net | {"blocks": blocks}, names) | {
        "cls_token": net["cls"][None, None],
        "pos_embed": net["positions"][None],
    }


def timm_average(net):
    """With global_pool="avg": the last normalization follows the pooling."""
    arrays = timm(net)
    for leaf in ("weight", "bias"):
        arrays[f"fc_norm.{leaf}"] = arrays.pop(f"norm.{leaf}")
    return arrays


def timm_without_cls_row(net):
    arrays = timm(net)
    arrays["cls_token"] = arrays["cls_token"] + arrays["pos_embed"][:, :1]
    arrays["pos_embed"] = np.ascontiguousarray(arrays["pos_embed"][:, 1:])
    return arrays


def hugging_face(net, prefix="vit."):
    layer = f"{prefix}encoder.layer.{{}}"
    names = {
        (None, "patch"): f"{prefix}embeddings.patch_embeddings.projection",
        (0, "norm1"): f"{layer}.layernorm_before",
        (0, "query"): f"{layer}.attention.attention.query",
        (0, "key"): f"{layer}.attention.attention.key",
        (0, "value"): f"{layer}.attention.attention.value",
        (0, "out"): f"{layer}.attention.output.dense",
        (0, "norm2"): f"{layer}.layernorm_after",
        (0, "fc1"): f"{layer}.intermediate.dense",
        (0, "fc2"): f"{layer}.output.dense",
        (None, "norm"): f"{prefix}layernorm",
        (None, "head"): "classifier",
    }
    return torch_file(net, names) | {
        f"{prefix}embeddings.cls_token": net["cls"][None, None],
        f"{prefix}embeddings.position_embeddings": net["positions"][None],
    }


def hugging_face_encoder(net):
    pooler = {
        "pooler.dense.weight": np.ones((12, 12), np.float32),
        "pooler.dense.bias": np.ones(12, np.float32),
    }
    return hugging_face(net, prefix="") | pooler


def hugging_face_in_memory(net):
    """The names of `state_dict()` in transformers 5."""
    arrays = hugging_face(net)
    for old, new in (
        ("encoder.layer", "layers"),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ):
        arrays = {name.replace(old, new): value for name, value in arrays.items()}
    return arrays


TORCH = (
    timm,
    timm_average,
    timm_without_cls_row,
    hugging_face,
    hugging_face_encoder,
    hugging_face_in_memory,
)
GOOGLE = (linen, pre_linen, opt_target, big_vision, big_vision_stacked, big_vision_old)
EPSILON = dict.fromkeys(TORCH[3:], 1e-12)


def write(folder, layout, net, arrays=None):
    arrays = layout(net) if arrays is None else arrays
    if layout in TORCH:
        path = folder / "model.safetensors"
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    else:
        path = folder / "model.npz"
        np.savez(path, **arrays)
    return path


def load(path, layout, net, **kwargs):
    heads = net["heads"] if layout in TORCH else None
    return load_checkpoint(path, num_heads=heads, **kwargs)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def random(*shape):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def apply(model, params, images):
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(lambda p: model.apply({"params": p}, images), params))
