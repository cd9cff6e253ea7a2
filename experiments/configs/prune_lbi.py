"""Prunes networks that train_lbi trained with DessiLBI.

    python -m experiments.prune_lbi \\
        --config=experiments/configs/prune_lbi.py:VARIANT \\
        --config.run=runs/train_lbi/digits

Variants:
  digits: LeNet on digits, half a minute.
  smoke: the same without fine-tuning to speak of, to see that everything runs.
  mnist_report, mnist: LeNet on MNIST, all seeds.
  cifar10_report, cifar10: VGG-A; slow without a GPU.
  cifar10_short, cifar10_narrow: VGG-A after few epochs; a quarter of its
    channels.
"""

import functools

from experiments.common import settings

BASE = {
    "seed": 0,
    "tensorboard": False,
    # A run of train_lbi: of one method and seed, or of several, of which all seeds of
    # `method` are taken.
    "run": "runs/train_lbi/digits",
    "method": "dessilbi",
    # The layer of Tables 10 and 12 and the shares removed from it; every layer is
    # pruned at the last of them for Tables 11 and 13.
    "layer": "conv3",
    "sparsities": (0.0, 0.2, 0.4, 0.6, 0.8),
    # Further shares of the curves against sparsity: of `layer`, and of the filters of
    # all convolutions by layer and all together.
    "curve_sparsities": (0.1, 0.3, 0.5, 0.7, 0.9, 0.95),
    # Draws over which random pruning is averaged.
    "num_random": 3,
    # Batches of 500 training images from which BN statistics are measured anew.
    "num_recalibration_batches": 10,
    # Masked training of `layer` at the last sparsity, and of the compressed network; 0
    # epochs leave it out.
    "finetune": {
        "epochs": 1,
        "compressed_epochs": 5,
        "name": "sgd",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_steps": 0,
        "options": {"momentum": 0.9},
    },
    # Channels that each hidden layer keeps in the compressed network, as shares.
    "compress": {"conv1": 0.67, "conv2": 0.5, "conv3": 0.167, "fc1": 0.286},
    # Images at once when the speed is measured.
    "timing_batch_size": 128,
}

_CIFAR10 = {
    "compress": dict.fromkeys([*(f"conv{i}" for i in range(1, 9)), "fc1", "fc2"], 0.5),
    "finetune.compressed_epochs": 2,
}
VARIANTS = {
    "digits": {},
    "smoke": {
        "run": "runs/train_lbi/smoke",
        "curve_sparsities": (0.5,),
        "finetune.compressed_epochs": 1,
    },
    "mnist_report": {"run": "runs/train_lbi/mnist_report"},
    "mnist": {"run": "runs/train_lbi/mnist"},
    "cifar10_report": _CIFAR10 | {"run": "runs/train_lbi/cifar10_report"},
    "cifar10": _CIFAR10 | {"run": "runs/train_lbi/cifar10"},
    "cifar10_short": _CIFAR10
    | {
        "run": "runs/train_lbi/cifar10_short",
        # An evaluation of the whole VGG takes 15 s on two cores.
        "curve_sparsities": (),
        "num_random": 1,
        "num_recalibration_batches": 4,
        "finetune.epochs": 0,
        "finetune.compressed_epochs": 0,
    },
    "cifar10_narrow": _CIFAR10 | {"run": "runs/train_lbi/cifar10_narrow"},
}

RULES = {
    "sparsities": settings.each(settings.within("[0, 1)")),
    "curve_sparsities": settings.each(settings.within("[0, 1)"), empty=True),
    "num_random": settings.at_least(1),
    "num_recalibration_batches": settings.at_least(1),
    "compress.*": settings.within("(0, 1]"),
    "finetune.epochs": settings.at_least(0),
    "finetune.compressed_epochs": settings.at_least(0),
    "timing_batch_size": settings.at_least(1),
    "seed": settings.at_least(0),
    **settings.optimizer_rules("finetune"),
}

get_config = functools.partial(settings.build, "prune_lbi", BASE, VARIANTS)
