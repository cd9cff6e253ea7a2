"""Trains a network with DessiLBI, with DessiLBI+Adam and with Adam.

    python -m experiments.train_lbi --config=experiments/configs/train_lbi.py:VARIANT

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = (
    *("digits", "smoke", "mnist_report", "mnist"),
    *("cifar10_report", "cifar10", "cifar10_short", "cifar10_narrow"),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant.

    Args:
      variant:
        digits: LeNet on the digits of scikit-learn; a minute.
        smoke: the same for two epochs, to see that everything runs.
        mnist_report, cifar10_report: the settings of the report: LeNet on MNIST, VGG-A
          with batch normalisation on CIFAR-10, 20 epochs at constant rates.
        mnist, cifar10: the same networks with our settings; cifar10 needs a GPU.
        cifar10_short: VGG-A with batch normalisation, DessiLBI alone, 8 epochs without
          augmentation: half an hour on two cores.
        cifar10_narrow: a quarter of its channels, 10 epochs without augmentation, all
          three; a quarter of an hour on two cores.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "train_lbi"
    config.variant = variant
    config.tensorboard = False

    # Which of the optimizers below to train with, each with every seed.
    config.methods = ("adam", "dessilbi", "dessilbi_adam")
    config.seeds = (0, 1, 2)

    # name: a data set of experiments/data.py with labels, and its data_dir.
    config.dataset = ConfigDict({"name": "mnist"})
    config.dataset.data_dir = config_dict.placeholder(str)
    # Only the first ones; 0 takes all.
    config.num_train = 0
    config.num_test = 0
    # Smaller images are enlarged by a whole factor and padded.
    config.image_size = 28
    # Random crops and flips.
    config.augment = False
    # LeNet or VGG, with further fields of lbi.lenet.LeNet or landscape.vgg.VGG.
    config.model = ConfigDict({"type": "LeNet"})

    config.num_epochs = 20
    config.batch_size = 128
    # Steps; every epoch ends with an evaluation.
    config.log_every = 500
    config.checkpoint_every = 2500

    # The penalties' lambda: "auto" is 1; "suggested" lets the median group of each
    # layer enter at `enter_at` of the run, by lbi.suggest_lambda.
    config.penalty = "suggested"
    config.enter_at = 0.4
    # name: an optimizer of lbi or optax, or adam_then_dessilbi (the report's: a full
    # step of each). schedule: constant or cosine, after the warm-up.
    config.optimizer = ConfigDict(
        {
            "adam": _optimizer("adam", 1e-3),
            "dessilbi": _optimizer("dessilbi", 0.05, nu=20.0, kappa=1.0, momentum=0.9),
            "dessilbi_adam": _optimizer("dessilbi_adam", 1e-3, nu=5.0, kappa=1.0),
        }
    )

    if variant in ("digits", "smoke"):
        config.dataset.name = "digits"
        config.seeds = (0,)
        config.batch_size = 64
    if variant == "smoke":
        config.num_epochs = 2
        config.num_train = 256
        config.log_every = 2
        config.checkpoint_every = 4
    if variant.startswith("cifar10"):
        config.dataset.name = "cifar10"
        config.image_size = 32
        config.model = ConfigDict({"type": "VGG", "batch_norm": True})
        config.optimizer.dessilbi.options.nu = 50.0
        # The gradient does not hold a filter against the coupling under batch
        # normalisation: what has not entered early never does.
        config.enter_at = 0.1
        config.seeds = (0,)
        config.log_every = 39
        config.checkpoint_every = 390
    if variant == "cifar10":
        config.augment = True
    elif variant == "cifar10_short":
        config.methods = ("dessilbi",)
        config.num_epochs = 8
    elif variant == "cifar10_narrow":
        config.model.stages = ((16,), (32,), (64, 64), (128, 128), (128, 128))
        config.model.hidden = (128, 128)
        config.num_epochs = 10
        config.log_every = 130
    if variant.endswith("report"):
        config.penalty = "auto"
        config.seeds = (0,)
        for method, name in {
            "adam": "adam",
            "dessilbi": "dessilbi",
            "dessilbi_adam": "adam_then_dessilbi",
        }.items():
            # The report divides the rate by 10 every 20 epochs, of which it trains 20.
            settings = _optimizer(name, 0.01)
            settings.schedule = "constant"
            if method != "adam":
                settings.options = ConfigDict(
                    {"nu": 10.0, "kappa": 1.0, "momentum": 0.9}
                )
            config.optimizer[method] = settings
    return config


def _optimizer(name, learning_rate, **options):
    return ConfigDict(
        {
            "name": name,
            "learning_rate": learning_rate,
            "schedule": "cosine",
            "warmup_steps": 0,
            "options": options,
        }
    )
