"""Trains a Vision Transformer.

    python -m experiments.train_vit --config=experiments/configs/train_vit.py:VARIANT

Variants:
  digits: four layers on the digits of scikit-learn; a minute.
  smoke: the same for two epochs, to see that everything runs.
  cifar10_cpu: 7 layers of width 128 from scratch, patches of 4 pixels behind two
    convolutions, 64 epochs; an hour and a half on two cores.
  cifar10: 9 layers of width 192 from scratch, plain patches of 4, 300 epochs;
    needs a GPU.
  finetune_b16: ViT-B/16 at 224 pixels from config.checkpoint, with Google's
    recipe; needs a GPU and the file.
"""

import functools

from experiments.common import settings

BASE = {
    "tensorboard": False,
    "seeds": (0,),
    # name: a data set of experiments/common/data.py with labels, and its data_dir.
    "dataset": {
        "name": "cifar10",
        "data_dir": settings.Optional(str),
    },
    # Only the first ones; 0 takes all.
    "num_train": 0,
    "num_test": 0,
    # What the model sees; images of another size are resized on the device.
    "image_size": 32,
    # "dataset": by its channels' mean and deviation; "google": to [-1, 1].
    "normalisation": "dataset",
    # A file for vit.load_checkpoint to start from; its shapes say what the model is.
    "checkpoint": settings.Optional(str),
    # One of vit.model.VARIANTS and fields of vit.ViT in place of its own. With a
    # checkpoint only dtype and the rates count: its shapes say the rest.
    "model": {
        "variant": "cifar_192",
        "patch_size": 4,
        "drop_path_rate": 0.1,
        "dtype": "bfloat16",
    },
    "augment": {
        # Random windows of the images padded by so many pixels, and mirrored ones.
        "crop_padding": 4,
        "flip": True,
        # RandAugment: operations for each image, 0 for none, and their strength.
        "num_ops": 2,
        "magnitude": 0.9,
        # The smallest part of an image that a random crop resizes; 1 for none.
        "min_area": 1.0,
        # Probability of an erased rectangle.
        "erase": 0.25,
        # Alphas of the Beta distributions; 0 for none.
        "mixup": 0.8,
        "cutmix": 1.0,
    },
    "label_smoothing": 0.1,
    # Share of each image's patches that are trained on.
    "patch_dropout": 1.0,
    # What changes on the way: ((share of the epochs from which, {field: value}), ...);
    # fields are patch_dropout, label_smoothing and augment's, "augment.num_ops".
    "stages": (),
    "num_epochs": 300,
    "batch_size": 512,
    # Steps.
    "log_every": 97,
    "checkpoint_every": 970,
    # Epochs between evaluations.
    "evaluate_every": 10,
    # Decay of the average of the weights, which is what is evaluated.
    "average_decay": 0.9995,
    "optimizer": {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 970,
        "clip_norm": 1.0,
        "options": {"weight_decay": 0.05},
    },
}


def _without(*names):
    return {f"augment.{name}": 0 if name == "num_ops" else 0.0 for name in names}


_DIGITS = {
    "dataset.name": "digits",
    "image_size": 8,
    "model": {
        "variant": "cifar_128",
        "num_layers": 4,
        "hidden_size": 64,
        "mlp_dim": 128,
        "patch_size": 2,
        "drop_path_rate": 0.0,
        "dtype": "float32",
    },
    "augment.crop_padding": 1,
    "augment.flip": False,
    **_without("num_ops", "erase", "mixup", "cutmix"),
    "num_epochs": 60,
    "batch_size": 128,
    "log_every": 11,
    "checkpoint_every": 110,
    "average_decay": 0.99,
    "optimizer.warmup_steps": 22,
}
VARIANTS = {
    "digits": _DIGITS,
    "smoke": _DIGITS
    | {
        "num_epochs": 2,
        "num_train": 256,
        "num_test": 64,
        "log_every": 1,
        "checkpoint_every": 2,
        "evaluate_every": 1,
        "optimizer.warmup_steps": 1,
    },
    "cifar10_cpu": {
        "model": {
            "variant": "cifar_128",
            "patch_size": 4,
            "stem": (48, 96),
            "drop_path_rate": 0.0,
            "dtype": "float32",
        },
        "augment.magnitude": 0.5,
        **_without("erase", "mixup", "cutmix"),
        # Half of the patches cost half the time. The last epochs see the images as
        # they are at test time: whole, and without RandAugment (He et al. 2019,
        # arXiv 1909.09148).
        "patch_dropout": 0.5,
        "stages": ((0.85, {"patch_dropout": 1.0, "augment.num_ops": 0}),),
        "num_epochs": 64,
        "batch_size": 128,
        "log_every": 65,
        "checkpoint_every": 390,
        "evaluate_every": 1,
        "average_decay": 0.998,
        "optimizer": {
            "name": "muon",
            "learning_rate": 4e-3,
            "schedule": "cosine",
            "warmup_steps": 390,
            "clip_norm": 1.0,
            "options": {
                "consistent_rms": 0.2,
                "weight_decay": 0.05,
                "adam_weight_decay": 0.0,
            },
        },
    },
    "cifar10": {},
    # Google's recipe for CIFAR-10, at 224 pixels and a batch for one GPU.
    "finetune_b16": {
        "image_size": 224,
        "normalisation": "google",
        "checkpoint": "B_16.npz",
        "model.drop_path_rate": 0.0,
        "augment.crop_padding": 0,
        "augment.min_area": 0.05,
        **_without("num_ops", "erase", "mixup", "cutmix"),
        "label_smoothing": 0.0,
        "num_epochs": 6,
        "checkpoint_every": 97,
        "evaluate_every": 1,
        "average_decay": 0.0,
        "optimizer": {
            "name": "sgd",
            "learning_rate": 0.01,
            "schedule": "cosine",
            "warmup_steps": 50,
            "clip_norm": 1.0,
            "options": {"momentum": 0.9},
        },
    },
}

# Of a training alone; prune_vit fine-tunes by them.
TRAINING_RULES = {
    "batch_size": settings.at_least(1),
    "log_every": settings.at_least(1),
    "checkpoint_every": settings.at_least(1),
    "evaluate_every": settings.at_least(1),
    "label_smoothing": settings.within("[0, 1)"),
    "average_decay": settings.within("[0, 1)"),
    "patch_dropout": settings.within("(0, 1]"),
    "augment.crop_padding": settings.at_least(0),
    "augment.num_ops": settings.at_least(0),
    "augment.magnitude": settings.within("[0, 1]"),
    "augment.min_area": settings.within("(0, 1]"),
    "augment.erase": settings.within("[0, 1]"),
    "augment.mixup": settings.at_least(0),
    "augment.cutmix": settings.at_least(0),
    "optimizer.clip_norm": settings.above(0),
    **settings.optimizer_rules(),
}
RULES = {
    "seeds": settings.SEEDS,
    "num_epochs": settings.at_least(1),
    "num_train": settings.at_least(0),
    "num_test": settings.at_least(0),
    "image_size": settings.at_least(1),
    "normalisation": settings.one_of("dataset", "google"),
    "model.dtype": settings.one_of("float32", "bfloat16"),
    **TRAINING_RULES,
}

get_config = functools.partial(settings.build, "train_vit", BASE, VARIANTS)
