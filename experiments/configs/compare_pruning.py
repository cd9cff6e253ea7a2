"""Compares methods of pruning at equal sparsity and equal training.

    python -m experiments.compare_pruning \\
        --config=experiments/configs/compare_pruning.py:VARIANT

Every method trains for `num_epochs`, is pruned, and is fine-tuned for
`finetune.epochs`. The results of every pruned network are stored when it is finished;
the same command resumes there.

Variants:
  digits: LeNet on the digits of scikit-learn, one seed; a few minutes on two cores.
    results/ has no run of it.
  lenet: LeNet on 15,000 images of MNIST, three seeds. The two of
    results/compare_pruning_lenet took 28 minutes on two cores.
  lenet_grains: pruning by DessiLBI's order of entry and by norm at four granularities,
    weights, rows, kernels and filters (Mao et al. 2017); results/ has no run of it.
  vgg_small: VGG-A with batch normalization and a quarter of the channels on CIFAR-10,
    three seeds. It takes hours on two cores and is meant for a GPU; results/ has no run
    of it.
  resnet_small: ResNet-8 on CIFAR-10, three seeds; as vgg_small.
  smoke: the digits variant with fewer images and methods, one epoch and one sparsity,
    to check that the command runs.
"""

import functools

from experiments.common import settings


def _optimizer(learning_rate, **options):
    return {
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup_steps": 0,
        "options": settings.Open(options),
    }


# method: (the training, the order in which groups are kept)
METHODS = {
    "dessilbi": ("dessilbi", "entry"),
    "dessilbi_adam": ("dessilbi_adam", "entry"),
    "magnitude": ("sgd", "magnitude"),
    "taylor": ("sgd", "taylor"),
    "group_lasso": ("group_lasso", "magnitude"),
    "random": ("sgd", "random"),
    "gradual": ("sgd", "magnitude"),
}

BASE = {
    "tensorboard": False,
    # dessilbi, dessilbi_adam: by order of entry. magnitude: once, by the norm. taylor:
    # by the first-order effect on the loss (Molchanov et al. 2019). group_lasso: by the
    # norm, after training with proximal steps. random. gradual: by the norm, in several
    # steps during the fine-tuning (Zhu & Gupta 2017).
    "methods": tuple(METHODS),
    "seeds": (0, 1, 2),
    "dataset": settings.dataset("mnist"),
    # Numbers of training and test images; 0 uses all. The last num_validation training
    # images are held out for validation.
    "num_train": 0,
    "num_validation": 5000,
    "num_test": 0,
    # Smaller images are enlarged by an integer factor and padded.
    "image_size": 28,
    # Whether to crop and mirror the training images at random.
    "augment": False,
    # type: LeNet, VGG or ResNet. Other fields are those of the module.
    "model": settings.Open(type="LeNet"),
    "num_epochs": 10,
    "batch_size": 128,
    # In steps.
    "checkpoint_every": 2500,
    # For each grain the fractions of its groups that are removed; () leaves it out.
    # Weights, rows and kernels (of a convolution) are set to zero; filters and units of
    # dense layers are removed with everything that belongs to them.
    "sparsities": {
        "weights": (0.9, 0.95, 0.98),
        "rows": (),
        "kernels": (),
        "filters": (0.5, 0.7, 0.9),
    },
    # "layer" removes the same fraction of each layer, "global" ranks all layers
    # together. Of several, the one with the best accuracy on the validation images
    # before fine-tuning is used. With "layer" all methods give networks of equal size.
    "scopes": {
        "weights": ("layer", "global"),
        "rows": ("layer", "global"),
        "kernels": ("layer", "global"),
        "filters": ("layer",),
    },
    # gradual prunes num_prunings times, the last time after this share of the steps.
    "gradual": {"num_prunings": 10, "until": 0.5},
    # The proximal steps shrink the norm of a median group without gradient by this
    # share over the whole training.
    "lasso_strength": 1.0,
    # DessiLBI: the median group of each layer enters at this share of the run if its
    # norm stays constant.
    "enter_at": 0.4,
    # Batches of 500 images for the statistics of batch normalization, and of
    # batch_size images for the gradients of taylor.
    "num_recalibration_batches": 10,
    "num_gradient_batches": 20,
    "optimizer": {
        "sgd": _optimizer(0.05, momentum=0.9, weight_decay=5e-4),
        "group_lasso": _optimizer(0.05, momentum=0.9, weight_decay=5e-4),
        "dessilbi": {
            "name": "dessilbi",
            **_optimizer(0.05, nu=20.0, kappa=1.0, momentum=0.9),
        },
        "dessilbi_adam": {
            "name": "dessilbi_adam",
            **_optimizer(1e-3, nu=5.0, kappa=1.0),
        },
    },
    # Any optimizer of optax, the same for all methods.
    "finetune": {"epochs": 2, "name": "sgd", **_optimizer(0.02, momentum=0.9)},
}

