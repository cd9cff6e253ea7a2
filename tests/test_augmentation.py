"""Augmentation against Pillow, NumPy and the stated distributions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from experiments.common import augmentation
from experiments.common.augmentation import OPERATIONS

pytestmark = pytest.mark.usefixtures("unoptimized")

apply_operations = jax.jit(augmentation.apply_operations)
# Of a function of a key and images, each with the type that it is meant for.
RANDOM = {
    "crop_flip": (jax.jit(augmentation.crop_flip), np.uint8),
    "rand_augment": (jax.jit(augmentation.rand_augment), np.uint8),
    "erase": (
        jax.jit(functools.partial(augmentation.erase, probability=0.9)),
        np.float32,
    ),
    "resized_crop": (
        jax.jit(functools.partial(augmentation.resized_crop, size=9)),
        np.uint8,
    ),
}


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def operate(images, *steps):
    """All images undergo the steps (name, strengths of each image).

    Identities make three steps of fewer, so that each shape compiles once.
    """
    steps += (("identity", 0.0),) * (3 - len(steps))
    operations = [np.full(len(images), OPERATIONS.index(name)) for name, _ in steps]
    strengths = [np.broadcast_to(s, len(images)) for _, s in steps]
    operations, strengths = np.stack(operations, 1), np.stack(strengths, 1)
    return np.asarray(apply_operations(images, operations, strengths.astype("f")))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_flip_takes_windows_of_the_padded_image(dtype):
    height, width, padding = 4, 5, 2
    images = 1 + noise(300, height, width, 3, dtype=dtype) % 255
    crop_flip = functools.partial(augmentation.crop_flip, padding=padding)
    crops = np.asarray(jax.jit(crop_flip)(jax.random.key(0), images))
    assert crops.dtype == dtype
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(images, sides)
    found = np.zeros((2, 2 * padding + 1, 2 * padding + 1, len(images)), bool)
    for flipped, row, column in np.ndindex(found.shape[:-1]):
        window = padded[:, row : row + height, column : column + width]
        window = window[:, :, ::-1] if flipped else window
        found[flipped, row, column] = (crops == window).all(axis=(1, 2, 3))
    assert (found.sum(axis=(0, 1, 2)) == 1).all()
    counts = found.sum(axis=-1)
    # 25 corners, 12 images each, and 150 flips of 300: five standard deviations.
    assert counts.sum(axis=0).min() > 0
    assert abs(counts.sum(axis=0) - 12).max() < 5 * math.sqrt(12)
    assert abs(counts[1].sum() - 150) < 5 * math.sqrt(75)


def test_crop_flip_may_leave_either_out():
    images = noise(20, 4, 5, 3)
    key, key_flip = jax.random.split(jax.random.key(0))
    crop_flip = jax.jit(augmentation.crop_flip, static_argnames=("padding", "flip"))
    same = crop_flip(key, images, padding=0, flip=False)
    np.testing.assert_array_equal(same, images)
    flips = np.asarray(crop_flip(key_flip, images, padding=0))
    same = (flips == images).all(axis=(1, 2, 3))
    mirrored = (flips == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all() and same.any() and mirrored.any()


def enhance(enhancer):
    return lambda image, s: enhancer(image).enhance(1 + 0.9 * s)


# The oracle, and how far from it a level may be: Pillow truncates what is rounded here.
COLOUR_ORACLES = {
    "identity": (lambda image, s: image, 0),
    "autocontrast": (lambda image, s: ImageOps.autocontrast(image), 1),
    "equalize": (lambda image, s: ImageOps.equalize(image), 0),
    "brightness": (enhance(ImageEnhance.Brightness), 1),
    "color": (enhance(ImageEnhance.Color), 1),
    "contrast": (enhance(ImageEnhance.Contrast), 1),
    "sharpness": (enhance(ImageEnhance.Sharpness), 1),
    "posterize": (lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))), 0),
    "solarize": (lambda image, s: ImageOps.solarize(image, 256 * (1 - abs(s))), 0),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COLOUR_ORACLES)
def test_colors_are_pillow_s(name, channels):
    strengths = [-1.0, -0.45, 0.0, 0.3, 1.0]
    # 256 pixels, one of them the brightest: Pillow's equalize divides by 255 // 255.
    images = 20 + noise(5, 8, 32, channels) % 180
    images[:, 3, 4] = 220
    oracle, tolerance = COLOUR_ORACLES[name]
    expected = [
        np.asarray(oracle(Image.fromarray(image.squeeze()), s))
        for image, s in zip(images, strengths, strict=True)
    ]
    expected = np.stack(expected).reshape(images.shape)
    result = operate(images, (name, strengths))
    assert result.dtype == np.uint8
    assert abs(result.astype(int) - expected).max() <= tolerance
    if name in ("autocontrast", "equalize"):
        assert (result.min(axis=(1, 2)) == 0).all()
        assert (result.max(axis=(1, 2)) == 255).all()


def geometry(name, s, height, width):
    """From a pixel, relative to the centre, to its source: (3, 3) of (x, y, 1)."""
    matrix = np.eye(3)
    if name == "rotate":
        angle = math.radians(30 * s)
        matrix[0, :2] = math.cos(angle), -math.sin(angle)
        matrix[1, :2] = math.sin(angle), math.cos(angle)
    else:
        row, column, size = {
            "shear_x": (0, 1, 0.3),
            "shear_y": (1, 0, 0.3),
            "translate_x": (0, 2, 150 / 331 * width),
            "translate_y": (1, 2, 150 / 331 * height),
        }[name]
        matrix[row, column] = size * s
    return matrix


def pillow_warp(image, matrix):
    height, width, _ = image.shape
    centre = np.array([width / 2, height / 2])
    offset = matrix[:2, 2] + centre - matrix[:2, :2] @ centre
    warped = Image.fromarray(image).transform(
        (width, height),
        Image.Transform.AFFINE,
        np.column_stack([matrix[:2, :2], offset]).ravel().tolist(),
        Image.Resampling.NEAREST,
        fillcolor=(128, 128, 128),
    )
    return np.asarray(warped)


@pytest.mark.parametrize(
    "names",
    [
        *(["rotate"], ["shear_x"], ["shear_y"], ["translate_x"], ["translate_y"]),
        *(["translate_x", "rotate"], ["rotate", "shear_x", "translate_y"]),
    ],
)
def test_geometry_is_pillow_s(names):
    # Not 1: a shear by 0.3 takes every fifth line from between two pixels.
    strengths = [-0.98, -0.47, 0.0, 0.3, 0.97]
    images = noise(5, 18, 23, 3)
    result = operate(images, *((name, strengths) for name in names))
    for image, warped, s in zip(images, result, strengths, strict=True):
        matrix = np.eye(3)
        for name in names:
            matrix = matrix @ geometry(name, s, 18, 23)
        # Pillow counts in 2^-16 pixels: sources at the very edge of a pixel may differ.
        same = (warped == pillow_warp(image, matrix)).all(axis=-1)
        assert same.mean() > 0.99
    assert (result == 128).all(axis=-1).any()


def test_rotation_turns_as_pillow_s():
    images = noise(5, 18, 23, 3)
    result = operate(images, ("rotate", 0.4))
    for image, turned in zip(images, result, strict=True):
        expected = Image.fromarray(image).rotate(
            12, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)
        )
        assert (turned == np.asarray(expected)).all(axis=-1).mean() > 0.99


def test_colors_come_in_order_and_before_geometry():
    images = noise(5, 8, 32, 3)
    solarize, color, shear = ("solarize", 0.6), ("color", 0.5), ("shear_y", 1.0)
    expected = operate(operate(operate(images, solarize), color), shear)
    other_order = operate(operate(operate(images, color), solarize), shear)
    result = operate(images, shear, solarize, color)
    np.testing.assert_array_equal(result, expected)
    assert (result != other_order).any()


def test_images_of_one_level_or_of_one_pixel_stay():
    for shape in [(5, 8, 32, 3), (5, 1, 1, 1)]:
        images = np.full(shape, 77, np.uint8)
        for name in ("autocontrast", "equalize", "contrast", "color", "sharpness"):
            np.testing.assert_array_equal(operate(images, (name, 1.0)), images)


def test_operations_and_signs_are_equally_frequent():
    num_images = 1400
    image = noise(18, 23, 3)  # large enough for any shear to show
    signs = [0.5, -0.5, 0, 0, 0]
    candidates = [
        operate(np.broadcast_to(image, (5, *image.shape)), (name, signs))[:2]
        for name in OPERATIONS
    ]
    candidates = np.concatenate(candidates)
    images = np.broadcast_to(image, (num_images, *image.shape))
    rand_augment = functools.partial(
        augmentation.rand_augment, num_ops=1, magnitude=0.5
    )
    results = np.asarray(jax.jit(rand_augment)(jax.random.key(1), images))
    equal = (results[:, None] == candidates).all(axis=(2, 3, 4))
    equal = equal.reshape(num_images, len(OPERATIONS), 2)
    counts = equal.any(axis=2).sum(axis=0)
    assert counts.sum() == num_images  # no two operations look alike
    assert abs(counts - 100).max() < 5 * math.sqrt(100)
    # Where the sign matters, it is either for half of the images.
    directed = ~equal.all(axis=2).any(axis=0)
    assert directed.sum() == 9
    up, down = equal.sum(axis=0)[directed].T
    assert abs(up - down).max() < 5 * math.sqrt(100)


def test_magnitude_zero_is_the_identity():
    # Each channel has each level once: it is equalized and has full contrast already.
    ramp = np.random.default_rng(0).permuted(np.tile(np.arange(256), (120, 1)), axis=1)
    images = ramp.reshape(40, 3, 8, 32).transpose(0, 2, 3, 1).astype(np.uint8)
    rand_augment = functools.partial(augmentation.rand_augment, magnitude=0)
    result = jax.jit(rand_augment)(jax.random.key(0), images)
    np.testing.assert_array_equal(result, images)
    images = noise(5, 8, 32, 3)
    for name in set(OPERATIONS) - {"autocontrast", "equalize"}:
        np.testing.assert_array_equal(operate(images, (name, 0.0)), images)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", RANDOM)
def test_an_image_s_draw_depends_on_the_key_and_not_on_the_others(name):
    function, dtype = RANDOM[name]
    images = noise(8, 10, 12, 3, dtype=dtype)
    result = np.asarray(function(jax.random.key(3), images))
    np.testing.assert_array_equal(function(jax.random.key(3), images), result)
    assert (np.asarray(function(jax.random.key(4), images)) != result).any()
    images[5:] = noise(3, 10, 12, 3, seed=1)
    others = np.asarray(function(jax.random.key(3), images))
    np.testing.assert_array_equal(others[:5], result[:5])
    assert (others[5:] != result[5:]).any()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", RANDOM)
def test_an_image_s_draw_does_not_depend_on_the_batch_size(name):
    function, dtype = RANDOM[name]
    images = noise(8, 10, 12, 3, dtype=dtype)
    result = function(jax.random.key(3), images)
    fewer = function(jax.random.key(3), images[:5])
    # XLA may order the sums of an interpolation by the size of the batch: 1e-4 of 255.
    np.testing.assert_allclose(fewer, np.asarray(result)[:5], atol=1e-4)


def box_sides(masks):
    """Heights and widths (N,) of the boxes that the masks (N, H, W) must be."""
    rows, columns = masks.any(axis=2), masks.any(axis=1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None, :])
    for marked in (rows, columns):
        starts = marked & ~np.pad(marked, ((0, 0), (1, 0)))[:, :-1]
        assert starts.sum(axis=1).max() == 1
    return rows.sum(axis=1), columns.sum(axis=1)


def mixes(num_draws, *, num_images=3, size=16, **settings):
    """Many mixes of a batch: images of 0, 1, 2, ... and one-hot targets."""
    shape = (num_images, size, size + 1, 1)
    images = np.broadcast_to(np.arange(num_images)[:, None, None, None], shape)
    images = images.astype(np.float32)
    targets = np.eye(num_images, dtype=np.float32)
    mix = jax.jit(
        jax.vmap(lambda key: augmentation.mix(key, images, targets, **settings))
    )
    images_out, targets_out = mix(jax.random.split(jax.random.key(0), num_draws))
    targets_out = np.asarray(targets_out)
    np.testing.assert_allclose(targets_out.sum(axis=-1), 1, rtol=1e-6)
    # Image 1 is mixed with image 0, so that its pixels are the weights themselves.
    weights = np.asarray(images_out)[:, 1, :, :, 0]
    ratios = targets_out[:, 1, 1]
    own, previous = images, np.roll(images, 1, axis=0)
    w = weights[:, None, :, :, None]
    np.testing.assert_allclose(images_out, own * w + previous * (1 - w), atol=1e-6)
    own, previous = targets, np.roll(targets, 1, axis=0)
    w = ratios[:, None, None]
    expected = own * w + previous * (1 - w)
    np.testing.assert_allclose(targets_out, expected, atol=1e-6)
    # The weight of a target is what share of the pixels, or of each, is the image's.
    np.testing.assert_allclose(ratios, weights.mean(axis=(1, 2)), atol=1e-6)
    return weights, ratios


def test_mixup_ratios_are_beta():
    alpha = 0.2
    weights, ratios = mixes(2000, size=2, mixup_alpha=alpha, cutmix_alpha=0.0)
    np.testing.assert_allclose(
        weights, np.broadcast_to(ratios[:, None, None], weights.shape), atol=1e-6
    )
    # Of 2000 draws, the mean and the variance have standard deviations of 0.01 and
    # 0.002. At alpha 1 the variance would be 0.083, here it is 0.179.
    assert abs(ratios.mean() - 0.5) < 0.05
    assert abs(ratios.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_cutmix_pastes_a_clipped_box():
    weights, ratios = mixes(2000, mixup_alpha=0.0, cutmix_alpha=1.0)
    pasted = weights == 0
    assert (pasted | (weights == 1)).all()
    box_sides(pasted)
    # A side r with its centre uniform in [0, 1] keeps r - r^2 / 4 of itself on average;
    # r^2 is uniform, so that the area is E[u - u^1.5 / 2 + u^2 / 16] = 0.3208.
    # The mean of 2000 has a standard deviation of 0.006.
    assert abs((1 - ratios).mean() - (1 / 2 - 1 / 5 + 1 / 48)) < 0.03


def test_mix_takes_either_method():
    weights, ratios = mixes(2000, mixup_alpha=1.0, cutmix_alpha=1.0)
    is_cutmix = ((weights == 0) | (weights == 1)).all(axis=(1, 2)) & (ratios < 1)
    is_mixup = (weights == weights[:, :1, :1]).all(axis=(1, 2)) & (ratios < 1)
    # Five standard deviations; a box too small to hold a pixel's centre is rare.
    assert abs(is_mixup.mean() - 0.5) < 0.06
    assert abs(is_cutmix.mean() - 0.5) < 0.06


def test_mix_without_either_is_the_identity():
    images, targets = noise(4, 5, 6, 3, dtype=np.float32), np.eye(4, dtype=np.float32)
    mix = functools.partial(augmentation.mix, jax.random.key(0), images, targets)
    images_out, targets_out = mix(mixup_alpha=0.0, cutmix_alpha=0.0)
    np.testing.assert_array_equal(images_out, images)
    np.testing.assert_array_equal(targets_out, targets)


def test_erase_zeroes_rectangles():
    num_images, height, width = 2000, 20, 24
    images = 1 + noise(num_images, height, width, 2, dtype=np.float32)
    erase = jax.jit(augmentation.erase)
    result = np.asarray(erase(jax.random.key(0), images))
    erased = (result == 0).all(axis=-1)
    np.testing.assert_array_equal(result, np.where(erased[..., None], 0, images))
    chosen = erased.any(axis=(1, 2))
    # 5 standard deviations of 2000 draws.
    assert abs(chosen.mean() - 0.25) < 0.05
    erased = erased[chosen]
    tall, wide = box_sides(erased)
    # Pixels count by their centres, so that a side is rounded up or down.
    assert ((tall + 1) * (wide + 1) > 0.02 * height * width).all()
    assert ((tall - 1) * (wide - 1) < 0.33 * height * width).all()
    tall, wide = tall / height, wide / width
    assert ((tall - 1 / height) * 0.3 < wide + 1 / width).all()
    assert ((wide - 1 / width) * 0.3 < tall + 1 / height).all()
    # Uniform in [0.02, 0.33]: of 500, standard deviation 0.004.
    assert abs((tall * wide).mean() - 0.175) < 0.02
    # Anywhere: each border is touched.
    assert erased[:, 0].any() and erased[:, -1].any()
    assert erased[:, :, 0].any() and erased[:, :, -1].any()


@pytest.mark.parametrize("height, width", [(20, 20), (15, 24)])
def test_resized_crop_samples_boxes(height, width):
    num_images, size, min_area = 1000, 8, 0.2
    # The image of its own coordinates shows where each sample was taken.
    coordinates = np.stack(np.mgrid[:height, :width], axis=-1).astype(np.float32)
    images = jnp.broadcast_to(coordinates, (num_images, height, width, 2))
    crop = functools.partial(augmentation.resized_crop, size=size, min_area=min_area)
    result = np.asarray(jax.jit(crop)(jax.random.key(0), images))
    assert result.shape == (num_images, size, size, 2)
    rows, columns = result[:, :, 0, 0], result[:, 0, :, 1]
    middle = size // 2  # never where coordinates are clipped to the image's border
    sides, corners = [], []
    for samples, image_side in ((rows, height), (columns, width)):
        step = samples[:, middle] - samples[:, middle - 1]
        corner = samples[:, middle] + 0.5 - (middle + 0.5) * step
        expected = corner[:, None] + (np.arange(size) + 0.5) * step[:, None] - 0.5
        # Coordinates up to 24 in float32 give corners to about 1e-5.
        np.testing.assert_allclose(samples, expected.clip(0, image_side - 1), atol=1e-4)
        sides.append(step * size)
        corners.append(corner)
        assert corner.min() > -1e-4 and (corner + step * size).max() < image_side + 1e-4
    np.testing.assert_allclose(
        result[..., 0], np.broadcast_to(rows[:, :, None], result.shape[:3]), atol=1e-4
    )
    np.testing.assert_allclose(
        result[..., 1], np.broadcast_to(columns[:, None], result.shape[:3]), atol=1e-4
    )
    area = sides[0] * sides[1] / (height * width)
    aspect = sides[1] / sides[0]
    assert area.max() < 1 + 1e-4 and corners[0].max() > 1 and corners[1].max() > 1
    if height == width:
        assert area.min() > min_area - 1e-4
        assert aspect.min() > 3 / 4 - 1e-3 and aspect.max() < 4 / 3 + 1e-3
        # Areas are uniform: deciles of 1000 draws, five standard deviations.
        counts, _ = np.histogram(area, np.linspace(min_area - 1e-3, 1 + 1e-3, 11))
        assert abs(counts - 100).max() < 50


def test_resize_is_pillow_s_bilinear():
    images = noise(2, 5, 7, 3)
    result = np.asarray(jax.jit(augmentation.resize, static_argnums=1)(images, 16))
    assert result.dtype == np.float32
    for image, resized in zip(images, result, strict=True):
        for channel in range(3):
            expected = Image.fromarray(image[..., channel].astype(np.float32))
            expected = expected.resize((16, 16), Image.Resampling.BILINEAR)
            # Levels up to 255 in float32.
            np.testing.assert_allclose(resized[..., channel], expected, atol=1e-3)


def test_images_of_another_type_are_refused():
    key, images, targets = jax.random.key(0), jnp.ones((2, 5, 6, 3)), jnp.eye(2)
    alphas = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    with pytest.raises(AssertionError, match="type uint8 but expected"):
        augmentation.mix(key, images.astype(jnp.uint8), targets, **alphas)
    with pytest.raises(AssertionError, match="type int32 but expected"):
        augmentation.mix(key, images, targets.astype(jnp.int32), **alphas)
    with pytest.raises(AssertionError, match="type float32 but expected uint8"):
        augmentation.rand_augment(key, images)
