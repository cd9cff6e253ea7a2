"""Prunes networks that train_lbi trained with DessiLBI.

    python -m experiments.prune_lbi \\
        --config=experiments/configs/prune_lbi.py:VARIANT \\
        --config.run=runs/train_lbi/digits

Accuracies are those of the dense network before pruning and of the compressed,
fine-tuned one. Times do not include the training of the dense network.

Variants:
  digits: LeNet on the digits of scikit-learn; results/ has no run of it.
  smoke: the network of train_lbi's smoke variant with one epoch of fine-tuning, to
    check that the command runs.
  mnist_report: LeNet on MNIST in the student report's settings; 98.8 %, 98.9 % in 2
    minutes on two cores (results/prune_lbi_mnist_report).
  mnist: LeNet on MNIST in our settings, mean over three seeds; 99.1 % and 99.0 % in 22
    minutes on two cores (results/prune_lbi_mnist).
  cifar10_report: VGG-A with batch normalization on CIFAR-10, of the train_lbi variant
    of the same name. It is slow without a GPU; results/ has no run of it.
  cifar10: the same network in our settings, without curves; 89.4 % and 86.5 % in 24
    minutes on two cores (results/prune_lbi_cifar10).
  cifar10_narrow: VGG-A with a quarter of the channels; 80.2 % and 74.8 % in 34 minutes
    on two cores (results/prune_lbi_cifar10_narrow).
"""

import functools

from experiments.common import settings

BASE = {
    "seed": 0,
    "tensorboard": False,
    # A run of train_lbi. If it has several methods, all seeds of `method` are used.
    "run": "runs/train_lbi/digits",
    "method": "dessilbi",
    # The layer of Tables 10 and 12, and the shares removed from it. For Tables 11 and
    # 13 every layer is pruned at the last share.
    "layer": "conv3",
    "sparsities": (0.0, 0.2, 0.4, 0.6, 0.8),
    # Additional shares for the curves of accuracy against sparsity. There are curves
    # for `layer`, for all convolutions pruned by the same share, and for all
    # convolutions ranked together.
    "curve_sparsities": (0.1, 0.3, 0.5, 0.7, 0.9, 0.95),
    # Number of random draws over which random pruning is averaged.
    "num_random": 3,
    # Batches of 500 training images from which BN statistics are recalibrated.
    "num_recalibration_batches": 10,
    # Fine-tuning of `layer` with a mask at the last sparsity (epochs), and of the
    # compressed network (compressed_epochs); 0 epochs skip it.
    "finetune": {
        "epochs": 1,
        "compressed_epochs": 5,
        "name": "sgd",
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup_steps": 0,
        "options": settings.Open(momentum=0.9),
    },
    # Share of the channels of each hidden layer that the compressed network keeps.
    "compress": settings.Open(conv1=0.67, conv2=0.5, conv3=0.167, fc1=0.286),
    # Batch size of the speed measurement.
    "timing_batch_size": 128,
}

_CIFAR10 = {
    "compress": dict.fromkeys([*(f"conv{i}" for i in range(1, 9)), "fc1", "fc2"], 0.5),
    "finetune.compressed_epochs": 2,
}
# An evaluation of the whole VGG takes 15 s on two cores, an epoch of training minutes.
_WITHOUT_CURVES = {
    "curve_sparsities": (),
    "num_random": 1,
    "num_recalibration_batches": 4,
    "finetune.epochs": 0,
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
    "cifar10": _CIFAR10 | _WITHOUT_CURVES | {"run": "runs/train_lbi/cifar10"},
    "cifar10_narrow": _CIFAR10 | {"run": "runs/train_lbi/cifar10_narrow"},
}

RULES = {
    "sparsities": settings.each(settings.within("[0, 1)")),
    "curve_sparsities": settings.each(settings.within("[0, 1)"), empty=True),
    "num_random": settings.whole(1),
    "num_recalibration_batches": settings.whole(1),
    "compress.*": settings.within("(0, 1]"),
    "finetune.epochs": settings.whole(0),
    "finetune.compressed_epochs": settings.whole(0),
    "timing_batch_size": settings.whole(1),
    **settings.optimizer_rules("finetune"),
}

get_config = functools.partial(settings.build, "prune_lbi", BASE, VARIANTS)
