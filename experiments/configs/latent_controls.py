"""Measures the PSNR of linear codes, the controls of latents of the same size.

    python -m experiments.latent_controls \\
        --config=experiments/configs/latent_controls.py:VARIANT

Variants:
  digits: the digits of scikit-learn, in seconds.
  smoke: the first 100 images of each split, to check that the command runs.
  cifar10: the sizes of published latents; 95 seconds on two cores
    (results/latent_controls_cifar10).
"""

import functools

from experiments.common import settings

BASE = {
    # As in meta_learn. Images may have at most 4,096 values.
    "dataset": settings.dataset("digits"),
    # Number of images of each split, from the first on; 0 uses all.
    "num_images": 0,
    # Sizes in the summary: numbers of components of whole images, and shapes (h, w, C)
    # of latent grids, with C components of each cell. The figure shows all sizes.
    "sizes": (4, 8, 16, 32),
    "grids": ((2, 2, 2), (2, 2, 4), (2, 2, 8), (4, 4, 1), (4, 4, 2)),
}
VARIANTS = {
    "digits": {},
    "smoke": {"num_images": 100, "sizes": (8,), "grids": ((2, 2, 2),)},
    "cifar10": {
        "dataset.name": "cifar10",
        "sizes": (64, 128, 256, 512, 1024, 1536, 2048),
        "grids": (
            *((8, 8, 8), (8, 8, 16), (8, 8, 24), (8, 8, 32)),
            *((4, 4, 32), (4, 4, 64), (4, 4, 96), (4, 4, 128)),
            (16, 16, 4),
        ),
    },
}
RULES = {
    "num_images": settings.whole(0),
    "sizes": settings.each(settings.whole(1)),
    "grids": settings.each(
        settings.Rule(
            "(h, w, C) with integers of at least 1",
            lambda v: len(v) == 3 and all(type(n) is int and n >= 1 for n in v),
        ),
        empty=True,
    ),
}

get_config = functools.partial(settings.build, "latent_controls", BASE, VARIANTS)
