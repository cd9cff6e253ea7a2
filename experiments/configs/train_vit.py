"""Trains a Vision Transformer.

    python -m experiments.train_vit --config=experiments/configs/train_vit.py:VARIANT

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = ("digits", "smoke", "cifar10_cpu", "cifar10", "finetune_b16")


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        digits: four layers on the digits of scikit-learn; a minute.
        smoke: the same for two epochs, to see that everything runs.
        cifar10_cpu: 7 layers of width 128 from scratch, patches of 4 pixels behind two
          convolutions, 64 epochs; an hour and a half on two cores.
        cifar10: 9 layers of width 192 from scratch, plain patches of 4, 300 epochs;
          needs a GPU.
        finetune_b16: ViT-B/16 at 224 pixels from config.checkpoint, with Google's
          recipe; needs a GPU and the file.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "train_vit"
    config.variant = variant
    config.tensorboard = False
    config.seed = 0

    # name: a data set of experiments/data.py with labels, and its data_dir.
    config.dataset = ConfigDict({"name": "cifar10"})
    config.dataset.data_dir = config_dict.placeholder(str)
    # Only the first ones; 0 takes all.
    config.num_train = 0
    config.num_test = 0
    # What the model sees; images of another size are resized on the device.
    config.image_size = 32
    # "dataset": by its channels' mean and deviation; "google": to [-1, 1].
    config.normalisation = "dataset"

    # A file for vit.load_checkpoint to start from; its shapes say what the model is.
    config.checkpoint = config_dict.placeholder(str)
    # One of vit.model.VARIANTS and fields of vit.ViT in place of its own. With a
    # checkpoint only dtype and the rates count: its shapes say the rest.
    config.model = ConfigDict(
        {
            "variant": "cifar_192",
            "patch_size": 4,
            "drop_path_rate": 0.1,
            "dtype": "bfloat16",
        }
    )

    config.augment = ConfigDict(
        {
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
        }
    )
    config.label_smoothing = 0.1
    # Share of each image's patches that are trained on.
    config.patch_dropout = 1.0
    # What changes on the way: ((share of the epochs from which, {field: value}), ...);
    # fields are patch_dropout, label_smoothing and augment's, "augment.num_ops".
    config.stages = ()

    config.num_epochs = 300
    config.batch_size = 512
    # Steps.
    config.log_every = 97
    config.checkpoint_every = 970
    # Epochs between evaluations.
    config.evaluate_every = 10
    # Decay of the average of the weights, which is what is evaluated.
    config.average_decay = 0.9995
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup_steps": 970,
            "clip_norm": 1.0,
            "options": {"weight_decay": 0.05},
        }
    )

    if variant in ("digits", "smoke"):
        config.dataset.name = "digits"
        config.image_size = 8
        config.model.update(
            variant="cifar_128",
            num_layers=4,
            hidden_size=64,
            mlp_dim=128,
            patch_size=2,
            drop_path_rate=0.0,
            dtype="float32",
        )
        config.augment.update(
            crop_padding=1, flip=False, num_ops=0, erase=0.0, mixup=0.0, cutmix=0.0
        )
        config.num_epochs = 60
        config.batch_size = 128
        config.log_every = 11
        config.checkpoint_every = 110
        config.average_decay = 0.99
        config.optimizer.warmup_steps = 22
    if variant == "smoke":
        config.num_epochs = 2
        config.num_train = 256
        config.num_test = 64
        config.log_every = 1
        config.checkpoint_every = 2
        config.evaluate_every = 1
        config.optimizer.warmup_steps = 1
    if variant == "cifar10_cpu":
        config.model.update(
            variant="cifar_128", stem=(48, 96), drop_path_rate=0.0, dtype="float32"
        )
        config.augment.update(magnitude=0.5, erase=0.0, mixup=0.0, cutmix=0.0)
        # Half of the patches cost half the time. The end is on images as they are seen
        # afterwards: whole, and without RandAugment (He et al. 2019, arXiv 1909.09148).
        config.patch_dropout = 0.5
        config.stages = ((0.85, {"patch_dropout": 1.0, "augment.num_ops": 0}),)
        config.num_epochs = 64
        config.batch_size = 128
        config.log_every = 65
        config.checkpoint_every = 390
        config.evaluate_every = 1
        config.average_decay = 0.998
        config.optimizer = ConfigDict(
            {
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
            }
        )
    if variant == "finetune_b16":
        # Google's recipe for CIFAR-10, at 224 pixels and a batch for one GPU.
        config.image_size = 224
        config.normalisation = "google"
        config.checkpoint = "B_16.npz"
        config.model.drop_path_rate = 0.0
        config.augment.update(
            crop_padding=0,
            min_area=0.05,
            num_ops=0,
            erase=0.0,
            mixup=0.0,
            cutmix=0.0,
        )
        config.label_smoothing = 0.0
        config.num_epochs = 6
        config.batch_size = 512
        config.checkpoint_every = 97
        config.evaluate_every = 1
        config.average_decay = 0.0
        config.optimizer = ConfigDict(
            {
                "name": "sgd",
                "learning_rate": 0.01,
                "schedule": "cosine",
                "warmup_steps": 50,
                "clip_norm": 1.0,
                "options": {"momentum": 0.9},
            }
        )
    return config
