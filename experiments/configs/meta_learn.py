"""Meta-learns a latent-modulated SIREN over a data set of images.

    python -m experiments.meta_learn --config=experiments/configs/meta_learn.py:VARIANT

The PSNR is that of the test images after the inner loop.

Variants:
  digits: the 8x8 gray digits of scikit-learn; about 42 dB in 2 minutes a seed on two
    cores (results/meta_learn_digits).
  smoke: the digits with a tiny network and 20 steps, to check that the command runs;
    seconds.
  mnist: MNIST, 28x28 gray; results/ has no run of it.
  cifar10_cpu: CIFAR-10 with a small network; about 25 dB in an hour on two cores
    (results/meta_learn_cifar10_cpu).
  digits_spatial: the digits with a 2x2 grid of latents of 16 numbers; as in digits, an
    image has as many numbers as pixels.
  smoke_spatial: digits_spatial with a tiny network and 20 steps; seconds.
  fashion_mnist: Fashion-MNIST with a 7x7 grid of latents of 8 numbers; 31.7 dB. 39
    minutes on two busy cores (results/meta_learn_fashion_mnist).
  cifar10_spatial_cpu: CIFAR-10 with an 8x8 grid of latents of 16 numbers; 38 dB.
    40 minutes on two cores, two fifths of them for the evaluation and the encoding of
    all images (results/meta_learn_cifar10_spatial_cpu).
  cifar10_cells_cpu: the same for cells that do not depend on each other; results/ has
    no run of it.
  cifar10_spatial: the grid of cifar10_spatial_cpu in a larger network, width 256 and
    depth 6; 38.7 dB in 3 minutes on one H200
    (results/meta_learn_cifar10_spatial).
  winds: monthly winds over the globe as fields on the sphere, 64 numbers each, and
    64 EOF of the same months (apt-get install ferret-datasets); 23 minutes on
    two busy cores (results/meta_learn_winds).
  speech: seconds of speech as 40 cells of 200 samples, 32 numbers each, and 32
    principal components of the cells (apt-get install
    asterisk-core-sounds-{en,es,fr,it,ru}-wav). 25 minutes on two busy cores without the
    functaset (results/meta_learn_speech).
  furniture: 3-D models as 16x16x16 voxels with a 4x4x4 grid of latents of 16 numbers,
    and 16 principal components of the cells (apt-get install
    sweethome3d-furniture); half an hour is expected on two cores; results/ has no run
    of it.
  smoke_winds: winds on synthetic months, which need no package, with a tiny network and
    20 steps; seconds.
  smoke_speech: the same for speech.
  smoke_furniture: the same for furniture.
  folder: photographs of --config.dataset.data_dir at 64x64 pixels, with a 16x16 grid of
    latents of 16 numbers. For another size set dataset.image_size and model.grid; the
    time of the training depends on neither.
  cifar10: CIFAR-10 at the size of the paper. It needs a GPU; results/ has no run of it.
"""

import functools

from experiments.common import settings

