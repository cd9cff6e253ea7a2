"""Trains a Vision Transformer.

    python -m experiments.train_vit --config=experiments/configs/train_vit.py:VARIANT

Variants:
  digits: 4 layers of width 64 on the digits of scikit-learn; 91 % in half a minute on
    two cores (results/train_vit_digits).
  smoke: the digits variant for two epochs, to check that the command runs.
  cifar10_cpu: 7 layers of width 128 from scratch on CIFAR-10, 4x4 patches after two
    convolutions, 64 epochs; 88 % in 107 minutes on two cores
    (results/train_vit_cifar10_cpu).
  cifar10_cpu_long: the same network for 84 epochs, with RandAugment to the end; 89.98 %
    in 153 minutes on two cores (results/train_vit_cifar10_cpu_long).
  cifar10: 9 layers of width 192 from scratch on CIFAR-10, 4x4 patches, 300 epochs. It
    needs a GPU; results/ has no run of it.
  finetune_b16: ViT-B/16 from config.checkpoint, fine-tuned on CIFAR-10 at 224 pixels
    with Google's recipe. It needs a GPU and the file; results/ has no run of it.
"""

import functools

from experiments.common import settings

BASE = {
    "tensorboard": False,
    "seeds": (0,),
    # name: a labeled data set of experiments/common/data.py; data_dir: its directory.
    "dataset": settings.dataset("cifar10"),
    # Number of training and test images, from the first on; 0 uses all.
    "num_train": 0,
    "num_test": 0,
    # Side of the model's inputs. Images of another size are resized on the device.
    "image_size": 32,
    # "dataset": normalized as the checkpoint states (vit.load_normalization), otherwise
    # by the mean and standard deviation of each channel of the training images;
    # "google": scaled to [-1, 1].
    "normalization": "dataset",
    # A file that vit.load_checkpoint reads, to start from. Its shapes define the model.
    "checkpoint": settings.Optional(str),
    # What the file does not tell, as keywords of vit.load_checkpoint: num_heads, gelu,
    # ln_eps, pool, grid, resize.
    "checkpoint_options": settings.Open(),
    # One of vit.model.VARIANTS, and fields of vit.ViT that replace its own. With a
    # checkpoint only dtype and the dropout rates are used.
    "model": settings.Open(
        variant="cifar_192",
        patch_size=4,
        drop_path_rate=0.1,
        dtype="bfloat16",
    ),
    "augment": {
        # Random crops after zero padding by this many pixels, and random mirroring.
        "crop_padding": 4,
        "flip": True,
        # RandAugment: number of operations per image (0: none), and their strength.
        "num_ops": 2,
        "magnitude": 0.9,
        # Smallest area of a random resized crop, as a share of the image; 1: no crop.
        "min_area": 1.0,
        # Probability that a rectangle of an image is erased.
        "erase": 0.25,
        # Alpha of the Beta distribution of each; 0: none.
        "mixup": 0.8,
        "cutmix": 1.0,
    },
    "label_smoothing": 0.1,
    # Share of each image's patches that a training step uses (PatchDropout), unless a
    # cascade in the checkpoint chooses them.
    "patch_keep_rate": 1.0,
    # Changes during the training: ((start as a share of the epochs, {field: value}),
    # ...). Fields are patch_keep_rate, label_smoothing and those of augment, written as
    # "augment.num_ops".
    "stages": (),
    "num_epochs": 300,
    "batch_size": 512,
    # In steps.
    "log_every": 97,
    "checkpoint_every": 970,
    # In epochs.
    "evaluate_every": 10,
    # Decay of the moving average of the weights, which is evaluated; 0: no average.
    "average_decay": 0.9995,
    "optimizer": {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 970,
        "clip_norm": 1.0,
        "options": settings.Open(weight_decay=0.05),
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
_CIFAR10_CPU = {
    "model": {
        "variant": "cifar_128",
        "patch_size": 4,
        "stem": (48, 96),
        "drop_path_rate": 0.0,
        "dtype": "float32",
    },
    "augment.magnitude": 0.5,
    **_without("erase", "mixup", "cutmix"),
    # Half of the patches cost half the time. In the last epochs the images are as
    # at test time: all patches, without RandAugment (He et al. 2019, arXiv
    # 1909.09148).
    "patch_keep_rate": 0.5,
    "stages": ((0.85, {"patch_keep_rate": 1.0, "augment.num_ops": 0}),),
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
    "cifar10_cpu": _CIFAR10_CPU,
    # RandAugment stays to the end, and only the last epochs use all patches.
    "cifar10_cpu_long": _CIFAR10_CPU
    | {
        "stages": ((0.94, {"patch_keep_rate": 1.0}),),
        "num_epochs": 84,
        "evaluate_every": 2,
    },
    "cifar10": {},
    # Google's recipe for CIFAR-10, at 224 pixels and with a batch that fits one GPU.
    "finetune_b16": {
        "image_size": 224,
        "normalization": "google",
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

# Rules of the fields that prune_vit also uses for fine-tuning.
TRAINING_RULES = {
    "batch_size": settings.whole(1),
    "log_every": settings.whole(1),
    "checkpoint_every": settings.whole(1),
    "evaluate_every": settings.whole(1),
    "label_smoothing": settings.within("[0, 1)"),
    "average_decay": settings.within("[0, 1)"),
    "patch_keep_rate": settings.within("(0, 1]"),
    "augment.crop_padding": settings.whole(0, 2**16),
    "augment.num_ops": settings.whole(0),
    "augment.magnitude": settings.within("[0, 1]"),
    "augment.min_area": settings.within("(0, 1]"),
    "augment.erase": settings.within("[0, 1]"),
    "augment.mixup": settings.at_least(0),
    "augment.cutmix": settings.at_least(0),
    "optimizer.clip_norm": settings.above(0),
    **settings.optimizer_rules(),
}
RULES = {
    "num_epochs": settings.whole(1),
    "image_size": settings.whole(1, 2**16),
    "normalization": settings.one_of("dataset", "google"),
    "model.dtype": settings.one_of("float32", "bfloat16"),
    **TRAINING_RULES,
}

get_config = functools.partial(settings.build, "train_vit", BASE, VARIANTS)
