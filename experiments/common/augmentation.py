"""Random augmentation of batches of images, inside the jitted training step.

Differences between images are indices and coefficients, not branches: all images take
the same few passes. `crop_flip` is one gather, and so are the geometric operations. The
operations on gray levels are one table lookup per image and channel.

The augmentation of an image depends on the key and on its index in the batch. Only
`mix` depends on the other images. The ranges of the arguments are those of the rules in
`experiments/configs/train_vit.py`, which a command checks.

Axes: B images, H W rows and columns, C channels, K classes, G gray levels (256).
"""

import math

import chex
import jax
import jax.numpy as jnp

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, of red, green and blue
_FILL = 128  # value of pixels from outside of a warped image


def crop_flip(
    key: jax.Array, images: jax.Array, *, padding: int = 4, flip: bool = True
) -> jax.Array:
    """Random windows of the zero-padded images, half of them mirrored left to right.

    Args:
      key: PRNG key.
      images: images of any dtype, (B, H, W, C).
      padding: number of pixels added at each side; 0 does not crop.
      flip: whether to mirror half of the images.

    Returns:
      Images of the same shape and dtype.
    """
    chex.assert_rank(images, 4)
    num_images, height, width, _ = images.shape
    key_crop, key_flip = jax.random.split(key)
    corners = jax.random.randint(key_crop, (num_images, 2), -padding, padding + 1)
    flipped = jax.random.bernoulli(key_flip, 0.5 if flip else 0.0, (num_images, 1))
    rows = jnp.arange(height)[None]
    columns = jnp.arange(width)[None]
    columns = jnp.where(flipped, columns[:, ::-1], columns)
    rows, columns = rows + corners[:, :1], columns + corners[:, 1:]
    return _gather(images, rows[:, :, None], columns[:, None, :], fill=0)


