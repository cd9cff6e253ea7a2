"""Trains a network with DessiLBI, with DessiLBI+Adam and with Adam.

    python -m experiments.train_lbi --config=experiments/configs/train_lbi.py:VARIANT

Accuracies are those of the dense networks on the test split. Times are the sum over all
methods and seeds of the variant.

Variants:
  digits: LeNet on the digits of scikit-learn; results/ has no run of it.
  smoke: the digits variant for two epochs, to check that the command runs.
  mnist_report: LeNet on MNIST in the student report's settings, 20 epochs at constant
    rates; 98.8 % with DessiLBI, 98.7 % with DessiLBI+Adam and 98.4 % with Adam in 6
    minutes on two cores (results/train_lbi_mnist_report).
  mnist: LeNet on MNIST in our settings, three seeds; 99.1 % with DessiLBI, 99.2 % with
    DessiLBI+Adam and 99.2 % with Adam in 85 minutes on two cores
    (results/train_lbi_mnist).
  cifar10_report: VGG-A with batch normalization on CIFAR-10 in the settings of the
    report, 20 epochs at constant rates. It needs a GPU; results/ has no run of it.
  cifar10: the same network in our settings with DessiLBI only, 20 epochs with crops,
    mirror images, label smoothing and weight decay; 89 % in 100 minutes on two cores
    (results/train_lbi_cifar10).
  cifar10_narrow: the same network with a quarter of the channels, all three methods, 10
    epochs without augmentation; 80 % with DessiLBI, 79 % with DessiLBI+Adam and 78 %
    with Adam in 24 minutes on two cores (results/train_lbi_cifar10_narrow).
"""

import functools

from experiments.common import settings


def _optimizer(name, learning_rate, **options):
    return {
        "name": name,
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup_steps": 0,
        "options": settings.Open(options),
    }


_REPORT_OPTIONS = {"nu": 10.0, "kappa": 1.0, "momentum": 0.9}

BASE = {
    "tensorboard": False,
    # Names of optimizers below. Each is run with every seed.
    "methods": ("adam", "dessilbi", "dessilbi_adam"),
    "seeds": (0, 1, 2),
    # name: a labeled data set of experiments/common/data.py; data_dir: its directory.
    "dataset": settings.dataset("mnist"),
    # Number of training and test images, from the first on; 0 uses all.
    "num_train": 0,
    "num_test": 0,
    # Smaller images are enlarged by an integer factor and padded.
    "image_size": 28,
    # Whether to crop and mirror the training images at random.
    "augment": False,
    "label_smoothing": 0.0,
    # type: LeNet or VGG. Other fields are those of the module in experiments.networks.
    "model": settings.Open(type="LeNet"),
    "num_epochs": 20,
    "batch_size": 128,
    # In steps. An evaluation follows every epoch.
    "log_every": 500,
    "checkpoint_every": 2500,
    # Lambda of the penalties. "auto" is 1. With "suggested", lbi.suggest_lambda chooses
    # it such that the median group of each layer enters at the share `enter_at` of the
    # run.
    "penalty": "suggested",
    "enter_at": 0.4,
    # name: adam, an optimizer of lbi, or adam_then_dessilbi (the student report's: a
    # full step of each). schedule: constant or cosine, after the warm-up.
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
    # Under batch normalization the gradient does not oppose the shrinkage of a filter
    # by the coupling: a filter that does not enter early never enters.
    "enter_at": 0.1,
    "seeds": (0,),
    "log_every": 39,
    "checkpoint_every": 390,
}
# The student report divides the rate by 10 every 20 epochs and trains for 20 epochs:
# the rate is constant.
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
    "cifar10": _CIFAR10
    | {
        "methods": ("dessilbi",),
        "augment": True,
        "label_smoothing": 0.1,
        # On a validation part, weight decay raises the narrow network by a point. Four
        # times as much of it keeps most filters of the last layers from entering.
        "optimizer.dessilbi": _optimizer(
            "dessilbi", 0.05, nu=50.0, kappa=1.0, momentum=0.9, weight_decay=5e-4
        ),
    },
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
    "methods": settings.distinct(settings.one_of(*BASE["optimizer"])),
    "num_epochs": settings.whole(1),
    "image_size": settings.whole(0, 2**16),
    "model.type": settings.one_of("LeNet", "VGG"),
    "penalty": settings.one_of("auto", "suggested"),
    "enter_at": settings.within("(0, 1]"),
    **settings.optimizer_rules("optimizer.*"),
}

get_config = functools.partial(settings.build, "train_lbi", BASE, VARIANTS)
