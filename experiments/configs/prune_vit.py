"""Prunes a Vision Transformer and measures cost, accuracy and speed.

    python -m experiments.prune_vit --config=experiments/configs/prune_vit.py:VARIANT

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = (
    *("digits", "smoke", "cifar10_cpu", "cifar10_cpu_tuned", "cifar10"),
    *("b16", "speed_b16", "speed_cifar10_cpu"),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
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
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "prune_vit"
    config.variant = variant
    config.tensorboard = False
    config.seed = 0

    # As of train_vit.
    config.dataset = ConfigDict({"name": config_dict.placeholder(str)})
    config.dataset.name = "cifar10"
    config.dataset.data_dir = config_dict.placeholder(str)
    config.num_train = 0
    config.num_test = 0
    config.image_size = 32
    config.normalisation = "dataset"

    # What train_vit wrote, or a file of another's for vit.load_checkpoint.
    config.checkpoint = config_dict.placeholder(str)
    config.checkpoint = f"runs/train_vit/{variant}/model.npz"
    # Without a checkpoint and a data set: the model to time, one of vit.model.VARIANTS.
    config.model = ConfigDict({"variant": "B", "patch_size": 16})
    config.dtype = "float32"
    # Of jax.nn.dot_product_attention; cudnn on a GPU, in bfloat16.
    config.attention_implementation = config_dict.placeholder(str)

    # Which methods at which ratios: plateaus of the ramp over the layers, or what costs
    # the same by another method.
    every, some = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.2, 0.3, 0.4, 0.6)
    config.methods = ConfigDict(
        {
            "max": every,
            **dict.fromkeys(("random", "cls", "evit", "merge"), some),
            # Each a side in whole patches less.
            "resolution": (0.4, 0.6),
            **dict.fromkeys(("sum", "norm", "constant", "range"), (0.4,)),
            **dict.fromkeys(("zero", "released_code"), (0.2, 0.4, 0.6)),
            "skip": (0.4,),
            **dict.fromkeys(("heads", "heads_random", "heads_lbi"), (0.25, 0.5)),
            **dict.fromkeys(("neurons_random", "neurons_lbi"), (0.25, 0.5)),
        }
    )
    # Where the masked and the compact mode are compared, on all test images.
    config.parity_ratio = 0.4
    # Training images that heads are scored and attention ranges measured on.
    config.num_calibration = 512
    config.num_pictured = 6
    config.pictured_ratio = 0.6

    # Time of a batch against the whole network's, in turns; 0 for no gradient.
    config.timing = ConfigDict(
        {
            "batch_sizes": (1, 32),
            "gradient_batch_size": 128,
            "num_rounds": 10,
            "methods": ("max", "skip", "zero", "evit", "merge", "resolution", "heads"),
        }
    )
    # Training on with the pruning in place, at ratios that are among those above; of
    # the whole network at 0.
    config.tuning = ConfigDict({"num_epochs": 1})
    # Of the whole network's probabilities in the targets; the labels have the rest.
    config.tuning.teacher_weight = 0.0
    config.tuning.methods = ConfigDict(
        {
            "dense": (0.0,),
            "max": (0.2, 0.3, 0.4),
            "random": (0.4,),
            "resolution": (0.4,),
        }
    )
    # As of train_vit.
    config.tuning.training = ConfigDict(
        {
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
        }
    )
    # DessiLBI that ranks heads and hidden neurons: a training of its own.
    config.structure = ConfigDict(
        {
            "num_epochs": 1,
            "learning_rate": 2e-4,
            "schedule": "constant",
            "warmup_steps": 0,
            "nu": 5.0,
            "enter_at": 0.5,
        }
    )

    if variant in ("digits", "smoke"):
        config.dataset.name = "digits"
        config.image_size = 8
        config.tuning.num_epochs = 5
        config.structure.num_epochs = 5
        config.tuning.training.log_every = 11
        config.tuning.training.augment.update(crop_padding=1, flip=False)
    if variant == "smoke":
        config.num_train = 256
        config.num_test = 64
        for method in config.methods:
            config.methods[method] = (0.5,)
        for method in ("max", "random", "resolution"):
            config.tuning.methods[method] = (0.5,)
        config.tuning.num_epochs = 1
        config.structure.num_epochs = 1
        config.num_calibration = 64
        config.num_pictured = 2
        config.timing.num_rounds = 2
    if variant in ("cifar10_cpu_tuned", "cifar10"):
        # Several epochs without it would teach the images by heart.
        config.tuning.training.augment.update(num_ops=2, magnitude=0.5)
    if variant == "cifar10_cpu_tuned":
        config.checkpoint = "runs/train_vit/cifar10_cpu/model.npz"
        names = ("max", "random", "resolution")
        config.methods = ConfigDict(dict.fromkeys(names, (0.4,)))
        config.timing.methods = ()
        config.tuning.num_epochs = 4
        config.tuning.teacher_weight = 0.5
        config.tuning.methods.max = (0.4,)
        config.tuning.training.optimizer.learning_rate = 5e-4
        config.tuning.training.optimizer.warmup_steps = 40
    if variant == "speed_cifar10_cpu":
        config.checkpoint = "runs/train_vit/cifar10_cpu/model.npz"
        timed = config.timing.methods
        config.methods = ConfigDict({m: config.methods[m] for m in timed})
        config.timing.num_rounds = 50
        config.tuning.num_epochs = 0
    if variant == "cifar10":
        config.dtype = "bfloat16"
        config.tuning.num_epochs = 10
    if variant in ("b16", "speed_b16"):
        config.image_size = 224
        config.normalisation = "google"
        config.dtype = "bfloat16"
        # Patches are 14 x 14 here: the side has more steps.
        config.methods.resolution = every
        config.timing.batch_sizes = (1, 128)
    if variant == "b16":
        config.checkpoint = "runs/train_vit/finetune_b16/model.npz"
        config.tuning.training.augment.update(crop_padding=0, min_area=0.05, flip=True)
        config.tuning.training.label_smoothing = 0.0
        config.tuning.training.optimizer = ConfigDict(
            {
                "name": "sgd",
                "learning_rate": 0.003,
                "schedule": "cosine",
                "warmup_steps": 20,
                "clip_norm": 1.0,
                "options": {"momentum": 0.9},
            }
        )
    if variant == "speed_b16":
        config.dataset.name = None
        config.checkpoint = None
        config.dtype = "float32"
        config.methods = ConfigDict(
            {
                "max": (0.3, 0.6),
                "zero": (0.6,),
                "evit": (0.6,),
                "merge": (0.6,),
                "resolution": (0.6,),
            }
        )
        config.timing.batch_sizes = (1, 32)
        config.timing.gradient_batch_size = 0
        config.timing.num_rounds = 3
        config.tuning.num_epochs = 0
    return config
