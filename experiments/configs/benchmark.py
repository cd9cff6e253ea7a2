"""Measures the step of each optimizer on the same network.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:VARIANT

The table of variants and results is in the README.
"""

from ml_collections import ConfigDict

from experiments.configs import train_lbi

VARIANTS = ("lenet", "smoke", "vgg")


def get_config(variant: str = "lenet") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        lenet: LeNet at batch 128, on random images; a minute.
        smoke: the same at batch 8 with few steps.
        vgg: VGG-A with batch normalisation at batch 128; five minutes on two cores.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "benchmark"
    config.variant = variant
    config.seed = 0
    config.tensorboard = False

    source = train_lbi.get_config("cifar10" if variant == "vgg" else "mnist")
    # Model, penalty and optimizers are those of train_lbi; the first method is what
    # the others are compared with.
    for name in ("model", "image_size", "penalty", "enter_at", "optimizer", "methods"):
        config[name] = source[name]
    config.num_channels = 3 if variant == "vgg" else 1
    config.batch_size = 128
    # The methods take turns: a round times so many steps of each.
    config.num_rounds = 7
    config.steps_per_round = 50
    if variant == "smoke":
        config.batch_size = 8
        config.num_rounds = 2
        config.steps_per_round = 2
    elif variant == "vgg":
        config.num_rounds = 5
        config.steps_per_round = 4
    return config
