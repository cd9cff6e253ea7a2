"""Meta-learns a latent-modulated SIREN over a data set of images.

    python -m experiments.meta_learn --config=experiments/configs/meta_learn.py:VARIANT

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = ("digits", "smoke", "mnist", "cifar10_cpu", "cifar10")


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        digits: 8x8 grey digits that scikit-learn carries; minutes on two cores.
        smoke: the same in seconds, to see that everything runs.
        mnist: TFDS mnist, 28x28 grey.
        cifar10_cpu: TFDS cifar10 with a small network, half an hour on two cores.
        cifar10: TFDS cifar10 at the size of the paper; needs a GPU.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "meta_learn"
    config.variant = variant
    config.seed = 0
    config.tensorboard = False

    # A run of meta_learn or import_functa whose weights training starts from; with
    # --config.num_steps=0 they are only evaluated.
    config.init_from = config_dict.placeholder(str)

    # name: digits, folder, npz, or a TFDS image set; data_dir: see experiments/data.py.
    config.dataset = ConfigDict({"name": "digits"})
    config.dataset.data_dir = config_dict.placeholder(str)

    # The fields of functa.LatentModulatedSiren (or ModulatedSiren, without a latent).
    # out_channels is taken from the data if it is not given.
    config.model = ConfigDict(
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
            "dtype": "float32",
        }
    )
    config.model.out_channels = config_dict.placeholder(int)

    config.inner = ConfigDict(
        {
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
        }
    )
    # Rates are kept within these bounds after every update, if given.
    config.inner.rate_clip = config_dict.placeholder(tuple)

    # `name` is any optax optimizer; `options` are its further keywords.
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "options": {},
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "clip_norm": 0.3,
            # The rates of meta-SGD learn this much faster than the weights.
            "rate_multiplier": 5.0,
            "ema_decay": 0.0,
        }
    )
    config.num_steps = 1000
    config.batch_size = 32
    # Points of the images worked through at once; the outer gradient is summed over
    # these groups. On a CPU a group should fit the cache; 0 takes the batch at once.
    config.points_per_group = 1024
    # The first coarse_steps updates see images averaged over coarse_factor^2 pixels.
    config.coarse_steps = 0
    config.coarse_factor = 2
    # Random pixels of each image that an update sees; 0 means all.
    config.num_pixels = 0
    config.log_every = 100
    config.checkpoint_every = 500

    config.write_functaset = True
    config.eval = ConfigDict(
        {
            "batch_size": 8,
            # Test images (0: all) fitted with the inner loop, and how many of them are
            # fitted further by `optimizer` of optax for `more_steps` steps; the
            # learning rate decays by a cosine, 0 leaves the optimizer its own.
            "num_images": 0,
            "more_images": 64,
            "more_steps": 197,
            "optimizer": "lbfgs",
            "learning_rate": 0.0,
        }
    )

    if variant == "smoke":
        config.model.update({"width": 16, "depth": 3, "latent_dim": 8})
        config.num_steps = 20
        config.batch_size = 16
        config.log_every = 5
        config.checkpoint_every = 10
        config.optimizer.warmup_steps = 2
        config.eval.update({"num_images": 16, "more_images": 4, "more_steps": 4})
    elif variant == "mnist":
        config.dataset.name = "mnist"
        config.batch_size = 16
        config.num_steps = 4000
        config.coarse_steps = 2500
        config.eval.num_images = 1000
    elif variant == "cifar10_cpu":
        config.dataset.name = "cifar10"
        config.model.latent_dim = 256
        config.batch_size = 16
        config.num_steps = 8500
        config.coarse_steps = 6000
        # At 1e-3 the run falls apart near step 1,500, and only mostly recovers.
        config.optimizer.learning_rate = 5e-4
    elif variant == "cifar10":
        config.dataset.name = "cifar10"
        config.model.update(
            {"width": 512, "depth": 15, "latent_dim": 512, "omega_0": 30.0}
        )
        config.model.fast_sine = False
        config.inner.rate_range = (0.005, 0.1)
        config.inner.rates_per_step = False
        # The original's constant 3e-6 is for 500,000 steps; this is for a tenth.
        config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 1000})
        config.num_steps = 50_000
        config.checkpoint_every = 1000
        config.points_per_group = 0
        config.batch_size = 32
        config.eval.batch_size = 250
        config.eval.more_images = 1000
    return config
