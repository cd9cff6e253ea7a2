"""Multiply-adds and parameters of a Vision Transformer under a cascade, closed form.

Counted are the matrix products: with n tokens in the attention and m in the MLP, width
D, I = H * d and MLP width M, a layer takes 4 n D I + 2 n^2 I + 2 m D M. Normalisations,
softmax, GELU and the choice of tokens are not counted. ViT-B/16 at 224 pixels comes to
17.6e9, which the literature prints as "17.6 GFLOPs".
"""

from typing import NamedTuple

from vit import cascade as cascades
from vit import model as models
from vit.cascade import Cascade
from vit.model import ViT


class Cost(NamedTuple):
    """What one image costs.

    Attributes:
      total: multiply-adds of all.
      embedding: of stem and patches.
      attention: of each layer, (L,).
      mlp: of each layer, (L,).
      head: of head and pre_logits.
      attention_tokens: tokens that each layer's attention works on, CLS included, (L,).
      mlp_tokens: likewise of the MLPs.
    """

    total: int
    embedding: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    head: int
    attention_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]


def count(model: ViT, image_size: int | tuple[int, int], *, channels: int = 3) -> Cost:
    """The cost of one image under `model` and its cascade.

    A masked cascade costs as much as none.

    Args:
      model: the network.
      image_size: side, or (height, width), in pixels.
      channels: of the images.

    Raises:
      ValueError: if the images do not divide into patches, or the cascade does not fit.
    """
    models.check_model(model)
    shape = (image_size, image_size) if isinstance(image_size, int) else image_size
    num_patches = models.count_patches(shape, model.patch_size)
    width = model.hidden_size
    embedding, inputs, pixels = 0, channels, shape[0] * shape[1]
    for features in model.stem:
        pixels //= 4
        embedding += pixels * 9 * inputs * features
        inputs = features
    embedding += pixels * inputs * width
    tokens = token_counts(model.cascade, num_patches, model.num_layers)
    attention, mlp = [], []
    for layer, (queries, rows) in enumerate(tokens):
        attention.append(_attention(model, layer, queries))
        mlp.append(2 * rows * width * models.per_layer(model.mlp_dim, layer))
        if model.cascade is not None and model.cascade.score == "merge":
            side = (queries + 1) // 2, queries // 2
            # Which are alike, and their sums.
            depth = (model.head_dim or width // model.num_heads) + width
            mlp[-1] += (queries > rows) * side[0] * side[1] * depth
    features = model.representation_size or width
    head = (model.representation_size is not None) * width * features
    head += features * model.num_classes
    return Cost(
        total=embedding + sum(attention) + sum(mlp) + head,
        embedding=embedding,
        attention=tuple(attention),
        mlp=tuple(mlp),
        head=head,
        attention_tokens=tuple(queries for queries, _ in tokens),
        mlp_tokens=tuple(rows for _, rows in tokens),
    )


def token_counts(
    cascade: Cascade | None, num_patches: int, num_layers: int
) -> tuple[tuple[int, int], ...]:
    """Rows that each layer's attention and MLP really compute, CLS included, (L, 2).

    The zeroed tokens of the "zero" semantics are one row together.
    """
    if cascade is not None:
        cascades.check_fits(cascade, num_patches, num_layers)
    if cascade is None or cascade.mode == "masked":
        return ((num_patches + 1,) * 2,) * num_layers
    zeroed = cascade.semantics == "zero"
    return tuple(
        tuple(keep + 1 + (zeroed and keep < num_patches) for keep in pair)
        for pair in cascade.counts
    )


def count_params(model: ViT, image_size: int, *, channels: int = 3) -> int:
    """Number of parameters, whatever the cascade."""
    models.check_model(model)
    shape = (image_size, image_size)
    num_patches = models.count_patches(shape, model.patch_size)
    width = model.hidden_size
    total, inputs = 0, channels
    for features in model.stem:
        total += (9 * inputs + 2) * features
        inputs = features
    side = model.patch_size // 2 ** len(model.stem)
    total += (side**2 * inputs + 1) * width
    total += width + (num_patches + 1) * width  # CLS and positions
    for layer in range(model.num_layers):
        heads = models.per_layer(model.num_heads, layer)
        inner = heads * (model.head_dim or width // heads)
        hidden = models.per_layer(model.mlp_dim, layer)
        total += 4 * width  # two normalisations
        total += 3 * (width + 1) * inner + (inner + 1) * width
        total += (width + 1) * hidden + (hidden + 1) * width
    total += 2 * width
    features = width
    if model.representation_size is not None:
        features = model.representation_size
        total += (width + 1) * features
    return total + (model.num_classes and (features + 1) * model.num_classes)


def _attention(model, layer, tokens):
    width, cascade = model.hidden_size, model.cascade
    heads = models.per_layer(model.num_heads, layer)
    depth = model.head_dim or width // heads
    used = heads
    if cascade is not None and cascade.keep_heads and cascade.mode == "compact":
        used = cascade.keep_heads[layer]
    inner, kept = heads * depth, used * depth
    scored = tokens * width * 2 * inner + tokens**2 * inner
    return scored + 2 * tokens * width * kept + tokens**2 * kept