def random_window(
    key: jax.Array, grids: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Random windows of grids with any number of axes, one window per example.

    Args:
      key: PRNG key.
      grids: (B, *G, C).
      shape: sides of the windows, one for each side of the grid.

    Returns:
      (B, *shape, C).
    """
    *sides, channels = grids.shape[1:]
    largest = jnp.array(sides) - jnp.array(shape) + 1
    corners = jax.random.randint(key, (len(grids), len(sides)), 0, largest[None])

    def window(grid, corner):
        return jax.lax.dynamic_slice(grid, (*corner, 0), (*shape, channels))

    return jax.vmap(window)(grids, corners)


def center_window(grids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The windows in the centers of grids: (B, *G, C) -> (B, *shape, C)."""
    for axis, (size, kept) in enumerate(
        zip(grids.shape[1:-1], shape, strict=True), start=1
    ):
        first = (size - kept) // 2
        grids = grids[(slice(None),) * axis + (slice(first, first + kept),)]
    return grids


def rand_augment(
    key: jax.Array, images: jax.Array, *, num_ops: int = 2, magnitude: float = 0.3
) -> jax.Array:
    """RandAugment: applies random operations from OPERATIONS to each image.

    Source: Cubuk et al. 2020, arXiv 1909.13719, whose magnitude M is 10 x `magnitude`;
    see `apply_operations` for the operations. They are drawn uniformly. Operations with
    a direction have each direction with probability 1/2.

    Args:
      key: PRNG key.
      images: uint8 (B, H, W, C).
      num_ops: number of operations per image, drawn with replacement.
      magnitude: strength in [0, 1]. At 0 only autocontrast and equalize, which have no
        strength, change the images.

    Returns:
      Images of the same shape and dtype.
    """
    key_operation, key_sign = jax.random.split(key)
    shape = (len(images), num_ops)
    operations = jax.random.randint(key_operation, shape, 0, len(OPERATIONS))
    signs = jax.random.rademacher(key_sign, shape, jnp.float32)
    return apply_operations(images, operations, magnitude * signs)


def apply_operations(
    images: jax.Array, operations: jax.Array, strengths: jax.Array
) -> jax.Array:
    """Applies given operations; the deterministic part of `rand_augment`.

    At strength s, whose sign matters only for the operations marked +-:

        autocontrast     stretches each channel to 0..255 at any s
        equalize         makes each channel's histogram flat at any s
        brightness +-    x + 0.9 s (x - 0)
        color +-         x + 0.9 s (x - luma)
        contrast +-      x + 0.9 s (x - mean luma of the image)
        sharpness +-     x + 0.9 s (x - smoothed x), except at the border
        posterize        drops the lowest round(4 |s|) bits
        solarize         inverts the levels from 256 (1 - |s|) up
        rotate +-        by 30 s degrees
        shear_* +-       by 0.3 s pixels per pixel of distance from the center
        translate_* +-   by 150/331 s of the side

    The definitions are Pillow's, with these differences: results are rounded, not
    truncated; equalize divides exactly, whereas Pillow's integer step saturates small
    images; shears keep the center in place. The geometric operations of an image are
    composed to one map and applied after those on colors. Pixels are therefore sampled
    (the nearest) only once. Pixels from outside of the image are a constant gray.

    Args:
      images: uint8 (B, H, W, C). Operations on colors are meant for RGB or gray; with
        another C, luma is the mean of the channels.
      operations: indices into OPERATIONS, (B, S), applied from the first to the last.
      strengths: strength s of each operation in [-1, 1], (B, S).

    Returns:
      Images of the same shape and dtype.
    """
    chex.assert_type(images, jnp.uint8)
    chex.assert_rank([images, operations], [4, 2])
    chex.assert_equal_shape([operations, strengths])
    chex.assert_equal_shape_prefix([images, operations], 1)
    steps = (operations.T, strengths.T)  # (S, B)

    def recolor(images, step):
        return _blend(_map_levels(images, *step), *step), None

    images, _ = jax.lax.scan(recolor, images, steps)
    return _warp(images, *steps)


def mix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixup or CutMix: mixes each image and target with those of its predecessor.

    images w + roll(images) (1 - w), targets l + roll(targets) (1 - l), l = mean(w):

        Mixup   w = l everywhere (Zhang et al. 2018, arXiv 1710.09412)
        CutMix  w = 0 in a box, 1 outside (Yun et al. 2019, arXiv 1905.04899)

    where l ~ Beta(alpha, alpha). The box of CutMix has the area 1 - l before it is
    clipped to the image. The whole batch has the same method, l and box. If both alphas
    are positive, each method has probability 1/2.

    Args:
      key: PRNG key.
      images: floating (B, H, W, C).
      targets: class probabilities, (B, K).
      mixup_alpha: alpha of Mixup; 0 disables it.
      cutmix_alpha: alpha of CutMix; 0 disables it.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    chex.assert_type([images, targets], float)
    chex.assert_rank([images, targets], [4, 2])
    chex.assert_equal_shape_prefix([images, targets], 1)
    if mixup_alpha == cutmix_alpha == 0:
        return images, targets

    _, height, width, _ = images.shape
    keys = jax.random.split(key, 3)
    cutmix_share = 0.5 if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
    is_cutmix = jax.random.bernoulli(keys[0], cutmix_share)
    alpha = jnp.where(is_cutmix, cutmix_alpha, mixup_alpha)
    ratio = jax.random.beta(keys[1], alpha, alpha)

    sides = jnp.full(2, jnp.sqrt(1 - ratio))
    corner = jax.random.uniform(keys[2], (2,)) - sides / 2
    outside = ~_box(height, width, corner, sides)
    weights = jnp.where(is_cutmix, outside, ratio)  # (H, W)

    def mixed(values, weights):
        weights = weights.astype(values.dtype)
        return values * weights + jnp.roll(values, 1, axis=0) * (1 - weights)

    return mixed(images, weights[None, :, :, None]), mixed(targets, weights.mean())


def erase(key: jax.Array, images: jax.Array, *, probability: float = 0.25) -> jax.Array:
    """Random erasing: sets a rectangle of some of the images to zero.

    Source: Zhong et al. 2020, arXiv 1708.04896. The area is uniform between 2 and 33 %
    of the image, the aspect ratio between 0.3 and 1/0.3. Differences: the ratio is
    log-uniform and relative to that of the image, and only ratios at which the
    rectangle fits are drawn, so that no rectangle is rejected.

    Args:
      key: PRNG key.
      images: normalized images, (B, H, W, C), whose mean is zero.
      probability: probability that a rectangle of an image is erased.

    Returns:
      Images of the same shape and dtype.
    """
    chex.assert_rank(images, 4)
    _, height, width, _ = images.shape

    def erased(key, image):
        keys = jax.random.split(key, 4)
        area = jax.random.uniform(keys[0], minval=0.02, maxval=0.33)
        longest = -jnp.log(jnp.maximum(area, 0.3))
        aspect = jax.random.uniform(keys[1], minval=-longest, maxval=longest)
        sides = jnp.sqrt(area) * jnp.exp(jnp.stack([-aspect, aspect]) / 2)
        corner = jax.random.uniform(keys[2], (2,)) * (1 - sides)
        box = _box(height, width, corner, sides)
        box &= jax.random.bernoulli(keys[3], probability)
        return jnp.where(box[:, :, None], 0, image)

    return jax.vmap(erased)(jax.random.split(key, len(images)), images)


def resized_crop(
    key: jax.Array, images: jax.Array, *, size: int, min_area: float = 0.05
) -> jax.Array:
    """Random resized crop of each image, as for Inception.

    Source: Szegedy et al. 2014, arXiv 1409.4842. The area of the crop is uniform, its
    aspect ratio log-uniform in [3/4, 4/3]. For square images only ratios at which the
    crop fits are drawn, so that no crop is rejected and areas stay uniform. For other
    images a side that is too long is shortened. Corners are not rounded to pixels.

    Args:
      key: PRNG key.
      images: (B, H, W, C).
      size: height and width of the results.
      min_area: smallest area, as a fraction of the image, in (0, 1].

    Returns:
      Floating images (B, size, size, C), interpolated bilinearly without antialiasing.
    """
    chex.assert_rank(images, 4)
    _, height, width, channels = images.shape

    def crop(key, image):
        keys = jax.random.split(key, 3)
        area = jax.random.uniform(keys[0], minval=min_area, maxval=1.0)
        widest = jnp.minimum(math.log(4 / 3), -jnp.log(area))
        aspect = jax.random.uniform(keys[1], minval=-widest, maxval=widest)
        sides = jnp.exp(jnp.stack([-aspect, aspect]) / 2)
        image_sides = jnp.array([height, width], jnp.float32)
        sides = jnp.minimum(sides * jnp.sqrt(area * height * width), image_sides)
        corner = jax.random.uniform(keys[2], (2,)) * (image_sides - sides)
        scale = size / sides
        return jax.image.scale_and_translate(
            image,
            (size, size, channels),
            spatial_dims=(0, 1),
            scale=scale,
            translation=-corner * scale,
            method="linear",
            antialias=False,
        )

    return jax.vmap(crop)(jax.random.split(key, len(images)), images)


def resize(images: jax.Array, size: int) -> jax.Array:
    """Resizes bilinearly, antialiased if it shrinks: floating (B, size, size, C)."""
    chex.assert_rank(images, 4)
    shape = (len(images), size, size, images.shape[-1])
    if not jnp.issubdtype(images.dtype, jnp.floating):
        images = images.astype(jnp.float32)
    return jax.image.resize(images, shape, method="linear", antialias=True)


def _blend(images, operation, strength):
    """The operations color and sharpness: uint8 (B, H, W, C)."""
    _, height, width, channels = images.shape
    by_color = 0.9 * _where(operation, "color", strength)[..., None]
    by_sharpness = 0.9 * _where(operation, "sharpness", strength)[..., None]

    def blended(images):
        # With sums of slices this is one pass on the CPU. A reduction over channels, or
        # slices of the interior only, are ten times slower.
        pixels = images.astype(jnp.float32)
        weights = enumerate(_luma_weights(channels))
        luma = sum(weight * pixels[..., channel] for channel, weight in weights)
        # Pillow's SMOOTH: the mean of 3x3 pixels, with weight five for the middle one.
        padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
        block = sum(padded[:, row : row + height] for row in range(3))
        block = sum(block[:, :, column : column + width] for column in range(3))
        smooth = (block + 4 * pixels) / 13
        inside = jnp.zeros((1, height, width, 1)).at[:, 1:-1, 1:-1].set(1)
        pixels += by_color * (pixels - luma[..., None])
        pixels += by_sharpness * inside * (pixels - smooth)
        return _to_uint8(pixels)

    # The branch is rarely skipped. It prevents XLA from fusing the pass into every use
    # of the result, where it would be computed again and take twice the time.
    needed = jnp.any(by_color) | jnp.any(by_sharpness)
    return jax.lax.cond(needed, blended, lambda images: images, images)


def _map_levels(images, operation, strength):
    """The operations on gray levels, by tables: uint8 (B, H, W, C)."""
    num_images, _, _, channels = images.shape
    pixels = images.reshape(num_images, -1, channels).astype(jnp.int32)  # (B, HW, C)
    image = jnp.arange(num_images)[:, None, None]
    channel = jnp.arange(channels)[None, None, :]
    histogram = jnp.zeros((num_images, 256, channels), jnp.int32)
    histogram = histogram.at[image, pixels, channel].add(1)
    tables = _level_tables(histogram, operation, strength)
    mapped = jnp.take_along_axis(tables, pixels, axis=1, mode="clip")
    return mapped.reshape(images.shape)


def _level_tables(histogram, operation, strength):
    """New value of each gray level: counts (B, G, C) -> uint8 (B, G, C)."""
    levels = jnp.arange(256)[None, :, None]
    up_to = jnp.cumsum(histogram, axis=1)
    num_pixels = up_to[:, -1:]
    means = jnp.sum(levels * histogram, axis=1, keepdims=True) / num_pixels
    weights = jnp.array(_luma_weights(histogram.shape[-1]))[None, None, :]
    mean = jnp.sum(weights * means, axis=2, keepdims=True)
    low = jnp.sum(up_to == 0, axis=1, keepdims=True)
    high = jnp.sum(up_to < num_pixels, axis=1, keepdims=True)
    below_high = jnp.max(up_to * (up_to < num_pixels), axis=1, keepdims=True)
    stretched = (levels - low) * 255 / jnp.maximum(high - low, 1)
    equalized = (up_to - histogram) * 255 / jnp.maximum(below_high, 1)
    several = high > low  # a channel with one level is unchanged
    strength = strength[:, None, None]
    amount = jnp.abs(strength)
    bits = jnp.round(4 * amount).astype(jnp.int32)
    results = {
        "autocontrast": jnp.where(several, stretched, levels),
        "equalize": jnp.where(several, equalized, levels),
        "brightness": levels + 0.9 * strength * levels,
        "contrast": levels + 0.9 * strength * (levels - mean),
        "posterize": levels >> bits << bits,
        "solarize": jnp.where(levels < 256 * (1 - amount), levels, 255 - levels),
    }
    tables = jnp.broadcast_to(levels, histogram.shape)
    for name, result in results.items():
        tables = jnp.where(_is(operation, name), result, tables)
    return _to_uint8(tables)


def _warp(images, operations, strengths):
    """The geometric operations, from last to first: output pixel to source pixel."""
    _, height, width, _ = images.shape
    x = (jnp.arange(width) + 0.5 - width / 2)[None, None, :]
    y = (jnp.arange(height) + 0.5 - height / 2)[None, :, None]
    for operation, strength in zip(operations[::-1], strengths[::-1], strict=True):
        angle = math.radians(30) * _where(operation, "rotate", strength)
        shear_x = 0.3 * _where(operation, "shear_x", strength)
        shear_y = 0.3 * _where(operation, "shear_y", strength)
        shift_x = 150 / 331 * width * _where(operation, "translate_x", strength)
        shift_y = 150 / 331 * height * _where(operation, "translate_y", strength)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        x, y = (
            cos * x + (shear_x - sin) * y + shift_x,
            (shear_y + sin) * x + cos * y + shift_y,
        )
    rows = jnp.floor(y + height / 2).astype(jnp.int32)
    columns = jnp.floor(x + width / 2).astype(jnp.int32)
    return _gather(images, rows, columns, fill=_FILL)


def _gather(images, rows, columns, *, fill):
    """Pixels at (B, H, 1) or (B, H, W) rows and (B, 1, W) or (B, H, W) columns."""
    image = jnp.arange(len(images))[:, None, None]
    pixels = jnp.asarray(images).at[image, rows, columns]
    return pixels.get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def _is(operation, name):
    """Whether the operation applies to each image: indices (B,) -> bool (B, 1, 1)."""
    return (operation == OPERATIONS.index(name))[:, None, None]


def _where(operation, name, strength):
    """`strength` where the operation applies, else 0: (B, 1, 1)."""
    return jnp.where(_is(operation, name), strength[:, None, None], 0.0)


def _luma_weights(channels):
    """Weights of the C channels in the luma; their sum is 1."""
    return _LUMA if channels == 3 else (1 / channels,) * channels


def _to_uint8(values):
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)


def _box(height, width, corner, sides):
    """Whether the center of each pixel is in a box (fractions of the image): (H, W)."""
    rows = (jnp.arange(height)[:, None] + 0.5) / height - corner[0]
    columns = (jnp.arange(width)[None, :] + 0.5) / width - corner[1]
    return (rows >= 0) & (rows < sides[0]) & (columns >= 0) & (columns < sides[1])
