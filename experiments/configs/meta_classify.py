"""Meta-learns a field and a classifier of its latents, with labels in the outer loss.

    python -m experiments.meta_classify \\
        --config=experiments/configs/meta_classify.py:VARIANT

Each method trains the field for `num_steps` steps. The head is trained for as many
steps as the field is after its warm start:

  joint: both at once; the gradient of the labels reaches the field (MetaLF, MWT).
  two_stage: the control. First the field without labels, then the head.

Variants:
  digits: the 8x8 gray digits of scikit-learn with a 4x4 grid of latents of 2 numbers,
    half as many as pixels, and a Vision Transformer of 2 layers. 8 minutes a seed for
    both methods on two busy cores (results/meta_classify_digits).
  smoke: digits with tiny networks and 24 steps, to check that the command runs;
    seconds.
  fashion_mnist: Fashion-MNIST with a 7x7 grid of latents of 8 numbers; results/ has no
    run of it.
  cifar10: CIFAR-10 with an 8x8 grid of latents of 16 numbers and a Vision Transformer
    of 6 layers. It needs a GPU; results/ has no run of it.

Each method can be run alone, for example with --config.methods=joint.

A linear head, as in MetaLF, sees all latents as one vector:

    --config.head="{'type':'mlp','hidden_sizes':()}"

The two limits of the joint loss:

    --config.label_weight=0            the labels train the head only
    --config.reconstruction_weight=0   the field is trained by the labels only
"""

import functools

from experiments.common import settings
from experiments.configs import meta_learn

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    "methods": ("joint", "two_stage"),
    # The arguments of experiments.common.data.load_dataset.
    "dataset": settings.dataset("digits"),
    # Share of the training images that is held out. The validation accuracy selects the
    # step whose weights are tested.
    "validation_fraction": 0.1,
    # The fields of functa.SpatialSiren or LatentModulatedSiren.
    "model": settings.Open(
        {
            "type": "SpatialSiren",
            "width": 64,
            "depth": 4,
            "grid": (4, 4),
            "channels": 2,
            "omega_0": 10.0,
            "interpolation": "nearest",
            "kernel_size": 3,
            "modulate_scale": False,
            "modulate_shift": True,
            "fast_sine": True,
            "derivative_dtype": "float32",
            "out_channels": settings.Optional(int),
        }
    ),
    # As in meta_learn; without noise on the latents.
    "inner": {
        name: value
        for name, value in meta_learn.BASE["inner"].items()
        if name != "noise_std"
    }
    | {"calibration": settings.Optional(float, 0.8), "rate_clip": (1e-6, 10.0)},
    # The optimizer of the field, as in meta_learn. Its ema_decay is also that of the
    # head; the averages are evaluated.
    "optimizer": meta_learn.BASE["optimizer"]
    | {"learning_rate": 2e-3, "clip_norm": 1.0, "ema_decay": 0.99},
    "warm_start_steps": 100,
    # As in meta_learn. Labels may lower the PSNR, so only a large fall is a collapse.
    "max_drop": 10.0,
    "points_per_group": 0,
    # type: vit, convnext or mlp (experiments/networks/heads.py), with the fields of the
    # network.
    "head": settings.Open(
        type="vit",
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        mlp_dim=128,
        dropout_rate=0.0,
        drop_path_rate=0.0,
        token_drop=0.0,
    ),
    "head_optimizer": {
        "name": "adamw",
        "options": settings.Open(weight_decay=0.05),
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "clip_norm": 1.0,
    },
    # reconstruction_weight L_rec / sg(L_rec) + L_labels / sg(L_labels); the gradient of
    # the second loss is multiplied by label_weight on its way into the field. Without
    # normalize_losses the losses are not divided by their values.
    "reconstruction_weight": 1.0,
    "label_weight": 1.0,
    "normalize_losses": True,
    # Share of the entries of a latent that are zero for the head in training.
    "latent_dropout": 0.1,
    "label_smoothing": 0.1,
    # Random windows of the zero-padded images, and mirror images.
    "augmentation": {"padding": 0, "flip": False},
    "num_steps": 1000,
    "batch_size": 64,
    "log_every": 100,
    "checkpoint_every": 500,
    # Images that are encoded at once.
    "encode_batch_size": 16,
}
VARIANTS = {
    "digits": {},
    "smoke": {
        "batch_size": 16,
        "checkpoint_every": 12,
        "head.hidden_size": 16,
        "head.mlp_dim": 16,
        "head.num_heads": 2,
        "head.num_layers": 1,
        "head_optimizer.warmup_steps": 2,
        "log_every": 6,
        "model.depth": 3,
        "model.grid": (2, 2),
        "model.width": 16,
        "num_steps": 24,
        "optimizer.ema_decay": 0.5,
        "optimizer.warmup_steps": 2,
        "warm_start_steps": 6,
    },
    "fashion_mnist": {
        "augmentation": {"padding": 2, "flip": True},
        "batch_size": 32,
        "dataset.name": "fashion_mnist",
        "log_every": 500,
        "model.channels": 8,
        "model.grid": (7, 7),
        "num_steps": 8000,
        "optimizer.ema_decay": 0.998,
        "points_per_group": 4096,
        "validation_fraction": 0.02,
    },
    "cifar10": {
        "augmentation": {"padding": 4, "flip": True},
        "batch_size": 128,
        "checkpoint_every": 2000,
        "dataset.name": "cifar10",
        "encode_batch_size": 500,
        "head": {
            "type": "vit",
            "hidden_size": 192,
            "num_layers": 6,
            "num_heads": 6,
            "mlp_dim": 384,
            "dropout_rate": 0.1,
            "drop_path_rate": 0.1,
            "token_drop": 0.0,
        },
        "head_optimizer.learning_rate": 1e-3,
        "head_optimizer.warmup_steps": 500,
        "log_every": 500,
        "model.channels": 16,
        "model.depth": 5,
        "model.grid": (8, 8),
        "model.width": 128,
        "num_steps": 20000,
        "optimizer.ema_decay": 0.999,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 200,
        "warm_start_steps": 400,
    },
}
_OF_OTHER_FIELDS = (
    "inner.noise_std",
    "model.coord_scale?",
    "model.latent_dim?",
    "model.layer_sizes?",
)
RULES = {
    "methods": settings.distinct(settings.one_of("joint", "two_stage")),
    "validation_fraction": settings.within("(0, 1)"),
    **{
        name: rule
        for name, rule in meta_learn.RULES.items()
        if name.startswith(("model.", "inner.", "optimizer."))
        and name not in _OF_OTHER_FIELDS
    },
    "warm_start_steps": settings.whole(0),
    "max_drop": settings.at_least(0),
    "points_per_group": settings.whole(0),
    "head.type": settings.one_of("mlp", "vit", "convnext"),
    "head_optimizer.clip_norm": settings.at_least(0),
    **settings.optimizer_rules("head_optimizer"),
    "reconstruction_weight": settings.at_least(0),
    "label_weight": settings.at_least(0),
    "latent_dropout": settings.within("[0, 1)"),
    "augmentation.padding": settings.whole(0),
    "num_steps": settings.whole(1),
    "encode_batch_size": settings.whole(1),
}

get_config = functools.partial(settings.build, "meta_classify", BASE, VARIANTS)
