"""Meta-learns a latent-modulated SIREN over a data set of images.

    python -m experiments.meta_learn --config=experiments/configs/meta_learn.py:VARIANT

Variants:
  digits: 8x8 grey digits that scikit-learn carries; minutes on two cores.
  smoke: the same in seconds, to see that everything runs.
  mnist: TFDS mnist, 28x28 grey.
  cifar10_cpu: TFDS cifar10 with a small network, half an hour on two cores.
  cifar10: TFDS cifar10 at the size of the paper; needs a GPU.
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # A run of meta_learn or import_functa whose weights training starts from; with
    # --config.num_steps=0 they are only evaluated.
    "init_from": settings.Optional(str),
    # name: digits, folder, npz or a TFDS image set; data_dir: its directory
    # (experiments/common/data.py).
    "dataset": {
        "name": "digits",
        "data_dir": settings.Optional(str),
    },
    # The fields of functa.LatentModulatedSiren (or ModulatedSiren, without a latent).
    # out_channels is taken from the data if it is not given.
    "model": {
        "type": "LatentModulatedSiren",
        "width": 128,
        "depth": 5,
        "latent_dim": 64,
        "omega_0": 10.0,
        "layer_sizes": (),
        "modulate_scale": False,
        "modulate_shift": True,
        "fast_sine": True,
        "derivative_dtype": "float32",
        "out_channels": settings.Optional(int),
    },
    "inner": {
        "num_steps": 3,
        # Meta-SGD: rates are drawn from this range and learned. Equal ends give a
        # constant; meta_sgd = False keeps them as they are drawn.
        "meta_sgd": True,
        "rate_range": (0.2, 0.4),
        # One set of rates for every inner step instead of one for all.
        "rates_per_step": True,
        "first_order": False,
        "unroll": True,
        "l2_weight": 0.0,
        "noise_std": 0.0,
        # Rates are kept within these bounds after every update, if given.
        "rate_clip": settings.Optional(tuple),
    },
    # `name` is any optax optimizer; `options` are its further keywords.
    "optimizer": {
        "name": "adam",
        "options": {},
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip_norm": 0.3,
        # The rates of meta-SGD learn this much faster than the weights.
        "rate_multiplier": 5.0,
        "ema_decay": 0.0,
    },
    "num_steps": 1000,
    "batch_size": 32,
    # Points of the images worked through at once; the outer gradient is summed over
    # these groups. On a CPU a group should fit the cache; 0 takes the batch at once.
    "points_per_group": 1024,
    # The first coarse_steps updates see images averaged over coarse_factor^2 pixels.
    "coarse_steps": 0,
    "coarse_factor": 2,
    # Random pixels of each image that an update sees; 0 means all.
    "num_pixels": 0,
    "log_every": 100,
    "checkpoint_every": 500,
    "write_functaset": True,
    "eval": {
        "batch_size": 8,
        # Test images (0: all) fitted with the inner loop, and how many of them are
        # fitted further by `optimizer` of optax for `more_steps` steps; the
        # learning rate decays by a cosine, 0 leaves the optimizer its own.
        "num_images": 0,
        "more_images": 64,
        "more_steps": 197,
        "optimizer": "lbfgs",
        "learning_rate": 0.0,
    },
}
VARIANTS = {
    "digits": {},
    "smoke": {
        "batch_size": 16,
        "checkpoint_every": 10,
        "eval.more_images": 4,
        "eval.more_steps": 4,
        "eval.num_images": 16,
        "log_every": 5,
        "model.depth": 3,
        "model.latent_dim": 8,
        "model.width": 16,
        "num_steps": 20,
        "optimizer.warmup_steps": 2,
    },
    "mnist": {
        "batch_size": 16,
        "coarse_steps": 2500,
        "dataset.name": "mnist",
        "eval.num_images": 1000,
        "num_steps": 4000,
    },
    "cifar10_cpu": {
        "batch_size": 16,
        "coarse_steps": 6000,
        "dataset.name": "cifar10",
        "model.latent_dim": 256,
        "num_steps": 8500,
        # At 1e-3 the run diverges near step 1,500, and only mostly recovers.
        "optimizer.learning_rate": 5e-4,
    },
    "cifar10": {
        "checkpoint_every": 1000,
        "dataset.name": "cifar10",
        "eval.batch_size": 250,
        "eval.more_images": 1000,
        "inner.rate_range": (0.005, 0.1),
        "inner.rates_per_step": False,
        "model.depth": 15,
        "model.fast_sine": False,
        "model.latent_dim": 512,
        "model.omega_0": 30.0,
        "model.width": 512,
        "num_steps": 50000,
        "optimizer.learning_rate": 0.0001,
        "optimizer.warmup_steps": 1000,
        "points_per_group": 0,
    },
}
RULES = {
    "seeds": settings.SEEDS,
    "num_steps": settings.at_least(0),
    "batch_size": settings.at_least(1),
    "log_every": settings.at_least(1),
    "checkpoint_every": settings.at_least(1),
    "num_pixels": settings.at_least(0),
    "points_per_group": settings.at_least(0),
    "coarse_steps": settings.at_least(0),
    "coarse_factor": settings.at_least(1),
    "model.width": settings.at_least(1),
    "model.depth": settings.at_least(2),
    "model.latent_dim": settings.at_least(1),
    "inner.num_steps": settings.at_least(1),
    "inner.noise_std": settings.at_least(0),
    "inner.l2_weight": settings.at_least(0),
    "inner.rate_clip": settings.optional(
        settings.Rule(
            "(low, high) with 0 <= low < high",
            lambda v: len(v) == 2 and 0 <= v[0] < v[1],
        )
    ),
    "optimizer.rate_multiplier": settings.at_least(0),
    "optimizer.clip_norm": settings.at_least(0),
    "optimizer.ema_decay": settings.within("[0, 1)"),
    "eval.batch_size": settings.at_least(1),
    "eval.num_images": settings.at_least(0),
    "eval.more_images": settings.at_least(1),
    "eval.more_steps": settings.at_least(0),
    "eval.learning_rate": settings.at_least(0),
    **settings.optimizer_rules(),
}

get_config = functools.partial(settings.build, "meta_learn", BASE, VARIANTS)
