"""Multiply-adds and parameters of a Vision Transformer and its cascade, closed form.

Only matrix products are counted. A layer with n tokens in the attention, m in the MLP,
width D, I = H * d and MLP width M takes 4 n D I + 2 n^2 I + 2 m D M multiply-adds.
Normalizations, softmax, GELU and the selection of tokens are not counted. ViT-B/16 at
224 pixels takes 17.6e9, which the literature reports as "17.6 GFLOPs".

Axes: L layers, D width, H heads, d width of a head, M width of the MLP.
"""

from typing import NamedTuple

from vit import cascade as cascades
from vit import model as models
from vit.cascade import Cascade
from vit.model import ViT
from vit.positions import pair


class Cost(NamedTuple):
    """Multiply-adds of one image.

    Attributes:
      total: multiply-adds of the whole network.
      embedding: multiply-adds of the stem and the patch embedding.
      attention: multiply-adds of each layer's attention, (L,).
      mlp: multiply-adds of each layer's MLP, (L,).
      head: multiply-adds of the head and `pre_logits`.
      attention_tokens: tokens in each layer's attention, CLS included, (L,).
      mlp_tokens: tokens in each layer's MLP, CLS included, (L,).
    """

    total: int
    embedding: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    head: int
    attention_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]


def count(model: ViT, image_size: int | tuple[int, int], *, channels: int = 3) -> Cost:
    """Counts the multiply-adds of one image.

    A cascade in mode "masked" saves nothing: it costs as much as no cascade.

    Args:
      model: the network, with or without a cascade.
      image_size: side, or (height, width), in pixels.
      channels: channels of the images.

    Returns:
      The multiply-adds and token counts by layer.

    Raises:
      ValueError: if the images do not divide into patches, or the cascade does not fit.

    Example:
      >>> import vit
      >>> model = vit.make("B", num_classes=1000, patch_size=16)
      >>> dense = vit.cost.count(model, image_size=224)
      >>> f"{dense.total / 1e9:.1f} G multiply-adds"
      '17.6 G multiply-adds'
      >>> cascade = vit.schedules.cp_vit(0.4, num_layers=12, num_patches=196)
      >>> pruned = vit.cost.count(model.clone(cascade=cascade), image_size=224)
      >>> f"{1 - pruned.total / dense.total:.0%} saved at ratio 0.4"
      '22% saved at ratio 0.4'
    """
    models.check_model(model)
    shape = pair(image_size)
    num_patches = models.count_patches(shape, model.patch_size)
    width = model.hidden_size
    embedding, inputs, pixels = 0, channels, shape[0] * shape[1]
    for features in model.stem:
        pixels //= 4
        embedding += pixels * 9 * inputs * features
        inputs = features
    embedding += pixels * inputs * width
    tokens = token_counts(
        model.cascade, num_patches, model.num_layers, num_prefix=model.num_prefix
    )
    attention, mlp = [], []
    for layer, (queries, rows) in enumerate(tokens):
        attention.append(_attention(model, layer, queries))
        mlp.append(2 * rows * width * models.per_layer(model.mlp_dim, layer))
        if model.cascade is not None and model.cascade.score == "merge":
            side = (queries + 1) // 2, queries // 2
            # Similarities, and sums of the merged tokens.
            depth = (model.head_dim or width // model.num_heads) + width
            mlp[-1] += (queries > rows) * side[0] * side[1] * depth
    pooled = models.pooled_size(model)
    features = model.representation_size or pooled
    head = (model.representation_size is not None) * pooled * features
    head += features * model.num_classes * (1 + model.distilled)
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
    cascade: Cascade | None, num_patches: int, num_layers: int, *, num_prefix: int = 1
) -> tuple[tuple[int, int], ...]:
    """Rows that each layer's attention and MLP compute, CLS included.

    With semantics "zero", one row represents all zeroed tokens.

    Args:
      cascade: how the network is pruned, or None.
      num_patches: P.
      num_layers: L.
      num_prefix: number of tokens before the patches.

    Returns:
      Rows in attention and MLP of each layer, (L, 2).

    Raises:
      ValueError: if the cascade is for another network.
    """
    if cascade is not None:
        cascades.check_fits(cascade, num_patches, num_layers)
    if cascade is None or cascade.mode == "masked":
        return ((num_patches + num_prefix,) * 2,) * num_layers
    zeroed = cascade.semantics == "zero"
    return tuple(
        tuple(keep + num_prefix + (zeroed and keep < num_patches) for keep in pair)
        for pair in cascade.counts
    )


def count_params(
    model: ViT, image_size: int | tuple[int, int], *, channels: int = 3
) -> int:
    """Counts the parameters; a cascade does not change them.

    Args:
      model: the network.
      image_size: side of the images, or (height, width), in pixels.
      channels: channels of the images.

    Returns:
      The number of parameters.

    Raises:
      ValueError: if the images do not divide into patches.
    """
    models.check_model(model)
    shape = pair(image_size)
    num_patches = models.count_patches(shape, model.patch_size)
    width = model.hidden_size
    total, inputs = 0, channels
    for features in model.stem:
        total += (9 * inputs + 2) * features
        inputs = features
    side = model.patch_size // 2 ** len(model.stem)
    total += (side**2 * inputs + 1) * width
    # The prefix and the positions.
    total += (2 * model.num_prefix + num_patches) * width
    for layer in range(model.num_layers):
        heads = models.per_layer(model.num_heads, layer)
        inner = heads * (model.head_dim or width // heads)
        hidden = models.per_layer(model.mlp_dim, layer)
        total += 4 * width  # two normalizations
        total += 3 * (width + 1) * inner + (inner + 1) * width
        total += (width + 1) * hidden + (hidden + 1) * width
    total += 2 * width
    features = pooled = models.pooled_size(model)
    if model.representation_size is not None:
        features = model.representation_size
        total += (pooled + 1) * features
    return total + (1 + model.distilled) * (features + 1) * model.num_classes * (
        model.num_classes > 0
    )


def _attention(model, layer, tokens):
    width, cascade = model.hidden_size, model.cascade
    heads = models.per_layer(model.num_heads, layer)
    depth = model.head_dim or width // heads
    choice = cascades.heads_of(cascade, layer, heads)
    used = heads if choice is None or choice.mode != "compact" else choice.keep
    inner, kept = heads * depth, used * depth
    scored = tokens * width * 2 * inner + tokens**2 * inner
    return scored + 2 * tokens * width * kept + tokens**2 * kept
