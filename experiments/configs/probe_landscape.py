"""Measures the landscape of a network with and without batch normalisation.

    python -m experiments.probe_landscape \\
        --config=experiments/configs/probe_landscape.py:VARIANT

Variants:
  digits: a small VGG on the digits of scikit-learn; two minutes.
  smoke: the same for a few steps, to see that everything runs.
  deep_linear: a linear network of 25 layers on the digits; two minutes.
  cifar10_cpu: a quarter of the channels of VGG-A on CIFAR-10, 3 epochs, two
    seeds; three quarters of an hour on two cores.
  cifar10_subset: the same on 5,000 images, 30 epochs, which all but the smallest
    rate without normalisation fit; no surface; as long.
  cifar10: VGG-A on CIFAR-10, 20 epochs as in the report; needs a GPU.
"""

import functools

from experiments.common import settings

BASE = {
    "tensorboard": False,
    # bn: with batch normalisation; plain: without. Each is trained at every learning
    # rate with every seed.
    "networks": ("bn", "plain"),
    "learning_rates": (1e-4, 5e-4, 1e-3, 2e-3),
    "seeds": (0,),
    # name: a data set of experiments/common/data.py with labels, and its data_dir.
    "dataset": {
        "name": "cifar10",
        "data_dir": settings.Optional(str),
    },
    # Only the first ones; 0 takes all.
    "num_train": 0,
    "num_test": 0,
    # Smaller images are enlarged by a whole factor and padded.
    "image_size": 32,
    # VGG or DeepLinear, with further fields of experiments.networks.vgg.VGG or
    # experiments.networks.deep_linear.DeepLinear but batch_norm.
    "model": {"type": "VGG"},
    # Whose gradients the report compares between steps: a pattern of paths.
    "last_layer": "^fc3/kernel$",
    # Any optimizer of optax; its learning rate is one of those above.
    "optimizer": {"name": "adam", "options": {}},
    "num_epochs": 20,
    "batch_size": 128,
    "checkpoint_every": 780,
    # Along the gradient: every so many steps, on the batch of the next one.
    "probe_every": 39,
    # eta: multiples of the gradient (not of the learning rate). The largest is that of
    # Santurkar et al., beyond which the network without normalisation breaks down.
    "step_sizes": tuple(0.4 / 2**k for k in reversed(range(8))),
    # How batch normalisation acts in a probe: batch (its own statistics, as in
    # training), frozen (running statistics) or recalibrated (statistics of the images
    # of `sharpness`, at each point).
    "bn_mode": "batch",
    # Largest eigenvalues of the Hessian on the first training images: every so many
    # steps (0: never), by so many Lanczos steps.
    "sharpness": {
        "every": 390,
        "num_images": 512,
        "num_eigenvalues": 2,
        "num_steps": 15,
    },
    # Losses on a square around the trained network of the first seed at this learning
    # rate: (size, size) points from -span to span, on the first training images in
    # chunks, whose own statistics normalise them. size 0 leaves it out.
    "surface": {
        "learning_rate": 1e-3,
        "size": 51,
        "span": 1.0,
        "num_images": 10_000,
        "chunk_size": 500,
    },
}

_SMALL_VGG = {"type": "VGG", "stages": ((8,), (16,), (16, 16)), "hidden": (32, 32)}
_DIGITS = {
    "dataset.name": "digits",
    "num_epochs": 15,
    "batch_size": 64,
    "checkpoint_every": 110,
    "probe_every": 11,
    "sharpness.every": 110,
    "sharpness.num_images": 256,
    "surface.size": 25,
    "surface.num_images": 500,
    "surface.chunk_size": 250,
}
_QUARTER_VGG = {
    "seeds": (0, 1),
    "model": {
        "type": "VGG",
        "stages": ((16,), (32,), (64, 64), (128, 128), (128, 128)),
        "hidden": (128, 128),
    },
    "checkpoint_every": 390,
    "sharpness.num_images": 256,
    "surface.size": 25,
    "surface.num_images": 1000,
}
VARIANTS = {
    "digits": _DIGITS | {"image_size": 16, "model": _SMALL_VGG},
    "smoke": _DIGITS
    | {
        "image_size": 16,
        "model": _SMALL_VGG,
        "learning_rates": (1e-3, 2e-3),
        "num_train": 128,
        "num_test": 100,
        "batch_size": 32,
        "num_epochs": 2,
        "checkpoint_every": 4,
        "probe_every": 2,
        "step_sizes": (0.1, 0.4),
        "sharpness.every": 4,
        "sharpness.num_images": 32,
        "sharpness.num_steps": 3,
        "surface.size": 3,
        "surface.num_images": 64,
        "surface.chunk_size": 32,
    },
    "deep_linear": _DIGITS
    | {
        "image_size": 8,
        "model": {"type": "DeepLinear", "depth": 25, "width": 64},
        "last_layer": "^fc25/kernel$",
    },
    "cifar10_cpu": _QUARTER_VGG | {"num_epochs": 3},
    "cifar10_subset": _QUARTER_VGG
    | {
        "num_train": 5000,
        "num_test": 2000,
        "num_epochs": 30,
        "probe_every": 195,
        "surface.size": 0,
    },
    "cifar10": {},
}

RULES = {
    "seeds": settings.SEEDS,
    "networks": settings.each(settings.one_of("bn", "plain")),
    "learning_rates": settings.each(settings.above(0)),
    "step_sizes": settings.each(settings.above(0)),
    "num_epochs": settings.at_least(1),
    "batch_size": settings.at_least(1),
    "checkpoint_every": settings.at_least(1),
    "probe_every": settings.at_least(1),
    "num_train": settings.at_least(0),
    "num_test": settings.at_least(0),
    "image_size": settings.at_least(0),
    "bn_mode": settings.one_of("batch", "frozen", "recalibrated"),
    "sharpness.every": settings.at_least(0),
    "sharpness.num_images": settings.at_least(1),
    "sharpness.num_eigenvalues": settings.at_least(1),
    "sharpness.num_steps": settings.at_least(1),
    "surface.size": settings.at_least(0),
    "surface.span": settings.above(0),
    "surface.num_images": settings.at_least(1),
    "surface.chunk_size": settings.at_least(1),
}

get_config = functools.partial(settings.build, "probe_landscape", BASE, VARIANTS)