BASE = {
    "seeds": (0,),
    "tensorboard": False,
    # A run of meta_learn or import_functa. Training starts from its weights; with
    # --config.num_steps=0 they are only evaluated.
    "init_from": settings.Optional(str),
    # The arguments of experiments.common.data.load_dataset.
    "dataset": settings.dataset("digits"),
    # The fields of functa.LatentModulatedSiren or SpatialSiren, or of ModulatedSiren,
    # which has no latent. out_channels: by default the channels of the images.
    "model": settings.Open(
        {
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
        }
    ),
    "inner": {
        "num_steps": 3,
        # Meta-SGD: the rates are drawn from this range and then learned. With
        # meta_sgd = False they keep their initial values. Equal ends give a constant.
        "meta_sgd": True,
        "rate_range": (0.2, 0.4),
        # If given, all rates start at calibration / eigenvalue instead, with the
        # functa.largest_eigenvalue of the initial network. Below 2 a step contracts.
        "calibration": settings.Optional(float),
        # Whether each inner step has its own rates, instead of one set for all steps.
        "rates_per_step": True,
        "first_order": False,
        "unroll": True,
        "l2_weight": 0.0,
        "noise_std": 0.0,
        # If given, rates are clipped to (low, high) after every update.
        "rate_clip": settings.Optional(tuple),
    },
    # `name` is an optimizer of optax; `options` are its other keywords.
    "optimizer": {
        "name": "adam",
        "options": settings.Open(),
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "clip_norm": 0.3,
        # Learning rate of the rates of meta-SGD, relative to that of the weights.
        "rate_multiplier": 5.0,
        "ema_decay": 0.0,
    },
    "num_steps": 1000,
    "batch_size": 32,
    # The outer gradient is summed over groups of images with about this many points. On
    # a CPU a group should fit the cache; 0 makes the whole batch one group.
    "points_per_group": 1024,
    # In the first coarse_steps updates the images are averaged over squares of
    # coarse_factor x coarse_factor pixels.
    "coarse_steps": 0,
    "coarse_factor": 2,
    # Whether each signal of a batch is replaced by a random mixture of two signals (see
    # `meta.select_signals`). This reduces overfitting on small data sets.
    "mix_signals": False,
    # Random pixels of each image, or points of each field, per update; 0 uses all.
    "num_pixels": 0,
    # Whether to train on random cells of different images; batch_size then counts them.
    # For a SpatialSiren with interpolation "nearest" and kernel_size 1, whose cells are
    # separate signals.
    "by_cells": False,
    # The first updates teach the field to decode the principal components of the
    # signals; meta-learning starts from there. 0 starts from random weights.
    "warm_start_steps": 0,
    # Pixels of such a cell, computed from the images and the grid.
    "cell": settings.Optional(tuple),
    # Largest fall of the signal-to-noise ratio below its best interval between log
    # lines, in dB. After a larger one, training goes back to the last good state with
    # half of the learning rates; 0 never goes back.
    "max_drop": 0.0,
    "log_every": 100,
    "checkpoint_every": 500,
    "write_functaset": True,
    "eval": {
        "batch_size": 8,
        # Number of test images fitted with the inner loop (0: all). Of these,
        # more_images are fitted for more_steps additional steps with `optimizer`, an
        # optimizer of optax. Its learning rate decays by a cosine; with 0 the optimizer
        # uses its default rate.
        "num_images": 0,
        "more_images": 64,
        "more_steps": 197,
        "optimizer": "lbfgs",
        "learning_rate": 0.0,
    },
}
# A SpatialSiren has other fields than the model of BASE.
_SPATIAL = {
    "model": {
        "type": "SpatialSiren",
        "width": 128,
        "depth": 5,
        "grid": (8, 8),
        "channels": 16,
        "omega_0": 10.0,
        "interpolation": "nearest",
        "kernel_size": 1,
        "modulate_scale": False,
        "modulate_shift": True,
        "fast_sine": True,
        "derivative_dtype": "float32",
        "out_channels": settings.Optional(int),
    },
    "by_cells": True,
    "max_drop": 3.0,
    "batch_size": 256,
    "inner.calibration": 0.8,
    "inner.rate_clip": (1e-6, 10.0),
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 100,
    "warm_start_steps": 400,
}
_SMOKE = {
    "checkpoint_every": 10,
    "eval.more_images": 4,
    "eval.more_steps": 4,
    "eval.num_images": 8,
    "log_every": 5,
    "model.depth": 3,
    "model.width": 16,
    "num_steps": 20,
    "optimizer.warmup_steps": 2,
}
_WINDS = {
    "batch_size": 8,
    "dataset.name": "winds",
    "eval.more_images": 16,
    "eval.more_steps": 17,
    "inner.rate_clip": (1e-6, 10.0),
    "max_drop": 3.0,
    "mix_signals": True,
    "model.latent_dim": 64,
    "num_pixels": 1024,
    "num_steps": 6000,
    "optimizer.ema_decay": 0.99,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 100,
    # The components are those of 100 months; a long regression learns their decoder.
    "warm_start_steps": 3000,
}
_SPEECH = {
    **_SPATIAL,
    "batch_size": 32,
    "dataset.name": "speech",
    "eval.more_images": 16,
    "eval.more_steps": 17,
    "eval.num_images": 300,
    "log_every": 200,
    # A cell has 200 samples: the first layer needs high frequencies.
    "model": _SPATIAL["model"]
    | {"channels": 32, "coord_scale": 5.0, "grid": (40,), "omega_0": 30.0},
    "num_steps": 5000,
    # With omega_0 = 30 the field collapses at 2e-3.
    "optimizer.learning_rate": 5e-4,
    "points_per_group": 2048,
    "warm_start_steps": 4000,
}
_FURNITURE = {
    **_SPATIAL,
    "batch_size": 256,
    "dataset.name": "furniture",
    "eval.more_steps": 17,
    "log_every": 200,
    "model.grid": (4, 4, 4),
    "num_steps": 4000,
    "points_per_group": 2048,
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
    "digits_spatial": {
        **_SPATIAL,
        "batch_size": 128,
        "eval.more_images": 16,
        "eval.more_steps": 17,
        "model.grid": (2, 2),
        "num_steps": 1200,
        "warm_start_steps": 200,
    },
    "smoke_spatial": {
        **_SPATIAL,
        "batch_size": 64,
        "checkpoint_every": 10,
        "eval.more_images": 4,
        "eval.more_steps": 4,
        "eval.num_images": 16,
        "log_every": 5,
        "model.channels": 3,
        "model.depth": 3,
        "model.grid": (2, 2),
        "model.width": 16,
        "num_steps": 20,
        "optimizer.warmup_steps": 2,
        "warm_start_steps": 5,
    },
    "fashion_mnist": {
        **_SPATIAL,
        "dataset.name": "fashion_mnist",
        "eval.more_steps": 17,
        "log_every": 200,
        "model.channels": 8,
        "model.grid": (7, 7),
        "num_steps": 4000,
    },
    "cifar10_spatial_cpu": {
        **_SPATIAL,
        "batch_size": 4,
        "by_cells": False,
        "checkpoint_every": 1000,
        "dataset.name": "cifar10",
        "log_every": 200,
        "model.kernel_size": 3,
        "num_steps": 12000,
        "points_per_group": 1024,
    },
    "cifar10_cells_cpu": {
        **_SPATIAL,
        "checkpoint_every": 1000,
        "dataset.name": "cifar10",
        "log_every": 200,
        "num_steps": 12000,
    },
    "cifar10_spatial": {
        **_SPATIAL,
        "batch_size": 64,
        "by_cells": False,
        "checkpoint_every": 2000,
        "dataset.name": "cifar10",
        "eval.batch_size": 500,
        "eval.more_steps": 0,
        "log_every": 200,
        "model.depth": 6,
        "model.kernel_size": 3,
        "model.width": 256,
        "num_steps": 6000,
        "optimizer.ema_decay": 0.999,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 200,
        "points_per_group": 0,
        "write_functaset": False,
    },
    "winds": _WINDS,
    "smoke_winds": {
        **_WINDS,
        **_SMOKE,
        "batch_size": 4,
        "dataset.name": "synthetic_winds",
        "model.latent_dim": 8,
        "num_pixels": 100,
        "warm_start_steps": 5,
    },
    "speech": _SPEECH,
    "smoke_speech": {
        **_SPEECH,
        **_SMOKE,
        "batch_size": 16,
        "dataset.name": "synthetic_speech",
        "model.channels": 6,
        "warm_start_steps": 5,
    },
    "furniture": _FURNITURE,
    "smoke_furniture": {
        **_FURNITURE,
        **_SMOKE,
        "batch_size": 64,
        "dataset.name": "synthetic_furniture",
        "model.channels": 4,
        "warm_start_steps": 5,
    },
    "folder": {
        **_SPATIAL,
        "batch_size": 1024,
        "checkpoint_every": 500,
        "dataset.image_size": 64,
        "dataset.name": "folder",
        "eval.more_steps": 0,
        "log_every": 100,
        "model.grid": (16, 16),
        "num_steps": 4000,
    },
    "cifar10_cpu": {
        "batch_size": 16,
        "coarse_steps": 6000,
        "dataset.name": "cifar10",
        "model.latent_dim": 256,
        "num_steps": 8500,
        # At 1e-3 the loss diverges near step 1,500 and recovers only in part.
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
    "num_steps": settings.whole(0),
    "num_pixels": settings.whole(0),
    "max_drop": settings.at_least(0),
    "warm_start_steps": settings.whole(0),
    "points_per_group": settings.whole(0),
    "coarse_steps": settings.whole(0),
    "coarse_factor": settings.whole(1),
    "model.type": settings.one_of(
        "LatentModulatedSiren", "ModulatedSiren", "SpatialSiren"
    ),
    "model.width": settings.whole(1),
    "model.depth": settings.whole(2),
    "model.latent_dim?": settings.whole(1),
    "model.grid?": settings.each(settings.whole(1)),
    "model.channels?": settings.whole(1),
    "model.kernel_size?": settings.whole(1),
    "model.omega_0?": settings.above(0),
    "model.coord_scale?": settings.above(0),
    "model.layer_sizes?": settings.each(settings.whole(1), empty=True),
    "model.derivative_dtype?": settings.one_of("float32", "bfloat16"),
    "inner.num_steps": settings.whole(1),
    "inner.calibration": settings.optional(settings.within("(0, 2)")),
    "inner.rate_range": settings.pair(settings.at_least(0), equal=True),
    "inner.noise_std": settings.at_least(0),
    "inner.l2_weight": settings.at_least(0),
    "inner.rate_clip": settings.optional(settings.pair(settings.at_least(0))),
    "optimizer.rate_multiplier": settings.at_least(0),
    "optimizer.clip_norm": settings.at_least(0),
    "optimizer.ema_decay": settings.within("[0, 1)"),
    "eval.batch_size": settings.whole(1),
    "eval.num_images": settings.whole(0),
    "eval.more_images": settings.whole(1),
    "eval.more_steps": settings.whole(0),
    "eval.learning_rate": settings.at_least(0),
    **settings.optimizer_rules(),
}

get_config = functools.partial(settings.build, "meta_learn", BASE, VARIANTS)
