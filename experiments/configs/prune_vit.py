"""Prunes a Vision Transformer and measures its cost, accuracy and speed.

    python -m experiments.prune_vit --config=experiments/configs/prune_vit.py:VARIANT

Accuracies are those of the dense network and of the cascade by cumulative maxima
("max") at ratio 0.4. Times do not include the training of the dense network.

Variants:
  digits: the network of train_vit's digits variant; 91 % dense, 85 % at 0.4 and 88 %
    fine-tuned, in 4 minutes on two cores (results/prune_vit_digits).
  smoke: the network of train_vit's smoke variant at one ratio, to check that the
    command runs.
  cifar10_cpu: the network of train_vit's cifar10_cpu_long variant; 90.0 % dense, 89.4 %
    at 0.4, fine-tuned or not, with 28 % fewer multiply-adds, in 34 minutes on two cores
    (results/prune_vit_cifar10_cpu). It measures no times.
  cifar10_cpu_tuned: the same network at ratio 0.4 and with token merging, fine-tuned
    for 2 epochs with RandAugment and with the dense network as a teacher; 89.6 and
    89.8 %, in 70 minutes on two busy cores for three seeds
    (results/prune_vit_cifar10_cpu_tuned).
  cifar10_cpu_segments: the same network without one segment of its attention: the
    least, the second or the most attended third of the regions (a patch in a head), or
    the same of the heads; section 2.3.1 of the student report
    (results/prune_vit_cifar10_cpu_segments).
  cifar10_cpu_heads: the same network without a quarter or half of its heads: those of
    the smallest maxima, those that entered last in DessiLBI, random ones, and those
    that an A* search over all layers finds. results/ has no run of it.
  cifar10: the network of train_vit's cifar10 variant. Fine-tuning needs a GPU; results/
    has no run of it.
  b16: a ViT-B/16 that train_vit's finetune_b16 variant has fine-tuned (Tables 6 and 7
    of the student report). It needs a GPU; results/ has no run of it.
  speed_b16: the speed of ViT-B/16 at 224 pixels with random weights; at ratio 0.6 a
    batch of 32 is 1.7 times faster than the dense network, in 7 minutes on two cores
    (results/prune_vit_speed_b16).
  speed_cifar10_cpu: the speed of the network of cifar10_cpu in more rounds; at ratio
    0.4 a batch of 32 is 1.4 times faster than the dense network, in 29 minutes on two
    cores (results/prune_vit_speed_cifar10_cpu).
  story: the Vision Transformer of classify_functa's digits_spatial_vit variant on grids
    of latents, at 75 % of the multiply-adds by the cascade, and by heads and neurons
    that DessiLBI ranks; a minute on two cores. The command story uses it.
  smoke_story: the same for the smoke_spatial variants, to check that the command runs.

To choose settings, hold images out of the training split. train_vit trains on the
others, and prune_vit measures on the held-out images:

    python -m experiments.train_vit --config=experiments/configs/train_vit.py:digits \\
        --config.num_train=1200 --workdir=runs/train_vit/digits_1200
    python -m experiments.prune_vit --config=experiments/configs/prune_vit.py:digits \\
        --config.checkpoint=runs/train_vit/digits_1200/model.npz \\
        --config.num_validation=237 --workdir=runs/prune_vit/digits_validation
"""

import functools

from experiments.common import settings
from experiments.configs.train_vit import TRAINING_RULES

