"""Prunes networks that train_lbi trained with DessiLBI.

    python -m experiments.prune_lbi \
        --config=experiments/configs/prune_lbi.py:VARIANT \
        --config.run=runs/train_lbi/digits

The table of variants, results and times is in the README.
"""

from ml_collections import ConfigDict

VARIANTS = (
    *("digits", "smoke", "mnist_report", "mnist"),
    *("cifar10_report", "cifar10", "cifar10_short", "cifar10_narrow"),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Settings of one variant; each prunes the run of train_lbi of the same name.

    Args:
      variant:
        digits: LeNet on digits, half a minute.
        smoke: the same without fine-tuning to speak of, to see that everything runs.
        mnist_report, mnist: LeNet on MNIST, all seeds.
        cifar10_report, cifar10: VGG-A; slow without a GPU.
        cifar10_short, cifar10_narrow: VGG-A after few epochs; a quarter of its
          channels.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}.")
    config = ConfigDict()
    config.experiment = "prune_lbi"
    config.variant = variant
    config.seed = 0
    config.tensorboard = False

    # A run of train_lbi: of one method and seed, or of several, of which all seeds of
    # `method` are taken.
    config.run = f"runs/train_lbi/{variant}"
    config.method = "dessilbi"

    # The layer of Tables 10 and 12 and the shares removed from it; every layer is
    # pruned at the last of them for Tables 11 and 13.
    config.layer = "conv3"
    config.sparsities = (0.0, 0.2, 0.4, 0.6, 0.8)
    # Further shares of the curves against sparsity: of `layer`, and of the filters of
    # all convolutions by layer and all together.
    config.curve_sparsities = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
    # Draws over which random pruning is averaged.
    config.num_random = 3
    # Batches of 500 training images from which BN statistics are measured anew.
    config.num_recalibration_batches = 10

    # Masked training of `layer` at the last sparsity, and of the compressed network; 0
    # epochs leave it out.
    config.finetune = ConfigDict(
        {
            "epochs": 1,
            "compressed_epochs": 5,
            "name": "sgd",
            "learning_rate": 0.01,
            "schedule": "cosine",
            "warmup_steps": 0,
            "options": {"momentum": 0.9},
        }
    )
    # Channels that each hidden layer keeps in the compressed network, as shares.
    config.compress = ConfigDict(
        {"conv1": 0.67, "conv2": 0.5, "conv3": 0.167, "fc1": 0.286}
    )
    # Images at once when the speed is measured.
    config.timing_batch_size = 128

    if variant == "smoke":
        config.curve_sparsities = (0.5,)
        config.finetune.compressed_epochs = 1
    if variant.startswith("cifar10"):
        names = [f"conv{i + 1}" for i in range(8)] + ["fc1", "fc2"]
        config.compress = ConfigDict({name: 0.5 for name in names})
        config.finetune.compressed_epochs = 2
    if variant == "cifar10_short":
        # An evaluation of the whole VGG takes 15 s on two cores.
        config.curve_sparsities = ()
        config.num_random = 1
        config.num_recalibration_batches = 4
        config.finetune.epochs = 0
        config.finetune.compressed_epochs = 0
    return config
