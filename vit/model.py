"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), prunable.

Parameters carry the names of google-research/vision_transformer, so that its files load
as they are. What is special here is `ViT.cascade`: which tokens and heads every layer
works on. It changes no parameter: `model.clone(cascade=...)` prunes a network and
`cascade=None` gives it back.

Axes: B images, N tokens (CLS first), P patches, D width, H heads, d width of a head,
M width of the MLP, L layers, K classes.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vit import cascade as cascades
from vit import importance
from vit.cascade import Cascade, Tokens

_GELU = {"tanh": nn.gelu, "erf": functools.partial(nn.gelu, approximate=False)}

VARIANTS = {
    "Ti": {"hidden_size": 192, "num_layers": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096},
    # For images of 32 pixels, in patches of 4.
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


class Attended(NamedTuple):
    """What an attention gives.

    Attributes:
      update: (B, N, D).
      probs: attention probabilities in float32: (B, H, N, N), of the CLS query alone
        (B, H, 1, N), or None if nothing asked for them.
      keys: mean over the heads, (B, N, d).
    """

    update: jax.Array
    probs: jax.Array | None
    keys: jax.Array


class ViT(nn.Module):
    """A Vision Transformer that classifies by its CLS token.

    Attributes:
      num_classes: K; 0 leaves the head out, the output is the normalised CLS token.
      patch_size: side of a patch in pixels.
      stem: channels of convolutions before the patches, 3x3 with stride 2 (Xiao et al.
        2021, arXiv 2106.14881): small images need fewer epochs with some. A patch is
        then patch_size / 2**len(stem) of what they give. () is the original.
      hidden_size: D.
      num_layers: L.
      num_heads: H, or one for each layer.
      mlp_dim: M, or one for each layer.
      head_dim: d; None is D / H.
      representation_size: width of the layer before the head that ImageNet-21k files
        have (`pre_logits`); None leaves it out.
      gelu: "tanh" (Google's files) or "erf" (timm's and Hugging Face's).
      ln_eps: epsilon of the layer normalisations.
      dropout_rate: after the position embedding and in the MLPs, in training.
      drop_path_rate: of the last layer's residual branches, in training; it grows
        linearly from zero at the first.
      cascade: what each layer works on; None is everything.
      attention_implementation: of `jax.nn.dot_product_attention`, where the
        probabilities are not needed: None, "xla" or "cudnn".
      dtype: of the matrix products. Parameters, softmax, scores, normalisations and
        logits are float32.
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
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    cascade: Cascade | None = None
    attention_implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (B, K) of images (B, H, W, C), scaled as the weights expect them.

        In training the rng "dropout" is needed where a rate is not zero. The rng
        "cascade", if given, draws a cascade's random scores. Intermediates:
        of each layer `attention` (B, H, n, n), `tokens`, the original numbers of the
        tokens (B, n) at hand after it, and `score` (B, n). Those at hand are those it
        worked on only under compact "drop": hidden and zeroed ones stay at hand.

        Raises:
          ValueError: if the images do not divide into patches, or the model or its
            cascade do not fit.
        """
        check_model(self)
        num_patches = count_patches(images.shape[1:3], self.patch_size)
        if self.cascade is not None:
            cascades.check_fits(self.cascade, num_patches, self.num_layers)
        x = images
        for i, channels in enumerate(self.stem):
            x = StemBlock(channels, self.ln_eps, self.dtype, name=f"stem_{i}")(x)
        size = self.patch_size // 2 ** len(self.stem)
        embedding = PatchEmbedding(self.hidden_size, size, self.dtype, name="embedding")
        x = embedding(x)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
        cls = jnp.broadcast_to(cls, (len(x), 1, self.hidden_size))

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
            name="Transformer",
        )
        x = encoder(jnp.concatenate([cls, x], axis=1), train=train)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, name="pre_logits")(x)
            x = nn.tanh(x)
        if self.num_classes:
            head = nn.Dense(
                self.num_classes, kernel_init=nn.initializers.zeros, name="head"
            )
            x = head(x)
        return x


class StemBlock(nn.Module):
    """3x3 convolution with stride 2, normalisation and GELU: sides are halved.

    A matrix product of shifted slices, as the patch embedding is one.
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
        return nn.gelu(nn.LayerNorm(self.ln_eps, name="LayerNorm_0")(x))


_OFFSETS = tuple(itertools.product(range(3), repeat=2))


class PatchEmbedding(nn.Module):
    """Each patch times one matrix: (B, H, W, C) -> (B, P, D).

    A convolution whose stride is its size, as a matrix product: the gradient of XLA's
    convolutions is slow on the CPU.
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
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * grid[1], -1)
        kernel = kernel.reshape(-1, self.hidden_size).astype(self.dtype)
        return x.astype(self.dtype) @ kernel + bias[None, None]