_CIFAR10 = {
    "dataset.name": "cifar10",
    "image_size": 32,
    # As in train_lbi.
    "optimizer.dessilbi.options.nu": 50.0,
    "enter_at": 0.1,
    "augment": True,
}
_LENET = {"num_train": 20000, "num_epochs": 8}
_GRAINS = ("weights", "rows", "kernels", "filters")
VARIANTS = {
    "digits": {
        "dataset.name": "digits",
        "seeds": (0,),
        "batch_size": 64,
        "num_validation": 238,
        # 18 steps an epoch.
        "num_epochs": 20,
        "finetune.epochs": 5,
    },
    "lenet": _LENET,
    "lenet_grains": _LENET
    | {
        "methods": ("dessilbi", "magnitude"),
        "sparsities": dict.fromkeys(_GRAINS, (0.5, 0.8, 0.9)),
        # Equal fractions of each layer, so that only the grain differs.
        "scopes": dict.fromkeys(_GRAINS, ("layer",)),
    },
    "vgg_small": _CIFAR10
    | {
        "model": {
            "type": "VGG",
            "batch_norm": True,
            "stages": ((16,), (32,), (64, 64), (128, 128), (128, 128)),
            "hidden": (128, 128),
        }
    },
    "resnet_small": _CIFAR10 | {"model": {"type": "ResNet"}},
    "smoke": {
        "dataset.name": "digits",
        "seeds": (0,),
        "num_train": 320,
        "num_validation": 64,
        "num_test": 100,
        "batch_size": 64,
        "methods": tuple(name for name in METHODS if name != "dessilbi_adam"),
        "num_epochs": 1,
        "sparsities.weights": (0.9,),
        "sparsities.filters": (0.5,),
        "gradual.num_prunings": 2,
        "num_gradient_batches": 2,
        "finetune.epochs": 1,
    },
}

RULES = {
    "methods": settings.distinct(settings.one_of(*METHODS)),
    "num_epochs": settings.whole(1),
    "num_validation": settings.whole(1),
    "image_size": settings.whole(0, 2**16),
    "model.type": settings.one_of("LeNet", "VGG", "ResNet"),
    "sparsities.*": settings.each(settings.within("[0, 1)"), empty=True),
    "scopes.*": settings.distinct(settings.one_of("layer", "global")),
    "gradual.num_prunings": settings.whole(1),
    "gradual.until": settings.within("(0, 1)"),
    "lasso_strength": settings.at_least(0),
    "enter_at": settings.within("(0, 1]"),
    "num_recalibration_batches": settings.whole(1),
    "num_gradient_batches": settings.whole(1),
    "finetune.epochs": settings.whole(1),
    **settings.optimizer_rules("optimizer.*"),
    "optimizer.*.learning_rate": settings.above(0),
    **settings.optimizer_rules("finetune"),
}

get_config = functools.partial(settings.build, "compare_pruning", BASE, VARIANTS)
