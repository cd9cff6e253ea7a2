"""Fits a SIREN to each of one or more images.

    python -m experiments.fit_image --config=experiments/configs/fit_image.py:VARIANT

Variants:
  photo: the photograph that scikit-learn contains, 512 pixels wide, or a file of
    yours (--config.image=PATH); 43 dB in 3 minutes on two cores
    (results/fit_image_photo).
  smoke: the photograph at 16 pixels, to check that the command runs; seconds.
  report: the setting of the student report on CIFAR-10 at sizes 32 to 128, and its
    mosaic of nine images; Adam at a constant rate. All 32x32 images are exact to 8 bits
    after 161 steps, the 128x128 image is not within 2,000; an hour on two cores
    (results/fit_image_report).
  best: our setting on CIFAR-10. The 32x32 images are exact to 8 bits after 78 steps,
    the 128x128 image after 649; 2 minutes on two cores (results/fit_image_best).
  many: 64 images of CIFAR-10 at once with small networks, whose parameter vectors are
    written as a functaset; results/ has no run of it.
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # An image file of any size, gray or RGB; it replaces the data set.
    "image": settings.Optional(str),
    # name: photograph, or a data set; the arguments of
    # experiments.common.data.load_dataset.
    "dataset": settings.dataset("photograph"),
    # The next four fields have one entry per task; a single entry holds for all tasks.
    # Images are resized to this many pixels on the longer side.
    "resolution": (512,),
    # Number of training images, from the first on. Each is fitted by its own network.
    "num_images": (1,),
    # k x k images are joined to one image, k * resolution wide.
    "mosaic": (1,),
    "num_steps": (4000,),
    # Steps after which the reconstruction is stored and measured, in addition to the
    # last step.
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
    # The pixel grid, [0, 1] along each axis, is mapped to this range. A wider range
    # gives the initial network higher frequencies: it fits the pixels in fewer steps,
    # but is less smooth between the pixels of a small image. Sitzmann et al. use
    # (-1, 1). A network without biases is an odd function of coordinates centered at 0;
    # (0, 2) has the same frequencies without this symmetry.
    # The map is folded into the first layer of the exported parameters.
    "coord_range": (0.0, 2.0),
    # `name` is any optimizer of optax or optax.contrib; `options` are its keywords.
    "optimizer": {
        "name": "adam",
        "options": settings.Open(b2=0.99),
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 5,
    },
    # Random pixels of each image per step; 0 uses all.
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
    "resolution": settings.each(settings.whole(1, 2**14)),
    "num_images": settings.each(settings.whole(1)),
    "mosaic": settings.each(settings.whole(1)),
    "num_steps": settings.each(settings.whole(1)),
    "snapshot_steps": settings.Rule(
        "a tuple of positive, rising integers below 2**31",
        lambda v: all(map(settings.whole(1).holds, v)) and sorted(set(v)) == list(v),
    ),
    "model.type": settings.one_of("Siren"),
    "model.width": settings.whole(1),
    "model.depth": settings.whole(2),
    "model.omega_0": settings.above(0),
    "coord_range": settings.pair(settings.FINITE),
    "num_pixels": settings.whole(0),
    **settings.optimizer_rules(),
}

get_config = functools.partial(settings.build, "fit_image", BASE, VARIANTS)
