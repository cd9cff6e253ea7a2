"""Measures what whole processes cost: start-up, devices, size of a data set.

    python -m experiments.scaling --config=experiments/configs/scaling.py:VARIANT

The table of variants and results is in the README.
"""

from ml_collections import ConfigDict

VARIANTS = ("cpu", "smoke")


def get_config(variant: str = "cpu") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        cpu: up to 8 virtual devices and a million images; minutes on two cores.
        smoke: the same in small.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "scaling"
    config.variant = variant
    config.seed = 0
    config.tensorboard = False
    # Repetitions of each start; the median counts.
    config.num_starts = 3
    # Virtual devices, each with so many 32x32 images of a meta-learning step.
    config.num_devices = (1, 2, 4, 8)
    config.images_per_device = 4
    config.num_rounds = 5
    # Synthetic 8x8 images encoded into a functaset.
    config.num_images = (1000, 10_000, 100_000, 1_000_000)
    config.encode_batch_size = 1000
    if variant == "smoke":
        config.num_starts = 1
        config.num_devices = (2,)
        config.images_per_device = 1
        config.num_rounds = 2
        config.num_images = (100,)
        config.encode_batch_size = 100
    return config