_EVERY, _SOME = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (0.2, 0.3, 0.4, 0.6)
BASE = {
    "seeds": (0,),
    # The next three fields, image_size and normalization are those of train_vit, whose
    # networks keep their normalization.
    "dataset": settings.dataset(settings.Optional(str, "cifar10")),
    "num_train": 0,
    "num_test": 0,
    # If not 0, so many of the last training images replace the test images. The network
    # must not have seen them: limit num_train of train_vit to the images before them.
    "num_validation": 0,
    "image_size": 32,
    "normalization": "dataset",
    # A file that train_vit wrote, or another one that vit.load_checkpoint reads.
    "checkpoint": settings.Optional(str, "runs/train_vit/digits/model.npz"),
    # What the file does not tell, as keywords of vit.load_checkpoint: num_heads, gelu,
    # ln_eps, pool, grid, resize.
    "checkpoint_options": settings.Open(),
    # The model that is timed without a checkpoint and a data set; one of
    # vit.model.VARIANTS.
    "model": settings.Open(variant="B", patch_size=16),
    "dtype": "float32",
    # A key of vit.attention.IMPLEMENTATIONS; "cudnn" needs a GPU and bfloat16, "pallas"
    # an NVIDIA GPU.
    "attention_implementation": settings.Optional(str),
    # Methods and their ratios. A ratio is the plateau of the ramp over the layers;
    # "evit", "merge", "merge_decreasing" (token merging that merges more in the first
    # layers) and "resolution" have the cost of the cascade "max" at that ratio. (), no
    # ratio, leaves a method out.
    "methods": settings.Open(
        {
            "max": _EVERY,
            **dict.fromkeys(("random", "cls", "evit", "merge"), _SOME),
            # Each ratio makes the side of the image one or more whole patches smaller.
            "resolution": (0.4, 0.6),
            **dict.fromkeys(("sum", "norm", "constant", "range"), (0.4,)),
            **dict.fromkeys(("zero", "released_code"), (0.2, 0.4, 0.6)),
            "skip": (0.4,),
            **dict.fromkeys(("heads", "heads_random", "heads_lbi"), (0.25, 0.5)),
            **dict.fromkeys(("neurons_random", "neurons_lbi"), (0.25, 0.5)),
        }
    ),
    # Share of the multiply-adds of the dense network. With it every method has the one
    # ratio that needs at most this share; the ratios above then only name the methods.
    "budget": settings.Optional(float),
    # The same for the time of a batch, the last of timing.batch_sizes. It is predicted
    # from the times of the dense network on fewer tokens (latency.json).
    "latency": settings.Optional(float),
    # Whether to write the networks, fine-tuned if they are: networks/METHOD_RATIO.npz,
    # or with a budget or latency networks/METHOD.npz. A network without a segment of
    # its attention is not written.
    "save_networks": False,
    # Ratio at which the masked and the compact mode are compared on all test images.
    "parity_ratio": 0.4,
    # Training images from which head scores and attention ranges are computed.
    "num_calibration": 512,
    "num_pictured": 6,
    "pictured_ratio": 0.6,
    # Time of a batch, measured in turns with the dense network. A gradient_batch_size
    # of 0 skips the gradient.
    "timing": {
        "batch_sizes": (1, 32),
        "gradient_batch_size": 128,
        "num_rounds": 10,
        "methods": ("max", "skip", "zero", "evit", "merge", "resolution", "heads"),
    },
    # Fine-tuning of the pruned networks, at ratios that `methods` has; "dense" has
    # ratio 0.
    "tuning": {
        "num_epochs": 1,
        # Weight of the dense network's probabilities in the targets. The labels have
        # the remaining weight.
        "teacher_weight": 0.0,
        "methods": settings.Open(
            dense=(0.0,), max=(0.2, 0.3, 0.4), random=(0.4,), resolution=(0.4,)
        ),
        # The fields of train_vit.
        "training": {
            "tensorboard": False,
            "batch_size": 128,
            "log_every": 65,
            "checkpoint_every": 390,
            "evaluate_every": 1,
            "label_smoothing": 0.1,
            "average_decay": 0.99,
            "patch_keep_rate": 1.0,
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
                "options": settings.Open(weight_decay=0.05),
            },
        },
    },
    # The DessiLBI training that ranks heads and hidden neurons.
    "structure": {
        "num_epochs": 1,
        "learning_rate": 2e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "nu": 5.0,
        "enter_at": 0.5,
    },
}
_STORY = {
    "budget": 0.75,
    "checkpoint": "runs/classify_functa/digits_spatial_vit/model.npz",
    "dataset.data_dir": "runs/meta_learn/digits_spatial/functaset.npz",
    "dataset.name": "functaset",
    "image_size": 2,
    "methods": {"max": (0.4,), "structure_lbi": (0.25,)},
    "save_networks": True,
    "structure.num_epochs": 5,
    "timing.gradient_batch_size": 0,
    "timing.methods": ("max", "structure_lbi"),
    "timing.num_rounds": 30,
    "tuning.methods": {"max": (0.4,), "structure_lbi": (0.25,)},
    "tuning.num_epochs": 10,
    "tuning.teacher_weight": 0.5,
    "tuning.training.augment.crop_padding": 0,
    "tuning.training.augment.flip": False,
    "tuning.training.log_every": 11,
}
_CIFAR10_CPU = {
    "checkpoint": "runs/train_vit/cifar10_cpu_long/model.npz",
    "timing.batch_sizes": (),  # speed_cifar10_cpu measures the speed
    "timing.gradient_batch_size": 0,
}
_CIFAR10_CPU_TUNING = {
    "tuning.teacher_weight": 0.5,
    "tuning.training.augment.magnitude": 0.5,
    "tuning.training.augment.num_ops": 2,
    "tuning.training.optimizer.learning_rate": 0.0005,
    "tuning.training.optimizer.warmup_steps": 40,
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
    "story": _STORY,
    "smoke_story": _STORY
    | {
        "checkpoint": "runs/classify_functa/smoke_spatial/model.npz",
        "dataset.data_dir": "runs/meta_learn/smoke_spatial/functaset.npz",
        "num_test": 64,
        "num_train": 256,
        "structure.num_epochs": 1,
        "timing.num_rounds": 2,
        "tuning.num_epochs": 1,
    },
    "cifar10_cpu": _CIFAR10_CPU | _CIFAR10_CPU_TUNING,
    "cifar10_cpu_segments": _CIFAR10_CPU
    | {
        "methods": settings.Open(
            {
                f"{prefix}segment_{number}": (0.333,)
                for prefix in ("", "heads_")
                for number in (1, 2, 3)
            }
        ),
        "tuning.num_epochs": 0,
    },
    "cifar10_cpu_heads": _CIFAR10_CPU
    | {
        "methods": settings.Open(
            dict.fromkeys(
                ("heads", "heads_lbi", "heads_random", "heads_search"), (0.25, 0.5)
            )
        ),
        "tuning.num_epochs": 0,
    },
    "cifar10_cpu_tuned": _CIFAR10_CPU
    | _CIFAR10_CPU_TUNING
    | {
        "seeds": (0, 1, 2),
        # Merging saves a little more than the cascade: 30.9 against 27.9 %.
        "methods": settings.Open(max=(0.4,), merge=(0.44,)),
        "tuning.methods": settings.Open(dense=(0.0,), max=(0.4,), merge=(0.44,)),
        "tuning.num_epochs": 2,
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
        "normalization": "google",
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
        "normalization": "google",
        "timing.gradient_batch_size": 0,
        "timing.num_rounds": 3,
        "tuning.num_epochs": 0,
    },
    "speed_cifar10_cpu": {
        "checkpoint": "runs/train_vit/cifar10_cpu_long/model.npz",
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
    "num_validation": settings.whole(0),
    "image_size": settings.whole(1, 2**16),
    "normalization": settings.one_of("dataset", "google"),
    "dtype": settings.one_of("float32", "bfloat16"),
    "attention_implementation": settings.one_of(
        *(None, "xla", "cudnn", "pallas", "plain")
    ),
    "methods.*": settings.each(settings.within("(0, 1)"), empty=True),
    "budget": settings.optional(settings.within("(0, 1)")),
    "latency": settings.optional(settings.within("(0, 1)")),
    "parity_ratio": settings.within("(0, 1)"),
    "pictured_ratio": settings.within("(0, 1)"),
    "num_calibration": settings.whole(1),
    "num_pictured": settings.whole(1),
    "timing.batch_sizes": settings.each(settings.whole(1), empty=True),
    "timing.num_rounds": settings.whole(1),
    "timing.gradient_batch_size": settings.whole(0),
    "tuning.methods.*": settings.each(settings.within("[0, 1)")),
    "tuning.num_epochs": settings.whole(0),
    "tuning.teacher_weight": settings.within("[0, 1]"),
    **{f"tuning.training.{name}": rule for name, rule in TRAINING_RULES.items()},
    "tuning.training.tensorboard": settings.TENSORBOARD,
    "structure.num_epochs": settings.whole(1),
    "structure.nu": settings.above(0),
    "structure.enter_at": settings.within("(0, 1]"),
    **settings.optimizer_rules("structure"),
}

get_config = functools.partial(settings.build, "prune_vit", BASE, VARIANTS)
