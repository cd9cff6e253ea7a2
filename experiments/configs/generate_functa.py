"""Generates images by a flow on the latents of a functaset.

    python -m experiments.generate_functa \\
        --config=experiments/configs/generate_functa.py:VARIANT

The field, its functaset and the classifier are those of earlier runs:

    python -m experiments.meta_learn \\
        --config=experiments/configs/meta_learn.py:digits_spatial
    python -m experiments.classify_functa \\
        --config=experiments/configs/classify_functa.py:digits_spatial_vit

Variants:
  digits: the grids of latents of meta_learn's digits_spatial variant. The Vision
    Transformer has 64 features, fewer than there are test images, and the MLP 512. 8
    minutes a seed on two busy cores (results/generate_functa_digits).
  smoke: the digits variant with the smoke_spatial runs of meta_learn and
    classify_functa, a small network and 20 steps, to check that the command runs.
  fashion_mnist: grids of 7x7 latents of 8 numbers, of the fashion_mnist variants of
    meta_learn and classify_functa. 81 minutes on two busy cores
    (results/generate_functa_fashion_mnist).
  cifar10_spatial: the grids of latents of meta_learn's cifar10_spatial variant, with a
    network of width 384. It needs a GPU; results/ has no run of it. The functaset is
    that of make_functaset's cifar10_spatial variant without its copies and padding:
    --config.copies=1 --config.flip=False --config.padding=0
    --workdir=runs/make_functaset/cifar10_spatial_images

To choose settings, compare with images that are held out of the training split, not
with test images:

    --config.num_validation=300
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # The run of meta_learn or import_functa whose weights render the latents, their
    # functaset, and the run of classify_functa whose features are compared; None uses
    # the random network only. {seed} is replaced by the seed.
    "run": "runs/meta_learn/digits_spatial",
    "functaset": "runs/meta_learn/digits_spatial/functaset.npz",
    "classifier": settings.Optional(str, "runs/classify_functa/digits_spatial_vit"),
    # Directory of the images; see experiments/common/data.py.
    "data_dir": settings.Optional(str),
    # Whether the flow has the classes of the functaset.
    "conditional": True,
    # Number of training images held out; they replace the test images.
    "num_validation": 0,
    # Images of each source that are generated and measured; 0: as many as there are
    # training images. Distances use at most as many as there are images to compare
    # with, the accuracy score uses all.
    "num_images": 0,
    # Whether the network is added to the velocity of the Gaussian of each class, which
    # leaves it only the difference to learn.
    "gaussian": True,
    # The fields of experiments.networks.dit.DiT.
    "model": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "mlp_dim": 256},
    # `name` is an optimizer of optax; `options` are its other keywords.
    "optimizer": {
        "name": "adamw",
        "options": settings.Open(weight_decay=0.01),
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "clip_norm": 1.0,
        # Decay of the moving average of the weights, which is sampled from.
        "ema_decay": 0.995,
    },
    # Share of the labels that are replaced by the label of no class.
    "label_dropout": 0.1,
    "num_steps": 2000,
    "batch_size": 128,
    "log_every": 100,
    "checkpoint_every": 500,
    "sampling": {
        # Steps of Heun's method, with two evaluations of the network each.
        "num_steps": 30,
        # Weight of the class; 1 is no guidance. A larger weight makes samples more
        # typical and less varied.
        "guidance": 1.0,
        # Latents that are sampled at once.
        "batch_size": 256,
        # Classes in the figures; () shows the first ten.
        "classes": (),
    },
    # Latents that are rendered and fitted at once.
    "render_batch_size": 16,
    # The training of the classifier of each source, whose accuracy is its score.
    "accuracy_score": {"num_steps": 1000, "batch_size": 64, "learning_rate": 1e-3},
}
_SMOKE = "runs/meta_learn/smoke_spatial"
_FASHION = "runs/meta_learn/fashion_mnist"
VARIANTS = {
    "digits": {},
    "smoke": {
        "accuracy_score.num_steps": 20,
        "batch_size": 16,
        "checkpoint_every": 10,
        "classifier": "runs/classify_functa/smoke_spatial",
        "functaset": f"{_SMOKE}/functaset.npz",
        "log_every": 5,
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32},
        "num_images": 64,
        "num_steps": 20,
        "optimizer.warmup_steps": 2,
        "run": _SMOKE,
        "sampling.num_steps": 4,
    },
    "fashion_mnist": {
        "accuracy_score.num_steps": 4000,
        "batch_size": 64,
        "checkpoint_every": 500,
        "classifier": "runs/classify_functa/fashion_mnist",
        "functaset": f"{_FASHION}/functaset.npz",
        "log_every": 100,
        "num_images": 10000,
        "num_steps": 6000,
        "optimizer.ema_decay": 0.999,
        "run": _FASHION,
        "sampling.num_steps": 20,
    },
    "cifar10_spatial": {
        "accuracy_score": {
            "num_steps": 10000,
            "batch_size": 128,
            "learning_rate": 1e-3,
        },
        "batch_size": 512,
        "checkpoint_every": 10000,
        "classifier": "runs/classify_functa/cifar10_spatial",
        "functaset": "runs/make_functaset/cifar10_spatial_images/functaset.npz",
        "log_every": 1000,
        "model": {
            "hidden_size": 384,
            "num_layers": 12,
            "num_heads": 6,
            "mlp_dim": 1536,
        },
        "num_images": 10000,
        "num_steps": 100000,
        "optimizer.ema_decay": 0.9999,
        "optimizer.learning_rate": 3e-4,
        "optimizer.warmup_steps": 1000,
        "render_batch_size": 250,
        "run": "runs/meta_learn/cifar10_spatial",
        "sampling.num_steps": 50,
    },
}
RULES = {
    "num_validation": settings.whole(0),
    "num_images": settings.whole(0),
    "num_steps": settings.whole(1),
    "render_batch_size": settings.whole(1),
    "model.*": settings.whole(1),
    "label_dropout": settings.within("[0, 1]"),
    "optimizer.clip_norm": settings.at_least(0),
    "optimizer.ema_decay": settings.within("[0, 1)"),
    **settings.optimizer_rules(),
    "sampling.num_steps": settings.whole(1),
    "sampling.guidance": settings.at_least(0),
    "sampling.batch_size": settings.whole(1),
    "sampling.classes": settings.each(settings.whole(0), empty=True),
    "accuracy_score.num_steps": settings.whole(1),
    "accuracy_score.batch_size": settings.whole(1),
    "accuracy_score.learning_rate": settings.at_least(0),
}

get_config = functools.partial(settings.build, "generate_functa", BASE, VARIANTS)
