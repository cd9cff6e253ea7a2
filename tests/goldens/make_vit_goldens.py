"""Writes vit_layout.npz and vit_logits.npz: a Google-layout file and its logits.

    python tests/goldens/make_vit_goldens.py

The names and shapes are those of the files of google-research/vision_transformer
(Dosovitskiy et al. 2021, arXiv 2010.11929), written out here by hand. The logits are
computed in float64 by tests/vit_oracle.py, which follows the equations with NumPy loops
over images, layers, heads and queries and uses nothing of vit/.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CONFIG = {
    "num_layers": 2,
    "hidden_size": 12,
    "num_heads": 3,
    "mlp_dim": 20,
    "patch_size": 4,
    "num_classes": 7,
    "representation_size": None,
    "image_size": 12,
}
NUM_IMAGES, NUM_CHANNELS = 3, 3


def shapes():
    """{path joined by "/": shape} of all parameters of the file."""
    dim, mlp_dim, size = CONFIG["hidden_size"], CONFIG["mlp_dim"], CONFIG["patch_size"]
    heads, num_classes = CONFIG["num_heads"], CONFIG["num_classes"]
    num_tokens = (CONFIG["image_size"] // size) ** 2 + 1
    result = {
        "embedding/kernel": (size, size, NUM_CHANNELS, dim),
        "embedding/bias": (dim,),
        "cls": (1, 1, dim),
        "Transformer/posembed_input/pos_embedding": (1, num_tokens, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, num_classes),
        "head/bias": (num_classes,),
    }
    for layer in range(CONFIG["num_layers"]):
        block = f"Transformer/encoderblock_{layer}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            result[f"{block}/{norm}/scale"] = (dim,)
            result[f"{block}/{norm}/bias"] = (dim,)
        for name in ("query", "key", "value"):
            result[f"{attention}/{name}/kernel"] = (dim, heads, dim // heads)
            result[f"{attention}/{name}/bias"] = (heads, dim // heads)
        result[f"{attention}/out/kernel"] = (heads, dim // heads, dim)
        result[f"{attention}/out/bias"] = (dim,)
        result[f"{block}/MlpBlock_0/Dense_0/kernel"] = (dim, mlp_dim)
        result[f"{block}/MlpBlock_0/Dense_0/bias"] = (mlp_dim,)
        result[f"{block}/MlpBlock_0/Dense_1/kernel"] = (mlp_dim, dim)
        result[f"{block}/MlpBlock_0/Dense_1/bias"] = (dim,)
    return result


def make_params(seed=0):
    """{path: float32}; no parameter has a value at which its effect vanishes."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, shape in shapes().items():
        if path.endswith("scale"):
            value = rng.uniform(0.5, 1.5, shape)
        elif path.endswith("kernel"):
            to_heads = path.split("/")[-2] in ("query", "key", "value")
            num_inputs = shape[0] if to_heads else math.prod(shape[:-1])
            value = rng.normal(0, 1.5 / math.sqrt(num_inputs), shape)
        else:
            value = rng.normal(0, 0.5, shape)
        params[path] = np.float32(value)
    return params


def nested(params):
    """The parameters as nested dictionaries."""
    tree = {}
    for path, value in params.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def main():
    sys.path.insert(0, str(HERE.parent))
    import vit_oracle

    params = make_params()
    size = CONFIG["image_size"]
    rng = np.random.default_rng(1)
    images = np.float32(rng.uniform(-1, 1, (NUM_IMAGES, size, size, NUM_CHANNELS)))
    logits = vit_oracle.forward(nested(params), images, gelu="tanh").logits
    np.savez_compressed(HERE / "vit_layout.npz", **params)
    np.savez_compressed(
        HERE / "vit_logits.npz",
        config=json.dumps(CONFIG),
        images=images,
        logits=np.float32(logits),
    )


if __name__ == "__main__":
    main()
