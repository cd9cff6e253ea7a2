"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) that can be pruned.

Parameters carry the names and shapes of google-research/vision_transformer, so its
files load without conversion. One field is new: `ViT.cascade`, the tokens and heads
that each layer works on. It changes no parameter: `model.clone(cascade=...)` prunes a
network, and `model.clone(cascade=None)` restores it.

Axes: B images, N tokens (CLS first), P patches, D width, H heads, d width of a head,
M width of the MLP, L layers, K classes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vit import cascade as cascades
from vit.attention import IMPLEMENTATIONS
from vit.attention import Attended as Attended
from vit.attention import FromHeads as FromHeads
from vit.attention import MultiHeadDotProductAttention as MultiHeadDotProductAttention
from vit.attention import Segment as Segment
from vit.attention import ToHeads as ToHeads
from vit.attention import attention_probs as attention_probs
from vit.cascade import Cascade
from vit.tokens import Tokens, mean_of_patches

POOLS = ("cls", "mean", "mean_before_norm", "cls_and_mean")
# Fields that are whole numbers, or tuples of them.
_SIZES = (
    *("num_classes", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim"),
    *("head_dim", "representation_size", "stem", "num_registers"),
)
_GELU = {"tanh": nn.gelu, "erf": functools.partial(nn.gelu, approximate=False)}

VARIANTS = {
    "Ti": {"hidden_size": 192, "num_layers": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096},
    # For images of 32 x 32 pixels in patches of 4 x 4.
    "cifar_128": {
        "hidden_size": 128,
        "num_layers": 7,
        "num_heads": 4,
        "mlp_dim": 256,
    },
    "cifar_192": {
        "hidden_size": 192,
        "num_layers": 9,
        "num_heads": 6,
        "mlp_dim": 384,
    },
    "cifar_256": {
        "hidden_size": 256,
        "num_layers": 7,
        "num_heads": 4,
        "mlp_dim": 512,
    },
}


class ViT(nn.Module):
    """A Vision Transformer.

    Attributes:
      num_classes: K; 0 omits the head, and the output is what the head would get.
      patch_size: side of a patch in pixels.
      stem: channels of the convolutions before the patches, each 3x3 with stride 2
        (Xiao et al. 2021, arXiv 2106.14881); they reduce the epochs that small images
        need. A patch then has patch_size / 2**len(stem) positions of their output per
        side. () is the original network.
      hidden_size: D.
      num_layers: L.
      num_heads: H, or one number per layer, (L,).
      mlp_dim: M, or one number per layer, (L,).
      head_dim: d; None is D / H.
      representation_size: width of the layer before the head that ImageNet-21k files
        have (`pre_logits`); None omits it.
      gelu: "tanh" (Google's files) or "erf" (those of timm and Hugging Face).
      ln_eps: epsilon of the layer normalizations.
      pool: what the head gets: "cls", the normalized CLS token; "mean", the mean of the
        normalized patches; "mean_before_norm", the normalized mean of the patches (the
        `fc_norm` of timm); "cls_and_mean", the first two side by side (DINOv2). A row
        that represents m merged patches counts m times, a dropped patch does not count.
      class_token: whether CLS comes before the patches. Without it the pooling must be
        a mean, and a cascade cannot use the score "cls".
      num_registers: R, learned tokens after CLS that are not read (Darcet et al. 2024,
        arXiv 2309.16588). A cascade always keeps CLS and the registers.
      grid: rows and columns of the patches that the position embedding is for, which
        `load_checkpoint` sets; None takes images of any shape with as many patches.
      distilled: whether the first register is DeiT's distillation token (Touvron et al.
        2021, arXiv 2012.12877): a second head reads it, and the logits are the mean of
        the two.
      dropout_rate: rate after the position embedding and in the MLPs, in training.
      drop_path_rate: rate of the last layer's residual branches, in training; it grows
        linearly from zero in the first layer.
      cascade: the tokens and heads that each layer works on; None is all.
      segment: a segment of the attention to leave out, to see what it is worth; None
        leaves out nothing. Not with a cascade.
      attention_implementation: see `attention.attend`.
      dtype: compute dtype of the matrix products. Parameters, softmax, scores,
        normalizations and logits are float32.
    """

    num_classes: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int | tuple[int, ...]
    mlp_dim: int | tuple[int, ...]
    head_dim: int | None = None
    representation_size: int | None = None
    stem: tuple[int, ...] = ()
    gelu: str = "tanh"
    ln_eps: float = 1e-6
    pool: str = "cls"
    class_token: bool = True
    num_registers: int = 0
    distilled: bool = False
    grid: tuple[int, int] | None = None
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    cascade: Cascade | None = None
    segment: Segment | None = None
    attention_implementation: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        # Sizes may come from arrays; a static field and a file have Python's numbers.
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, np.ndarray | np.integer):
                value = value.tolist()
            if isinstance(value, list | tuple):
                value = tuple(
                    x.item() if isinstance(x, np.integer) else x for x in value
                )
            object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def num_prefix(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.num_registers

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies images.

        Training needs the rng "dropout" if a rate is not zero. The rng "cascade", if
        given, draws the random scores of a cascade. Each layer stores intermediates,
        which `observe` reads: `attention` (B, H, n, n), `rows`, the positions of the
        tokens that the attention works on (B, n), -1 for hidden, zeroed and fused ones,
        `tokens`, the positions of the current tokens after the attention, and their
        `score`. Only compact "drop" removes rows; in all other cases hidden and zeroed
        tokens are among the n.

        Args:
          images: (B, H, W, C), scaled as the parameters expect it.
          train: whether dropout and drop path are active.

        Returns:
          Logits (B, K), or the pooled tokens if `num_classes` is 0: (B, D), or (B, 2 D)
          for pool "cls_and_mean".

        Raises:
          ValueError: if the images are not floating point, have no batch axis or do not
            divide into patches, or the fields of the model or its cascade do not fit
            together.
        """
        check_model(self)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images must be floating point and scaled, got {images.dtype}."
            )
        if images.ndim != 4:
            raise ValueError(
                f"images must have the shape (B, H, W, C), got {images.shape}."
            )
        num_patches = count_patches(images.shape[1:3], self.patch_size)
        _check_grid(self.grid, tuple(n // self.patch_size for n in images.shape[1:3]))
        if self.cascade is not None:
            cascades.check_fits(self.cascade, num_patches, self.num_layers)
        x = images
        for i, channels in enumerate(self.stem):
            x = StemBlock(channels, self.ln_eps, self.dtype, name=f"stem_{i}")(x)
        size = self.patch_size // 2 ** len(self.stem)
        embedding = PatchEmbedding(self.hidden_size, size, self.dtype, name="embedding")
        x = embedding(x)
        prefix = []
        for name, count in (
            ("cls", self.class_token),
            ("registers", self.num_registers),
        ):
            if count:
                shape = (1, int(count), self.hidden_size)
                token = self.param(name, nn.initializers.zeros, shape)
                prefix.append(jnp.broadcast_to(token, (x.shape[0], *shape[1:])))

        def make_block(layer):
            num_heads = per_layer(self.num_heads, layer)
            return EncoderBlock(
                layer=layer,
                num_heads=num_heads,
                head_dim=self.head_dim or self.hidden_size // num_heads,
                mlp_dim=per_layer(self.mlp_dim, layer),
                gelu=self.gelu,
                ln_eps=self.ln_eps,
                dropout_rate=self.dropout_rate,
                drop_path_rate=self.drop_path_rate
                * layer
                / max(self.num_layers - 1, 1),
                cascade=self.cascade,
                segment=self.segment,
                num_prefix=self.num_prefix,
                attention_implementation=self.attention_implementation,
                dtype=self.dtype,
                name=f"encoderblock_{layer}",
            )

        encoder = Encoder(
            self.num_layers,
            make_block,
            self.cascade,
            dropout_rate=self.dropout_rate,
            ln_eps=self.ln_eps,
            pool=self.pool,
            num_prefix=self.num_prefix,
            distilled=self.distilled,
            name="Transformer",
        )
        x, distillation = encoder(jnp.concatenate([*prefix, x], axis=1), train=train)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, name="pre_logits")(x)
            x = nn.tanh(x)
        outputs = {"head": x}
        if self.distilled:
            outputs["head_dist"] = distillation
        if self.num_classes:
            for name, x in outputs.items():
                head = nn.Dense(
                    self.num_classes, kernel_init=nn.initializers.zeros, name=name
                )
                outputs[name] = head(x)
        return sum(outputs.values()) / len(outputs)


class StemBlock(nn.Module):
    """3x3 convolution with stride 2, normalization and GELU; halves the sides.

    Computed as a matrix product of shifted slices, see `PatchEmbedding`.
    """

    channels: int
    ln_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        _, height, width, channels = x.shape
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.channels)
        )
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate(
            [padded[:, i : i + height : 2, j : j + width : 2] for i, j in _OFFSETS], -1
        )
        x = x @ kernel.reshape(-1, self.channels).astype(self.dtype)
        return nn.gelu(layer_norm(self.ln_eps, "LayerNorm_0")(x))


_OFFSETS = tuple(itertools.product(range(3), repeat=2))


class PatchEmbedding(nn.Module):
    """Multiplies each patch by one matrix: (B, H, W, C) -> (B, P, D).

    This is a convolution whose stride equals its size. It is computed as a matrix
    product because the gradient of XLA's convolutions is slow on the CPU.
    """

    hidden_size: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, images):
        size = self.patch_size
        batch, height, width, channels = images.shape
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (size, size, channels, self.hidden_size),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.hidden_size,))
        grid = height // size, width // size
        x = images.reshape(batch, grid[0], size, grid[1], size, channels)
        kernel = kernel.reshape(-1, self.hidden_size).astype(self.dtype)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, grid[0] * grid[1], len(kernel))  # (B, P, p p C)
        return x.astype(self.dtype) @ kernel + bias[None, None]


class Encoder(nn.Module):
    """Position embedding, blocks, last normalization and pooling of (B, N, D).

    Returns what the head gets, and the normalized distillation token or None.
    """

    num_layers: int
    make_block: Callable[[int], nn.Module]
    cascade: Cascade | None
    dropout_rate: float
    ln_eps: float
    pool: str
    num_prefix: int
    distilled: bool

    @nn.compact
    def __call__(self, x, *, train):
        x = x + PositionEmbedding(name="posembed_input")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        key = self.make_rng("cascade") if self.has_rng("cascade") else None
        tokens = cascades.initial_tokens(self.cascade, x, key)
        for layer in range(self.num_layers):
            tokens = self.make_block(layer)(tokens, train=train)
        norm = layer_norm(self.ln_eps, "encoder_norm")
        x = tokens.x.astype(jnp.float32)
        distillation = norm(x[:, 1]) if self.distilled else None
        if self.pool == "cls":
            return norm(x[:, 0]), distillation
        if self.pool == "mean_before_norm":
            mean = mean_of_patches(tokens, num_prefix=self.num_prefix)
            return norm(mean), distillation
        x = norm(x)
        mean = mean_of_patches(tokens._replace(x=x), num_prefix=self.num_prefix)
        if self.pool == "cls_and_mean":
            mean = jnp.concatenate([x[:, 0], mean], axis=1)
        return mean, distillation


class PositionEmbedding(nn.Module):
    """A learned vector per position: (B, N, D) -> (1, N, D)."""

    @nn.compact
    def __call__(self, x):
        shape = (1, *x.shape[1:])
        known = self.get_variable("params", "pos_embedding", x[:1])
        known = nn.meta.unbox(known).shape
        if known[1:2] != shape[1:2]:
            raise ValueError(
                f"the position embedding is for {known[1]} tokens, the images have "
                f"{shape[1]}; resize it with vit.load_checkpoint(path, image_size="
                "(height, width))."
            )
        return self.param("pos_embedding", nn.initializers.normal(0.02), shape)


class EncoderBlock(nn.Module):
    """Attention and MLP, each with a normalization before it and a residual path."""

    layer: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    gelu: str
    ln_eps: float
    dropout_rate: float
    drop_path_rate: float
    cascade: Cascade | None
    segment: Segment | None
    num_prefix: int
    attention_implementation: str | None
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Tokens, *, train: bool) -> Tokens:
        attention = MultiHeadDotProductAttention(
            self.num_heads,
            self.head_dim,
            segment=self.segment,
            num_prefix=self.num_prefix,
            implementation=self.attention_implementation,
            dtype=self.dtype,
            name="MultiHeadDotProductAttention_0",
        )
        mlp = MlpBlock(
            self.mlp_dim,
            gelu=self.gelu,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            name="MlpBlock_0",
        )
        norm_0 = layer_norm(self.ln_eps, "LayerNorm_0")
        norm_1 = layer_norm(self.ln_eps, "LayerNorm_1")
        drop_path = DropPath(self.drop_path_rate, deterministic=not train)

        def attend_all(x, attend):
            update = attention(x, attend)
            if attend.probs is not None:
                self.sow("intermediates", "attention", attend.probs)
            rows = attend.position
            if attend.weights is not None:
                rows = jnp.where(attend.weights > 0, rows, -1)
            self.sow("intermediates", "rows", rows)
            return drop_path(update)

        def transform(x):
            return drop_path(mlp(x, train=train))

        place = (self.cascade, self.layer)
        prefix = {"num_prefix": self.num_prefix}
        tokens = cascades.pruned_attention(*place, tokens, norm_0, attend_all, **prefix)
        self.sow("intermediates", "tokens", tokens.position)
        self.sow("intermediates", "score", tokens.score)
        return cascades.pruned_mlp(*place, tokens, norm_1, transform, **prefix)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them: (B, N, D) -> (B, N, D)."""

    mlp_dim: int
    gelu: str
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train):
        def dense(features, name):
            return nn.Dense(
                features,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(1e-6),
                dtype=self.dtype,
                name=name,
            )

        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        hidden = _GELU[self.gelu](dense(self.mlp_dim, "Dense_0")(x))
        return dropout(dense(x.shape[-1], "Dense_1")(dropout(hidden)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops the whole update of random images."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        if self.deterministic or self.rate == 0:
            return x
        shape = (x.shape[0], *(1,) * (x.ndim - 1))
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


def layer_norm(epsilon: float, name: str) -> nn.LayerNorm:
    """Layer normalization in two passes: the mean first, then the squared deviations.

    Flax's default takes the mean of the squares minus the squared mean, which loses six
    digits where the mean is a hundred deviations.
    """
    return nn.LayerNorm(epsilon, use_fast_variance=False, name=name)


def make(variant: str, num_classes: int, patch_size: int, **options: Any) -> ViT:
    """Makes a model of `VARIANTS`.

    Args:
      variant: a key of `VARIANTS`: "Ti", "S", "B", "L", or "cifar_128", "cifar_192",
        "cifar_256" for images of 32 x 32 pixels.
      num_classes: K; 0 omits the head.
      patch_size: side of a patch in pixels.
      **options: other fields of `ViT`; they override those of the variant.

    Returns:
      The model, without parameters.

    Raises:
      ValueError: if the variant is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import vit
      >>> model = vit.make("Ti", num_classes=10, patch_size=16, num_layers=2)
      >>> images = jnp.zeros((1, 32, 48, 3))
      >>> logits, variables = jax.eval_shape(
      ...     model.init_with_output, jax.random.key(0), images
      ... )
      >>> logits.shape, variables["params"]["embedding"]["kernel"].shape
      ((1, 10), (16, 16, 3, 192))
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}."
        )
    return ViT(
        num_classes=num_classes,
        patch_size=patch_size,
        **(VARIANTS[variant] | options),
    )


class Observed(NamedTuple):
    """What the attention of each layer does, for L layers.

    Attributes:
      attention: attention probabilities, queries first, L arrays (B, H, n, n). The n
        rows are the prefix and the patches; in mode "compact" only those of the layer,
        and with semantics "zero" a last row for all zeroed patches.
      kept: the patches that the attention works on, bool (L, B, P). Merged patches
        count as the one that they were merged into.
    """

    attention: tuple[jax.Array, ...]
    kept: jax.Array


def observe(model: ViT, params: Any, images: jax.Array) -> Observed:
    """Attention and kept patches of every layer, for the figures of `vit.plots`.

    Args:
      model: the network, with or without a cascade.
      params: its parameters.
      images: (B, H, W, C), scaled as the parameters expect it.

    Returns:
      The observations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import vit
      >>> cascade = vit.schedules.from_ratios([0.0, 0.5], num_patches=6)
      >>> model = vit.make("Ti", 10, patch_size=4, num_layers=2, cascade=cascade)
      >>> images = jnp.zeros((1, 8, 12, 3))
      >>> params = jax.jit(model.init)(jax.random.key(0), images)["params"]
      >>> observed = vit.observe(model, params, images)
      >>> observed.kept.sum(2).tolist()  # patches of each layer and image
      [[6], [3]]
    """
    variables = {"params": params}
    _, captured = model.apply(variables, images, mutable=["intermediates"])
    encoder = captured["intermediates"]["Transformer"]
    blocks = [encoder[f"encoderblock_{i}"] for i in range(model.num_layers)]
    num_patches = count_patches(images.shape[1:3], model.patch_size)
    patches = model.num_prefix + jnp.arange(num_patches)
    kept = [
        jnp.any(block["rows"][0][..., None] == patches[None, None], axis=1)
        for block in blocks
    ]
    attention = tuple(block["attention"][0] for block in blocks)
    return Observed(attention, jnp.stack(kept))


def per_layer(value: int | tuple[int, ...], layer: int) -> int:
    """The value of one layer, for fields that have one value or one per layer."""
    return value if isinstance(value, int) else value[layer]


def one_or_each(sizes: Sequence[int]) -> int | tuple[int, ...]:
    """One number if all layers have the same, or else one for each layer."""
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def pooled_size(model: ViT) -> int:
    """Width of what the head gets: D, or 2 D for pool "cls_and_mean"."""
    return model.hidden_size * (1 + (model.pool == "cls_and_mean"))


def count_patches(image_shape: tuple[int, int], patch_size: int) -> int:
    """Number of patches P of an image.

    Args:
      image_shape: (height, width), in pixels.
      patch_size: side of a patch, in pixels.

    Raises:
      ValueError: if the images do not divide into patches.
    """
    height, width = image_shape
    if height % patch_size or width % patch_size or not min(height, width):
        raise ValueError(
            f"images of {height}x{width} pixels do not divide into patches of "
            f"{patch_size}x{patch_size}; the sides must be multiples of {patch_size}."
        )
    return (height // patch_size) * (width // patch_size)


def _check_grid(grid, of_images):
    """Other numbers of patches do not fit the shape of the position embedding."""
    if grid and math.prod(grid) == math.prod(of_images) and tuple(grid) != of_images:
        raise ValueError(
            "the position embedding is for {} x {} patches, the images have {} x {}; "
            "resize it with vit.load_checkpoint(path, image_size=(height, width)), or "
            "set the grid of the model if it is for these.".format(*grid, *of_images)
        )


def check_model(model: ViT) -> None:
    """Checks that the fields of a model fit together.

    Raises:
      ValueError: if they do not.
    """
    for name in _SIZES:
        value = getattr(model, name)
        values = value if isinstance(value, tuple) else (value or 0,)
        if not all(isinstance(size, int) for size in values):
            raise ValueError(f"{name} must be of whole numbers, got {value!r}.")
    for name in ("patch_size", "hidden_size", "num_layers"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(model, name)}.")
    for name in ("num_classes", "num_registers", "ln_eps", "head_dim"):
        if (getattr(model, name) or 0) < 0:
            raise ValueError(
                f"{name} must not be negative, got {getattr(model, name)}."
            )
    grid = (1, 1) if model.grid is None else model.grid
    if not isinstance(grid, tuple) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be two whole numbers, got {model.grid}.")
    if model.patch_size % 2 ** len(model.stem):
        raise ValueError(
            f"patch_size {model.patch_size} must be a multiple of "
            f"{2 ** len(model.stem)} with {len(model.stem)} convolutions in the stem."
        )
    for name in ("num_heads", "mlp_dim"):
        value = getattr(model, name)
        values = (value,) * model.num_layers if isinstance(value, int) else value
        if len(values) != model.num_layers or min(values) < 1:
            raise ValueError(
                f"{name} must be at least 1, as one number or one for each of the "
                f"{model.num_layers} layers, got {value}."
            )
    if model.head_dim is None:
        heads = model.num_heads
        if not isinstance(heads, int) or model.hidden_size % heads:
            raise ValueError(
                f"hidden_size {model.hidden_size} is not divisible by num_heads "
                f"{heads}; set head_dim."
            )
    for name, allowed in (
        ("gelu", _GELU),
        ("pool", POOLS),
        ("attention_implementation", (None, *IMPLEMENTATIONS)),
    ):
        value = getattr(model, name)
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}."
            )
    if model.distilled and not (model.class_token and model.num_registers):
        raise ValueError(
            "distilled=True requires class_token=True and num_registers of at least 1."
        )
    if not model.class_token and "cls" in model.pool:
        raise ValueError(f"pool {model.pool!r} requires class_token=True.")
    if not model.class_token and model.cascade is not None:
        if model.cascade.score == "cls":
            raise ValueError("the score 'cls' requires class_token=True.")
    if model.cascade is not None and model.pool != "cls":
        last = model.cascade.counts[-1][-1]
        if model.cascade.semantics == "drop" and not last:
            raise ValueError(
                f"pool {model.pool!r} requires a patch after the last layer; the "
                "cascade drops all."
            )
    if (segment := model.segment) is not None:
        if segment.of not in ("regions", "heads") or segment.number not in range(3):
            raise ValueError(
                "segment must have a number from 0 to 2 and be of regions or heads, "
                f"got {segment}."
            )
        if model.cascade is not None:
            raise ValueError("segment does not go with a cascade.")
    for name in ("dropout_rate", "drop_path_rate"):
        if not 0 <= getattr(model, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(model, name)}.")
