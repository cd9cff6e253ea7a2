"""Fits a SIREN to each of one or more images.

    python -m experiments.fit_image --config=experiments/configs/fit_image.py:VARIANT

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = ("photo", "smoke", "report", "best", "many")


def get_config(variant: str = "photo") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        photo: the photograph that scikit-learn carries, 512 pixels wide, or a file of
          yours: --config.image=PATH. Minutes on two cores.
        smoke: the same with 16 pixels, in seconds.
        report: TFDS cifar10, the setting of the report at sizes 32 to 128 and its
          mosaic of nine images; Adam at a constant rate.
        best: TFDS cifar10, exact to 8 bits in 100 steps (32x32) or 1,000 (128x128).
        many: 64 images of TFDS cifar10 at once, small networks; their parameter
          vectors are a functaset.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "fit_image"
    config.variant = variant
    config.seed = 0
    config.tensorboard = False

    # An image file of any size, grey or RGB; it takes the place of the data set.
    config.image = config_dict.placeholder(str)
    # name: photograph, or a data set of experiments/data.py with its data_dir.
    config.dataset = ConfigDict({"name": "photograph"})
    config.dataset.data_dir = config_dict.placeholder(str)

    # What is fitted, one entry for each task; a single entry serves all tasks.
    # Pixels of the longer side, to which an image is resized.
    config.resolution = (512,)
    # The first images of the training split, each fitted by a network of its own.
    config.num_images = (1,)
    # k x k images side by side are one image, k * resolution wide.
    config.mosaic = (1,)
    config.num_steps = (4000,)
    # Steps after which the reconstruction is kept and measured, besides the last one.
    config.snapshot_steps = (100, 200, 400, 800, 1600)

    # The fields of functa.Siren; out_channels is taken from the images.
    config.model = ConfigDict(
        {
            "type": "Siren",
            "width": 256,
            "depth": 5,
            "omega_0": 30.0,
            "fast_sine": True,
        }
    )
    config.model.out_channels = config_dict.placeholder(int)
    # Training sees the pixel grid, [0, 1] along each axis, mapped to this range; the
    # wider, the higher the frequencies that the network starts with: pixels are fitted
    # sooner, and what lies between the pixels of a small image is less smooth.
    # Sitzmann et al. use (-1, 1). Its centre at 0 makes a network that starts without
    # biases an odd function; (0, 2) has the same frequencies and does not.
    # The map is folded into the first layer of what a run exports.
    config.coord_range = (0.0, 2.0)

    # `name` is any optimizer of optax or optax.contrib; `options` are its keywords.
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "options": {"b2": 0.99},
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 5,
        }
    )
    # Random pixels of an image that a step sees; 0 means all.
    config.num_pixels = 0
    config.log_every = 100
    config.checkpoint_every = 200

    if variant == "photo":
        # Noise of the drawn pixels: 1e-3 stays near 26 dB until the rate decays.
        config.optimizer.learning_rate = 3e-4
        config.num_pixels = 8192
    elif variant == "smoke":
        config.model.update({"width": 32, "depth": 3})
        # The default range holds frequencies that so few pixels cannot show.
        config.coord_range = (0.0, 0.5)
        config.resolution = (16,)
        config.num_steps = (100,)
        config.snapshot_steps = (10, 20, 50)
        config.log_every = 10
        config.checkpoint_every = 20
    elif variant == "report":
        config.dataset.name = "cifar10"
        config.resolution = (32, 64, 96, 128, 32)
        config.num_images = (8, 1, 1, 1, 1)
        config.mosaic = (1, 1, 1, 1, 3)
        config.num_steps = (2000, 2000, 2000, 2000, 800)
        config.snapshot_steps = (100, 200, 400, 800)
        config.coord_range = (-1.0, 1.0)
        config.optimizer.update({"learning_rate": 1e-4, "schedule": "constant"})
        config.optimizer.options = {}
        config.optimizer.warmup_steps = 0
    elif variant == "best":
        config.dataset.name = "cifar10"
        # 1e-3 is quicker at 32x32, but falls by up to 30 dB on its way at 128x128.
        config.optimizer.learning_rate = 3e-4
        config.resolution = (32, 128)
        config.num_images = (8, 1)
        config.num_steps = (100, 1000)
        config.snapshot_steps = (20, 50, 100, 200, 400)
        config.log_every = 50
    elif variant == "many":
        config.dataset.name = "cifar10"
        config.model.update({"width": 64, "depth": 4})
        config.resolution = (32,)
        config.num_images = (64,)
        config.num_steps = (400,)
        config.snapshot_steps = (50, 100, 200)
    return config