class Encoder(nn.Module):
    """Position embedding, the blocks and the last normalisation: -> CLS (B, D)."""

    num_layers: int
    make_block: Callable[[int], nn.Module]
    cascade: Cascade | None
    dropout_rate: float
    ln_eps: float

    @nn.compact
    def __call__(self, x, *, train):
        x = x + PositionEmbedding(name="posembed_input")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        key = self.make_rng("cascade") if self.has_rng("cascade") else None
        tokens = cascades.start(self.cascade, x, key)
        for layer in range(self.num_layers):
            tokens = self.make_block(layer)(tokens, train=train)
        norm = nn.LayerNorm(self.ln_eps, name="encoder_norm")
        return norm(tokens.x[:, 0].astype(jnp.float32))


class PositionEmbedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        shape = (1, *x.shape[1:])
        return self.param("pos_embedding", nn.initializers.normal(0.02), shape)


class EncoderBlock(nn.Module):
    """Attention and MLP, each behind a normalisation and beside a residual path."""

    layer: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    gelu: str
    ln_eps: float
    dropout_rate: float
    drop_path_rate: float
    cascade: Cascade | None
    attention_implementation: str | None
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Tokens, *, train: bool) -> Tokens:
        attention = MultiHeadDotProductAttention(
            self.num_heads,
            self.head_dim,
            heads=cascades.heads_of(self.cascade, self.layer, self.num_heads),
            query=cascades.scored_query(
                self.cascade, self.layer, tokens.x.shape[1] - 1
            ),
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
        norm_0 = nn.LayerNorm(self.ln_eps, name="LayerNorm_0")
        norm_1 = nn.LayerNorm(self.ln_eps, name="LayerNorm_1")
        drop_path = DropPath(self.drop_path_rate, deterministic=not train)

        def attend(x, weights):
            attended = attention(x, weights)
            if attended.probs is not None:
                self.sow("intermediates", "attention", attended.probs)
            return attended._replace(update=drop_path(attended.update))

        def transform(x):
            return drop_path(mlp(x, train=train))

        position = (self.cascade, self.layer)
        tokens = cascades.attention_layer(*position, tokens, norm_0, attend)
        self.sow("intermediates", "tokens", tokens.position)
        self.sow("intermediates", "score", tokens.score)
        return cascades.mlp_layer(*position, tokens, norm_1, transform)


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention whose heads can be chosen and whose tokens have multiplicities.

    Attributes:
      num_heads: H.
      head_dim: d.
      heads: how many heads to keep and how; None keeps all.
      query: whose probabilities are returned: "all", "cls" or None. While intermediates
        are collected, all are.
      implementation: of `jax.nn.dot_product_attention`.
      dtype: of the matrix products.
    """

    num_heads: int
    head_dim: int
    heads: cascades.Heads | None
    query: str | None
    implementation: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array | None) -> Attended:
        """Attends from each token of x (B, N, D) to all.

        Args:
          x: normalised tokens.
          weights: for how many tokens each stands, (B, N) or None for one: its key's
            logit gets the logarithm. Zero takes a token out.
        """
        shape = (self.num_heads, self.head_dim)
        x = x.astype(self.dtype)
        query = ToHeads(shape, self.dtype, name="query")(x)
        key = ToHeads(shape, self.dtype, name="key")(x)
        to_value = ToHeads(shape, self.dtype, name="value")
        out = FromHeads(x.shape[-1], shape, self.dtype, name="out")
        bias = None
        if weights is not None:
            bias = jnp.where(weights > 0, jnp.log(jnp.maximum(weights, 1e-9)), _HIDDEN)
            bias = bias[:, None, None, :]  # (B, 1, 1, N)
        asked = self.query
        if self.heads is not None or self.is_mutable_collection("intermediates"):
            asked = "all"
        probs = None
        if asked is not None:
            first = query[:, :1] if asked == "cls" else query
            probs = attention_probs(first, key, bias)
        if asked != "all":
            attended = jax.nn.dot_product_attention(
                query, key, to_value(x), bias, implementation=self.implementation
            )
            return Attended(out(attended), probs, key.mean(2))
        kept = mask = None
        if self.heads is not None:
            scores = importance.head_scores(probs, weights, form=self.heads.score)
            mask = cascades.choose_heads(self.heads, scores)  # (B, H)
            if self.heads.mode == "compact":
                # The same for the whole batch: the others' values are never made.
                kept = cascades.mask_to_indices(mask[:1], self.heads.keep)[0]
                mask = None
        used = probs if kept is None else probs[:, kept]
        attended = jnp.einsum(
            "bhqk,bkhd->bqhd", used.astype(self.dtype), to_value(x, kept)
        )
        if mask is not None:
            attended = attended * mask[:, None, :, None].astype(self.dtype)
        return Attended(out(attended, kept), probs, key.mean(2))


def attention_probs(
    query: jax.Array, key: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Softmax of query (B, Q, H, d) by key (B, N, H, d): float32 (B, H, Q, N)."""
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    logits = logits / jnp.sqrt(jnp.float32(query.shape[-1]))
    return nn.softmax(logits if bias is None else logits + bias)


class ToHeads(nn.Module):
    """x (B, N, D) -> queries, keys or values (B, N, H, d), of some heads if asked."""

    shape: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x, heads=None):
        kernel = self.param("kernel", _flat_init(1), (x.shape[-1], *self.shape))
        bias = self.param("bias", nn.initializers.zeros, self.shape)
        if heads is not None:
            kernel, bias = kernel[:, heads], bias[heads]
        flat = kernel.reshape(kernel.shape[0], -1).astype(self.dtype)
        y = x @ flat + bias.reshape(-1).astype(self.dtype)[None, None]
        return y.reshape(*x.shape[:-1], *bias.shape)


