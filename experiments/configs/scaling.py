"""Measures the start-up time, the scaling over devices and the memory of processes.

    python -m experiments.scaling --config=experiments/configs/scaling.py:VARIANT

Variants:
  cpu: up to 8 virtual devices and a million images. The first training step ends after
    4.4 seconds (7.6 with an empty compilation cache), and a million images are encoded
    within 432 MiB; under 2 minutes on two cores (results/scaling_cpu).
  smoke: the same measurements at small sizes, to check that the command runs.
"""

import functools

from experiments.common import settings

BASE = {
    "seed": 0,
    # Repetitions of each start; the median is reported.
    "num_starts": 3,
    # Numbers of virtual devices, and 32x32 images per device in a meta-learning step.
    "num_devices": (1, 2, 4, 8),
    "images_per_device": 4,
    "num_rounds": 5,
    # Numbers of synthetic 8x8 images that are encoded into a functaset.
    "num_images": (1000, 10_000, 100_000, 1_000_000),
    "encode_batch_size": 1000,
}
VARIANTS = {
    "cpu": {},
    "smoke": {
        "encode_batch_size": 100,
        "images_per_device": 1,
        "num_devices": (2,),
        "num_images": (100,),
        "num_rounds": 2,
        "num_starts": 1,
    },
}
RULES = {
    "num_starts": settings.whole(1),
    "images_per_device": settings.whole(1),
    "num_rounds": settings.whole(1),
    "encode_batch_size": settings.whole(1),
    "num_devices": settings.each(settings.whole(1)),
    "num_images": settings.each(settings.whole(1)),
}

get_config = functools.partial(settings.build, "scaling", BASE, VARIANTS)
