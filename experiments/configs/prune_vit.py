"""Prunes a Vision Transformer and measures cost, accuracy and speed.

    python -m experiments.prune_vit --config=experiments/configs/prune_vit.py:VARIANT

Variants:
  digits: the network of train_vit's digits variant; minutes.
  smoke: that of its smoke variant, at one ratio.
  cifar10_cpu: the network of train_vit's cifar10_cpu variant.
  cifar10_cpu_tuned: the same network, trained on for longer at one ratio, with
    itself as a teacher beside the labels.
  cifar10: the network of train_vit's cifar10 variant; needs a GPU to train on.
  b16: a ViT-B/16 that train_vit's finetune_b16 variant has fine-tuned (Tables 6
    and 7 of the report); needs a GPU.
  speed_b16: ViT-B/16 at 224 pixels with random weights, speed alone.
  speed_cifar10_cpu: the network of cifar10_cpu, its speed in more rounds; 24 min.
"""

import functools

from experiments.common import settings
from experiments.configs.train_vit import TRAINING_RULES

_EVERY, _SOME = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.2, 0.3, 0.4, 0.6)
BASE = {
    "tensorboard": False,
    "seeds": (0,),
    # As of train_vit.
    "dataset": {
        "name": "cifar10",
        "data_dir": settings.Optional(str),
    },
    "num_train": 0,
    "num_test": 0,
    "image_size": 32,
    "normalisation": "dataset",
    # What train_vit wrote, or a file of another's for vit.load_checkpoint.
    "checkpoint": settings.Optional(str, "runs/train_vit/digits/model.npz"),
    # Without a checkpoint and a data set: the model to time, one of vit.model.VARIANTS.
    "model": {"variant": "B", "patch_size": 16},
    "dtype": "float32",
    # Of jax.nn.dot_product_attention; cudnn on a GPU, in bfloat16.
    "attention_implementation": settings.Optional(str),
    # Which methods at which ratios: plateaus of the ramp over the layers, or what costs
    # the same by another method.
    "methods": {
        "max": _EVERY,
        **dict.fromkeys(("random", "cls", "evit", "merge"), _SOME),
        # Each a side in whole patches less.
        "resolution": (0.4, 0.6),
        **dict.fromkeys(("sum", "norm", "constant", "range"), (0.4,)),
        **dict.fromkeys(("zero", "released_code"), (0.2, 0.4, 0.6)),
        "skip": (0.4,),
        **dict.fromkeys(("heads", "heads_random", "heads_lbi"), (0.25, 0.5)),
        **dict.fromkeys(("neurons_random", "neurons_lbi"), (0.25, 0.5)),
    },
    # Where the masked and the compact mode are compared, on all test images.
    "parity_ratio": 0.4,
    # Training images that heads are scored and attention ranges measured on.
    "num_calibration": 512,
    "num_pictured": 6,
    "pictured_ratio": 0.6,
    # Time of a batch against the whole network's, in turns; 0 for no gradient.
    "timing": {
        "batch_sizes": (1, 32),
        "gradient_batch_size": 128,
        "num_rounds": 10,
        "methods": ("max", "skip", "zero", "evit", "merge", "resolution", "heads"),
    },
    # Training on with the pruning in place, at ratios that are among those above; of
    # the whole network at 0.
    "tuning": {
        "num_epochs": 1,
        # Of the whole network's probabilities in the targets; the labels have the rest.
        "teacher_weight": 0.0,
        "methods": {
            "dense": (0.0,),
            "max": (0.2, 0.3, 0.4),
            "random": (0.4,),
            "resolution": (0.4,),
        },
        # As of train_vit.
        "training": {
            "tensorboard": False,
            "batch_size": 128,
            "log_every": 65,
            "checkpoint_every": 390,
            "evaluate_every": 1,
            "label_smoothing": 0.1,
            "average_decay": 0.99,
            "patch_dropout": 1.0,
            "stages": (),
            "augment": {
                "crop_padding": 4,
                "flip": True,
                "num_ops": 0,
                "magnitude": 0.0,
                "min_area": 1.0,
                "erase": 0.0,
                "mixup": 0.0,
                "cutmix": 0.0,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-4,
                "schedule": "cosine",
                "warmup_steps": 20,
                "clip_norm": 1.0,
                "options": {"weight_decay": 0.05},
            },
        },
    },
    # DessiLBI that ranks heads and hidden neurons: a training of its own.
    "structure": {
        "num_epochs": 1,
        "learning_rate": 2e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "nu": 5.0,
        "enter_at": 0.5,
    },
}
VARIANTS = {
    "digits": {
        "dataset.name": "digits",
        "image_size": 8,
        "structure.num_epochs": 5,
        "tuning.num_epochs": 5,
        "tuning.training.augment.crop_padding": 1,
        "tuning.training.augment.flip": False,
        "tuning.training.log_every": 11,
    },
    "smoke": {
        "checkpoint": "runs/train_vit/smoke/model.npz",
        "dataset.name": "digits",
        "image_size": 8,
        **{f"methods.{name}": (0.5,) for name in BASE["methods"]},
        "num_calibration": 64,
        "num_pictured": 2,
        "num_test": 64,
        "num_train": 256,
        "timing.num_rounds": 2,
        "tuning.methods.max": (0.5,),
        "tuning.methods.random": (0.5,),
        "tuning.methods.resolution": (0.5,),
        "tuning.training.augment.crop_padding": 1,
        "tuning.training.augment.flip": False,
        "tuning.training.log_every": 11,
    },
    "cifar10_cpu": {"checkpoint": "runs/train_vit/cifar10_cpu/model.npz"},
    "cifar10_cpu_tuned": {
        "checkpoint": "runs/train_vit/cifar10_cpu/model.npz",
        "methods": {"max": (0.4,), "random": (0.4,), "resolution": (0.4,)},
        "timing.methods": (),
        "tuning.methods.max": (0.4,),
        "tuning.num_epochs": 4,
        "tuning.teacher_weight": 0.5,
        "tuning.training.augment.magnitude": 0.5,
        "tuning.training.augment.num_ops": 2,
        "tuning.training.optimizer.learning_rate": 0.0005,
        "tuning.training.optimizer.warmup_steps": 40,
    },
    "cifar10": {
        "checkpoint": "runs/train_vit/cifar10/model.npz",
        "dtype": "bfloat16",
        "tuning.num_epochs": 10,
        "tuning.training.augment.magnitude": 0.5,
        "tuning.training.augment.num_ops": 2,
    },
    "b16": {
        "checkpoint": "runs/train_vit/finetune_b16/model.npz",
        "dtype": "bfloat16",
        "image_size": 224,
        "methods.resolution": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        "normalisation": "google",
        "timing.batch_sizes": (1, 128),
        "tuning.training.augment.crop_padding": 0,
        "tuning.training.augment.min_area": 0.05,
        "tuning.training.label_smoothing": 0.0,
        "tuning.training.optimizer.learning_rate": 0.003,
        "tuning.training.optimizer.name": "sgd",
        "tuning.training.optimizer.options": {"momentum": 0.9},
    },
    "speed_b16": {
        "checkpoint": None,
        "dataset.name": None,
        "image_size": 224,
        "methods": {
            "evit": (0.6,),
            "max": (0.3, 0.6),
            "merge": (0.6,),
            "resolution": (0.6,),
            "zero": (0.6,),
        },
        "normalisation": "google",
        "timing.gradient_batch_size": 0,
        "timing.num_rounds": 3,
        "tuning.num_epochs": 0,
    },
    "speed_cifar10_cpu": {
        "checkpoint": "runs/train_vit/cifar10_cpu/model.npz",
        "methods": {
            "evit": (0.2, 0.3, 0.4, 0.6),
            "heads": (0.25, 0.5),
            "max": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
            "merge": (0.2, 0.3, 0.4, 0.6),
            "resolution": (0.4, 0.6),
            "skip": (0.4,),
            "zero": (0.2, 0.4, 0.6),
        },
        "timing.num_rounds": 50,
        "tuning.num_epochs": 0,
    },
}
RULES = {
    "seeds": settings.SEEDS,
    "num_train": settings.at_least(0),
    "num_test": settings.at_least(0),
    "image_size": settings.at_least(1),
    "normalisation": settings.one_of("dataset", "google"),
    "dtype": settings.one_of("float32", "bfloat16"),
    "methods.*": settings.each(settings.within("(0, 1)")),
    "parity_ratio": settings.within("(0, 1)"),
    "pictured_ratio": settings.within("(0, 1)"),
    "num_calibration": settings.at_least(1),
    "num_pictured": settings.at_least(1),
    "timing.batch_sizes": settings.each(settings.at_least(1), empty=True),
    "timing.num_rounds": settings.at_least(1),
    "timing.gradient_batch_size": settings.at_least(0),
    "tuning.num_epochs": settings.at_least(0),
    "tuning.teacher_weight": settings.within("[0, 1]"),
    **{f"tuning.training.{name}": rule for name, rule in TRAINING_RULES.items()},
    **settings.optimizer_rules("structure"),
}

get_config = functools.partial(settings.build, "prune_vit", BASE, VARIANTS)
