"""Encodes a data set into a functaset with the weights of a finished run.

    python -m experiments.make_functaset \\
        --config=experiments/configs/make_functaset.py:VARIANT \\
        --config.run=runs/meta_learn/digits

The file is <workdir>/functaset.npz. The PSNR of the latents is that of the run whose
weights are used: about 43 dB for digits (results/meta_learn_digits) and about 25 dB for
CIFAR-10 (results/meta_learn_cifar10_cpu).

Variants:
  digits: both splits of the digits of scikit-learn, with 3 augmented copies of the
    training split.
  smoke: the first 32 images of each split, with the smoke run of meta_learn, to check
    that the command runs.
  cifar10_cpu: CIFAR-10 with the weights of meta_learn's cifar10_cpu run, each image
    once; about 130 images per second on two cores (results/meta_learn_cifar10_cpu).
  cifar10_spatial_cpu: CIFAR-10 with the weights of meta_learn's cifar10_spatial_cpu
    run, padded by 4 pixels, and each training image also mirrored; 20 minutes on two
    cores (results/make_functaset_cifar10_spatial_cpu).
  cifar10_spatial: the same with the weights of meta_learn's cifar10_spatial run, and
    four copies of each training image. It needs a GPU.
  cifar10_flip: as cifar10_cpu, with one more copy of the training split that is
    cropped and mirrored at random.
"""

import functools

from experiments.common import settings

BASE = {
    # Seed of the augmentation.
    "seed": 0,
    # The run of meta_learn or import_functa whose weights and inner loop are used.
    "run": "runs/meta_learn/digits",
    # As in meta_learn. Without a name the data set of `run` is used, except for the
    # fields that are set here.
    "dataset": settings.dataset(settings.Optional(str)),
    "splits": ("train", "test"),
    # Number of images of each split, from the first on; 0 uses all.
    "num_images": 0,
    # How often the training split is encoded. Copies after the first are enlarged by a
    # quarter and cropped at random. With `flip` they are also mirrored at random.
    "copies": 1,
    "flip": False,
    # Reflected pixels on each side of every image, for grids of latents. Copies after
    # the first are then moved by less than a cell, and with `flip` every second one is
    # mirrored. classify_functa takes windows of the larger grids (crop), so that each
    # image is seen in all of its crops.
    "padding": 0,
    # Steps of the inner loop; None means those of the run, and at most as many where
    # each step has its own rates.
    "inner": {"num_steps": settings.Optional(int)},
    # Images fitted at once. On a CPU small batches are fastest: they fit the cache.
    "batch_size": 8,
}
VARIANTS = {
    "digits": {"copies": 4},
    "smoke": {"copies": 2, "num_images": 32, "run": "runs/meta_learn/smoke"},
    "cifar10_cpu": {"run": "runs/meta_learn/cifar10_cpu"},
    "cifar10_spatial_cpu": {
        "copies": 2,
        "flip": True,
        "padding": 4,
        "run": "runs/meta_learn/cifar10_spatial_cpu",
    },
    "cifar10_spatial": {
        "batch_size": 500,
        "copies": 4,
        "flip": True,
        "padding": 4,
        "run": "runs/meta_learn/cifar10_spatial",
    },
    "cifar10_flip": {"copies": 2, "flip": True, "run": "runs/meta_learn/cifar10_cpu"},
}
RULES = {
    "splits": settings.distinct(settings.one_of("train", "test")),
    "num_images": settings.whole(0),
    "copies": settings.whole(1),
    "padding": settings.whole(0),
    "inner.num_steps": settings.optional(settings.whole(0)),
}

get_config = functools.partial(settings.build, "make_functaset", BASE, VARIANTS)
