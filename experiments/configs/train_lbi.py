"""Trains a network with DessiLBI, with DessiLBI+Adam and with Adam.

    python -m experiments.train_lbi --config=experiments/configs/train_lbi.py:VARIANT

Variants:
  digits: LeNet on the digits of scikit-learn; a minute.
  smoke: the same for two epochs, to see that everything runs.
  mnist_report, cifar10_report: the settings of the report: LeNet on MNIST, VGG-A
    with batch normalisation on CIFAR-10, 20 epochs at constant rates.
  mnist, cifar10: the same networks with our settings; cifar10 needs a GPU.
  cifar10_short: VGG-A with batch normalisation, DessiLBI alone, 8 epochs without
    augmentation: half an hour on two cores.
  cifar10_narrow: a quarter of its channels, 10 epochs without augmentation, all
    three; a quarter of an hour on two cores.
"""

import functools

from experiments.common import settings


def _optimizer(name, learning_rate, **options):
    return {
        "name": name,
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup_steps": 0,
        "options": options,
    }


_REPORT_OPTIONS = {"nu": 10.0, "kappa": 1.0, "momentum": 0.9}

BASE = {
    "tensorboard": False,
    # Which of the optimizers below to train with, each with every seed.
    "methods": ("adam", "dessilbi", "dessilbi_adam"),
    "seeds": (0, 1, 2),
    # name: a data set of experiments/common/data.py with labels, and its data_dir.
    "dataset": {
        "name": "mnist",
        "data_dir": settings.Optional(str),
    },
    # Only the first ones; 0 takes all.
    "num_train": 0,
    "num_test": 0,
    # Smaller images are enlarged by a whole factor and padded.
    "image_size": 28,
    # Random crops and flips.
    "augment": False,
    # type: LeNet or VGG; the fields are those of the module in experiments.networks.
    "model": {"type": "LeNet"},
    "num_epochs": 20,
    "batch_size": 128,
    # Steps; every epoch ends with an evaluation.
    "log_every": 500,
    "checkpoint_every": 2500,
    # The penalties' lambda: "auto" is 1; "suggested" lets the median group of each
    # layer enter at `enter_at` of the run, by lbi.suggest_lambda.
    "penalty": "suggested",
    "enter_at": 0.4,
    # name: an optimizer of lbi or optax, or adam_then_dessilbi (the report's: a full
    # step of each). schedule: constant or cosine, after the warm-up.
    "optimizer": {
        "adam": _optimizer("adam", 1e-3),
        "dessilbi": _optimizer("dessilbi", 0.05, nu=20.0, kappa=1.0, momentum=0.9),
        "dessilbi_adam": _optimizer("dessilbi_adam", 1e-3, nu=5.0, kappa=1.0),
    },
}

_DIGITS = {"dataset.name": "digits", "seeds": (0,), "batch_size": 64}
_CIFAR10 = {
    "dataset.name": "cifar10",
    "image_size": 32,
    "model": {"type": "VGG", "batch_norm": True},
    "optimizer.dessilbi.options.nu": 50.0,
    # Under batch normalization the gradient does not hold a filter against the
    # coupling: a filter that has not entered early never does.
    "enter_at": 0.1,
    "seeds": (0,),
    "log_every": 39,
    "checkpoint_every": 390,
}
# The report divides the rate by 10 every 20 epochs, and trains for 20.
_REPORT = {
    "penalty": "auto",
    "seeds": (0,),
    **{
        f"optimizer.{method}": _optimizer(name, 0.01, **options)
        | {"schedule": "constant"}
        for method, name, options in (
            ("adam", "adam", {}),
            ("dessilbi", "dessilbi", _REPORT_OPTIONS),
            ("dessilbi_adam", "adam_then_dessilbi", _REPORT_OPTIONS),
        )
    },
}
VARIANTS = {
    "digits": _DIGITS,
    "smoke": _DIGITS
    | {"num_epochs": 2, "num_train": 256, "log_every": 2, "checkpoint_every": 4},
    "mnist_report": _REPORT,
    "mnist": {},
    "cifar10_report": _CIFAR10 | _REPORT,
    "cifar10": _CIFAR10 | {"augment": True},
    "cifar10_short": _CIFAR10 | {"methods": ("dessilbi",), "num_epochs": 8},
    "cifar10_narrow": _CIFAR10
    | {
        "model": {
            "type": "VGG",
            "batch_norm": True,
            "stages": ((16,), (32,), (64, 64), (128, 128), (128, 128)),
            "hidden": (128, 128),
        },
        "num_epochs": 10,
        "log_every": 130,
    },
}

RULES = {
    "seeds": settings.SEEDS,
    "methods": settings.each(settings.one_of(*BASE["optimizer"])),
    "num_epochs": settings.at_least(1),
    "batch_size": settings.at_least(1),
    "log_every": settings.at_least(1),
    "checkpoint_every": settings.at_least(1),
    "num_train": settings.at_least(0),
    "num_test": settings.at_least(0),
    "image_size": settings.at_least(0),
    "model.type": settings.one_of("LeNet", "VGG"),
    "penalty": settings.one_of("auto", "suggested"),
    "enter_at": settings.within("(0, 1]"),
    **settings.optimizer_rules("optimizer.*"),
}

get_config = functools.partial(settings.build, "train_lbi", BASE, VARIANTS)