class FromHeads(nn.Module):
    """Heads' outputs (B, N, H, d) -> their sum of projections (B, N, D)."""

    hidden_size: int
    shape: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x, heads=None):
        kernel = self.param("kernel", _flat_init(2), (*self.shape, self.hidden_size))
        bias = self.param("bias", nn.initializers.zeros, (self.hidden_size,))
        if heads is not None:
            kernel = kernel[heads]
        flat = kernel.reshape(-1, self.hidden_size).astype(self.dtype)
        y = x.reshape(*x.shape[:-2], -1) @ flat
        return y + bias.astype(self.dtype)[None, None]


def _flat_init(num_inputs):
    """Xavier's uniform draw for a kernel whose first `num_inputs` axes are inputs."""

    def init(key, shape, dtype=jnp.float32):
        flat = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])
        return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)

    return init


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between: (B, N, D) likewise."""

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
    """Stochastic depth (Huang et al. 2016): leaves out an image's whole update."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        if self.deterministic or self.rate == 0:
            return x
        shape = (len(x), *(1,) * (x.ndim - 1))
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


# A logit that no other is so small as: its probability is exactly zero in float32.
_HIDDEN = -1e9


def make(variant: str, num_classes: int, patch_size: int, **options: Any) -> ViT:
    """A ViT of `VARIANTS`, with further fields or others in their place.

    Raises:
      ValueError: if the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    return ViT(
        num_classes=num_classes,
        patch_size=patch_size,
        **(VARIANTS[variant] | options),
    )


def per_layer(value: int | tuple[int, ...], layer: int) -> int:
    """The entry of one layer of a number that may be the same for all."""
    return value if isinstance(value, int) else value[layer]


def count_patches(image_shape: tuple[int, int], patch_size: int) -> int:
    """P for images of (height, width).

    Raises:
      ValueError: if they do not divide into patches.
    """
    height, width = image_shape
    if height % patch_size or width % patch_size or not min(height, width):
        raise ValueError(
            f"images of {height}x{width} pixels do not divide into patches of "
            f"{patch_size}x{patch_size}; the sides must be multiples of {patch_size}."
        )
    return (height // patch_size) * (width // patch_size)


def check_model(model: ViT) -> None:
    """Raises ValueError if the fields of a model do not fit each other."""
    for name in ("patch_size", "hidden_size", "num_layers"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(model, name)}.")
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
                f"{name} must be at least 1, once or for each of the "
                f"{model.num_layers} layers, got {value}."
            )
    if model.head_dim is None:
        heads = model.num_heads
        if not isinstance(heads, int) or model.hidden_size % heads:
            raise ValueError(
                f"hidden_size {model.hidden_size} does not divide by num_heads "
                f"{heads}; give head_dim."
            )
    if model.gelu not in _GELU:
        raise ValueError(f"gelu {model.gelu!r} is none of {', '.join(_GELU)}.")
    for name in ("dropout_rate", "drop_path_rate"):
        if not 0 <= getattr(model, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(model, name)}.")
