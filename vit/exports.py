"""Parameters and configurations of a Vision Transformer for timm and Hugging Face."""

import math
import re

import numpy as np

from vit.layouts import (
    BLOCK,
    HUGGING_FACE_DINO,
    HUGGING_FACE_VIT,
    TIMM,
    torch_names,
)
from vit.model import ViT
from vit.positions import POSITIONS


def check_expressible(model: ViT, names: str) -> None:
    """Checks that a library, "timm" or "huggingface", can express a model.

    Raises:
      ValueError: if the library has no network that computes the same.
    """
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
    theirs = {ours: name for name, ours in torch_names(modules).items()}
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


def _mlp_ratio(model):
    """The quotient r of which timm's int(hidden_size * r) is mlp_dim again."""
    ratio = model.mlp_dim / model.hidden_size
    rounds_down = int(model.hidden_size * ratio) < model.mlp_dim
    return math.nextafter(ratio, math.inf) if rounds_down else ratio


def _to_timm(model, arrays, grid, stated):
    modules = {name: ours for name, ours in TIMM.items() if "LayerScale" not in ours}
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
        "mlp_ratio": _mlp_ratio(model),
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
    config = {
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
            **stated,
        },
    }
    return arrays, {"config.json": config}


def _to_hugging_face(model, arrays, grid, stated):
    dino = _is_dino(model)
    table = HUGGING_FACE_DINO if dino else HUGGING_FACE_VIT
    kind = "dinov2" if dino else "deit" if model.distilled else "vit"
    prefix, unused = kind, {"embeddings.register_tokens", "classifier"}
    if not model.distilled:
        unused = {"embeddings.distillation_token", "cls_classifier"}
    if dino and model.num_registers:
        # These have no positions.
        kind = prefix = "dinov2_with_registers"
        first, last = 1, 1 + model.num_registers
        positions = arrays[POSITIONS]
        arrays["registers"] = arrays["registers"] + positions[:, first:last]
        arrays[POSITIONS] = np.delete(positions, np.s_[first:last], axis=1)
    if dino:
        ones = np.ones(model.hidden_size, np.float32)
        arrays |= {
            f"{BLOCK}/LayerScale_{i}".replace("#", str(layer)): ones
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
    configs = {"config.json": config}
    if stated:
        configs["preprocessor_config.json"] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": size[0], "width": size[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": stated["mean"],
            "image_std": stated["std"],
        }
    return arrays, configs


# {library: function of model, arrays, grid and {"mean": (C,), "std": (C,)} or {} that
# gives its arrays and {name of a file: its content}}
WRITERS = {"timm": _to_timm, "huggingface": _to_hugging_face}
