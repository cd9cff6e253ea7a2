"""Measures the landscape of a network with and without batch normalisation.

    python -m experiments.probe_landscape \
        --config=experiments/configs/probe_landscape.py:VARIANT

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = (
    "digits",
    "smoke",
    "deep_linear",
    "cifar10_cpu",
    "cifar10_subset",
    "cifar10",
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        digits: a small VGG on the digits of scikit-learn; two minutes.
        smoke: the same for a few steps, to see that everything runs.
        deep_linear: a linear network of 25 layers on the digits; two minutes.
        cifar10_cpu: a quarter of the channels of VGG-A on CIFAR-10, 3 epochs, two
          seeds; three quarters of an hour on two cores.
        cifar10_subset: the same on 5,000 images, 30 epochs, which all but the smallest
          rate without normalisation fit; no surface; as long.
        cifar10: VGG-A on CIFAR-10, 20 epochs as in the report; needs a GPU.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "probe_landscape"
    config.variant = variant
    config.tensorboard = False

    # bn: with batch normalisation; plain: without. Each is trained at every learning
    # rate with every seed.
    config.networks = ("bn", "plain")
    config.learning_rates = (1e-4, 5e-4, 1e-3, 2e-3)
    config.seeds = (0,)

    # name: a data set of experiments/data.py with labels, and its data_dir.
    config.dataset = ConfigDict({"name": "cifar10"})
    config.dataset.data_dir = config_dict.placeholder(str)
    # Only the first ones; 0 takes all.
    config.num_train = 0
    config.num_test = 0
    # Smaller images are enlarged by a whole factor and padded.
    config.image_size = 32
    # VGG or DeepLinear, with further fields of landscape.vgg.VGG or
    # landscape.deep_linear.DeepLinear but batch_norm.
    config.model = ConfigDict({"type": "VGG"})
    # Whose gradients the report compares between steps: a pattern of paths.
    config.last_layer = "^fc3/kernel$"

    # Any optimizer of optax; its learning rate is one of those above.
    config.optimizer = ConfigDict({"name": "adam", "options": {}})
    config.num_epochs = 20
    config.batch_size = 128
    config.checkpoint_every = 780

    # Along the gradient: every so many steps, on the batch of the next one.
    config.probe_every = 39
    # eta: multiples of the gradient (not of the learning rate). The largest is that of
    # Santurkar et al., beyond which the network without normalisation breaks down.
    config.step_sizes = tuple(0.4 / 2**k for k in reversed(range(8)))
    # How batch normalisation acts in a probe: batch (its own statistics, as in
    # training), frozen (running statistics) or recalibrated (statistics of the images
    # of `sharpness`, at each point).
    config.bn_mode = "batch"

    # Largest eigenvalues of the Hessian on the first training images: every so many
    # steps (0: never), by so many Lanczos steps.
    config.sharpness = ConfigDict(
        {"every": 390, "num_images": 512, "num_eigenvalues": 2, "num_steps": 15}
    )
    # Losses on a square around the trained network of the first seed at this learning
    # rate: (size, size) points from -span to span, on the first training images in
    # chunks, whose own statistics normalise them. size 0 leaves it out.
    config.surface = ConfigDict(
        {
            "learning_rate": 1e-3,
            "size": 51,
            "span": 1.0,
            "num_images": 10_000,
            "chunk_size": 500,
        }
    )

    if variant in ("cifar10_cpu", "cifar10_subset"):
        config.seeds = (0, 1)
        config.model.stages = ((16,), (32,), (64, 64), (128, 128), (128, 128))
        config.model.hidden = (128, 128)
        config.num_epochs = 3
        config.checkpoint_every = 390
        config.sharpness.num_images = 256
        config.surface.size = 25
        config.surface.num_images = 1000
    if variant == "cifar10_subset":
        config.num_train, config.num_test = 5000, 2000
        config.num_epochs = 30
        config.probe_every = 195
        config.surface.size = 0
    if variant in ("digits", "smoke", "deep_linear"):
        config.dataset.name = "digits"
        config.image_size = 16
        config.model.stages = ((8,), (16,), (16, 16))
        config.model.hidden = (32, 32)
        config.num_epochs = 15
        config.batch_size = 64
        config.checkpoint_every = 110
        config.probe_every = 11
        config.sharpness.every = 110
        config.sharpness.num_images = 256
        config.surface.size = 25
        config.surface.num_images = 500
        config.surface.chunk_size = 250
    if variant == "deep_linear":
        config.image_size = 8
        config.model = ConfigDict({"type": "DeepLinear", "depth": 25, "width": 64})
        config.last_layer = "^fc25/kernel$"
    if variant == "smoke":
        config.learning_rates = (1e-3, 2e-3)
        config.num_train = 128
        config.num_test = 100
        config.batch_size = 32
        config.num_epochs = 2
        config.checkpoint_every = 4
        config.probe_every = 2
        config.step_sizes = (0.1, 0.4)
        config.sharpness.every = 4
        config.sharpness.num_images = 32
        config.sharpness.num_steps = 3
        config.surface.size = 3
        config.surface.num_images = 64
        config.surface.chunk_size = 32
    return config
