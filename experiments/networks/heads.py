"""The networks that can classify latents, by the name in config.model.type.

Axes: B latents, *Z shape of a latent, which is (L,) or, for a grid with sides *G and C
channels, (*G, C); K classes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import vit
from experiments.networks.convnext import ConvNeXt
from functa.classifier import MLP
from vit.model import check_model


class Head(NamedTuple):
    """A network on latents of one shape.

    Attributes:
      num_classes: K.
      model: the module.
      init: key -> params.
      apply: (params, latents (B, *Z), key=None, dropout_rate=None) -> logits (B, K).
        A key turns on the regularization of training. A dropout rate, which may be
        traced, is an argument of the MLP only; the others have fields instead.
    """

    num_classes: int
    model: nn.Module
    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]


def make_head(
    settings: Mapping[str, Any],
    num_classes: int,
    latent_shape: tuple[int, ...],
    *,
    entry: str = "model",
) -> Head:
    """Makes the network settings["type"] with the other settings as its fields.

    Args:
      settings: {"type": mlp, vit or convnext, **fields}. `vit` has the fields of
        `vit.ViT`, whose patches are the cells of the grid, and `token_drop`, the share
        of the cells that a training step removes from each grid.
      num_classes: K.
      latent_shape: *Z.
      entry: name of `settings` in the config, for errors.

    Raises:
      ValueError: if the type or a field is unknown, or if the network does not take
        latents of this shape.
    """
    # A Flax module with a list among its fields cannot be hashed.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    name = fields.pop("type")
    if name not in _HEADS:
        raise ValueError(
            f"config.{entry}.type must be one of {', '.join(_HEADS)}; got {name!r}."
        )
    if not 0 <= fields.get("token_drop", 0) < 1:
        raise ValueError(
            f"config.{entry}.token_drop must be in [0, 1), got {fields['token_drop']}."
        )
    if name != "mlp" and len(latent_shape) < 2:
        raise ValueError(
            f"the head {name} needs grids of latents (N, h, w, C), but an image here "
            f"has one latent, {latent_shape}; use the head mlp."
        )
    try:
        model, shape, apply = _HEADS[name](fields, num_classes, latent_shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{entry}: {error}") from None

    def init(key):
        return model.init(key, jnp.zeros((1, *shape)))["params"]

    return Head(num_classes, model, init, apply)


# Each makes the module, the shape of one of its inputs, and the `apply` of its head.


def _mlp(fields, num_classes, latent_shape):
    model = MLP(**fields, num_classes=num_classes)
    if not all(type(width) is int and width > 0 for width in model.hidden_sizes):
        raise ValueError(
            "hidden_sizes must be a tuple of positive integers, got "
            f"{model.hidden_sizes}."
        )
    size = math.prod(latent_shape)

    def apply(params, latents, *, key=None, dropout_rate=None):
        options = {}
        if key is not None and dropout_rate is not None:
            options = {"dropout_rate": dropout_rate, "key": key}
        return model.apply({"params": params}, latents.reshape(-1, size), **options)

    return model, (size,), apply


def _vit(fields, num_classes, latent_shape):
    fields = dict(fields)
    token_drop = fields.pop("token_drop", 0.0)
    model = vit.ViT(num_classes=num_classes, patch_size=1, **fields)
    check_model(model)
    *grid, channels = latent_shape
    num_cells = math.prod(grid)
    shape = num_cells, 1, channels
    trained = model
    if token_drop:
        # PatchDropout (Liu et al. 2023, arXiv 2208.07220), as in train_vit.
        kept = max(round((1 - token_drop) * num_cells), 1)
        cascade = vit.Cascade(keep=(kept,) * model.num_layers, score="random")
        trained = model.clone(cascade=cascade)

    def apply(params, latents, *, key=None):
        # The positions are learned, so a grid of any rank can be a column of cells.
        cells = latents.reshape(-1, *shape)
        if key is None:
            return model.apply({"params": params}, cells)
        rngs = dict(zip(("dropout", "cascade"), jax.random.split(key), strict=True))
        return trained.apply({"params": params}, cells, train=True, rngs=rngs)

    return model, shape, apply


def _convnext(fields, num_classes, latent_shape):
    model = ConvNeXt(num_classes, **fields)
    sizes = (*model.widths, *model.depths)
    if len(model.widths) != len(model.depths) or not all(
        type(size) is int and size > 0 for size in sizes
    ):
        raise ValueError(
            f"widths {model.widths} and depths {model.depths} must have "
            "one positive integer per stage."
        )
    if model.activation not in ("gelu", "relu", "silu"):
        raise ValueError(
            f"activation must be one of gelu, relu, silu; got {model.activation!r}."
        )
    if model.product_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"product_dtype must be float32 or bfloat16; got {model.product_dtype!r}."
        )
    if not 0 <= model.drop_path_rate < 1:
        raise ValueError(
            f"drop_path_rate must be in [0, 1), got {model.drop_path_rate}."
        )
    factor = 2 ** (len(model.widths) - 1)
    grid = latent_shape[:-1]
    if len(grid) != 2 or any(side % factor for side in grid):
        raise ValueError(
            f"the head convnext with {len(model.widths)} stages needs grids (h, w) "
            f"whose sides are multiples of {factor}, got {grid}."
        )

    def apply(params, latents, *, key=None):
        if key is None:
            return model.apply({"params": params}, latents)
        return model.apply(
            {"params": params}, latents, train=True, rngs={"dropout": key}
        )

    return model, latent_shape, apply


_HEADS = {"mlp": _mlp, "vit": _vit, "convnext": _convnext}


def with_features(
    apply_fn: Callable[[jax.Array], jax.Array], inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The outputs of a network, and the features (B, D) that its last layer reads.

    Args:
      apply_fn: inputs -> outputs, by a network that ends with a dense layer.
      inputs: (B, ...).
    """
    read = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            read.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        outputs = apply_fn(inputs)
    return outputs, read[-1]
