"""Fits a SIREN to each of one or more images.

    python -m experiments.fit_image --config=experiments/configs/fit_image.py:VARIANT

Variants:
  photo: the photograph that scikit-learn carries, 512 pixels wide, or a file of
    yours: --config.image=PATH. Minutes on two cores.
  smoke: the same with 16 pixels, in seconds.
  report: TFDS cifar10, the setting of the report at sizes 32 to 128 and its
    mosaic of nine images; Adam at a constant rate.
  best: TFDS cifar10, exact to 8 bits in 100 steps (32x32) or 1,000 (128x128).
  many: 64 images of TFDS cifar10 at once, small networks; their parameter
    vectors are a functaset.
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # An image file of any size, grey or RGB; it takes the place of the data set.
    "image": settings.Optional(str),
    # name: photograph, or a data set of experiments/common/data.py with its data_dir.
    "dataset": {
        "name": "photograph",
        "data_dir": settings.Optional(str),
    },
    # What is fitted, one entry for each task; a single entry serves all tasks.
    # Pixels of the longer side, to which an image is resized.
    "resolution": (512,),
    # The first images of the training split, each fitted by a network of its own.
    "num_images": (1,),
    # k x k images side by side are one image, k * resolution wide.
    "mosaic": (1,),
    "num_steps": (4000,),
    # Steps after which the reconstruction is kept and measured, besides the last one.
    "snapshot_steps": (100, 200, 400, 800, 1600),
    # The fields of functa.Siren; out_channels is taken from the images.
    "model": {
        "type": "Siren",
        "width": 256,
        "depth": 5,
        "omega_0": 30.0,
        "fast_sine": True,
        "out_channels": settings.Optional(int),
    },
    # Training sees the pixel grid, [0, 1] along each axis, mapped to this range; the
    # wider, the higher the frequencies that the network starts with: pixels are fitted
    # sooner, and what lies between the pixels of a small image is less smooth.
    # Sitzmann et al. use (-1, 1). Its centre at 0 makes a network that starts without
    # biases an odd function; (0, 2) has the same frequencies and does not.
    # The map is folded into the first layer of what a run exports.
    "coord_range": (0.0, 2.0),
    # `name` is any optimizer of optax or optax.contrib; `options` are its keywords.
    "optimizer": {
        "name": "adam",
        "options": {"b2": 0.99},
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 5,
    },
    # Random pixels of an image that a step sees; 0 means all.
    "num_pixels": 0,
    "log_every": 100,
    "checkpoint_every": 200,
}
VARIANTS = {
    "photo": {"num_pixels": 8192, "optimizer.learning_rate": 0.0003},
    "smoke": {
        "checkpoint_every": 20,
        "coord_range": (0.0, 0.5),
        "log_every": 10,
        "model.depth": 3,
        "model.width": 32,
        "num_steps": (100,),
        "resolution": (16,),
        "snapshot_steps": (10, 20, 50),
    },
    "report": {
        "coord_range": (-1.0, 1.0),
        "dataset.name": "cifar10",
        "mosaic": (1, 1, 1, 1, 3),
        "num_images": (8, 1, 1, 1, 1),
        "num_steps": (2000, 2000, 2000, 2000, 800),
        "optimizer.learning_rate": 0.0001,
        "optimizer.options": {},
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "resolution": (32, 64, 96, 128, 32),
        "snapshot_steps": (100, 200, 400, 800),
    },
    "best": {
        "dataset.name": "cifar10",
        "log_every": 50,
        "num_images": (8, 1),
        "num_steps": (100, 1000),
        "optimizer.learning_rate": 0.0003,
        "resolution": (32, 128),
        "snapshot_steps": (20, 50, 100, 200, 400),
    },
    "many": {
        "dataset.name": "cifar10",
        "model.depth": 4,
        "model.width": 64,
        "num_images": (64,),
        "num_steps": (400,),
        "resolution": (32,),
        "snapshot_steps": (50, 100, 200),
    },
}
RULES = {
    "seeds": settings.SEEDS,
    "resolution": settings.each(settings.at_least(1)),
    "num_images": settings.each(settings.at_least(1)),
    "mosaic": settings.each(settings.at_least(1)),
    "num_steps": settings.each(settings.at_least(1)),
    "snapshot_steps": settings.Rule(
        "positive and rising",
        lambda v: min(v, default=1) > 0 and sorted(set(v)) == list(v),
    ),
    "model.type": settings.one_of("Siren"),
    "model.width": settings.at_least(1),
    "model.depth": settings.at_least(2),
    "coord_range": settings.Rule(
        "(low, high) with low < high", lambda v: len(v) == 2 and v[0] < v[1]
    ),
    "num_pixels": settings.at_least(0),
    "log_every": settings.at_least(1),
    "checkpoint_every": settings.at_least(1),
    **settings.optimizer_rules(),
}

get_config = functools.partial(settings.build, "fit_image", BASE, VARIANTS)
